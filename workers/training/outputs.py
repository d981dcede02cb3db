"""What the trained model makes of training samples: outputs, losses, and the last layer's inputs.

A forward pass a sample at w_T in eval mode, nothing backwards. Letters: R samples, F inputs of the last layer
(the features), C outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...storage.errors import NonFiniteLoss, RecipeError
from ...storage.trajectory import Trajectory
from ..data.batches import fetch, to_device
from ..determinism import derived_seed, preserved_generators, seed_everything
from ..model.state import unchanged_buffers
from ..recipe import Batch
from .metrics import OutputWatch, evaluating, predicted, see_each_other
from .test_gradients import TEST_BATCH
from .training import Training

REMEDY = "detectors that look at features need a model that ends in nn.Linear; use another --by"


@dataclass(frozen=True, kw_only=True, slots=True)
class LastLayer:
    """The nn.Linear whose output is what the model returns.

    Attributes:
        name: Its name in the model; empty: it is the model.
        features: F.
        outputs: C.
        plain: Whether a pass calls it once, nothing else holds its weight, and what the model returns is what it
            computes: then features and outputs say all of its gradient.
    """

    name: str
    features: int
    outputs: int
    plain: bool

    @property
    def weight(self) -> str:
        """Name of its weight among the parameters."""
        return f"{self.name}.weight" if self.name else "weight"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OutputRows:
    """Of R samples: feature (R, F), output (R, C), loss (R,), prediction (R,), -1 where unknown."""

    feature: npt.NDArray[np.floating]
    output: npt.NDArray[np.floating]
    loss: npt.NDArray[np.float64]
    prediction: npt.NDArray[np.int64]


class _Watch:
    """Notes what the linear layers got and gave in a pass, and what returned the model's output."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._names = {module: name for name, module in model.named_modules()}
        self._calls: dict[nn.Linear, tuple[Tensor, Any]] = {}
        self._count: Counter[nn.Linear] = Counter()
        self._last: Any = None
        self._latest: tuple[nn.Module, Any] | None = None
        self._handles = [module.register_forward_hook(self._keep) for module in self._names]

    def _keep(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, nn.Linear) and args:
            self._calls[module] = (args[0], output)
            self._count[module] += 1
        if module is self.model:
            self._last = output
        else:
            self._latest = (module, output)

    def clear(self) -> None:
        self._calls.clear()
        self._count.clear()
        self._last = self._latest = None

    def found(self, size: int) -> tuple[nn.Linear, Tensor, Tensor, int]:
        """Return the last layer, its inputs and outputs, and how often it was called.

        Raises:
            RecipeError: No linear layer returned the model's last output of shape (size, C).
        """
        output = self._last
        for module, (inputs, given) in self._calls.items():
            if given is output and output.ndim == 2 and len(output) == size:
                return module, inputs, output, self._count[module]
        raise RecipeError(f"the model has no last linear layer: {self._instead(output, size)}; {REMEDY}")

    def _instead(self, output: Any, size: int) -> str:
        if output is None:
            return "losses() does not call the model as a whole"
        if not isinstance(output, Tensor):
            return f"it returns {type(output).__name__} and no tensor"
        shape = ", ".join(map(str, ("B" if n == size else n for n in output.shape)))
        if self._latest is None or self._latest[1] is not output:
            return f"its output, of shape ({shape}), is what no layer returned"
        owner = self._latest[0]
        return f"its output, of shape ({shape}), is that of layer {self._names[owner]!r}, a {type(owner).__name__}"

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


class TrainingOutputs:
    """Passes training samples through the trained model.

    Args:
        training: Gives model, recipe, data, device; its weights are replaced by the record's w_T.
        trajectory: The record.

    Raises:
        RecipeError: The model does not end in a linear layer: says in what it ends.
    """

    def __init__(self, training: Training, trajectory: Trajectory) -> None:
        self.training = training
        last = trajectory.checkpoint(len(trajectory.checkpoint_steps) - 1)
        training.load_weights(last.weights, last.buffers)
        self.size = TEST_BATCH
        with self._listening() as (watch, _):
            batch = self._fetch(np.arange(min(self.size, training.n_train)))
            size = min(self.size, training.n_train)
            if see_each_other(training.recipe, training.model, batch, size):
                self.size = 1  # what a sample loses must not depend on how the set is cut
            watch.clear()
            training.losses(batch, size)
            module, inputs, output, calls = watch.found(size)
            holders = [
                m for m in training.model.modules() for p in m.parameters(recurse=False) if p is module.weight
            ]
            # Changed in place, it differs. Under autocast the layer computes in fewer digits.
            again = nn.functional.linear(inputs.to(module.weight.dtype), module.weight, module.bias)
            rough = output.dtype != again.dtype
            same = torch.allclose(output.to(again.dtype), again, rtol=0.05 if rough else 1e-5, atol=1e-8)
            name = next(name for name, one in training.model.named_modules() if one is module)
            self.layer = LastLayer(
                name=name,
                features=inputs.shape[1],
                outputs=output.shape[1],
                plain=calls == 1 and len(holders) == 1 and same,
            )

    @contextmanager
    def _listening(self) -> Iterator[tuple[_Watch, OutputWatch]]:
        model = self.training.model
        watch, outputs = _Watch(model), OutputWatch(model)
        watch.clear()
        try:
            with preserved_generators(), evaluating(model), torch.no_grad(), unchanged_buffers(model):
                yield watch, outputs
        finally:
            watch.close()
            outputs.close()

    def _fetch(self, chosen: npt.NDArray[np.int64]) -> Batch:
        training = self.training
        seed_everything(derived_seed(training.recipe.seed, "train", int(chosen[0])))
        return to_device(fetch(training.recipe, training.dataset, chosen), training.device, training.dtype)

    def rows(self, indices: npt.NDArray[np.int64], report: Callable[[int], None] | None = None) -> OutputRows:
        """Return what the model makes of the given training samples; memory for R rows of F + C numbers.

        Raises:
            NonFiniteLoss: A loss or an output is NaN or infinite: named by train_index.
        """
        training, parts = self.training, list[OutputRows]()
        with self._listening() as (watch, outputs):
            for start in range(0, len(indices), self.size):
                chosen = indices[start : start + self.size]
                batch = self._fetch(chosen)
                watch.clear()
                seed_everything(derived_seed(training.recipe.seed, "train/losses", int(chosen[0])))
                losses = training.losses(batch, len(chosen)).double().cpu().numpy()
                _, feature, output, _ = watch.found(len(chosen))
                found = predicted(training.recipe, training.model, batch, outputs, len(chosen))
                parts.append(
                    OutputRows(
                        feature=feature.to(training.dtype).cpu().numpy(),
                        output=output.to(training.dtype).cpu().numpy(),
                        loss=losses,
                        prediction=np.full(len(chosen), -1) if found is None else found.cpu().numpy(),
                    )
                )
                _check_finite(parts[-1], chosen)
                if report:
                    report(start + len(chosen))
        return OutputRows(
            feature=np.concatenate([part.feature for part in parts]),
            output=np.concatenate([part.output for part in parts]),
            loss=np.concatenate([part.loss for part in parts]),
            prediction=np.concatenate([part.prediction for part in parts]),
        )


def _check_finite(rows: OutputRows, chosen: npt.NDArray[np.int64]) -> None:
    good = np.isfinite(rows.loss) & np.isfinite(rows.output).all(1) & np.isfinite(rows.feature).all(1)
    if not good.all():
        bad = int(chosen[int(good.argmin())])
        raise NonFiniteLoss(
            f"loss, output or features of train_index {bad} are not finite at the trained weights; "
            "lower the learning rate, or look at that sample"
        )

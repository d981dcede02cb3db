"""The trained model of a record, asked about single samples.

Letters: R samples asked about, O outputs of the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ...storage.errors import InputError
from ...storage.trajectory import Trajectory
from ..data.batches import fetch, to_device
from ..data.user_code import user_code
from ..determinism import derived_seed, preserved_generators, seed_everything
from ..model.state import unchanged_buffers
from ..recipe import Recipe
from .metrics import OutputWatch, evaluating, predicted
from .training import Compute, Training

Part = Literal["train", "test"]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outputs:
    """What the trained model makes of R samples.

    Attributes:
        loss: (R,) of each, at w_T in eval mode.
        probability: (R, O) softmax of its outputs; None where these are no scores of classes.
        prediction: (R,) predicted class, -1 where there is none.
    """

    loss: npt.NDArray[np.float64]
    probability: npt.NDArray[np.float64] | None
    prediction: npt.NDArray[np.int64]


class Trained:
    """Model and datasets of a recipe, with the weights at the end of its record.

    Args:
        recipe: The recipe that was recorded.
        compute: How to compute.
        trajectory: The record.

    Raises:
        InputError: The recipe's datasets or parameters are not those of the record.
    """

    def __init__(self, recipe: Recipe, compute: Compute, trajectory: Trajectory) -> None:
        self.recipe = recipe
        with preserved_generators():
            self.training = Training(recipe, compute)
            seed_everything(recipe.seed)
            with user_code(f"{recipe.name}.test_dataset() failed:", always=True):
                test = recipe.test_dataset()
        self.datasets: dict[Part, Dataset[Any]] = {"train": self.training.dataset, "test": test}
        last = trajectory.checkpoint(len(trajectory.checkpoint_steps) - 1)
        if len(last.weights) != self.training.layout.dimension:
            raise InputError(
                f"recipe {recipe.name} has a model of {self.training.layout.dimension:,} parameters and the record "
                f"one of {len(last.weights):,}; name the recipe that was run"
            )
        self.training.load_weights(last.weights, last.buffers)

    def size(self, part: Part) -> int:
        """Return how many samples a dataset has."""
        return len(self.datasets[part])  # type: ignore[arg-type]

    def item(self, part: Part, index: int) -> Any:
        """Return an item of a dataset, as the recipe makes it."""
        dataset = self.datasets[part]
        with preserved_generators(), user_code(f"{part} sample {index} could not be read:", always=True):
            seed_everything(derived_seed(self.recipe.seed, "show", index))
            many = getattr(dataset, "__getitems__", None)
            return many([index])[0] if many else dataset[index]

    @torch.no_grad()
    def outputs(self, part: Part, indices: Sequence[int]) -> Outputs:
        """Return what the model makes of samples, each looked at alone."""
        training = self.training
        loss, prediction = np.full(len(indices), np.nan), np.full(len(indices), -1, dtype=np.int64)
        rows: list[npt.NDArray[np.float64]] = []
        watch = OutputWatch(training.model)
        with preserved_generators(), evaluating(training.model), unchanged_buffers(training.model):
            for at, index in enumerate(indices):
                seed_everything(derived_seed(self.recipe.seed, "show", index))
                with user_code(f"{part} sample {index} could not be put through the model:", always=True):
                    found = fetch(self.recipe, self.datasets[part], [index])
                    batch = to_device(found, training.device, training.dtype)
                    loss[at] = float(training.losses(batch, 1)[0])
                    scores = watch.output
                    if isinstance(scores, torch.Tensor) and scores.ndim == 2 and scores.shape[1] > 1:
                        rows.append(scores[0].double().softmax(0).cpu().numpy())
                    classes = predicted(self.recipe, training.model, batch, watch, 1)
                if classes is not None:
                    prediction[at] = int(classes[0])
        watch.close()
        whole = len(rows) == len(indices) and len({len(row) for row in rows}) == 1
        return Outputs(loss=loss, probability=np.array(rows) if whole else None, prediction=prediction)

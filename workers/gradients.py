"""Gradients of the test losses at w_T, in eval mode, by the same per-sample machinery."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ..storage.errors import NonFiniteLoss
from ..storage.trajectory import Trajectory
from .data import fetch, to_device
from .determinism import derived_seed, preserved_generators, seed_everything
from .evaluate import OutputWatch, evaluating, predicted
from .persample.engine import PerSampleGradients
from .persample.probe import choose_strategies
from .persample.reference import constant_statistics
from .replay import PROBE_SAMPLES
from .training import Training

TEST_BATCH = 64
"""Test samples a forward pass; fixed, so that the bits of a row depend on nothing else."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TestRows:
    """Test gradients (R, D) with loss (R,), label and prediction (R,), -1 where unknown."""

    gradient: npt.NDArray[np.floating]
    loss: npt.NDArray[np.float64]
    label: npt.NDArray[np.int64]
    prediction: npt.NDArray[np.int64]


class TestGradients:
    """Computes d loss_j(w_T) / d w for test samples.

    Args:
        training: Gives model, recipe, device; its weights are replaced by the record's w_T.
        trajectory: The record.
    """

    __test__ = False  # not a test case, whatever pytest thinks of the name

    def __init__(self, training: Training, trajectory: Trajectory) -> None:
        self.training = training
        last = trajectory.checkpoint(len(trajectory.checkpoint_steps) - 1)
        training.load_weights(last.weights, last.buffers)
        with preserved_generators():
            seed_everything(training.recipe.seed)
            self.dataset = training.recipe.test_dataset()
        self.labels = training.recipe.labels(self.dataset)
        count = min(PROBE_SAMPLES, len(self.dataset))  # type: ignore[arg-type]
        with evaluating(training.model):
            batch = to_device(
                fetch(training.recipe, self.dataset, range(count)), training.device, training.dtype
            )
            strategies = choose_strategies(
                training.recipe, training.model, training.layout, batch, constant=True
            )
        self.engine = PerSampleGradients(training.recipe, training.model, training.layout, strategies)

    def rows(self, indices: npt.NDArray[np.int64], report: Callable[[int], None] | None = None) -> TestRows:
        """Return the gradients of the given test samples.

        Raises:
            NonFiniteLoss: A test loss is NaN or infinite: named by test_index.
        """
        training = self.training
        out = torch.empty(len(indices), training.layout.dimension, dtype=training.dtype)
        loss = np.empty(len(indices))
        label = np.full(len(indices), -1, dtype=np.int64)
        prediction = np.full(len(indices), -1, dtype=np.int64)
        if self.labels is not None:
            label[:] = [int(self.labels[int(j)]) for j in indices]
        with evaluating(training.model):
            watch = OutputWatch(training.model)
            for start in range(0, len(indices), TEST_BATCH):
                chosen = indices[start : start + TEST_BATCH]
                span = slice(start, start + len(chosen))
                self._block(chosen, out[span], loss[span], prediction[span], watch)
                if report:
                    report(start + len(chosen))
            watch.close()
        return TestRows(gradient=out.numpy(), loss=loss, label=label, prediction=prediction)

    def _block(
        self,
        chosen: npt.NDArray[np.int64],
        out: torch.Tensor,
        loss: npt.NDArray[np.float64],
        prediction: npt.NDArray[np.int64],
        watch: OutputWatch,
    ) -> None:
        training, size = self.training, len(chosen)
        seed_everything(derived_seed(training.recipe.seed, "test", int(chosen[0])))
        batch = to_device(fetch(training.recipe, self.dataset, chosen), training.device, training.dtype)
        positions = torch.arange(size, device=training.device)

        def keep(start: int, block: torch.Tensor) -> None:
            out[start : start + len(block)] = block

        with constant_statistics(training.model):
            with self.engine.capture.listen():
                losses_B = training.losses(batch, size)
                self.engine.before_backward(losses_B, positions)
                torch.autograd.grad(losses_B.mean(), training.parameters, allow_unused=True)
            # Before anything else calls the model: the watch notes its last output.
            with torch.no_grad():
                found = predicted(training.recipe, training.model, batch, watch, size)
            self.engine.after_backward(batch, positions, size, keep)
        loss[:] = losses_B.detach().double().cpu().numpy()
        if not np.isfinite(loss).all():
            bad = int(chosen[int(np.flatnonzero(~np.isfinite(loss))[0])])
            raise NonFiniteLoss(f"the loss of test_index {bad} is not finite at the trained weights")
        if found is not None:
            prediction[:] = found.cpu().numpy()

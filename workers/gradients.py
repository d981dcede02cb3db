"""Gradients of the test losses at w_T, in eval mode, by the same per-sample machinery."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from ..storage.errors import NonFiniteLoss, RecipeError
from ..storage.trajectory import Trajectory
from .data import fetch, to_device
from .determinism import derived_seed, preserved_generators, seed_everything
from .evaluate import OutputWatch, evaluating, predicted
from .module_state import unchanged_buffers
from .persample.engine import PerSampleGradients, Ways, always_vjp
from .persample.reference import constant_statistics
from .persample.trials import choose_ways
from .recipe import Batch
from .training import Training

logger = logging.getLogger(__name__)

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
        self.size = TEST_BATCH
        ways = self._tried()
        if ways.coupled:  # what a sample loses must not depend on how the test set is cut
            logger.info("test losses depend on the other samples of their batch: computed one by one")
            self.size = 1
            ways = replace(self._tried(), coupled=True)
        self.engine = PerSampleGradients(training.recipe, training.model, training.layout, ways)
        self.repaired = 0

    def _tried(self) -> Ways:
        training = self.training
        if training.compute.per_sample == "vjp":
            return always_vjp(training.layout)
        count = min(self.size, len(self.dataset))  # type: ignore[arg-type]
        with evaluating(training.model):
            found = fetch(training.recipe, self.dataset, range(count))
            batch = to_device(found, training.device, training.dtype)
            return choose_ways(training.recipe, training.model, training.layout, batch, constant=True)

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
            for start in range(0, len(indices), self.size):
                chosen = indices[start : start + self.size]
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
        found: list[torch.Tensor | None] = []

        def compute() -> torch.Tensor:
            losses_B = training.losses(batch, size)
            # Before anything else calls the model: the watch notes its last output.
            with torch.no_grad():
                found.append(predicted(training.recipe, training.model, batch, watch, size))
            return losses_B

        seed = derived_seed(training.recipe.seed, "test/losses", int(chosen[0]))
        losses_B, wrong = self._trace(self.engine, batch, size, seed, compute, out)
        if wrong:  # a rule that the trial found right is not for these samples
            logger.info("test gradients of %s inside the batch from test_index %d on", wrong, chosen[0])
            self.repaired += 1
            strategies = list(self.engine.strategies)
            for i in wrong:
                strategies[i] = "vjp"
            ways = replace(
                self.engine.ways, strategies=tuple(strategies), untried=self.engine.ways.untried - {*wrong}
            )
            engine = PerSampleGradients(training.recipe, training.model, training.layout, ways)
            losses_B, wrong = self._trace(engine, batch, size, seed, compute, out)
            engine.close()
        loss[:] = losses_B.detach().double().cpu().numpy()
        if not np.isfinite(loss).all():
            bad = int(chosen[int(np.flatnonzero(~np.isfinite(loss))[0])])
            raise NonFiniteLoss(f"the loss of test_index {bad} is not finite at the trained weights")
        if wrong:
            name = training.layout.entries[wrong[0]].name
            raise RecipeError(
                f"the gradients of test_index {chosen[0]} to {chosen[-1]} by parameter {name!r} do not add up to "
                "that of their mean loss: something changes gradients in the backward pass; remove it"
            )
        if found[-1] is not None:
            prediction[:] = found[-1].cpu().numpy()

    def _trace(
        self,
        engine: PerSampleGradients,
        batch: Batch,
        size: int,
        seed: int,
        compute: Callable[[], torch.Tensor],
        out: torch.Tensor,
    ) -> tuple[torch.Tensor, list[int]]:
        """Write a block's gradients and return its losses, and the entries whose rows do not add up."""
        training = self.training
        positions = torch.arange(size, device=training.device)
        whole: list[torch.Tensor | None] = []

        def keep(start: int, block: torch.Tensor) -> None:
            out[start : start + len(block)] = block

        seed_everything(seed)
        with constant_statistics(training.model), unchanged_buffers(training.model):
            losses_B = engine.trace(
                batch, positions, size, compute, lambda mean: whole.extend(training.gradient_of(mean))
            )
            engine.hand_over(positions, size, keep)
        return losses_B, training.unlike_sum(out, whole, size)

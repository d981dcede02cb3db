"""Gradients of single losses at w_T, in eval mode, by the same per-sample machinery: of test samples, or of training samples."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from ...storage.errors import NonFiniteLoss, RecipeError
from ...storage.trajectory import Trajectory
from ..data.batches import fetch, to_device
from ..data.cast import cast_model
from ..determinism import derived_seed, generator_states, preserved_generators, seed_everything
from ..model.state import copied, unchanged_buffers
from ..persample.engine import PerSampleGradients
from ..persample.trials import choose_ways
from ..persample.ways import Ways, always_vjp
from ..persample.wide import widened
from ..recipe import Batch
from .finite import check_own_gradients
from .fixed_pass import fixed_pass
from .metrics import OutputWatch, evaluating, predicted
from .training import Training
from .update_field import seen_through

logger = logging.getLogger(__name__)

DIFFERENCED, DERIVATIVE = 16, 1e-3
"""Test samples whose mean loss is differenced, and how far from its gradient that may be, relative to its norm."""

GROSS = 0.2
"""How far gradients taken one by one may add up to something else than the block's, relative."""

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
    WHAT: ClassVar[str] = "test"
    """Of which dataset: begins the seeds of what is random, and the words for a sample."""

    def __init__(self, training: Training, trajectory: Trajectory) -> None:
        self.training, self.trajectory = training, trajectory
        self.load(len(trajectory.checkpoint_steps) - 1)
        self.dataset = self._dataset()
        self.labels = training.recipe.labels(self.dataset)
        self.size = TEST_BATCH
        ways = self._tried()
        if ways.coupled:  # what a sample loses must not depend on how the test set is cut
            logger.info(
                "%s losses depend on the other samples of their batch: computed one by one", self.WHAT
            )
            self.size = 1
            ways = replace(self._tried(), coupled=True)
        self.engine = PerSampleGradients(training.recipe, training.model, training.layout, ways)
        self.repaired = 0
        self.through, self.derivative = False, self._is_derivative(through=False)
        if (
            self.derivative is False
        ):  # something is detached: what is asked for is how the loss itself changes
            self.through = self.derivative = bool(self._is_derivative(through=True))

    def load(self, k: int) -> None:
        """Put checkpoint ``k`` of the record into the model."""
        kept = self.trajectory.checkpoint(k)
        self.training.load_weights(kept.weights, kept.buffers)

    def _dataset(self) -> Dataset[Any]:
        with preserved_generators():
            seed_everything(self.training.recipe.seed)
            return self.training.recipe.test_dataset()

    def _is_derivative(self, *, through: bool) -> bool | None:
        """Whether the gradient is the derivative of the loss, by differences; None where they say nothing."""
        training = self.training
        recipe = widened(training.recipe)  # differences say nothing of what is rounded on its way
        with preserved_generators(), evaluating(training.model):
            try:
                model = cast_model(copied(training.model), None, torch.float64)
                parameters = training.layout.parameters(model)
                count = min(self.size, DIFFERENCED, len(self.dataset))  # type: ignore[arg-type]
                found = fetch(training.recipe, self.dataset, range(count))
                batch = to_device(found, training.device, torch.float64)
                with seen_through() if through else nullcontext():
                    loss = recipe.losses(model, batch).mean()
                slopes = torch.autograd.grad(loss, parameters, allow_unused=True)
            except RuntimeError:
                return None
            generator = torch.Generator().manual_seed(3)
            moves = [torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) for p in parameters]
            pairs = [(g, v) for g, v in zip(slopes, moves, strict=True) if g is not None]
            along = float(sum((g * v).sum() for g, v in pairs))
            size = math.sqrt(float(sum(g.square().sum() for g, _ in pairs)))
            fresh = generator_states()
            for width in (1e-7, 1e-9):  # the smaller where the larger crosses a kink
                ends = []
                for step in (width, -2 * width, width):
                    with torch.no_grad():
                        for p, v in zip(parameters, moves, strict=True):
                            p.add_(v, alpha=step)
                        ends.append(float(recipe.losses(model, batch).mean()))
                if fresh != generator_states():
                    return None  # random losses
                if abs((ends[0] - ends[1]) / (2 * width) - along) <= DERIVATIVE * max(size, 1e-3):
                    return True
        return False

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

    def each(
        self,
        indices: npt.NDArray[np.int64],
        take: Callable[[int, torch.Tensor], None],
        report: Callable[[int], None] | None = None,
    ) -> None:
        """Hand over (first row, gradients (R, D)) block after block, each valid during the call alone.

        Costs a forward and a backward pass a sample, and memory for `TEST_BATCH` rows of D numbers.

        Raises:
            NonFiniteLoss: A loss is NaN or infinite: named by its index.
            NonFiniteTangents: A gradient is, though its loss is not: likewise.
        """
        training = self.training
        out = torch.empty(min(self.size, len(indices)), training.layout.dimension, dtype=training.dtype)
        with evaluating(training.model):
            watch = OutputWatch(training.model)
            for start in range(0, len(indices), self.size):
                chosen = indices[start : start + self.size]
                rows = out[: len(chosen)]
                loss, prediction = np.empty(len(chosen)), np.empty(len(chosen), dtype=np.int64)
                self._block(chosen, rows, loss, prediction, watch)
                check_own_gradients(training, self.dataset, chosen, rows.numpy(), loss, self.WHAT)
                take(start, rows)
                if report:
                    report(start + len(chosen))
            watch.close()

    def _block(
        self,
        chosen: npt.NDArray[np.int64],
        out: torch.Tensor,
        loss: npt.NDArray[np.float64],
        prediction: npt.NDArray[np.int64],
        watch: OutputWatch,
    ) -> None:
        training, size = self.training, len(chosen)
        seed_everything(derived_seed(training.recipe.seed, self.WHAT, int(chosen[0])))
        batch = to_device(fetch(training.recipe, self.dataset, chosen), training.device, training.dtype)
        found: list[torch.Tensor | None] = []

        def compute() -> torch.Tensor:
            with seen_through() if self.through else nullcontext():
                losses_B = training.losses(batch, size)
            # Before anything else calls the model: the watch notes its last output.
            with torch.no_grad():
                found.append(predicted(training.recipe, training.model, batch, watch, size))
            return losses_B

        seed = derived_seed(training.recipe.seed, f"{self.WHAT}/losses", int(chosen[0]))
        losses_B, wrong = self._trace(self.engine, batch, size, seed, compute, out)
        if wrong:  # a rule that the trial found right is not for these samples
            logger.info("gradients of %s inside the batch from %s_index %d on", wrong, self.WHAT, chosen[0])
            self.repaired += 1
            strategies = list(self.engine.strategies)
            for i in wrong:
                strategies[i] = "vjp"
            ways = replace(
                self.engine.ways, strategies=tuple(strategies), untried=self.engine.ways.untried - {*wrong}
            )
            engine = PerSampleGradients(training.recipe, training.model, training.layout, ways)
            # By autograd itself: what still does not add up must be more than a low precision's rounding.
            losses_B, wrong = self._trace(engine, batch, size, seed, compute, out, GROSS)
            engine.close()
        loss[:] = losses_B.detach().double().cpu().numpy()
        if not np.isfinite(loss).all():
            bad = int(chosen[int(np.flatnonzero(~np.isfinite(loss))[0])])
            raise NonFiniteLoss(f"the loss of {self.WHAT}_index {bad} is not finite at the trained weights")
        if wrong:
            name = training.layout.entries[wrong[0]].name
            raise RecipeError(
                f"the gradients of {self.WHAT}_index {chosen[0]} to {chosen[-1]} by parameter {name!r} do not add up to "
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
        allowed: float | None = None,
    ) -> tuple[torch.Tensor, list[int]]:
        """Write a block's gradients and return its losses, and the entries whose rows do not add up."""
        training = self.training

        def keep(start: int, block: torch.Tensor) -> None:
            out[start : start + len(block)] = block

        seed_everything(seed)
        with (
            unchanged_buffers(training.model),
            fixed_pass(training, engine, batch, size, compute) as found,
        ):
            found.rows(keep)
        return found.losses_B, training.unlike_sum(out, found.whole, size, allowed)

"""Adjoint mode: contributions of all training samples at once, a few trainings a target.

From w_T back to w_0, for each target j with a_u = d loss_j / d w_T and a_m = 0 (the step being
m' = p m + k r, w' = w - h (s m' + q r), r = gradient + L w):

    a_m' = a_m - h s a_u;   v = k a_m' - h q a_u
    C(i, j) = -sum over the steps whose batch holds i of  <g_{t-1,i}, v> / B_t
    a_u <- a_u + L v + H v;   a_m <- p a_m'

Both products come out of one pass for a tile of targets (see ``second_order``). The weights of each
step are had by replaying segments between the record's checkpoints, halved until one fits in memory.
Where the record kept the weights of every step, they are read instead of trained again: nothing but the products
is then left to do, and what shows that data and model are the record's are the losses, which the products have.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.errors import ReplayDiverged
from ...storage.trajectory import Trajectory
from ..hessian.tiles import TILE, HessianTiles
from ..model.layout import load_flat
from ..model.state import load_buffers, pack_buffers, put_back
from ..recipe import Batch
from ..recursion.coefficients import Settings, recorded_settings
from ..recursion.family import Moment
from ..recursion.steps import Steps
from ..training.optimizer_state import OptimizerState
from ..training.training import Training
from ..training.verified import Report, Rows, VerifiedReplay
from .base import HeldBatch

SEGMENT_BYTES = 512 << 20
"""Weights of a segment that are kept in memory at a time."""

READ_STEPS = 64
"""Steps whose weights are read at a time, at most."""

SAME_LOSS = {torch.float32: 1e-4, torch.float64: 1e-9}
"""How far a step's loss may be from the record's, of it and of 0.01: the products have it from other operations."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Held:
    """A step of the optimiser on the way back: the weights before it, its batches, and what it looked like.

    ``trained`` says whether it was taken again, and is the record's by its digests.
    """

    weights: Tensor
    batches: list[HeldBatch]
    moment: Moment | None
    trained: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class _State:
    """Where training stands before ``step``: enough to go on from there with the same bits."""

    step: int
    weights: Tensor
    optimizer: OptimizerState
    buffers: bytes


class Adjoint(VerifiedReplay):
    """Carries target vectors backwards through a recorded trajectory; see ``VerifiedReplay``.

    Args:
        training: A fresh ``Training`` of the recipe, ``batch_norm`` coupled.
        trajectory: The record.
        tracked: Train indices whose contributions are kept, in the order of the result's columns.
        targets_QD: Gradients of the targets at w_T; left as they are. They are worked on ``tile`` at a
            time from the first; the bits of a target are those of its tile.
        settings: Of the recursion, where they are not the record's; the training keeps those.
        share: Of the Hessian in the products; see ``HessianTiles``.
        tile: Targets carried together; the products take fewer at a time where memory wants it.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        tracked: Rows,
        targets_QD: npt.NDArray[np.floating],
        settings: Settings | None = None,
        *,
        share: float = 1.0,
        tile: int = TILE,
    ) -> None:
        assert training.compute.batch_norm == "coupled"
        super().__init__(training, trajectory, tracked)
        self._targets, self._tile = targets_QD, tile
        self._steps = Steps(
            settings or recorded_settings(trajectory), training.layout, training.dtype, training.device
        )
        self.tiles = HessianTiles(training, transposed=True, share=share, tile=tile)
        # The weights; and the gradient and the optimiser's vectors where they matter.
        vectors = 2 + self._steps.vectors if self._steps.needs_moment else 1
        row = vectors * training.layout.dimension * training.dtype.itemsize
        self.held_steps = max(1, SEGMENT_BYTES // row)
        self._held: list[_Held] | None = None
        self._batches: list[HeldBatch] = []
        training.before_update = self._note
        self._read: list[tuple[int, Tensor]] = []
        # Steps of several batches, layers with a state of their own and rounding of autocast need the step itself.
        self._may_read = not (
            self._steps.needs_moment
            or training.keeps_state
            or training.weighted
            or training.schedule.accumulates
            or "autocast" in trajectory.attrs
        )

    def run(self, report: Report | None = None) -> Self:
        """Carry the targets back to the first step.

        Args:
            report: Told of (steps done, T).

        Raises:
            ReplayDiverged, NonFiniteLoss: See ``VerifiedReplay.replay``.
        """
        training = self.training
        on_weight = torch.from_numpy(np.array(self._targets)).to(training.device)
        on_state = [torch.zeros_like(on_weight) for _ in range(self._steps.vectors)]
        out = torch.zeros(len(on_weight), len(self.tracked) + 1, dtype=training.dtype, device=training.device)
        done = 0
        for held in self._backwards():
            with torch.no_grad():
                load_flat(training.parameters, held.weights)
            self._back_step(held, on_weight, on_state, out)
            done += len(held.batches)
            if report:
                report(done, training.steps)
        self._found: npt.NDArray[np.floating] = out[:, :-1].cpu().numpy()
        return self

    def contributions(self) -> npt.NDArray[np.floating]:
        """Return the contributions of the tracked samples to each target, (Q, n)."""
        return self._found

    def told(self) -> dict[str, Any]:
        """Return how the products were had."""
        return self.tiles.told()

    def close(self) -> None:
        """Nothing is hooked to the model."""

    def _back_step(self, held: _Held, on_weight: Tensor, on_state: Sequence[Tensor], out: Tensor) -> None:
        linear = self._steps.linear(held.batches[-1].step, held.moment)
        products = []
        for one in held.batches:
            put_back(one.kept)
            # Members that are not tracked (-1) fall into the last, discarded column.
            columns = torch.from_numpy(np.where(one.rows >= 0, one.rows, out.shape[1] - 1)).to(out.device)
            share = 1.0 / self.training.divisor(one.step)
            products.append((columns, share, self.tiles.at(one.step, one.batch)))
        for start in range(0, len(on_weight), self._tile):
            tile = slice(start, start + self._tile)
            a_u, state = on_weight[tile], [vector[tile] for vector in on_state]
            v = linear.pull(a_u, state)
            product, part = torch.empty_like(v), torch.empty_like(v)
            for k, (columns, share, second) in enumerate(products):
                values = second.tile(v, part if k else product)
                out[tile].index_add_(1, columns, (values * -share).to(out.dtype))
                if k:
                    product.add_(part)
            linear.pulled(a_u, state, product)
        if not held.trained:
            (one,), ((_columns, _share, second),) = held.batches, products
            self._read.append((one.step, second.losses.mean()))

    def _backwards(self) -> Iterator[_Held]:
        """Yield the steps from the last to the first."""
        steps, stop = self.trajectory.checkpoint_steps.tolist(), self.training.steps
        k = len(steps) - 1
        while k > 0:
            k -= 1
            if self._may_read and steps[k] == stop - 1:
                begin = k
                while begin and k - begin < READ_STEPS - 1 and steps[begin - 1] == steps[begin] - 1:
                    begin -= 1
                yield from self._as_kept(steps[begin], stop)
                k, stop = begin, steps[begin]
                continue
            kept = self.trajectory.checkpoint(k)
            start = _State(
                step=kept.step,
                weights=torch.from_numpy(kept.weights),
                optimizer=OptimizerState.of(kept),
                buffers=kept.buffers,
            )
            yield from self._segment(start, stop)
            stop = kept.step

    def _as_kept(self, first: int, stop: int) -> Iterator[_Held]:
        """Yield steps whose weights the record kept, from the last to the first, without taking them again."""
        if stop == self.training.steps:
            last = self.trajectory.checkpoint(-1)
            self.training.load_weights(last.weights, last.buffers)
            self.verify_epoch(self.training.epochs)
        weights = torch.from_numpy(self.trajectory.weights(first, stop)).to(self.training.device)
        batches = list(self.training.loader(first, stop))
        for step in reversed(range(first, stop)):
            here = weights[step - first]
            if step in self._digests:
                with torch.no_grad():
                    load_flat(self.training.parameters, here)
                self.verify(step)
            one = HeldBatch(step=step, batch=batches.pop(), rows=self.rows(step), kept=[])
            yield _Held(weights=here, batches=[one], moment=None, trained=False)
        self._compare_losses()

    def _compare_losses(self) -> None:
        """Raise ReplayDiverged for a step that was read and whose loss is not the record's."""
        read, self._read = self._read, []
        found = torch.stack([loss for _step, loss in read]).double().cpu().numpy()
        limit = SAME_LOSS[self.training.dtype]
        for (step, _), loss in zip(read, found.tolist(), strict=True):
            recorded = float(self.trajectory.loss[step])
            if not abs(loss - recorded) <= limit * max(abs(recorded), 0.01):
                raise ReplayDiverged(
                    self._message(f"the loss of step {step} is {loss:.6g}, recorded {recorded:.6g}", step)
                )

    def _segment(self, start: _State, stop: int) -> Iterator[_Held]:
        updates = int(self.training.updates[start.step : stop].sum())
        if updates > max(1, self.held_steps):
            middle = int(self.training.schedule.first[start.step + (stop - start.step) // 2])
            middle = middle if middle > start.step else int(self.training.schedule.last[start.step]) + 1
            self._restore(start)
            self.advance(middle)
            yield from self._segment(self._state(middle), stop)
            yield from self._segment(start, middle)
            return
        held: list[_Held] = []
        self._restore(start)
        self._held = held
        self.advance(stop)
        self._held = None
        while held:
            yield held.pop()

    def step(self, step: int, batch: Batch, rows: Rows) -> Tensor:
        """Train, and note what the way back needs."""
        if self._held is not None:
            if self.training.schedule.first[step] == step:
                self._batches = []
            kept = self.training.state_of_layers()
            self._batches.append(HeldBatch(step=step, batch=batch, rows=rows, kept=kept))
        return self.training.step(step, batch)

    def _note(self, step: int) -> None:
        """Keep a step that is about to be taken."""
        if self._held is None:
            return
        moment = self.training.moment() if self._steps.needs_moment else None
        weights = self.training.weights().clone() if moment is None else moment.weights
        self._held.append(_Held(weights=weights, batches=self._batches, moment=moment))

    def _state(self, step: int) -> _State:
        return _State(
            step=step,
            weights=self.training.weights().clone(),
            optimizer=self.training.optimizer_state(),
            buffers=pack_buffers(self.training.model),
        )

    def _restore(self, state: _State) -> None:
        training = self.training
        load_flat(training.parameters, state.weights.to(training.device))
        load_buffers(training.model, state.buffers)
        training.load_optimizer(state.optimizer)
        self.done = state.step

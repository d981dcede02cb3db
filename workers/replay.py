"""Replay: run the recorded training again, verified as it goes, and collect hypergradients.

Per tracked sample i of the shard: ``sum_t c_t (N / B_t) g_{t-1,i}`` (see ``coefficients``), with
g taken from the hooks of the very step that trains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..storage.errors import ReplayDiverged
from ..storage.trajectory import Trajectory
from .buffers import HypergradientBuffers, factor_slots
from .data import fetch, to_device
from .determinism import fingerprint, fingerprint_differences
from .layout import Layout
from .persample.engine import PerSampleGradients, Strategy
from .persample.probe import choose_strategies
from .training import SETTINGS, Training

PROBE_SAMPLES = 7
"""Samples of the batch that strategies are tried on; odd, so that no other axis is likely as long."""

Report = Callable[[int, int], None]


class Replay:
    """One replay of a recorded trajectory for one set of tracked samples.

    Args:
        training: A fresh ``Training`` of the recipe that was recorded.
        trajectory: The record.
        tracked: Global train indices of the shard, distinct, in the order of the buffer rows.
    """

    def __init__(self, training: Training, trajectory: Trajectory, tracked: npt.NDArray[np.int64]) -> None:
        self.training, self.trajectory, self.tracked = training, trajectory, tracked
        self._settings = {name: getattr(trajectory, name) for name in SETTINGS}
        self._digests = dict(zip(trajectory.digest_step.tolist(), trajectory.digest.tolist(), strict=True))
        self._row_of = np.full(training.n_train, -1, dtype=np.int64)
        self._row_of[tracked] = np.arange(len(tracked))
        self._one_scale = len({e.group for e in training.layout.entries}) == 1
        if not np.array_equal(training.batches, trajectory.batches):
            raise ReplayDiverged(self._message("the batch order differs from the record", 0))
        self._verify(0)
        layout, epochs = training.layout, training.recipe.epochs
        strategies = probe_training(training)
        factored = factored_entries(layout, strategies, epochs)
        self.engine = PerSampleGradients(training.recipe, training.model, layout, strategies, factored)
        self.buffers = HypergradientBuffers(
            len(tracked), layout, factored, self.engine.columns, epochs, training.dtype, training.device
        )
        groups = torch.cat(
            [
                torch.full((layout.size(i),), entry.group)
                for i, entry in enumerate(layout.entries)
                if i not in factored
            ]
            or [torch.zeros(0, dtype=torch.int64)]
        )
        self._groups = groups.to(training.device)

    def run(self, report: Report | None = None) -> HypergradientBuffers:
        """Replay every step and return the buffers.

        Raises:
            ReplayDiverged: Weights differ from the record: names the step, both digests and what
                differs between the two environments.
            NonFiniteLoss: A batch loss is NaN or infinite.
        """
        training = self.training
        for step, batch in enumerate(training.loader()):
            training.apply_settings(self._settings, step)
            members = training.batches[step]
            rows = self._row_of[members[members >= 0]]
            positions = np.flatnonzero(rows >= 0)
            if len(positions):
                self._tracked_step(step, batch, rows[positions], positions)
            else:
                training.step(step, batch)
            if step + 1 in self._digests:
                self._verify(step + 1)
            if (step + 1) % training.steps_per_epoch == 0:
                self.buffers.end_epoch()
            if report:
                report(step + 1, training.steps)
        self._verify_end()
        return self.buffers

    def _tracked_step(
        self, step: int, batch: object, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> None:
        training = self.training
        per_group = self.trajectory.coefficient[step] * (training.n_train / training.batch_size(step))
        scale = self._scale(per_group)
        numbers = torch.from_numpy(rows)

        def add(start: int, block: Tensor) -> None:
            self.buffers.add(numbers[start : start + len(block)], block, scale)

        def note(entry: int, d_R: Tensor, x_R: Tensor) -> None:
            group = training.layout.entries[entry].group
            factor = float(per_group[group]) if group >= 0 else 0.0
            self.buffers.add_factors(entry, numbers, d_R, x_R, factor)

        watch = self.engine.watch(torch.from_numpy(positions).to(training.device), add, note)
        loss = training.step(step, batch, watch)
        if training.device.type == "cpu":
            training.check_finite(step, float(loss))

    def _scale(self, per_group: npt.NDArray[np.float64]) -> Tensor:
        """Return c_t N / B_t: (1,) when all parameters share one group, else one per dense column."""
        values = torch.from_numpy(per_group)
        if self._one_scale:
            group = self.training.layout.entries[0].group
            return values[group : group + 1]
        # Group -1 (not optimised) picks the appended zero.
        table = torch.cat([values, values.new_zeros(1)]).to(self.training.device)
        return table[self._groups].to(self.training.dtype)

    def _verify(self, step: int) -> None:
        expected = self._digests[step]
        found = self.training.weight_checksum()
        if found != expected:
            raise ReplayDiverged(
                self._message(
                    f"weights after {step} steps have crc32 {found:08x}, recorded {expected:08x}", step
                )
            )

    def _verify_end(self) -> None:
        expected = self.trajectory.epoch_digest[-1]
        found = self.training.state_digest()
        if found != expected:
            raise ReplayDiverged(
                self._message(
                    f"weights and buffers at the end have sha256 {found[:16]}…, recorded {expected[:16]}…",
                    self.training.steps,
                )
            )

    def _message(self, what: str, step: int) -> str:
        here = fingerprint(self.training.device)
        recorded = self.trajectory.attrs.get("environment", {})
        return f"replay diverged at step {step}: {what}; {fingerprint_differences(recorded, here)}"


def probe_training(training: Training) -> tuple[Strategy, ...]:
    """Choose per-sample strategies on a few samples of the first batch, in training mode."""
    first = training.batches[0]
    indices = first[first >= 0][:PROBE_SAMPLES]
    batch = to_device(fetch(training.recipe, training.dataset, indices), training.device, training.dtype)
    constant = training.compute.batch_norm == "constant"
    return choose_strategies(training.recipe, training.model, training.layout, batch, constant=constant)


def factored_entries(layout: Layout, strategies: Sequence[Strategy], epochs: int) -> frozenset[int]:
    """Return the weights whose visits are kept as factors (see ``buffers``)."""
    return frozenset(
        i
        for i, strategy in enumerate(strategies)
        if strategy == "outer" and factor_slots(layout.entries[i].shape, epochs)
    )

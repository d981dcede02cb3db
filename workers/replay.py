"""Replay: run the recorded training again, verified as it goes, and collect hypergradients.

Per tracked sample i of the shard: ``sum_t c_t (N / B_t) g_{t-1,i}`` (see ``coefficients``), with
g taken from the hooks of the very step that trains.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..storage.errors import ReplayDiverged
from ..storage.trajectory import Trajectory
from .buffers import HypergradientBuffers
from .data import fetch, to_device
from .determinism import fingerprint, fingerprint_differences
from .persample.engine import TILE, PerSampleGradients
from .persample.probe import choose_strategies
from .training import SETTINGS, Training, Watch

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
        groups = training.layout.column_groups()
        self._groups = groups.to(training.device)
        if not np.array_equal(training.batches, trajectory.batches):
            raise ReplayDiverged(self._message("the batch order differs from the record", 0))
        self._verify(0)
        self.engine = PerSampleGradients(
            training.recipe, training.model, training.layout, probe_training(training)
        )
        self.buffers = HypergradientBuffers(
            len(tracked), training.layout.dimension, training.dtype, training.device
        )
        longest = training.recipe.batch_size + TILE
        self._block = torch.empty(
            longest, training.layout.dimension, dtype=training.dtype, device=training.device
        )

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
            if report:
                report(step + 1, training.steps)
        self._verify_end()
        return self.buffers

    def _tracked_step(
        self, step: int, batch: object, rows: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> None:
        training = self.training
        padded = self.engine.padded(torch.from_numpy(positions).to(training.device))
        block = self._block[: len(padded)]
        loss = training.step(step, batch, Watch(engine=self.engine, positions=padded, block=block))
        if training.device.type == "cpu":
            training.check_finite(step, float(loss))
        self.buffers.add(torch.from_numpy(rows), block[: len(rows)], self._scale(step))

    def _scale(self, step: int) -> Tensor:
        """Return c_t N / B_t: (1,) when all parameters share one group, else (D,)."""
        factor = self.training.n_train / self.training.batch_size(step)
        per_group = torch.from_numpy(self.trajectory.coefficient[step] * factor)
        if self._one_scale:
            return per_group[self._groups[:1].cpu()]
        # Group -1 (not optimised) picks the appended zero.
        table = torch.cat([per_group, per_group.new_zeros(1)]).to(self.training.device)
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


def probe_training(training: Training) -> tuple[str, ...]:
    """Choose per-sample strategies on a few samples of the first batch, in training mode."""
    first = training.batches[0]
    indices = first[first >= 0][:PROBE_SAMPLES]
    batch = to_device(fetch(training.recipe, training.dataset, indices), training.device, training.dtype)
    constant = training.compute.batch_norm == "constant"
    return choose_strategies(training.recipe, training.model, training.layout, batch, constant=constant)

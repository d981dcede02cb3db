"""What each sample's visits are kept for: own loss, margin, the class it is taken for, mean probabilities.

Everything is read off the step that trains: no further forward pass, no generator and no buffer is touched, and
the device is waited for a few times an epoch alone. Letters: B samples of a batch, N training samples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.trajectory import TrajectoryWriter
from ...storage.visits import VisitsWriter
from ..data.labels import MOST

PROBABILITY_BYTES = 256 << 20
"""Mean probabilities, N x C x 4 bytes, are kept up to this size."""

WAITING_BYTES = 16 << 20
"""Outputs on the device that wait to be looked at together."""

_PASSES = 6
"""Arrays of the waiting outputs' size at a time: the outputs, joined, the others alone, softmax, on the way."""


def visit_bytes(epochs: int, samples: int, classes: int) -> int:
    """Return the bytes of the visits of a training, before compression; ``classes`` 0: losses alone."""
    return epochs * samples * (10 if classes else 4) + _probability_bytes(samples, classes)


def held_bytes(epochs: int, samples: int, classes: int) -> int:
    """Return the memory that keeping the visits takes while training runs, at most."""
    waiting = _PASSES * min(WAITING_BYTES, samples * max(1, classes) * 8)
    held = VisitsWriter.held_bytes(epochs, samples)
    return waiting + held + 14 * samples + 2 * _probability_bytes(samples, classes)


def _probability_bytes(samples: int, classes: int) -> int:
    size = samples * classes * 4
    return size if size <= PROBABILITY_BYTES else 0


class VisitWatch:
    """Collects what the steps of a training leave, and writes it epoch by epoch.

    Args:
        writer: Of the trajectory.
        epochs: Of the training.
        samples: N.
        classes: Whether the recipe's predictions are the largest of the model's outputs, so that margins say
            something of them.
    """

    def __init__(self, writer: TrajectoryWriter, epochs: int, samples: int, *, classes: bool) -> None:
        self.writer = writer.visits(epochs, samples)
        self.samples, self.classes = samples, classes
        self.loss_dtype = ""
        self._width = 0  # C, once known
        self._decided = False
        self._waiting: list[tuple[npt.NDArray[Any], Tensor, Tensor | None, Callable[[], Tensor | None]]] = []
        self._bytes = 0
        self._sum: npt.NDArray[np.float32] | None = None
        self._visits = np.zeros(samples, dtype=np.int32)
        self._fresh()

    def _fresh(self) -> None:
        self._epoch: dict[str, npt.NDArray[Any]] = {
            "loss": np.full(self.samples, np.nan, dtype=np.float32),
            "margin": np.full(self.samples, np.nan, dtype=np.float32),
            "other": np.full(self.samples, -1, dtype=np.int16),
        }

    def add(
        self,
        members: npt.NDArray[Any],
        losses: Tensor,
        output: Tensor | None,
        labels: Callable[[], Tensor | None],
    ) -> None:
        """Take what a step left.

        Args:
            members: (B,) training indices of its batch.
            losses: (B,) own losses, detached.
            output: (B, C) last output of the model, detached, or None where it is something else.
            labels: Returns (B,) classes on the CPU, or None; asked in the first step, and then for many at once.
        """
        if not self.classes or output is None or not output.is_floating_point():
            output = None
        if not self._decided:
            self._decided = True
            output = None if output is None or labels() is None else output
            self.loss_dtype = str(losses.dtype).removeprefix("torch.")
            self._width = 0 if output is None else output.shape[1]
            if self._width and self.samples * self._width * 4 <= PROBABILITY_BYTES:
                self._sum = np.zeros((self.samples, self._width), dtype=np.float32)
        if output is not None and output.shape[1] != self._width:
            output = None
        # Copies: a model may hand out the same memory at every step.
        kept = None if output is None else output.clone()
        self._waiting.append((members, losses.clone(), kept, labels))
        self._bytes += losses.nbytes + (0 if kept is None else kept.nbytes)
        if self._bytes > WAITING_BYTES:
            self._look()

    @torch.no_grad()
    def _look(self) -> None:
        """Work off what waits."""
        if not self._waiting:
            return
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        members = np.concatenate([one[0] for one in waiting])
        self._epoch["loss"][members] = torch.cat([one[1] for one in waiting]).float().cpu().numpy()
        asked = [(m, output, labels()) for m, _, output, labels in waiting if output is not None]
        known = [(m, output, labels) for m, output, labels in asked if labels is not None]
        if not known:
            return
        members = np.concatenate([m for m, _, _ in known])
        output = torch.cat([output for _, output, _ in known])
        labels = torch.cat([labels for _, _, labels in known])
        if output.dtype != torch.float64:
            output = output.float()
        margin, other = margins(output, labels.to(output.device))
        self._epoch["margin"][members] = margin.float().cpu().numpy()
        self._epoch["other"][members] = other.to(torch.int16).cpu().numpy()
        if self._sum is not None:
            self._sum[members] += output.softmax(1).float().cpu().numpy()
            self._visits[members] += 1

    def end_epoch(self, epoch: int) -> None:
        """Write an epoch."""
        self._look()
        names = ("loss", "margin", "other") if self._width else ("loss",)
        self.writer.write_epoch(epoch, {name: self._epoch[name] for name in names})
        self._fresh()

    def finish(self) -> dict[str, Any]:
        """Write what is over all epochs; return what the trajectory notes of the visits."""
        if self._sum is not None:
            with np.errstate(invalid="ignore"):  # 0 / 0: never seen, so NaN
                self._sum /= self._visits[:, None].astype(np.float32)
            self.writer.write_probability(self._sum)
        return {"arrays": self.writer.names, "loss_dtype": self.loss_dtype}


def margins(output: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return (margin, the largest other class) of outputs (B, C) and their given classes (B,).

    ``margin = output[y] - max over k != y of output[k]``. Where y is no class of the output, the margin is NaN and
    the other class -1; a class above `MOST` is -1 too.
    """
    classes = output.shape[1]
    known = (labels >= 0) & (labels < classes)
    place = labels.clamp(0, classes - 1)[:, None]
    best, other = output.scatter(1, place, -torch.inf).max(1)
    margin = output.gather(1, place)[:, 0] - best
    unknown = ~known | margin.isnan()
    return margin.masked_fill(unknown, torch.nan), other.masked_fill(unknown | (other > MOST), -1)

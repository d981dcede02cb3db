"""Check the visits of the record: shapes, values, and that they are what the recorded steps were made of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from ...storage import layout

if TYPE_CHECKING:
    from ...storage.trajectory import Trajectory
    from ...storage.visits import Visits
    from .contents import Contents

PLACE = f"{layout.TRAJECTORY}/visits"

SUMS_TO_ONE = 1e-3
"""How far a sample's mean probabilities may add up to something else than one."""


def visits(contents: Contents) -> None:
    """Check the visits, where the record has some."""
    trajectory, found = contents.run.trajectory(), contents.run.visits()
    if found is None:
        return
    contents.rows["visits"] = found.loss.size
    epochs, samples = int(trajectory.attrs["epochs"]), int(trajectory.attrs["n_train"])
    shapes = {name: getattr(found, name) for name in ("loss", "margin", "other")}
    wrong = [n for n, array in shapes.items() if array is not None and array.shape != (epochs, samples)]
    contents.problems += [
        f"{PLACE}/{name}: shape {shapes[name].shape}, not ({epochs}, {samples})" for name in wrong
    ]
    if not wrong:
        _losses(contents, trajectory, found)
        _margins(contents, found)
    if found.probability is not None:
        _probabilities(contents, found.probability, samples)


def _losses(contents: Contents, trajectory: Trajectory, found: Visits) -> None:
    """Hold each step's mean own loss against its recorded batch loss.

    Each own loss is rounded to float32, and the mean was taken in the type of the losses.
    """
    dtype: Any = getattr(torch, found.loss_dtype, None)
    a_unit = float(torch.finfo(dtype).eps) + float(np.finfo(np.float32).eps)
    ends = [0, *trajectory.epoch_ends]
    for epoch, losses in enumerate(found.loss):
        span = slice(ends[epoch], ends[epoch + 1])
        batches = trajectory.batches[span]
        real = batches >= 0
        visited = np.zeros(len(losses), dtype=bool)
        visited[batches[real]] = True
        if (bad := visited & ~np.isfinite(losses)).any():
            contents.problems.append(
                f"{PLACE}/loss: epoch {epoch}, train_index {int(bad.argmax())} is not finite"
            )
            continue
        own = np.where(real, losses[batches].astype(np.float64), 0)
        count = real.sum(1)
        mean, size = own.sum(1) / count, np.abs(own).sum(1) / count
        off = ~(np.abs(mean - trajectory.loss[span]) <= 8 * a_unit * size)
        # The last visit of an epoch is kept: nothing is known of the others; nor of sums over weights.
        times = np.bincount(batches[real], minlength=len(losses))
        off &= ~(real & (times[batches] > 1)).any(1) & (not trajectory.attrs.get("weighted", False))
        if off.any():
            step = int(off.argmax())
            contents.problems.append(
                f"{PLACE}/loss: the mean over step {span.start + step} is {mean[step]:.7g}, "
                f"its recorded batch loss {trajectory.loss[span][step]:.7g}"
            )


def _margins(contents: Contents, found: Visits) -> None:
    """Check that a margin is known wherever another class is, and that it has the size of the sample's outputs."""
    if found.margin is None or found.other is None:
        return
    classes = None if found.probability is None else found.probability.shape[1]
    bad = (found.other >= 0) & np.isnan(found.margin)
    bad |= (found.other < -1) | (False if classes is None else found.other >= classes)
    if bad.any():
        epoch, index = np.unravel_index(int(bad.argmax()), bad.shape)
        contents.problems.append(
            f"{PLACE}/other: epoch {epoch}, train_index {index} names class {found.other[epoch, index]}, "
            f"with a margin of {found.margin[epoch, index]:g}"
        )


def _probabilities(contents: Contents, probability: npt.NDArray[np.float32], samples: int) -> None:
    if len(probability) != samples:
        contents.problems.append(f"{PLACE}/probability: {len(probability)} rows, not {samples}")
        return
    known = ~np.isnan(probability).all(1)
    rows = probability[known].astype(np.float64)
    bad = ~((rows >= 0).all(1) & (np.abs(rows.sum(1) - 1) <= SUMS_TO_ONE))
    if bad.any():
        index = int(np.flatnonzero(known)[bad.argmax()])
        contents.problems.append(
            f"{PLACE}/probability: train_index {index} adds up to {probability[index].sum():g}, not 1"
        )

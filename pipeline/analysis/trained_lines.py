"""How a run was trained, where that is more than plain steps, in words: accumulation, clipping, autocast, late parameters."""

from __future__ import annotations

import numpy as np

from ...storage.trajectory import Trajectory


def trained_lines(trajectory: Trajectory) -> list[str]:
    """Return a line a fact; none for plain steps of SGD."""
    lines, batches = [], len(trajectory.batches)
    ends = np.arange(batches) if trajectory.updates is None else np.flatnonzero(trajectory.updates)
    kind = trajectory.optimizer["class"]
    if kind != "SGD" or len(ends) != batches:
        from_batches = "" if len(ends) == batches else f", from {batches:,} batches"
        lines.append(f"training: {len(ends):,} steps of {kind}{from_batches}")
    if trajectory.clip_factor is not None:
        factor = trajectory.clip_factor[ends]
        shorter = int((factor < 1).sum())
        least = f", to {factor.min():.2g} of the gradient at the least" if shorter else ""
        limit = trajectory.optimizer.get("clip_grad_norm")
        lines.append(f"clipped at norm {limit:g}: {shorter:,} of {len(ends):,} steps{least}")
    if trajectory.attrs.get("weighted"):
        lines.append("losses are sums over the weights of their step")
    if trajectory.attrs.get("autocast"):
        kinds = ", ".join(trajectory.attrs["autocast"])
        lines.append(
            f"trained under autocast ({kinds}); second derivatives are those in {trajectory.attrs['dtype']}"
        )
    if trajectory.active is not None:
        late = [
            entry.name
            for entry, column in zip(trajectory.parameters, trajectory.active.T, strict=True)
            if not column.all()
        ]
        lines.append(f"parameters that were left out of some steps: {len(late)}, such as {late[0]}")
    return lines

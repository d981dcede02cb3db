"""Whether a record keeps its samples' visits, and what that takes."""

from __future__ import annotations

from ...workers.training.metrics import defines_predictions
from ...workers.training.visits import held_bytes, visit_bytes
from ..spec.spec import RunSpec
from .survey import Survey

AUTO_BYTES = 1 << 30
"""With ``visits="auto"`` they are kept up to this size, before compression."""


def kept_bytes(spec: RunSpec, surveyed: Survey) -> int:
    """Return the bytes of the visits that will be kept, before compression; 0: none."""
    if spec.at_checkpoint:
        return 0  # there is no visit
    size = visit_bytes(*_sizes(surveyed))
    return 0 if spec.visits == "off" or (spec.visits == "auto" and size > AUTO_BYTES) else size


def memory_bytes(spec: RunSpec, surveyed: Survey) -> int:
    """Return the memory that keeping them takes while training runs, at most."""
    return held_bytes(*_sizes(surveyed)) if kept_bytes(spec, surveyed) else 0


def why_not(spec: RunSpec, surveyed: Survey) -> str | None:
    """Return why visits are not kept, where nobody said that they should not be."""
    if spec.visits != "auto" or spec.at_checkpoint or kept_bytes(spec, surveyed):
        return None
    epochs, samples, _ = _sizes(surveyed)
    return (
        f"visits are not kept: {epochs:,} epochs of {samples:,} samples take {visit_bytes(*_sizes(surveyed)):,} bytes, "
        f"and auto keeps up to {AUTO_BYTES:,}; --visits on keeps them"
    )


def _sizes(surveyed: Survey) -> tuple[int, int, int]:
    """Return E, N and C; 0 classes where margins will not be known."""
    recipe, labels = surveyed.recipe, surveyed.train_labels
    known = not defines_predictions(recipe) and len(labels) and int(labels.min()) >= 0
    return int(recipe.epochs), surveyed.n_train, int(labels.max()) + 1 if known else 0

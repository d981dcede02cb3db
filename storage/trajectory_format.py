"""What ``trajectory.zarr`` is made of, shared by its reader and its writer.

T steps, B batch size, G parameter groups, K checkpoints, D parameters in P tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MARK = "hydra_pipe_trajectory"
LOOP = "loop"
"""What the attribute ``recorded`` says where a loop of the user's own made the record."""
BORDERS = "borders"
"""Attribute with the steps of checkpoints that are there for segments of a replay alone."""
PER_STEP = {
    "batches": "int32",
    "learning_rate": "float64",
    "momentum": "float64",
    "weight_decay": "float64",
    "dampening": "float64",
    "nesterov": "bool",
    "coefficient": "float64",
    "loss": "float64",
}
"""Arrays with one row a step, and their types."""
SOMETIMES = {
    "beta1": "float64",
    "beta2": "float64",
    "eps": "float64",
    "divisor": "float64",
    "updates": "bool",
    "clip_norm": "float64",
    "clip_factor": "float64",
    "active": "bool",
}
"""More of them, written only where they say something: Adam's settings, accumulation or weights, clipping,
parameters without a gradient in some step."""
MOMENTS = {"second_moment": None, "count": "int64"}
"""What checkpoints of Adam hold beside weights and momentum, with its type (None: the weights')."""
NOISE = ("label_noise/train_index", "label_noise/original_label")
DIMENSIONS = {
    "batches": ("step", "slot"),
    **dict.fromkeys(("learning_rate", "momentum", "weight_decay"), ("step", "group")),
    **dict.fromkeys(("dampening", "nesterov", "coefficient"), ("step", "group")),
    **dict.fromkeys(("beta1", "beta2", "eps"), ("step", "group")),
    **dict.fromkeys(("loss", "divisor", "updates", "clip_norm", "clip_factor"), ("step",)),
    "active": ("step", "tensor"),
    **dict.fromkeys(("digest_step", "digest"), ("digest_step",)),
    "checkpoint/step": ("checkpoint",),
    **dict.fromkeys(
        ("checkpoint/weights", "checkpoint/momentum", "checkpoint/second_moment"), ("checkpoint", "parameter")
    ),
    **dict.fromkeys(("checkpoint/has_momentum", "checkpoint/count"), ("checkpoint", "tensor")),
    "checkpoint/buffers": ("checkpoint", "byte"),
    **dict.fromkeys(NOISE, ("train_index",)),
}
"""Names of the axes of each array; arrays below ``epochs/`` have the axis ``epoch``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterEntry:
    """Where one parameter lies in the flat vector of D values.

    Attributes:
        name: As in ``named_parameters()``.
        shape: Its shape; row-major in the vector.
        group: Index of its parameter group, -1 where the optimiser does not move it.
        start: Offset of its first value.
    """

    name: str
    shape: tuple[int, ...]
    group: int
    start: int


def parameter_entry(entry: Mapping[str, Any]) -> ParameterEntry:
    """Return a parameter as it was noted in the attributes."""
    shape: Sequence[Any] = entry["shape"]
    return ParameterEntry(
        name=str(entry["name"]),
        shape=tuple(int(n) for n in shape),
        group=int(entry["group"]),
        start=int(entry["start"]),
    )

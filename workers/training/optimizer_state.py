"""What an optimiser keeps beside the weights, taken out of it and put back, and what a record notes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...storage.trajectory import Checkpoint
from ..model.layout import flatten
from ..recursion.families import family_or_sgd
from ..recursion.family import Family


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class OptimizerState:
    """What an optimiser keeps beside the weights.

    Attributes:
        vectors: (D,) each, in the order of its family's ``vectors``; 0 where a parameter has none yet.
        exists: Per parameter, whether it has.
        counts: Per parameter, the steps taken with it; None where the family does not count.
    """

    vectors: tuple[Tensor, ...]
    exists: list[bool]
    counts: list[int] | None = None

    @classmethod
    def of(cls, kept: Checkpoint) -> OptimizerState:
        """Return that of a checkpoint."""
        vectors = [kept.momentum] if kept.second_moment is None else [kept.momentum, kept.second_moment]
        return cls(
            vectors=tuple(torch.from_numpy(np.ascontiguousarray(vector)) for vector in vectors),
            exists=kept.has_momentum.tolist(),
            counts=None if kept.count is None else kept.count.tolist(),
        )

    def told(self) -> dict[str, Any]:
        """Return what a record notes of it where it is what training begins with; nothing where that is fresh."""
        if self.counts is not None:
            return {"count": self.counts} if any(self.counts) else {}
        return {"begun": self.exists} if any(self.exists) else {}

    def stored(self) -> dict[str, Any]:
        """Return it by the names of ``Checkpoint``."""
        found = [vector.cpu().numpy() for vector in self.vectors]
        stored: dict[str, Any] = {"momentum": found[0], "has_momentum": np.array(self.exists)}
        if self.counts is not None:
            stored |= {"second_moment": found[1], "count": np.array(self.counts, dtype=np.int64)}
        return stored


def told_of(optimizer: torch.optim.Optimizer, max_norm: float | None) -> dict[str, Any]:
    """Return what a record notes of an optimiser beside its settings."""
    family = family_or_sgd(optimizer)
    told: dict[str, Any] = {"family": family.name, "class": type(optimizer).__name__}
    if family.scaled:
        groups = optimizer.param_groups
        told["decoupled"] = [bool(group.get("decoupled_weight_decay", False)) for group in groups]
    if max_norm is not None:
        told["clip_grad_norm"] = max_norm
    return told


def state_of(
    optimizer: torch.optim.Optimizer, family: Family, parameters: Sequence[nn.Parameter]
) -> OptimizerState:
    """Return an optimiser's vectors as they are, flat."""
    states = [optimizer.state.get(p, {}) for p in parameters]
    vectors = []
    for key in family.vectors:
        found = [state.get(key) for state in states]
        filled = [torch.zeros_like(p) if v is None else v for p, v in zip(parameters, found, strict=True)]
        vectors.append(flatten(filled))
    return OptimizerState(
        vectors=tuple(vectors),
        exists=[state.get(family.vectors[0]) is not None for state in states],
        counts=[int(state.get("step", 0)) for state in states] if family.counts else None,
    )


def put_state(
    optimizer: torch.optim.Optimizer,
    family: Family,
    parameters: Sequence[nn.Parameter],
    kept: OptimizerState,
) -> None:
    """Put vectors and counts into an optimiser; the inverse of `state_of`."""
    fused = {id(p) for group in optimizer.param_groups if group.get("fused") for p in group["params"]}
    start = 0
    for i, (parameter, present) in enumerate(zip(parameters, kept.exists, strict=True)):
        state = optimizer.state[parameter]
        for key, vector in zip(family.vectors, kept.vectors, strict=True):
            part = vector[start : start + parameter.numel()].view_as(parameter)
            state[key] = part.to(device=parameter.device, dtype=parameter.dtype).clone() if present else None
        start += parameter.numel()
        if not present and family.counts:
            del optimizer.state[parameter]
        elif kept.counts is not None:
            # Where torch keeps it unless the implementation is fused.
            place = parameter.device if id(parameter) in fused else torch.device("cpu")
            state["step"] = torch.tensor(float(kept.counts[i]), dtype=torch.float32, device=place)

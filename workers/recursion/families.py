"""The optimisers whose steps are followed: one file a family, and here their list.

A family says how its optimiser steps, how a step moves a tangent and an adjoint vector, and what remains
of it for scalars. To add one, write its file and name it in ``FAMILIES``.
"""

from __future__ import annotations

import torch

from ...storage.errors import RecipeError
from .adam import Adam
from .family import Family
from .sgd import SGD

FAMILIES: tuple[Family, ...] = (SGD(), Adam())

INSTEAD = {
    "Adamax": "AdamW",
    "NAdam": "AdamW",
    "RAdam": "AdamW",
    "Adagrad": "AdamW",
    "Adadelta": "AdamW",
    "RMSprop": "AdamW with betas=(0, alpha)",
    "Rprop": "SGD",
    "ASGD": "SGD",
    "LBFGS": "SGD",
    "Adafactor": "AdamW",
    "Muon": "AdamW, or SGD with Nesterov momentum",
    "Lion": "AdamW",
    "SparseAdam": "AdamW with dense gradients (Embedding(sparse=False))",
}
"""What comes nearest to optimisers without a rule."""


def family_of(optimizer: torch.optim.Optimizer) -> Family:
    """Return the family of an optimiser.

    Raises:
        RecipeError: There is none, or an option has no rule; says what to use.
    """
    for family in FAMILIES:
        if type(optimizer) in family.kinds:
            family.check(optimizer)
            return family
    name = type(optimizer).__name__
    small = "8bit" in name.lower() or "bnb" in type(optimizer).__module__
    instead = "torch.optim.AdamW" if small else INSTEAD.get(name)
    near = f"; what comes nearest is {instead}" if instead else ""
    raise RecipeError(
        f"optimizer {name} has no rule for its hypergradient; use torch.optim.SGD (any momentum, dampening, Nesterov, "
        f"weight decay, groups), Adam or AdamW{near}"
    )


def family_or_sgd(optimizer: torch.optim.Optimizer) -> Family:
    """Return the family of an optimiser that takes no step; of one without a rule, SGD's."""
    return next((family for family in FAMILIES if type(optimizer) in family.kinds), FAMILIES[0])


def family_named(name: str) -> Family:
    """Return the family that a record names."""
    return next(family for family in FAMILIES if family.name == name)

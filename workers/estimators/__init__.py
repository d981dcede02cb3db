"""Estimators of contributions beside HyDRA, one file each.

Only names live here, so that listing them imports no torch; ``make`` imports the one asked for.

Letters: N training samples, n tracked ones, M test samples, Q of them in a block, R rows at a time, D parameters,
G parameter groups, T steps, K checkpoints; g_i and g_j gradients of a training and a test sample's loss, H the
Hessian, L weight decay, A = H + L + damping, h learning rate, p momentum, v a direction, a_u the adjoint.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from typing import TYPE_CHECKING, Any

from ...storage.errors import SpecError

if TYPE_CHECKING:
    from .base import Estimator

ESTIMATORS: dict[str, str] = {
    "influence-cg": f"{__name__}.influence_cg:InfluenceCG",
    "influence-lissa": f"{__name__}.influence_lissa:InfluenceLissa",
    "relatif": f"{__name__}.relatif:RelatIF",
    "gif": f"{__name__}.gif:GeneralizedInfluence",
    "gradient-dot": f"{__name__}.gradient_dot:GradientDot",
    "tracin": f"{__name__}.tracin:TracIn",
    "less": f"{__name__}.less:Less",
    "sgd-influence": f"{__name__}.sgd_influence:SgdInfluence",
    "mirrored-influence": f"{__name__}.mirrored:MirroredInfluence",
    "blend": f"{__name__}.blend:Blend",
}
"""Name, as in ``method=``, of each estimator -> ``module:Class``."""


def names() -> list[str]:
    """Return the names of the estimators."""
    return list(ESTIMATORS)


def load(name: str) -> type[Estimator]:
    """Import an estimator's class.

    Raises:
        SpecError: There is none of this name; names the nearest.
    """
    if name not in ESTIMATORS:
        raise SpecError(f"there is no estimator {name!r}; {_near(name, names())}")
    module, _, attribute = ESTIMATORS[name].rpartition(":")
    found: type[Estimator] = getattr(import_module(module), attribute)
    return found


def option_names(name: str) -> list[str]:
    """Return the options of an estimator; raises as ``load``."""
    return [field.name for field in fields(load(name))]


def make(name: str, options: Mapping[str, Any]) -> Estimator:
    """Return an estimator with these options.

    Raises:
        SpecError: Unknown name or option, or a value outside its limits.
    """
    kind = load(name)
    known = option_names(name)
    for key in options:
        if key not in known:
            hint = _near(key, known) if known else "it takes none"
            raise SpecError(f"estimator {name} has no option {key!r}; {hint}")
    return kind(**options)


def _near(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"use one of {', '.join(known)}"

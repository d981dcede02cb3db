"""Checks of what users pass to recipes: each failure states the value, the limit and the remedy."""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Sequence

from ...storage.errors import RecipeError


def whole(name: str, value: object, *, least: int, most: int | None = None) -> int:
    """Return ``value`` as an int in [least, most]; RecipeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int):
        nearest = least
    elif most is not None and value > most:
        nearest = most
    elif value < least:
        nearest = least
    else:
        return value
    limit = f"at least {least}" if most is None else f"from {least} to {most}"
    raise RecipeError(f"{name} is {value!r}, but must be a whole number {limit}: set {name}={nearest}")


def number(
    name: str,
    value: object,
    *,
    least: float,
    most: float = math.inf,
    least_open: bool = False,
    most_open: bool = False,
) -> float:
    """Return ``value`` as a finite float in the interval; ``*_open`` excludes that end.

    Raises:
        RecipeError: Not a finite number, or outside the interval.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        above = value > least if least_open else value >= least
        below = value < most if most_open else value <= most
        if above and below:
            return float(value)
    limit = f"{'above' if least_open else 'at least'} {least:g}"
    if math.isfinite(most):
        limit += f" and {'below' if most_open else 'at most'} {most:g}"
    raise RecipeError(f"{name} is {value!r}, but must be a number {limit}: change --set {name}=...")


def choice(name: str, value: object, allowed: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``allowed``; RecipeError with the nearest one otherwise."""
    if isinstance(value, str) and value in allowed:
        return value
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"did you mean {near[0]}?" if near else f"set {name}={allowed[0]}"
    raise RecipeError(f"{name} is {value!r}, but must be one of {', '.join(allowed)}: {hint}")


def flag(name: str, value: object) -> bool:
    """Return ``value`` if it is True or False; RecipeError otherwise."""
    if isinstance(value, bool):
        return value
    raise RecipeError(f"{name} is {value!r}, but must be true or false: set {name}=true or {name}=false")


def directory(name: str, value: object) -> str:
    """Return ``value`` as an absolute path; RecipeError if it is no path.

    Absolute, because actors may run in another working directory.
    """
    if isinstance(value, (str, os.PathLike)) and os.fspath(value):
        return os.path.abspath(os.path.expanduser(os.fspath(value)))
    raise RecipeError(f"{name} is {value!r}, but must be the path of a directory: set {name}=DIR")

"""What a field of a specification says of itself: how it is checked, and what it decides.

Every field of a group has one of `of_the_run`, `of_the_method` and `free` as its ``metadata``; a group with
a field that has none cannot be made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, fields
from enum import Enum
from typing import Any

from .checks import Check

_KEY = "hydra_pipe"


class Decides(Enum):
    """What another value of a field makes another of."""

    RUN = "run"
    """Another run: the field is part of the run's identity."""
    METHOD = "method"
    """Another method of the same run, or the same one made in another way."""
    NOTHING = "nothing"
    """Neither: it may be chosen anew each time that a run goes on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """One field's check and meaning.

    Attributes:
        check: Name and value in; value out, checked and normalised.
        decides: What the field decides.
        stored: From the group to what the identity holds of the field; None: its value.
        unless_default: Whether the identity leaves the field out while it has its default.
    """

    check: Check
    decides: Decides
    stored: Callable[[Any], object] | None = None
    unless_default: bool = False


def of_the_run(
    check: Check, *, stored: Callable[[Any], object] | None = None, unless_default: bool = False
) -> dict[str, Setting]:
    """Return the metadata of a field that is part of a run's identity; see `Setting`."""
    return {_KEY: Setting(check=check, decides=Decides.RUN, stored=stored, unless_default=unless_default)}


def of_the_method(check: Check) -> dict[str, Setting]:
    """Return the metadata of a field that says which method of a run is computed, and how."""
    return {_KEY: Setting(check=check, decides=Decides.METHOD)}


def free(check: Check) -> dict[str, Setting]:
    """Return the metadata of a field that decides no number."""
    return {_KEY: Setting(check=check, decides=Decides.NOTHING)}


def setting_of(entry: Field[Any]) -> Setting:
    """Return what a field says of itself.

    Raises:
        TypeError: It does not say it.
    """
    found = entry.metadata.get(_KEY)
    if not isinstance(found, Setting):
        raise TypeError(
            f"field {entry.name!r} does not say what it decides; "
            "declare it with metadata=of_the_run(...), of_the_method(...) or free(...)"
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Group:
    """Base of the groups: checks every field when an object is made.

    A group that has more to check extends ``__post_init__`` and calls this one first. No slots: Python
    cannot join several classes with slots in one.
    """

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = setting_of(entry).check(entry.name, getattr(self, entry.name))
            object.__setattr__(self, entry.name, value)


def names(group: type[Group], *decides: Decides) -> tuple[str, ...]:
    """Return the names of a group's fields, in order; of those that decide one of ``decides`` where given."""
    return tuple(entry.name for entry in fields(group) if not decides or setting_of(entry).decides in decides)

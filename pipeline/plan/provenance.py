"""Is this the recipe that the run was made from? Asked wherever a recipe is put beside a stored run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ...storage.errors import CorruptStore, SpecMismatch
from ...storage.rundir import RunDirectory
from ...workers.training.made_of import cosmetic, differences
from ..executors.events import Note, Observer
from ..reading.run_info import RunInfo
from ..spec.spec import RunSpec, is_open
from .survey import survey

REMEDY = "bring that back, or make a run of its own: another --out, or hydra-pipe run --overwrite"


def recipe_differences(stored: RunInfo, made_of: Mapping[str, Any]) -> list[str]:
    """Return in words what a recipe has that a run's has not; nothing where the run does not know."""
    known = stored.made_of
    with _read(known):
        return differences(known, made_of) if known else []


def check_recipe(uri: str, stored: RunInfo, made_of: Mapping[str, Any], observer: Observer) -> None:
    """Refuse a recipe that is not the one a run was made from; say where only its text is another.

    Args:
        uri: The run.
        stored: Its ``run.json``, read.
        made_of: Of the recipe beside it.
        observer: Hears of a cosmetic change.

    Raises:
        SpecMismatch: Names what differs.
    """
    found = recipe_differences(stored, made_of)
    if found:
        raise SpecMismatch(f"{uri} was made from something else; what differs: {'; '.join(found)}; {REMEDY}")
    say_cosmetic(stored, made_of, observer)


def say_cosmetic(stored: RunInfo, made_of: Mapping[str, Any], observer: Observer) -> None:
    """Tell of a change of the recipe's text that is none of the recipe."""
    with _read(stored.made_of):
        note = cosmetic(stored.made_of or {}, made_of)
    if note is not None:
        observer(Note(message=note))


def look_and_check(uri: str, stored: RunInfo, spec: RunSpec, observer: Observer) -> None:
    """Do `check_recipe` for a command that does not survey the recipe itself.

    Raises:
        SpecMismatch: See `check_named`.
        RecipeError: The recipe cannot be trained here.
    """
    if not stored.made_of:
        return
    check_named(
        uri, stored, spec, survey(replace(spec, track="all", test="all"), trial=False).made_of, observer
    )


def check_named(
    uri: str, stored: RunInfo, spec: RunSpec, made_of: Mapping[str, Any], observer: Observer
) -> None:
    """Do `check_recipe` with a recipe that may be named otherwise: then by what it does alone.

    Raises:
        SpecMismatch: See `check_recipe`.
    """
    if spec.recipe_reference != stored.identity.get("recipe"):
        made_of = {**made_of, "source": {}}
    check_recipe(uri, stored, made_of, observer)


def made_of_notes(stored: RunInfo | None, made_of: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the entry of ``run.json``: as first made, with the source as it reads now.

    A run of before there were digests gets none: what it was made from is not known.
    """
    if stored is None:
        return made_of
    known = stored.made_of
    if not known:
        return None
    with _read(known):
        edited = cosmetic(known, made_of) is not None
    return {**known, "source": made_of["source"]} if edited else known


def adopted(directory: RunDirectory, stored: RunInfo, made_of: Mapping[str, Any]) -> RunInfo:
    """Let a run of which nothing is committed yet, or only the record of a loop, be made from what is here now."""
    free = is_open(stored.identity) or not directory.stages()
    return replace(stored, made_of=made_of) if free else stored


@contextmanager
def _read(known: object) -> Iterator[None]:
    """Name the document where what a run notes of its recipe is not what this package writes."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CorruptStore(
            f"made_of in run.json cannot be read ({type(error).__name__}: {error}; it is {str(known)[:60]}…); "
            "restore the file, or use another --out"
        ) from error

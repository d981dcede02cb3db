"""Where a recipe's data files are: the option, then the environment, then the usual place."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ...storage.errors import RecipeError

ENVIRONMENT = "HYDRA_PIPE_DATA"
"""Environment variable: a directory with one subdirectory a data set, named as the recipe."""


def data_directory(
    name: str,
    given: str | None,
    *,
    files: Sequence[str],
    missing: Callable[[Path], Sequence[str]],
    usual: Sequence[str] = (),
    source: str,
) -> Path:
    """Return the directory that holds the files of the data set ``name``.

    ``given`` (the option ``data_dir``) is final. Without it, the first complete one of
    ``$HYDRA_PIPE_DATA/<name>`` and the ``usual`` places is taken.

    Args:
        name: Name of the recipe.
        given: Value of ``data_dir``, or None.
        files: Names of the expected files, for the message.
        missing: Returns the expected files that a directory lacks.
        usual: Other places to look in.
        source: Where the user gets the files, for the message.

    Raises:
        RecipeError: No place has all the files; names the places, the files and the remedy.
    """
    places = [Path(given)] if given is not None else []
    if given is None:
        root = os.environ.get(ENVIRONMENT)
        if root:
            places.append(Path(root).expanduser() / name)
        places += map(Path, usual)
    problems = []
    for place in places:
        absent = list(missing(place)) if place.is_dir() else None
        if absent == []:
            return place
        problems.append(f"{place} " + ("is no directory" if absent is None else f"lacks {', '.join(absent)}"))
    if not problems:
        problems.append(f"neither data_dir nor {ENVIRONMENT} is set")
    raise RecipeError(
        f"the data of {name} were not found: {'; '.join(problems)}; expected files: {', '.join(files)}: get them from "
        f"{source} and give their directory with --set data_dir=DIR or as ${ENVIRONMENT}/{name}"
    )

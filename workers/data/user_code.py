"""What the recipe's own code raises, told in one line: what was called, what it raised, and where.

``sys.exit`` and other exceptions that are no ``Exception`` would end a worker, or the command with an
exit code of their own; here they are mistakes of the recipe like any other.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...storage.errors import HydraError, RecipeError

_ROOMS = Path(__file__).resolve().parents[2]
_OURS = tuple(str(_ROOMS / room) + "/" for room in ("cli", "pipeline", "workers", "storage"))
_STANDARD = str(Path(sysconfig.get_path("stdlib")).resolve()) + "/"
_THIRD = tuple(
    f"/{packages}/{name}/"
    for packages in ("site-packages", "dist-packages")
    for name in ("torch", "numpy", "ray", "zarr", "numcodecs", "pyarrow", "fsspec", "s3fs", "gcsfs", "click")
)


SHOWN = 8
"""Samples that a message names, at most."""


@contextmanager
def user_code(what: str, *, always: bool = False) -> Iterator[None]:
    """Turn what the recipe's code raises inside into a ``RecipeError`` that begins with ``what``.

    Args:
        what: What is done, such as ``step 3 of 60:``.
        always: Also where no line of the recipe is on the way to the error; otherwise such an
            ``Exception`` (a full disk, a mistake of ours) passes unchanged.

    Raises:
        RecipeError: It raised; errors of hydra-pipe and an interrupt pass unchanged.
    """
    try:
        yield
    except (HydraError, KeyboardInterrupt, GeneratorExit):
        raise
    except BaseException as error:
        frame = _frame_of_recipe(error)
        if frame is None and not always and isinstance(error, Exception):
            raise
        where = "" if frame is None else f" in {frame.name}() ({frame.filename}, line {frame.lineno})"
        raise RecipeError(
            f"{what} {raised(error)}{where}; correct the recipe (--debug shows where)"
        ) from error


def listed(indices: Sequence[int]) -> str:
    """Return indices as a message shows them."""
    return ", ".join(map(str, indices[:SHOWN])) + (", …" if len(indices) > SHOWN else "")


def raised(error: BaseException) -> str:
    """Return type and message of an error on one line."""
    if isinstance(error, SystemExit):
        shown = "" if error.code is None else repr(error.code)
        return f"SystemExit: sys.exit({shown}) was called"
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"


def _frame_of_recipe(error: BaseException) -> traceback.FrameSummary | None:
    """Return the innermost frame that is neither ours nor of a library we run on."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not _is_library(frame.filename):
            return frame
    return None


def _is_library(filename: str) -> bool:
    if filename.startswith("<") or any(name in filename for name in _THIRD):
        return True
    path = str(Path(filename).resolve())
    if path.startswith(_STANDARD):
        return "/site-packages/" not in path and "/dist-packages/" not in path
    return path.startswith(_OURS)

"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])

MANY = click.IntRange(max=10**7)
"""A count of what is shown or looked at; what is below its least is refused where it is known."""
SEED = click.IntRange(max=2**63 - 1)

_DEBUG = "hydra_pipe.debug"


def _note_debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.find_root().meta[_DEBUG] = True


def debug_wanted(ctx: click.Context) -> bool:
    """Return whether ``--debug`` was given, to the group or to the command."""
    return bool(ctx.find_root().meta.get(_DEBUG))


debug_option = click.option(
    "--debug",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_note_debug,
    help="Show the traceback when something fails.",
)


def format_option(*kinds: str) -> Callable[[F], F]:
    """Return the ``--format`` option with the given kinds, ``table`` being the default."""
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(kinds),
        default="table",
        show_default=True,
        help="How results are printed on stdout.",
    )


def quiet_option(function: F) -> F:
    """Add ``--quiet``."""
    return click.option("--quiet", "-q", is_flag=True, help="No progress on stderr.")(function)


def method_option(function: F) -> F:
    """Add ``--method``."""
    return click.option(
        "--method",
        metavar="NAME",
        help="Estimator to read, as in method=NAME.  [default: hydra, or the only one]",
    )(function)


def check_option(function: F) -> F:
    """Add ``--no-check``, given to the command as ``check``."""
    return click.option(
        "--no-check",
        "check",
        flag_value=False,
        default=True,
        help="Compare files with their manifests by size alone, without reading them for a digest.",
    )(function)

"""The command group: exit codes, one-line errors, and the list of commands.

Nothing heavy is imported here or by the command modules: torch, ray, zarr and pyarrow load inside
the commands that need them, so that ``hydra-pipe --help`` answers at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Any

import click

from .. import __version__
from ..storage.errors import HydraError, RunStopped
from ..storage.secrets import masked
from . import attributing, cleaning, deciding, explaining, inspect, judging, running, stopping
from .options import debug_option, debug_wanted
from .output import ReaderGone, clean, plain
from .system_errors import of_the_system

INTERRUPTED, TERMINATED = 130, 143


class Terminated(KeyboardInterrupt):
    """SIGTERM: whoever ends us means what Ctrl-C means, and everything is left as after that."""


class HydraGroup(click.Group):
    """A group whose commands end in exit code 0, 1, 2, 130 or 143, and in one line when they fail."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order in which they are used, not in that of the alphabet."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; turn what it raises into one line on stderr and an exit code."""
        with _terminable() as told:
            return self._invoked(ctx, told)

    def _invoked(self, ctx: click.Context, told: list[int]) -> Any:
        try:
            return super().invoke(ctx)
        except click.ClickException as error:
            vars(error)["message"] = masked(error.message)
            raise
        except (click.exceptions.Exit, click.Abort):
            raise
        except ReaderGone:
            ctx.exit(0)  # `hydra-pipe top RUN | head`: the reader has all it wanted
        except RunStopped as error:
            _report(ctx, plain(str(error)))
            ctx.exit(error.exit_code)
        except HydraError as error:
            _report(ctx, f"error: {plain(str(error))}")
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            if told:  # within Ray's own code `Terminated` comes out as a plain interrupt
                _report(ctx, "terminated (SIGTERM); the same command continues where this one stopped")
                ctx.exit(TERMINATED)
            _report(ctx, "interrupted; the same command continues where this one stopped")
            ctx.exit(INTERRUPTED)
        except Exception as error:  # noqa: BLE001 - the last line before the user
            # Ray wraps what a worker raised; the user's own error is the one to show.
            inner = getattr(error, "cause", None)
            shown = inner if isinstance(inner, Exception) else error
            known = str(shown) if isinstance(shown, HydraError) else of_the_system(shown)
            if known is not None:
                _report(ctx, f"error: {plain(known)}")
            else:
                text = plain(f"{type(shown).__name__}: {shown}", limit=500)
                _report(ctx, f"unexpected error: {text}; rerun with --debug")
            ctx.exit(1)
        except BaseException as error:  # noqa: BLE001 - a sys.exit of a recipe: the exit code is ours to say
            _report(
                ctx,
                f"error: {plain(f'{type(error).__name__}: {error}', limit=500)} was raised; correct the recipe",
            )
            ctx.exit(1)


@contextlib.contextmanager
def _terminable() -> Iterator[list[int]]:
    """Turn the first SIGTERM into `Terminated`; what follows it is left to take its time. Yields the signals that came."""
    told: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def terminate(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        told.append(number)
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield told
    finally:
        signal.signal(signal.SIGTERM, before)


def _report(ctx: click.Context, line: str) -> None:
    """Print ``line`` on stderr, after the traceback when --debug asks for it."""
    try:
        if debug_wanted(ctx):
            click.echo(masked(traceback.format_exc()), err=True, nl=False)
        click.echo(masked(line), err=True)
    except BrokenPipeError:  # nobody reads stderr either; the exit code remains
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - lives until the process ends


@click.group(
    cls=HydraGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, prog_name="hydra-pipe")
@debug_option
def main() -> None:
    """Find out which training samples made a model what it is.

    hydra-pipe records a PyTorch training run, replays it while hypergradients are carried along
    (HyDRA), and writes what every training sample contributes to every test sample.

    Try `hydra-pipe run`, then `hydra-pipe top runs/digits`. Results go to stdout, everything else
    to stderr. Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted or stopped,
    143 terminated.
    """
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )


for _command in (
    running.run,
    running.plan,
    running.record,
    running.replay,
    running.reduce,
    attributing.attribute,
    inspect.status,
    stopping.stop,
    inspect.top,
    inspect.verify,
    inspect.export,
    judging.compare,
    judging.evaluate,
    deciding.detect,
    cleaning.clean,
    explaining.explain,
    explaining.report,
):
    assert _command.callback is not None
    _command.callback = clean(_command.callback)
    main.add_command(_command)

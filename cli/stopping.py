"""The command that ends another: stop."""

from __future__ import annotations

import click

from .options import debug_option
from .output import emit, plain


@click.command(short_help="Ask the command that writes to RUN to end; it can be continued.")
@click.argument("run")
@click.option("--no-wait", is_flag=True, help="Do not wait until it has ended.")
@debug_option
@click.pass_context
def stop(ctx: click.Context, run: str, no_wait: bool) -> None:
    """Ask the command that writes to RUN to finish the units in work, commit them, and end.

    It may run on any machine that shares the storage. The same command continues later. Exit code 1 when
    it has given no sign of life for a minute: then the next command takes RUN over.

    Example: hydra-pipe stop runs/digits
    """
    from ..pipeline.drive.stopping import stop as ask

    found = ask(run, wait=not no_wait, tell=lambda text: click.echo(plain(text), err=True))
    if found.holder is None:
        emit(f"nobody writes to {found.run}")
    elif found.ended is None:
        emit(f"asked {plain(str(found.holder))} to finish the units in work and end")
    elif found.ended:
        emit(f"{plain(str(found.holder))} has ended; the same command continues where it stopped")
    else:
        emit(
            f"{plain(str(found.holder))} gives no sign of life; the next command that writes to {found.run} takes it over"
        )
        ctx.exit(1)

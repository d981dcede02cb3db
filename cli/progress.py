"""What is shown on stderr while a run goes on: it listens to events and decides nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import click

from ..pipeline.executors.pace import StageProgress, rate, time_left
from .output import plain, show_seconds
from .pace import clock_text, short, stage_line, units_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

HEARTBEAT_SECONDS = 60.0
"""Without a terminal, a stage that takes longer says so this often."""
SHOW_AFTER_SECONDS = 2.0
"""A bar for reading is shown only when reading takes longer."""

Observer = Callable[[Any], None]


class Listener:
    """Keeps the `StageProgress` of the running stage up to date; subclasses show it."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self.current: StageProgress | None = None

    def __call__(self, event: Any) -> None:
        """Take in one event; unknown kinds are ignored."""
        # By name, so that the progress of a command needs nothing of the pipeline before it runs.
        handler = getattr(self, "on_" + type(event).__name__, None)
        if handler is not None:
            handler(event)

    def on_StageStarted(self, event: Any) -> None:
        """Begin a stage."""
        self.current = StageProgress(
            event.stage,
            int(event.units or 0),
            int(event.total or 0),
            _plural(event.unit_label or ""),
            self.clock(),
        )
        self.started(self.current)

    def on_UnitProgress(self, event: Any) -> None:
        """Move within a unit."""
        if self.current is not None and self.current.stage == event.stage:
            self.current.advance(str(event.unit), int(event.done), int(event.total))
            self.moved(self.current)

    def on_UnitFinished(self, event: Any) -> None:
        """End a unit."""
        if self.current is not None and self.current.stage == event.stage:
            self.current.finish(str(event.unit))
            self.moved(self.current)

    def on_UnitSkipped(self, event: Any) -> None:
        """Count a unit that was there already."""
        if self.current is not None and self.current.stage == event.stage:
            self.current.skip(str(event.unit), self.clock())
            self.moved(self.current)

    def on_UnitRetried(self, event: Any) -> None:
        """Say that a unit starts again, and why."""
        if self.current is not None and self.current.stage == event.stage:
            self.current.done.pop(str(event.unit), None)
        reason = plain(str(event.reason), limit=300)
        self.line(f"{event.stage}: {event.unit} starts again (attempt {event.attempt}): {reason}")

    def on_UnitStraggles(self, event: Any) -> None:
        """Say that the last units wait for one."""
        self.line(
            f"{event.stage}: {event.unit} takes long: {show_seconds(event.seconds)} so far, "
            f"the others took about {show_seconds(event.usual)}"
        )

    def on_UnitBackedUp(self, event: Any) -> None:
        """Say that a unit is begun a second time."""
        self.line(
            f"{event.stage}: {event.unit} is begun a second time on an idle worker; the first to finish counts"
        )

    def on_UnitStalled(self, event: Any) -> None:
        """Say that a unit does not move."""
        self.line(
            f"{event.stage}: {event.unit} has made no progress for {show_seconds(event.seconds)}; "
            "--unit-timeout would give it up"
        )

    def on_StageFinished(self, event: Any) -> None:
        """End a stage with one line."""
        if self.current is not None and self.current.stage == event.stage:
            self.ended(self.current, float(event.seconds))
            self.current = None

    def on_Note(self, event: Any) -> None:
        """Say something once."""
        self.line(plain(str(event.message)))

    def started(self, stage: StageProgress) -> None:
        """Show that a stage began."""

    def moved(self, stage: StageProgress) -> None:
        """Show that it moved."""

    def ended(self, stage: StageProgress, seconds: float) -> None:
        """Show that it ended."""
        self.line(stage_line(stage, seconds))

    def line(self, text: str) -> None:
        """Show one line."""
        # An observer that raises would end the run, and a closed stderr is no reason to.
        with suppress(BrokenPipeError):
            click.echo(text, err=True)


class LogListener(Listener):
    """Plain lines for logs: one a stage, and a sign of life every minute."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.spoke = clock()

    def started(self, stage: StageProgress) -> None:
        """Start counting the minute."""
        self.spoke = self.clock()

    def moved(self, stage: StageProgress) -> None:
        """Say how far the stage is, at most once a minute."""
        now = self.clock()
        if now - self.spoke < HEARTBEAT_SECONDS:
            return
        self.spoke = now
        left = time_left(stage, now)
        tail = "" if left is None else f", about {show_seconds(left)} left"
        self.line(f"{stage.stage}: {stage.fraction:.0%}, {units_text(stage)}{tail}")


class BarListener(Listener):
    """A live bar for the running stage, a line for every finished one."""

    def __init__(self, progress: Progress, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(clock)
        self.progress = progress
        self.task: TaskID | None = None

    def started(self, stage: StageProgress) -> None:
        """Add the bar."""
        self.task = self.progress.add_task(
            stage.stage, total=1.0, units=units_text(stage), amount="", rate="", left=""
        )
        self.moved(stage)

    def moved(self, stage: StageProgress) -> None:
        """Move the bar."""
        if self.task is None:
            return
        now = self.clock()
        amount = f"{short(stage.amount)}/{short(stage.total)} {stage.label}" if stage.total else ""
        pace = rate(stage, now)
        left = time_left(stage, now)
        self.progress.update(
            self.task,
            completed=stage.fraction,
            units=units_text(stage),
            amount=amount,
            rate="" if pace is None else f"{short(pace)}/s",
            left="" if left is None else clock_text(left),
        )

    def ended(self, stage: StageProgress, seconds: float) -> None:
        """Replace the bar by a line."""
        if self.task is not None:
            self.progress.remove_task(self.task)
            self.task = None
        super().ended(stage, seconds)

    def line(self, text: str) -> None:
        """Show one line above the bar."""
        self.progress.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)


@contextmanager
def watching(quiet: bool) -> Iterator[Observer]:
    """Yield an observer for `run`: a bar on a terminal, plain lines otherwise, nothing if quiet."""
    if quiet:
        yield lambda event: None
    elif not sys.stderr.isatty():
        yield LogListener()
    else:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        # 80 columns: 14 + 10 + 12 + 20 + 8 + 8 and five spaces between.
        with Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[units]}", markup=False),
            TextColumn("{task.fields[amount]}", markup=False),
            TextColumn("{task.fields[rate]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=Console(stderr=True),
            refresh_per_second=4,
            transient=True,
        ) as progress:
            yield BarListener(progress)


@contextmanager
def reading(what: str, quiet: bool, unit: str = "bytes") -> Iterator[Callable[[int, int], None]]:
    """Yield a function to call with (done, total) while files are read; shows a bar after a while."""
    if quiet or not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

    amount = DownloadColumn(binary_units=True) if unit == "bytes" else MofNCompleteColumn()
    progress = Progress(
        TextColumn(what, markup=False), BarColumn(), amount, console=Console(stderr=True), transient=True
    )
    task = progress.add_task(what, total=None)
    begun, shown = time.monotonic(), False

    def move(done: int, total: int) -> None:
        nonlocal shown
        if not shown and time.monotonic() - begun > SHOW_AFTER_SECONDS:
            progress.start()
            shown = True
        progress.update(task, completed=done, total=total)

    try:
        yield move
    finally:
        if shown:
            progress.stop()


def _plural(label: str) -> str:
    return label + "s" if label and not label.endswith("s") else label

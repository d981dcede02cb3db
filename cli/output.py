"""Everything that reaches stdout: tables, JSON and CSV, written once and last."""

from __future__ import annotations

import contextlib
import csv
import functools
import io
import json
import math
import os
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])

_RESULTS: ContextVar[TextIO | None] = ContextVar("results", default=None)
"""Where results go while standard output is kept clean; None: to ``sys.stdout``."""

WIDTH = 80
"""Columns of a table when the terminal does not say, and never fewer than it needs."""


class ReaderGone(Exception):
    """Whoever read our stdout closed it: nothing failed, and nothing more can be said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Column:
    """One column of a `Table`.

    Attributes:
        key: Key in the rows, and the name in CSV.
        header: What the table shows above it.
        right: Whether it is aligned to the right, as numbers are.
        kind: How values are shown: ``text``, ``number``, ``bytes``, ``seconds``, ``signed``
            (scientific, with sign) or ``auto`` (from the value and the key).
    """

    key: str
    header: str
    right: bool = False
    kind: str = "auto"


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows to show."""

    title: str | None
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]]
    header: bool = True


def clean(function: F) -> F:
    """Return ``function`` such that nothing but `emit` reaches standard output while it runs.

    What a recipe prints, or anything it starts, goes to standard error.
    """

    @functools.wraps(function)
    def wrapped(*arguments: Any, **given: Any) -> Any:
        with _results_only():
            return function(*arguments, **given)

    return wrapped  # type: ignore[return-value]


@contextlib.contextmanager
def _results_only() -> Iterator[None]:
    stdout = sys.stdout
    stdout.flush()
    with contextlib.ExitStack() as stack:
        results, number = stdout, _descriptor(stdout)
        if number is not None and _descriptor(sys.stderr) is not None:
            # The descriptor too: a process that a recipe starts, or a library in C, knows no sys.stdout.
            results = open(  # noqa: SIM115 - closed by the stack
                os.dup(number), "w", encoding=stdout.encoding, errors=stdout.errors
            )
            stack.callback(_put_back, results, number)
            os.dup2(sys.stderr.fileno(), number)
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        token = _RESULTS.set(results)
        stack.callback(_RESULTS.reset, token)
        yield


def _descriptor(stream: Any) -> int | None:
    """Return a stream's descriptor where it is one of the process's own two, else None."""
    try:
        number = int(stream.fileno())
    except (AttributeError, OSError, ValueError):
        return None
    return number if number in (1, 2) else None


def _put_back(results: TextIO, number: int) -> None:
    os.dup2(results.fileno(), number)
    results.close()


def results() -> TextIO:
    """Return the stream that results are written to."""
    return _RESULTS.get() or sys.stdout


def emit(text: str) -> None:
    """Write ``text`` to stdout and flush, so that a closed pipe shows here and nowhere else."""
    out = results()
    try:
        click.echo(text, nl=not text.endswith("\n"), file=out)
        out.flush()
    except BrokenPipeError:
        # Python flushes stdout once more when it ends and would complain: give it somewhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
        raise ReaderGone from None


def emit_json(document: Any) -> None:
    """Write one JSON document; NaN and infinities become null, which JSON can say."""
    emit(json.dumps(_finite(document), indent=2, ensure_ascii=False, default=str))


def emit_csv(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV with a header; None becomes an empty field."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([["" if row.get(c) is None else row.get(c) for c in columns] for row in rows])
    emit(buffer.getvalue())


def emit_tables(*parts: Table | str) -> None:
    """Write tables and lines of text; tables fit the terminal, or `WIDTH` when there is none."""
    from rich.console import Console

    buffer = io.StringIO()
    out = results()
    terminal = out.isatty()
    console = Console(
        file=buffer,
        force_terminal=terminal,
        width=None if terminal else int(os.environ.get("COLUMNS") or WIDTH),
        highlight=False,
        markup=False,
        emoji=False,
        legacy_windows=False,
    )
    # The buffer has no encoding of its own; box lines must be those that stdout can take.
    ascii_only = not (getattr(out, "encoding", None) or "utf-8").lower().startswith("utf")
    for part in parts:
        if isinstance(part, str):
            buffer.write(part + "\n")
        else:
            _render(console, part, ascii_only)
    emit("\n".join(line.rstrip() for line in buffer.getvalue().splitlines()))


def _render(console: Console, table: Table, ascii_only: bool) -> None:
    from rich import box
    from rich import table as rich_table
    from rich.text import Text

    if table.title is not None:
        # Not the table's own title: that one is folded to the table's width.
        console.print(Text(table.title, style="bold"))
    grid = rich_table.Table(
        box=box.ASCII2 if ascii_only else box.SIMPLE_HEAD,
        show_header=table.header,
        show_edge=False,
        pad_edge=False,
        padding=(0, 2, 0, 0) if not table.header else (0, 1),
    )
    for column in table.columns:
        grid.add_column(column.header, justify="right" if column.right else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(show(row.get(c.key), c.kind, c.key)) for c in table.columns))
    console.print(grid)


def show(value: Any, kind: str = "auto", key: str = "") -> str:
    """Return ``value`` as people read it; a dash stands for None."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if kind == "auto":
        kind = "bytes" if key.endswith("bytes") else "seconds" if key.endswith("seconds") else "auto"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        if kind == "bytes":
            return show_bytes(value)
        if kind == "seconds":
            return show_seconds(value)
        if kind == "signed":
            return f"{value:+.3e}"
        if kind == "text":
            return str(value)
        return f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"
    if isinstance(value, (Mapping, list, tuple)):
        return plain(json.dumps(_finite(value), default=str))
    return plain(str(value))


def typed(command: str) -> str:
    """Return a command that, copied into the shell, starts the ``hydra-pipe`` that runs now.

    After ``make run`` that is ``.venv/bin/hydra-pipe``, as it was typed: nothing put it on the PATH.
    """
    program, started = "hydra-pipe", sys.argv[0]
    if not command.startswith(f"{program} ") or os.path.basename(started) != program:
        return command
    found = shutil.which(program)
    if found is not None and os.path.abspath(found) == os.path.abspath(started):
        return command
    return shlex.quote(started) + command.removeprefix(program)


def show_bytes(count: float) -> str:
    """Return a size such as ``1.5 GiB``."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB", "PiB"]
    while abs(size) >= 1024 and len(units) > 1:
        size /= 1024
        units.pop(0)
    return f"{size:,.0f} {units[0]}" if units[0] == "B" else f"{size:,.1f} {units[0]}"


def show_seconds(seconds: float) -> str:
    """Return a duration such as ``3.2 s``, ``4 min 05 s`` or ``2 h 07 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def plain(text: str, limit: int | None = None) -> str:
    """Return ``text`` on one line without control characters: it may come from a run's files."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else "?" for c in line)
    return line if limit is None or len(line) <= limit else line[: limit - 3] + "..."


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value

"""Progress listens to events: what it adds up to, and what it says."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
from hydra_pipe.cli import progress as shown
from hydra_pipe.cli.pace import clock_text, short
from hydra_pipe.cli.progress import BarListener, LogListener, watching
from hydra_pipe.pipeline.executors import events
from hydra_pipe.pipeline.executors.pace import time_left
from rich.console import Console


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def replay(listener: Callable[[Any], None], clock: Clock | None = None) -> None:
    """Three shards of 100 rows: one there already, one retried."""
    listener(events.RunStarted(uri="/r", recipe="digits"))
    listener(events.StageStarted(stage="hydra/replay", units=3, total=300, unit_label="row"))
    listener(events.UnitSkipped(stage="hydra/replay", unit="shard-00000"))
    listener(events.UnitStarted(stage="hydra/replay", unit="shard-00001", attempt=1))
    listener(events.UnitProgress(stage="hydra/replay", unit="shard-00001", done=60, total=100))
    listener(events.UnitRetried(stage="hydra/replay", unit="shard-00001", attempt=2, reason="worker\ndied"))
    listener(events.UnitProgress(stage="hydra/replay", unit="shard-00001", done=50, total=100))
    if clock is not None:
        clock.now += 61
    listener(events.UnitFinished(stage="hydra/replay", unit="shard-00001", seconds=2.0, values={}))
    listener(events.UnitFinished(stage="hydra/replay", unit="shard-00002", seconds=2.0, values={}))
    listener(events.StageFinished(stage="hydra/replay", seconds=65.0))
    listener(events.Note(message="all is well"))
    listener(events.RunFinished(summary={}))


def test_logs_say_one_line_a_stage_and_a_sign_of_life(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    replay(LogListener(clock), clock)
    out = capsys.readouterr()
    assert out.out == ""
    assert out.err.splitlines() == [
        "hydra/replay: shard-00001 starts again (attempt 2): worker died",
        "hydra/replay: 67%, 2/3 shards, about 1 min 01 s left",
        "hydra/replay: 3/3 shards, 1 of them already done, 300 rows in 1 min 05 s",
        "all is well",
    ]


def test_a_stage_that_was_done_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    listener = LogListener(Clock())
    listener(events.StageStarted(stage="record", units=1, total=300))
    listener(events.UnitSkipped(stage="record", unit="trajectory"))
    listener(events.StageFinished(stage="record", seconds=0.0))
    assert capsys.readouterr().err == "record: already done (1/1 run)\n"


def test_a_retried_unit_counts_from_its_new_start() -> None:
    listener = LogListener(Clock())
    listener(events.StageStarted(stage="s", units=2, total=200, unit_label="row"))
    listener(events.UnitProgress(stage="s", unit="a", done=90, total=100))
    listener(events.UnitRetried(stage="s", unit="a", attempt=2, reason="gone"))
    listener(events.UnitProgress(stage="s", unit="a", done=10, total=100))
    assert listener.current is not None
    assert listener.current.amount == 10
    assert listener.current.fraction == pytest.approx(0.05)


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with watching(quiet=True) as listener:
        replay(listener)
    assert capsys.readouterr() == ("", "")


def test_without_a_terminal_there_is_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    with watching(quiet=False) as listener:
        replay(listener)
        assert isinstance(listener, LogListener)
    err = capsys.readouterr().err
    assert "\x1b" not in err
    assert "3/3 shards" in err


def test_the_bar_fits_80_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with watching(quiet=False) as listener:
        assert isinstance(listener, BarListener)
        clock = Clock()
        listener.clock = clock
        listener(
            events.StageStarted(stage="hydra-exact/replay", units=128, total=1_234_567, unit_label="step")
        )
        clock.now += 10
        listener(events.UnitProgress(stage="hydra-exact/replay", unit="shard-00001", done=9_000, total=9_645))
        page = Console(width=80, file=io.StringIO())
        with page.capture() as capture:
            page.print(listener.progress.get_renderable())
    rows = capture.get().splitlines()
    assert len(rows) == 1, rows
    for text in ("hydra-exact/replay", "0/128 shards", "9k/1.23M steps", "900/s"):
        assert text in rows[0]
    assert len(rows[0]) <= 80


def test_pace_counts_only_what_this_run_did() -> None:
    clock = Clock()
    listener = LogListener(clock)
    listener(events.StageStarted(stage="s", units=10, total=1000, unit_label="row"))
    clock.now += 1000  # checking what is there takes time, too, and is no work
    for unit in range(8):
        listener(events.UnitSkipped(stage="s", unit=str(unit)))
    clock.now += 10
    listener(events.UnitProgress(stage="s", unit="8", done=100, total=100))
    assert listener.current is not None
    assert time_left(listener.current, clock.now) == pytest.approx(10)


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0:00"), (61, "1:01"), (3725, "1:02:05")])
def test_clock_text(seconds: float, text: str) -> None:
    assert clock_text(seconds) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (950, "950"), (12_345, "12.3k"), (999_600, "1e+03k"), (1_200_000, "1.2M"), (0.5, "0.5")],
)
def test_short(number: float, text: str) -> None:
    if text == "1e+03k":
        text = "1000k"
    assert short(number) == text


def test_reading_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with shown.reading("verifying", quiet=False) as move:
        move(1, 10)
    assert capsys.readouterr() == ("", "")

"""What values look like, and that JSON and CSV can be read back."""

from __future__ import annotations

import csv
import io
import json
import math
import shutil
import sys
from typing import Any

import pytest
from hydra_pipe.cli.output import Column, Table, emit_csv, emit_json, emit_tables, plain, show, typed
from hydra_pipe.cli.views import plan_rows, plan_tables


@pytest.mark.parametrize(
    ("value", "kind", "key", "text"),
    [
        (None, "auto", "", "-"),
        (math.nan, "auto", "", "-"),
        (True, "auto", "", "yes"),
        (1234567, "auto", "", "1,234,567"),
        (1234567, "text", "", "1234567"),
        (1536, "auto", "peak_bytes", "1.5 KiB"),
        (12, "auto", "bytes", "12 B"),
        (3.25, "auto", "seconds", "3.2 s"),
        (59.99, "auto", "seconds", "60.0 s"),
        (245.0, "auto", "seconds", "4 min 05 s"),
        (7620, "auto", "wall_seconds", "2 h 07 min"),
        (-1.5e-7, "signed", "", "-1.500e-07"),
        ({"a": 1}, "auto", "", '{"a": 1}'),
        ("a\x1b[2J\nb", "auto", "", "a?[2J b"),
    ],
)
def test_show(value: Any, kind: str, key: str, text: str) -> None:
    assert show(value, kind, key) == text


def test_long_lines_are_cut_only_on_request() -> None:
    assert plain("x" * 600) == "x" * 600
    assert plain("x" * 600, limit=10) == "x" * 7 + "..."


@pytest.mark.parametrize(
    ("started", "on_path", "expected"),
    [
        (".venv/bin/hydra-pipe", None, ".venv/bin/hydra-pipe top r"),
        (".venv/bin/hydra-pipe", "/usr/bin/hydra-pipe", ".venv/bin/hydra-pipe top r"),
        ("my env/bin/hydra-pipe", None, "'my env/bin/hydra-pipe' top r"),
        ("/usr/bin/hydra-pipe", "/usr/bin/hydra-pipe", "hydra-pipe top r"),
        ("/usr/lib/python3/pytest/__main__.py", None, "hydra-pipe top r"),
    ],
)
def test_a_command_to_copy_starts_the_same_program(
    started: str, on_path: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [started])
    monkeypatch.setattr(shutil, "which", lambda name: on_path)
    assert typed("hydra-pipe top r") == expected
    assert typed("python -c 1") == "python -c 1"


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    emit_json({"a": [math.nan, math.inf, 1.5], "b": "\u00e9"})
    assert json.loads(capsys.readouterr().out) == {"a": [None, None, 1.5], "b": "\u00e9"}


def test_csv_can_be_read_back(capsys: pytest.CaptureFixture[str]) -> None:
    emit_csv(("a", "b"), [{"a": 1, "b": 'x,"y"'}, {"a": None, "b": 2.5}])
    assert list(csv.reader(io.StringIO(capsys.readouterr().out))) == [
        ["a", "b"],
        ["1", 'x,"y"'],
        ["", "2.5"],
    ]


def test_tables_fold_what_is_too_long_and_take_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    columns = (Column(key="a", header="a"), Column(key="b", header="b", right=True))
    emit_tables(Table(title="[bold]t[/bold]", columns=columns, rows=[{"a": "[red]" + "x" * 200, "b": 1}]))
    out = capsys.readouterr().out
    assert "[bold]t[/bold]" in out
    assert out.count("x") == 200
    assert max(map(len, out.splitlines())) <= 80


PLAN = {
    "run": {"out": "/data/runs/digits", "method": "hydra", "resumes": False},
    "shards": [{"shard": i, "rows": 1000, "buffer_bytes": 9 << 20, "unknown": None} for i in range(30)],
    "memory": {"worker_bytes": 3 << 30, "limit_bytes": None},
    "disk": {"hypergradients_bytes": 12345678},
    "time": {"replay_seconds": 754.2},
}


def test_a_plan_is_shown_in_units_and_fits(capsys: pytest.CaptureFixture[str]) -> None:
    emit_tables(*plan_tables(PLAN))
    out = capsys.readouterr().out
    for text in ("3.0 GiB", "11.8 MiB", "12 min 34 s", "9.0 MiB", "and 10 more", "1,000"):
        assert text in out
    assert "_bytes" not in out
    assert max(map(len, out.splitlines())) <= 80


def test_a_plan_is_flat_in_csv() -> None:
    rows = plan_rows(PLAN)
    assert rows[0] == {"section": "run", "row": None, "key": "out", "value": "/data/runs/digits"}
    assert rows[3] == {"section": "shards", "row": 0, "key": "shard", "value": 0}
    assert len(rows) == 3 + 30 * 4 + 4

"""Exit codes, one-line errors, start-up time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from hydra_pipe.cli import main
from hydra_pipe.cli.main import HydraGroup
from hydra_pipe.cli.options import debug_option
from hydra_pipe.storage.errors import StorageFull

COMMANDS = [
    "run",
    "plan",
    "record",
    "replay",
    "reduce",
    "attribute",
    "status",
    "stop",
    "top",
    "verify",
    "export",
]
COMMANDS += ["compare", "evaluate", "detect", "clean", "explain", "report"]


def outcome(error: BaseException, *words: str) -> Result:
    """Run a command that raises ``error``."""

    @click.group(cls=HydraGroup)
    @debug_option
    def group() -> None: ...

    @group.command()
    @debug_option
    def fail() -> None:
        raise error

    return CliRunner().invoke(group, words or ["fail"])


def test_a_deliberate_error_is_one_line() -> None:
    result = outcome(StorageFull("disk full at /x:\n  free some"))
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: disk full at /x: free some\n"


def test_an_unexpected_error_is_one_line_that_names_debug() -> None:
    result = outcome(ValueError("first\nsecond \x1b[31mred"))
    assert result.exit_code == 1
    assert result.stderr == "unexpected error: ValueError: first second ?[31mred; rerun with --debug\n"


def test_an_error_that_ray_wrapped_is_unwrapped() -> None:
    error = RuntimeError("a whole traceback")
    error.cause = StorageFull("disk full")  # type: ignore[attr-defined]
    assert outcome(error).stderr == "error: disk full\n"


@pytest.mark.parametrize("words", [("--debug", "fail"), ("fail", "--debug")])
@pytest.mark.parametrize("error", [StorageFull("full"), ValueError("bug")])
def test_debug_shows_the_traceback(words: tuple[str, ...], error: Exception) -> None:
    result = outcome(error, *words)
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stderr
    assert str(error) in result.stderr.splitlines()[-1]


def test_interruption_is_one_line_and_130() -> None:
    result = outcome(KeyboardInterrupt())
    assert result.exit_code == 130
    assert result.stderr.startswith("interrupted")
    assert result.stderr.count("\n") == 1


def test_sigterm_is_told_from_an_interrupt_also_where_ray_makes_it_one() -> None:
    """Ray's own code looks for signals while it waits, and raises a `KeyboardInterrupt` of its own for whatever came."""

    @click.command(cls=HydraGroup, invoke_without_command=True)
    def waiting() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except KeyboardInterrupt:
            raise KeyboardInterrupt from None

    result = CliRunner().invoke(waiting)
    assert result.exit_code == 143
    assert result.stderr == "terminated (SIGTERM); the same command continues where this one stopped\n"


@pytest.mark.parametrize(
    "words", [["--nope"], ["nope"], ["top"], ["top", "r", "--test", "x"], ["run", "--mode", "x"]]
)
def test_wrong_usage_is_2(words: list[str]) -> None:
    assert CliRunner().invoke(main, words).exit_code == 2


def test_every_command_has_help_with_an_example() -> None:
    shown = CliRunner().invoke(main, ["--help"])
    assert shown.exit_code == 0
    assert [line.split()[0] for line in shown.stdout.split("Commands:\n")[1].splitlines()] == COMMANDS
    assert "..." not in shown.stdout.split("Commands:\n")[1]
    for command in COMMANDS:
        result = CliRunner().invoke(main, [command, "--help"])
        assert result.exit_code == 0
        assert f"Example: hydra-pipe {command}" in " ".join(result.stdout.split())
        assert max(map(len, result.stdout.splitlines())) <= 80
        assert "--debug" in result.stdout
        assert ("--format" in result.stdout) == (command != "stop")  # which prints no table


def test_version() -> None:
    import hydra_pipe

    assert CliRunner().invoke(main, ["--version"]).stdout == f"hydra-pipe, version {hydra_pipe.__version__}\n"


def child(code: str, **settings: Any) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **settings,
    )


def test_help_needs_nothing_heavy() -> None:
    code = """
import json, sys
from hydra_pipe.cli import main
try:
    main(["run", "--help"])
except SystemExit:
    pass
heavy = ("torch", "ray", "zarr", "pyarrow", "numpy", "rich", "fsspec")
print(json.dumps([name for name in heavy if name in sys.modules]))
"""
    result = child(code)
    assert json.loads(result.stdout.splitlines()[-1]) == [], result.stderr


def test_a_closed_pipe_is_no_failure() -> None:
    code = """
import os, sys
reader, writer = os.pipe()
os.dup2(writer, 1)
os.close(reader)
os.close(writer)
import click
from hydra_pipe.cli.main import HydraGroup
from hydra_pipe.cli.output import emit
group = HydraGroup("group", commands={"say": click.Command("say", callback=lambda: emit("x" * 100_000))})
group(["say"])
"""
    result = child(code)
    assert (result.returncode, result.stderr) == (0, "")

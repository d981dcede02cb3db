"""Startup: how long until help is shown, and until the default run on a local Ray cluster is done."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hydra_pipe.storage.rundir import RunDirectory

from .report import Result
from .timing import clock, take_turns

SIZES: Mapping[str, Any] = {"rounds": 7, "shards": 8, "run": True}
QUICK: Mapping[str, Any] = {"rounds": 3, "shards": 8, "run": False}


def command() -> list[str]:
    """Return the installed command, or the same through the interpreter."""
    script = Path(sys.executable).with_name("hydra-pipe")
    return (
        [str(script)]
        if script.exists()
        else [sys.executable, "-c", "from hydra_pipe.cli import main; main()"]
    )


def call(*arguments: str, folder: Path) -> None:
    """Run the command; raise when it fails."""
    environment = {**os.environ, "NO_COLOR": "1"}
    subprocess.run(
        [*command(), *arguments], check=True, capture_output=True, text=True, cwd=folder, env=environment
    )


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Time ``--help``, an interpreter that does nothing, the run of ``make run``, and the same command again."""
    result = Result(name="startup", sizes=sizes)
    taken = take_turns(
        {
            "help": lambda: call("--help", folder=folder),
            "python": lambda: subprocess.run([sys.executable, "-c", "pass"], check=True),
        },
        rounds=sizes["rounds"],
    )
    result.add("hydra-pipe --help", taken["help"], "s", at_most=0.5)
    result.add("python -c pass, for comparison", taken["python"], "s")
    if sizes["run"]:
        out = folder / "digits"
        seconds = clock(
            lambda: call("run", "--shards", str(sizes["shards"]), "--out", str(out), folder=folder)
        )
        stages = RunDirectory(str(out)).read().get("stages", {})
        note = ", ".join(
            f"{k.rsplit('/', 1)[-1]} {v['seconds']:.1f}" for k, v in stages.items() if "seconds" in v
        )
        result.add(f"hydra-pipe run --shards {sizes['shards']}", [seconds], "s", at_most=180, note=note)
        imports = {"torch": "import torch", "compiler": "import torch._dynamo"}
        taken = take_turns(
            {
                "again": lambda: call(
                    "run", "--shards", str(sizes["shards"]), "--out", str(out), folder=folder
                ),
                **{
                    name: partial(subprocess.run, [sys.executable, "-c", code], check=True)
                    for name, code in imports.items()
                },
            },
            rounds=sizes["rounds"],
        )
        result.add("the same again, finished", taken["again"], "s", at_most=5)
        result.add("import torch, for comparison", taken["torch"], "s")
        note = "which torch's first optimizer imports"
        result.add("import torch and its compiler, for comparison", taken["compiler"], "s", note=note)
    return result

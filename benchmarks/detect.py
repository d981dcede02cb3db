"""Detect: wall time and memory of ``hydra-pipe detect`` on a made-up run of many contributions."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hydra_pipe.storage import layout
from hydra_pipe.storage.contributions import write_table, write_tile
from hydra_pipe.storage.files import list_files
from hydra_pipe.storage.rows import RowStore
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.storage.schemas import INTERCLASS, SAMPLES
from hydra_pipe.storage.trajectory import ParameterEntry, TrajectoryWriter

from .report import Result

SIZES: Mapping[str, Any] = {
    "samples": 100_000,
    "tests": 1000,
    "classes": 10,
    "detectors": (("contribution",), ("contribution", "harm", "harmed-class")),
    "rounds": 1,
}
QUICK: Mapping[str, Any] = {**SIZES, "samples": 2000, "tests": 50}
NOISE = 0.1
ROWS = 8192
"""Training samples of a file of contributions."""


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Make the run and detect in it, each command in a process of its own."""
    result = Result(name="detect", sizes=sizes)
    place = folder / "run"
    make_run(place, samples=sizes["samples"], tests=sizes["tests"], classes=sizes["classes"])
    name = f"{sizes['samples']:,} x {sizes['tests']:,} contributions"
    for detectors in sizes["detectors"]:
        words = [word for detector in detectors for word in ("--by", detector)]
        taken = [timed(["detect", str(place), *words]) for _ in range(sizes["rounds"])]
        what = f"{name}: --by {', '.join(detectors)}"
        result.add(f"{what}: time", [one[0] for one in taken], "s", at_most=60)
        result.add(
            f"{what}: processor time", [one[1] for one in taken], "s", note="what a busy machine leaves alone"
        )
        result.add(f"{what}: largest resident set", [one[2] / 1e9 for one in taken], "GB", at_most=2)
    return result


def timed(words: list[str]) -> tuple[float, float, int]:
    """Return seconds, seconds of the processors and peak bytes of a command."""
    begun = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "hydra_pipe.cli", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(child.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"hydra-pipe {' '.join(words)} failed")
    return time.perf_counter() - begun, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024


def make_run(place: Path, *, samples: int, tests: int, classes: int, method: str = "hydra") -> None:
    """Write a finished run whose contributions are drawn, with a share `NOISE` of wrong labels.

    A sample helps its true class and harms its given one's test samples where its label is wrong; the rest is noise.
    """
    directory, draw = RunDirectory(str(place)), np.random.default_rng(0)
    true = draw.integers(0, classes, samples)
    wrong = np.flatnonzero(draw.random(samples) < NOISE)
    given = true.copy()
    given[wrong] = (true[wrong] + draw.integers(1, classes, len(wrong))) % classes
    test_label = np.arange(tests) % classes
    _record(directory, samples, (wrong, true[wrong]))
    _test_gradients(directory, test_label)
    _tables(directory, method, given, true, test_label, draw)
    directory.update(
        lambda _: {
            "format": 1,
            "recipe": {"name": "drawn"},
            "identity": {"recipe": "drawn"},
            "n_train": samples,
            "n_test": tests,
            "n_tracked": samples,
            "n_test_tracked": tests,
            "dimension": 1,
            "steps": 1,
            "method": method,
            "methods": {method: {"state": "complete"}},
        }
    )


def _record(directory: RunDirectory, samples: int, noisy: tuple[Any, Any]) -> None:
    uri = directory.path(layout.TRAJECTORY)
    writer = TrajectoryWriter(
        uri, dimension=1, dtype="float32", checkpoint_steps=[0, 1], buffer_bytes=0, parameter_count=1
    )
    nothing = np.zeros(1, dtype=np.float32)
    for k in range(2):
        writer.write_checkpoint(k, k, nothing, nothing, np.array([False]), b"")
    step = np.ones((1, 1))
    writer.finish(
        batches=np.zeros((1, 1), dtype=np.int32),
        learning_rate=step,
        momentum=step,
        weight_decay=step,
        dampening=step,
        nesterov=step.astype(bool),
        coefficient=step,
        loss=np.ones(1),
        digest_step=np.zeros(1, dtype=np.int64),
        digest=np.zeros(1, dtype=np.uint32),
        epoch_digest=["0" * 64],
        parameters=(ParameterEntry(name="w", shape=(1,), group=0, start=0),),
        epochs={},
        noisy=noisy,
        attrs={"n_train": samples},
    )
    files = [f"{layout.TRAJECTORY}/{name}" for name in list_files(uri)]
    directory.commit("record", "trajectory", files, {"steps": 1})


def _test_gradients(directory: RunDirectory, label: np.ndarray) -> None:
    name, count = layout.TEST_GRADIENTS, len(label)
    store = RowStore.create(
        directory.path(name),
        name="gradient",
        rows=count,
        columns=1,
        dtype="float32",
        chunk_rows=count,
        dimensions=("test_index", "parameter"),
        row_columns={
            "test_index": np.arange(count, dtype=np.int32),
            "loss": np.ones(count),
            "label": label.astype(np.int16),
            "prediction": label.astype(np.int16),
        },
        attrs={},
    )
    store.write(0, np.ones((count, 1), dtype=np.float32))
    files = [f"{name}/{file}" for file in store.files(0, count)]
    directory.commit("test-gradients", "block-00000", files, {"rows": count})
    directory.commit("test-gradients", "index", [f"{name}/{file}" for file in store.metadata_files()], {})


def _tables(
    directory: RunDirectory,
    method: str,
    given: np.ndarray,
    true: np.ndarray,
    test_label: np.ndarray,
    draw: np.random.Generator,
) -> None:
    stage = f"{method}/reduce"
    for k, start in enumerate(range(0, len(given), ROWS)):
        rows = np.arange(start, min(len(given), start + ROWS))
        values = 1e-3 * draw.standard_normal((len(rows), len(test_label)), dtype=np.float32)
        same = true[rows, None] == test_label
        values += np.where(same, np.where(given[rows] == true[rows], 1e-4, -2e-3)[:, None], 0)
        tile, table = (
            layout.table_part("contributions", method, f"{k:05d}-00000"),
            layout.table_part("samples", method, f"{k:05d}"),
        )
        write_tile(
            directory.path(tile),
            train_index=rows,
            test_index=np.arange(len(test_label)),
            train_label=given[rows],
            test_label=test_label,
            contribution=values.astype(np.float32),
        )
        columns = {
            "train_index": rows,
            "label": given[rows],
            "visits": np.ones(len(rows)),
            "contribution": values.mean(1, dtype=np.float64),
            "contribution_std": values.std(1, dtype=np.float64),
            "shard": np.zeros(len(rows)),
        }
        write_table(directory.path(table), pa.table(columns).cast(SAMPLES), SAMPLES)
        directory.commit(stage, f"rows-{k:05d}", [tile, table], {"rows": len(rows)})
    file = layout.table_part("interclass", method, "00000")
    one = {"train_class": [0], "test_class": [0], "pairs": [1], "contribution": [0.0], "normalized": [0.0]}
    write_table(directory.path(file), pa.table(one).cast(INTERCLASS), INTERCLASS)
    directory.commit(stage, "interclass", [file], {})

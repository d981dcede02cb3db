"""What the end-to-end tests share: running, reading every number of a run, and comparing two."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click.testing
import numpy as np
from hydra_pipe.cli import main
from hydra_pipe.pipeline.executors.events import Event, UnitFinished, UnitSkipped
from hydra_pipe.pipeline.opened_run import Run, open_run
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage import layout

METHOD = "method=hydra"


def serial(out: Path | str, recipe: Any, **fields: Any) -> Run:
    """Run in this process, on the CPU whatever there is."""
    return run(RunSpec(recipe=recipe, out=str(out), **{"executor": "serial", "device": "cpu", **fields}))


def cli(*words: str) -> click.testing.Result:
    """Call ``hydra-pipe`` in this process."""
    return click.testing.CliRunner().invoke(main, [str(word) for word in words])


def numbers(uri: Path | str, *, shard: bool = True) -> dict[str, np.ndarray]:
    """Return every number a run computed, by name, in a fixed order of rows.

    Args:
        uri: The run.
        shard: Whether the column ``shard`` of the samples is among them.
    """
    opened = open_run(str(uri))
    trajectory = opened.trajectory()
    count = len(trajectory.checkpoint_steps)
    found = {
        "hypergradients": opened.hypergradients()[:],
        "train_index": opened.hypergradient_store().column("train_index"),
        "batches": trajectory.batches,
        "loss": trajectory.loss,
        "coefficient": trajectory.coefficient,
        "digest": trajectory.digest,
        "epoch_digest": np.array(trajectory.epoch_digest),
        "weights": np.stack([trajectory.checkpoint(k).weights for k in range(count)]),
        "momentum": np.stack([trajectory.checkpoint(k).momentum for k in range(count)]),
    }
    gradients = opened.test_gradients()
    found["test_gradients"] = gradients.read(0, gradients.rows)
    for name in ("test_index", "loss", "label", "prediction"):
        found[f"test_{name}"] = gradients.column(name)
    pairs = opened.contributions().to_table()
    pairs = pairs.sort_by([("test_index", "ascending"), ("train_index", "ascending")])
    tables = {"contributions": pairs, "samples": opened.samples(), "interclass": opened.interclass()}
    for name, table in tables.items():
        for column in table.column_names:
            if column != "method" and (shard or column != "shard"):
                found[f"{name}.{column}"] = table[column].to_numpy()
    return found


def assert_same_bits(found: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    """Compare two results of :func:`numbers`; NaN equals NaN."""
    assert found.keys() == right.keys()
    for name, value in right.items():
        assert found[name].dtype == value.dtype, name
        assert found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), f"{name} differs"


class Heard:
    """An observer that notes which units were done and which were found done."""

    def __init__(self) -> None:
        self.done: list[tuple[str, str]] = []
        self.skipped: list[tuple[str, str]] = []

    def __call__(self, event: Event) -> None:
        if isinstance(event, UnitFinished):
            self.done.append((event.stage, event.unit))
        elif isinstance(event, UnitSkipped):
            self.skipped.append((event.stage, event.unit))


def manifests(uri: Path | str) -> dict[str, tuple[int, bytes]]:
    """Return time of last change and contents of every manifest, by path below ``manifests``."""
    root = Path(uri) / "manifests"
    found = {}
    for path in root.rglob("*.json") if root.is_dir() else ():
        found[str(path.relative_to(root))] = (path.stat().st_mtime_ns, path.read_bytes())
    return found


def files(uri: Path | str) -> list[str]:
    """Return all files below a directory but the log, which every command adds to; relative, sorted."""
    root = Path(uri)
    found = (path for path in root.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(root)) for path in found if path.name != layout.LOG)

"""Stores that fit: bytes, seconds and what is lost of contributions, for each type of a number and numbers a row.

Rows of a recorded training are replayed whole and projected, stored, read back and joined with test gradients that are
projected likewise. Contributions are held against those of whole rows in float32.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from hydra_pipe.pipeline.compare.ranking import spearman
from hydra_pipe.storage.files import list_files
from hydra_pipe.storage.precision import NUMBER_BYTES
from hydra_pipe.storage.rows import RowStore, chunk_rows_for
from hydra_pipe.storage.trajectory import Trajectory
from hydra_pipe.workers.model.layout import Layout
from hydra_pipe.workers.model.row_map import RowMap
from hydra_pipe.workers.recipe import Recipe
from hydra_pipe.workers.recipes.digits import Digits
from hydra_pipe.workers.recipes.mobilenet import MobileNetV2
from hydra_pipe.workers.replay.make import make_replay
from hydra_pipe.workers.training.test_gradients import TestGradients
from hydra_pipe.workers.training.training import Compute, Training
from torch import nn

from .cases import Clothes, Prefetched, record
from .report import Result

SIZES: Mapping[str, Any] = {
    "cases": (("LeNet-5", 1600, 100), ("wide", 500, 100)),
    "epochs": 4,
    "shares": (64, 32, 16, 8, 4),
    "threads": 1,
}
QUICK: Mapping[str, Any] = {"cases": (("LeNet-5", 128, 20),), "epochs": 1, "shares": (8,), "threads": 1}

DTYPES = ("float32", "bfloat16", "float16")
SPEARMAN = 0.99

Floats = npt.NDArray[np.floating]


class Wide(Digits):
    """Digits on a network of 64-512-512-10 units, 301,066 parameters: one layer has most of them."""

    NAME = "wide-digits"

    def model(self) -> nn.Module:
        """Return the network."""
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
        )


class Text(nn.Module):
    """A transformer of 100 million parameters, which is only counted."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(18_000, 768)
        layer = nn.TransformerEncoderLayer(768, 12, 3072, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 12, enable_nested_tensor=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Case:
    """A recorded training, and the gradients of its test samples."""

    name: str
    recipe: Recipe
    compute: Compute
    batches: Any
    trajectory: Trajectory
    layout: Layout
    tracked: npt.NDArray[np.int64]
    gradients: Floats
    folder: Path


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Measure each case; then count what the goals ask for."""
    result = Result(name="stores", sizes=sizes)
    torch.set_num_threads(sizes["threads"])
    for name, samples, tests in sizes["cases"]:
        _case(result, _recorded(name, samples, tests, sizes, folder), sizes)
    _counted(result, MobileNetV2, "MobileNetV2, 50,000 samples", 50_000, 60.0)
    _counted(result, Text, "100 million parameters, 10,000 samples", 10_000, 40.0)
    return result


def _recorded(name: str, samples: int, tests: int, sizes: Mapping[str, Any], folder: Path) -> _Case:
    kind = Clothes if name == "LeNet-5" else Wide
    recipe = kind(train_size=samples, test_size=tests, epochs=sizes["epochs"])
    compute = Compute(device="cpu", threads=sizes["threads"])
    place = folder / name
    batches, trajectory = record(recipe, compute, place)
    training = Training(recipe, compute)
    gradients = TestGradients(training, trajectory)
    found = gradients.rows(np.arange(tests)).gradient
    gradients.engine.close()
    return _Case(
        name=name,
        recipe=recipe,
        compute=compute,
        batches=batches,
        trajectory=trajectory,
        layout=training.layout,
        tracked=np.arange(samples),
        gradients=found,
        folder=place,
    )


def _case(result: Result, case: _Case, sizes: Mapping[str, Any]) -> None:
    whole, dimension = None, case.layout.dimension
    base = 0.0
    for share in (1, *reversed(sizes["shares"])):
        kept = (
            None if share == 1 else RowMap.of(case.layout.entries, None, dimension // share, case.recipe.seed)
        )
        begun = time.process_time()
        replay = make_replay(
            "hydra",
            "forward",
            Prefetched(case.recipe, case.compute, case.batches),
            case.trajectory,
            case.tracked,
            row_map=kept,
        ).run()
        rows = replay.numpy(0, len(case.tracked))
        replay.close()
        seconds = time.process_time() - begun
        base = base or seconds
        gradients = case.gradients if kept is None else kept.apply(case.gradients)
        columns = rows.shape[1]
        what = f"{case.name}, D = {dimension:,}, {columns:,} numbers a row"
        result.add(f"{what}: replay / whole rows, processor", [seconds / base], "x")
        for dtype in DTYPES:
            stored, size, writing = _stored(case, rows, dtype)
            found = -(stored @ gradients.T) / len(case.tracked)
            whole = found if whole is None else whole
            ranks = spearman(found, whole)
            error = float(np.linalg.norm(found - whole) / np.linalg.norm(whole))
            per = size / rows.size
            goal = SPEARMAN if share in (1, 4, 8) and len(case.tracked) > 200 else None
            note = f"error {error:.1e}, {per:.2f} bytes a number, {size / len(case.tracked) / 1e3:,.0f} kB a row, written in {writing:.1f} s"
            result.add(f"{what}, {dtype}: Spearman", [float(np.mean(ranks))], "", at_least=goal, note=note)


def _stored(case: _Case, rows: Floats, dtype: str) -> tuple[Floats, int, float]:
    """Return rows as they come back, the bytes of their files, and the processor seconds of both."""
    uri = str(case.folder / f"{dtype}-{rows.shape[1]}.zarr")
    begun = time.process_time()
    store = RowStore.create(
        uri,
        name="hypergradient",
        rows=len(rows),
        columns=rows.shape[1],
        dtype="float32",
        chunk_rows=chunk_rows_for(rows.shape[1], 4, len(rows)),
        dimensions=("train_index", "parameter"),
        row_columns={},
        attrs={},
        precision=None if dtype == "float32" else dtype,
    )
    store.write(0, rows)
    found = store.read(0, len(rows))
    seconds = time.process_time() - begun
    size = sum((Path(uri) / name).stat().st_size for name in list_files(uri))
    return found, size, seconds


def _counted(result: Result, model: type[nn.Module], name: str, samples: int, most: float) -> None:
    """Count the bytes that a plan has for rows of a model on the meta device, at an eighth of its numbers and less."""
    with torch.device("meta"):
        layout = Layout.of(model())
    for dtype in DTYPES:
        project = int(0.98e9 * most / samples / NUMBER_BYTES[dtype])
        kept = RowMap.of(layout.entries, None, project, 0)
        assert kept is not None
        size = samples * kept.columns * NUMBER_BYTES[dtype] / 1e9
        note = f"D = {layout.dimension:,}, --project {project:,}: {layout.dimension / kept.columns:.1f} times fewer numbers"
        result.add(f"{name}, {dtype}: rows", [size], "GB", at_most=most, note=note)

"""Replay: what following every sample costs, beside plain training and beside Algorithm 1 as printed.

All sides train the same model on the same batches, held in memory; blocks of steps take turns.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
from hydra_pipe.storage.rows import RowStore, chunk_rows_for
from hydra_pipe.storage.trajectory import Trajectory
from hydra_pipe.workers.recipe import Batch
from hydra_pipe.workers.replay import fast as replaying
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.buffers import HypergradientBuffers
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training.training import Compute

from .cases import Clothes, Prefetched, record
from .dense import DenseAlgorithm
from .report import Result
from .timing import clock, median, ratio

SIZES: Mapping[str, Any] = {
    "samples": 6400,
    "threads": 2,
    "block": 10,
    "forms": 5,
    "dense_steps": 9,
    "growth": (1600, 3200, 6400, 12800),
    "epochs": 20,
    "epochs_samples": 640,
    "shards": 8,
    "passes": 3,
}
QUICK: Mapping[str, Any] = {
    **SIZES,
    "samples": 1600,
    "forms": 2,
    "dense_steps": 2,
    "growth": (800, 1600),
    "epochs": 4,
    "epochs_samples": 320,
    "passes": 1,
}
ONLY_A_SHARE_OF_MEMORY = 0.8


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """A recorded training and its batches in memory."""

    recipe: Clothes
    compute: Compute
    batches: Sequence[Batch]
    trajectory: Trajectory

    @classmethod
    def make(cls, samples: int, epochs: int, threads: int, folder: Path) -> Case:
        """Record a training of this size below ``folder``."""
        recipe = Clothes(train_size=samples, test_size=64, epochs=epochs)
        compute = Compute(threads=threads, device="cpu")
        batches, trajectory = record(recipe, compute, folder)
        return cls(recipe=recipe, compute=compute, batches=batches, trajectory=trajectory)

    def training(self) -> Prefetched:
        """Return a fresh training on the batches in memory."""
        return Prefetched(self.recipe, self.compute, self.batches)


@dataclass(frozen=True, kw_only=True, slots=True)
class Alternation:
    """Seconds a step, block by block, of replay, plain training and the dense form; what replay collected."""

    plain: list[float]
    tracked: list[float]
    dense: list[float]
    buffers: HypergradientBuffers


def alternate(
    case: Case, tracked: Sequence[int] | Any, block: int, *, factors: bool = True, dense_steps: int = 0
) -> Alternation:
    """Replay the whole record; after each block of steps, train the same steps plainly.

    Replay's seconds include everything that it does: settings, products, buffers, digests.

    Args:
        case: What was recorded.
        tracked: Train indices to follow.
        block: Steps a turn, fewer where there are few; the first turn is dropped.
        factors: False adds every visit to dense buffers, Linear weights too.
        dense_steps: Turns that also take one step of the dense form, for all samples.
    """
    block = max(1, min(block, len(case.batches) // 5))
    plainly = case.training()
    dense = DenseAlgorithm(case.training()) if dense_steps else None
    switch = nullcontext() if factors else mock.patch.object(replaying, "factored_entries", _none)
    with switch:
        replay = Replay(case.training(), case.trajectory, np.asarray(tracked), FastRows)
    taken: dict[str, list[float]] = {"tracked": [], "plain": [], "dense": []}

    def train(first: int, stop: int) -> None:
        for step in range(first, stop):
            float(plainly.step(step, case.batches[step]))

    def after(done: int, _total: int) -> None:
        nonlocal begun
        if done % block:
            return
        taken["tracked"].append((time.perf_counter() - begun) / block)
        taken["plain"].append(clock(lambda: train(done - block, done)) / block)
        if dense and len(taken["dense"]) <= dense_steps:
            step = len(taken["dense"])
            taken["dense"].append(clock(lambda: dense.step(step, case.batches[step])))
        begun = time.perf_counter()

    begun = time.perf_counter()
    replay.run(after)
    replay.close()
    if dense:
        dense.close()
    # The first of each touched fresh memory.
    return Alternation(buffers=replay.sink.buffers, **{name: values[1:] for name, values in taken.items()})


def _none(*_arguments: object) -> frozenset[int]:
    return frozenset()


def form(buffers: HypergradientBuffers, chunk: int) -> None:
    """Form all rows, a chunk at a time, as a replay worker does."""
    for start in range(0, buffers.rows, chunk):
        buffers.numpy(start, min(buffers.rows, start + chunk))


def form_and_write(buffers: HypergradientBuffers, chunk: int, uri: str) -> None:
    """Form all rows and write them to a new store."""
    store = RowStore.create(
        uri,
        name="hypergradient",
        rows=buffers.rows,
        columns=buffers.layout.dimension,
        dtype="float32",
        chunk_rows=chunk,
        dimensions=("train_index", "parameter"),
        row_columns={"train_index": np.arange(buffers.rows, dtype=np.int32)},
        attrs={},
    )
    for start in range(0, buffers.rows, chunk):
        store.write(start, buffers.numpy(start, min(buffers.rows, start + chunk)))


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Run all parts."""
    result = Result(name="replay", sizes=sizes)
    _one_epoch(result, sizes, folder)
    _growth(result, sizes, folder)
    _many_epochs(result, sizes, folder)
    _shards(result, sizes, folder)
    return result


def _one_epoch(result: Result, sizes: Mapping[str, Any], folder: Path) -> None:
    """One epoch, every sample tracked: goals of 2x plain training and a fifteenth of dense."""
    samples = sizes["samples"]
    case = Case.make(samples, 1, sizes["threads"], folder / "one")
    dimension = int(case.trajectory.checkpoint(0).weights.shape[0])
    chunk = chunk_rows_for(dimension, 4, samples)
    plain: list[float] = []
    tracked: list[float] = []
    whole: list[float] = []
    written: list[float] = []
    forming: list[float] = []
    for turn in range(sizes["passes"]):
        turns = alternate(case, range(samples), sizes["block"])
        steps = len(case.batches)
        form(turns.buffers, chunk)  # the first time touches fresh memory, as once in a worker's life
        forms = [clock(lambda b=turns.buffers: form(b, chunk)) / steps for _ in range(sizes["forms"])]
        uri = str(folder / f"one-{turn}.zarr")
        writing = clock(lambda b=turns.buffers, u=uri: form_and_write(b, chunk, u)) / steps
        plain += turns.plain
        tracked += turns.tracked
        forming += forms
        whole += [(t + median(forms)) / p for t, p in zip(turns.tracked, turns.plain, strict=True)]
        written += [(t + writing) / p for t, p in zip(turns.tracked, turns.plain, strict=True)]
    del turns
    name = f"{samples:,} samples, 1 epoch"
    result.add(f"{name}: plain training", [1e3 * v for v in plain], "ms a step")
    result.add(f"{name}: replay, adding to buffers", [1e3 * v for v in tracked], "ms a step")
    result.add(f"{name}: forming all rows", [1e3 * v for v in forming], "ms a step")
    result.add(f"{name}: replay / plain", ratio(tracked, plain), "x")
    result.add(f"{name}: replay and forming / plain", whole, "x", at_most=2)
    result.add(
        f"{name}: replay, forming and writing / plain",
        written,
        "x",
        note=f"D = {dimension:,}; one file a chunk",
    )


def _growth(result: Result, sizes: Mapping[str, Any], folder: Path) -> None:
    """The dense form grows with N, replay does not."""
    for samples in sizes["growth"]:
        needed = 3 * samples * 61_706 * 4
        if needed > ONLY_A_SHARE_OF_MEMORY * psutil.virtual_memory().available:
            result.add(f"{samples:,} samples: dense / replay", [float("nan")], "x", note="too little memory")
            continue
        case = Case.make(samples, 1, sizes["threads"], folder / f"growth-{samples}")
        turns = alternate(case, range(samples), sizes["block"], dense_steps=sizes["dense_steps"])
        chunk = chunk_rows_for(turns.buffers.layout.dimension, 4, samples)
        form(turns.buffers, chunk)
        forming = clock(lambda b=turns.buffers, c=chunk: form(b, c)) / len(case.batches)
        times = zip(turns.dense, turns.tracked, strict=False)  # the dense form may take fewer turns
        shares = [dense / (tracked + forming) for dense, tracked in times]
        ours = median(turns.tracked) + forming
        note = f"dense {1e3 * median(turns.dense):.0f} ms, replay and forming {1e3 * ours:.1f} ms a step"
        goal = 15.0 if samples == 6400 else None
        result.add(
            f"{samples:,} samples: dense / (replay and forming)", shares, "x", at_least=goal, note=note
        )
        del turns


def _many_epochs(result: Result, sizes: Mapping[str, Any], folder: Path) -> None:
    """Many visits of few samples: factors against one dense addition a visit."""
    samples, epochs = sizes["epochs_samples"], sizes["epochs"]
    case = Case.make(samples, epochs, sizes["threads"], folder / "many")
    name = f"{samples:,} samples, {epochs} epochs"
    found = {}
    for label, factors in (("factors", True), ("one dense addition a visit", False)):
        turns = alternate(case, range(samples), sizes["block"], factors=factors)
        chunk = chunk_rows_for(turns.buffers.layout.dimension, 4, samples)
        form(turns.buffers, chunk)
        forming = clock(lambda b=turns.buffers, c=chunk: form(b, c)) / len(case.batches)
        found[label] = [(t + forming) / p for t, p in zip(turns.tracked, turns.plain, strict=True)]
        held = sum(t.nbytes for t in _tensors(turns.buffers)) / samples / 1e3
        result.add(
            f"{name}: replay and forming / plain, {label}",
            found[label],
            "x",
            note=f"{held:.0f} kB a sample held",
        )
    both = [median(found[label]) for label in ("one dense addition a visit", "factors")]
    result.add(f"{name}: dense additions / factors", [both[0] / both[1]], "x")


def _tensors(buffers: HypergradientBuffers) -> list[Any]:
    held = [buffers.dense]
    for factors in buffers.factors.values():
        held += [t for t in (factors.left, factors.right, factors.sum) if t is not None]
    return held


def _shards(result: Result, sizes: Mapping[str, Any], folder: Path) -> None:
    """The same work in shards: each trains everything and follows its part."""
    samples, shards = sizes["samples"], sizes["shards"]
    case = Case.make(samples, 1, sizes["threads"], folder / "shards")
    width = samples // shards
    chunk = chunk_rows_for(61_706, 4, samples, shards)
    costs: list[float] = []
    for shard in range(shards):
        turns = alternate(case, range(shard * width, (shard + 1) * width), sizes["block"])
        form(turns.buffers, chunk)
        forming = clock(lambda b=turns.buffers: form(b, chunk)) / len(case.batches)
        costs += [(t + forming) / p for t, p in zip(turns.tracked, turns.plain, strict=True)]
    result.add(f"{samples:,} samples in {shards} shards: one shard / plain", costs, "x")

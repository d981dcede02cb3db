"""Check what the stores and tables of a run hold: counts, indices, finite values, agreement."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from ...storage import layout
from ...storage.rows import RowStore
from ...storage.trajectory_format import LOOP
from ...workers.replay.targets import mean_gradients
from ..reading.kept_rows import row_map_of
from ..reading.panels import targets
from ..spec.targets import store_of, target_of_each
from ..vocabulary import SAMPLES
from . import conservation as law

if TYPE_CHECKING:
    from ...workers.model.row_map import RowMap
    from ..reading.reader import Reader

MEAN_TOLERANCE = 1e-4
"""Largest relative difference between a sample's stored mean and the mean of its float32 contributions."""


class Contents:
    """Collects problems of one run's contents; each method checks one part.

    Attributes:
        problems: One line each.
        rows: Rows read, by part.
    """

    def __init__(self, run: Reader, advance: Callable[[int, str], None]) -> None:
        self.run = run
        self.info = run.noted
        self.advance = advance
        self.problems: list[str] = []
        self.rows: dict[str, int] = {}

    @cached_property
    def row_map(self) -> RowMap | None:
        """What is kept of the rows of the run; None: all."""
        return row_map_of(self.run)

    @property
    def columns(self) -> int | None:
        """Numbers of a row; None: not known."""
        return self.info.dimension if self.row_map is None else self.row_map.columns

    def trajectory(self) -> None:
        """Check the record: finite values, first and last checkpoint, digests of the checkpoints."""
        trajectory = self.run.trajectory()
        if trajectory.attrs.get("recorded") != LOOP:  # a loop need not tell its losses
            self.finite(f"{layout.TRAJECTORY}/loss", trajectory.loss)
        steps = len(trajectory.loss)
        self.rows["trajectory steps"] = steps
        at = [int(step) for step in trajectory.checkpoint_steps]
        if not at or at[0] != 0 or at[-1] != steps:
            self.problems.append(f"{layout.TRAJECTORY}: checkpoints at {at[:1]}..{at[-1:]}, not 0..{steps}")
        digests = dict(zip(trajectory.digest_step.tolist(), trajectory.digest.tolist(), strict=True))
        for k, step in enumerate(trajectory.stands):
            weights = trajectory.at(step).weights
            self.finite(f"{layout.TRAJECTORY}/checkpoint/weights[{k}]", weights)
            if step in digests and zlib.crc32(np.ascontiguousarray(weights).tobytes()) != digests[step]:
                self.problems.append(
                    f"{layout.TRAJECTORY}/checkpoint/weights[{k}]: not the weights whose digest step {step} recorded"
                )

    def test_gradients(self) -> None:
        """Check the test gradients: counts, indices, finite values."""
        store = self.run.test_gradients()
        self.shape(layout.TEST_GRADIENTS, store, self.info.n_test_tracked, self.columns)
        self.index(f"{layout.TEST_GRADIENTS}/test_index", store.column("test_index"), self.info.n_test)
        self.stream(layout.TEST_GRADIENTS, store)

    def target_gradients(self, kind: str) -> None:
        """Check that the gradients of classes, or of the mean, are the means of the test gradients."""
        name, tests = store_of(kind), self.run.test_gradients()
        store = RowStore.open(self.run.directory.path(name), "gradient", self.run.directory.vouched)
        self.shape(name, store, None, self.columns)
        step = law.block_rows(store.chunk_rows, store.columns, 8)
        for start in range(0, store.rows, step):
            stop = min(store.rows, start + step)
            group = target_of_each(store.column("label"), tests.column("label"), start, stop)
            mean = mean_gradients(tests.read, group, tests.columns, stop - start)
            found = store.read(start, stop)
            # Once more the same sums; only their rounding may differ, on another machine.
            limit = 4 * np.finfo(found.dtype).eps * np.abs(mean).max(initial=0.0)
            bad = ~(np.abs(found - mean).max(1) <= limit)
            if bad.any():
                self.problems.append(
                    f"{name}: row {start + int(bad.argmax())} is not the mean of its test gradients"
                )
            self.advance(found.nbytes, name)
        self.rows[name] = store.rows

    def hypergradients(self, method: str, *, lawful: bool = True) -> dict[str, Any]:
        """Read every row once; for the fast method the same pass feeds the conservation law.

        Args:
            method: The estimator.
            lawful: Whether the record is sound, so that the law can be held against it.

        Returns:
            What `conservation.judged` returns; empty where the law was not computed.
        """
        name = layout.hypergradients(method)
        store = self.run.hypergradient_store(method)
        self.shape(name, store, self.info.n_tracked, self.columns)
        self.index(f"{name}/train_index", store.column("train_index"), self.info.n_train)
        unit = law.rounding_unit(self.run, store)
        absolute = np.zeros(store.columns)
        total = self.stream(name, store, None if unit is None else absolute)
        if not lawful or method != law.METHOD or law.not_applicable(self.run) is not None:
            return {}
        found = law.judged(self.run, total, self.row_map, None if unit is None else unit * absolute)
        self.problems += [
            f"{name}: the sum of all rows is off the recorded weights by {g['error']:.1e} "
            f"(relative, parameter group {g['group']}), the limit is {g['limit']:.1e}"
            for g in found.get("groups", ())
            if not g["error"] <= g["limit"]
        ]
        return found

    def contributions(self, method: str) -> None:
        """Check contributions, samples and interclass of a method, and that they agree."""
        name, summed = layout.table("contributions", method), layout.table("samples", method)
        tracked, tests = self.info.n_tracked, self.info.target_count(method)
        # C(i) is the mean over the test samples: a class weighs as many as it has.
        weights = None if self.info.kind_of(method) == SAMPLES else targets(self.run, method)
        samples = self.run.samples(method)
        train_index = samples["train_index"].to_numpy()
        self.index(f"{summed}: train_index", train_index, self.info.n_train)
        self.count(summed, len(samples), tracked)
        for column in ("contribution", "contribution_std"):
            self.finite(f"{summed}: {column}", samples[column].to_numpy())
        interclass = self.run.interclass(method)["contribution"].to_numpy()
        self.finite(f"{layout.table('interclass', method)}: contribution", interclass)
        size = int(train_index.max(initial=-1)) + 1
        sums, counts, rows, outside = np.zeros(size), np.zeros(size, np.int64), 0, 0
        columns = ["train_index", "contribution", *([] if weights is None else ["test_label"])]
        for batch in self.run.contributions(method).to_batches(columns=columns):
            index, values = (batch.column(c).to_numpy() for c in ("train_index", "contribution"))
            rows += len(index)
            self.finite(name, values)
            if weights is not None:
                at = np.searchsorted(weights.label, batch.column("test_label").to_numpy())
                values = values * (weights.weight * len(weights))[np.minimum(at, len(weights) - 1)]
            inside = (index >= 0) & (index < size)
            outside += int(len(index) - inside.sum())
            index, values = index[inside], values[inside]
            sums += np.bincount(index, weights=values, minlength=size)
            counts += np.bincount(index, minlength=size)
            self.advance(batch.nbytes, name)
        self.rows[name] = rows
        self.count(name, rows, None if tracked is None or tests is None else tracked * tests)
        if outside or (tests is not None and (counts[train_index] != tests).any()):
            what = "test sample" if weights is None else "target"
            self.problems.append(f"{name}: not every tracked sample has one row a {what}")
            return
        stored = samples["contribution"].to_numpy()
        mean = sums[train_index] / np.maximum(counts[train_index], 1)
        # float32 rows: each is rounded by itself, so the scale is their spread and not their mean.
        scale = np.maximum(np.abs(stored), samples["contribution_std"].to_numpy())
        wrong = np.abs(mean - stored) > MEAN_TOLERANCE * np.maximum(scale, np.finfo(np.float32).tiny)
        if wrong.any():
            self.problems.append(
                f"{summed}: {int(wrong.sum())} means are not those of {name}, "
                f"first at train_index {int(train_index[wrong.argmax()])}"
            )

    def average(self, method: str) -> None:
        """Check the spreads of an average over seeds, and that it is one of its members' C(i)."""
        name, seeds = layout.table("contributions_spread", method), self.run.averages(method)
        rows, negative = 0, 0
        for batch in self.run.spread(method).to_batches(columns=["contribution_spread"]):
            values = batch.column("contribution_spread").to_numpy()
            self.finite(name, values)
            negative += int((values < 0).sum())
            rows += len(values)
            self.advance(batch.nbytes, name)
        self.rows[name] = rows
        self.count(name, rows, self.rows.get(layout.table("contributions", method)))
        if negative:
            self.problems.append(f"{name}: {negative:,} values are below 0")
        members, source = self.run.members(), str(self.info.entry(method).source)
        missing = [seed for seed in seeds[1:] if seed not in members]
        if missing:
            self.problems.append(f"{name}: the run with seed {missing[0]} that it averages is not there")
            return
        each = [
            member.samples(source)["contribution"].to_numpy()
            for member in (self.run, *(members[seed] for seed in seeds[1:]))
        ]
        if len({len(values) for values in each}) > 1:
            self.problems.append(f"{name}: its members have not the same samples")
            return
        own, stored = np.stack(each), self.run.samples_spread(method)
        for column, values in (("contribution", own.mean(0)), ("contribution_spread", own.std(0, ddof=1))):
            wrong = ~(np.abs(stored[column].to_numpy() - values) <= MEAN_TOLERANCE * np.abs(own).max(0))
            if wrong.any():
                self.problems.append(
                    f"{layout.table('samples_spread', method)}: {int(wrong.sum())} values of {column} are not those of "
                    f"its members, first at train_index {int(stored['train_index'][int(wrong.argmax())].as_py())}"
                )

    def stream(self, name: str, store: RowStore, absolute: np.ndarray | None = None) -> np.ndarray:
        """Read all rows, report those that are not finite, return their sum in float64, (D,).

        Args:
            name: Of the store.
            store: It.
            absolute: Where the absolute values are added up, too; None: nowhere.
        """
        total = np.zeros(store.columns)
        itemsize = np.dtype(store.dtype).itemsize
        step = law.block_rows(store.chunk_rows, store.columns, itemsize)
        for start in range(0, store.rows, step):
            block = store.read(start, min(start + step, store.rows))
            bad = ~np.isfinite(block).all(1)
            if bad.any():
                rows = f"{int(bad.sum())} rows are not finite, first row {start + int(bad.argmax())}"
                self.problems.append(f"{name}: {rows}")
            total += block.sum(0, dtype=np.float64)
            if absolute is not None:
                absolute += np.abs(block).sum(0, dtype=np.float64)
            self.advance(block.nbytes, name)
        self.rows[name] = store.rows
        return total

    def shape(self, name: str, store: RowStore, rows: int | None, columns: int | None) -> None:
        """Hold rows and columns of a store against what ``run.json`` says, where it does."""
        self.count(name, store.rows, rows)
        if columns is not None and store.columns != columns:
            self.problems.append(f"{name}: {store.columns} columns, run.json says {columns}")

    def count(self, name: str, found: int, expected: int | None) -> None:
        """Hold a number of rows against what ``run.json`` says."""
        if expected is not None and found != expected:
            self.problems.append(f"{name}: {found:,} rows, run.json says {expected:,}")

    def index(self, name: str, index: np.ndarray, bound: int | None) -> None:
        """Report positions that do not increase or lie outside the dataset."""
        if (np.diff(index.astype(np.int64)) <= 0).any():
            self.problems.append(f"{name}: not strictly increasing")
        if len(index) and (index.min() < 0 or (bound is not None and index.max() >= bound)):
            self.problems.append(f"{name}: outside 0..{'?' if bound is None else bound - 1}")

    def finite(self, name: str, values: np.ndarray) -> None:
        """Report values that are no numbers."""
        bad = int((~np.isfinite(values)).sum())
        if bad:
            self.problems.append(f"{name}: {bad:,} values are not finite")

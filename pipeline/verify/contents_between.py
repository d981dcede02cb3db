"""Check what lies between the stages and what judges a run: stores that reduce reads, and tables beside the results."""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...storage import layout
from ...storage.curvature import read_curvature
from ...storage.errors import HydraError
from ...storage.rows import RowStore
from ...storage.rundir import Manifest
from ...storage.schemas import DETECTION
from ...storage.tables import read_table
from ..reading.detections import detection_names, labels_digest, read_detection
from ..reading.panels import targets
from ..reading.unit_values import UnitValues, values_of
from ..vocabulary import RETRAIN, SAMPLES
from .contents import MEAN_TOLERANCE, Contents

Integers = npt.NDArray[np.int64]


def by_test(check: Contents, method: str) -> None:
    """Check contributions by target: shape, which targets, finite values, and that C(i) is their mean."""
    name = layout.by_test(method)
    store = RowStore.open(check.run.directory.path(name), "contribution", check.run.directory.vouched)
    count = check.info.target_count(method)
    check.shape(name, store, count, check.info.n_tracked)
    mean = check.stream(name, store) / max(store.rows, 1)
    if method not in check.run.methods() or store.rows != count:
        return
    own = targets(check.run, method)
    for column, values in own.columns().items():
        if column in store.column_names() and not np.array_equal(store.column(column), values):
            check.problems.append(f"{name}/{column}: not the targets of the run")
    samples = check.run.samples(method)
    stored = samples["contribution"].to_numpy()
    if check.info.kind_of(method) == SAMPLES and len(stored) == len(mean):
        scale = np.maximum(np.abs(stored), samples["contribution_std"].to_numpy())
        wrong = np.abs(mean - stored) > MEAN_TOLERANCE * np.maximum(scale, np.finfo(np.float32).tiny)
        if wrong.any():
            check.problems.append(
                f"{name}: {int(wrong.sum())} means are not those of {layout.table('samples', method)}, "
                f"first at column {int(wrong.argmax())}"
            )


def prepared(check: Contents, method: str) -> None:
    """Check what an estimator prepared: one finite number a tracked sample."""
    name = layout.prepared(method)
    store = RowStore.open(check.run.directory.path(name), "value", check.run.directory.vouched)
    check.shape(name, store, check.info.n_tracked, 1)
    check.index(f"{name}/train_index", store.column("train_index"), check.info.n_train)
    check.stream(name, store)


def training_outputs(check: Contents) -> None:
    """Check what the trained model makes of the tracked samples: which they are, finite numbers, classes in range."""
    name = layout.TRAINING_OUTPUTS
    store = RowStore.open(check.run.directory.path(name), "feature", check.run.directory.vouched)
    layer = store.attrs["layer"]
    check.shape(name, store, check.info.n_tracked, None)
    if store.columns != layer["features"]:
        check.problems.append(f"{name}: {store.columns} features, its own notes say {layer['features']}")
    _tracked_rows(check, name, store)
    check.stream(name, store)
    output, prediction = store.column("output"), store.column("prediction")
    check.finite(f"{name}/output", output)
    check.finite(f"{name}/loss", store.column("loss"))
    if output.shape[1:] != (layer["outputs"],):
        check.problems.append(
            f"{name}/output: shape {output.shape}, its own notes say {layer['outputs']} a row"
        )
    if (prediction < -1).any():
        check.problems.append(f"{name}/prediction: {int((prediction < -1).sum()):,} values are no class")


def training_gradients(check: Contents, part: str) -> None:
    """Check what a pass over the tracked samples' own gradients found: which samples, finite numbers, no negative norm."""
    name = layout.training_gradients(part)
    store = RowStore.open(check.run.directory.path(name), "value", check.run.directory.vouched)
    check.shape(name, store, check.info.n_tracked, None)
    _tracked_rows(check, name, store)
    check.stream(name, store)
    for column in store.column_names():
        if column in ("absolute", "norm"):
            values = store.column(column)
            check.finite(f"{name}/{column}", values)
            if (values < 0).any():
                check.problems.append(f"{name}/{column}: {int((values < 0).sum()):,} values are below 0")


def _tracked_rows(check: Contents, name: str, store: RowStore) -> None:
    """Hold the samples of a store against those of the run's methods, which are the tracked ones."""
    index = store.column("train_index")
    check.index(f"{name}/train_index", index, check.info.n_train)
    for method in check.run.methods()[:1]:
        if not np.array_equal(index, check.run.samples(method)["train_index"].to_numpy()):
            check.problems.append(f"{name}/train_index: not the tracked samples of the run")


def curvature(check: Contents, method: str) -> None:
    """Check a form's eigenbasis: one finite eigenvalue a checkpoint and coordinate, finite vectors."""
    name = layout.curvature(method)
    found = read_curvature(check.run.directory.path(name), check.run.directory.vouched)
    expected = (len(found.steps), check.info.dimension or found.eigenvalues.shape[-1])
    if found.eigenvalues.shape != expected:
        check.problems.append(f"{name}/eigenvalues: shape {found.eigenvalues.shape}, not {expected}")
    check.finite(f"{name}/eigenvalues", found.eigenvalues)
    for k, block in enumerate(found.blocks):
        for matrix in (block.left, block.right):
            if matrix is not None:
                check.finite(f"{name}/block{k:04d}", matrix)
    if found.core is not None:
        check.finite(f"{name}/core_vectors", found.core.vectors)
    check.rows[name] = len(found.steps)


def corrections(check: Contents, method: str) -> None:
    """Check a correction: R directions, the targets' coordinates along them, the contributions to them."""
    where, open_at = partial(layout.corrections, method), check.run.directory.path
    directions = RowStore.open(open_at(where(layout.DIRECTIONS)), "direction", check.run.directory.vouched)
    coordinates = RowStore.open(open_at(where(layout.COORDINATES)), "coordinate", check.run.directory.vouched)
    corrected = RowStore.open(open_at(where(layout.CORRECTED)), "contribution", check.run.directory.vouched)
    rank = directions.rows
    for name, store, rows, columns in (
        (layout.DIRECTIONS, directions, rank, check.columns),
        (layout.COORDINATES, coordinates, check.info.target_count(method), rank),
        (layout.CORRECTED, corrected, rank, check.info.n_tracked),
    ):
        check.shape(where(name), store, rows, columns)
        check.stream(where(name), store)


def judging(check: Contents, stage: str, damaged: Collection[str]) -> None:
    """Check the tables that an evaluation's or a comparison's stage committed and that are not damaged."""
    _Judging(check, damaged).judge(stage)


class _Judging:
    def __init__(self, check: Contents, damaged: Collection[str]) -> None:
        self.check, self.damaged = check, damaged
        methods = check.run.methods()
        self.tracked = None if not methods else _column(check.run.samples(methods[0]), "train_index")
        self.tested: Integers | None = None
        with contextlib.suppress(HydraError):  # not there, or damaged: said elsewhere
            self.tested = check.run.test_gradients().column("test_index").astype(np.int64)
        self.retrained = set(check.run.directory.units(RETRAIN))

    def judge(self, stage: str) -> None:
        for manifest in self.check.run.directory.manifests(stage):
            for entry in manifest.files:
                place = layout.locate(entry.path)
                if place is None or entry.path in self.damaged or entry.path in layout.SUMMARIES:
                    continue
                directory = self.check.run.directory
                table = read_table(directory.path(entry.path), source=directory.vouched)
                self.check.advance(table.nbytes, stage)
                self._finite(entry.path, table)
                if place.kind.folder == layout.BY_EPOCH:
                    self._by_epoch(entry.path, table, manifest)
                else:
                    self._evaluation(entry.path, table)

    def _finite(self, path: str, table: pa.Table) -> None:
        for name in ("loss", "weight", "final_loss", "mean_loss", "contribution", "error"):
            if name in table.column_names:
                self.check.finite(f"{path}: {name}", table[name].to_numpy())

    def _evaluation(self, path: str, table: pa.Table) -> None:
        if path == layout.evaluation(layout.TRIALS):
            lost = set(table["unit"].to_pylist()) - self.retrained
            if lost:
                self._wrong(path, f"unit {min(lost)} is no retraining of this run")
        elif path.startswith(f"{layout.EVALUATION}/{layout.LOSSES}/"):
            self._same(path, table, "test_index", self.tested)
        elif path.startswith(f"{layout.EVALUATION}/{layout.TRAINING_LOSS}/"):
            self._same(path, table, "train_index", self.tracked)
        elif path.startswith(f"{layout.EVALUATION}/{layout.WEIGHTS}/"):
            index = _column(table, "train_index")
            if self.tracked is not None and not np.isin(index, self.tracked).all():
                self._wrong(path, "train_index names samples that are not tracked")

    def _by_epoch(self, path: str, table: pa.Table, manifest: Manifest) -> None:
        tracked = self.tracked
        unit = values_of(UnitValues, manifest)
        if tracked is not None and unit.start is not None and unit.rows is not None:
            tracked = tracked[unit.start : unit.start + unit.rows]
        keys = [name for name in ("epoch", "method", "reference") if name in table.column_names]
        for key in table.select(keys).group_by(keys).aggregate([]).to_pylist():
            mine = np.ones(len(table), dtype=bool)
            for name, value in key.items():
                mine &= table[name].to_numpy(zero_copy_only=False) == value
            rows = table.filter(pa.array(mine))
            if "test_index" not in table.column_names:
                self._same(path, rows, "train_index", tracked)
            elif tracked is not None and self.tested is not None:
                self._same(path, rows, "train_index", np.tile(tracked, len(self.tested)))
                self._same(path, rows, "test_index", np.repeat(self.tested, len(tracked)))

    def _same(self, path: str, table: pa.Table, name: str, expected: Integers | None) -> None:
        if expected is not None and not np.array_equal(_column(table, name), expected):
            found = f"{len(table):,} rows, expected {len(expected):,}"
            other = "other samples than the run's" if len(table) == len(expected) else found
            self._wrong(path, f"{name} holds {other}")

    def _wrong(self, path: str, text: str) -> None:
        self.check.problems.append(f"{path}: {text}")


def _column(table: pa.Table, name: str) -> Integers:
    values: Integers = table[name].to_numpy().astype(np.int64)
    return values


def detections(check: Contents, damaged: Collection[str]) -> None:
    """Check each detection: a row a tracked sample, ranks 1 to n, scores in 0 .. 1, and the labels it was made for."""
    complete = check.run.methods()
    labels = None
    if complete:
        samples = check.run.samples(complete[0])
        labels = dict(zip(samples["train_index"].to_pylist(), samples["label"].to_pylist(), strict=True))
    for name in detection_names(check.run):
        path = layout.detection(name)
        if path in damaged:
            continue
        found = read_detection(check.run, name)
        table, values = found.table, found.values
        where = f"{path}: "
        missing = [column for column in DETECTION.names if column not in table.column_names]
        if missing:
            check.problems.append(f"{where}no column {missing[0]}")
            continue
        check.rows[path] = len(table)
        check.count(path, len(table), check.info.n_tracked)
        rank, score = table["rank"].to_numpy(), table["score"].to_numpy()
        if not np.array_equal(rank, np.arange(1, len(rank) + 1)):
            check.problems.append(f"{where}ranks are not 1 to {len(rank):,} in order")
        if not ((score >= 0) & (score <= 1)).all():
            check.problems.append(
                f"{where}{int((~((score >= 0) & (score <= 1))).sum()):,} scores are not in 0 to 1"
            )
        if int(np.count_nonzero(table["is_label_issue"].to_numpy())) != values.flagged:
            check.problems.append(f"{where}not {values.flagged:,} samples are flagged, as its manifest says")
        by_index = table.sort_by("train_index")
        index, given = by_index["train_index"].to_numpy(), by_index["given_label"].to_numpy()
        check.index(f"{where}train_index", index, check.info.n_train)
        if values.labels_sha256 is not None and labels_digest(given) != values.labels_sha256:
            check.problems.append(f"{where}given labels are not those whose digest its manifest holds")
        if labels is not None and [labels.get(i) for i in index.tolist()] != given.tolist():
            check.problems.append(f"{where}given labels are not those of the run")

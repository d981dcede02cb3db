"""verify --deep: numbers of a run made again, slowly and another way, and held against what is stored.

The way is ``workers.reference.dense``; what is compared with what, and how, is here. Letters: n sampled
training samples, Q sampled test samples, N training samples.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.dataset as pa_dataset

from ...storage import layout
from ...storage.curvature import read_curvature
from ...storage.errors import IncompleteStage, InputError, SpecError
from ...storage.rows import RowStore
from ...workers.determinism import derived_seed, restored_process
from ...workers.recipe import Recipe
from ...workers.reference import tolerances
from ...workers.reference.dense import DenseReference, DenseTangents, dense_test_gradients
from ...workers.reference.tolerances import Form
from ...workers.replay.make import make_replay
from ...workers.training.training import Training
from ..executors.base import Report
from ..executors.events import Note, Observer, StageFinished, StageStarted, UnitFinished, UnitProgress, null
from ..plan.provenance import look_and_check
from ..plan.stored_spec import REPEATED, stored_spec
from ..plan.survey import compute_of, resolve_recipe
from ..reading.kept_rows import row_map_of
from ..reading.panels import tested
from ..reading.reader import Reader
from ..reading.unit_values import UnitValues, all_values
from ..spec.method_options import CurvatureOptions
from ..vocabulary import ADJOINT, EKFAC, EXACT, FORMS, GAUSS_NEWTON, MIXED, REPLAY, TEST_GRADIENTS
from .conservation import rounding_unit
from .deep_checks import DeepVerification, Findings, rows_of, spread

HESSIANS: dict[str, Form] = {form: hessian for hessian, form in FORMS.items()}
"""Methods whose tangents the reference computes, by the form of their Hessian."""

CORRECTED = f"{EKFAC}-rank"
"""How methods begin that correct EKFAC along directions of the test gradients."""

TARGETS = 4
"""Test samples whose contributions and gradients are made again."""

ADJOINTS = 2
"""Of these, how many are carried backwards where the exact form was computed forward."""

Floats = npt.NDArray[np.float64]


def verify_deep(
    run: Reader,
    recipe: Recipe | str | None = None,
    *,
    rows: int = 3,
    seed: int = 0,
    observer: Observer | None = None,
    **overrides: Any,
) -> DeepVerification:
    """Compute a few rows of every method again with the dense reference, and compare.

    Args:
        run: The run.
        recipe: What it was made from. Needed unless that is a built-in recipe: code that a stored
            run names is never imported unasked.
        rows: Training samples, drawn from different shards.
        seed: Of the drawing.
        observer: Hears of the progress.
        overrides: ``device``, ``threads`` or ``recipe_args``, where they are not the run's.

    Raises:
        SpecError: No rows are asked for.
        InputError: The recipe has to be named, or the run was trained under autocast.
        IncompleteStage: The run has no complete method.
        ReplayDiverged: Training does not give the recorded weights: another recipe, or machine.
    """
    if rows < 1:
        raise SpecError(f"rows {rows}: must be at least 1")
    with restored_process():
        return _Deep(run, recipe, rows, seed, observer or null, overrides).verify()


def _corrected(method: str) -> bool:
    """Whether this is EKFAC corrected along directions, for test samples and one seed."""
    return method.startswith(CORRECTED) and method.removeprefix(CORRECTED).isdigit()


class _Deep:
    def __init__(
        self,
        run: Reader,
        recipe: Recipe | str | None,
        rows: int,
        seed: int,
        observer: Observer,
        overrides: Mapping[str, Any],
    ) -> None:
        self.run, self.observer, self.begun = run, observer, time.monotonic()
        methods = run.methods()
        if not methods:
            raise IncompleteStage(f"{run.uri} has no complete method to verify; finish the run first")
        if kinds := run.trajectory().attrs.get("autocast"):
            raise InputError(
                f"{run.uri} was trained under autocast ({', '.join(kinds)}), whose rounding float64 does not follow, so that nothing can be "
                "held against the reference; verify without --deep checks files, contents and the conservation law"
            )
        spec = stored_spec(run, recipe, overrides, command="verify --deep", free=REPEATED)
        look_and_check(run.uri, run.noted, spec, observer)
        self.recipe, self.compute = resolve_recipe(spec), compute_of(spec)
        self.trajectory, self.n_train = run.trajectory(), run.noted.training_size
        self.row_map = row_map_of(run)
        self.covered = [name for name in methods if name in HESSIANS or _corrected(name)]
        self.notes = [
            f"{name}: not covered; the reference knows {', '.join(HESSIANS)}, corrected or not"
            for name in methods
            if name not in self.covered
        ]
        tracked = run.samples(methods[0])["train_index"].to_numpy().astype(np.int64)
        tests = tested(run, methods[0]).astype(np.int64)
        generator = np.random.default_rng(derived_seed(seed, "verify/rows"))
        self.rows = spread(self._spans(REPLAY, len(tracked)), rows, generator)
        self.columns = spread(self._spans(ADJOINT, len(tests)), TARGETS, generator)
        self.samples, self.tests = tracked[self.rows], tests[self.columns]
        self.found = Findings(spec.dtype, self.samples, self.tests)
        self.exact_limits: Mapping[str, float] = tolerances.FORM["exact"]

    def verify(self) -> DeepVerification:
        needed = [HESSIANS[name] for name in self.covered if name in HESSIANS]
        if any(name not in HESSIANS for name in self.covered):
            needed += ["ekfac", "exact"]
        forms = list(dict.fromkeys(needed))
        self._say_cost(forms)
        self._test_gradients()
        reference = self._reference(forms)
        self.found.numbers(
            "all",
            "batch losses of the record",
            self.trajectory.loss[None],
            reference.loss[None],
            tolerances.LOSS,
            lambda _row, step: f"step {step}",
        )
        if "exact" in forms:
            self._differences(reference)
        tangents = {form: reference.hypergradients(form) for form in forms}
        for name in self.covered:
            if name in HESSIANS:
                self._method(name, HESSIANS[name], tangents[HESSIANS[name]])
            else:
                self._corrected(name, tangents["ekfac"], tangents["exact"])
        return DeepVerification(
            run=self.run.uri,
            train_index=tuple(self.samples.tolist()),
            test_index=tuple(self.tests.tolist()),
            steps=len(self.trajectory.loss),
            products=reference.products,
            checks=tuple(self.found.checks),
            notes=tuple(self.notes),
            seconds=time.monotonic() - self.begun,
        )

    # ------------------------------------------------------------------ what is made again

    def _say_cost(self, forms: Sequence[Form]) -> None:
        steps, rows = len(self.trajectory.loss), len(self.rows)
        work = f"{steps:,} training steps again, and a forward and backward pass in float64 each"
        if any(form in tolerances.CARRIED for form in forms):
            work += f", with {rows} Hessian products each: {steps * rows:,} at most"
        self.observer(Note(message=f"verify --deep: {rows} training samples; {work}"))

    def _test_gradients(self) -> None:
        store = self.run.test_gradients()
        self.gradients = rows_of(store, self.columns)
        training, tests = Training(self.recipe, self.compute), self.tests.tolist()
        with self._stage("verify/test-gradients", len(self.columns)):
            right = dense_test_gradients(training, self.trajectory, tests)
            plain = dense_test_gradients(training, self.trajectory, tests, training.dtype)
        right, plain = self._kept(right), self._kept(plain)
        # Where a sample is predicted almost surely, its gradient is a small difference of numbers near 1:
        # what plain autograd loses there in the run's dtype is no fault of the run.
        lost = float(np.linalg.norm(plain - right, axis=1).max())
        floor = tolerances.ROUNDINGS * lost / tolerances.GRADIENT[self.found.dtype]
        check = "test gradients"
        self.found.rows(
            "all", check, self.gradients, right, tolerances.GRADIENT, self.found.test, floor=floor
        )

    def _reference(self, forms: Sequence[Form]) -> DenseTangents:
        curvature = None
        if "ekfac" in forms:
            curvature = read_curvature(
                self.run.directory.path(layout.curvature(EKFAC)), self.run.directory.vouched
            )
        training = Training(self.recipe, self.compute)
        with self._stage("verify/reference", training.steps) as report:
            reference = DenseReference(
                training, self.trajectory, self.samples, forms, curvature, share=self._share(MIXED)
            )
            return reference.run(report)

    def _share(self, method: str) -> float:
        """Return the share of the Hessian in the products of a method."""
        if method == GAUSS_NEWTON:
            return 0.0
        options = self.run.noted.entry(method).options if method in self.covered else None
        found = CurvatureOptions.from_json(options or {}, method=method).share
        return 1.0 if found is None else found

    # ------------------------------------------------------------------ what it is held against

    def _differences(self, reference: DenseTangents) -> None:
        """Say where double backward is not the derivative of the update; the exact form's limits are wider then."""
        if not reference.differences:
            self.found.limit(
                EXACT,
                "double backward and differences of the gradient",
                reference.deviation,
                tolerances.DIFFERENCES,
            )
            return
        self.exact_limits = dict.fromkeys(tolerances.FORM["exact"], tolerances.DIFFERENCES) | {
            "float32": 1e-3
        }
        self.notes.append(
            f"the update is not the gradient of its loss (double backward is off by {reference.deviation:.1e}): exact tangents "
            f"are held against differences of the gradient, to {tolerances.DIFFERENCES:.0e}"
        )

    def _limits(self, form: Form) -> Mapping[str, float]:
        return self.exact_limits if form == "exact" else tolerances.FORM[form]

    def _method(self, method: str, form: Form, tangents: Floats) -> None:
        """Hold what a method stored against the reference, and its tables against what it stored."""
        tangents = self._kept(tangents)
        limits, expected = self._limits(form), self._products(tangents)
        if self.run.noted.entry(method).mode == ADJOINT:
            store = RowStore.open(
                self.run.directory.path(layout.by_test(method)), "contribution", self.run.directory.vouched
            )
            products = rows_of(store, self.columns)[:, self.rows].T
            kept = "contributions (adjoint = forward)"
            self.found.numbers(method, kept, products, expected, limits, self.found.pair)
        else:
            store = self.run.hypergradient_store(method)
            stored, rounded = rows_of(store, self.rows), rounding_unit(self.run, store) or 0.0
            allowed = {dtype: max(limit, rounded) for dtype, limit in limits.items()}
            self.found.rows(method, "hypergradients", stored, tangents, allowed, self.found.sample)
            products = self._products(stored)
            if self.row_map is not None and self.row_map.folds:
                if form in tolerances.CARRIED:
                    self.notes.append(
                        f"{method}: not carried backwards, the run keeps projections of its targets"
                    )
            elif form in tolerances.CARRIED:
                found = self._carried_back(method)
                self.found.numbers(
                    method, "forward = adjoint", found, expected[:, : found.shape[1]], limits, self.found.pair
                )
        table = self._table(method)
        self.found.numbers(
            method, "contributions in Parquet", table, products, tolerances.STORED, self.found.pair
        )

    def _corrected(self, method: str, ekfac: Floats, exact: Floats) -> None:
        """Hold the correction along R directions V, and what it comes to, against the reference."""
        path, where = self.run.directory.path, partial(layout.corrections, method)
        directions = RowStore.open(path(where(layout.DIRECTIONS)), "direction", self.run.directory.vouched)
        along = directions.read(0, directions.rows).astype(np.float64)
        ekfac, exact = self._kept(ekfac), self._kept(exact)
        store = RowStore.open(path(where(layout.CORRECTED)), "contribution", self.run.directory.vouched)
        corrections = store.read(0, store.rows)[:, self.rows].T.astype(np.float64)
        right = -((exact - ekfac) @ along.T) / self.n_train
        scale = float(np.abs(exact @ along.T).max() / self.n_train)
        limits = self._limits("exact")
        self.found.numbers(method, "corrections", corrections, right, limits, self.found.direction, scale)
        whole = self._products(ekfac) + right @ (self.gradients @ along.T).T
        limits = {dtype: max(limit, tolerances.STORED[dtype]) for dtype, limit in limits.items()}
        self.found.numbers(
            method, "contributions in Parquet", self._table(method), whole, limits, self.found.pair
        )

    def _carried_back(self, method: str) -> Floats:
        """Return the contributions of the samples to a few targets by the adjoint engine, (n, k)."""
        training = Training(self.recipe, replace(self.compute, batch_norm="coupled"))
        targets = self.gradients[:ADJOINTS].astype(self.compute.dtype)
        if self.row_map is not None:
            targets = self.row_map.expand(targets)
        with self._stage("verify/adjoint", training.steps) as report:
            back = make_replay(
                method,
                ADJOINT,
                training,
                self.trajectory,
                self.samples,
                targets=targets,
                share=self._share(method),
            )
            found = back.run(report).contributions()
        return found.T.astype(np.float64)

    def _kept(self, rows: Floats) -> Floats:
        """Return what the run keeps of rows of D numbers."""
        return rows if self.row_map is None else self.row_map.apply(rows).astype(np.float64, copy=False)

    def _products(self, tangents: Floats) -> Floats:
        """Return C(i, j) from hypergradients, (n, Q)."""
        products: Floats = -(tangents @ self.gradients.T) / self.n_train
        return products

    def _table(self, method: str) -> Floats:
        """Return the sampled contributions from the Parquet files, (n, Q), NaN where there is none."""
        of_samples = pa_dataset.field("train_index").isin(self.samples.tolist())
        chosen = of_samples & pa_dataset.field("test_index").isin(self.tests.tolist())
        names = ["train_index", "test_index", "contribution"]
        table = self.run.contributions(method).to_table(columns=names, filter=chosen)
        train, test, values = (table[name].to_numpy() for name in names)
        found = np.full((len(self.samples), len(self.tests)), np.nan)
        found[np.searchsorted(self.samples, train), np.searchsorted(self.tests, test)] = values
        return found

    # ------------------------------------------------------------------ helpers

    def _spans(self, kind: str, total: int) -> list[tuple[int, int]]:
        """Return the shards of the rows (``replay``) or targets (``adjoint``): the finest cut there is."""
        stages = [f"{name}/{kind}" for name in self.run.methods()]
        found = [[(0, total)]]
        for stage in stages if kind == REPLAY else [*stages, TEST_GRADIENTS]:
            values = all_values(UnitValues, self.run.directory, stage)
            found.append(
                [(v.start, v.start + v.rows) for v in values if v.start is not None and v.rows is not None]
            )
        return max(found, key=len)

    @contextmanager
    def _stage(self, name: str, total: int) -> Iterator[Report]:
        """Tell the observer of a stage of this verification, and yield what reports its steps."""
        begun = time.monotonic()
        self.observer(StageStarted(stage=name, units=1, total=total, unit_label="step"))

        def report(done: int, of: int) -> None:
            self.observer(UnitProgress(stage=name, unit="all", done=done, total=of))

        yield report
        self.observer(UnitFinished(stage=name, unit="all", seconds=time.monotonic() - begun, values={}))
        self.observer(StageFinished(stage=name, seconds=time.monotonic() - begun))

"""Measures over training, off the tables that shards and influence units wrote.

For each epoch and each (reference, method): the error of the hypergradients (Figure 3 of the HyDRA
paper), sign errors (Figure 4) and Spearman's rank correlation (Figure 5), on C(i) and per test sample.
One epoch is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ...storage import layout
from ...storage.errors import CorruptStore
from ...storage.tables import read_table
from ...workers.replay.by_epoch import RAW, pairs
from ..reading.unit_values import UnitValues, values_of
from ..vocabulary import EKFAC, EXACT, FAST, by_epoch_stage
from .ranking import sign_errors, spearman

if TYPE_CHECKING:
    from ..reading.reader import Reader

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class FollowedForms:
    """What was followed.

    Attributes:
        stage: Last part of the name of the replays' stage.
        methods: As asked for.
        raw_decay: Whether raw-decay forms are there.
        epochs: Looked at, ascending.
        influence_from: First epoch of the influence functions, and of the averages.
        influence: Options by estimator.
        by_test: Whether influence knows single test samples.
    """

    stage: str
    methods: tuple[str, ...]
    raw_decay: bool
    epochs: tuple[int, ...]
    influence_from: int
    influence: Mapping[str, Mapping[str, Any]]
    by_test: bool


def measure(run: Reader, forms: FollowedForms, *, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Return the measures, JSON-able.

    Returns:
        ``run``, ``every_epoch`` (the epochs), ``influence_from``, ``influence`` (options), ``by_test``,
        ``n_tracked``, ``n_test``, ``seconds`` (work by stage), ``curves`` and ``late``.

        ``curves``: one mapping a (epoch, reference, method): ``error`` (mean l2 norm of the
        difference of the hypergradients), ``norm`` (mean norm of the method's), ``reference_norm``,
        ``relative_error`` (root of the summed squares over that of the reference), ``sign_error`` and
        ``spearman`` on C(i), ``sign_error_by_test`` and ``spearman_by_test`` (means over the test
        samples) and ``spearman_by_test_std``. None where there is no such number.

        ``late``: one mapping a (reference, method): mean (and ``_std`` over the epochs) of the same
        from epoch ``influence_from`` on.
    """
    curves: list[dict[str, Any]] = []
    n_tracked = n_test = 0
    names = _forms(forms)
    for epoch in forms.epochs:
        look = _Look(run, forms, epoch)
        n_tracked, n_test = look.shape
        there = [*names, *(name for name in forms.influence if epoch >= forms.influence_from)]
        curves += [look.row(reference, method) for reference, method in pairs(there)]
    return {
        "run": run.uri,
        "every_epoch": list(forms.epochs),
        "influence_from": forms.influence_from,
        "influence": {name: dict(options) for name, options in forms.influence.items()},
        "by_test": forms.by_test,
        "n_tracked": n_tracked,
        "n_test": n_test,
        "seconds": dict(seconds),
        "curves": curves,
        "late": list(_late(curves, forms.influence_from)),
    }


def _forms(forms: FollowedForms) -> list[str]:
    names: list[str] = [EXACT, *(name for name in (FAST, EKFAC) if name in forms.methods)]
    if forms.raw_decay:
        names += [EXACT + RAW, *([FAST + RAW] if FAST in forms.methods else [])]
    return names


class _Look:
    """The tables of one epoch."""

    def __init__(self, run: Reader, forms: FollowedForms, epoch: int) -> None:
        self.run, self.epoch, self.late = run, epoch, epoch >= forms.influence_from
        directory = run.directory
        shards = sorted(
            (values_of(UnitValues, m).start or 0, m.unit)
            for m in directory.manifests(by_epoch_stage(forms.stage))
        )
        at = f"epoch-{epoch:05d}"
        self._parts = [(forms.stage, f"{unit}-{at}") for _, unit in shards]
        self._own = {name: (name, at) for name in forms.influence}
        self._by_test = forms.by_test
        self._samples = self._read("samples", self._parts)
        self._errors = self._read("errors", self._parts)
        self._pairs = self._read("contributions", self._parts)
        base = self._chosen(self._samples, EXACT)
        tests = self._chosen(self._pairs, EXACT)["test_index"].to_numpy()
        self.tests = np.unique(tests)
        self.shape = (len(base), len(self.tests))

    def row(self, reference: str, method: str) -> dict[str, Any]:
        mean, base = self._mean(method), self._mean(reference)
        found: dict[str, Any] = {
            "epoch": self.epoch,
            "reference": reference,
            "method": method,
            "error": None,
            "norm": None,
            "reference_norm": float(self._norm(reference).mean()),
            "relative_error": None,
            "sign_error": float(sign_errors(mean, base)[0]),
            "spearman": float(spearman(mean, base)[0]),
            "sign_error_by_test": None,
            "spearman_by_test": None,
            "spearman_by_test_std": None,
        }
        if method not in self._own:
            error, size = self._error(reference, method), self._norm(reference)
            found["error"] = float(error.mean())
            found["norm"] = float(self._norm(method).mean())
            total = float((size**2).sum())
            found["relative_error"] = float(np.sqrt((error**2).sum() / total)) if total else None
        if method not in self._own or self._by_test:
            values, right = self._matrix(method), self._matrix(reference)
            ranks = spearman(values, right)
            found["sign_error_by_test"] = float(sign_errors(values, right).mean())
            found["spearman_by_test"] = float(ranks.mean())
            found["spearman_by_test_std"] = float(ranks.std())
        return found

    def _mean(self, method: str) -> Floats:
        table = self._samples if method not in self._own else self._read("samples", [self._own[method]])
        values: Floats = self._chosen(table, method)["contribution"].to_numpy()
        if len(values) != self.shape[0]:
            raise self._damaged(method)
        return values

    def _norm(self, method: str) -> Floats:
        values: Floats = self._chosen(self._samples, method)["norm"].to_numpy()
        return values

    def _error(self, reference: str, method: str) -> Floats:
        table = self._chosen(self._errors, method)
        values: Floats = table.filter(pc.equal(table["reference"], reference))["error"].to_numpy()
        return values

    def _matrix(self, method: str) -> Floats:
        """Return C(i, j), (n, M): shards one after the other, each sorted by (test, train)."""
        own = method in self._own
        table = self._pairs if not own else self._read("contributions", [self._own[method]])
        table = self._chosen(table, method)
        n, tests = self.shape
        if len(table) != n * tests:
            raise self._damaged(method)
        order = np.argsort(table["test_index"].to_numpy(), kind="stable")
        values: Floats = table["contribution"].to_numpy()[order].reshape(tests, n).T.astype(np.float64)
        return values

    def _read(self, table: str, parts: Sequence[tuple[str, str]]) -> pa.Table:
        directory = self.run.directory
        return pa.concat_tables(
            read_table(directory.path(layout.by_epoch(part, table, unit)), source=directory.vouched)
            for part, unit in parts
        )

    @staticmethod
    def _chosen(table: pa.Table, method: str) -> pa.Table:
        return table.filter(pc.equal(table["method"], method))

    def _damaged(self, method: str) -> CorruptStore:
        return CorruptStore(
            f"{self.run.uri}: rows of {method} after epoch {self.epoch} are missing; "
            f"see `hydra-pipe verify {self.run.uri}`"
        )


def _late(curves: Sequence[Mapping[str, Any]], begin: int) -> Iterator[dict[str, Any]]:
    """Average what came from epoch ``begin`` on."""
    late = [row for row in curves if row["epoch"] >= begin]
    for reference, method in dict.fromkeys((row["reference"], row["method"]) for row in late):
        rows = [row for row in late if (row["reference"], row["method"]) == (reference, method)]
        found: dict[str, Any] = {"reference": reference, "method": method, "epochs": len(rows)}
        for key in (
            *("error", "relative_error", "sign_error", "spearman"),
            *("sign_error_by_test", "spearman_by_test"),
        ):
            values = [row[key] for row in rows if row[key] is not None]
            found[key] = float(np.mean(values)) if values else None
            found[f"{key}_std"] = float(np.std(values)) if values else None
        yield found

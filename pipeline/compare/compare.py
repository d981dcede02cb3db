"""The estimators of a run side by side: how far each is from a reference, and what it cost.

The reference is ``hydra-exact`` where the run has it: the derivative itself. The measures are those
of Koh et al. (2019) that the HyDRA paper uses (sign errors and Spearman's rank correlation), the
relative error, and the overlap of the most helpful and most harmful samples. Methods whose targets
differ (test samples, classes, the mean) are compared over the coarsest of them, to which the others
are averaged. Letters: n tracked training samples, Q targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...storage.errors import InputError
from ..reading.panels import panel_width, panels, targets
from ..reading.unit_values import UnitValues, all_values
from ..spec.targets import coarsened
from ..vocabulary import CURVATURE, EKFAC, EXACT, RECORD, SAMPLES, TEST_GRADIENTS
from .ranking import overlap, ranks, sign_errors, spearman

if TYPE_CHECKING:
    from ..reading.reader import Reader

Floats = npt.NDArray[np.float64]

"""What is compared with unless another method is named."""


def compare(
    run: Reader,
    *,
    reference: str | None = None,
    methods: Sequence[str] | None = None,
    k: int = 10,
    panel: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Compare the methods of a run with a reference; all values JSON-able.

    Args:
        run: The run.
        reference: Method to compare with; None: ``hydra-exact``.
        methods: Which others; None: all that are complete and have the reference's targets.
        k: Samples in the overlaps.
        panel: Targets read at a time; None: as many as fit a fixed budget.
        progress: Called with (targets done, Q).

    Returns:
        ``run``, ``reference``, ``n_tracked``, ``n_test``, ``targets`` (their kind), ``n_targets``,
        ``k`` and ``methods``, a list of one mapping a method, the reference first (its own errors are
        0 and its correlations 1):

        * ``method``, ``seconds`` (of all workers on the method's own stages, None where unknown);
        * over C(i, j), ``sign_error``, ``spearman``, ``spearman_std``, ``relative_error_by_test``,
          ``overlap_helpful``, ``overlap_harmful``: means over the targets (``_std``: standard
          deviation), ``relative_error`` = ||C - C_ref|| / ||C_ref|| (Frobenius) and
          ``scale`` = ||C|| / ||C_ref||;
        * over C(i), the mean over the test samples, the same measures with ``mean_`` before them;
        * ``spearman_by_test``: one correlation a target, for histograms.

    Raises:
        InputError: The reference has to be named, a method is unknown, or two methods have not the
            same training samples.
        IncompleteStage: A named method is not complete.
    """
    if k < 1:
        raise InputError(f"k is {k}; it must be at least 1")
    reference, chosen = _choose(run, reference, methods)
    names = [reference, *chosen]
    means = {name: _means(run, name) for name in names}
    index = means[reference][0]
    for name in chosen:
        if not np.array_equal(means[name][0], index):
            raise InputError(
                f"{name} has {len(means[name][0]):,} training samples, {reference} {len(index):,}, not the "
                "same ones; compare methods with the same --track"
            )
    kind = run.noted.coarsest(names)
    own = targets(run, reference)
    total, n_test = len(coarsened(own, kind)[0]), int(own.count.sum())
    width = panel or panel_width(len(index) * 3)
    tallies = {name: _Tally(k) for name in names}
    readers = [panels(run, name, panel=width, kind=kind) for name in names]
    for blocks in zip(*readers, strict=True):
        base = blocks[0][1]
        base_ranks = ranks(base)
        for name, (_, block) in zip(names, blocks, strict=True):
            tallies[name].add(block, base, base_ranks)
        if progress is not None:
            progress(blocks[0][0].stop, total)
    base_mean = means[reference][1]
    rows = [
        {
            "method": name,
            "seconds": seconds(run, name),
            **tallies[name].result(),
            **_on_means(means[name][1], base_mean, k),
            "spearman_by_test": np.concatenate(tallies[name].spearman).tolist(),
        }
        for name in names
    ]
    return {
        "run": run.uri,
        "reference": reference,
        "n_tracked": len(index),
        "n_test": n_test,
        "targets": kind,
        "n_targets": total,
        "k": k,
        "methods": rows,
    }


class _Tally:
    """Adds up one method's measures over panels of targets."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.spearman: list[Floats] = []
        self._parts: dict[str, list[Floats]] = {}

    def add(self, block: Floats, base: Floats, base_ranks: Floats) -> None:
        """Take in (n, p) contributions of the method and of the reference."""
        from .ranking import pearson

        self.spearman.append(pearson(ranks(block), base_ranks))
        found = {
            "sign": sign_errors(block, base),
            "helpful": overlap(block, base, self.k),
            "harmful": overlap(block, base, self.k, lowest=True),
            "error": ((block - base) ** 2).sum(0),
            "size": (block**2).sum(0),
            "base": (base**2).sum(0),
        }
        for key, values in found.items():
            self._parts.setdefault(key, []).append(values)

    def result(self) -> dict[str, float]:
        """Return the measures over all targets seen."""
        part = {key: np.concatenate(values) for key, values in self._parts.items()}
        rank = np.concatenate(self.spearman)
        by_test = np.sqrt(_ratio(part["error"], part["base"]))
        return {
            "sign_error": float(part["sign"].mean()),
            "spearman": float(rank.mean()),
            "spearman_std": float(rank.std()),
            "relative_error": float(np.sqrt(_ratio(part["error"].sum(), part["base"].sum()))),
            "relative_error_by_test": float(by_test.mean()),
            "scale": float(np.sqrt(_ratio(part["size"].sum(), part["base"].sum()))),
            "overlap_helpful": float(part["helpful"].mean()),
            "overlap_harmful": float(part["harmful"].mean()),
        }


def _on_means(values: Floats, base: Floats, k: int) -> dict[str, float]:
    error, size = float(((values - base) ** 2).sum()), float((base**2).sum())
    return {
        "mean_sign_error": float(sign_errors(values, base)[0]),
        "mean_spearman": float(spearman(values, base)[0]),
        "mean_relative_error": float(np.sqrt(_ratio(np.float64(error), np.float64(size)))),
        "mean_overlap_helpful": float(overlap(values, base, k)[0]),
        "mean_overlap_harmful": float(overlap(values, base, k, lowest=True)[0]),
    }


def _ratio(above: Any, below: Any) -> Any:
    """Divide; 0 / 0 is 0, since nothing was asked for and nothing was missed."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((above == 0) & (below == 0), 0.0, np.divide(above, below))


def _choose(run: Reader, reference: str | None, methods: Sequence[str] | None) -> tuple[str, list[str]]:
    complete = run.methods()
    if reference is None:
        # With nothing but coarser targets, their exact form is the reference.
        exact = [name for name in complete if name == EXACT or name.startswith(f"{EXACT}-")]
        if not exact or (exact[0] != EXACT and run.noted.kind_of(complete[0]) == SAMPLES):
            raise InputError(
                f"{run.uri} has no method {EXACT} to compare with, only {', '.join(complete) or 'none'}; "
                "name one with --reference, or add it: hydra-pipe run ... --hessian exact on the same --out"
            )
        reference = exact[0]
    reference = run.method(reference)
    kind = run.noted.kind_of(reference)
    alike = [name for name in complete if run.noted.kind_of(name) == kind]
    chosen = [run.method(name) for name in (alike if methods is None else methods)]
    chosen = [name for name in dict.fromkeys(chosen) if name != reference]
    if not chosen:
        others = (
            "" if len(alike) == len(complete) else f", or name others with --methods ({kind} become coarser)"
        )
        raise InputError(
            f"{run.uri} has {', '.join(complete)} and no other method of targets {kind!r} to compare with "
            f"{reference}; add one: hydra-pipe run ... --hessian none|ekfac|exact|gauss-newton|mixed on the same --out{others}"
        )
    return reference, chosen


def _means(run: Reader, method: str) -> tuple[npt.NDArray[np.int64], Floats]:
    table = run.samples(method)
    return table["train_index"].to_numpy().astype(np.int64), table["contribution"].to_numpy()


def seconds(run: Reader, method: str) -> float | None:
    """Return the seconds that workers spent on the stages of ``method`` alone, None where unknown.

    The record and the test gradients, which all methods of a run share, are not among them. The
    curvature that other targets of EKFAC share with it is. An average over seeds needs more records, and
    all work of its members is its own.
    """
    seeds = run.averages(method)
    if seeds:
        members, source = run.members(), str(run.noted.entry(method).source)
        total = _spent(run, (method, *_owners(run, source))) or 0.0
        for seed in seeds[1:]:
            if seed in members:
                shared = (RECORD, TEST_GRADIENTS, *_owners(run, source))
                total += _spent(members[seed], shared) or 0.0
        return total
    return _spent(run, _owners(run, method))


def _owners(run: Reader, method: str) -> tuple[str, ...]:
    """Return whose stages a method needs: its own, and EKFAC's curvature where it borrows that."""
    borrows = method.startswith(f"{EKFAC}-") and run.noted.kind_of(method) != SAMPLES
    return (method, f"{EKFAC}/{CURVATURE}") if borrows else (method,)


def _spent(run: Reader, owners: Sequence[str]) -> float | None:
    """Return the seconds of the given stages, or of all stages of the given methods; None where unknown."""
    spent = [
        unit.seconds
        for stage in run.directory.stages()
        if stage.split("/")[0] in owners or stage in owners
        for unit in all_values(UnitValues, run.directory, stage)
        if unit.seconds is not None
    ]
    return sum(spent) if spent else None


def scatter(run: Reader, reference: str, methods: Sequence[str]) -> dict[str, tuple[Floats, Floats]]:
    """Return (reference's C(i), method's C(i)) by method, for a picture."""
    base = _means(run, reference)[1]
    return {name: (base, _means(run, name)[1]) for name in methods}

"""Detectors that read contributions C(i, j), streamed a panel of test samples at a time.

All of them share one pass; what it keeps grows with samples times classes. Letters: n judged samples, Q targets
that may be looked at, p of them in a panel, C classes of the test samples.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ...storage.errors import InputError
from ..executors.events import StageFinished, StageStarted, UnitFinished, UnitProgress
from ..reading.panels import panels, targets
from ..spec.targets import TargetSet
from ..vocabulary import CLASSES, DETECT, MEAN, SAMPLES
from .case import Case, Floats, Integers, Scores

_PASS = "contributions"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Streamed:
    """What one pass over the contributions leaves.

    Attributes:
        mean: (n,) mean over the test samples looked at: C(i).
        harm: (n,) mean of max(0, -C(i, j)) over them.
        classes: (C,) labels of the test samples looked at, ascending; those without a label are of none.
        by_class: (n, C) mean over the test samples of a class.
    """

    mean: Floats
    harm: Floats
    classes: Integers
    by_class: Floats


def contribution(case: Case) -> Scores:
    """Return -C(i): what leaving the sample out would take off the mean loss."""
    if case.selecting is None:
        mean = case.run.samples(method_of(case))["contribution"].to_numpy().astype(np.float64)
    else:
        mean = streamed(case).mean
    return Scores(
        suspicion=-mean,
        suggested=np.full(case.n, -1, dtype=np.int64),
        reason=[f"C(i) = {c:.3g}: {'harmful' if c < 0 else 'helpful'}" for c in mean.tolist()],
        notes={"targets": own_targets(case).kind},
    )


def harm(case: Case) -> Scores:
    """Return the mean over j of max(0, -C(i, j)): the harm done, whatever good is done elsewhere.

    Raises:
        InputError: The method has no contributions to single test samples.
    """
    own = own_targets(case)
    if own.kind != SAMPLES:
        raise InputError(
            f"harm looks at single test samples, and {method_of(case)} of {case.run.uri} has targets {own.kind!r}; "
            "name a method with targets 'samples', or another detector"
        )
    found = streamed(case).harm
    return Scores(
        suspicion=found,
        suggested=np.full(case.n, -1, dtype=np.int64),
        reason=[f"harms a test sample by {h:.3g}" for h in found.tolist()],
        notes={"targets": own.kind},
    )


def harmed_class(case: Case) -> Scores:
    """Return -min over c of the mean C(i, j) over the test samples of class c, and suggest that class.

    A wrong label pulls the model away from the class that the sample shows, so the class that it harms most is
    what it may really be. Nothing is suggested where no class is harmed, or its own is harmed most.

    Raises:
        InputError: The method has the mean for its only target, or the test samples have no labels.
    """
    found = streamed(case, by_class=True)
    worst = found.by_class.argmin(1)
    value = found.by_class[np.arange(case.n), worst]
    label = found.classes[worst]
    suggested = np.where((value < 0) & (label != case.given) & (case.given >= 0), label, -1)
    return Scores(
        suspicion=-value,
        suggested=suggested,
        reason=[
            f"harms class {c} most: {v:.3g}" if v < 0 else f"harms no class; least helps {c}"
            for c, v in zip(label.tolist(), value.tolist(), strict=True)
        ],
        notes={"targets": own_targets(case).kind, "classes": len(found.classes)},
    )


def method_of(case: Case) -> str:
    """Return the method whose contributions are looked at.

    Raises:
        InputError: The run has none complete.
    """
    if case.method is None:
        raise InputError(
            f"{case.run.uri} has no contributions yet, and this detector reads them; finish the run with "
            f"`hydra-pipe run --out {case.run.uri}`, or name another detector"
        )
    return case.method


def own_targets(case: Case) -> TargetSet:
    """Return the targets of the case's method."""
    return targets(case.run, method_of(case))


def streamed(case: Case, *, by_class: bool = False) -> Streamed:
    """Return what the pass over the contributions leaves; it is done once for all detectors of a case.

    Args:
        case: The case.
        by_class: Whether classes are asked for.

    Raises:
        InputError: Classes are asked for and there are none.
    """
    own = own_targets(case)
    looked = own.label if case.selecting is None else own.label[case.selecting]
    classes = np.unique(looked[looked >= 0])
    if by_class and not len(classes):
        why = (
            f"targets {MEAN!r}, the mean over all test samples"
            if own.kind == MEAN
            else "test samples without labels"
        )
        raise InputError(
            f"{method_of(case)} of {case.run.uri} has {why}, so nothing is known by class; "
            f"name a method with targets {SAMPLES!r} or {CLASSES!r}, or a detector that needs no classes"
        )
    if by_class and len(classes) == 1:
        raise InputError(
            f"the test samples of {case.run.uri} are all of class {classes[0]}, so there is no class to tell "
            "from others; name the detector 'contribution'"
        )
    found = case.shared.get(_PASS)
    if not isinstance(found, Streamed):
        found = case.shared[_PASS] = _stream(case, own, classes)
    return found


def selected_panels(case: Case) -> Iterator[tuple[Integers, Floats]]:
    """Yield (positions among the targets, block (n, p)) of the targets that may be looked at, in order."""
    observer, begun, total = case.passes.observer, time.monotonic(), len(own_targets(case))
    observer(StageStarted(stage=DETECT, units=1, total=total, unit_label="target"))
    for span, block in panels(case.run, method_of(case)):
        observer(UnitProgress(stage=DETECT, unit=method_of(case), done=span.start, total=total))
        at = np.arange(span.start, span.stop)
        if case.selecting is not None:
            keep = np.isin(at, case.selecting)
            if not keep.any():
                continue
            if not keep.all():
                at, block = at[keep], block[:, keep]
        yield at, block
    seconds = time.monotonic() - begun
    observer(UnitFinished(stage=DETECT, unit=method_of(case), seconds=seconds, values={}))
    observer(StageFinished(stage=DETECT, seconds=seconds))


def _stream(case: Case, own: TargetSet, classes: Integers) -> Streamed:
    looked = np.arange(len(own)) if case.selecting is None else case.selecting
    weight = own.count / own.count[looked].sum()
    column = np.searchsorted(classes, own.label)
    mean, harmed = np.zeros(case.n), np.zeros(case.n)
    by_class = np.zeros((case.n, len(classes)), order="F")  # columns are added to
    for at, block in selected_panels(case):
        mean += block @ weight[at]
        for k, label in enumerate(own.label[at].tolist()):
            if label >= 0:
                by_class[:, column[at[k]]] += own.count[at[k]] * block[:, k]
        np.minimum(block, 0, out=block)
        harmed -= block @ weight[at]
    of_class = looked[own.label[looked] >= 0]
    by_class /= np.bincount(column[of_class], weights=own.count[of_class], minlength=len(classes))
    return Streamed(mean=mean, harm=harmed, classes=classes, by_class=by_class)

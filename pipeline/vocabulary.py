"""The words of a run: its stages and their units, modes, forms of the Hessian and kinds of targets.

Stages of a method are named ``<method>/<stage>``. Nothing here is heavy to import.
"""

from __future__ import annotations

from typing import Literal

from ..storage import layout
from ..workers.recursion import forms

# ---------------------------------------------------------------------- stages

RECORD = "record"
TEST_GRADIENTS = "test-gradients"
REPLAY = "replay"
REDUCE = "reduce"
STAGES = (RECORD, TEST_GRADIENTS, REPLAY, REDUCE)
"""What a run can be asked to do, in order; in adjoint mode `REPLAY` is done by `ADJOINT`."""

ADJOINT = forms.ADJOINT
"""Last part of the stage that carries targets backwards, and the ``mode`` of a method made that way."""
CURVATURE = "curvature"
DIRECTIONS = "directions"
CORRECTION = "correction"
PREFLIGHT = "preflight"
PREPARE = "prepare"
ATTRIBUTE = "attribute"
"""Last part of the stage of an estimator beside HyDRA, and ``mode`` of its method in ``run.json``."""

EVALUATE = "evaluate"
RETRAIN = f"{EVALUATE}/retrain"
EVALUATE_SCORES = f"{EVALUATE}/scores"
BY_EPOCH = "over-training"
"""Beginning of the stages of a comparison over training; see `by_epoch_stage`."""
BY_EPOCH_SCORES = f"{BY_EPOCH}/scores"
TRAINING_OUTPUTS = "training-outputs"
"""The trained model's outputs on the tracked samples, for detectors that look at them."""
TRAINING_GRADIENTS = "training-gradients"
"""Beginning of the stages that look at the gradient of each tracked sample's own loss; see `own_gradients_stage`."""
DETECT = "detect"
"""Stage of detections; a unit is one detection, by its name."""
CLEAN = "clean"
"""Stage of decisions; a unit is one decision, by its name."""
CLEAN_RETRAIN = f"{CLEAN}/retrain"
"""Retrainings that say whether a decision helped; decisions share them."""
CLEAN_OUTCOME = f"{CLEAN}/outcome"
"""What they say of a decision; a unit is one decision, by its name."""
DECIDING = (DETECT, CLEAN, CLEAN_OUTCOME)
"""Stages whose units are whole one by one: each was asked for by itself."""
SINGLE = (f"/{CURVATURE}", f"/{DIRECTIONS}", f"/{PREFLIGHT}", EVALUATE_SCORES, BY_EPOCH_SCORES)
"""Ends of the names of stages of one unit."""

# ---------------------------------------------------------------------- units

TRAJECTORY = "trajectory"
"""Unit of the record."""
SUMMARY = "summary"
"""Unit of an evaluation's and of a comparison's scores."""
INDEX = "index"
"""Unit that commits a store's metadata and per-row columns."""
INTERCLASS = "interclass"
"""Unit that commits a method's last table."""
CLOSING_UNITS = (INDEX, INTERCLASS)
"""Units that the driver commits itself.

``run.json`` counts the one that a stage has among its units; people are shown the others.
"""

# ---------------------------------------------------------------------- states

State = Literal["complete", "partial", "missing", "asked"]
COMPLETE: State = "complete"
PARTIAL: State = "partial"
MISSING: State = "missing"
ASKED: State = "asked"
"""Of a method in ``run.json`` for which nothing has been done but the record."""

# ---------------------------------------------------------------------- modes, forms, targets

Mode = forms.Mode
FORWARD = forms.FORWARD
SEEDS = "seeds"
"""``mode`` of an average over seeds in ``run.json``; its only stage is ``reduce``."""

Hessian = Literal["none", "ekfac", "exact", "gauss-newton", "mixed"]
Form = forms.Form
Targets = Literal["samples", "classes", "mean"]
Way = Literal["weighted", "rescaled", "subset"]
"""How the rest is trained when samples are removed; see ``workers.training.retrain``."""

FAST, EKFAC, EXACT = forms.FAST, forms.EKFAC, forms.EXACT
GAUSS_NEWTON, MIXED, CARRIED = forms.GAUSS_NEWTON, forms.MIXED, forms.CARRIED
FORMS: dict[Hessian, Form] = {
    "none": FAST,
    "ekfac": EKFAC,
    "exact": EXACT,
    "gauss-newton": GAUSS_NEWTON,
    "mixed": MIXED,
}

SAMPLES: Targets = "samples"
CLASSES: Targets = "classes"
MEAN: Targets = "mean"
KINDS: tuple[Targets, ...] = (SAMPLES, CLASSES, MEAN)
"""Kinds of targets, from fine to coarse."""


def stage_of(targets: str) -> str:
    """Return the stage that makes the gradients of targets from the test gradients."""
    return f"target-gradients-{targets}"


TARGET_GRADIENTS = tuple(stage_of(kind) for kind in KINDS if kind != SAMPLES)


def by_epoch_stage(part: str) -> str:
    """Return a stage of a comparison over training: its replays, or an estimator after an epoch."""
    return f"{BY_EPOCH}/{part}"


def own_gradients_stage(part: str) -> str:
    """Return a stage that looks at the gradients of the tracked samples' own losses."""
    return f"{TRAINING_GRADIENTS}/{part}"


def self_influence_part(method: str) -> str:
    """Return the part of such a stage that multiplies a method's hypergradients with those gradients."""
    return f"self-influence-{method}"


def judges(stage: str) -> bool:
    """Whether a stage judges a run or decides upon it: no part of the run, and never missing from it."""
    return stage.split("/")[0] in (EVALUATE, BY_EPOCH, TRAINING_OUTPUTS, TRAINING_GRADIENTS, DETECT, CLEAN)


_WRITTEN_BY = {
    layout.TRAJECTORY: (RECORD,),
    layout.TEST_GRADIENTS: (TEST_GRADIENTS,),
    layout.TRAINING_OUTPUTS: (TRAINING_OUTPUTS,),
    layout.HYPERGRADIENTS: (REPLAY,),
    layout.BY_TEST: (ADJOINT, ATTRIBUTE),
    layout.PREPARED: (PREPARE,),
    layout.CURVATURE: (CURVATURE,),
    layout.CORRECTIONS: (DIRECTIONS, CORRECTION),
    **dict.fromkeys(layout.TABLES, (REDUCE,)),
}


def stages_of(place: layout.Place) -> tuple[str, ...]:
    """Return the stages that may have written a file; none where no stage writes such a file."""
    kind, key = place.kind, place.key
    if kind.by == "":
        return _WRITTEN_BY[kind.folder]
    if kind.folder == layout.EVALUATION:
        return (EVALUATE_SCORES,) if key is None else (RETRAIN,)
    if kind.folder == layout.BY_EPOCH:
        return (BY_EPOCH_SCORES,) if key is None else (by_epoch_stage(key),)
    if kind.folder == layout.TRAINING_GRADIENTS:
        return () if key is None else (own_gradients_stage(key),)
    if kind.folder == layout.DETECTIONS:
        return (DETECT,)
    if kind.folder == layout.DECISIONS:
        return (CLEAN_RETRAIN,) if key == layout.RETRAINED else (CLEAN, CLEAN_OUTCOME)
    if key is None or kind.form == "run":
        return ()
    if kind.by == "targets":
        return (stage_of(key),)
    return tuple(f"{key}/{stage}" for stage in _WRITTEN_BY[kind.folder])

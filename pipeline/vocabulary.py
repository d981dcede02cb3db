"""The words of a run: its stages and their units, modes, forms of the Hessian and kinds of targets.

Stages of a method are named ``<method>/<stage>``. Nothing here is heavy to import.
"""

from __future__ import annotations

from typing import Literal

from ..storage import stages
from ..workers.recursion import forms

# ---------------------------------------------------------------------- stages

# The words that manifests carry are explained in ``storage.stages``.
ATTRIBUTE = stages.ATTRIBUTE
BY_EPOCH = stages.BY_EPOCH
BY_EPOCH_SCORES = stages.BY_EPOCH_SCORES
CLEAN = stages.CLEAN
CLEAN_OUTCOME = stages.CLEAN_OUTCOME
CLEAN_RETRAIN = stages.CLEAN_RETRAIN
CORRECTION = stages.CORRECTION
CURVATURE = stages.CURVATURE
DETECT = stages.DETECT
DIRECTIONS = stages.DIRECTIONS
EVALUATE = stages.EVALUATE
EVALUATE_SCORES = stages.EVALUATE_SCORES
PREPARE = stages.PREPARE
RECORD = stages.RECORD
REDUCE = stages.REDUCE
REPLAY = stages.REPLAY
RETRAIN = stages.RETRAIN
SEGMENTS = stages.SEGMENTS
TEST_GRADIENTS = stages.TEST_GRADIENTS
TRAINING_GRADIENTS = stages.TRAINING_GRADIENTS
TRAINING_OUTPUTS = stages.TRAINING_OUTPUTS
WAYS = stages.WAYS
by_epoch_stage = stages.by_epoch_stage
own_gradients_stage = stages.own_gradients_stage
stage_of = stages.stage_of
stages_of = stages.stages_of

STAGES = (RECORD, TEST_GRADIENTS, REPLAY, REDUCE)
"""What a run can be asked to do, in order; in adjoint mode `REPLAY` is done by `ADJOINT`."""

ADJOINT = forms.ADJOINT
"""Last part of the stage that carries targets backwards, and the ``mode`` of a method made that way."""
PREFLIGHT = "preflight"
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


TARGET_GRADIENTS = tuple(stage_of(kind) for kind in KINDS if kind != SAMPLES)


def self_influence_part(method: str) -> str:
    """Return the part of such a stage that multiplies a method's hypergradients with those gradients."""
    return f"self-influence-{method}"


def judges(stage: str) -> bool:
    """Whether a stage judges a run or decides upon it: no part of the run, and never missing from it."""
    return stage.split("/")[0] in (EVALUATE, BY_EPOCH, TRAINING_OUTPUTS, TRAINING_GRADIENTS, DETECT, CLEAN)

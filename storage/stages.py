"""The names of stages, as manifests carry them, and which of them may write a file.

A manifest vouches for files of its own stage only, so whoever reads one must know which those are.
Stages of a method are named ``<method>/<stage>``.
"""

from __future__ import annotations

from . import layout

RECORD = "record"
TEST_GRADIENTS = "test-gradients"
REPLAY = "replay"
SEGMENTS = "segments"
"""Last part of the stage whose units are (samples, segment of the training), see `is_temporary`."""
WAYS = "ways"
"""Last part of the stage that tries the ways to per-sample gradients once for all segments."""
REDUCE = "reduce"
ADJOINT = "adjoint"
CURVATURE = "curvature"
DIRECTIONS = "directions"
CORRECTION = "correction"
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


def stage_of(targets: str) -> str:
    """Return the stage that makes the gradients of targets from the test gradients."""
    return f"target-gradients-{targets}"


def by_epoch_stage(part: str) -> str:
    """Return a stage of a comparison over training: its replays, or an estimator after an epoch."""
    return f"{BY_EPOCH}/{part}"


def own_gradients_stage(part: str) -> str:
    """Return a stage that looks at the gradients of the tracked samples' own losses."""
    return f"{TRAINING_GRADIENTS}/{part}"


def is_temporary(stage: str) -> bool:
    """Whether a stage's results are removed once they were used.

    What was made from them names as its inputs what they were made from, and not them.
    """
    return stage.endswith(f"/{SEGMENTS}")


_WRITTEN_BY = {
    layout.TRAJECTORY: (RECORD,),
    layout.TEST_GRADIENTS: (TEST_GRADIENTS,),
    layout.TRAINING_OUTPUTS: (TRAINING_OUTPUTS,),
    layout.HYPERGRADIENTS: (REPLAY,),
    layout.PARTIAL_SUMS: (SEGMENTS,),
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


def may_write(stage: str, path: str) -> bool:
    """Whether units of a stage may write a file of this name, relative to the run."""
    if path == layout.RUN_INFO or path.startswith(f"{layout.MANIFESTS}/"):
        return False
    place = layout.locate(path)
    return place is None or stage in stages_of(place)

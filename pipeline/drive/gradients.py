"""The record, and the stages of gradients at the trained weights: of test samples, of targets."""

from __future__ import annotations

import numpy as np

from ...storage import layout
from ...storage.errors import CorruptStore
from ...workers.training.recorded import is_recorded
from ..executors.base import Unit
from ..plan.kept_visits import kept_bytes, why_not
from ..plan.moment import is_of_this_record, recorded_at
from ..plan.plan import Plan
from ..plan.survey import compute_of
from ..reading.unit_values import TestGradientValues, values_of
from ..spec.targets import store_of
from ..units.gradients import TargetGradientWork, TestGradientWork
from ..units.record import CutWork, RecordWork
from ..vocabulary import INDEX, RECORD, TEST_GRADIENTS, TRAJECTORY, stage_of
from .stages import (
    Needed,
    Session,
    Stage,
    Stages,
    after_the_record,
    commit_index,
    make_store,
    units_of,
)
from .stores import StoreOf, row_notes

RECORDED = Needed(stage=RECORD, unit=TRAJECTORY, command="record")
TESTED = Needed(stage=TEST_GRADIENTS, unit=INDEX, command="replay")


def record(session: Session, plan: Plan) -> Stages:
    """Record the training; a new record makes everything computed from an older one void."""
    step = session.spec.at
    if step is None and is_recorded(session.surveyed.recipe):
        _check_recorded(session)
    unkept = why_not(session.spec, session.surveyed) if step is None else None
    if step is not None and not is_of_this_record(session.spec, session.directory):
        session.note("the record was made again since: what was computed as of its step is done again")
        session.directory.drop(RECORD, TRAJECTORY)
    if unkept is not None and session.directory.manifest(RECORD, TRAJECTORY) is None:
        session.note(unkept)
    yield Stage(
        name=RECORD,
        units=[Unit(stage=RECORD, name=TRAJECTORY, disk_bytes=plan.disk["trajectory"] + plan.disk["visits"])],
        handler=lambda: (
            record_work(session, plan.segments.count) if step is None else cut_work(session, step)
        ),
        total=plan.steps,
        label="step",
        closing=False,
        voids=after_the_record(session.directory),
    )


def cut_work(session: Session, step: int) -> CutWork:
    """Return the handler of a record that is the beginning of another."""
    uri = session.directory.uri
    return CutWork(uri=uri, source=recorded_at(uri, step), step=step)


def _check_recorded(session: Session) -> None:
    """Refuse to train what only a loop of the user's own can.

    Raises:
        CorruptStore: Its record is damaged.
    """
    directory = session.directory
    manifest = directory.manifest(RECORD, TRAJECTORY)
    assert manifest is not None  # else there were no batches to follow
    problems = directory.check(manifest, digests=True, recall=True)
    if problems:
        raise CorruptStore(
            f"{directory.uri}: {problems[0]}; a loop of its own recorded this: restore the file, or run the loop again"
        )


def record_work(session: Session, segments: int = 1) -> RecordWork:
    """Return the handler of the record; ``segments``: of the replay that follows."""
    return RecordWork(
        uri=session.directory.uri,
        recipe=session.surveyed.recipe,
        compute=compute_of(session.spec),
        checkpoint_every=session.spec.checkpoint_every,
        visits=kept_bytes(session.spec, session.surveyed) > 0,
        segments=segments,
    )


def test_gradients(session: Session, plan: Plan) -> Stages:
    """Compute the gradients of the test samples, then commit their losses, labels and predictions."""
    surveyed, directory = session.surveyed, session.directory
    session.require(RECORDED)
    unknown = np.full(plan.n_tested, -1, dtype=np.int16)
    store = StoreOf(
        base=layout.TEST_GRADIENTS,
        name="gradient",
        rows=plan.n_tested,
        columns=plan.columns,
        dtype=session.spec.dtype,
        chunk_rows=plan.test_chunk_rows,
        dimensions=("test_index", "parameter"),
        row_columns={
            "test_index": surveyed.tested.astype(np.int32),
            "loss": np.full(plan.n_tested, np.nan),
            "label": unknown,
            "prediction": unknown.copy(),
        },
        attrs={"n_test": plan.n_test, **row_notes(surveyed.row_map)},
    )
    units = units_of(TEST_GRADIENTS, plan.test_blocks, plan.columns * plan.itemsize)
    make_store(session, TEST_GRADIENTS, store)
    yield Stage(
        name=TEST_GRADIENTS,
        units=units,
        handler=lambda: TestGradientWork(
            uri=directory.uri,
            recipe=surveyed.recipe,
            compute=compute_of(session.spec),
            tested=surveyed.tested,
            test_labels=surveyed.test_labels,
            row_map=surveyed.row_map,
        ),
        total=plan.n_tested,
        label="row",
    )
    if session.valid(TEST_GRADIENTS, INDEX):
        return
    made, reading = store.open(directory), directory.ledger.remember()
    for unit in units:
        manifest = directory.manifest(TEST_GRADIENTS, unit.name)
        assert manifest is not None
        directory.ledger.use([manifest])
        values = values_of(TestGradientValues, manifest)
        assert values.start is not None
        for column, dtype in (("loss", np.float64), ("label", np.int16), ("prediction", np.int16)):
            made.write_column(column, np.asarray(getattr(values, column), dtype=dtype), start=values.start)
    commit_index(directory, TEST_GRADIENTS, store, made, reading)


def target_gradients(session: Session, plan: Plan) -> Stages:
    """Make the gradients of classes or of the mean, once for all forms of the Hessian."""
    kind = plan.targets.kind
    yield Stage(
        name=stage_of(kind),
        units=units_of(stage_of(kind), plan.target_blocks, plan.columns * plan.itemsize),
        handler=lambda: TargetGradientWork(uri=session.directory.uri, targets=kind),
        total=plan.n_tested * len(plan.target_blocks),
        label="row",
        needs=[TESTED],
        store=StoreOf(
            base=store_of(kind),
            name="gradient",
            rows=len(plan.targets),
            columns=plan.columns,
            dtype=session.spec.dtype,
            chunk_rows=plan.target_chunk_rows,
            dimensions=(plan.targets.axis, "parameter"),
            row_columns=plan.targets.columns(),
            attrs={"targets": kind, "n_test": plan.n_tested},
        ),
    )

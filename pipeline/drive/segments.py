"""The stages of a replay that is cut into segments of steps, and the end of what they leave meanwhile."""

from __future__ import annotations

from ...storage import layout
from ...storage.files import exists, list_files, remove
from ...storage.trajectory import Trajectory, open_trajectory
from ...workers.training.borders import cut_at
from ...workers.training.trials import trials_in_all
from ..executors.base import Unit
from ..plan.plan import Plan
from ..plan.sharding import Shard
from ..plan.survey import compute_of
from ..units.segments import AddWork, Piece, SegmentWork, Share, WaysWork
from ..vocabulary import SEGMENTS, WAYS
from .stages import Session, Stage, Stages

UNEVEN = 1.2
"""How many times as long as it might be a segment is before people are told."""


def segment_stages(session: Session, plan: Plan, stage: str) -> Stages:
    """Replay, in units of a shard and a segment, what blocks of rows that are not there yet need.

    Args:
        session: The session.
        plan: How the work is cut.
        stage: That adds up what the segments leave.
    """
    spec, directory, method = session.spec, session.directory, session.spec.base_method
    missing = [block for block in plan.collected if not session.valid(stage, block.name)]
    if not missing:
        return
    trajectory = open_trajectory(directory.path(layout.TRAJECTORY), directory.vouched)
    spans = borders(trajectory, plan)
    _say_uneven(session, trajectory, spans, plan)
    needed = [shard for shard in plan.shards if any(_holds(shard, block) for block in missing)]
    shares = min(plan.segments.count, trials_in_all(trajectory, plan.steps))
    recipe, compute = session.surveyed.recipe, compute_of(spec)
    yield Stage(
        name=f"{method}/{WAYS}",
        units=[
            Unit(stage=f"{method}/{WAYS}", name=share.name, arguments=share)
            for share in (Share(part=part, parts=shares) for part in range(shares))
        ],
        handler=lambda: WaysWork(uri=directory.uri, recipe=recipe, compute=compute),
        total=0,
        label="trial",
    )
    pieces = [
        Piece(shard=shard, first=first, stop=stop, number=number)
        for number, (first, stop) in enumerate(spans)
        for shard in needed
    ]
    yield Stage(
        name=f"{method}/{SEGMENTS}",
        units=[
            Unit(
                stage=f"{method}/{SEGMENTS}",
                name=piece.name,
                arguments=piece,
                disk_bytes=plan.segments.unit_bytes,
            )
            for piece in pieces
        ],
        handler=lambda: SegmentWork(
            uri=directory.uri,
            recipe=recipe,
            compute=compute,
            method=method,
            form=spec.form,
            tracked=session.surveyed.tracked,
            targets=spec.targets,
            row_map=session.surveyed.row_map,
            pieces=plan.segments.pieces,
            chunk_bytes=plan.segments.chunk_bytes,
        ),
        total=plan.steps * len(needed),
        label="step",
        kept=(len(plan.shards) - len(needed)) * len(spans),
    )


def add_work(session: Session, plan: Plan) -> AddWork:
    """Return the handler that adds up what the segments leave."""
    directory, spec = session.directory, session.spec
    trajectory = open_trajectory(directory.path(layout.TRAJECTORY), directory.vouched)
    return AddWork(
        uri=directory.uri,
        recipe=session.surveyed.recipe,
        compute=compute_of(spec),
        method=spec.base_method,
        form=spec.form,
        tracked=session.surveyed.tracked,
        targets=spec.targets,
        row_map=session.surveyed.row_map,
        sampled_tests=session.surveyed.sampled_tests,
        test_labels=session.surveyed.test_labels,
        shards=plan.shards,
        segments=tuple(borders(trajectory, plan)),
    )


def borders(trajectory: Trajectory, plan: Plan) -> list[tuple[int, int]]:
    """Return the segments: of the record and of their number alone, so that a run goes on with the same."""
    return cut_at(trajectory.stands, plan.segments.count)


def remove_sums(session: Session) -> None:
    """Remove what segments left meanwhile, once all of it is added up."""
    directory, method = session.directory, session.spec.base_method
    folder = directory.path(layout.partial_sums(method))
    if directory.units(f"{method}/{SEGMENTS}"):
        directory.drop(f"{method}/{SEGMENTS}")
    if exists(folder):
        remove(folder, recursive=True)
    whole = directory.path(layout.PARTIAL_SUMS)
    if exists(whole) and not list_files(whole):  # no other method's are there
        remove(whole, recursive=True)


def _holds(shard: Shard, block: Shard) -> bool:
    return shard.start <= block.start < shard.stop


def _say_uneven(session: Session, trajectory: Trajectory, spans: list[tuple[int, int]], plan: Plan) -> None:
    """Say that the record's states do not lie where equal segments would end."""
    asked, longest = plan.segments.count, max(stop - first for first, stop in spans)
    if len(spans) == asked and longest <= max(UNEVEN * plan.steps / asked, plan.steps / asked + 1):
        return
    session.note(
        f"the record keeps {len(trajectory.stands)} states, which make {len(spans)} segments of at most {longest:,} steps "
        f"where {asked} were asked for; recorded with --segments {asked} it keeps one at each border"
    )

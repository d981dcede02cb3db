"""What speaks for the numbers of a method: how gradients were had, what was tried, what the law says.

``run.json`` keeps it under ``trust`` by method; ``analysis.trust_lines`` says it in words.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...storage import layout
from ...storage.errors import ConservationBroken
from ...storage.rundir import RunDirectory
from ...storage.trajectory import open_trajectory
from ...workers.model.row_map import RowMap
from ...workers.recursion.coefficients import recorded_settings
from ...workers.recursion.conservation import REMEDY, law_of
from ...workers.recursion.rest import leaves_a_rest
from ..reading.run_info import Law, Trust
from ..reading.unit_values import (
    RecordValues,
    ReplayValues,
    TestGradientValues,
    all_values,
    joined_ways,
    values_of,
)
from ..vocabulary import CLOSING_UNITS, RECORD, TEST_GRADIENTS, TRAJECTORY


def trust_of(
    directory: RunDirectory, stage: str, *, n_train: int, lawful: str | None, row_map: RowMap | None = None
) -> Trust:
    """Return what the units of a stage of replays tell.

    Args:
        directory: The run.
        stage: ``<method>/replay`` or ``<method>/adjoint``.
        n_train: N.
        lawful: Why the conservation law does not apply; None where it does.
        row_map: What is kept of a row; None: all.

    Raises:
        ConservationBroken: The hypergradients do not add up; names the parameter.
    """
    manifests = [m for m in directory.manifests(stage) if m.unit not in CLOSING_UNITS]
    units = [values_of(ReplayValues, manifest) for manifest in manifests]
    tests = all_values(TestGradientValues, directory, TEST_GRADIENTS)
    record = directory.manifest(RECORD, TRAJECTORY)
    first = units[0] if units else ReplayValues()
    return Trust(
        update=None if record is None else values_of(RecordValues, record).checked_steps,
        ways=joined_ways([unit.ways for unit in units if unit.ways is not None]),
        test_ways=joined_ways([unit.ways for unit in tests if unit.ways is not None]),
        law=_law(directory, units, n_train, row_map) if lawful is None else Law(checked=False, reason=lawful),
        products=first.products,
        field=first.field,
        differences=first.differences,
        running_statistics=first.running_statistics,
        matrix=first.matrix,
    )


def _law(directory: RunDirectory, units: Sequence[ReplayValues], n_train: int, row_map: RowMap | None) -> Law:
    if units and all(unit.lawful for unit in units):
        return Law(checked=True)
    shards = [unit.law for unit in units if unit.law is not None]
    if len(shards) < len(units):
        reason = "shards of an older version did not note it; verify reads the store"
        return Law(checked=False, reason=reason)
    noise = max((unit.ways.get("noise", 0.0) for unit in units if unit.ways is not None), default=0.0)
    trajectory = open_trajectory(directory.path(layout.TRAJECTORY), directory.vouched)
    if leaves_a_rest(recorded_settings(trajectory)) and not all("rest" in shard for shard in shards):
        return Law(checked=False, reason="shards did not note what clipping or Adam leave out of their rows")
    law = law_of(trajectory, shards, n_train, noise, row_map)
    if not law.ok:
        raise ConservationBroken(
            f"the hypergradients of all samples do not add up to what training did to parameter {law.worst!r} "
            f"(off by {law.error:.1e}, rounding allows {law.limit:.1e}); {REMEDY}"
        )
    return Law(checked=True, worst=law.worst, error=law.error, limit=law.limit)

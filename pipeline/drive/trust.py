"""What speaks for the numbers of a method: how gradients were had, what was tried, what the law says.

``run.json`` keeps it under ``trust`` by method; ``analysis.trust_lines`` says it in words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ...storage import layout
from ...storage.errors import ConservationBroken
from ...storage.rundir import RunDirectory
from ...storage.trajectory import open_trajectory
from ...workers.recursion.conservation import REMEDY, law_of
from ..vocabulary import RECORD, TEST_GRADIENTS, TRAJECTORY


def trust_of(directory: RunDirectory, stage: str, *, n_train: int, lawful: str | None) -> dict[str, Any]:
    """Return what the units of a stage of replays tell.

    Args:
        directory: The run.
        stage: ``<method>/replay`` or ``<method>/adjoint``.
        n_train: N.
        lawful: Why the conservation law does not apply; None where it does.

    Raises:
        ConservationBroken: The hypergradients do not add up; names the parameter.
    """
    units = [m.values for m in directory.manifests(stage) if "rows" in m.values]
    tests = [m.values["ways"] for m in directory.manifests(TEST_GRADIENTS) if "ways" in m.values]
    record = directory.manifest(RECORD, TRAJECTORY)
    found: dict[str, Any] = {
        "update": None if record is None else record.values.get("checked_steps"),
        "ways": _joined([u["ways"] for u in units if "ways" in u]),
        "test_ways": _joined(tests),
        "law": {"checked": False, "reason": lawful},
    }
    for name in ("products", "field", "differences", "running_statistics"):
        if units and name in units[0]:
            found[name] = units[0][name]
    if lawful is None:
        found["law"] = _law(directory, units, n_train)
    return found


def _law(directory: RunDirectory, units: Sequence[Mapping[str, Any]], n_train: int) -> dict[str, Any]:
    if units and all("lawful" in unit for unit in units):
        return {"checked": True}
    shards = [unit["law"] for unit in units if "law" in unit]
    if len(shards) < len(units):
        return {
            "checked": False,
            "reason": "shards of an older version did not note it; verify reads the store",
        }
    noise = max((unit["ways"].get("noise", 0.0) for unit in units if "ways" in unit), default=0.0)
    law = law_of(open_trajectory(directory.path(layout.TRAJECTORY)), shards, n_train, noise)
    if not law.ok:
        raise ConservationBroken(
            f"the hypergradients of all samples do not add up to what training did to parameter {law.worst!r} "
            f"(off by {law.error:.1e}, rounding allows {law.limit:.1e}); {REMEDY}"
        )
    return {"checked": True, "worst": law.worst, "error": law.error, "limit": law.limit}


def _joined(ways: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return what the units have in common, and all that was repaired."""
    if not ways:
        return None
    repaired = sorted({name for one in ways for name in one["repaired"]})
    blocks = sum(one.get("repaired_blocks", 0) for one in ways)
    return {**ways[0], "repaired": repaired, **({"repaired_blocks": blocks} if blocks else {})}

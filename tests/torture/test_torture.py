"""Twenty of the faults of ``make torture``: the ways that damage and disturb work here, too."""

from __future__ import annotations

from pathlib import Path

from tests.torture.mutations import STRAY, WAYS
from tests.torture.session import faults, mutations
from tests.torture.tally import Tally


def test_damaged_files_are_named_refused_and_made_again(tmp_path: Path) -> None:
    tally = Tally()
    mutations(tmp_path, tally, count=12, seed=7, whole=False)
    assert tally.bad == []
    assert tally.faults.total() == 12


def test_disturbed_drivers_end_with_the_same_bits(tmp_path: Path) -> None:
    tally = Tally()
    skipped = faults(tmp_path, tally, count=8, seed=7)
    assert tally.bad == []
    assert tally.faults.total() >= 8 - 2 * len(skipped)


def test_a_bad_outcome_is_told() -> None:
    tally = Tally()
    tally.note("disk full", "repaired", "")
    tally.note("disk full", "lost", "run again: exit code 1")
    assert tally.bad == ["lost: disk full: run again: exit code 1"]
    assert tally.outcomes["disk full", "repaired"] == 1
    assert set(WAYS) > STRAY

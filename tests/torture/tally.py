"""Counting what became of faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

BAD = ("wrong", "silent", "lost", "crashed", "untidy", "late")
"""Outcomes that must never be: a wrong number given as right, damage that nothing names, work or a method that is gone,
an error without a name, what a later command leaves lying about, and a unit that waited too long to be at work again."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """How many faults of each kind there were, and what was bad.

    Attributes:
        faults: Faults by kind.
        outcomes: What became of them, by kind and outcome: ``repaired``, ``refused``, ``noticed``, ``unharmed``, or one of `BAD`.
        bad: One line each.
        seconds: How long units were not at work after a loss was noticed, by kind of fault.
    """

    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def note(self, kind: str, outcome: str, detail: str, seconds: Sequence[float] = ()) -> None:
        """Count one fault; ``detail`` says which, and is kept where the outcome is bad."""
        self.seconds.setdefault(kind, []).extend(seconds)
        self.faults[kind] += 1
        self.outcomes[kind, outcome] += 1
        if outcome in BAD:
            self.bad.append(f"{outcome}: {kind}: {detail}")

    def recoveries(self) -> dict[str, dict[str, float]]:
        """Return number, median and most of the seconds, by kind of fault."""
        return {
            kind: {"count": len(took), "median": round(median(took), 2), "most": round(max(took), 2)}
            for kind, took in sorted(self.seconds.items())
            if took
        }

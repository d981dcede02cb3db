"""Counting what became of faults."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

BAD = ("wrong", "silent", "lost", "crashed", "untidy")
"""Outcomes that must never be: a wrong number given as right, damage that nothing names, work or a method that is gone,
an error without a name, and what a later command leaves lying about."""


@dataclass(kw_only=True, slots=True)
class Tally:
    """How many faults of each kind there were, and what was bad.

    Attributes:
        faults: Faults by kind.
        outcomes: What became of them, by kind and outcome: ``repaired``, ``refused``, ``noticed``, ``unharmed``, or one of `BAD`.
        bad: One line each.
    """

    faults: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)

    def note(self, kind: str, outcome: str, detail: str) -> None:
        """Count one fault; ``detail`` says which, and is kept where the outcome is bad."""
        self.faults[kind] += 1
        self.outcomes[kind, outcome] += 1
        if outcome in BAD:
            self.bad.append(f"{outcome}: {kind}: {detail}")

"""How far a stage is and how fast it goes, from its events."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(slots=True)
class StageProgress:
    """What the events of one stage add up to.

    Attributes:
        stage: Its name.
        units: Units (shards, blocks, row ranges) in all.
        total: Steps or rows in all; 0 where the stage does not count them.
        label: What ``total`` counts.
        started: Clock when its work started: what was done before is no measure of speed.
        finished_units: Units done, skipped ones included.
        skipped: Units that an earlier run had committed.
        before: Share of the stage that those are.
        done: Steps or rows done, by unit.
    """

    stage: str
    units: int
    total: int
    label: str
    started: float
    finished_units: int = 0
    skipped: int = 0
    before: float = 0.0
    done: dict[str, int] = field(default_factory=dict)
    totals: dict[str, int] = field(default_factory=dict)

    @property
    def amount(self) -> int:
        """Steps or rows done, never more than there are."""
        return min(sum(self.done.values()), self.total) if self.total else sum(self.done.values())

    @property
    def fraction(self) -> float:
        """Share that is done, 0 to 1."""
        by_units = self.finished_units / self.units if self.units else 0.0
        return max(by_units, self.amount / self.total if self.total else 0.0)

    def advance(self, unit: str, done: int, total: int) -> None:
        """Take in a unit's progress; a retried unit starts again from less."""
        self.done[unit] = done
        self.totals[unit] = total

    def finish(self, unit: str) -> None:
        """Take in that a unit is done."""
        self.finished_units += 1
        share = self.totals.get(unit, round(self.total / self.units) if self.units else 0)
        self.done[unit] = max(share, self.done.get(unit, 0))

    def skip(self, unit: str, now: float) -> None:
        """Take in that a unit was committed before this run."""
        self.skipped += 1
        self.finish(unit)
        self.before, self.started = self.fraction, now


def time_left(stage: StageProgress, now: float) -> float | None:
    """Return the seconds left at the pace so far; None before 1% is done."""
    own = stage.fraction - stage.before
    return None if own < 0.01 else (now - stage.started) * (1 - stage.fraction) / own


def rate(stage: StageProgress, now: float) -> float | None:
    """Return steps or rows a second; None where none are counted, or it is too early to say."""
    own = stage.amount - stage.before * stage.total
    return own / (now - stage.started) if stage.total and own > 0 and now - stage.started > 0.5 else None

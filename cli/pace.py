"""How far a stage is, how fast it goes, and how that is said."""

from __future__ import annotations

from dataclasses import dataclass, field

from .output import show_seconds


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


def stage_line(stage: StageProgress, seconds: float) -> str:
    """Return the line that a finished stage leaves behind."""
    if stage.units and stage.skipped >= stage.units:
        return f"{stage.stage}: already done ({units_text(stage)})"
    amount = f", {stage.total:,} {stage.label}" if stage.total else ""
    skipped = f", {stage.skipped} of them already done" if stage.skipped else ""
    return f"{stage.stage}: {units_text(stage)}{skipped}{amount} in {show_seconds(seconds)}"


def units_text(stage: StageProgress) -> str:
    """Return how many units are done, in the word of the stage."""
    word = {
        "record": "run",
        "replay": "shards",
        "reduce": "tiles",
        "retrain": "trainings",
        "detect": "passes",
    }.get(stage.stage.split("/")[-1], "blocks")
    return f"{stage.finished_units}/{stage.units} {word}"


def time_left(stage: StageProgress, now: float) -> float | None:
    """Return the seconds left at the pace so far; None before 1% is done."""
    own = stage.fraction - stage.before
    return None if own < 0.01 else (now - stage.started) * (1 - stage.fraction) / own


def clock_text(seconds: float) -> str:
    """Return a time left such as ``0:42`` or ``1:07:00``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def short(number: float) -> str:
    """Return a count in at most six characters, such as ``950``, ``12.3k`` or ``1.20M``."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            scaled = number / size
            return f"{scaled:.3g}{unit}" if scaled < 999.5 else f"{scaled:.0f}{unit}"
    return f"{number:.0f}" if number >= 10 or number == int(number) else f"{number:.1f}"

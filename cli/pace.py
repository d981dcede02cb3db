"""How it is said how far a stage is and how fast it goes."""

from __future__ import annotations

from ..pipeline.executors.pace import StageProgress
from .output import show_seconds


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
        "segments": "segments",
        "ways": "shares",
        "reduce": "tiles",
        "retrain": "trainings",
        "detect": "passes",
    }.get(stage.stage.split("/")[-1], "blocks")
    return f"{stage.finished_units}/{stage.units} {word}"


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

"""Two commands on one run at once: one writes, the other is told or waits, and no method is lost."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hydra_pipe import open_run
from tests.torture.judge import expected, untidy
from tests.torture.tally import Tally
from tests.two_drivers import Drivers

RECIPE = "tests.recipes:Small"
PLACED = ("--executor", "serial", "--device", "cpu", "--quiet")
USED = "is in use by "


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two command lines.

    Attributes:
        kind: Shown.
        first: Words of the one, behind which comes the run.
        second: Words of the other.
        fresh: Whether they start from nothing; else from a finished run.
        refused: What the loser may be told, beside that the run is in use.
        methods: What the run holds once both have been through.
    """

    kind: str
    first: tuple[str, ...]
    second: tuple[str, ...]
    fresh: bool
    refused: str = USED
    methods: tuple[str, ...] = ("hydra",)


RUN = ("run", RECIPE, *PLACED, "--shards", "4")
PAIRS = (
    Pair(kind="pair: the same run", first=RUN, second=RUN, fresh=True),
    Pair(
        kind="pair: run, other run",
        first=RUN,
        second=(*RUN, "--epochs", "2"),
        fresh=True,
        refused="holds a run of another specification",
    ),
    Pair(
        kind="pair: ekfac, attribute",
        first=(*RUN, "--hessian", "ekfac"),
        second=("attribute", "{out}", RECIPE, "--method", "gradient-dot", *PLACED[:2], "--quiet"),
        fresh=False,
        methods=("hydra", "hydra-ekfac", "gradient-dot"),
    ),
    Pair(
        kind="pair: attribute, detect",
        first=("attribute", "{out}", RECIPE, "--method", "gradient-dot", *PLACED[:2], "--quiet"),
        second=("detect", "{out}", RECIPE, "--by", "harm", "--quiet"),
        fresh=False,
        methods=("hydra", "gradient-dot"),
    ),
)


def pairs(
    scratch: Path,
    tally: Tally,
    *,
    count: int,
    seed: int,
    heard: Callable[[], None] = lambda: None,
) -> None:
    """Start ``count`` pairs, a third of them with ``--wait``; then each command once more, alone."""
    chance = random.Random(f"{seed} pairs")
    with Drivers() as drivers:
        sound = scratch / "sound"
        assert drivers.start((*RUN, "--out", sound)).wait() == 0
        right = expected(sound)
        for number in range(count):
            pair, out = PAIRS[number % len(PAIRS)], scratch / f"pair-{number}"
            if not pair.fresh:
                shutil.copytree(sound, out)
            waits = number % 3 == 2 and pair.refused == USED
            tally.note(pair.kind, *_outcome(drivers, pair, out, chance.choice((0, 0.05, 0.3)), waits, right))
            heard()
            shutil.rmtree(out, ignore_errors=True)


def _outcome(
    drivers: Drivers, pair: Pair, out: Path, after: float, waits: bool, right: dict[str, str]
) -> tuple[str, str]:
    lines = [_words(words, out, waits) for words in (pair.first, pair.second)]
    for code, said in drivers.pair(*lines, after=after):
        if code == 1 and (said.count("\n") != 1 or not (USED in said or pair.refused in said)):
            return "crashed", f"{said[-300:]}"
        if code not in (0, 1) or (waits and code):
            return "crashed", f"exit code {code}: {said[-300:]}"
    if pair.refused != USED and out.exists() and expected(out) != right:
        # The other one was first: then the run is its own, whole, and the first one's words are refused.
        lines.reverse()
    for line in lines if pair.refused == USED else lines[:1]:
        last = drivers.start(line)
        if last.wait() != 0:
            return "lost", f"run again: {last.said()[-300:]}"
    found = open_run(out)
    if missing := set(pair.methods) - set(found.methods()):
        return "lost", f"methods {missing}"
    now = expected(out)
    if pair.refused == USED and any(now[name] != digest for name, digest in right.items()):
        return "wrong", "other numbers"
    return untidy(out) or ("unharmed", "")


def _words(words: tuple[str, ...], out: Path, waits: bool) -> list[str]:
    given = [str(out) if word == "{out}" else word for word in words]
    given += [] if str(out) in given else ["--out", str(out)]
    return [*given, "--wait"] if waits else given

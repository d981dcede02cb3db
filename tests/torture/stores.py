"""Runs on an S3 that fails: errors, resets and slow answers on the way, drivers killed at a request, an outage."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from hydra_pipe.storage import files

from tests.end_to_end.nursery import OPTIONS, Nursery
from tests.torture.bucket import SECRET, Bucket, bucket
from tests.torture.judge import expected, problems
from tests.torture.tally import Tally

SIZE = ("--track", "6", "--test", "4", "--epochs", "1")


def words(out: str) -> list[str]:
    """Return the command line of a run of few requests."""
    return ["run", "tests.recipes:Small", *OPTIONS, "--shards", "2", *SIZE, "--out", out]


def stores(
    scratch: Path,
    tally: Tally,
    *,
    count: int,
    seed: int,
    heard: Callable[[], None] = lambda: None,
) -> None:
    """Make ``count`` runs in turn on a faulty store, killed at a request, and through an outage."""
    chance = random.Random(f"{seed} stores")
    with bucket() as held, mock.patch.dict(os.environ, held.environment):
        nursery = Nursery()
        try:
            assert nursery.drive(words(str(scratch / "right"))) == 0
            right = expected(scratch / "right")
            quiet = _requests(nursery, held, scratch)
            for number in range(count):
                kind = (_faulty, _killed, _outage)[number % 3]
                kind(nursery, held, scratch / "said", f"run-{number}", tally, chance, right, quiet)
                heard()
        finally:
            nursery.close()


def _requests(nursery: Nursery, held: Bucket, scratch: Path) -> int:
    """Return how many requests an undisturbed run makes."""
    assert nursery.drive(words(held.uri("quiet")), said=scratch / "said") == 0, (scratch / "said").read_text()
    return held.seen.total()


def _faulty(
    nursery: Nursery,
    held: Bucket,
    said: Path,
    name: str,
    tally: Tally,
    chance: random.Random,
    right: dict[str, str],
    quiet: int,
) -> None:
    held.chance = random.Random(chance.random())
    held.rate = chance.uniform(0.02, 0.2)
    code = nursery.drive(words(held.uri(name)), said=said)
    held.rate = 0.0
    if code != 0:
        tally.note("faulty store", "lost", f"retries did not get through: {said.read_text()[-300:]}")
        return
    tally.note("faulty store", *_ended(nursery, held, name, said, right))


def _killed(
    nursery: Nursery,
    held: Bucket,
    said: Path,
    name: str,
    tally: Tally,
    chance: random.Random,
    right: dict[str, str],
    quiet: int,
) -> None:
    last = held.seen.total() + chance.randrange(quiet)

    def kill(number: int) -> None:
        if number == last and nursery.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(nursery.child, signal.SIGKILL)

    with mock.patch.object(held, "after", kill):
        code = nursery.drive(words(held.uri(name)), said=said)
    if code not in (0, -signal.SIGKILL):
        tally.note("driver killed at a request", "crashed", f"exit code {code}: {said.read_text()[-300:]}")
        return
    tally.note("driver killed at a request", *_ended(nursery, held, name, said, right))


def _outage(
    nursery: Nursery,
    held: Bucket,
    said: Path,
    name: str,
    tally: Tally,
    chance: random.Random,
    right: dict[str, str],
    quiet: int,
) -> None:
    last = held.seen.total() + chance.randrange(quiet)

    def down(number: int) -> None:
        if number >= last:
            held.rate, held.kinds = 1.0, ("503",)

    began = time.monotonic()
    with mock.patch.object(held, "after", down):
        code = nursery.drive(words(held.uri(name)), said=said)
    held.rate, held.kinds = 0.0, Bucket().kinds
    spoken, took = said.read_text(), time.monotonic() - began
    lines = [line for line in spoken.splitlines() if line.startswith("error:")]
    if code not in (0, 1) or (code == 1 and len(lines) != 1) or "Traceback" in spoken or took > 300:
        tally.note("store down", "crashed", f"exit code {code} after {took:.0f} s: {spoken[-300:]}")
        return
    tally.note("store down", *_ended(nursery, held, name, said, right))


def _ended(nursery: Nursery, held: Bucket, name: str, said: Path, right: dict[str, str]) -> tuple[str, str]:
    """Return what became of a run after the same command with nothing in its way."""
    out = held.uri(name)
    code = nursery.drive(words(out), said=said)
    if code != 0:
        return "lost", f"run again: exit code {code}: {said.read_text()[-300:]}"
    if expected(out) != right:
        return "wrong", "other numbers"
    left = list(problems(out))
    listed = files.list_files(out)
    left += [
        f"{path} holds the secret" for path in listed if SECRET.encode() in files.read_bytes(f"{out}/{path}")
    ]
    return ("untidy", str(left[:3])) if left else ("repaired", "")

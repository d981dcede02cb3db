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
from tests.torture.ground import Ground
from tests.torture.judge import ended, expected
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
    with bucket() as held, mock.patch.dict(os.environ, held.environment), Nursery() as nursery:
        assert nursery.drive(words(str(scratch / "right"))) == 0
        ground = Ground(
            nursery=nursery,
            scratch=scratch,
            tally=tally,
            chance=random.Random(f"{seed} stores"),
            right=expected(scratch / "right"),
        )
        assert nursery.drive(words(held.uri("quiet")), said=ground.said) == 0, ground.said.read_text()
        quiet = held.seen.total()
        for number in range(count):
            kind = (_faulty, _killed, _outage)[number % 3]
            kind(ground, held, held.uri(f"run-{number}"), quiet)
            heard()


def _faulty(ground: Ground, held: Bucket, out: str, quiet: int) -> None:
    held.chance = random.Random(ground.chance.random())
    held.rate = ground.chance.uniform(0.02, 0.2)
    code = ground.nursery.drive(words(out), said=ground.said)
    held.rate = 0.0
    if code != 0:
        ground.tally.note(
            "faulty store", "lost", f"retries did not get through: {ground.said.read_text()[-300:]}"
        )
        return
    ground.tally.note("faulty store", *_ended(ground, out))


def _killed(ground: Ground, held: Bucket, out: str, quiet: int) -> None:
    last = held.seen.total() + ground.chance.randrange(quiet)

    def kill(number: int) -> None:
        if number == last and ground.nursery.child is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(ground.nursery.child, signal.SIGKILL)

    with mock.patch.object(held, "after", kill):
        code = ground.nursery.drive(words(out), said=ground.said)
    if code not in (0, -signal.SIGKILL):
        ground.tally.note(
            "driver killed at a request", "crashed", f"exit code {code}: {ground.said.read_text()[-300:]}"
        )
        return
    ground.tally.note("driver killed at a request", *_ended(ground, out))


def _outage(ground: Ground, held: Bucket, out: str, quiet: int) -> None:
    last = held.seen.total() + ground.chance.randrange(quiet)

    def down(number: int) -> None:
        if number >= last:
            held.rate, held.kinds = 1.0, ("503",)

    began = time.monotonic()
    with mock.patch.object(held, "after", down):
        code = ground.nursery.drive(words(out), said=ground.said)
    held.rate, held.kinds = 0.0, Bucket().kinds
    spoken, took = ground.said.read_text(), time.monotonic() - began
    lines = [line for line in spoken.splitlines() if line.startswith("error:")]
    if code not in (0, 1) or (code == 1 and len(lines) != 1) or "Traceback" in spoken or took > 300:
        ground.tally.note("store down", "crashed", f"exit code {code} after {took:.0f} s: {spoken[-300:]}")
        return
    ground.tally.note("store down", *_ended(ground, out))


def _ended(ground: Ground, out: str) -> tuple[str, str]:
    """Return what became of a run after the same command with nothing in its way."""
    code = ground.nursery.drive(words(out), said=ground.said)
    found, detail = ended(out, code, ground.said.read_text(), ground.right)
    listed = files.list_files(out)
    told = [path for path in listed if SECRET.encode() in files.read_bytes(f"{out}/{path}")]
    return ("untidy", f"the secret is in {told[:3]}") if told else (found, detail)

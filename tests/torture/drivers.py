"""Drivers killed, interrupted, starved of disk, files and room, over and over: the same command ends with the same bits."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.end_to_end.nursery import OPTIONS, PAUSED, Nursery
from tests.torture.judge import expected, problems
from tests.torture.tally import Tally

SIGNALS = {
    signal.SIGKILL: "driver killed",
    signal.SIGTERM: "driver terminated",
    signal.SIGINT: "driver interrupted",
}
STOPPED = {signal.SIGKILL: (-signal.SIGKILL,), signal.SIGTERM: (143,), signal.SIGINT: (130,)}
"""Exit codes of a driver that a signal ended."""


def words(out: Path, pause: float) -> list[str]:
    """Return the command line of a run that takes a few seconds."""
    return ["run", PAUSED[0], "--set", f"pause={pause}", *OPTIONS, "--out", str(out)]


def sound(nursery: Nursery, place: Path) -> dict[str, str]:
    """Make the undisturbed run and return its answers."""
    assert nursery.drive(words(place, 0)) == 0
    return expected(place)


def kills(
    nursery: Nursery,
    scratch: Path,
    tally: Tally,
    *,
    count: int,
    chance: random.Random,
    right: dict[str, str],
    heard: Callable[[], None] = lambda: None,
) -> None:
    """Signal drivers at random moments until ``count`` signals have hit, each run resumed to its end."""
    hit = number = 0
    while hit < count:
        out = scratch / f"killed-{number}"
        said = scratch / "said"
        number += 1
        kinds = []
        for _ in range(6):
            sent = chance.choice(list(SIGNALS))
            code = nursery.drive(words(out, 0.02), after=chance.uniform(0.05, 0.9), number=sent, said=said)
            if code == 0:
                break
            kinds.append(SIGNALS[sent])
            if code not in STOPPED[sent]:
                tally.note(SIGNALS[sent], "crashed", f"exit code {code}: {said.read_text()[-300:]}")
        code = nursery.drive(words(out, 0.02), said=said)
        result, detail = _ended(out, code, said, right)
        for kind in kinds:
            tally.note(kind, result, detail)
            heard()
        hit += len(kinds)
        shutil.rmtree(out, ignore_errors=True)


LIMITS: dict[str, tuple[str, int, int]] = {
    "too few open files": ("RLIMIT_NOFILE", 8, 60),
    "files may not grow": ("RLIMIT_FSIZE", 0, 9000),
}
"""Kind of fault -> the limit, and between what it is drawn."""


def limits(
    nursery: Nursery,
    scratch: Path,
    tally: Tally,
    *,
    count: int,
    chance: random.Random,
    right: dict[str, str],
    heard: Callable[[], None] = lambda: None,
) -> None:
    """Run under limits of the process that are too tight; then again without."""
    for number in range(count):
        kind = list(LIMITS)[number % len(LIMITS)]
        name, low, high = LIMITS[kind]
        out, said = scratch / f"limited-{number}", scratch / "said"
        value = chance.randint(low, high)
        code = nursery.drive(words(out, 0), limits={name: value}, said=scratch.parent / "said")
        spoken = (scratch.parent / "said").read_text()
        if code not in (0, 1) or (code == 1 and not _one_line(spoken)):
            tally.note(kind, "crashed", f"{name}={value}: exit code {code}: {spoken[-400:]}")
        else:
            code = nursery.drive(words(out, 0), said=said)
            tally.note(kind, *_ended(out, code, said, right))
        heard()
        shutil.rmtree(out, ignore_errors=True)


def disks(
    nursery: Nursery,
    scratch: Path,
    tally: Tally,
    *,
    count: int,
    chance: random.Random,
    right: dict[str, str],
    heard: Callable[[], None] = lambda: None,
) -> None:
    """Run on a disk that fills up at a random moment; then again with space.

    Raises:
        PermissionError: File systems cannot be mounted here.
    """
    kind = "disk full"
    for number in range(count):
        with small_disk(scratch / f"disk-{number}") as place:
            out, said = place / "run", scratch / "said"
            leave = chance.randrange(0, 500 << 10)
            filler = fill(place, leave)
            code = nursery.drive(words(out, 0), said=said)
            spoken = said.read_text()
            filler.unlink()
            if code == 1 and not (_one_line(spoken) and "no space left" in spoken):
                tally.note(kind, "crashed", f"{leave} bytes left: {spoken[-400:]}")
            else:
                code = nursery.drive(words(out, 0), said=said)
                tally.note(kind, *_ended(out, code, said, right))
            heard()


@contextmanager
def small_disk(place: Path, size: str = "4m") -> Iterator[Path]:
    """Mount a file system of 4 MiB at ``place``.

    Raises:
        PermissionError: That is not permitted here.
    """
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)]
    if subprocess.run(command, check=False, capture_output=True).returncode != 0:
        raise PermissionError("mounting is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def fill(place: Path, leave: int) -> Path:
    """Fill a file system up to ``leave`` free bytes; return the file to remove."""
    filler = place / ".filler"
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_frsize
    filler.write_bytes(b"x" * max(0, free - leave))
    return filler


def _one_line(spoken: str) -> bool:
    lines = [line for line in spoken.splitlines() if line.startswith("error:")]
    return len(lines) == 1 and "unexpected error" not in spoken and "Traceback" not in spoken


def _ended(out: Path, code: int, said: Path, right: dict[str, str]) -> tuple[str, str]:
    """Return what became of a run after its last driver, which nothing disturbed."""
    if code != 0:
        return "lost", f"run again: exit code {code}: {said.read_text()[-300:]}"
    if expected(out) != right:
        return "wrong", "other numbers"
    left = [str(path) for path in out.rglob("*.partial*")] + list(problems(out))
    return ("untidy", str(left[:3])) if left else ("repaired", "")

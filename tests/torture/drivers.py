"""Drivers killed, interrupted, starved of disk, files and room, over and over: the same command ends with the same bits."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

from tests.end_to_end.nursery import OPTIONS, PAUSED, Nursery
from tests.small_disk import fill, mounted
from tests.torture.ground import Ground
from tests.torture.judge import ended, expected

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


def kills(ground: Ground, count: int) -> None:
    """Signal drivers at random moments until ``count`` signals have hit, each run resumed to its end."""
    hit = number = 0
    while hit < count:
        out = ground.scratch / f"killed-{number}"
        number += 1
        kinds = []
        for _ in range(6):
            sent = ground.chance.choice(list(SIGNALS))
            code = ground.nursery.drive(
                words(out, 0.02), after=ground.chance.uniform(0.05, 0.9), number=sent, said=ground.said
            )
            if code == 0:
                break
            kinds.append(SIGNALS[sent])
            if code not in STOPPED[sent]:
                ground.tally.note(
                    SIGNALS[sent], "crashed", f"exit code {code}: {ground.said.read_text()[-300:]}"
                )
        code = ground.nursery.drive(words(out, 0.02), said=ground.said)
        result, detail = ended(out, code, ground.said.read_text(), ground.right)
        for kind in kinds:
            ground.tally.note(kind, result, detail)
            ground.heard()
        hit += len(kinds)
        shutil.rmtree(out, ignore_errors=True)


LIMITS: dict[str, tuple[str, int, int]] = {
    "too few open files": ("RLIMIT_NOFILE", 8, 60),
    "files may not grow": ("RLIMIT_FSIZE", 0, 9000),
}
"""Kind of fault -> the limit, and between what it is drawn."""


def limits(ground: Ground, count: int) -> None:
    """Run under limits of the process that are too tight; then again without."""
    for number in range(count):
        kind = list(LIMITS)[number % len(LIMITS)]
        name, low, high = LIMITS[kind]
        out = ground.scratch / f"limited-{number}"
        value = ground.chance.randint(low, high)
        code = ground.nursery.drive(words(out, 0), limits={name: value}, said=ground.said)
        spoken = ground.said.read_text()
        if code not in (0, 1) or (code == 1 and not _one_line(spoken)):
            ground.tally.note(kind, "crashed", f"{name}={value}: exit code {code}: {spoken[-400:]}")
        else:
            code = ground.nursery.drive(words(out, 0), said=ground.said)
            ground.tally.note(kind, *ended(out, code, ground.said.read_text(), ground.right))
        ground.heard()
        shutil.rmtree(out, ignore_errors=True)


def disks(ground: Ground, count: int) -> None:
    """Run on a disk that fills up at a random moment; then again with space.

    Raises:
        PermissionError: File systems cannot be mounted here.
    """
    kind = "disk full"
    for number in range(count):
        with mounted(ground.scratch / f"disk-{number}", "4m") as place:
            out = place / "run"
            leave = ground.chance.randrange(0, 500 << 10)
            filler = fill(place, leave)
            code = ground.nursery.drive(words(out, 0), said=ground.said)
            spoken = ground.said.read_text()
            filler.unlink()
            if code == 1 and not (_one_line(spoken) and "no space left" in spoken):
                ground.tally.note(kind, "crashed", f"{leave} bytes left: {spoken[-400:]}")
            else:
                code = ground.nursery.drive(words(out, 0), said=ground.said)
                ground.tally.note(kind, *ended(out, code, ground.said.read_text(), ground.right))
            ground.heard()


def _one_line(spoken: str) -> bool:
    lines = [line for line in spoken.splitlines() if line.startswith("error:")]
    return len(lines) == 1 and "unexpected error" not in spoken and "Traceback" not in spoken

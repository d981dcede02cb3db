"""One torture: so many faults of each kind, drawn from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from hydra_pipe import RunSpec, run
from tests.end_to_end.nursery import Nursery
from tests.every_kind import every_kind
from tests.recipes import Small
from tests.torture import drivers
from tests.torture.damage import damage
from tests.torture.ground import Ground
from tests.torture.tally import Tally


def again(place: Path) -> None:
    """Run the command of the base run: the fast form, in this process."""
    run(RunSpec(recipe=Small(), out=str(place), executor="serial", device="cpu", shards=4))


def mutations(
    scratch: Path,
    tally: Tally,
    *,
    count: int,
    seed: int,
    whole: bool = True,
    heard: Callable[[], None] = lambda: None,
) -> None:
    """Damage two runs ``count`` times in all: one with every kind of result, and one that is run again each time.

    Without ``whole`` only the latter.
    """
    base, rounds = scratch / "base", []
    again(base)
    if whole:
        rounds.append((every_kind(scratch / "every-kind"), count // 2, None))
    rounds.append((base, count - count // 2 if whole else count, again))
    for place, number, repeat in rounds:
        chance = random.Random(f"{seed} {place.name}")
        (scratch / f"{place.name}-damaged").mkdir()
        damage(
            place,
            scratch / f"{place.name}-damaged",
            tally,
            count=number,
            chance=chance,
            again=repeat,
            heard=heard,
        )


def faults(
    scratch: Path, tally: Tally, *, count: int, seed: int, heard: Callable[[], None] = lambda: None
) -> list[str]:
    """Disturb drivers ``count`` times: half of them signalled, a quarter on full disks, a quarter under limits.

    Returns:
        What could not be tried here, a line each.
    """
    skipped = []
    with Nursery() as nursery:
        right = drivers.sound(nursery, scratch / "right")
        shares = {
            drivers.kills: count - 2 * (count // 4),
            drivers.disks: count // 4,
            drivers.limits: count // 4,
        }
        for kind, share in shares.items():
            ground = Ground(
                nursery=nursery,
                scratch=scratch,
                tally=tally,
                chance=random.Random(f"{seed} {kind.__name__}"),
                right=right,
                heard=heard,
            )
            try:
                kind(ground, share)
            except PermissionError as error:
                skipped.append(f"{kind.__name__}: {error}")
    return skipped

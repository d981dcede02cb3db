"""Files of a finished run damaged: verify names it, readers refuse it, the same command repairs it."""

from __future__ import annotations

import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.storage import layout

from tests.every_kind import listed
from tests.torture.judge import answers, expected, judged, outcome, problems
from tests.torture.mutations import STRAY, Mutation, kind_of, mutate
from tests.torture.tally import Tally


def by_kind(place: Path) -> dict[str, list[str]]:
    """Return every file of a run that something vouches for, by kind: results, manifests, ``run.json``."""
    found = defaultdict(list)
    manifests = [str(path.relative_to(place)) for path in sorted((place / layout.MANIFESTS).rglob("*.json"))]
    for path in (*listed(place), *manifests, layout.RUN_INFO):
        found[kind_of(path)].append(path)
    return dict(found)


def damage(
    sound: Path,
    scratch: Path,
    tally: Tally,
    *,
    count: int,
    chance: random.Random,
    again: Callable[[Path], None] | None = None,
    heard: Callable[[], None] = lambda: None,
) -> None:
    """Damage copies of a sound run, one file each, every kind of file as often as the others.

    Args:
        sound: The run; nothing is written there.
        scratch: An empty directory.
        tally: Gets the outcomes.
        count: Mutations.
        chance: What draws them.
        again: Runs the command that made the run once more; None: this is not tried.
        heard: Called after each.
    """
    right, asked, kinds = expected(sound), answers(open_run(sound)), by_kind(sound)
    done = 0
    while done < count:
        kind = chance.choice(sorted(kinds))
        path = chance.choice(kinds[kind])
        place = scratch / f"{done}"
        shutil.copytree(sound, place)
        others = [other for other in kinds[kind] if other != path]
        mutation = mutate(place, path, others, chance)
        if mutation is not None and not (path == layout.RUN_INFO and mutation.how in STRAY):
            result, detail = _judge(place, mutation, right, asked, again)
            tally.note(f"damage: {kind}", result, f"{mutation}; {detail}")
            done += 1
            heard()
        shutil.rmtree(place)


def _judge(
    place: Path,
    mutation: Mutation,
    right: Mapping[str, str],
    asked: Mapping[str, Callable],
    again: Callable[[Path], None] | None,
) -> tuple[str, str]:
    """Return the outcome of one mutation, and the particulars."""
    answered = judged(place, right, asked)
    for bad in ("wrong", "crashed"):
        if found := {name: said for name, said in answered.items() if said.startswith(bad)}:
            return bad, str(found)[:400]
    try:
        named = problems(place)
    except Exception as error:  # noqa: BLE001 - whatever comes is the finding
        return "crashed", f"verify: {type(error).__name__}: {str(error)[:200]}"
    if not named:
        return "silent", "verify finds nothing"
    # Above an unreadable run.json or manifest verify may name that alone.
    if mutation.how in STRAY and not any(mutation.found in line for line in named):
        return "silent", f"verify does not name {mutation.found}: {named[:3]}"
    if again is None:
        return "noticed", ""
    repeated = outcome(lambda: str(again(place)), "None")
    if repeated.startswith("refused"):
        return "refused", repeated
    if repeated != "same":
        return "crashed", f"again: {repeated}"
    after = judged(place, right, asked)
    if set(after.values()) != {"same"}:
        return "lost", str({name: said for name, said in after.items() if said != "same"})[:400]
    left = [line for line in problems(place) if mutation.how not in STRAY or mutation.found not in line]
    return ("untidy", str(left[:3])) if left else ("repaired", "")

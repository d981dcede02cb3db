"""One file of a run damaged in one way, drawn from a seed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_pipe.storage import layout

STRAY = frozenset({"backup", "tilde", "second part", "copy beside"})
"""Ways that leave every file of the run as it is, and put another one beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Mutation:
    """What was done to a run.

    Attributes:
        path: The file, relative to the run.
        how: A key of `WAYS`.
        found: What verify may name instead of ``path``: a stray's own path, or the file that was copied over.
    """

    path: str
    how: str
    found: str

    def __str__(self) -> str:
        return f"{self.how}: {self.path}"


Way = Callable[[Path, str, list[str], random.Random], str | None]
"""Damages a file, given the run, the file, others of its kind, and a source of chance; returns the path that
differs afterwards, None where nothing could be changed."""


def kind_of(path: str) -> str:
    """Return what kind of file it is: its folder in the run, metadata of a store apart."""
    place = layout.locate(path)
    folder = path.split("/")[0] if place is None else place.kind.folder
    if path.startswith(f"{layout.SEEDS}/"):
        return f"{layout.SEEDS}: {kind_of(path.split('/', 2)[2])}"
    return f"{folder} (metadata)" if path.endswith("zarr.json") else folder


def mutate(run: Path, path: str, others: list[str], chance: random.Random) -> Mutation | None:
    """Damage one file in a way drawn among those that fit; None where it made no difference."""
    fitting = [how for how in WAYS if how != "json" or path.endswith(".json")]
    how = chance.choice(fitting)
    found = WAYS[how](run, path, others, chance)
    return None if found is None else Mutation(path=path, how=how, found=found)


def _rewrite(change: Callable[[bytearray, random.Random], bytes]) -> Way:
    def way(run: Path, path: str, others: list[str], chance: random.Random) -> str | None:
        before = (run / path).read_bytes()
        after = change(bytearray(before), chance)
        if after == before:
            return None
        (run / path).write_bytes(after)
        return path

    return way


def _flip(data: bytearray, chance: random.Random) -> bytes:
    if data:
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def _zeros(data: bytearray, chance: random.Random) -> bytes:
    at = chance.randrange(len(data) + 1)
    data[at : at + 16] = bytes(len(data[at : at + 16]))
    return bytes(data)


def _truncate(data: bytearray, chance: random.Random) -> bytes:
    return bytes(data[: chance.randrange(len(data))]) if data else b""


def _append(data: bytearray, chance: random.Random) -> bytes:
    return bytes(data) + chance.randbytes(chance.randint(1, 64))


def _noise(data: bytearray, chance: random.Random) -> bytes:
    return chance.randbytes(len(data))


def _remove(run: Path, path: str, others: list[str], chance: random.Random) -> str | None:
    (run / path).unlink()
    return path


def _directory(run: Path, path: str, others: list[str], chance: random.Random) -> str | None:
    (run / path).unlink()
    (run / path).mkdir()
    return path


def _dangling(run: Path, path: str, others: list[str], chance: random.Random) -> str | None:
    (run / path).unlink()
    (run / path).symlink_to("nothing-there")
    return path


def _swap(run: Path, path: str, others: list[str], chance: random.Random) -> str | None:
    other = chance.choice(others) if others else None
    if other is None or (run / path).read_bytes() == (run / other).read_bytes():
        return None
    one, two = (run / path).read_bytes(), (run / other).read_bytes()
    (run / path).write_bytes(two)
    (run / other).write_bytes(one)
    return path


def _copy_over(run: Path, path: str, others: list[str], chance: random.Random) -> str | None:
    other = chance.choice(others) if others else None
    if other is None or (run / path).read_bytes() == (run / other).read_bytes():
        return None
    shutil.copyfile(run / other, run / path)
    return path


def _beside(name: Callable[[Path], str]) -> Way:
    def way(run: Path, path: str, others: list[str], chance: random.Random) -> str | None:
        stray = (run / path).with_name(name(Path(path)))
        if stray.exists():
            return None
        shutil.copyfile(run / path, stray)
        return str(stray.relative_to(run))

    return way


def _json(run: Path, path: str, others: list[str], chance: random.Random) -> str | None:
    document = json.loads((run / path).read_bytes())
    places = list(_places(document))
    holder, key = chance.choice(places)
    value = holder[key]
    choices: list[Any] = [None, [], {}, "", "x" * 5000, -1, 1 << 70, 0.5, True, [[[[[[value]]]]]]]
    if isinstance(value, int | float) and not isinstance(value, bool):
        choices += [value + 1, -value, str(value)] * 3
    if isinstance(value, str):
        choices += [value + "x", value.swapcase(), value[1:]] * 3
    changed = chance.choice(choices)
    if changed == value and type(changed) is type(value):
        return None
    if chance.random() < 0.2 and isinstance(holder, dict):
        del holder[key]
    else:
        holder[key] = changed
    (run / path).write_text(json.dumps(document))
    return path


def _places(node: Any) -> Any:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield node, key
        if isinstance(value, dict | list):
            yield from _places(value)


WAYS: dict[str, Way] = {
    "bit flipped": _rewrite(_flip),
    "zeros": _rewrite(_zeros),
    "truncated": _rewrite(_truncate),
    "emptied": _rewrite(lambda data, chance: b""),
    "appended to": _rewrite(_append),
    "noise": _rewrite(_noise),
    "removed": _remove,
    "directory in its place": _directory,
    "dangling link": _dangling,
    "swapped": _swap,
    "copied over": _copy_over,
    "json": _json,
    "backup": _beside(lambda path: f"{path.name}.bak"),
    "tilde": _beside(lambda path: f"{path.name}~"),
    "second part": _beside(lambda path: f"part-99999{path.suffix}"),
    "copy beside": _beside(lambda path: f"{path.stem} (1){path.suffix}"),
}
"""How a file is damaged, by name."""

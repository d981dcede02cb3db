"""What of D numbers a stored row keeps: chosen parameters, and these folded to fewer numbers.

A parameter of s numbers that may keep k of them is folded: with random signs e_a = +-1

    kept[c] = sum over a = c, c + k, c + 2k, ...  of  e_a x[a]

which is linear, costs one pass over the row and keeps inner products in expectation,

    E <fold(x), fold(y)> = <x, y>,     variance at most (|x|^2 |y|^2 + <x, y>^2) / k

A parameter of at most k numbers stays as it is, so that the error comes from the large ones alone. k is the same for all
of them (the variance of the sum is smallest so where their gradients are of one size, whatever their number of entries), a
prime, so that what meets in a sum does not stand in one column of a matrix; and as large as the row's budget allows.
Letters: R rows, D parameters, s numbers of a parameter of which k are kept.
"""

from __future__ import annotations

import fnmatch
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.errors import SpecError
from ...storage.trajectory import ParameterEntry


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One parameter in a row.

    Attributes:
        entry: Its number in the layout.
        size: s.
        kept: k; s where it is not folded.
        start: Its first column in the row.
    """

    entry: int
    size: int
    kept: int
    start: int

    @property
    def folded(self) -> bool:
        """Whether it is kept in fewer numbers than it has."""
        return self.kept < self.size

    @property
    def span(self) -> slice:
        """Its columns in the row."""
        return slice(self.start, self.start + self.kept)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowMap:
    """A linear map from the flat vector to the columns of stored rows; see above.

    Attributes:
        entries: All parameters of the flat vector.
        parts: Those that are kept, in their order.
        seed: Of the signs.
    """

    entries: tuple[ParameterEntry, ...]
    parts: tuple[Part, ...]
    seed: int

    @classmethod
    def of(
        cls,
        entries: Sequence[ParameterEntry],
        layers: Sequence[str] | None,
        project: int | None,
        seed: int,
    ) -> RowMap | None:
        """Return the map of a run; None where rows are the flat vector.

        Args:
            entries: All parameters of the flat vector.
            layers: Patterns over their names, see `chosen`; None: all of them.
            project: Most numbers of a row; None: as many as there are.
            seed: Of the training: another has other signs.

        Raises:
            SpecError: A pattern fits no parameter, or a row is not longer than ``project``.
        """
        if layers is None and project is None:
            return None
        picked = chosen([entry.name for entry in entries], layers)
        sizes = [math.prod(entries[i].shape) for i in picked]
        if project is not None and project >= sum(sizes):
            raise SpecError(
                f"project {project:,}: a row has {sum(sizes):,} numbers and cannot be projected to as many; leave it out, or "
                "use a smaller number"
            )
        if project is not None and project < len(sizes):
            raise SpecError(
                f"project {project:,}: {len(sizes):,} parameters are kept, each in at least one number; use {len(sizes):,} or more"
            )
        most = None if project is None else _budget(sizes, project)
        parts, start = [], 0
        for i, size in zip(picked, sizes, strict=True):
            kept = size if most is None or size <= most else _prime(most)
            parts.append(Part(entry=i, size=size, kept=kept, start=start))
            start += kept
        return cls(entries=tuple(entries), parts=tuple(parts), seed=seed)

    @property
    def columns(self) -> int:
        """Numbers of a row."""
        last = self.parts[-1]
        return last.start + last.kept

    @property
    def folds(self) -> bool:
        """Whether any parameter is folded: inner products are then kept in expectation only."""
        return any(part.folded for part in self.parts)

    @property
    def picked(self) -> frozenset[int]:
        """Numbers of the parameters that are kept."""
        return frozenset(part.entry for part in self.parts)

    @property
    def whole(self) -> RowMap:
        """The same parameters, not folded."""
        parts, start = [], 0
        for part in self.parts:
            parts.append(Part(entry=part.entry, size=part.size, kept=part.size, start=start))
            start += part.size
        return RowMap(entries=self.entries, parts=tuple(parts), seed=self.seed)

    def kept_entries(self) -> tuple[ParameterEntry, ...]:
        """Return where each kept parameter lies in a row."""
        found = []
        for part in self.parts:
            entry = self.entries[part.entry]
            shape = (part.kept,) if part.folded else entry.shape
            found.append(ParameterEntry(name=entry.name, shape=shape, group=entry.group, start=part.start))
        return tuple(found)

    def told(self) -> dict[str, Any]:
        """Return what a store says of its rows, JSON-able: enough to make one by hand."""
        return {
            "seed": self.seed,
            "parameters": [
                {"name": self.entries[part.entry].name, "size": part.size, "kept": part.kept}
                for part in self.parts
            ],
        }

    def signs(self, part: Part) -> npt.NDArray[np.int8]:
        """Return e_a of a folded parameter, (s,): bits of PCG64 seeded by the run's seed and the parameter's name."""
        text = f"{self.seed}/{self.entries[part.entry].name}".encode()
        generator = np.random.PCG64(int.from_bytes(hashlib.sha256(text).digest()[:16], "little"))
        words = generator.random_raw(-(-part.size // 64)).astype("<u8")
        bits = np.unpackbits(words.view(np.uint8), count=part.size)
        return (bits.astype(np.int8) << 1) - 1

    def expand(self, rows_RK: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Return rows of the flat vector, (R, D), zero where nothing is kept; not of folded ones."""
        assert not self.folds
        out = np.zeros((len(rows_RK), _end(self.entries)), dtype=rows_RK.dtype)
        for part in self.parts:
            start = self.entries[part.entry].start
            out[:, start : start + part.size] = rows_RK[:, part.span]
        return out

    def apply_part(self, k: int, values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """Return what is kept of one parameter's values, (s,); ``k`` counts the parts."""
        part = self.parts[k]
        if not part.folded:
            return values
        padded = np.zeros(-(-part.size // part.kept) * part.kept)
        padded[: part.size] = values * self.signs(part)
        found: npt.NDArray[np.float64] = padded.reshape(-1, part.kept).sum(0)
        return found

    def apply(self, rows_RD: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """Return rows on the host as they are kept, (R, columns)."""
        rows = torch.from_numpy(np.array(rows_RD))
        found: npt.NDArray[np.floating] = Folds(self, rows.dtype, rows.device).apply_(rows).numpy()
        return found


class Folds:
    """Applies a `RowMap` to blocks of rows, a tile at a time.

    Elementwise operations alone, in a fixed order: a row's bits do not depend on the others.

    Args:
        row_map: The map.
        dtype: Of the rows.
        device: Where they are.
        columns: First column of each parameter in the blocks; None: its place in the flat vector.
    """

    def __init__(
        self,
        row_map: RowMap,
        dtype: torch.dtype,
        device: torch.device,
        columns: Sequence[int | None] | None = None,
    ) -> None:
        self.row_map = row_map
        starts = [entry.start for entry in row_map.entries] if columns is None else columns
        self._from: list[int] = []
        for part in row_map.parts:
            start = starts[part.entry]
            assert start is not None, part
            self._from.append(start)
        self._signs = [
            torch.from_numpy(row_map.signs(part)).to(device=device, dtype=dtype) if part.folded else None
            for part in row_map.parts
        ]

    def apply_(self, block: Tensor) -> Tensor:
        """Return rows (R, columns) as they are kept; the block (R, width) is overwritten."""
        out = block.new_empty(len(block), self.row_map.columns)
        for part, start, signs in zip(self.row_map.parts, self._from, self._signs, strict=True):
            values = block[:, start : start + part.size]
            if signs is None:
                out[:, part.span] = values
                continue
            values *= signs
            self._fold(values, part.kept, out[:, part.span])
        return out

    @staticmethod
    def _fold(values: Tensor, kept: int, out: Tensor) -> None:
        """Add up the columns c, c + k, c + 2k, ...: halves onto halves, so that few operations do it."""
        count, rest = divmod(values.shape[1], kept)
        layers = values[:, : count * kept].unflatten(1, (count, kept))
        while count > 1:
            half = count // 2
            layers[:, :half] += layers[:, count - half : count]
            count -= half
        out.copy_(layers[:, 0])
        if rest:
            out[:, :rest] += values[:, values.shape[1] - rest :]


def chosen(names: Sequence[str], layers: Sequence[str] | None) -> list[int]:
    """Return which parameters patterns choose.

    Args:
        names: Of all parameters.
        layers: Patterns as of a shell (``*``, ``?``, ``[...]``) over their names; the name of a module stands for all
            parameters below it. None: all.

    Raises:
        SpecError: A pattern fits none; names those there are.
    """
    if layers is None:
        return list(range(len(names)))
    found: set[int] = set()
    for pattern in layers:
        fits = {
            k
            for k, name in enumerate(names)
            if fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")
        }
        if not fits:
            shown = ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
            raise SpecError(f"layers {pattern!r}: fits no parameter of the model; it has {shown}")
        found |= fits
    return sorted(found)


def _budget(sizes: Sequence[int], project: int) -> int:
    """Return the most numbers that each parameter may keep so that all keep at most ``project``."""
    low, high = 1, max(sizes)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(size, middle) for size in sizes) <= project:
            low = middle
        else:
            high = middle - 1
    return low


def _prime(most: int) -> int:
    """Return the largest prime that is not above ``most``; 1 where there is none."""
    while most > 2 and any(most % n == 0 for n in range(2, math.isqrt(most) + 1)):
        most -= 1
    return most


def _end(entries: Sequence[ParameterEntry]) -> int:
    last = entries[-1]
    return last.start + math.prod(last.shape)

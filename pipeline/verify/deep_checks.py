"""What ``verify --deep`` draws, reads and compares: samples, deviations, limits.

Letters: n sampled training samples, Q sampled test samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...storage.rows import RowStore

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Where = Callable[[int, int], str]
Limits = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One comparison.

    Attributes:
        method: The method; ``record`` and ``test gradients`` belong to all.
        check: What is compared.
        values: How many numbers.
        deviation: The largest, relative to the largest number (rows: norms) of the reference.
        limit: What it is held against.
        where: The sample it was found at.
    """

    method: str
    check: str
    values: int
    deviation: float
    limit: float
    where: str

    @property
    def ok(self) -> bool:
        """Whether the deviation is within its limit; NaN is not."""
        return self.deviation <= self.limit


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepVerification:
    """What ``verify_deep`` found.

    Attributes:
        run: Where the run is.
        train_index: The sampled training samples, (n,).
        test_index: The sampled test samples, (Q,).
        steps: Steps that were replayed.
        products: Hessian products taken.
        checks: One a comparison.
        notes: What is not covered, one line each.
        seconds: Wall time of everything.
    """

    run: str
    train_index: tuple[int, ...]
    test_index: tuple[int, ...]
    steps: int
    products: int
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether every check is within its limit."""
        return all(check.ok for check in self.checks)

    @property
    def problems(self) -> tuple[str, ...]:
        """One line a check that is not within its limit."""
        return tuple(
            f"{check.method}: {check.check} differ by {check.deviation:.1e} from the dense form in float64, "
            f"the limit is {check.limit:.0e}; most at {check.where}"
            for check in self.checks
            if not check.ok
        )


class Findings:
    """Collects checks.

    Args:
        dtype: Of the run: which limit holds.
        samples: Train indices, (n,).
        tests: Test indices, (Q,).
    """

    def __init__(self, dtype: str, samples: Integers, tests: Integers) -> None:
        self.dtype, self.samples, self.tests = dtype, samples, tests
        self.checks: list[Check] = []

    def rows(
        self,
        method: str,
        check: str,
        found: Floats,
        right: Floats,
        limits: Limits,
        where: Where,
        floor: float = 0.0,
    ) -> None:
        """Compare vectors, one a row, by the norm of their difference, relative to the largest or ``floor``."""
        distance = np.linalg.norm(found - right, axis=1)[:, None]
        scale = max(float(np.linalg.norm(right, axis=1).max()), floor)
        self._note(method, check, found.size, distance, scale, limits, where)

    def numbers(
        self,
        method: str,
        check: str,
        found: Floats,
        right: Floats,
        limits: Limits,
        where: Where,
        scale: float | None = None,
    ) -> None:
        """Compare numbers one by one, relative to ``scale`` or to the largest of ``right``."""
        scale = float(np.abs(right).max()) if scale is None else scale
        self._note(method, check, found.size, np.abs(found - right), scale, limits, where)

    def limit(self, method: str, check: str, deviation: float, limit: float) -> None:
        """Note a deviation that was measured elsewhere."""
        self.checks.append(
            Check(method=method, check=check, values=1, deviation=deviation, limit=limit, where="a product")
        )

    def _note(
        self,
        method: str,
        check: str,
        values: int,
        distance: Floats,
        scale: float,
        limits: Limits,
        where: Where,
    ) -> None:
        row, column = np.unravel_index(int(distance.argmax()), distance.shape)  # the first NaN, if any
        largest = float(distance[row, column])
        self.checks.append(
            Check(
                method=method,
                check=check,
                values=values,
                deviation=largest / scale if scale else (0.0 if largest == 0.0 else math.inf),
                limit=limits[self.dtype],
                where=where(int(row), int(column)),
            )
        )

    def sample(self, row: int, _column: int) -> str:
        """Name a training sample."""
        return f"train_index {self.samples[row]}"

    def test(self, row: int, _column: int) -> str:
        """Name a test sample."""
        return f"test_index {self.tests[row]}"

    def pair(self, row: int, column: int) -> str:
        """Name a training and a test sample."""
        return f"train_index {self.samples[row]}, test_index {self.tests[column]}"

    def direction(self, row: int, column: int) -> str:
        """Name a training sample and a direction."""
        return f"train_index {self.samples[row]}, direction {column}"


def spread(spans: Sequence[tuple[int, int]], count: int, generator: np.random.Generator) -> Integers:
    """Draw ``count`` positions (fewer where there are none left), a round through the spans at a time."""
    waiting = [generator.permutation(np.arange(*span)).tolist() for span in spans]
    order = generator.permutation(len(waiting)).tolist()
    found: list[int] = []
    while len(found) < count and any(waiting):
        for k in order:
            if waiting[k] and len(found) < count:
                found.append(waiting[k].pop())
    return np.sort(np.array(found, dtype=np.int64))


def rows_of(store: RowStore, positions: Integers) -> Floats:
    """Return the given rows of a store in float64."""
    return np.concatenate([store.read(int(k), int(k) + 1) for k in positions]).astype(np.float64)

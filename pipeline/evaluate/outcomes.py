"""What an evaluation has in hand: samples and labels of the run, and what retrainings gave.

Letters: U retrainings, n tracked training samples, M test samples, Q targets: those test samples, or
their classes or their mean where a method has no finer ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...storage import layout
from ...storage.errors import InputError
from ...storage.rundir import RunDirectory
from ..reading.panels import targets, tested
from ..spec.targets import coarsened, target_set
from ..units.retrain import read_part
from ..vocabulary import SAMPLES
from .scores import predict
from .trials import Trial

if TYPE_CHECKING:
    from ..reading.reader import Reader

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Evidence:
    """The numbers that scores are computed from.

    Args:
        run: The run.
        tracked: Train indices, (n,).
        tests: Test indices, (M,).
        baseline: Unit of the retraining that changed nothing.
        methods: Whose coarsest targets are those that changes and predictions are given for.
        places: Runs with different seeds whose retrainings are averaged, ``run`` itself first.

    Attributes:
        targets: Those targets.
        loss: Test losses after each trial, (U, M); set by `load`.
        accuracy: Share of right predictions after each trial, (U,), NaN where unknown.
        base_loss: Test losses of the record, (M,).
        base_accuracy: Its share of right predictions.
        final_loss: Each tracked sample's loss at w_T, (n,).
        mean_loss: Its loss averaged over its visits during training, (n,).
        wrong: Whether its label is wrong on purpose, (n,); None where the run does not know.
    """

    def __init__(
        self,
        run: Reader,
        tracked: Integers,
        tests: Integers,
        baseline: str,
        methods: Sequence[str],
        places: Sequence[RunDirectory],
    ) -> None:
        self.run, self.tracked, self.tests, self.places = run, tracked, tests, list(places)
        kind = run.noted.coarsest(methods)
        labels = np.full(len(tests), -1) if kind == SAMPLES else run.test_gradients().column("label")
        self.targets, self._of_tests = coarsened(target_set(SAMPLES, tests, labels), kind)
        self.base_loss, self.base_accuracy = self._outcome(baseline)
        own = [read_part(place, layout.TRAINING_LOSS, baseline) for place in self.places]
        self.final_loss: Floats = np.mean([table["final_loss"].to_numpy() for table in own], axis=0)
        self.mean_loss: Floats = np.mean([table["mean_loss"].to_numpy() for table in own], axis=0)
        noisy = run.noisy()
        self.wrong = None if noisy is None else np.isin(tracked, noisy[0])
        self.trials: list[Trial] = []
        self.loss: Floats = np.empty((0, len(tests)))
        self.accuracy: Floats = np.empty(0)
        # Contributions are read once a method, for all trials together.
        self._predicted: Callable[[str], Floats] = cache(self._predict)
        self._samples = cache(run.samples)

    def load(self, trials: Sequence[Trial]) -> None:
        """Read the results of the trials, all of which are committed."""
        self.trials = list(trials)
        found: dict[str, tuple[Floats, float]] = {}
        for unit in {trial.change.unit for trial in trials}:
            found[unit] = self._outcome(unit)
        rows = [found[trial.change.unit] for trial in trials]
        self.loss = np.array([loss for loss, _ in rows]).reshape(len(rows), len(self.tests))
        self.accuracy = np.array([accuracy for _, accuracy in rows])

    def contribution(self, method: str) -> Floats:
        """Return C(i) of a method, (n,)."""
        values: Floats = self._samples(method)["contribution"].to_numpy()
        return values

    def spread(self, method: str) -> Floats:
        """Return the standard deviation of C(i, j) over the method's own targets, (n,)."""
        values: Floats = self._samples(method)["contribution_std"].to_numpy()
        return values

    def rows(self, kind: str, **labels: object) -> list[int]:
        """Return the positions of the trials of a kind with the given labels."""
        return [
            u
            for u, trial in enumerate(self.trials)
            if trial.kind == kind and all(trial.labels.get(k) == v for k, v in labels.items())
        ]

    def values(self, kind: str, label: str) -> list[float]:
        """Return the different values of a label among the trials of a kind, ascending."""
        return sorted({t.labels[label] for t in self.trials if t.kind == kind})

    def change(self, rows: Sequence[int]) -> Floats:
        """Return how the targets' losses really changed in the given trials, (rows, Q)."""
        change = self.loss[list(rows)] - self.base_loss
        return change if self._of_tests is None else change @ self._of_tests

    def predicted(self, method: str, rows: Sequence[int]) -> Floats:
        """Return how a method says they changed, (rows, Q)."""
        return self._predicted(method)[list(rows)]

    def mean(self, change_RQ: Floats) -> Floats:
        """Return the mean over the test samples of changes of the targets' losses, (R,)."""
        return change_RQ.mean(1) if self._of_tests is None else change_RQ @ self.targets.weight

    def _predict(self, method: str) -> Floats:
        found = predict(self.run, method, self._taken())
        _, weight = coarsened(targets(self.run, method), self.targets.kind)
        return found if weight is None else found @ weight

    def _outcome(self, unit: str) -> tuple[Floats, float]:
        """Return test losses (M,) and accuracy after a retraining, means over the seeds."""
        tables = [read_part(place, layout.LOSSES, unit) for place in self.places]
        losses = np.mean([table["loss"].to_numpy() for table in tables], axis=0)
        return losses, float(np.mean([_accuracy(table["correct"].to_numpy()) for table in tables]))

    def _taken(self) -> Floats:
        n_train = self.run.noted.training_size
        rows = [1 - trial.change.weights(n_train)[self.tracked] for trial in self.trials]
        return np.array(rows).reshape(len(rows), len(self.tracked))


def tracked_samples(run: Reader, methods: Sequence[str]) -> tuple[Integers, Integers]:
    """Return (tracked train indices, test indices), which all ``methods`` must share.

    Raises:
        InputError: They do not.
    """
    tracked = run.samples(methods[0])["train_index"].to_numpy().astype(np.int64)
    for method in methods[1:]:
        if not np.array_equal(run.samples(method)["train_index"].to_numpy(), tracked):
            raise InputError(
                f"{method} and {methods[0]} do not have the same training samples; evaluate them one by one "
                "with --methods"
            )
    return tracked, tested(run, methods[0])


def _accuracy(correct: npt.NDArray[np.int8]) -> float:
    known = correct[correct >= 0]
    return float(known.mean()) if len(known) else float("nan")

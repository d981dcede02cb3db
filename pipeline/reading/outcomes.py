"""Whether a decision helped: what retrainings with and without it gave, as stored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...storage import layout
from ...storage.documents import load
from ...storage.typed import from_json
from ..vocabulary import CLEAN_OUTCOME

if TYPE_CHECKING:
    from .reader import Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """A mean over seeds.

    Attributes:
        mean: Over the seeds.
        std: Sample standard deviation (divisor K - 1); None: one seed.
        low, high: Ends of its 95% interval by Student's t; None: one seed.
    """

    mean: float
    std: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class ArmOutcome:
    """One way to treat the training samples, trained with every seed.

    Attributes:
        arm: ``before``, ``cleaned``, ``random``, ``loss``, ``margin``, ``exact`` or, of the papers' reading,
            ``true-labels`` and ``random-true-labels``.
        samples: Trained on, mean over the seeds.
        accuracy: After the last epoch, on the samples that judge; None: unknown.
        loss: Likewise.
        accuracies, losses: Of each seed.
        to_before, to_random: Difference of accuracies (of losses where there are none) to these arms, seed by seed;
            None: it is that arm.
    """

    arm: str
    samples: float
    loss: Spread
    losses: tuple[float, ...]
    accuracy: Spread | None = None
    accuracies: tuple[float, ...] = ()
    to_before: Spread | None = None
    to_random: Spread | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What retrainings say of a decision.

    Attributes:
        decision: Its name.
        way: How they trained; see ``workers.training.retrain``.
        seeds: Of the retrainings.
        judging: How many test samples judge.
        trust: Whether they are apart from those that selected, one sentence.
        arms: In the order of `ArmOutcome.arm`.
        notes: Arms that are left out, and why; what the numbers mean.
    """

    decision: str
    way: str
    seeds: tuple[int, ...]
    judging: int
    trust: str
    arms: tuple[ArmOutcome, ...]
    notes: tuple[str, ...] = ()


def read_outcome(run: Reader, name: str) -> Outcome | None:
    """Return what retrainings said of a decision of a run; None: it was not retrained."""
    if name not in run.directory.units(CLEAN_OUTCOME):
        return None
    address = run.directory.path(layout.decision(name, layout.OUTCOME_SUMMARY))
    return from_json(Outcome, load(run.directory.vouched(address), address), address)

"""What a detector is given (`Case`), what it gives back (`Scores`), and how it is named (`Scorer`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from ...storage.errors import EstimatorError, IncompleteStage, InputError

if TYPE_CHECKING:
    from ..reading.reader import Reader
    from .passes import Passes

UNSERVED = (InputError, IncompleteStage, EstimatorError)
"""What a detector raises that cannot judge a run as it stands."""

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Booleans = npt.NDArray[np.bool_]

Needs = Literal["record", "contributions", "outputs", "gradients"]
"""What a detector looks at: statistics of the record, C(i, j), the trained model's outputs, or gradients (the last
two are computed, from the recipe)."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Scores:
    """What a detector says of the judged samples.

    Attributes:
        suspicion: (n,) float64, high = bad, on the detector's own scale; NaN: it cannot say.
        suggested: (n,) int64 label it would give instead, -1 where it suggests none.
        quality: (n,) in 0 .. 1, low = bad; None: by rank.
        reason: One short sentence a sample, or None: made from the suspicion.
        notes: What should be known of how the scores were had, JSON-able.
    """

    suspicion: Floats
    suggested: Integers
    quality: Floats | None = None
    reason: Sequence[str] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Case:
    """A run to be judged.

    Attributes:
        run: The run.
        tracked: Train indices that are judged, ascending, (n,).
        given: Their labels, (n,), -1 where there is none.
        method: Whose contributions and hypergradients are looked at; None: the run has none complete.
        selecting: Positions among the method's targets that may be looked at; None: all.
        passes: What can be computed from the recipe.
        options: Of the detectors.
        shared: What one detector computed and others use, too, by a name of its own.
    """

    run: Reader
    tracked: Integers
    given: Integers
    method: str | None
    selecting: Integers | None
    passes: Passes
    options: Options
    shared: dict[str, object] = field(default_factory=dict)

    @property
    def n(self) -> int:
        """How many samples are judged."""
        return len(self.tracked)


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of the detectors.

    Attributes:
        layer: Of ``outlier-gradient``: ``last``, ``all`` or the name of a parameter or module.
        scorer: Of ``outlier-gradient``: ``l1``, ``l2`` or ``iforest``.
        per_class: Of ``outlier-gradient``: an outlier within its given class, not among all.
        normalise: Of ``outlier-gradient``: ``none``, or ``unit`` gradients.
        rows: Of ``outlier-gradient``: ``gradients`` at the trained weights, or stored ``hypergradients``.
        clusters: Of ``cluster``: ``kmeans`` or ``average`` linkage.
        wrong_cluster: Of ``cluster``: which of a class's two is called wrong: that of more ``harm`` to single test
            samples, the ``smaller`` one, or that of lower mean ``contribution`` to the test samples of its class.
        neighbours: Of ``knn``.
        seed: Of every random choice.
    """

    layer: str = "last"
    scorer: Literal["l1", "l2", "iforest"] = "l2"
    per_class: bool = False
    normalise: Literal["none", "unit"] = "none"
    rows: Literal["gradients", "hypergradients"] = "gradients"
    clusters: Literal["kmeans", "average"] = "kmeans"
    wrong_cluster: Literal["harm", "smaller", "contribution"] = "harm"
    neighbours: int = 10
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """A detector, as ``--by`` names it.

    Attributes:
        name: What ``--by`` says.
        needs: What it looks at.
        what: What it does, in a few words.
        score: Judges a case.
        options: Which fields of `Options` it reads; those that differ from the default enter the detection's name.
    """

    name: str
    needs: Needs
    what: str
    score: Callable[[Case], Scores]
    options: tuple[str, ...] = ()

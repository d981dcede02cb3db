"""The detectors, by the names that ``--by`` takes."""

from __future__ import annotations

from .case import Scorer
from .cluster import cluster
from .contributions import contribution, harm, harmed_class
from .gradients import OUTLIER_GRADIENT, SELF_INFLUENCE, SELF_TRACIN
from .joint import joint
from .outputs import KNN
from .visits import BY_VISITS

_CONTRIBUTIONS = (
    Scorer(
        name="harmed-class",
        needs="contributions",
        what="harm to the class of test samples that it harms most, which it suggests as label",
        score=harmed_class,
    ),
    Scorer(
        name="harm",
        needs="contributions",
        what="harm to single test samples, the good done elsewhere left out",
        score=harm,
    ),
    Scorer(
        name="contribution",
        needs="contributions",
        what="lowest C(i), the mean over the test samples",
        score=contribution,
    ),
    Scorer(
        name="cluster",
        needs="contributions",
        what="two clusters of signs of contributions within each given class",
        score=cluster,
        options=("clusters", "wrong_cluster", "seed"),
    ),
)

JOINT = Scorer(
    name="joint",
    needs="contributions",
    what="mean margin, neighbours and harm to the class harmed most, joined",
    score=joint,
    options=("neighbours",),
)

SCORERS: dict[str, Scorer] = {
    scorer.name: scorer
    for scorer in (JOINT, *BY_VISITS, KNN, *_CONTRIBUTIONS, SELF_INFLUENCE, SELF_TRACIN, OUTLIER_GRADIENT)
}
"""In the order in which people are shown them."""

"""The labels of a run's whole training set: from its recipe, or from what the run itself says of every sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...workers.data.user_code import user_code
from ...workers.determinism import preserved_generators, seed_everything
from ...workers.recipe import Recipe
from ...workers.recipes import BUILT_IN
from ..executors.events import Observer
from ..plan.provenance import check_named
from ..plan.stored_spec import REPEATED, stored_spec
from ..plan.survey import Survey, survey
from ..reading.detections import Detection
from ..reading.reader import Reader
from ..spec.spec import RunSpec

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Data:
    """What a run was trained on.

    Attributes:
        given: Labels, (N,), -1: none.
        source: Place of each training sample in the user's files, (N,), -1: not known.
        n_test: M.
        seed: Of the run.
        spec: Where and how work is done; None: there is no recipe.
        surveyed: The recipe; None: likewise.
        notes: What is not known, one line each.
    """

    given: Integers
    source: Integers
    n_test: int
    seed: int
    spec: RunSpec | None
    surveyed: Survey | None
    notes: tuple[str, ...]


def data_of_run(
    run: Reader,
    recipe: Recipe | str | None,
    detection: Detection | None,
    overrides: Mapping[str, Any],
    observer: Observer,
    *,
    needed: bool,
) -> Data:
    """Return the labels of a run's training samples.

    Args:
        run: The run.
        recipe: What it was made from; None: found where it is built in.
        detection: May know the label of every sample.
        overrides: Fields of `RunSpec` that say where the work is done.
        observer: Hears of a cosmetic change of the recipe.
        needed: Whether the recipe itself is needed.

    Raises:
        InputError: The recipe has to be named.
        SpecMismatch: It is not the one that the run was made from.
    """
    if recipe is None and not needed and run.noted.identity.get("recipe") not in BUILT_IN:
        labels = _known_labels(run, detection)
        if labels is not None:
            return Data(
                given=labels,
                source=np.full(len(labels), -1, dtype=np.int64),
                n_test=run.noted.n_test or 0,
                seed=0,
                spec=None,
                surveyed=None,
                notes=("labels are those of the run; source_index is not known without the recipe",),
            )
    spec = stored_spec(run, recipe, overrides, command="clean", free=REPEATED)
    surveyed = survey(replace(spec, track="all", test="all"), trial=False)
    check_named(run.uri, run.noted, spec, surveyed.made_of, observer)
    return Data(
        given=surveyed.train_labels,
        source=source_index(surveyed.recipe, surveyed.n_train),
        n_test=surveyed.n_test,
        seed=surveyed.recipe.seed,
        spec=spec,
        surveyed=surveyed,
        notes=(),
    )


def _known_labels(run: Reader, detection: Detection | None) -> Integers | None:
    """Return the labels of all N samples where the run knows them: all were judged, or all are tracked."""
    count = run.noted.training_size
    if detection is not None and len(detection.table) == count:
        index = detection.table["train_index"].to_numpy()
        labels = detection.table["given_label"].to_numpy().astype(np.int64)
        found: Integers = labels[np.argsort(index, kind="stable")]
        return found
    for method in run.methods():
        table = run.samples(method)
        if len(table) == count:
            return np.asarray(table["label"].to_numpy(), dtype=np.int64)
    return None


def source_index(recipe: Recipe, count: int) -> Integers:
    """Return the training dataset's own ``source_index``, (N,); -1 where it has none."""
    with preserved_generators(), user_code(f"{recipe.name}.train_dataset() failed:", always=True):
        seed_everything(recipe.seed)
        values = getattr(recipe.train_dataset(), "source_index", None)
    unknown = np.full(count, -1, dtype=np.int64)
    if values is None or callable(values):
        return unknown
    found = np.asarray(values)
    return (
        found.astype(np.int64)
        if found.shape == (count,) and np.issubdtype(found.dtype, np.integer)
        else unknown
    )

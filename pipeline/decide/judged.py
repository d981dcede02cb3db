"""What is judged: the tracked samples and their given labels, which of them are known to be wrong, and the test halves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ...storage.errors import InputError, SpecError
from ..executors.events import Note, Observer
from ..reading.panels import targets
from ..spec.selection import select
from ..vocabulary import SAMPLES
from .case import Integers
from .measures import Truth

if TYPE_CHECKING:
    from ...workers.recipe import Recipe
    from ..reading.reader import Reader


def judged_samples(
    run: Reader, recipe: Recipe | str | None, observer: Observer, given: Mapping[str, Any]
) -> tuple[Integers, Integers]:
    """Return train indices, ascending, and given labels (-1: none) of the tracked samples, (n,) each.

    They lie in a run once a method of it is reduced. Before that the recipe is asked, and the observer told so.

    Raises:
        InputError: The recipe has to be named, or is not what the run was made from.
    """
    complete = run.methods()
    if complete:
        table = run.samples(complete[0])
        return (
            table["train_index"].to_numpy().astype(np.int64),
            table["label"].to_numpy().astype(np.int64),
        )
    # Here, because they load torch, which nothing else that reads a run needs.
    from ...workers.determinism import restored_process
    from ..plan.provenance import check_named
    from ..plan.stored_spec import REPEATED, stored_spec
    from ..plan.survey import survey

    run.trajectory()  # whatever is detected needs the record
    spec = stored_spec(run, recipe, given, command="detect", free=REPEATED)
    with restored_process():
        surveyed = survey(spec, trial=False)
    if run.noted.made_of:
        check_named(run.uri, run.noted, spec, surveyed.made_of, observer)
    observer(
        Note(
            message=f"{run.uri} holds no table of samples yet: which are tracked and their labels are the recipe's"
        )
    )
    return surveyed.tracked, surveyed.train_labels[surveyed.tracked]


def known_truth(
    run: Reader, truth: str | os.PathLike[str] | Sequence[int] | None, tracked: Integers
) -> Truth | None:
    """Return which judged labels are wrong; None where nobody says.

    Args:
        run: A run of a recipe with label noise says so itself.
        truth: A file of train indices, one a line, or the indices: these are wrong, and the others right.
        tracked: Train indices that are judged, ascending, (n,).

    Raises:
        SpecError: The file is not there or names what is not in the training set.
    """
    original = np.full(len(tracked), -1, dtype=np.int64)
    noise = run.noisy()
    if noise is not None and len(noise[0]):
        at = np.searchsorted(tracked, noise[0])
        inside = at < len(tracked)
        inside[inside] = tracked[at[inside]] == noise[0][inside]
        original[at[inside]] = noise[1][inside]
    if truth is None:
        if noise is None:
            return None
        return Truth(wrong=np.isin(tracked, noise[0]), original=original, source="the recipe's label noise")
    if isinstance(truth, str | os.PathLike):
        path = Path(truth).expanduser()
        if not path.is_file():
            raise SpecError(f"--truth {truth}: no such file; give a text file with one train index a line")
        chosen = select(
            str(path.absolute()), total=run.noted.training_size, labels=None, seed=0, what="--truth"
        )
        source = path.name
    else:
        chosen = select(truth, total=run.noted.training_size, labels=None, seed=0, what="--truth")
        source = "given indices"
    return Truth(wrong=np.isin(tracked, chosen), original=original, source=source)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Halves:
    """A method's test samples, parted in two.

    Attributes:
        selecting: Positions among the targets that detectors may look at, ascending.
        selecting_tests: Their test indices.
        judging_tests: Test indices of the others.
        seed: Which halves.
    """

    selecting: Integers
    selecting_tests: tuple[int, ...]
    judging_tests: tuple[int, ...]
    seed: int


def halves(run: Reader, method: str, seed: int) -> Halves:
    """Part a method's test samples in two.

    Stratified by label: of each class half, the odd one alternating.

    Raises:
        InputError: The method's targets are no test samples, or there are fewer than 2.
    """
    own = targets(run, method)
    if own.kind != SAMPLES:
        raise InputError(
            f"--split parts test samples in halves, and {method} of {run.uri} has targets {own.kind!r}; name a "
            "method with targets 'samples', or leave --split out"
        )
    if len(own) < 2:
        raise InputError(
            f"--split: {run.uri} has {len(own)} test sample, and 2 halves need at least 2; leave --split out"
        )
    draw = np.random.Generator(np.random.PCG64(seed))
    selecting: list[Integers] = []
    odd = 1
    for label in np.unique(own.label):
        members = draw.permutation(np.flatnonzero(own.label == label))
        half = (len(members) + (odd if len(members) % 2 else 0)) // 2
        odd = 1 - odd if len(members) % 2 else odd
        selecting.append(members[:half])
    first = np.sort(np.concatenate(selecting))
    return Halves(
        selecting=first,
        selecting_tests=tuple(own.test_index[first].tolist()),
        judging_tests=tuple(np.delete(own.test_index, first).tolist()),
        seed=seed,
    )

"""Explain: which training samples speak for and against a prediction, and what one of them did to all tests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...storage.errors import InputError
from ...storage.files import write_bytes
from ..reading.detections import Detection
from ..reading.reader import Reader, open_reader
from ..spec.selection import select
from .answers import Answers
from .chosen import chosen_detection
from .explanation import Explanation, SampleFacts
from .looks import Looks, looking
from .pictures import png

if TYPE_CHECKING:
    from ...workers.recipe import Recipe


MOST = 2**31 - 1
"""Test samples of a run that does not say how many its dataset has."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What is to be explained: exactly one of the four.

    Attributes:
        test: A test_index.
        train: A train_index.
        classes: (training class, test class).
        sets: (train indices, test indices).

    Raises:
        InputError: None of them is given, or more than one.
    """

    test: int | None = None
    train: int | None = None
    classes: tuple[int, int] | None = None
    sets: tuple[Sequence[int], Sequence[int]] | None = None

    def __post_init__(self) -> None:
        given = [name for name in ("test", "train", "classes", "sets") if getattr(self, name) is not None]
        if len(given) != 1:
            told = f"{' and '.join(given)} are asked" if given else "nothing is asked"
            raise InputError(
                f"{told}; ask one thing: test (--test J), train (--train I), classes (--classes A,B), or "
                "both sets (--train-set FILE --test-set FILE)"
            )


def explain(
    run: Reader | str,
    recipe: Recipe | str | None = None,
    *,
    test: int | None = None,
    train: int | None = None,
    classes: tuple[int, int] | None = None,
    train_set: Sequence[int] | str | None = None,
    test_set: Sequence[int] | str | None = None,
    k: int = 5,
    method: str | None = None,
    detection: str | None = None,
    pictures: str | None = None,
    **given: Any,
) -> Explanation:
    """Say what contributions make of a prediction, a training sample, two classes or two sets.

    Args:
        run: The run, or where it is.
        recipe: What it was made from, for pictures and confidences. A built-in one is found by itself; another
            is used only where it is named.
        test: A test_index: whose prediction is explained.
        train: A train_index: what it did to every test sample.
        classes: (training class, test class): the sum of what the one did to the other.
        train_set: Train indices, or a file of them (one a line), with ``test_set``: the sum of what these did
            to those.
        test_set: Test indices, likewise.
        k: How many of the largest and of the smallest contributions.
        method: The estimator; the run's default when None.
        detection: Whose ranks are shown; the run's best when None.
        pictures: Local directory into which the pictures of the samples are written, as PNG.
        given: ``recipe_args``, where they are not the run's.

    Raises:
        InputError: Not one thing is asked, or the run does not hold it.
        IncompleteStage: The method is not complete, or there is no such detection.
        RecipeError: The recipe that was named does not work.
    """
    opened = run if isinstance(run, Reader) else open_reader(run)
    asked = asked_of(opened, test=test, train=train, classes=classes, train_set=train_set, test_set=test_set)
    with looking(opened, recipe, command="explain", given=given) as looks:
        found = explained(opened, looks, asked, k=k, method=method, detection=detection)
        return found if pictures is None else with_pictures(found, looks, pictures)


def asked_of(
    run: Reader,
    *,
    test: int | None = None,
    train: int | None = None,
    classes: tuple[int, int] | None = None,
    train_set: Sequence[int] | str | None = None,
    test_set: Sequence[int] | str | None = None,
) -> Asked:
    """Return what is to be explained, sets read from their files; see `explain`."""
    if (train_set is None) != (test_set is None):
        alone = "train_set" if test_set is None else "test_set"
        raise InputError(
            f"{alone} is given alone; give both train_set and test_set (--train-set, --test-set)"
        )
    sets: tuple[list[int], list[int]] | None = None
    if train_set is not None and test_set is not None:
        noted = run.noted
        sizes = (noted.training_size, noted.n_test or MOST)
        held = zip((train_set, test_set), sizes, ("--train-set", "--test-set"), strict=True)
        one, other = (
            select(given, total=total, labels=None, seed=0, what=what).tolist() for given, total, what in held
        )
        sets = (one, other)
    return Asked(test=test, train=train, classes=classes, sets=sets)


def explained(
    run: Reader,
    looks: Looks,
    asked: Asked,
    *,
    k: int = 5,
    method: str | None = None,
    detection: str | Detection | None = None,
) -> Explanation:
    """Answer one question; see `explain`. ``looks`` is what the recipe was opened as."""
    if k < 1:
        raise InputError(f"k is {k}; it must be at least 1")
    name = run.method(method)
    judged = detection if isinstance(detection, Detection) else chosen_detection(run, detection)
    view = Answers(run, looks, name, k, judged)
    if asked.test is not None:
        found = view.test(asked.test)
    elif asked.train is not None:
        found = view.train(asked.train)
    elif asked.classes is not None:
        found = view.classes(*asked.classes)
    else:
        assert asked.sets is not None
        found = view.sets(*asked.sets)
    return replace(found, notes=(*found.notes, *([looks.note] if looks.note else [])))


def with_pictures(found: Explanation, looks: Looks, folder: str) -> Explanation:
    """Write the pictures of all samples that an explanation names; return it with their files.

    Raises:
        InputError: The directory is not local, or cannot be made.
    """
    if "://" in folder:
        raise InputError(f"--pictures {folder}: pictures are written to a local directory; name one")
    place = Path(folder).expanduser()
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--pictures {folder}: cannot be made ({error.strerror}); name another") from error

    def drawn(one: SampleFacts) -> SampleFacts:
        picture = looks.look(one.part, one.index)
        if picture is None or isinstance(picture, str):
            return one
        path = place / f"{one.part}-{one.index}.png"
        write_bytes(str(path.resolve()), png(picture.pixels))
        return replace(one, picture=str(path))

    subject = None if found.subject is None else drawn(found.subject)
    return replace(found, subject=subject, samples=tuple(drawn(one) for one in found.samples))

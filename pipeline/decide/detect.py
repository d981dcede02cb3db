"""Detect: which training samples are suspicious, ranked by one or several detectors, stored in the run."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import numpy as np
import pyarrow as pa

from ...storage.errors import InputError, SpecError
from ...storage.schemas import DETECTION
from ...storage.typed import to_json
from ...storage.uri import check_name
from ..drive.writing import writing
from ..executors.events import Note, Observer, null
from ..reading.reader import Reader, open_reader
from ..reading.unit_values import DetectionValues
from ..spec.checks import near
from ..vocabulary import DETECT
from .case import UNSERVED, Case, Floats, Integers, Options, Scorer, Scores
from .cluster import jaccard
from .detection import Detection, labels_digest, write_detection
from .flags import UNKNOWN_SHARE, Flag, apply_flag, check_flag
from .judged import Halves, halves, judged_samples, known_truth
from .measures import Truth, measure
from .passes import Passes
from .scorers import SCORERS

if TYPE_CHECKING:
    from ...workers.recipe import Recipe

ALL = "all"
CLUSTER, CONFIDENT = "cluster", "confident"
ESTIMATED = "estimated_wrong"
"""What the detector `CONFIDENT` calls its count among its notes."""
MOST_SEED = 2**32 - 1
"""The largest that scikit-learn takes."""
DEFAULTS = ("joint", "margin", "harmed-class")
"""What ``--by`` is where it is not given: the first of these that there is."""


def default_by() -> str:
    """Return the detector that is used where none is named."""
    return next(name for name in DEFAULTS if name in SCORERS)


def detect(
    run: Reader | str,
    recipe: Recipe | str | None = None,
    *,
    by: str | Sequence[str] | None = None,
    method: str | None = None,
    options: Options | None = None,
    split: bool = False,
    split_seed: int = 0,
    flag: Flag = "auto",
    share: float | None = None,
    truth: str | os.PathLike[str] | Sequence[int] | None = None,
    observer: Observer | None = None,
    **placement: Any,
) -> list[Detection]:
    """Rank the tracked samples of a run by suspicion, store the rankings in it and return them.

    Args:
        run: The run, or where it is.
        recipe: What the run was made from; needed by detectors that compute, unless it is built in.
        by: Names of detectors; ``all``: each that the run can serve. None: `default_by`.
        method: Whose contributions are looked at; None: the run's default.
        options: Of the detectors.
        split: Let detectors look at one half of the test samples, and keep the other for judging.
        split_seed: Which half.
        flag: Rule that flags; see `decide.flags`.
        share: Share of wrong labels that ``known`` flags; None: that of the truth.
        truth: Train indices of wrong labels, or a file with one a line. None: the recipe's label noise.
        observer: Hears of everything that happens.
        placement: Fields of `RunSpec` that say where the work is done, as in ``evaluate``.

    Raises:
        InputError: A detector is unknown, or cannot judge this run; or ``truth``, ``share``, ``flag`` are wrong.
        IncompleteStage: The run has no record, or the method is not complete.
    """
    found = run if isinstance(run, Reader) else open_reader(run)
    reading = found.directory.ledger.remember()
    options, observer = checked(options or Options()), observer or null
    check_seed("split_seed", split_seed)
    flag = check_flag(flag, share)
    scorers, forgiving = chosen(by)
    with writing(found.directory, observer, command=DETECT, wait=bool(placement.get("wait"))) as told:
        found = open_reader(found.uri)
        reading = found.directory.ledger.remember()
        if method is not None or found.methods():
            method = found.method(method)
        tracked, given = judged_samples(found, recipe, told, placement)
        if len(tracked) < 2:
            raise InputError(f"{found.uri} tracks {len(tracked)} sample, and a ranking takes 2; track more")
        known = known_truth(found, truth, tracked)
        if known is not None and share is None:
            share = known.share
        if flag == "known" and share is None:
            raise InputError(UNKNOWN_SHARE)
        default = found.methods()[0] if found.methods() else None
        parts = _halves(found, method, split_seed, scorers) if split else None
        passes = Passes(found, recipe, told, placement)
        case = Case(
            run=found,
            tracked=tracked,
            given=given,
            method=method,
            selecting=None,
            passes=passes,
            options=options,
        )
        half = None if parts is None else replace(case, selecting=parts.selecting, shared={})
        bench = _Bench(
            case=case, half=half, halves=parts, default=default, truth=known, share=share, flag=flag
        )
        made = []
        try:
            for scorer in scorers:
                try:
                    detection = bench.detection(scorer)
                except UNSERVED as error:
                    if not forgiving:
                        raise
                    told(Note(message=f"{scorer.name}: not made: {error}"))
                    continue
                write_detection(found.directory, detection, reading)
                made.append(detection)
        finally:
            passes.close()
        if not made:
            raise InputError(f"none of the detectors can judge {found.uri}; the notes say why")
        return made


def _halves(run: Reader, method: str | None, seed: int, scorers: Sequence[Scorer]) -> Halves:
    if method is None or not any(looks_at_tests(scorer) for scorer in scorers):
        names = ", ".join(scorer.name for scorer in scorers)
        raise InputError(f"--split: {names} looks at no test samples of {run.uri}; leave it out")
    return halves(run, method, seed)


def chosen(by: str | Sequence[str] | None) -> tuple[list[Scorer], bool]:
    """Return the detectors that are named, and whether those that cannot judge are only noted.

    Raises:
        SpecError: There is none of a name.
    """
    names = [by] if isinstance(by, str) else list(by or [default_by()])
    forgiving = ALL in names
    wanted = [one for name in names for one in (SCORERS if name == ALL else [name])]
    for name in wanted:
        if name not in SCORERS:
            raise SpecError(f"--by {name}: {near(name, [*SCORERS, ALL])}")
    return [SCORERS[name] for name in dict.fromkeys(wanted)], forgiving


def checked(options: Options) -> Options:
    """Return options whose values are allowed.

    Raises:
        SpecError: One is not; names it.
    """
    for name, kind in get_type_hints(Options).items():
        value, known = getattr(options, name), get_args(kind)
        if known and value not in known:
            raise SpecError(f"{name} {value!r}: {near(str(value), list(known))}")
    if options.neighbours < 1:
        raise SpecError(f"neighbours {options.neighbours}: must be at least 1")
    check_seed("seed", options.seed)
    return options


def check_seed(name: str, seed: int) -> None:
    """Raise where a seed is none.

    Raises:
        SpecError: It is not in 0 to `MOST_SEED`.
    """
    if not 0 <= seed <= MOST_SEED:
        raise SpecError(f"{name} {seed}: must be 0 to {MOST_SEED}")


def reads_method(scorer: Scorer, options: Options) -> bool:
    """Whether a detector looks at contributions or hypergradients, which a method made."""
    if scorer.needs == "gradients" and "rows" in scorer.options:
        return options.rows == "hypergradients"
    return scorer.needs in ("contributions", "gradients")


def name_of(
    scorer: Scorer, options: Options, *, method: str | None, default: str | None, split: int | None
) -> str:
    """Return the name of a detection: the detector, then what is not as usual, such as ``cluster.average``.

    Args:
        scorer: The detector.
        options: Of the detectors.
        method: Whose contributions it looked at.
        default: The run's default method.
        split: Seed of the halves of the test samples; None: there are none, or it looks at no test samples.
    """
    parts = [scorer.name]
    if method is not None and method != default and reads_method(scorer, options):
        parts.append(method)
    usual = Options()
    for name in scorer.options:
        value = getattr(options, name)
        if value == getattr(usual, name):
            continue
        spoken = name.replace("_", "-")
        plain = name in ("scorer", "normalise", "rows", "clusters", "wrong_cluster")
        parts.append(spoken if value is True else str(value) if plain else f"{spoken}-{value}")
    if split is not None:
        parts.append("split" if split == 0 else f"split-{split}")
    return check_name(re.sub(r"[^A-Za-z0-9._-]", "-", ".".join(parts)), "detection")


class _Bench:
    """Judges one run by one detector after the other; what two of them need is computed once.

    Args:
        case: The run, all its test samples.
        half: The same, with the half of the test samples that may be looked at; None: all may.
        halves: Those halves.
        default: The run's default method.
        truth: Which labels are wrong, where that is known.
        share: Of wrong labels, where that is known.
        flag: Rule that flags.
    """

    def __init__(
        self,
        *,
        case: Case,
        half: Case | None,
        halves: Halves | None,
        default: str | None,
        truth: Truth | None,
        share: float | None,
        flag: Flag,
    ) -> None:
        self.case, self.half, self.halves, self.default = case, half, halves, default
        self.truth, self.share, self.flag = truth, share, flag
        self._scores: dict[str, Scores] = {}

    def detection(self, scorer: Scorer) -> Detection:
        """Return what a detector says, ranked, flagged and measured."""
        case, scores = self.case, self.scores(scorer)
        halved = self.halves if looks_at_tests(scorer) else None
        order = ranking(scores.suspicion)
        flagged = apply_flag(
            self.flag,
            scores.suspicion[order],
            share=self.share,
            estimated=self.estimated,
            seed=case.options.seed,
        )
        method = case.method if reads_method(scorer, case.options) else None
        name = name_of(
            scorer,
            case.options,
            method=method,
            default=self.default,
            split=None if halved is None else halved.seed,
        )
        values = DetectionValues(
            rows=case.n,
            by=scorer.name,
            method=method,
            options={option: getattr(case.options, option) for option in scorer.options},
            selecting=None if halved is None else halved.selecting_tests,
            judging=None if halved is None else halved.judging_tests,
            labels_sha256=labels_digest(case.given),
            flag=flagged.rule,
            flagged=flagged.count,
            cut=flagged.cut,
            separation=flagged.separation,
            inspect=flagged.inspect,
            measures=self._measures(scores, order),
            notes={**scores.notes, **self._more_notes(scorer, scores)},
        )
        return Detection(name=name, table=_table(scorer, case, scores, order, flagged.count), values=values)

    def scores(self, scorer: Scorer) -> Scores:
        """Return what a detector says."""
        found = self._scores.get(scorer.name)
        if found is None:
            case = self.half if self.half is not None and looks_at_tests(scorer) else self.case
            found = self._scores[scorer.name] = scorer.score(case)
        return found

    def estimated(self) -> int:
        """Return how many labels the detector `CONFIDENT` takes for wrong.

        Raises:
            InputError: There is no such detector, or it does not say.
        """
        scorer = SCORERS.get(CONFIDENT)
        count = None if scorer is None else self.scores(scorer).notes.get(ESTIMATED)
        if count is None:
            raise InputError(f"--flag {CONFIDENT}: its estimate is not to be had here; choose another rule")
        return int(count)

    def _measures(self, scores: Scores, order: Integers) -> dict[str, Any] | None:
        """Return the measures as JSON; None where nobody knows, or all labels are alike wrong or right."""
        if self.truth is None or not 0 < self.truth.wrong.sum() < self.case.n:
            return None
        found = measure(scores.suspicion, order, scores.suggested, self.truth, self.case.options.seed)
        told: dict[str, Any] = to_json(found)
        return told

    def _more_notes(self, scorer: Scorer, scores: Scores) -> dict[str, object]:
        if scorer.name != CLUSTER or self.truth is None:
            return {}
        return {"jaccard": jaccard(scores.suspicion, self.case.given, self.truth.wrong)}


def looks_at_tests(scorer: Scorer) -> bool:
    """Whether a detector looks at test samples, so that halves of them concern it."""
    return scorer.needs == "contributions"


def ranking(suspicion: Floats) -> Integers:
    """Return positions, most suspicious first; of equals the earlier first, NaN last."""
    order: Integers = np.argsort(-suspicion, kind="stable")  # numpy puts NaN last
    return order


def _table(scorer: Scorer, case: Case, scores: Scores, order: Integers, flagged: int) -> pa.Table:
    ranks = np.arange(1, case.n + 1)
    if scores.quality is None:
        score = ranks / case.n
    else:
        # A detector that cannot say of a sample holds nothing against it.
        score = np.clip(np.nan_to_num(scores.quality[order], nan=1.0), 0, 1)
    suspicion = scores.suspicion[order]
    if scores.reason is None:
        reason = [f"suspicion {s:.4g}" for s in suspicion.tolist()]
    else:
        reason = [scores.reason[at] for at in order.tolist()]
    columns = {
        "by": pa.array([scorer.name]).take(pa.array(np.zeros(case.n, dtype=np.int32))),
        "train_index": case.tracked[order],
        "given_label": case.given[order],
        "suggested_label": scores.suggested[order],
        "score": score,
        "suspicion": suspicion,
        "rank": ranks,
        "is_label_issue": ranks <= flagged,
        "reason": reason,
    }
    return pa.table(columns).cast(DETECTION)

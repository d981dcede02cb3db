"""Clean: from suspicions to a decision that other tools can follow, and whether it helped.

A decision is written into the run, whole or not at all; the user's data are never touched. Letters: N training
samples, M test samples, K seeds.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyarrow import csv as pa_csv

from ...storage import layout
from ...storage.contributions import write_table
from ...storage.documents import dump
from ...storage.errors import SpecError, SpecMismatch
from ...storage.files import read_bytes, remove, write_bytes
from ...storage.ledger import Reading
from ...storage.schemas import DECISION
from ...storage.typed import to_json
from ...storage.uri import check_name
from ...workers.determinism import restored_process
from ...workers.recipe import Recipe
from ..drive.writing import writing
from ..executors.events import Note, Observer, null
from ..reading.decisions import (
    DOWNWEIGHT,
    DROP,
    KEEP,
    RELABEL,
    Decision,
    decision_names,
    load_decision,
    new_labels,
    numbers,
    read_decision,
)
from ..reading.detections import labels_digest
from ..reading.outcomes import Outcome
from ..reading.panels import tested
from ..reading.reader import Reader, open_reader
from ..reading.unit_values import DecisionValues, DetectionValues
from ..vocabulary import CLEAN, CLEAN_OUTCOME, Way
from .arms import comparison
from .data import Data, data_of_run
from .retraining import Retraining, check_way, retrain
from .rules import Cut, Rule, Ruling, apply_rule, the_rule
from .scorers import SCORERS
from .suspects import LIST, Suspects, choose_detection, detected, listed

Integers = npt.NDArray[np.int64]

WHOLE_LENGTH = 64
"""Letters that a name may have; see ``storage.uri.check_name``."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Cleaned:
    """What `clean` made.

    Attributes:
        decision: As written.
        outcome: Whether it helped; None: nothing was retrained.
    """

    decision: Decision
    outcome: Outcome | None


def clean(
    run: Reader | str,
    recipe: Recipe | str | None = None,
    *,
    detection: str | None = None,
    list: str | Sequence[int] | Integers | None = None,
    drop: Cut | None = None,
    relabel: Cut | bool = False,
    downweight: Cut | bool = False,
    name: str | None = None,
    retrain: int = 0,
    way: Way = "subset",
    papers_reading: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
    **overrides: Any,
) -> Cleaned:
    """Decide what happens to suspicious training samples, write that into the run, and measure whether it helps.

    Exactly one of ``drop``, ``relabel`` and ``downweight`` says which samples: ``"flagged"`` (for the last two also
    True), a share (below 1, or ``"5%"``) or a number of those judged, most suspicious first, or a list: a file with
    one train index a line, or the indices. A sample given less weight counts as its score (0 to 1, at least 0.01)
    before all weights are scaled to a mean of 1 over what is kept.

    Args:
        run: The run, or where it is.
        recipe: What the run was made from. Needed unless that is a built-in recipe, or the run knows the label of
            every sample and nothing is retrained: code that a stored run names is never imported unasked.
        detection: Name of the detection to decide upon; None: the run's best that needs no choice, ``joint`` first.
        list: Decide upon these samples instead.
        drop: Which samples go.
        relabel: Which get the label that the detection suggests.
        downweight: Which get less weight.
        name: Of the decision; None: made from detection and rule.
        retrain: K: train every arm with as many seeds; 0: do not.
        way: How is trained: ``subset`` (deleted, then trained anew), ``rescaled`` or ``weighted``; see
            ``workers.training.retrain``.
        papers_reading: Also train what is kept on its true labels, where wrong ones are known.
        overwrite: Replace a decision of this name that says something else.
        observer: Hears of everything that happens.
        overrides: Fields of `RunSpec` that say where the work is done: ``executor``, ``workers``, ``recipe_args``, ...

    Raises:
        SpecError: The rule, or one of its numbers, is wrong.
        InputError: It finds nothing to do; the recipe has to be named; and others.
        IncompleteStage: There is no detection (of that name).
        SpecMismatch: The detection was made for other labels, the recipe is another, or another decision has the name.
    """
    rule = the_rule(drop, relabel, downweight)
    if list is not None and detection is not None:
        raise SpecError("--detection and --list both say what to decide upon; give one")
    waits = bool(overrides.get("wait"))
    with restored_process(), ExitStack() as stack:
        found = run if isinstance(run, Reader) else open_reader(run)
        hears = stack.enter_context(writing(found.directory, observer or null, command=CLEAN, wait=waits))
        found = open_reader(found.uri)
        reading = found.directory.ledger.remember()
        chosen = None
        if list is None:
            chosen = choose_detection(found, detection, lambda text: hears(Note(message=text)))
        data = data_of_run(found, recipe, chosen, overrides, hears, needed=retrain > 0)
        check_way(found, rule.kind, way, retrain, data.seed, papers_reading)
        suspects = listed(list, data.given, "--list") if chosen is None else detected(chosen, data.given)  # type: ignore[arg-type]
        ruling = apply_rule(rule, suspects)
        arms = comparison(found, suspects, ruling, rule.kind, papers_reading) if retrain else None
        decision = _decide(found, data, suspects, rule, ruling, name, overwrite, reading)
        outcome = None
        if arms is not None and data.surveyed is not None and data.spec is not None:
            asked = Retraining(
                run=found,
                spec=data.spec,
                surveyed=data.surveyed,
                decision=decision,
                comparison=arms,
                seeds=retrain,
                way=way,
            )
            outcome = _retrain(asked, hears)
        return Cleaned(decision=decision, outcome=outcome)


_retrain = retrain  # an argument of `clean` has its name


def check_decision(
    run: Reader | str,
    which: str,
    recipe: Recipe | str | None = None,
    *,
    observer: Observer | None = None,
    **overrides: Any,
) -> Decision:
    """Return a decision that is for the data of a run; raise where it is not.

    Args:
        run: The run, or where it is.
        which: Name of a decision of the run, or a folder that holds one.
        recipe: What the run was made from; as of `clean`.
        observer: Hears of everything that happens.
        overrides: As of `clean`.

    Raises:
        SpecMismatch: It was made for other labels; says what differs first.
        IncompleteStage: There is no such decision.
    """
    with restored_process():
        found = run if isinstance(run, Reader) else open_reader(run)
        mine = which in decision_names(found)
        decision = read_decision(found, which) if mine else load_decision(which)
        data = data_of_run(found, recipe, None, overrides, observer or null, needed=False)
        decision.check(data.given)
        return decision


def default_name(suspects: Suspects, rule: Rule, ruling: Ruling) -> str:
    """Return the name of a decision that was given none: what judged, the rule and its cut."""
    whole = f"{suspects.name}-{rule.kind}-{ruling.cut.replace('%', 'pct')}"
    if len(whole) <= WHOLE_LENGTH:
        return whole
    return f"{whole[: WHOLE_LENGTH - 9]}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"


def _decide(
    run: Reader,
    data: Data,
    suspects: Suspects,
    rule: Rule,
    ruling: Ruling,
    name: str | None,
    overwrite: bool,
    reading: Reading,
) -> Decision:
    """Write a decision, unless it is there."""
    name = check_name(name or default_name(suspects, rule, ruling), "decision")
    if name == layout.RETRAINED:
        raise SpecError(f"decision {name!r}: the retrainings lie there; choose another --name")
    table = _table(data, suspects, rule, ruling)
    files = _files(table, ruling, rule)
    values = _values(run, data, suspects, rule, ruling)
    there = read_decision(run, name) if name in decision_names(run) and not overwrite else None
    if there is not None:
        if _doing(there.values) != _doing(replace(values, sha256=_digests(files))):
            raise SpecMismatch(
                f"{run.uri} has another decision {name!r} ({there.values.rule} {there.values.cut} of "
                f"{there.values.detection or LIST}, {there.values.dropped} dropped); choose another --name, or --overwrite"
            )
        if there.values.sha256[layout.DECISION_CSV] == _sha(files[layout.DECISION_CSV]):
            return there
    _write(run, name, table, files, values, reading)
    return read_decision(run, name)


def _doing(values: DecisionValues) -> tuple[object, ...]:
    """Return what makes a decision another one; source_index, say, does not."""
    lists = (layout.KEEP_LIST, layout.DROP_LIST, layout.SAMPLE_WEIGHTS, layout.NEW_LABELS)
    return (
        *(values.sha256.get(name) for name in lists),
        *(values.labels_sha256, values.rule, values.detection, values.by, values.selecting, values.judging),
    )


def _table(data: Data, suspects: Suspects, rule: Rule, ruling: Ruling) -> pa.Table:
    """Return the rows of `DECISION`."""
    suggested = suspects.suggested.copy()
    columns = {
        "train_index": np.arange(len(data.given)),
        "source_index": data.source,
        "given_label": data.given,
        "suggested_label": suggested,
        "suspicion": suspects.suspicion,
        "label_score": suspects.score,
        "rank": suspects.rank,
        "is_label_issue": suspects.flagged,
        "action": pa.array(ruling.action.tolist(), pa.string()),
        "weight": ruling.weight,
        "method": pa.array([_by(suspects)] * len(data.given), pa.string()),
        "reason": pa.array(suspects.reason, pa.string()),
    }
    return pa.table(columns).cast(DECISION)


def _by(suspects: Suspects) -> str:
    return suspects.values.by if suspects.values is not None else LIST


def _files(table: pa.Table, ruling: Ruling, rule: Rule) -> dict[str, bytes]:
    """Return what other tools read, by name."""
    weights, rows = io.BytesIO(), pa.BufferOutputStream()
    np.save(weights, ruling.weight)
    pa_csv.write_csv(table, rows)
    kept = ruling.action != DROP
    found = {
        layout.KEEP_LIST: numbers(np.flatnonzero(kept)),
        layout.DROP_LIST: numbers(np.flatnonzero(~kept)),
        layout.SAMPLE_WEIGHTS: weights.getvalue(),
        layout.DECISION_CSV: rows.getvalue().to_pybytes(),
    }
    if rule.kind == RELABEL:
        changed = ruling.chosen
        label = ruling.label[changed].tolist()
        found[layout.NEW_LABELS] = new_labels(dict(zip(changed.tolist(), label, strict=True)))
    return found


def _values(run: Reader, data: Data, suspects: Suspects, rule: Rule, ruling: Ruling) -> DecisionValues:
    selecting, judging, trust = _who_judges(run, suspects.values, data)
    count = {kind: int((ruling.action == kind).sum()) for kind in {*ruling.action.tolist(), KEEP}}
    return DecisionValues(
        run=run.uri,
        recipe=run.recipe,
        by=_by(suspects),
        detection=None if suspects.values is None else suspects.name,
        method=None if suspects.values is None else suspects.values.method,
        rule=rule.kind,
        cut=ruling.cut,
        n_train=len(data.given),
        judged=len(suspects.order),
        labels_sha256=labels_digest(data.given),
        trust=trust,
        dropped=count.get(DROP, 0),
        relabelled=count.get(RELABEL, 0),
        downweighted=count.get(DOWNWEIGHT, 0),
        selecting=selecting,
        judging=judging,
        classes=ruling.classes,
        warnings=ruling.warnings,
        notes=(*ruling.notes, *data.notes),
    )


Indices = tuple[int, ...]


def _who_judges(
    run: Reader, values: DetectionValues | None, data: Data
) -> tuple[Indices | None, Indices | None, str]:
    """Return the test indices that selected (None: none, or unknown), those that may judge (None: all), and in words."""
    if values is None:
        return None, None, "all test samples judge; whether the list was made with them is not known here"
    if values.judging is not None:
        selecting = values.selecting or ()
        told = f"{len(selecting)} test samples selected and {len(values.judging)} others judge"
        return selecting, values.judging, told
    scorer = SCORERS.get(values.by)
    looked = values.method is not None and (scorer is None or scorer.needs == "contributions")
    if not looked or values.method is None:
        return None, None, "the detection looked at no test sample, and all of them judge"
    mine = tested(run, values.method)
    selecting = tuple(mine.tolist())
    rest = np.setdiff1d(np.arange(data.n_test), mine)
    if len(rest) >= len(mine):
        told = f"{len(mine)} test samples selected and the {len(rest)} others of the recipe judge"
        return selecting, tuple(rest.tolist()), told
    return (
        selecting,
        None,
        "the test samples that selected also judge, which flatters; keep them apart with hydra-pipe detect --split",
    )


def _write(
    run: Reader,
    name: str,
    table: pa.Table,
    files: dict[str, bytes],
    values: DecisionValues,
    reading: Reading,
) -> None:
    """Write the files of a decision, its manifest last, and commit them."""
    directory = run.directory
    directory.drop(CLEAN, name)
    directory.drop(CLEAN_OUTCOME, name)
    known = (layout.NEW_LABELS, layout.OUTCOME_TABLE, layout.OUTCOME_SUMMARY, layout.DECISION_MANIFEST)
    for file in known:  # what an older decision of this name left
        remove(directory.path(layout.decision(name, file)))
    for file, content in files.items():
        write_bytes(directory.path(layout.decision(name, file)), content)
    address = directory.path(layout.decision(name, layout.DECISION_TABLE))
    write_table(address, table, DECISION)
    values = replace(values, sha256={**_digests(files), layout.DECISION_TABLE: _sha(read_bytes(address))})
    document = to_json(values)
    write_bytes(directory.path(layout.decision(name, layout.DECISION_MANIFEST)), dump(document, seal=True))
    written = [*files, layout.DECISION_TABLE, layout.DECISION_MANIFEST]
    directory.commit(CLEAN, name, [layout.decision(name, file) for file in written], document, reading)


def _digests(files: dict[str, bytes]) -> dict[str, str]:
    return {file: _sha(content) for file, content in files.items()}


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

"""Where things lie inside a run: the only file that spells such a path, and the list of the kinds of results.

Functions return paths relative to the run, ``/``-separated; ``RunDirectory.path`` turns them into
addresses. `locate` goes the other way: what kind of result a file belongs to, and whose it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .uri import check_name

By = Literal["", "method", "targets", "seed", "part"]
"""What tells results of one kind apart: nothing, ``method=…``, ``targets=…``, ``seed=…``, or the folder below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of results.

    Attributes:
        folder: Top-level name in the run that holds them and nothing else.
        by: What tells them apart.
        form: ``zarr`` stores, ``parquet`` tables, whole ``run`` directories, or ``files`` of several kinds.
    """

    folder: str
    by: By
    form: Literal["zarr", "parquet", "run", "files"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """What a file inside a run belongs to.

    Attributes:
        kind: One of `KINDS`.
        key: The method, targets, seed or folder that it is of; None where its name says none.
    """

    kind: Kind
    key: str | None


RUN_INFO = "run.json"
LOCK, STOP_ASKED = "lock.json", "stop.json"
"""Who writes to the run, and that it was asked to stop."""
LOG, LOG_BEFORE = "log.jsonl", "log.1.jsonl"
"""What happened in the run, one JSON document a line, and the part before that."""
BESIDE = (LOCK, STOP_ASKED, LOG, LOG_BEFORE)
"""Files about the commands that write to a run: no results, and of no manifest."""

MANIFESTS = "manifests"
"""Where each finished unit leaves what vouches for its results: ``<stage>/<unit>.json``."""

TRAJECTORY = "trajectory.zarr"
TEST_GRADIENTS = "test_gradients.zarr"
TRAINING_OUTPUTS = "training_outputs.zarr"
"""What the trained model makes of each tracked sample: its last layer's inputs and its outputs."""
TRAINING_GRADIENTS = "training_gradients"
"""Where what passes found of each tracked sample's own gradient lies, a store a pass."""
SEEDS = "seeds"
"""Where the runs with other seeds lie, each a run directory of its own."""

HYPERGRADIENTS, BY_TEST, PREPARED = "hypergradients", "by_test", "prepared"
PARTIAL_SUMS = "partial_sums"
"""Where what segments of the training add to hypergradients waits until it is added up, a folder a method."""
CURVATURE, CORRECTIONS, TARGET_GRADIENTS = "curvature", "corrections", "target_gradients"
EVALUATION, BY_EPOCH = "evaluate", "over_training"  # spelled so in every run there is
DETECTIONS, DECISIONS = "detections", "decisions"
"""Where ranked suspicions and what was decided upon them lie, a folder each."""

KEEP_LIST, DROP_LIST, NEW_LABELS, SAMPLE_WEIGHTS = "keep.txt", "drop.txt", "relabel.csv", "weights.npy"
"""Files of a decision that other tools read, see `decision`."""
DECISION_TABLE, DECISION_CSV, DECISION_MANIFEST = "decision.parquet", "decision.csv", "manifest.json"
"""What was decided of each sample, and what the decision was made from and for."""
OUTCOME_TABLE, OUTCOME_SUMMARY = "retrained.parquet", "retrained.json"
OUTCOME_FILES = (OUTCOME_TABLE, OUTCOME_SUMMARY)
"""Whether a decision helped: each retraining, and what they say together."""
RETRAINED = "retrain"
"""Folder among the decisions of the retrainings, which decisions share; no decision has this name."""

TABLES = ("contributions", "samples", "interclass", "contributions_spread", "samples_spread")
"""Tables that every method has (the last two: averages over seeds), one folder each."""

KINDS = (
    Kind(folder=TRAJECTORY, by="", form="zarr"),
    Kind(folder=HYPERGRADIENTS, by="method", form="zarr"),
    Kind(folder=PARTIAL_SUMS, by="method", form="zarr"),
    Kind(folder=BY_TEST, by="method", form="zarr"),
    Kind(folder=PREPARED, by="method", form="zarr"),
    Kind(folder=CURVATURE, by="method", form="zarr"),
    Kind(folder=CORRECTIONS, by="method", form="zarr"),
    Kind(folder=TEST_GRADIENTS, by="", form="zarr"),
    Kind(folder=TARGET_GRADIENTS, by="targets", form="zarr"),
    Kind(folder=TRAINING_OUTPUTS, by="", form="zarr"),
    Kind(folder=TRAINING_GRADIENTS, by="part", form="zarr"),
    *(Kind(folder=name, by="method", form="parquet") for name in TABLES),
    Kind(folder=EVALUATION, by="part", form="parquet"),
    Kind(folder=BY_EPOCH, by="part", form="parquet"),
    Kind(folder=DETECTIONS, by="part", form="parquet"),
    Kind(folder=DECISIONS, by="part", form="files"),
    Kind(folder=SEEDS, by="seed", form="run"),
)
"""Every kind of results that a run can hold, in the order in which people are shown them."""

DIRECTIONS, COORDINATES, CORRECTED = "directions", "coordinates", "contributions"
"""Stores of a correction, see `corrections`."""
LOSSES, WEIGHTS, TRAINING_LOSS = "retrain", "weights", "training_loss"
"""Tables that a retraining writes, see `evaluation`."""
LDS, TRIALS = "lds", "trials"
"""Tables over all retrainings."""
EVALUATION_SUMMARY = f"{EVALUATION}/summary.json"
BY_EPOCH_SUMMARY = f"{BY_EPOCH}/summary.json"
SUMMARIES = (EVALUATION_SUMMARY, BY_EPOCH_SUMMARY)


def hypergradients(method: str) -> str:
    """Return where a method's hypergradients lie, a row a tracked sample."""
    return _store(HYPERGRADIENTS, method)


def partial_sums(method: str, unit: str | None = None) -> str:
    """Return where a unit of a method keeps its sums of a segment; without a unit the folder of all of them."""
    folder = f"{PARTIAL_SUMS}/method={check_name(method, 'method')}"
    return folder if unit is None else f"{folder}/{check_name(unit, 'unit')}.zarr"


def by_test(method: str) -> str:
    """Return where a method's contributions lie as they were computed, a row a target."""
    return _store(BY_TEST, method)


def prepared(method: str) -> str:
    """Return where what an estimator prepared for each tracked sample lies."""
    return _store(PREPARED, method)


def curvature(method: str) -> str:
    """Return where the eigenbasis and eigenvalues of a form of the Hessian lie."""
    return _store(CURVATURE, method)


def corrections(method: str, name: str) -> str:
    """Return where a store of a method's correction lies: `DIRECTIONS`, `COORDINATES` or `CORRECTED`."""
    return f"{CORRECTIONS}/method={method}/{name}.zarr"


def target_gradients(targets: str) -> str:
    """Return where the gradients of targets that are no test samples lie."""
    return f"{TARGET_GRADIENTS}/targets={targets}.zarr"


def training_gradients(part: str) -> str:
    """Return where what a pass over the training gradients found lies."""
    return f"{TRAINING_GRADIENTS}/{check_name(part, 'pass')}.zarr"


def table(kind: str, method: str) -> str:
    """Return the folder of a method's table, one of `TABLES`."""
    return f"{kind}/method={check_name(method, 'method')}"


def table_part(kind: str, method: str, part: str) -> str:
    """Return one file of a method's table; ``part`` is what is behind ``part-`` in its name."""
    return f"{table(kind, method)}/part-{part}.parquet"


def table_parts(kind: str, method: str) -> str:
    """Return the pattern that matches all files of a method's table."""
    return f"{table(kind, method)}/*.parquet"


def evaluation(name: str, unit: str | None = None) -> str:
    """Return where a table of an evaluation lies: one that a retraining wrote, or one over all of them."""
    return f"{EVALUATION}/{name}.parquet" if unit is None else f"{EVALUATION}/{name}/part-{unit}.parquet"


def by_epoch(part: str, name: str, unit: str) -> str:
    """Return where a table of a comparison over training lies.

    Args:
        part: Last part of the stage's name.
        name: ``samples``, ``errors`` or ``contributions``.
        unit: What is behind ``part-`` in its name.
    """
    return f"{BY_EPOCH}/{part}/{name}/part-{unit}.parquet"


def detection(name: str) -> str:
    """Return where the table of a detection lies."""
    return f"{DETECTIONS}/{check_name(name, 'detection')}/part-all.parquet"


def decision_folder(name: str) -> str:
    """Return where the files of a decision lie."""
    return f"{DECISIONS}/{check_name(name, 'decision')}"


def decision(name: str, file: str) -> str:
    """Return where a file of a decision lies, such as ``keep.txt``."""
    return f"{decision_folder(name)}/{file}"


def retrained(unit: str) -> str:
    """Return where the test losses of a retraining on cleaned samples lie."""
    return f"{DECISIONS}/{RETRAINED}/part-{unit}.parquet"


def of_seed(seed: int) -> str:
    """Return where the same run with another seed lies."""
    return f"{SEEDS}/seed={seed}"


def split_seed(path: str) -> tuple[str, str]:
    """Return (place of the run of another seed, or nothing; the rest) of a path or stage that may lie in one."""
    parts = path.split("/", 2)
    if len(parts) == 3 and parts[0] == SEEDS and parts[1].startswith("seed="):
        return "/".join(parts[:2]), parts[2]
    return "", path


def locate(path: str) -> Place | None:
    """Return what a file, relative to the run, belongs to; None where it is no result."""
    folder, _, rest = path.partition("/")
    kind = next((kind for kind in KINDS if kind.folder == folder), None)
    if kind is None or not rest:
        return None
    key, _, inside = rest.partition("/")
    if kind.by == "part" and inside:
        return Place(kind=kind, key=key.removesuffix(".zarr"))
    if kind.by in ("method", "targets", "seed") and inside and key.startswith(f"{kind.by}="):
        return Place(kind=kind, key=key.removeprefix(f"{kind.by}=").removesuffix(".zarr"))
    return Place(kind=kind, key=None)


def part_of(path: str) -> str:
    """Return the store or table that a file belongs to, as a user would name it."""
    parts = path.split("/")
    return "/".join(parts[:1] if parts[0] in (TRAJECTORY, TEST_GRADIENTS, TRAINING_OUTPUTS) else parts[:2])


def rank(path: str) -> int:
    """Return the position of a file's kind among `KINDS`, by which people are shown parts."""
    folder = path.partition("/")[0]
    return next((k for k, kind in enumerate(KINDS) if kind.folder == folder), len(KINDS))


def _store(folder: str, method: str) -> str:
    return f"{folder}/method={method}.zarr"

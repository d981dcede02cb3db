"""What a damaged run answers: the right thing, a named refusal, or something that must never be.

=========  ==========================================================================================
same       what the sound run answered
refused    a `HydraError` of one line
wrong      another answer, given as if it were right
crashed    any other exception
=========  ==========================================================================================
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hydra_pipe.pipeline.opened_run import Run, open_run
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage import files
from hydra_pipe.storage.errors import HydraError

Answer = Callable[[Run], Any]


def answers(run: Run) -> dict[str, Answer]:
    """Return every question that a sound run answers, by name."""
    asked: dict[str, Answer] = {
        "test gradients": lambda run: run.test_gradients().read(0, run.test_gradients().rows),
        "test losses": lambda run: run.test_gradients().column("loss"),
        "trajectory": _trajectory,
        "visits": lambda run: _arrays(run.visits()),
    }
    for method in run.methods():
        asked |= {
            f"{method}: contributions": lambda run, m=method: _table(run.contributions(m).to_table()),
            f"{method}: samples": lambda run, m=method: _table(run.samples(m)),
            f"{method}: interclass": lambda run, m=method: _table(run.interclass(m)),
            f"{method}: top": lambda run, m=method: [str(row) for row in run.top(method=m)],
        }
        if run.averages(method):
            asked[f"{method}: spread"] = lambda run, m=method: _table(run.spread(m).to_table())
    for method in (name for name in run.methods() if run.directory.units(f"{name}/replay")):
        asked[f"{method}: hypergradients"] = lambda run, m=method: run.hypergradients(m)[:]
        asked[f"{method}: rows"] = lambda run, m=method: run.hypergradient_store(m).read(
            0, run.hypergradient_store(m).rows
        )
    for name in run.detections():
        asked[f"detection {name}"] = lambda run, n=name: _table(run.detection(n).table)
    return asked


def expected(place: Path | str) -> dict[str, str]:
    """Return digests of all answers of a sound run."""
    run = open_run(place)
    return {name: _digest(ask(run)) for name, ask in answers(run).items()}


def judged(place: Path, right: Mapping[str, str], asked: Mapping[str, Answer]) -> dict[str, str]:
    """Return, for each question, ``same``, or what came instead: ``refused: …``, ``wrong``, ``crashed: …``."""
    found = {}
    for name, ask in asked.items():
        found[name] = outcome(lambda ask=ask: _digest(ask(open_run(place))), right[name])
    return found


def outcome(answer: Callable[[], str], right: str) -> str:
    """Return what became of one question."""
    try:
        given = answer()
    except HydraError as error:
        text = str(error)
        return (
            f"refused: {text}"
            if "\n" not in text and "unexpected error" not in text
            else f"crashed: {text!r}"
        )
    except Exception as error:  # noqa: BLE001 - whatever comes is the finding
        return f"crashed: {type(error).__name__}: {str(error)[:200]}"
    return "same" if given == right else "wrong"


def problems(place: Path | str) -> tuple[str, ...]:
    """Return what verify finds wrong, or the named error that keeps it from looking.

    Raises:
        Exception: It gave no verdict.
    """
    try:
        return tuple(verify(open_run(place)).problems)
    except HydraError as error:
        return (str(error),)


def untidy(place: Path | str) -> tuple[str, str] | None:
    """Return what a run has that it should not, as an outcome; None: nothing."""
    left = [name for name in files.list_files(str(place)) if files.PARTIAL in name] + list(problems(place))
    return ("untidy", str(left[:3])) if left else None


def ended(place: Path | str, code: int, said: str, right: Mapping[str, str]) -> tuple[str, str]:
    """Return what became of a run after its last driver, which nothing disturbed.

    Args:
        place: The run.
        code: The driver's exit code.
        said: What it printed.
        right: Answers of the sound run.
    """
    if code != 0:
        return "lost", f"run again: exit code {code}: {said[-300:]}"
    if expected(place) != right:
        return "wrong", "other numbers"
    return untidy(place) or ("repaired", "")


def _trajectory(run: Run) -> Any:
    found = run.trajectory()
    places = range(len(found.checkpoint_steps))
    return [
        found.batches,
        found.loss,
        found.coefficient,
        found.learning_rate,
        *(found.checkpoint(k).weights for k in places),
        *(found.checkpoint(k).momentum for k in places),
    ]


def _arrays(found: Any) -> Any:
    fields = getattr(type(found), "__slots__", ()) or vars(found)
    return {
        name: value for name in fields if isinstance(value := getattr(found, name), np.ndarray | int | str)
    }


def _table(table: pa.Table) -> Any:
    keys = [(name, "ascending") for name in table.column_names if name.endswith(("index", "class"))]
    ordered = table.sort_by(keys) if keys else table
    return {name: ordered[name].combine_chunks().to_pylist() for name in table.column_names}


def _digest(value: Any) -> str:
    return hashlib.sha256(pickle.dumps(value, protocol=4)).hexdigest()

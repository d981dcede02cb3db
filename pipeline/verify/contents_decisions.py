"""Check what decisions and their retrainings hold: whole, of this run, and in agreement with each other."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from ...storage import layout
from ...storage.errors import HydraError
from ...storage.tables import read_table
from ..reading.decisions import Decision, read_decision
from ..reading.outcomes import read_outcome
from ..vocabulary import CLEAN, CLEAN_OUTCOME, CLEAN_RETRAIN
from .contents import Contents


def decisions(check: Contents, damaged: Collection[str]) -> None:
    """Check every decision against the run, and its outcome against the retrainings.

    Args:
        check: Collects problems.
        damaged: Files whose bytes are not those committed, which are told elsewhere.
    """
    directory = check.run.directory
    for name in directory.units(CLEAN):
        folder = layout.decision_folder(name)
        if any(path.startswith(f"{folder}/") for path in damaged):
            continue
        try:
            decision = read_decision(check.run, name)
        except HydraError as error:
            check.problems.append(f"{folder}: {str(error).removeprefix(f'{directory.path(folder)}: ')}")
            continue
        check.advance(decision.table.nbytes, CLEAN)
        check.rows[folder] = len(decision.table)
        _of_this_run(check, decision, folder)
        if name in directory.units(CLEAN_OUTCOME):
            _outcome(check, decision, damaged)


def retrainings(check: Contents, damaged: Collection[str]) -> None:
    """Check that every retraining has a finite loss for each of the recipe's test samples."""
    for manifest in check.run.directory.manifests(CLEAN_RETRAIN):
        for entry in manifest.files:
            if entry.path in damaged:
                continue
            directory = check.run.directory
            table = read_table(directory.path(entry.path), source=directory.vouched)
            check.advance(table.nbytes, CLEAN_RETRAIN)
            check.finite(f"{entry.path}: loss", table["loss"].to_numpy())
            index, count = table["test_index"].to_numpy(), check.info.n_test
            if count is not None and not np.array_equal(index, np.arange(count)):
                check.problems.append(f"{entry.path}: test_index is not 0 to {count - 1}")
            if not np.isin(table["correct"].to_numpy(), (-1, 0, 1)).all():
                check.problems.append(f"{entry.path}: correct holds more than -1, 0 and 1")


def _of_this_run(check: Contents, decision: Decision, folder: str) -> None:
    count = check.info.n_train
    if count is not None and decision.values.n_train != count:
        check.problems.append(
            f"{folder}: for {decision.values.n_train} training samples, the run has {count}"
        )
        return
    given = decision.table["given_label"].to_numpy()
    for method in check.run.methods()[:1]:
        samples = check.run.samples(method)
        index = samples["train_index"].to_numpy()
        if not np.array_equal(given[index], samples["label"].to_numpy()):
            check.problems.append(f"{folder}: made for other labels than those of samples/{method}")


def _outcome(check: Contents, decision: Decision, damaged: Collection[str]) -> None:
    """Hold the table and the summary of an outcome against the losses of the retrainings."""
    directory, name = check.run.directory, decision.name
    path = layout.decision(name, layout.OUTCOME_TABLE)
    table = read_table(directory.path(path), source=directory.vouched)
    there, judging = set(directory.units(CLEAN_RETRAIN)), decision.values.judging
    for row in table.to_pylist():
        file = layout.retrained(row["unit"])
        if row["unit"] not in there:
            check.problems.append(f"{path}: {row['unit']} is no retraining of this run")
        elif file not in damaged:
            losses = read_table(directory.path(file), source=directory.vouched)
            mine = slice(None) if judging is None else np.isin(losses["test_index"].to_numpy(), judging)
            found = float(losses["loss"].to_numpy()[mine].mean())
            if not np.isclose(found, row["loss"], rtol=1e-12, atol=0):
                check.problems.append(
                    f"{path}: loss of {row['arm']}, seed {row['seed']}, is not that of {file}"
                )
    outcome = read_outcome(check.run, name)
    arms = table["arm"].to_pylist()
    for arm in outcome.arms if outcome is not None else ():
        losses = [loss for one, loss in zip(arms, table["loss"].to_pylist(), strict=True) if one == arm.arm]
        if list(arm.losses) != losses:
            check.problems.append(
                f"{layout.decision(name, layout.OUTCOME_SUMMARY)}: {arm.arm} is not as in {path}"
            )

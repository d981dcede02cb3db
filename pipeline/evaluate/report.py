"""What an evaluation found: from retrainings to the tables and sentences that people read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from ...storage.schemas import LDS, TRIALS
from ..compare.compare import seconds
from ..compare.ranking import sign_errors, spearman
from ..reading.unit_values import UnitValues, values_of
from ..vocabulary import EXACT, MEAN, RETRAIN, SAMPLES
from .outcomes import Evidence
from .scores import Lds, agreement, detection, harm, lds, recommendation

TRUSTED = 0.5
"""Share of a change that has to be foretold for a prediction to be called one."""


def summarize(evidence: Evidence, methods: Sequence[str], asked: Mapping[str, Any]) -> dict[str, Any]:
    """Return the summary that is printed and stored; JSON-able.

    Returns:
        ``run``, ``methods``, ``questions``, ``baseline`` (test loss and accuracy of the record),
        ``targets`` (their kind), ``n_targets``, ``retrainings`` (how many, seconds), ``cost`` (seconds a method), ``lds``, ``smoothness``,
        ``leave_one_out``, ``removal``, ``mislabelled`` (lists of rows, empty where not asked) and
        ``sentences``.
    """
    run = evidence.run
    cost = {method: seconds(run, method) for method in methods}
    scored = {
        fraction: _lds(evidence, methods, fraction) for fraction in evidence.values("subset", "fraction")
    }
    smoothness = _smoothness(evidence, methods)
    manifests = [manifest for place in evidence.places for manifest in place.manifests(RETRAIN)]
    return {
        "run": run.uri,
        "recipe": run.recipe,
        "methods": list(methods),
        "questions": dict(asked),
        "n_tracked": len(evidence.tracked),
        "n_test": len(evidence.tests),
        "targets": evidence.targets.kind,
        "n_targets": len(evidence.targets),
        "baseline": {"loss": float(evidence.base_loss.mean()), "accuracy": evidence.base_accuracy},
        "retrainings": {
            "asked": (len({trial.change.unit for trial in evidence.trials}) + 1) * len(evidence.places),
            "stored": len(manifests),
            "seconds": sum((values_of(UnitValues, m).seconds or 0.0) for m in manifests),
        },
        "cost": cost,
        "lds": [
            {"fraction": f, "method": m, "lds": s.score, "low": s.low, "high": s.high}
            for f, found in scored.items()
            for m, s in found.items()
        ],
        "lds_by_test": [
            {"fraction": f, "method": m, "values": s.by_test.tolist()}
            for f, found in scored.items()
            for m, s in found.items()
        ],
        "smoothness": smoothness,
        "leave_one_out": _leave_one_out(evidence, methods),
        "removal": _removal(evidence, methods),
        "mislabelled": _mislabelled(evidence, methods),
        "sentences": [
            *_foretold(smoothness, methods, str(asked["retraining"])),
            *recommendation(scored, cost),
        ],
    }


def tables(summary: dict[str, Any], evidence: Evidence) -> dict[str, tuple[pa.Table, pa.Schema]]:
    """Return what is too large for the summary, as tables; takes ``lds_by_test`` out of it."""
    targets = evidence.targets
    parts = [
        pa.table(
            {
                "fraction": np.full(len(targets), row["fraction"]),
                "method": pa.array([row["method"]] * len(targets), pa.string()),
                "test_index": targets.test_index,
                "test_label": targets.label,
                "lds": row["values"],
            }
        ).cast(LDS)
        for row in summary.pop("lds_by_test")
    ]
    trials = [
        {
            **{name: trial.labels.get(name) for name in TRIALS.names},
            "kind": trial.kind,
            "unit": trial.change.unit,
            "changed": len(trial.change.index),
            "loss": float(loss.mean()),
            "accuracy": None if np.isnan(accuracy) else float(accuracy),
        }
        for trial, loss, accuracy in zip(evidence.trials, evidence.loss, evidence.accuracy, strict=True)
    ]
    return {
        "lds": (pa.concat_tables(parts) if parts else LDS.empty_table(), LDS),
        "trials": (pa.Table.from_pylist(trials, schema=TRIALS), TRIALS),
    }


def _lds(evidence: Evidence, methods: Sequence[str], fraction: float) -> dict[str, Lds]:
    rows = evidence.rows("subset", fraction=fraction)
    return lds(evidence.change(rows), {m: evidence.predicted(m, rows) for m in methods})


def _smoothness(evidence: Evidence, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return how much of the change each method foretells, by the size of the change."""
    sizes = evidence.values("perturb", "size")
    groups = [("random weights", size**2, evidence.rows("perturb", size=size)) for size in sizes]
    fractions = reversed(evidence.values("subset", "fraction"))
    groups += [("removal", 1 - f, evidence.rows("subset", fraction=f)) for f in fractions]
    found = []
    for what, share, rows in groups:
        real = evidence.change(rows)
        for method in methods:
            row = agreement(real, evidence.predicted(method, rows))
            size = float(np.abs(real).mean())
            found.append({"what": what, "removed": share, "method": method, "change": size, **row})
    return found


def _foretold(smoothness: Sequence[Mapping[str, Any]], methods: Sequence[str], way: str) -> list[str]:
    """Say how far the derivative reaches, and what it means where it does not."""
    method = EXACT if EXACT in methods else methods[0]
    own = [row for row in smoothness if row["method"] == method]
    removed = [row for row in own if row["what"] == "removal"]
    gentle = [row for row in own if row["what"] != "removal"]
    what = "the derivative" if method == EXACT else method
    lines = []
    for row in removed or gentle:
        share = f"{100 * row['removed']:.3g}%"
        if row["explained"] > 0:
            lines.append(f"{what} predicts {row['explained']:.0%} of the change at removal of {share}")
        else:
            lines.append(
                f"{what} misses the size of the change at removal of {share} (slope {row['slope']:.2g})"
            )
    if method != EXACT or not own:
        return lines
    # The smallest change of weights asks about smoothness alone: the batches are the recorded ones.
    if (gentle or removed)[0]["explained"] < TRUSTED:
        lines.append(
            "training is not smooth here: even small changes lead it elsewhere, so that no derivative "
            "can be trusted far; go by the LDS at the size you care about, and see whether an average over "
            "seeds (run --seeds K) does better"
        )
    elif way == "subset" and removed and removed[0]["explained"] < TRUSTED:
        lines.append(
            "the change after a small removal is mostly that of the new batch order, which no method can "
            "know; --retraining rescaled measures the samples' own effect, and run --seeds K with "
            "evaluate --seeds K that in the expected training"
        )
    return lines


def _leave_one_out(evidence: Evidence, methods: Sequence[str]) -> list[dict[str, Any]]:
    rows = evidence.rows("one")
    if not rows:
        return []
    real, found = evidence.change(rows), []
    for method in methods:
        said = evidence.predicted(method, rows)
        found.append(
            {
                "method": method,
                "samples": len(rows),
                "spearman_by_test": float(spearman(said, real).mean()),
                "spearman_mean": float(spearman(evidence.mean(said), evidence.mean(real))[0]),
                "sign_error": float(sign_errors(said, real).mean()),
                **agreement(real, said),
            }
        )
    return found


def _removal(evidence: Evidence, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return one row a (ranking, direction, samples removed); draws by chance are averaged."""
    groups: dict[tuple[str, str, int], list[int]] = {}
    for u in evidence.rows("remove"):
        labels = evidence.trials[u].labels
        groups.setdefault((labels["ranking"], labels["direction"], labels["removed"]), []).append(u)
    found = []
    for (ranking, direction, removed), rows in groups.items():
        change = evidence.mean(evidence.change(rows))
        said = evidence.mean(evidence.predicted(ranking, rows)).mean() if ranking in methods else None
        found.append(
            {
                "ranking": ranking,
                "direction": direction,
                "removed": removed,
                "share": removed / len(evidence.tracked),
                "loss_change": float(change.mean()),
                "loss_change_std": float(change.std()) if len(rows) > 1 else None,
                "predicted_change": None if said is None else float(said),
                "accuracy": float(evidence.accuracy[rows].mean()),
                "accuracy_change": float(evidence.accuracy[rows].mean() - evidence.base_accuracy),
            }
        )
    return found


def _mislabelled(evidence: Evidence, methods: Sequence[str]) -> list[dict[str, Any]]:
    """Return how well each score finds the labels known to be wrong; empty where none are."""
    run, wrong = evidence.run, evidence.wrong
    if wrong is None or not 0 < wrong.sum() < len(wrong):
        return []
    scores = {}
    for method in methods:
        scores[f"{method}: -C(i)"] = -evidence.contribution(method)
        kind = run.noted.kind_of(method)
        if kind == MEAN:  # one number a sample has no spread
            continue
        each = "C(i, j)" if kind == SAMPLES else "C(i, class)"
        scores[f"{method}: spread of {each}"] = evidence.spread(method)
        scores[f"{method}: harm alone, {each} < 0"] = harm(run, method)
    scores["training loss at the end"] = evidence.final_loss
    scores["training loss, mean over visits"] = evidence.mean_loss
    scores["chance"] = np.random.Generator(np.random.PCG64(0)).random(len(wrong))
    return detection(scores, wrong)

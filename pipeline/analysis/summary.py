"""The closing summary of a run, as data.

Keys read here beyond the contract's (all optional): ``run.json["summary"]`` may hold
``train_accuracy``, ``test_accuracy`` (0 to 1), ``peak_bytes`` (largest resident memory of any
worker) and ``predicted_bytes`` (what the plan said); without the accuracies the last known value
of the record's per-epoch columns is taken, without ``peak_bytes`` the largest manifest value.
"""

from __future__ import annotations

import importlib.util
import json
import math
import shlex
import shutil
import sys
from typing import TYPE_CHECKING, Any

import numpy as np

from ...storage import layout
from ...storage.errors import HydraError
from ...workers.recipes import BUILT_IN
from ..reading.stage_states import stage_states
from ..reading.unit_values import UnitValues, values_of
from ..vocabulary import MEAN, SAMPLES
from .status import command_line
from .top import top
from .trained_lines import trained_lines
from .trust_lines import trust_lines
from .zeros import zero_warning

if TYPE_CHECKING:
    from ..reading.reader import Reader

EXTREMES = 5
"""How many helpful and how many harmful samples the summary shows."""


def summary(run: Reader, method: str | None = None) -> dict[str, Any]:
    """Return what ``hydra-pipe run`` prints at its end, as JSON-able values.

    Parts that a half-finished run does not have yet are None or empty.

    Args:
        run: The run.
        method: The estimator whose samples are shown; None: the one made last by ``hydra-pipe run``.

    Returns:
        ``run``, ``recipe``, ``method``, ``targets``, ``n_train``, ``n_test``, ``n_tracked``,
        ``n_test_tracked``, ``dimension``; ``accuracy`` with ``train`` and ``test`` (0 to 1);
        ``memory`` with ``peak_bytes`` and ``predicted_bytes``; ``warnings``, of the preflight and of contributions
        that are all zero; ``trust`` (what speaks for the numbers, a line a fact); ``stages`` (``stage``, ``units``,
        ``rows``, ``bytes``, ``seconds``); ``disk`` (``path``, ``bytes``, ``files``); ``helpful``
        and ``harmful`` (rows of `top.top`, with ``original_label`` where a label is wrong on
        purpose); ``next`` (commands to type).
    """
    info = run.noted
    methods = run.methods()
    method = method if method in methods else _current_method(run, methods)
    states = stage_states(run.directory, info)
    manifests = [m for stage in run.directory.stages() for m in run.directory.manifests(stage)]
    peaks = [values_of(UnitValues, m).peak_bytes or 0 for m in manifests]
    entries = {entry.path: entry for m in manifests for entry in m.files}.values()
    disk: dict[str, list[int]] = {}
    for entry in sorted(entries, key=lambda entry: layout.rank(entry.path)):
        sizes = disk.setdefault(layout.part_of(entry.path), [0, 0])
        sizes[0] += entry.bytes
        sizes[1] += 1
    for seed, member in run.members().items():
        inside = {
            entry.path: entry.bytes
            for stage in member.directory.stages()
            for manifest in member.directory.manifests(stage)
            for entry in manifest.files
        }
        disk[layout.of_seed(seed)] = [sum(inside.values()), len(inside)]
    noisy = None if method is None else run.noisy()
    helpful, harmful = (_extremes(run, method, harmful, noisy) for harmful in (False, True))
    zero = None if method is None else zero_warning(run.directory, method)
    trust = None if method is None else info.trust.get(method)
    return {
        "run": run.uri,
        "recipe": run.recipe,
        "method": method,
        "targets": None if method is None else info.kind_of(method),
        **{
            key: getattr(info, key)
            for key in ("n_train", "n_test", "n_tracked", "n_test_tracked", "dimension")
        },
        "accuracy": {
            "train": _accuracy(run, "train_accuracy"),
            "test": _accuracy(run, "test_accuracy"),
        },
        "memory": {
            "peak_bytes": info.summary.peak_bytes or max(peaks, default=0) or None,
            "predicted_bytes": info.summary.predicted_bytes or None,
        },
        "warnings": [*info.warnings(), *([zero] if zero else [])],
        "trust": [*_trained(run), *(trust_lines(trust) if trust else [])],
        "stages": [
            {"stage": s.stage, "units": s.done, "rows": s.rows, "bytes": s.bytes, "seconds": s.seconds}
            for s in states
            if s.done
        ],
        "disk": [{"path": path, "bytes": size, "files": files} for path, (size, files) in disk.items()],
        "helpful": helpful,
        "harmful": harmful,
        "next": _next(run, method, methods),
    }


def _current_method(run: Reader, methods: list[str]) -> str | None:
    if run.noted.method in methods:
        return run.noted.method
    return methods[0] if methods else None


def _trained(run: Reader) -> list[str]:
    try:
        return trained_lines(run.trajectory())
    except HydraError:
        return []


def _accuracy(run: Reader, key: str) -> float | None:
    noted = run.noted.summary.closing.get(key)
    if noted is not None:
        return float(noted)
    try:
        values = np.asarray(run.trajectory().epochs.get(key, ()), dtype=np.float64)
    except HydraError:
        return None
    known = values[np.isfinite(values)]
    return float(known[-1]) if len(known) else None


def _extremes(
    run: Reader, method: str | None, harmful: bool, noisy: tuple[np.ndarray, np.ndarray] | None
) -> list[dict[str, Any]]:
    if method is None:
        return []
    rows: list[dict[str, Any]] = top(run, k=EXTREMES, harmful=harmful, method=method).to_pylist()
    original = {} if noisy is None else dict(zip(noisy[0].tolist(), noisy[1].tolist(), strict=True))
    for row in rows:
        row["original_label"] = original.get(row["train_index"])
        row["contribution"] = row["contribution"] if math.isfinite(row["contribution"]) else None
    return rows


def _next(run: Reader, method: str | None, methods: list[str]) -> list[str]:
    """Return commands that show something at once: they are printed to be copied."""
    if method is None:
        return [command_line(run.noted.spec, uri=run.uri)]
    where = shlex.quote(run.uri)
    first = run.contributions(method).head(1, columns=["test_index", "test_label"]).to_pylist()
    kind = run.noted.kind_of(method)
    column, option = ("test_index", "--test") if kind == SAMPLES else ("test_label", "--class")
    test = f" {option} {first[0][column]}" if first and kind != MEAN else ""
    chosen = "" if method == methods[0] else f" --method {method}"
    reference = str(run.noted.identity.get("recipe", ""))
    named = "" if reference in BUILT_IN or not reference else f" {shlex.quote(reference)}"
    commands = [
        f"hydra-pipe top {where}{test} --harmful{chosen}",
        f"hydra-pipe detect {where}{named}{chosen}",
        f"hydra-pipe report {where}{named} --to {shlex.quote(run.recipe)}.html",
        f"hydra-pipe verify {where}",
    ]
    if importlib.util.find_spec("duckdb"):  # an extra; its package has no command of its own
        glob = json.dumps(run.directory.path(layout.table_parts("contributions", method)))
        other = "" if kind == MEAN else '.filter("train_label <> test_label")'
        query = f'{other}.aggregate("train_index, avg(contribution) AS c").order("c").limit(10).show()'
        code = f"import duckdb; duckdb.read_parquet({glob}){query}"
        commands.append(f"{_python()} -c {shlex.quote(code)}")
    return commands


def _python() -> str:
    """Return what a shell has to be given to start this Python."""
    return "python" if shutil.which("python") == sys.executable else shlex.quote(sys.executable)

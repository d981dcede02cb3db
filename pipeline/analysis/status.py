"""What ``hydra-pipe status`` tells of a run, and the command that does what is missing."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ...storage.lock import read_holder
from ..reading.stage_states import StageState, stage_states
from ..vocabulary import ATTRIBUTE, COMPLETE, MISSING, PARTIAL, judges

if TYPE_CHECKING:
    from ..reading.reader import Reader


def status(run: Reader) -> dict[str, Any]:
    """Return what ``hydra-pipe status`` prints, as JSON-able values.

    Returns:
        ``run``, ``recipe``, ``state`` (``complete`` or ``partial``), ``n_train``, ``n_test``,
        ``n_tracked``, ``n_test_tracked``, ``dimension``, ``methods`` (name to state), ``warnings`` (of
        the preflight, one line each), ``stages`` (one mapping a stage, see `StageState`), ``seeds``
        (one mapping a run with another seed: ``seed``, ``state``) and ``resume`` (the command that does
        what is missing; None when nothing is), ``writer`` (who writes to it now, and how far that is; None: nobody).
    """
    states = stage_states(run.directory, run.noted)
    # What judges a run is no part of it: it never makes one incomplete.
    complete = all(s.state == COMPLETE for s in states if not judges(s.stage))
    methods = {name: _method_state(states, name) for name in run.noted.method_names()}
    return {
        "run": run.uri,
        "recipe": run.recipe,
        "state": COMPLETE if complete else PARTIAL,
        **{
            key: getattr(run.noted, key)
            for key in ("n_train", "n_test", "n_tracked", "n_test_tracked", "dimension")
        },
        "rows_kept": _rows_kept(run),
        "methods": methods,
        "warnings": run.noted.warnings(),
        "stages": [dataclasses.asdict(state) for state in states],
        "seeds": _seeds(run),
        "resume": None if complete else _resume(run, states),
        "writer": _writer(run),
    }


def _rows_kept(run: Reader) -> dict[str, object]:
    """Return ``layers`` and ``project`` of the run, ``columns`` of its rows (None where they are not known, or all), and
    ``store_dtype`` by method.
    """
    noted = run.noted
    layers, project = noted.identity.get("layers"), noted.identity.get("project")
    planned = noted.rest.get("plan", {}).get("run", {}) if layers or project else {}
    kept = {name: noted.entry(name).store_dtype for name in noted.method_names()}
    return {
        "layers": layers,
        "project": project,
        "columns": planned.get("numbers a row"),
        "store_dtype": {name: dtype for name, dtype in kept.items() if dtype},
    }


def _writer(run: Reader) -> dict[str, object] | None:
    """Return who holds the run: ``command``, ``host``, ``pid``, ``since``, ``at`` (the last sign of life, by its clock) and
    ``standing``, see `storage.lock.Standing`.
    """
    holder = read_holder(run.uri)
    if holder is None:
        return None
    return {
        "command": holder.command,
        "host": holder.process.host,
        "pid": holder.process.pid,
        "since": holder.since,
        "at": holder.at,
        "standing": None if holder.standing is None else dataclasses.asdict(holder.standing),
    }


def _seeds(run: Reader) -> list[dict[str, Any]]:
    there = run.members()
    return [
        {"seed": seed, "state": status(there[seed])["state"] if seed in there else MISSING}
        for seed in run.noted.other_seeds
    ]


def _resume(run: Reader, states: Sequence[StageState]) -> str:
    """Return the command that does what is missing; estimators are added once the rest is there."""
    noted, spec = run.noted, run.noted.spec
    missing = {state.stage.split("/")[0] for state in states if state.state != COMPLETE}
    seeds = max((len(run.averages(name)) for name in missing), default=0)
    sources = {noted.entry(name).source or name for name in missing}
    added = [name for name in sources if noted.entry(name).mode == ATTRIBUTE]
    if not added or len(added) < len(sources):
        return command_line({**spec, "seeds": seeds} if seeds else spec, uri=run.uri)
    name = min(added)
    words = ["hydra-pipe", "attribute", run.uri]
    if spec.get("recipe", "digits") != "digits":
        words.append(str(spec["recipe"]))
    words += ["--method", name]
    for key, value in (noted.entry(name).options or {}).items():
        words += ["--option", f"{key}={_scalar(value)}"]
    if seeds:
        words += ["--seeds", str(seeds)]
    return shlex.join(words)


def command_line(spec: Mapping[str, Any], *, uri: str, command: str = "run") -> str:
    """Return the ``hydra-pipe`` command that a stored specification came from, quoted for a shell.

    Only what differs from the defaults is spelled out. The recipe is shown for the user to read
    and to type: nothing here imports it.
    """
    from ..spec.method_options import CURVATURE_FIELDS
    from ..spec.spec import RunSpec

    words = ["hydra-pipe", command]
    if spec.get("recipe", "digits") != "digits":
        words.append(str(spec["recipe"]))
    words += ["--out", uri]
    for field in dataclasses.fields(RunSpec):
        name, value = field.name, spec.get(field.name)
        if name in ("recipe", "out", "recipe_args", "overwrite", "wait") or value is None:
            continue
        if field.default is not dataclasses.MISSING and value == field.default:
            continue
        option = name.replace("_", "-")
        if name == "layers":
            words += ["--layers", ",".join(map(str, value))]
        elif name in CURVATURE_FIELDS:
            steps = value if isinstance(value, (int, str)) else ",".join(map(str, value))
            words += ["--option", f"{option}={steps}"]
        else:
            words += [f"--{option}", str(value)]
    arguments = spec.get("recipe_args")
    if isinstance(arguments, Mapping):
        for key, value in arguments.items():
            words += ["--set", f"{key}={_scalar(value)}"]
    return shlex.join(words)


def _scalar(value: object) -> str:
    """Spell ``value`` so that ``--set`` reads it back as the same value."""
    import json

    if not isinstance(value, str) or value.lstrip().startswith("["):
        return json.dumps(value)
    try:
        json.loads(value)
    except ValueError:
        return value
    return json.dumps(value)


def _method_state(states: Sequence[StageState], method: str) -> str:
    own = [state.state for state in states if state.stage.startswith(f"{method}/")]
    if own[-1:] == [COMPLETE]:
        return COMPLETE
    return MISSING if all(state == MISSING for state in own) else PARTIAL

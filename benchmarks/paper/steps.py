"""Steps of an experiment: each leaves a JSON file when it is done, and is not done twice.

A step is known by its name and its parameters. Arrays that it returns lie beside the JSON, so that an
experiment that was killed goes on where it was; other parameters make a step be done again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hydra_pipe.pipeline.run import run as drive
from hydra_pipe.pipeline.spec.spec import RunSpec

from hydra_pipe import Run, open_run

OF_THE_METHOD = ("mode", "targets", "hessian")
"""Fields of `RunSpec` that add a method to a run instead of making it another."""

Found = dict[str, Any]
"""What a step found: JSON-able values and arrays."""


class Steps:
    """The finished steps of one experiment.

    Args:
        folder: Where they lie; made where it is missing.
        say: Is told what is being done, a line a step.

    """

    def __init__(self, folder: Path, say: Callable[[str], None] = lambda _text: None) -> None:
        self.folder, self.say = folder, say
        self.own_seconds, self.done, self.skipped = 0.0, 0, 0
        self.shared: list[Steps] = []
        folder.mkdir(parents=True, exist_ok=True)

    def do(self, name: str, parameters: Mapping[str, Any], work: Callable[[], Found]) -> Found:
        """Return what a step finds, from its file where it was done with the same parameters.

        Args:
            name: Of the step, as a file is named.
            parameters: All that its result depends on, JSON-able.
            work: Does it. Arrays in what it returns are kept in a ``.npz`` file.
        """
        path = self.folder / f"{name}.json"
        wanted = json.loads(json.dumps(dict(parameters)))
        kept = _read(path)
        if kept is None or kept["parameters"] != wanted:
            self.say(name)
            begun = time.perf_counter()
            found = work()
            kept = _write(path, wanted, found, time.perf_counter() - begun)
            self.done += 1
        else:
            self.skipped += 1
        self.own_seconds += kept["seconds"]
        arrays = path.with_suffix(".npz")
        found = dict(kept["found"])
        if arrays.exists():
            with np.load(arrays) as store:
                found |= {key: store[key] for key in store.files}
        return found

    def beside(self, name: str) -> Steps:
        """Return the steps of a part that several experiments share; they count here, too."""
        shared = Steps(self.folder.parent / name, self.say)
        self.shared.append(shared)
        return shared

    @property
    def seconds(self) -> float:
        """Elapsed time of all steps asked for, whenever they were done."""
        return self.own_seconds + sum(steps.seconds for steps in self.shared)

    @property
    def counts(self) -> tuple[int, int]:
        """How many steps were done now, and how many were there."""
        parts = [(self.done, self.skipped), *(steps.counts for steps in self.shared)]
        return sum(done for done, _ in parts), sum(skipped for _, skipped in parts)

    def attributed(self, name: str, **spec: Any) -> tuple[Run, str]:
        """Return a run of the product, gone on with where it was, and the method: it resumes by itself.

        Args:
            name: Of the run; its folder is called so and by what the run is made from, so that another training
                does not meet it.
            spec: Fields of `RunSpec`; one training thread in this process unless said otherwise.
        """
        given = {"executor": "serial", "threads": 1, **spec}
        parameters = {
            key: value if isinstance(value, (str, int, float, type(None))) else described(value)
            for key, value in given.items()
        }
        of_the_run = {key: value for key, value in parameters.items() if key not in OF_THE_METHOD}
        place = self.folder / f"{name}-{_key(of_the_run)}"
        whole = RunSpec(**given, out=str(place))
        self.do(f"{name}-{whole.method}-{_key(parameters)}", parameters, lambda: _driven(whole))
        return open_run(str(place)), whole.method


def described(value: Any) -> Any:
    """Return what tells a recipe, a list or an array from another, JSON-able."""
    if hasattr(value, "arguments"):
        return {"recipe": value.name, **value.arguments()}
    return np.asarray(value).tolist()


def _key(parameters: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(parameters, sort_keys=True).encode()).hexdigest()[:8]


def _driven(spec: RunSpec) -> Found:
    drive(spec)
    return {}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _write(path: Path, parameters: Mapping[str, Any], found: Found, seconds: float) -> Any:
    """Write arrays, then the JSON in one move: a step is done once its JSON is there."""
    arrays = {key: value for key, value in found.items() if isinstance(value, np.ndarray)}
    beside = path.with_suffix(".npz")
    path.unlink(missing_ok=True)
    beside.unlink(missing_ok=True)
    if arrays:
        np.savez_compressed(beside, **arrays)  # type: ignore[arg-type]
    rest = {key: value for key, value in found.items() if key not in arrays}
    kept = {"parameters": parameters, "seconds": round(seconds, 2), "found": rest}
    half = path.with_suffix(".half")
    half.write_text(json.dumps(kept, indent=1) + "\n")
    half.replace(path)
    return json.loads(json.dumps(kept))

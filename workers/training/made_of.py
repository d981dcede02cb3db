"""What a run was made from, in digests: source, data, model, initial weights, first steps.

Looked at once before a run starts, and again whenever a recipe is put beside the run. Numbers are
compared so that rounding on another machine is no difference: bits first, then projections.
"""

from __future__ import annotations

import cmath
import functools
import hashlib
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from ...storage.documents import plain
from ..data.batches import holds_tensors
from ..determinism import fingerprint, preserved_generators
from ..recipe import Recipe
from .initial import leaves_of_state
from .same_data import leaves_of
from .source import changed_files, source_difference, source_of
from .training import Training

FIRST_STEPS = 4
"""Steps whose settings and losses are noted."""

ROUNDING = 1e-6
"""Projections of data and weights that differ by less, relative to the norm, differ by rounding."""

LOSS = {"float32": (1e-4, 1e-3), "float64": (1e-10, 1e-6)}
"""By dtype: how far the first loss, and those after it, may be apart, relative. Errors grow in training."""

UNSTABLE = "unstable"
"""Key of what cannot be compared: it is another each time one looks."""

_TWICE = 4
_BLOCK = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class FirstSteps:
    """The first plain training steps.

    Attributes:
        settings: Of each step, what the optimiser used: one list of steps a name, one value a group.
        losses: Batch loss of each step.
        seconds: Wall-clock time of each step.
    """

    settings: dict[str, list[list[float]]]
    losses: list[float]
    seconds: list[float]


def first_steps(training: Training) -> FirstSteps:
    """Take the first steps, as recording does but for what happens between epochs."""
    scheduler = training.recipe.scheduler(training.optimizer)
    settings: dict[str, list[list[float]]] = {name: [] for name in training.family.settings}
    losses, seconds = [], []
    stop = min(training.steps, training.epoch_ends[0], FIRST_STEPS)
    for step, batch in enumerate(training.loader(0, stop)):
        for name, values in training.read_settings().items():
            settings[name].append(values)
        begun = time.perf_counter()
        losses.append(float(training.step(step, batch)))
        seconds.append(time.perf_counter() - begun)
        if (
            scheduler is not None
            and training.recipe.scheduler_interval == "step"
            and step + 1 < stop
            and training.updates[step]
        ):
            scheduler.step()
    return FirstSteps(settings=settings, losses=losses, seconds=seconds)


def data_of(
    recipe: Recipe, datasets: Mapping[str, Dataset[Any] | None], labels: Mapping[str, list[int] | None]
) -> dict[str, Any]:
    """Return digests of a recipe's datasets, by what they are of.

    Args:
        recipe: The recipe.
        datasets: Its datasets, by name.
        labels: Their classes, by name.
    """
    data: dict[str, Any] = {}
    with preserved_generators():
        for what, dataset in datasets.items():
            data[f"{what} samples"] = None if dataset is None else _samples(recipe, dataset)
            if labels.get(what) is not None:
                data[f"{what} labels"] = _sha(np.asarray(labels[what], dtype=np.int64).tobytes())
    return data


def made_of(training: Training, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return the digests of a recipe, but for its first steps, JSON-able. Call before any step.

    Args:
        training: Its training, untouched.
        data: What `data_of` returned.
    """
    model = training.model
    made = {
        "source": source_of(type(training.recipe)),
        "data": data,
        "model": structure(training),
        "weights": signature([("", tensor) for tensor in (*model.parameters(), *model.buffers())]),
        "environment": fingerprint(training.device),
        "dtype": training.compute.dtype,
    }
    state = leaves_of_state(training.recipe)
    return dict(plain({**made, "initial": signature(state)} if state else made))


def _samples(recipe: Recipe, dataset: Dataset[Any]) -> dict[str, Any]:
    """Return the signature of a dataset, unless a generator of its own makes items differ each time."""
    if holds_tensors(dataset):
        return signature(leaves_of(recipe, dataset))
    first, again = (signature(leaves_of(recipe, dataset, _TWICE)) for _ in range(2))
    return signature(leaves_of(recipe, dataset)) if first == again else {UNSTABLE: True}


def with_first_steps(made: Mapping[str, Any], first: FirstSteps) -> dict[str, Any]:
    """Add the first steps to what `made_of` returned."""
    return {**made, **plain({"settings": first.settings, "losses": first.losses})}


def of_another_seed(made: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is the same with another seed, of the same data."""
    return {name: value for name, value in made.items() if name not in ("weights", "losses", "initial")}


def structure(training: Training) -> dict[str, str]:
    """Return digests of modules and buffers, and of parameters with their shapes and groups."""
    model: nn.Module = training.model
    modules = [f"{name} {type(module).__name__}" for name, module in model.named_modules()]
    modules += [f"{name} {tuple(b.shape)} {b.dtype}" for name, b in model.named_buffers()]
    parameters = [f"{e.name} {tuple(e.shape)} {e.group}" for e in training.layout.entries]
    return {
        "layers": _sha("\n".join(modules).encode()),
        "parameters": _sha("\n".join(parameters).encode()),
    }


def signature(leaves: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return what identifies arrays: ``exact`` bits of all that is no float, and of floats.

    Floats have their ``bits``, and ``norm`` and two projections (``probe``), which rounding moves by
    about as little as it does the numbers.
    """
    exact, bits = hashlib.sha256(), hashlib.sha256()
    squares, probe, block = 0.0, 0j, 0
    for kind, leaf in leaves:
        exact.update(kind.encode())
        if not isinstance(leaf, Tensor):
            exact.update(leaf if isinstance(leaf, bytes) else repr(leaf).encode())
            continue
        exact.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode())
        flat = leaf.detach().cpu().contiguous().reshape(-1)
        (bits if leaf.is_floating_point() else exact).update(flat.view(torch.uint8).numpy().tobytes())
        if leaf.is_floating_point():
            for start in range(0, len(flat), _BLOCK):
                values = flat[start : start + _BLOCK].double().numpy()
                squares += float(values @ values)
                across = complex(*(_waves()[:, : len(values)] @ values))
                probe += across * cmath.exp(1j * block)  # each block with a phase of its own
                block += 1
    return {
        "exact": exact.hexdigest()[:32],
        "bits": bits.hexdigest()[:32],
        "norm": math.sqrt(squares),
        "probe": [probe.real, probe.imag],
    }


@functools.cache
def _waves() -> npt.NDArray[np.float64]:
    """Return a cosine and a sine to project blocks on, (2, block)."""
    angle = 12.9898 * np.arange(_BLOCK)
    return np.stack([np.cos(angle), np.sin(angle)])


def differences(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return what differs between two recipes, in words; what rounding explains does not.

    Initial weights and losses are compared within one environment alone: elsewhere generators and
    kernels may be others, and every replay checks the weights anyway.
    """
    found: list[str] = []
    before, after = stored.get("data", {}), now.get("data", {})
    found += [
        _data(what, before.get(what), after.get(what))
        for what in dict.fromkeys([*before, *after])
        if not _alike(before.get(what), after.get(what))
    ]
    for name, words in (("layers", "the model's layers"), ("parameters", "the model's parameters or groups")):
        if stored.get("model", {}).get(name) != now.get("model", {}).get(name):
            found.append(words)
    if not _alike(stored.get("initial"), now.get("initial")):
        found.append("the initial state")
    found += _settings(stored.get("settings", {}), now.get("settings", {}))
    if stored.get("environment") == now.get("environment") and stored.get("dtype") == now.get("dtype"):
        if "weights" in stored and "weights" in now and not _alike(stored["weights"], now["weights"]):
            found.append("initial weights")
        if "losses" in stored and "losses" in now:
            found += _losses(stored["losses"], now["losses"], LOSS[str(now["dtype"])])
    if source_difference(stored.get("source", {}), now.get("source", {})) == "code":
        found.append(_source(stored["source"], now["source"]))
    return found


def cosmetic(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return a line where the recipe's files were edited and nothing of it has changed."""
    source = now.get("source", {})
    if source_difference(stored.get("source", {}), source) != "text":
        return None
    files = ", ".join([source["file"], *changed_files(stored["source"], source)])
    return f"the source of the recipe was edited ({files}), but not what it does: the run goes on"


def _source(stored: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    others = changed_files(dict(stored), dict(now))
    more = f", with {', '.join(others)}" if others else ""
    return f"the recipe's source (class {now['class']} in {now.get('file', 'a session')}{more})"


def _data(what: str, stored: Any, now: Any) -> str:
    if stored is None or now is None:
        return f"{what} ({'there are none now' if now is None else 'there were none'})"
    return what


def _settings(stored: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found = []
    for name in now:
        before = stored.get(name, now[name])
        steps = min(len(before), len(now[name]))  # fewer epochs or samples differ elsewhere
        step = next((k for k in range(steps) if before[k] != now[name][k]), None)
        if step is not None:
            values = (", ".join(f"{v:.6g}" for v in side[step]) for side in (before, now[name]))
            pair = "stored {}, now {}".format(*values)
            found.append(f"{name.replace('_', ' ')} of the first steps ({pair} at step {step})")
    return found


def _losses(stored: list[float | None], now: list[float | None], limits: tuple[float, float]) -> list[str]:
    """Compare losses; None is what JSON makes of one that is not finite."""
    for step, (before, after) in enumerate(zip(stored, now, strict=False)):
        limit = limits[min(step, 1)]
        if before is None or after is None:
            near = before is after
        else:
            near = math.isclose(before, after, rel_tol=limit, abs_tol=limit)
        if not near:
            pair = ("not finite" if v is None else f"{v:.6g}" for v in (before, after))
            return ["losses of the first steps (stored {}, now {} at step {})".format(*pair, step)]
    return []


def _alike(stored: Any, now: Any) -> bool:
    """Whether two digests or signatures are the same, to rounding."""
    if stored == now:
        return True
    if any(isinstance(side, Mapping) and UNSTABLE in side for side in (stored, now)):
        return True
    if not isinstance(stored, Mapping) or not isinstance(now, Mapping) or stored["exact"] != now["exact"]:
        return False
    if stored["bits"] == now["bits"]:
        return True
    if None in (stored["norm"], now["norm"]):  # not finite
        return False
    limit = ROUNDING * max(stored["norm"], now["norm"])
    return bool(math.dist(stored["probe"], now["probe"]) <= limit)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]

"""Operators: what a step of the replay dispatches beside a plain one, what a device would make the host wait for, what recording adds.

Counts repeat exactly where times do not. Counted is what would start work on a device: no views, no allocations. A call for many
tensors (``_foreach_*``) is one. Steps after the first are counted, since the first makes the optimiser's buffers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.persample import rules
from hydra_pipe.workers.recipe import Recipe
from hydra_pipe.workers.replay.base import Replay
from hydra_pipe.workers.replay.fast import FastRows
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .cases import Clothes, Photographs, Prefetched, record
from .report import Result
from .small_transformer import Characters, SmallTransformer

SIZES: Mapping[str, Any] = {
    "models": ("LeNet-5", "DenseNet-40", "transformer"),
    "samples": 192,
    "sequences": 48,
    "recorded": 6400,
    "epochs": 4,
    "rounds": 5,
    "threads": 1,
}
QUICK: Mapping[str, Any] = {**SIZES, "recorded": 640, "epochs": 1, "rounds": 1}

ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class WideTransformer(SmallTransformer):
    """Four layers of width 256, by SGD with momentum, a batch of 16 sequences."""

    NAME = "wide-transformer"

    epochs = 1
    batch_size = 16
    lr = 1e-2
    clip_grad_norm = None
    scheduler_interval = "epoch"

    def model(self) -> nn.Module:
        """Return the network."""
        return Characters(width=256, heads=4, layers=4)

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """Return SGD with momentum over all parameters."""
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-4)

    def scheduler(self, optimizer: torch.optim.Optimizer) -> Any:
        """Return no schedule."""
        return


class Operators(TorchDispatchMode):
    """Counts what is dispatched.

    Attributes:
        kernels: By operator, but for views and allocations.
        reads: What would make the host wait for a device, or brings a tensor there that the host made.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.reads: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        if not (func.is_view or name in ALLOCATIONS or name.startswith("profiler::")):
            self.kernels[name] += 1
        masks = name.startswith(("index", "_index")) and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for argument in args
            if isinstance(argument, (list, tuple))
            for index in argument
        )
        if masks or name in ("_local_scalar_dense", "nonzero", "masked_select", "equal"):
            self.reads[name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def count(self) -> int:
        """All kernels."""
        return sum(self.kernels.values())


@contextmanager
def host_made(found: Counter[str]) -> Iterator[None]:
    """Count tensors that are made of the host's values, and tensors whose values the host takes."""
    with ExitStack() as stack:
        for owner, name in (
            (torch, "from_numpy"),
            (torch, "tensor"),
            (torch, "as_tensor"),
            (Tensor, "cpu"),
            (Tensor, "numpy"),
            (Tensor, "tolist"),
        ):
            plain = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, _counted(plain, name, found)))
        yield


def _counted(plain: Callable[..., Any], name: str, found: Counter[str]) -> Callable[..., Any]:
    def counted(*args: Any, **kwargs: Any) -> Any:
        found[name] += 1
        return plain(*args, **kwargs)

    return counted


def count_steps(step: Callable[[int], object], first: int, stop: int) -> Operators:
    """Return what some steps dispatch, host reads and host-made tensors included."""
    with Operators() as found, host_made(found.reads), torch.enable_grad():
        for k in range(first, stop):
            step(k)
    return found


def counts(recipe: Recipe, compute: Compute, folder: Path) -> tuple[float, float, float]:
    """Return the operators of a plain step and of one of the replay, all rows tracked, and the latter's host reads."""
    batches, trajectory = record(recipe, compute, folder)
    plain = Prefetched(recipe, compute, batches)
    replayed = Prefetched(recipe, compute, batches)
    replay = Replay(replayed, trajectory, np.arange(plain.n_train), FastRows)
    replay.at_once = False  # as on a device

    def tracked(step: int) -> None:
        replayed.apply_settings(replay._settings, step)
        replay.step(step, batches[step], replay.rows(step))

    plain.step(0, batches[0])
    tracked(0)
    steps = len(batches) - 1
    beside = count_steps(lambda step: plain.step(step, batches[step]), 1, len(batches))
    found = count_steps(tracked, 1, len(batches))
    replay.close()
    return beside.count / steps, found.count / steps, sum(found.reads.values()) / steps


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Count replay's steps, and measure what recording adds to a loop by hand."""
    result = Result(name="operators", sizes=sizes)
    compute = Compute(device="cpu", threads=sizes["threads"])
    samples, sequences = sizes["samples"], sizes["sequences"]
    made = {
        "LeNet-5, B 64": (Clothes(train_size=samples, test_size=8, epochs=1), 130, None),
        "DenseNet-40, B 64": (Photographs(train_size=samples, test_size=8, epochs=1), 1300, None),
        "transformer 4 x 256, B 16": (
            WideTransformer(train_size=sequences, test_size=4, epochs=1),
            None,
            1.6,
        ),
    }
    for name, (recipe, most, share) in made.items():
        if not name.startswith(tuple(sizes["models"])):
            continue
        place = folder / recipe.name
        place.mkdir()
        plain, tracked, reads = counts(recipe, compute, place)
        result.add(f"{name}: operators of a plain step", [plain], "")
        result.add(f"{name}: operators of a step of the replay", [tracked], "", at_most=most)
        result.add(f"{name}: replay / plain", [tracked / plain], "x", at_most=share)
        result.add(f"{name}: host reads of a step of the replay", [reads], "", at_most=0)
        place = folder / f"{recipe.name}-device"
        place.mkdir()
        with mock.patch.object(rules, "GROUPED", frozenset()):
            _plain, tracked, _reads = counts(recipe, compute, place)
        note = "convolutions as accelerators do them"
        result.add(f"{name}: the same by windows", [tracked], "", note=note)
    _recording(result, sizes, compute, folder)
    return result


def by_hand(recipe: Recipe, training: Prefetched) -> None:
    """Train as one would without hydra-pipe: no checks, no digests, nothing kept but the loss."""
    model, optimizer, total = training.model, training.optimizer, 0.0
    for batch in training.fetched:
        optimizer.zero_grad()
        loss = recipe.losses(model, batch).mean()
        loss.backward()
        optimizer.step()
        total += float(loss.detach())


def _recording(result: Result, sizes: Mapping[str, Any], compute: Compute, folder: Path) -> None:
    """Record LeNet-5 beside a loop by hand, evaluation apart."""
    recipe = Clothes(train_size=sizes["recorded"], test_size=8, epochs=sizes["epochs"])
    fetched = Prefetched(recipe, compute).fetched
    shares, operators = [], []
    for turn in range(sizes["rounds"] + 1):
        training = Prefetched(recipe, compute, fetched)
        recorder = Recorder(Prefetched(recipe, compute, fetched), str(folder / f"recorded-{turn}.zarr"))
        hand = _process(partial(by_hand, recipe, training))
        with mock.patch("hydra_pipe.workers.training.record.evaluate", _unmeasured):
            recorded = _process(recorder.run)
        shares.append(recorded / hand)
    for train in (
        partial(by_hand, recipe, Prefetched(recipe, compute, fetched)),
        Recorder(Prefetched(recipe, compute, fetched), str(folder / "counted.zarr")).run,
    ):
        with Operators() as found, mock.patch("hydra_pipe.workers.training.record.evaluate", _unmeasured):
            train()
        operators.append(found.count / len(fetched))
    note = "process seconds, checkpoints and digests included, evaluation not"
    result.add("LeNet-5: record / a loop by hand", shares[1:], "x", at_most=1.15, note=note)
    note = f"{operators[0]:.0f} by hand, {operators[1]:.0f} in the record"
    result.add(
        "LeNet-5: operators of a step, record / by hand", [operators[1] / operators[0]], "x", note=note
    )
    open_trajectory(str(folder / "counted.zarr"))


def _unmeasured(*_arguments: object) -> tuple[float, float]:
    return float("nan"), float("nan")


def _process(function: Callable[[], object]) -> float:
    begun = time.process_time()
    function()
    return time.process_time() - begun

"""Replayed steps as CUDA graphs: the launches of a step are noted once and given again as a whole.

The shapes, settings and order of batches are known from the record, so all steps of one shape are the same kernels over other
numbers. Captured is a step's pass forward and backward, the products of its rows and their addition to the sums; batch, rows and
coefficients lie in tensors that stay, and are filled before a graph is given. Fetching, seeding, the optimiser (whose few launches read
settings of the host) and the digests stay outside, so that a captured step has the bits of any other.

Every row of a batch is computed and added, those that are not tracked to a spare row of the sums.

What is not known to be the same at every step is not captured, and ``why`` says so. Steps are taken as ever until ``WARM`` of one
shape had graphs of one form, and again where capturing fails. None of this has run on a GPU so far: what is tested is which steps are
captured, and, with a stand-in that does the work again in the place of a graph, that they have the bits they had.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from ..determinism import host_states
from ..persample.engine import PerSampleGradients, Watch
from ..recipe import Batch
from ..training.training import Training

logger = logging.getLogger(__name__)

WARM = 3
"""Steps of a shape taken as ever before one is captured: libraries choose their kernels and make room in them."""

MOST_GRAPHS = 64
"""Graphs of a replay; each holds the memory of a step."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Made:
    """What a captured step leaves.

    Attributes:
        loss: Of the batch, a scalar.
        own_losses: Of its samples, (B,).
        gradients: One a parameter; None: it got none.
    """

    loss: Tensor
    own_losses: Tensor
    gradients: list[Tensor | None]


class Capturer(Protocol):
    """How work becomes a graph."""

    def beside(self) -> AbstractContextManager[Any]:
        """Return where steps run that come before a captured one."""

    def capture(self, work: Callable[[], Made]) -> Callable[[], Made]:
        """Return what does the work again; the work itself is not done."""


class CudaCapturer:
    """Captures with ``torch.cuda.graph``, all graphs in one pool of memory.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def beside(self) -> AbstractContextManager[Any]:
        """See ``Capturer``: the stream that graphs are captured on."""
        return _Beside(self._stream)

    def capture(self, work: Callable[[], Made]) -> Callable[[], Made]:
        """See ``Capturer``."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            made = work()

        def again() -> Made:
            graph.replay()
            return made

        return again


class _Beside:
    """Work on another stream, after and before what the present one does."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._inner: Any = None

    def __enter__(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream())
        self._inner = torch.cuda.stream(self._stream)
        self._inner.__enter__()

    def __exit__(self, *error: object) -> None:
        self._inner.__exit__(*error)
        torch.cuda.current_stream().wait_stream(self._stream)


class CapturableSink(Protocol):
    """A sink whose additions read nothing of the host.

    Attributes:
        engine: Gives the rows.
        spare: Row that takes what belongs to nobody; None: there is none.
    """

    engine: PerSampleGradients
    spare: int | None

    def refuses_graphs(self) -> str | None:
        """Say why its additions cannot be captured; None: they can."""

    def graph_key(self) -> Hashable:
        """Return what its additions depend on beside tensors."""

    def add(self, rows: Tensor, block: Tensor) -> None:
        """See ``Sink``."""

    def add_factors(self, entry: int, rows: Tensor, d_R: Tensor, x_R: Tensor | None) -> None:
        """See ``Sink``."""


CAPTURERS: dict[str, Callable[[torch.device], Capturer]] = {"cuda": CudaCapturer}
"""What captures steps, by type of device."""


def graphed(training: Training) -> bool:
    """Whether steps of a replay are to be captured where they can be."""
    return training.compute.graphs != "off" and training.device.type in CAPTURERS


def why_not(training: Training, sink: Any) -> str | None:
    """Say why no step of a replay can be captured; None: nothing is known against it."""
    if not hasattr(sink, "refuses_graphs"):
        return f"{type(sink).__name__} is not captured: only rows of forward mode without curvature are"
    found: str | None = sink.refuses_graphs()
    if found is not None:
        return found
    if training.weighted or training.schedule.accumulates or training.max_norm is not None:
        return "weights, accumulated batches and clipping read numbers back from the device"
    engine: PerSampleGradients = sink.engine
    if not engine.ruled:
        slow = [
            entry.name
            for entry, way in zip(training.layout.entries, engine.strategies, strict=True)
            if way in ("func", "vjp")
        ]
        return f"gradients of {', '.join(slow[:3])} come by other passes than the step's own"
    if training.batches.shape[1] > engine.tile:
        return f"{training.batches.shape[1]} rows of {engine.width:,} numbers are too large for one block"
    return None


@dataclass(kw_only=True, slots=True, eq=False)
class _Graph:
    """A captured step and the tensors it reads."""

    leaves: list[Any]
    rows: Tensor
    again: Callable[[], Made]


class StepGraphs:
    """Takes the steps of a replay by graphs, where it can.

    Args:
        training: That is replayed.
        sink: Takes the rows.
        capturer: Makes graphs.

    Attributes:
        why: Why steps are not captured (any more); None: they are.
        taken: Steps that were.
    """

    def __init__(self, training: Training, sink: CapturableSink, capturer: Capturer) -> None:
        self.training, self.sink, self.capturer = training, sink, capturer
        self.why = why_not(training, sink)
        self.taken = 0
        self._graphs: dict[Hashable, _Graph] = {}
        self._warm: Counter[Hashable] = Counter()
        self._forms: set[int] = set()

    def take(self, step: int, batch: Batch, rows: Tensor, plainly: Callable[[], Tensor]) -> Tensor:
        """Take a step; return its batch loss.

        Args:
            step: Which.
            batch: On the device.
            rows: (B,) on the device: which row each member is, ``sink.spare`` where it is not tracked.
            plainly: Takes it without a graph.
        """
        if self.why is not None:
            return plainly()
        leaves, shape = tree_flatten(batch)
        key = (_kinds(leaves), str(shape), self.sink.graph_key())
        graph = self._graphs.get(key)
        if graph is None and self._warm[key[:2]] < WARM:
            self._warm[key[:2]] += 1
            return self._look_on(plainly)
        if graph is None:
            graph = self._captured(key, step, leaves, shape, rows)
            if graph is None:
                return plainly()
        for kept, leaf in zip(graph.leaves, leaves, strict=True):
            if isinstance(kept, Tensor):
                kept.copy_(leaf)
        graph.rows.copy_(rows)
        return self._given(graph, step, batch)

    def _look_on(self, plainly: Callable[[], Tensor]) -> Tensor:
        """Take a step as ever, and see whether it is one that could be captured."""
        engine = self.sink.engine
        forms: set[int] = set()
        engine.notice = forms.add
        with self.capturer.beside():
            loss = plainly()
        engine.notice = None
        self._forms |= forms
        if len(self._forms) > 1:
            self._stop("the graph of the losses has another form from step to step")
        elif engine.repaired:
            self._stop(
                f"gradients of {', '.join(sorted(engine.repaired)[:3])} had to go by passes of their own"
            )
        return loss

    def _captured(
        self, key: Hashable, step: int, leaves: list[Any], shape: Any, rows: Tensor
    ) -> _Graph | None:
        """Capture the step; None where that fails."""
        if len(self._graphs) == MOST_GRAPHS:
            self._stop(f"batches have more than {MOST_GRAPHS} shapes")
            return None
        kept = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        place = rows.clone()
        batch = tree_unflatten(kept, shape)
        self.training.seed_step(step)
        before = host_states()
        try:
            again = self.capturer.capture(lambda: self._work(step, batch, place))
        except Exception as error:  # noqa: BLE001 - whatever cannot be captured is taken as ever
            self._stop(
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
            )
            return None
        if before != host_states():
            self._stop("the losses draw random numbers of the host")
            return None
        self._graphs[key] = found = _Graph(leaves=kept, rows=place, again=again)
        return found

    def _work(self, step: int, batch: Batch, rows: Tensor) -> Made:
        """Do what is captured."""
        training, sink = self.training, self.sink

        def add(start: int, block: Tensor) -> None:
            sink.add(rows[start : start + len(block)], block)

        def add_factors(entry: int, d_R: Tensor, x_R: Tensor | None) -> None:
            sink.add_factors(entry, rows, d_R, x_R)

        positions = torch.arange(len(rows), device=rows.device)
        watch = Watch(engine=sink.engine, positions=positions, sink=add, factors=add_factors)
        training.forget_gradients()
        loss = training.pass_through(step, batch, watch)
        sink.engine.hand_over(positions, len(rows), add, add_factors)
        gradients = [parameter.grad for parameter in training.parameters]
        return Made(loss=loss, own_losses=training.own_losses, gradients=gradients)

    def _given(self, graph: _Graph, step: int, batch: Batch) -> Tensor:
        """Give a graph, and end the step."""
        training = self.training
        training.seed_step(step)
        made = graph.again()
        for parameter, gradient in zip(training.parameters, made.gradients, strict=True):
            parameter.grad = gradient
        loss = made.loss.clone()  # the next graph writes there
        training.finish_captured(step, batch, loss, made.own_losses.clone())
        self.taken += 1
        return loss

    def _stop(self, why: str) -> None:
        self.why = why
        self._graphs = {}
        logger.warning("steps are not captured as CUDA graphs: %s", why)

    def told(self) -> dict[str, Any]:
        """Return what a manifest says of it."""
        return {"captured_steps": self.taken, **({} if self.why is None else {"why_not": self.why})}


def graphs_of(training: Training, sink: Any) -> StepGraphs | None:
    """Return what captures the steps of a replay; None where nothing is to be: on a CPU, or when it is off."""
    return (
        StepGraphs(training, sink, CAPTURERS[training.device.type](training.device))
        if graphed(training)
        else None
    )


def _kinds(leaves: list[Any]) -> tuple[Hashable, ...]:
    """Return what of a batch is in a graph for good: shapes and types of its tensors, and everything else."""
    return tuple(
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves
    )

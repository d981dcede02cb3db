"""What detectors have computed from the recipe: passes of the trained model over the tracked samples.

Done as stages of the run, on its executor, once; nothing is computed before a detector asks for it. Letters: n tracked
samples, F features, C outputs, P parameter tensors, K checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...storage import layout
from ...storage.errors import IncompleteStage, InputError, SpecMismatch
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ..drive.stages import Runner, Stage, run_stage, units_of
from ..drive.stores import StoreOf
from ..executors.base import Executor
from ..executors.events import Observer, null
from ..executors.ray import make_executor
from ..plan.provenance import check_named
from ..plan.sharding import spans
from ..plan.stored_spec import REPEATED, stored_spec
from ..plan.untrained import check_recorded
from ..reading.kept_rows import row_map_of
from ..reading.stage_states import stage_state
from ..spec.spec import RunSpec
from ..vocabulary import COMPLETE, REPLAY, TRAINING_OUTPUTS, own_gradients_stage

if TYPE_CHECKING:
    from ...workers.recipe import Recipe
    from ...workers.training.outputs import LastLayer
    from ...workers.training.training import Compute, Training
    from ..plan.survey import Survey
    from ..reading.reader import Reader
    from ..units.own import OwnGradientWork

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]

OUTPUT_ROWS, GRADIENT_ROWS = 4096, 512
"""Tracked samples of a unit: also what a killed worker loses. Whole forward passes, whatever the workers."""

CHECKPOINTS = 5
"""Of the closed form of TracIn, at most, spread over the record."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Outputs:
    """What the trained model makes of the tracked samples, at w_T in eval mode.

    Attributes:
        train_index: (n,), ascending.
        label: (n,), -1 where there is none.
        loss: (n,).
        prediction: (n,), -1 where unknown.
        output: (n, C), of the run's dtype.
        feature: (n, F), the inputs of the last layer.
        layer: The last layer.
    """

    train_index: Integers
    label: Integers
    loss: Floats
    prediction: Integers
    output: npt.NDArray[np.floating]
    feature: npt.NDArray[np.floating]
    layer: LastLayer


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Norms:
    """Of the gradients of the tracked samples' own losses, by parameter tensor.

    Attributes:
        train_index: (n,), ascending.
        absolute: Sums of absolute values, (n, P).
        square: Sums of squares, (n, P).
    """

    train_index: Integers
    absolute: Floats
    square: Floats


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Begun:
    """What passes are done with, once there is something to do."""

    spec: RunSpec
    surveyed: Survey
    compute: Compute
    executor: Executor


class Passes:
    """Lazily computed passes over the tracked samples of a run; close it at the end.

    What a pass found stays in the run, so that neither the recipe nor an executor is needed a second time.

    Args:
        run: The run.
        recipe: What it was made from; None: a built-in one is found by itself, another must be named.
        observer: Hears of what happens.
        given: Fields of `RunSpec` that say where the work is done.
    """

    def __init__(
        self,
        run: Reader,
        recipe: Recipe | str | None = None,
        observer: Observer = null,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.run, self.recipe, self.observer, self.given = run, recipe, observer, dict(given or {})
        self._begun: _Begun | None = None
        self._outputs: Outputs | None = None

    def close(self) -> None:
        """Let go of the workers."""
        if self._begun is not None:
            self._begun.executor.close()
            self._begun = None

    def parameters(self) -> list[str]:
        """Return the names of the P parameter tensors, in the order of the flat vector."""
        return [entry.name for entry in self.run.trajectory().parameters]

    def outputs(self) -> Outputs:
        """Return what the trained model makes of the tracked samples: a forward pass each, once.

        Raises:
            InputError: The recipe must be named, or the model does not end in a linear layer.
            SpecMismatch: The recipe is not the run's.
        """
        if self._outputs is None:
            self._outputs = self._read_outputs()
        return self._outputs

    def _read_outputs(self) -> Outputs:
        from ...workers.training.outputs import LastLayer
        from ..units.own import FEATURE, LOSS, OUTPUT, PREDICTION

        if not self._done(TRAINING_OUTPUTS):
            self._pass_outputs()
        store = RowStore.open(
            self.run.directory.path(layout.TRAINING_OUTPUTS), FEATURE, self.run.directory.vouched
        )
        return Outputs(
            train_index=store.column("train_index").astype(np.int64),
            label=store.column("label").astype(np.int64),
            loss=store.column(LOSS),
            prediction=store.column(PREDICTION).astype(np.int64),
            output=store.column(OUTPUT),
            feature=store.read(0, store.rows),
            layer=LastLayer(**store.attrs["layer"]),
        )

    def norms(self) -> Norms:
        """Return the norms of each tracked sample's own gradient: a forward and a backward pass each, once."""
        from ..units.own import ABSOLUTE, NormsWork

        store = self._gradient_store(
            NormsWork.PART,
            lambda begun: (NormsWork(**self._common(begun)), len(self.parameters())),
            columns={ABSOLUTE: len(self.parameters())},
        )
        return Norms(
            train_index=_index(store), absolute=store.column(ABSOLUTE), square=store.read(0, store.rows)
        )

    def self_influence(self, method: str | None) -> tuple[Integers, Floats]:
        """Return (train_index, <hypergradient_i, g_i(w_T)>) of the tracked samples.

        Costs a forward and a backward pass a sample and reading the hypergradients, once.

        Raises:
            IncompleteStage: The method has no hypergradients.
        """
        from ..units.own import SelfInfluenceWork
        from ..vocabulary import self_influence_part

        name, kept = self.with_hypergradients(method), row_map_of(self.run)
        store = self._gradient_store(
            self_influence_part(name),
            lambda begun: (SelfInfluenceWork(**self._common(begun), method=name, row_map=kept), 1),
        )
        return _index(store), store.read(0, store.rows)[:, 0]

    def self_tracin(self) -> tuple[Integers, Floats]:
        """Return (train_index, sum over at most `CHECKPOINTS` checkpoints) of TracIn's closed form of each sample with itself.

        Costs a forward and a backward pass a sample and checkpoint, once.
        """
        from ...workers.estimators.tracin import TracIn
        from ..units.own import SelfTracInWork

        check_recorded(self.run, "self-tracin")

        def work(begun: _Begun) -> tuple[OwnGradientWork, int]:
            made = SelfTracInWork(**self._common(begun), estimator=TracIn(checkpoints=CHECKPOINTS))
            return made, len(made.chosen(self.run.trajectory()))

        store = self._gradient_store(SelfTracInWork.PART, work)
        return _index(store), store.read(0, store.rows).sum(1)

    def gradient_rows(self, tensors: Sequence[int], seed: int) -> tuple[RowStore, Floats]:
        """Return gradients by some parameter tensors, and their norms (n,), once for each choice.

        Args:
            tensors: Which, by place.
            seed: Of the projection, where one is needed.

        Returns:
            A store of (n, width) float32 rows, projected where they are longer than ``MOST_DIMENSIONS``.
        """
        from ...workers.training.own_gradients import MOST_DIMENSIONS, projected_width
        from ..units.own import NORM, GradientRowsWork

        sizes = [int(np.prod(entry.shape)) for entry in self.run.trajectory().parameters]
        dimensions = sum(sizes[k] for k in tensors)
        seed = seed if dimensions > MOST_DIMENSIONS else 0
        digest = hashlib.sha256(repr((*tensors, seed)).encode()).hexdigest()[:12]

        def work(begun: _Begun) -> tuple[OwnGradientWork, int]:
            made = GradientRowsWork(
                **self._common(begun), name=f"rows-{digest}", tensors=tuple(tensors), seed=seed
            )
            return made, projected_width(dimensions, len(begun.surveyed.tracked))

        store = self._gradient_store(f"rows-{digest}", work, dtype="float32", columns={NORM: 0})
        return store, store.column(NORM)

    def with_hypergradients(self, method: str | None) -> str:
        """Return ``method`` where it has stored hypergradients.

        Raises:
            IncompleteStage: It has not; names the methods that have.
        """
        if method is not None and self._done(f"{method}/{REPLAY}"):
            return method
        check_recorded(self.run, "the hypergradients' self-influence")
        having = [name for name in self.run.noted.method_names() if self._done(f"{name}/{REPLAY}")]
        which = f"method {method}" if method is not None else "the run"
        remedy = (
            f"name one that has with --method: {', '.join(having)}"
            if having
            else f"run it with --mode forward --out {self.run.uri}, or use a detector that needs none"
        )
        raise IncompleteStage(f"{self.run.uri}: {which} has no hypergradients; {remedy}")

    def _done(self, stage: str) -> bool:
        return stage_state(self.run.directory, self.run.noted, stage).state == COMPLETE

    def _begin(self) -> _Begun:
        """Find recipe and executor, and what speaks against them."""
        if self._begun is not None:
            return self._begun
        from ..plan.survey import compute_of, survey

        run = self.run
        run.trajectory()  # without a record nothing else matters
        spec = stored_spec(run, self.recipe, self.given, command="detect", free=REPEATED)
        surveyed = survey(spec, trial=False)
        check_named(run.uri, run.noted, spec, surveyed.made_of, self.observer)
        for what, here, stored in (
            ("parameters", surveyed.dimension, run.noted.dimension),
            ("training samples", surveyed.n_train, run.noted.n_train),
            ("tracked samples", len(surveyed.tracked), run.noted.n_tracked),
        ):
            if stored is not None and here != stored:  # a run that does not know what it was made of
                raise SpecMismatch(
                    f"{run.uri} has {stored:,} {what}, the recipe {here:,}; name the recipe it was made from"
                )
        self._begun = _Begun(
            spec=spec, surveyed=surveyed, compute=compute_of(spec), executor=make_executor(spec)
        )
        return self._begun

    def _common(self, begun: _Begun) -> dict[str, Any]:
        surveyed = begun.surveyed
        return {
            "uri": self.run.directory.uri,
            "recipe": surveyed.recipe,
            "compute": begun.compute,
            "tracked": surveyed.tracked,
            "labels": surveyed.train_labels,
        }

    def _pass_outputs(self) -> None:
        from ...workers.determinism import restored_process
        from ...workers.training.outputs import TrainingOutputs
        from ..units.own import FEATURE, LOSS, OUTPUT, PREDICTION, TrainingOutputWork

        with restored_process():
            begun = self._begin()
            tracked, count = begun.surveyed.tracked, len(begun.surveyed.tracked)
            layer = TrainingOutputs(self._training(begun), self.run.trajectory()).layer
            rows, dtype = min(OUTPUT_ROWS, count), begun.spec.dtype
            unknown = np.broadcast_to(np.array(np.nan, dtype=dtype), (count, layer.outputs))
            store = StoreOf(
                base=layout.TRAINING_OUTPUTS,
                name=FEATURE,
                rows=count,
                columns=layer.features,
                dtype=dtype,
                chunk_rows=rows,
                dimensions=("train_index", "feature_column"),
                row_columns={
                    "train_index": tracked.astype(np.int32),
                    "label": begun.surveyed.train_labels[tracked].astype(np.int16),
                    LOSS: np.full(count, np.nan),
                    PREDICTION: np.full(count, -1, dtype=np.int16),
                    OUTPUT: unknown,
                },
                attrs={"layer": asdict(layer), "n_train": begun.surveyed.n_train},
            )
            work = TrainingOutputWork(**self._common(begun))
            self._do(begun, TRAINING_OUTPUTS, store, work, rows)

    def _gradient_store(
        self,
        part: str,
        make: Any,
        *,
        dtype: str = "float64",
        columns: Mapping[str, int] | None = None,
    ) -> RowStore:
        """Return the store of a pass over the gradients, after doing what of it is missing.

        Args:
            part: Of the stage.
            make: Returns handler and number of columns; called where there is something to do.
            dtype: Of the rows.
            columns: Further arrays by name: numbers a row, 0: one, without an axis of its own.
        """
        from ...workers.determinism import restored_process
        from ..units.own import VALUE

        stage, base = own_gradients_stage(part), layout.training_gradients(part)
        if not self._done(stage):
            with restored_process():
                begun = self._begin()
                work, width = make(begun)
                tracked, count = begun.surveyed.tracked, len(begun.surveyed.tracked)
                rows = min(GRADIENT_ROWS, count)
                store = StoreOf(
                    base=base,
                    name=VALUE,
                    rows=count,
                    columns=width,
                    dtype=dtype,
                    chunk_rows=rows,
                    dimensions=("train_index", "value_column"),
                    row_columns={"train_index": tracked.astype(np.int32)}
                    | {
                        name: np.full((count, size) if size else count, np.nan)
                        for name, size in (columns or {}).items()
                    },
                    attrs={"pass": part, "n_train": begun.surveyed.n_train},
                )
                self._do(begun, stage, store, work, rows)
        return RowStore.open(self.run.directory.path(base), VALUE, self.run.directory.vouched)

    def _do(self, begun: _Begun, stage: str, store: StoreOf, work: Any, rows: int) -> None:
        runner = Runner(directory=RunDirectory(self.run.uri), executor=begun.executor, observer=self.observer)
        units = units_of(stage, spans(store.rows, rows, "rows"))
        run_stage(
            runner,
            Stage(name=stage, units=units, handler=lambda: work, total=store.rows, label="row", store=store),
        )

    def _training(self, begun: _Begun) -> Training:
        """Return a training on a device that this process has; workers may have others."""
        import torch

        from ...workers.data.labels import with_labels
        from ...workers.training.training import Training

        compute = begun.compute
        if compute.device == "cuda" and not torch.cuda.is_available():
            compute = replace(compute, device="cpu")
        return Training(with_labels(begun.surveyed.recipe, begun.surveyed.train_labels), compute)


def _index(store: RowStore) -> Integers:
    return store.column("train_index").astype(np.int64)


def aligned(case_index: Integers, index: Integers, uri: str) -> Integers:
    """Return at which rows of a pass the judged samples are.

    Raises:
        InputError: One of them was not passed.
    """
    at = np.searchsorted(index, case_index)
    if len(index) == 0 or (index[np.minimum(at, len(index) - 1)] != case_index).any():
        raise InputError(f"{uri}: samples are judged that the run does not track; open the run again")
    return at

"""What a worker does with a unit: the handler that executors carry to their processes.

Each method reads what earlier stages committed, does its unit, and commits it last. Doing a unit
twice gives the same files, so a unit whose worker died half-way is simply done again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ...storage import layout
from ...storage.curvature import Curvature, read_curvature, write_curvature
from ...storage.rows import RowStore
from ...storage.rundir import RunDirectory
from ...storage.trajectory import Trajectory, open_trajectory
from ...workers.data.labels import with_labels
from ...workers.data.user_code import user_code
from ...workers.determinism import prepare_process, resolve_device
from ...workers.ekfac.curvature import CurvatureEstimate
from ...workers.memory import peak_bytes, reset_peak
from ...workers.recipe import Recipe
from ...workers.recursion.conservation import RowSums, check_sums
from ...workers.reference.growth import Growth, check_finite
from ...workers.replay.directions import spanning_directions
from ...workers.replay.make import make_replay
from ...workers.replay.targets import mean_gradients
from ...workers.training.finite import check_test_gradients
from ...workers.training.record import Recorder
from ...workers.training.test_gradients import TestGradients
from ...workers.training.training import Compute, Training
from ..executors.base import Report, Unit
from ..plan.sharding import WRITE_CHUNKS
from ..spec.targets import store_of, target_of_each
from ..vocabulary import (
    ADJOINT,
    CLASSES,
    CORRECTION,
    CURVATURE,
    DIRECTIONS,
    EKFAC,
    EXACT,
    FAST,
    FORWARD,
    MEAN,
    PREFLIGHT,
    RECORD,
    REDUCE,
    REPLAY,
    TEST_GRADIENTS,
    stage_of,
)
from .reduce import ReduceJob, bounds, reduce_rows

Integers = npt.NDArray[np.int64]


@dataclass(kw_only=True)
class Tasks:
    """Handler of every stage; picklable, one per process.

    Attributes:
        uri: The run directory.
        recipe: The user's recipe, overrides applied.
        compute: How every process computes.
        method: Name of the stores that replay and adjoint fill.
        form: Name of the Hessian's form, which decides how they are filled.
        final: Name of the results: ``method``, or with ``exact_rank`` its corrected form.
        tracked: Train indices asked for, (n,).
        tested: Test indices asked for, (M,).
        test_labels: Class of every sample of the test dataset, -1 where there is none.
        checkpoint_every: Steps between checkpoints, or None.
        job: What reduce units share.
        options: Of the method, beyond the run's specification.
    """

    uri: str
    recipe: Recipe
    compute: Compute
    method: str
    form: str
    final: str
    tracked: Integers
    tested: Integers
    test_labels: Integers
    checkpoint_every: int | None
    job: ReduceJob
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, unit: Unit, report: Report) -> dict[str, Any]:
        """Do and commit one unit; return its manifest's values."""
        begun = time.perf_counter()
        reset_peak()
        run = RunDirectory(self.uri)
        work = {
            RECORD: self._record,
            TEST_GRADIENTS: self._test_gradients,
            stage_of(CLASSES): self._target_gradients,
            stage_of(MEAN): self._target_gradients,
            REPLAY: self._replay,
            ADJOINT: self._adjoint,
            CURVATURE: self._curvature,
            PREFLIGHT: self._preflight,
            DIRECTIONS: self._directions,
            CORRECTION: self._correction,
            REDUCE: self._reduce,
        }[unit.stage.rsplit("/", 1)[-1]]
        with user_code(f"{unit.stage} {unit.name} raised"):
            files, values = work(run, unit, report)
        values = {
            **values,
            "seconds": time.perf_counter() - begun,
            "peak_bytes": peak_bytes(),
        }
        run.commit(unit.stage, unit.name, files, values)
        return values

    def _record(self, run: RunDirectory, _unit: Unit, report: Report) -> tuple[list[str], dict[str, Any]]:
        training = Training(self.recipe, self.compute)
        uri = run.path(layout.TRAJECTORY)
        closing = Recorder(training, uri, self.checkpoint_every).run(report)
        files = [f"{layout.TRAJECTORY}/{name}" for name in files_under(uri)]
        return files, {"steps": training.steps, "dimension": training.layout.dimension, **closing}

    def _test_gradients(
        self, run: RunDirectory, unit: Unit, report: Report
    ) -> tuple[list[str], dict[str, Any]]:
        start, stop = unit.arguments["start"], unit.arguments["stop"]
        training = Training(with_labels(self.recipe, self.test_labels), self.compute)
        gradients = TestGradients(training, open_trajectory(run.path(layout.TRAJECTORY)))
        rows = gradients.rows(self.tested[start:stop], lambda done: report(done, stop - start))
        chosen = self.tested[start:stop]
        check_test_gradients(training, gradients.dataset, chosen, rows.gradient, rows.loss)
        gradients.engine.close()
        store = RowStore.open(run.path(layout.TEST_GRADIENTS), "gradient")
        store.write(start, rows.gradient)
        files = [f"{layout.TEST_GRADIENTS}/{name}" for name in store.files(start, stop)]
        # The per-row columns are whole arrays: the driver writes them once every block is there.
        return files, {
            "rows": stop - start,
            "start": start,
            "ways": gradients.engine.told()
            | {
                "repaired_blocks": gradients.repaired,
                "through": gradients.through,
                "derivative": gradients.derivative,
            },
            "loss": rows.loss.tolist(),
            "label": rows.label.tolist(),
            "prediction": rows.prediction.tolist(),
        }

    def _target_gradients(
        self, run: RunDirectory, unit: Unit, report: Report
    ) -> tuple[list[str], dict[str, Any]]:
        start, stop = unit.arguments["start"], unit.arguments["stop"]
        gradients, store = RowStore.open(run.path(layout.TEST_GRADIENTS), "gradient"), self._targets(run)
        group = target_of_each(store.column("label"), gradients.column("label"), start, stop)
        mean = mean_gradients(gradients.read, group, gradients.columns, stop - start, report)
        store.write(start, mean.astype(store.dtype))
        base = store_of(self.job.targets)
        files = [f"{base}/{name}" for name in store.files(start, stop)]
        return files, {"rows": stop - start, "start": start}

    def _replay(self, run: RunDirectory, unit: Unit, report: Report) -> tuple[list[str], dict[str, Any]]:
        start, stop = unit.arguments["start"], unit.arguments["stop"]
        training = Training(self.recipe, self.compute)
        trajectory = open_trajectory(run.path(layout.TRAJECTORY))
        tracked, bent = self.tracked[start:stop], self._basis(run)
        replay = make_replay(self.form, FORWARD, training, trajectory, tracked, curvature=bent).run(report)
        store = RowStore.open(run.path(layout.hypergradients(self.method)), "hypergradient")
        sums = RowSums(training.layout.entries)
        for first, last in bounds(stop - start, WRITE_CHUNKS * store.chunk_rows):
            rows = self._finite(replay.numpy(first, last), "hypergradients", trajectory)
            store.write(start + first, rows)
            if self._lawful(training):
                sums.add(rows)
        replay.close()
        base = layout.hypergradients(self.method)
        files = [f"{base}/{name}" for name in store.files(start, stop)]
        notes = replay.told()
        if self._lawful(training):
            notes["law"] = sums.values()
        return files, {"rows": stop - start, "start": start, "steps": training.steps, **notes}

    def _lawful(self, training: Training) -> bool:
        """Whether the rows of all shards must add up to what training did to the weights."""
        return self.form == FAST and len(self.tracked) == training.n_train and not training.holds_statistics

    def _adjoint(self, run: RunDirectory, unit: Unit, report: Report) -> tuple[list[str], dict[str, Any]]:
        start, stop = unit.arguments["start"], unit.arguments["stop"]
        training = Training(self.recipe, self.compute)
        trajectory = open_trajectory(run.path(layout.TRAJECTORY))
        targets = self._targets(run).read(start, stop)
        back = make_replay(
            self.form,
            ADJOINT,
            training,
            trajectory,
            self.tracked,
            curvature=self._basis(run),
            targets=targets,
        )
        found, notes = back.run(report).contributions(), back.told()
        back.close()
        if self._lawful(training):
            check_sums(found, targets, trajectory, notes["ways"]["noise"])
            notes["lawful"] = True
        base = layout.by_test(self.method)
        store = RowStore.open(run.path(base), "contribution")
        store.write(start, self._finite(found, "contributions", trajectory))
        files = [f"{base}/{name}" for name in store.files(start, stop)]
        return files, {"rows": stop - start, "start": start, "steps": training.steps, **notes}

    def _curvature(self, run: RunDirectory, _unit: Unit, report: Report) -> tuple[list[str], dict[str, Any]]:
        training = Training(self.recipe, self.compute)
        trajectory = open_trajectory(run.path(layout.TRAJECTORY))
        estimate = CurvatureEstimate(training, trajectory, **dict(self.options))
        curvature = estimate.run(report)
        base = layout.curvature(self.form)
        files = [f"{base}/{name}" for name in write_curvature(run.path(base), curvature)]
        return files, {"steps": curvature.steps.tolist(), **curvature.attrs}

    def _preflight(self, run: RunDirectory, _unit: Unit, report: Report) -> tuple[list[str], dict[str, Any]]:
        training = Training(self.recipe, replace(self.compute, batch_norm="coupled"))
        trajectory = open_trajectory(run.path(layout.TRAJECTORY))
        return [], Growth(training, trajectory, self.tracked).run(report)

    def _finite(
        self,
        values: npt.NDArray[np.floating],
        what: str,
        trajectory: Trajectory,
        *,
        exact: bool | None = None,
    ) -> npt.NDArray[np.floating]:
        """Return ``values``, unless one is not finite: nothing of that kind is ever stored."""
        return check_finite(
            values,
            what=f"{what} of {self.method}",
            recipe=self.recipe,
            compute=self.compute,
            trajectory=trajectory,
            tracked=self.tracked,
            exact=self.form == EXACT if exact is None else exact,
        )

    def _directions(self, run: RunDirectory, unit: Unit, report: Report) -> tuple[list[str], dict[str, Any]]:
        gradients = self._targets(run)
        found, coordinates, share = spanning_directions(
            gradients.read, gradients.rows, unit.arguments["rank"]
        )
        files = []
        for name, place, array, axes in (
            ("direction", layout.DIRECTIONS, found, ("rank", "parameter")),
            ("coordinate", layout.COORDINATES, coordinates, ("target", "rank")),
        ):
            base = layout.corrections(self.final, place)
            store = RowStore.create(
                run.path(base),
                name=name,
                rows=array.shape[0],
                columns=array.shape[1],
                dtype="float64",
                chunk_rows=array.shape[0],
                dimensions=axes,
                row_columns={},
                attrs={"share": share},
            )
            store.write(0, array)
            files += [f"{base}/{file}" for file in (*store.files(0, array.shape[0]), *store.metadata_files())]
        report(1, 1)
        return files, {"directions": len(found), "share": share}

    def _correction(self, run: RunDirectory, unit: Unit, report: Report) -> tuple[list[str], dict[str, Any]]:
        start, stop = unit.arguments["start"], unit.arguments["stop"]
        trajectory = open_trajectory(run.path(layout.TRAJECTORY))
        stored = RowStore.open(run.path(layout.corrections(self.final, layout.DIRECTIONS)), "direction")
        directions = stored.read(start, stop).astype(self.compute.dtype)
        coupled = replace(self.compute, batch_norm="coupled")
        straight = Training(self.recipe, coupled)
        exact = make_replay(EXACT, ADJOINT, straight, trajectory, self.tracked, targets=directions)
        found = exact.run(report).contributions()
        del exact, straight  # what one replay holds is gone before the other begins
        training, basis = Training(self.recipe, self.compute), self._basis(run)
        bent = make_replay(
            EKFAC, ADJOINT, training, trajectory, self.tracked, curvature=basis, targets=directions
        )
        difference = found - bent.run().contributions()
        bent.close()
        self._finite(difference, "contributions", trajectory, exact=True)
        base = layout.corrections(self.final, layout.CORRECTED)
        store = RowStore.open(run.path(base), "contribution")
        store.write(start, difference)
        files = [f"{base}/{name}" for name in store.files(start, stop)]
        return files, {"rows": stop - start, "start": start}

    def _basis(self, run: RunDirectory) -> Curvature | None:
        if self.form != EKFAC:
            return None
        return read_curvature(run.path(layout.curvature(self.form)))

    def _targets(self, run: RunDirectory) -> RowStore:
        return RowStore.open(run.path(store_of(self.job.targets)), "gradient")

    def _reduce(self, run: RunDirectory, unit: Unit, report: Report) -> tuple[list[str], dict[str, Any]]:
        prepare_process(self.compute.threads)
        device = resolve_device(self.compute.device)
        start, stop = unit.arguments["start"], unit.arguments["stop"]
        return reduce_rows(run, self.job, unit.name, start, stop, device, report)


def files_under(uri: str) -> list[str]:
    """Return all files of a store, relative to it."""
    from ...storage.files import list_files

    return list_files(uri)

"""A run that holds every kind of results, and the files that its manifests list."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra_pipe.pipeline.compare.by_epoch import Course, by_epoch
from hydra_pipe.pipeline.decide.passes import Passes
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.evaluate.evaluate import Questions, evaluate
from hydra_pipe.storage import layout
from hydra_pipe.storage.rundir import RunDirectory

from hydra_pipe import RunSpec, clean, detect, open_run, run
from tests.recipes import Small

FEW = Questions(subsets=3, fractions=(0.5,), remove=(), perturb=())


def every_kind(place: Path) -> Path:
    """Make one small run that holds every kind of results."""

    def add(**changes: Any) -> None:
        given = {"executor": "serial", "device": "cpu", "dtype": "float64", "track": 9, "test": 5}
        run(RunSpec(recipe=Small(), out=str(place), epochs=2, **{**given, **changes}))

    add(shards=2)
    add(hessian="ekfac", exact_rank=2, curvature_core=4)
    add(hessian="exact", mode="adjoint")
    add(hessian="exact", mode="adjoint", targets="classes")
    attribute(str(place), {"relatif": {"damping": 2.0}}, Small(), executor="serial")
    evaluate(str(place), Small(), questions=FEW, executor="serial", device="cpu")
    course = Course(every=2, options={"influence-lissa": {"damping": 1.0, "depth": 5}}, by_test=True)
    by_epoch(str(place), course, Small(), executor="serial")
    passes = Passes(open_run(str(place)), Small(), given={"executor": "serial", "device": "cpu"})
    passes.outputs()
    passes.norms()
    add(shards=2, seeds=2)
    detect(str(place), by="harm")
    clean(str(place), Small(), list=[1], drop="flagged", retrain=1, executor="serial", device="cpu")
    return place


def listed(place: Path) -> list[str]:
    """Return the files that manifests of a run, and of those inside it, list."""
    directory = RunDirectory(str(place))
    own = [f.path for stage in directory.stages() for m in directory.manifests(stage) for f in m.files]
    for inner in sorted((place / layout.SEEDS).glob("seed=*")):
        own += [f"{inner.relative_to(place)}/{path}" for path in listed(inner)]
    return own

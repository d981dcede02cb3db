"""Every field belongs to one group and says what it decides."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.pipeline.spec import checks
from hydra_pipe.pipeline.spec.groups import (
    KEPT,
    BudgetSpec,
    CurvatureSpec,
    ExecutionSpec,
    OutputSpec,
    PlacementSpec,
    QuestionSpec,
    TrainingSpec,
)
from hydra_pipe.pipeline.spec.setting import Decides, Group, free, names, setting_of
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage.errors import SpecError

GROUPS = (TrainingSpec, QuestionSpec, CurvatureSpec, PlacementSpec, BudgetSpec, OutputSpec)

OTHER: dict[str, Any] = {
    "recipe": "mod:Recipe",
    "recipe_args": {"a": 1},
    "epochs": 2,
    "batch_size": 8,
    "seed": 3,
    "seeds": 4,
    "dtype": "float64",
    "checkpoint_every": 7,
    "init": "w.pt",
    "at_checkpoint": "w.pt",
    "at": 4,
    "visits": "off",
    "track": "10%",
    "test": "0:5",
    "mode": "adjoint",
    "targets": "mean",
    "batch_norm": "coupled",
    "per_sample": "vjp",
    "layers": ("head.*",),
    "project": 64,
    "store_dtype": "float16",
    "hessian": "exact",
    "exact_rank": 4,
    "curvature_checkpoints": 3,
    "curvature_at": (0, 5),
    "curvature_samples": 9,
    "curvature_core": 8,
    "curvature_flat": 0.1,
    "curvature_share": 0.3,
    "executor": "serial",
    "address": "10.0.0.1:6379",
    "gpus_per_actor": 0.5,
    "cpus_per_actor": 0.5,
    "workers": 3,
    "threads": 2,
    "device": "cpu",
    "graphs": "auto",
    "shards": 3,
    "segments": 2,
    "wait": True,
    "memory": 1 << 32,
    "reduce_memory": 1 << 20,
    "max_attempts": 5,
    "start_timeout": 9.0,
    "unit_timeout": 99.0,
    "out": "o",
    "overwrite": True,
}
"""A value of every field that is not its default."""


@dataclass(frozen=True, kw_only=True)
class Silent(RunSpec):
    """With a field that forgets to say what it decides."""

    more: int = 0


@dataclass(frozen=True, kw_only=True)
class Odd(Group):
    """With metadata of somebody else."""

    more: int = field(default=0, metadata={"hydra_pipe": "identity"})


@dataclass(frozen=True, kw_only=True)
class Spoken(RunSpec):
    more: int = field(default=0, metadata=free(checks.whole(0)))


@pytest.mark.parametrize("kind", [Silent, Odd])
def test_a_field_that_does_not_say_what_it_decides_cannot_be_added(kind: type[Group]) -> None:
    with pytest.raises(TypeError, match=r"field 'more' does not say what it decides; declare it with"):
        kind()
    with pytest.raises(TypeError, match="field 'more'"):
        names(kind, Decides.RUN)
    assert Spoken(more=3).more == 3


def test_every_field_belongs_to_one_group_in_their_order() -> None:
    assert names(RunSpec) == tuple(name for group in GROUPS for name in names(group))
    assert set(Counter(names(RunSpec)).values()) == {1}
    assert {setting_of(entry).decides for entry in fields(RunSpec)} == set(Decides)
    assert names(ExecutionSpec) == (*names(PlacementSpec), *names(BudgetSpec))
    assert set(KEPT) <= set(names(PlacementSpec, Decides.NOTHING))
    assert all(isinstance(RunSpec(), group) for group in GROUPS)


@pytest.mark.parametrize("name", names(RunSpec))
def test_identity_changes_with_what_decides_the_run_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(OTHER["init"]).write_bytes(b"weights")
    forward = name in ("project", "store_dtype")  # what adjoint mode refuses
    spec = RunSpec(threads=1, mode="forward" if forward else "adjoint", hessian="ekfac")
    changed = replace(spec, **{name: OTHER[name]})
    differing = [line.partition(":")[0] for line in changed.differences(spec.identity())]
    assert differing == ([name] if name in names(RunSpec, Decides.RUN) else [])


def test_what_decides_the_method_is_in_the_method() -> None:
    decides = names(RunSpec, Decides.METHOD)
    assert {"mode", "hessian", "targets", "exact_rank", "shards", "segments"} <= set(decides)
    assert not set(decides) & {"seeds", "executor", "memory", "out", "overwrite"}


@pytest.mark.parametrize(
    ("group", "given", "message"),
    [
        (TrainingSpec, {"epochs": 0}, "epochs 0"),
        (QuestionSpec, {"targets": "mean"}, "targets 'mean': only mode='adjoint'"),
        (CurvatureSpec, {"exact_rank": 4}, "exact_rank 4: only hessian='ekfac'"),
        (PlacementSpec, {"shards": 0}, "shards 0"),
        (BudgetSpec, {"memory": 0}, "memory 0"),
        (OutputSpec, {"out": ""}, "out ''"),
    ],
)
def test_groups_check_themselves(group: type[Group], given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        group(**given)
    assert group()

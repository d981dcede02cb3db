"""The plan of rows that are kept in part: models and data sets that nobody can run here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra_pipe.pipeline.executors.base import Capacity
from hydra_pipe.pipeline.plan.plan import Plan, cut
from hydra_pipe.pipeline.plan.survey import Survey, survey
from hydra_pipe.workers.model.layout import Layout
from hydra_pipe.workers.model.row_map import RowMap
from hydra_pipe.workers.recipes.mobilenet import MobileNetV2
from torch import nn

from benchmarks.stores import Text
from hydra_pipe import RunSpec
from tests.recipes import Small

GB = 10**9
ONE = Capacity(executor="serial", nodes=1, cpus=8, gpus=0, slots=8, memory_per_worker=0)


@pytest.fixture(scope="module")
def small() -> Survey:
    return survey(RunSpec(recipe=Small(), executor="serial"), trial=False)


def planned(small: Survey, model: type[nn.Module], samples: int, tests: int, **given: object) -> Plan:
    """The plan of a model that is only counted, on the meta device."""
    with torch.device("meta"):
        layout = Layout.of(model())
    spec = RunSpec(recipe=Small(), executor="serial", shards="auto", **{"memory": 16 << 30, **given})
    kept = RowMap.of(layout.entries, spec.layers, spec.project, 0)
    columns = layout.dimension if kept is None else kept.columns
    surveyed = replace(
        small,
        n_train=samples,
        n_test=tests,
        tracked=np.arange(samples),
        tested=np.arange(tests),
        test_labels=np.zeros(tests, dtype=np.int64),
        train_labels=np.zeros(samples, dtype=np.int64),
        dimension=layout.dimension,
        row_map=kept,
        row_numbers=columns,
    )
    return cut(spec, surveyed, ONE)


@pytest.mark.parametrize(
    ("given", "most"),
    [
        ({}, 450 * GB),
        ({"project": 290_000}, 60 * GB),
        ({"project": 580_000, "store_dtype": "bfloat16"}, 60 * GB),
        ({"project": 580_000, "store_dtype": "float16"}, 60 * GB),
    ],
)
def test_mobilenet_on_all_of_cifar(small, given, most):
    plan = planned(small, MobileNetV2, 50_000, 1_000, **given)
    assert plan.dimension == 2_236_682
    assert 0.9 * most < plan.disk["hypergradients"] < most
    assert plan.memory.workers["replay"] <= 16 << 30
    if given:
        shown = plan.as_dict()
        assert 0.98 * given["project"] < shown["run"]["numbers a row"] <= given["project"]
        assert plan.disk["test_gradients"] == 1_000 * plan.columns * 4
        assert sum(shard["bytes"] for shard in shown["shards"]) == pytest.approx(plan.disk["hypergradients"])
        # What a worker holds for a sample is what is kept of its row: fewer shards do it.
        assert plan.memory.buffers <= max(s.rows for s in plan.shards) * plan.columns * 4
        assert len(plan.shards) < len(planned(small, MobileNetV2, 50_000, 1_000).shards) / 2.5


@pytest.mark.parametrize(
    "given",
    [{"project": 990_000}, {"project": 1_900_000, "store_dtype": "bfloat16"}, {"layers": "body.layers.11"}],
)
def test_a_hundred_million_parameters(small, given):
    plan = planned(small, Text, 10_000, 200, memory=192 << 30, **given)
    assert 95e6 < plan.dimension < 105e6
    assert plan.disk["hypergradients"] < (300 if "layers" in given else 40) * GB

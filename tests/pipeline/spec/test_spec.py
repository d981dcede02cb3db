from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra_pipe.pipeline.spec import checks
from hydra_pipe.pipeline.spec.spec import RunSpec, load_toml
from hydra_pipe.storage.errors import SpecError


class Fake:
    """As much of a recipe as a spec looks at."""

    def model(self) -> None: ...
    def train_dataset(self) -> None: ...
    def test_dataset(self) -> None: ...
    def losses(self) -> None: ...
    def arguments(self) -> dict[str, Any]:
        return {"noise": 0.1}


def test_defaults_are_the_contracts() -> None:
    spec = RunSpec()
    assert (spec.recipe, spec.shards, spec.track, spec.test) == ("digits", "auto", "all", "all")
    assert (spec.mode, spec.hessian, spec.exact_rank, spec.dtype) == ("forward", "none", 0, "float32")
    assert (spec.executor, spec.overwrite, spec.reduce_memory, spec.out) == ("ray", False, 1 << 30, None)
    assert spec.method == "hydra"


def test_specs_are_frozen_pickle_and_replace() -> None:
    spec = RunSpec(recipe_args={"noise": 0.1}, track=(3, 1))
    with pytest.raises(FrozenInstanceError):
        spec.seed = 3  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert replace(spec, seed=3).track == (3, 1)
    with pytest.raises(SpecError, match=r"seed -1"):
        replace(spec, seed=-1)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"shards": "8"}, 8),
        ({"shards": 8}, 8),
        ({"track": 100}, "100"),
        ({"track": np.int64(100)}, "100"),
        ({"track": range(3)}, (0, 1, 2)),
        ({"test": [5, 2]}, (5, 2)),
        ({"test": np.array([5, 2])}, (5, 2)),
        ({"memory": "4GiB"}, 4 << 30),
        ({"reduce_memory": "512 MB"}, 512_000_000),
        ({"cpus_per_actor": 2}, 2.0),
        ({"gpus_per_actor": 0.5}, 0.5),
        ({"address": "10.0.0.1:6379"}, "10.0.0.1:6379"),
        ({"address": "auto"}, "auto"),
        ({"seed": np.int32(4)}, 4),
        ({"curvature_at": "0, 40,0"}, (0, 40)),
        ({"curvature_at": [5]}, (5,)),
    ],
)
def test_values_are_normalised(given: dict[str, Any], expected: Any) -> None:
    ((name, _),) = given.items()
    value = getattr(RunSpec(**given), name)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mode": "foward"}, r"mode 'foward': did you mean 'forward'"),
        ({"hessian": 3}, r"hessian 3: use one of none, ekfac, exact"),
        ({"dtype": "float16"}, r"dtype 'float16': did you mean 'float"),
        ({"epochs": 0}, r"epochs 0: must be a whole number, at least 1"),
        ({"epochs": True}, r"epochs True"),
        ({"batch_size": 1.5}, r"batch_size 1\.5"),
        ({"seed": 2**63}, r"seed .*at least 0 and at most 9,223,372,036,854,775,807"),
        ({"shards": 0}, r"shards 0: .*or auto"),
        ({"shards": "many"}, r"shards 'many'"),
        ({"segments": 0}, r"segments 0: .*or auto"),
        ({"segments": "many"}, r"segments 'many'"),
        ({"track": []}, r"track: no sample"),
        ({"track": ""}, r"track ''"),
        ({"track": [1, -1]}, r"track\[1\] -1"),
        ({"test": [0.5]}, r"test\[0\] 0\.5"),
        ({"memory": "4 parsecs"}, r"memory '4 parsecs': .*4GiB"),
        ({"memory": 0}, r"memory 0: must be at least one byte"),
        ({"gpus_per_actor": 1.5}, r"gpus_per_actor 1\.5: .*use 2"),
        ({"gpus_per_actor": -1}, r"gpus_per_actor -1: must be at least 0"),
        ({"cpus_per_actor": 0}, r"cpus_per_actor 0: must be at least 0\.01"),
        ({"cpus_per_actor": float("nan")}, r"cpus_per_actor nan"),
        ({"workers": 0}, r"workers 0"),
        ({"threads": 0}, r"threads 0"),
        ({"device": "gpu"}, r"device 'gpu'"),
        ({"overwrite": 1}, r"overwrite 1: must be true or false"),
        ({"batch_norm": "off"}, r"batch_norm 'off'"),
        ({"max_attempts": 0}, r"max_attempts 0"),
        ({"start_timeout": 0}, r"start_timeout 0"),
        ({"recipe": ""}, r"recipe ''"),
        ({"recipe": Fake}, r"recipe Fake: a class; pass an instance, Fake\(\)"),
        ({"recipe": 3}, r"recipe int: has no model\(\)"),
        ({"recipe": Fake(), "recipe_args": {"a": 1}}, r"recipe_args \['a'\]: a Recipe instance takes none"),
        ({"recipe_args": {"a": object()}}, r"recipe_args a=.*plain data"),
        ({"recipe_args": {"a": float("nan")}}, r"recipe_args a=nan"),
        ({"recipe_args": {"a-b": 1}}, r"recipe_args 'a-b'"),
        ({"recipe_args": [1]}, r"recipe_args \[1\]"),
        ({"exact_rank": 4}, r"exact_rank 4: only hessian='ekfac'"),
        ({"exact_rank": -1, "hessian": "ekfac"}, r"exact_rank -1"),
        ({"address": "ray://head:10001"}, r"address ray://head:10001: must be host:port.*ray job submit"),
        ({"address": "head"}, r"address 'head': must be host:port, auto or local"),
        ({"address": "head:99999"}, r"address 'head:99999'"),
        ({"curvature_at": "0,x"}, r"curvature_at '0,x': write steps.*such as 0,100,400"),
        ({"curvature_at": [-1]}, r"curvature_at \[-1\]"),
        ({"curvature_at": []}, r"curvature_at \[\]"),
        ({"out": ""}, r"out ''"),
        ({"out": "gopher://x"}, r"gopher"),
    ],
)
def test_wrong_values_name_value_and_remedy(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        RunSpec(**given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("100", 100),
        ("1k", 1000),
        ("1kB", 1000),
        ("1KiB", 1024),
        ("1.5 GB", 1_500_000_000),
        (" 2TiB ", 2 << 40),
        (7, 7),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert checks.parse_bytes(text, "size") == size


def test_threads_follow_the_cpus_of_a_worker() -> None:
    assert RunSpec().torch_threads == 1
    assert RunSpec(cpus_per_actor=0.5).torch_threads == 1
    assert RunSpec(cpus_per_actor=4).torch_threads == 4
    assert RunSpec(cpus_per_actor=4, threads=2).torch_threads == 2


def test_methods() -> None:
    assert RunSpec(hessian="ekfac").method == "hydra-ekfac"
    ranked = RunSpec(hessian="ekfac", exact_rank=8)
    assert (ranked.method, ranked.base_method) == ("hydra-ekfac-rank8", "hydra-ekfac")
    assert RunSpec(hessian="exact", mode="adjoint").method == "hydra-exact"


def test_identity_leaves_out_where_and_what_for() -> None:
    here = RunSpec(recipe_args={"noise": 0.1}, seed=1)
    there = replace(
        here, out="elsewhere", executor="serial", workers=3, hessian="exact", max_attempts=9, overwrite=True
    )
    assert here.identity() == there.identity()
    stored = json.loads(json.dumps(replace(here, track=range(3)).identity()))
    assert replace(here, track=[0, 1, 2]).differences(stored) == []


def test_identity_is_what_old_runs_have() -> None:
    here = {
        "recipe": "digits",
        "recipe_args": {},
        "track": "all",
        "test": "all",
        "dtype": "float32",
        "epochs": None,
        "batch_size": None,
        "seed": None,
        "threads": 1,
        "device": "auto",
        "batch_norm": "constant",
        "checkpoint_every": None,
    }
    assert RunSpec().identity() == here
    assert RunSpec().differences(here) == []
    # Runs of before it was free have it in their identity.
    assert RunSpec().differences({**here, "reduce_memory": 1 << 20}) == []
    assert RunSpec(cpus_per_actor=3).identity() == {**here, "threads": 3}
    assert RunSpec(per_sample="vjp").identity() == {**here, "per_sample": "vjp"}


def test_differences_name_both_sides() -> None:
    stored = RunSpec(seed=1, track=list(range(100))).identity()
    lines = RunSpec(seed=2, recipe_args={"noise": 0.2}).differences(stored)
    assert lines[0] == 'recipe_args: stored {}, asked {"noise": 0.2}'
    assert lines[1] == "seed: stored 1, asked 2"
    assert lines[2].startswith("track: stored [0, 1, 2")
    assert lines[2].endswith('... (390 characters), asked "all"')
    assert len(lines) == 3
    del stored["device"]
    stored["old_field"] = 3
    lines = RunSpec(seed=1, track=list(range(100))).differences(stored)
    assert lines == ['device: stored nothing, asked "auto"', "old_field: stored 3, asked nothing"]


def test_an_instance_is_named_by_its_class() -> None:
    spec = RunSpec(recipe=Fake())
    assert spec.identity()["recipe"] == f"{__name__}:Fake"
    assert spec.identity()["recipe_args"] == {"noise": 0.1}


def test_toml(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'recipe = "digits"\nbatch-size = 32\ncpus_per_actor = 2\nmemory = "2GiB"\ntrack = [1, 2]\n'
        "[set]\nnoise = 0.1\nwidth = 8\n"
    )
    spec = RunSpec.from_toml(str(file), seed=5, recipe_args={"width": 16})
    assert spec == RunSpec(
        batch_size=32,
        cpus_per_actor=2,
        memory=2 << 30,
        track=[1, 2],
        seed=5,
        recipe_args={"noise": 0.1, "width": 16},
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("batchsize = 3", r"run\.toml: unknown key 'batchsize'; did you mean 'batch_size'"),
        ("epochs = = 3", r"run\.toml: no TOML \(.*line 1"),
        ("batch-size = 3\nbatch_size = 4", r"twice"),
        ("recipe_args = {}", r"unknown key 'recipe_args'"),
        (None, r"run\.toml: No such file"),
    ],
)
def test_wrong_toml(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "run.toml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_toml(str(file))

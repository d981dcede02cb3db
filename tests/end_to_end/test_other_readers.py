"""xarray opens every Zarr store of a run, by the names of its axes; runs made before these had names stay valid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray
import zarr
from hydra_pipe.pipeline.executors.events import UnitFinished
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage import arrays

from hydra_pipe import open_run
from tests.end_to_end.support import Heard, assert_same_bits, cli, numbers, serial
from tests.recipes import BatchNormed, Small

DIGITS = ("digits", "--epochs", "1", "--executor", "serial", "--device", "cpu", "--quiet")
DATA = ("--set", "train_size=60", "--set", "test_size=12", "--set", "label_noise=0.2")
KINDS = {
    "trajectory.zarr": {"step", "slot", "group", "digest_step"},
    "trajectory.zarr/checkpoint": {"checkpoint", "parameter", "tensor", "byte"},
    "trajectory.zarr/epochs": {"epoch"},
    "trajectory.zarr/label_noise": {"train_index"},
    "trajectory.zarr/visits": {"epoch", "train_index", "class"},
    "training_outputs.zarr": {"train_index", "feature_column", "output_column"},
    "training_gradients/self-tracin.zarr": {"train_index", "value_column"},
    "hypergradients/method=hydra.zarr": {"train_index", "parameter"},
    "hypergradients/method=hydra-ekfac.zarr": {"train_index", "parameter"},
    "test_gradients.zarr": {"test_index", "parameter"},
    "by_test/method=hydra-exact.zarr": {"test_index", "tracked"},
    "by_test/method=hydra-exact-classes.zarr": {"target", "tracked"},
    "by_test/method=relatif.zarr": {"test_index", "tracked"},
    "target_gradients/targets=classes.zarr": {"target", "parameter"},
    "curvature/method=hydra-ekfac.zarr": {"checkpoint", "coordinate", "core", "core_eigenvector"},
    "corrections/method=hydra-ekfac-rank2/directions.zarr": {"rank", "parameter"},
    "corrections/method=hydra-ekfac-rank2/coordinates.zarr": {"target", "rank"},
    "corrections/method=hydra-ekfac-rank2/contributions.zarr": {"rank", "tracked"},
    "prepared/method=relatif.zarr": {"train_index", "column"},
}
"""Every group that holds arrays, and its axes (of the curvature: those that are not a block's own)."""


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run with every kind of store."""
    out = tmp_path_factory.mktemp("all") / "run"
    adjoint = ("--mode", "adjoint", "--hessian", "exact")
    for more in (
        (),
        ("--hessian", "ekfac", "--exact-rank", "2"),
        adjoint,
        (*adjoint, "--targets", "classes"),
        ("--method", "relatif", "--option", "damping=5"),
    ):
        done = cli("run", *DIGITS, *DATA, "--track", "9:30", "--out", out, *more)
        assert done.exit_code == 0, done.output
    done = cli("detect", out, "--by", "knn", "--by", "self-tracin", "--executor", "serial", "--quiet")
    assert done.exit_code == 0, done.output
    return out


def groups(place: Path) -> Iterator[tuple[str, zarr.Group]]:
    """Give every group of a run that holds arrays, and its name."""
    for store in sorted(place.rglob("*.zarr")):
        root = zarr.open_group(store, mode="r")
        name = str(store.relative_to(place))
        if list(root.arrays()):
            yield name, root
        for inner, group in root.groups():
            yield f"{name}/{inner}", group


def check_opens(store: Path, group: zarr.Group) -> xarray.Dataset:
    """Check what xarray reads against zarr, bit for bit."""
    opened = xarray.open_zarr(store, consolidated=False)
    assert set(opened.variables) == set(group.array_keys())
    for name, array in group.arrays():
        found, right = opened[name].values, array[...]
        assert (found.dtype, found.shape) == (right.dtype, right.shape), name
        assert found.tobytes() == right.tobytes(), name
    return opened


@pytest.mark.filterwarnings("error")  # such as those over duplicate names of axes
def test_xarray_opens_every_kind_of_store(everything: Path) -> None:
    seen = {}
    for name, group in groups(everything):
        opened = check_opens(everything / name, group)
        seen[name] = {str(axis) for axis in opened.sizes if not str(axis).startswith("block")}
    assert seen == KINDS


@pytest.mark.filterwarnings("error")
def test_the_axes_are_labelled(everything: Path) -> None:
    opened = open_run(str(everything))
    place = everything / "hypergradients" / "method=hydra.zarr"
    row = xarray.open_zarr(place, consolidated=False).hypergradient.sel(train_index=20)
    np.testing.assert_array_equal(row, opened.hypergradients()[11])  # 9:30 are tracked
    tests = xarray.open_zarr(everything / "test_gradients.zarr", consolidated=False)
    label = opened.test_gradients().column("label")
    assert int(tests.label.sel(test_index=7)) == label[7]
    with xarray.open_datatree(everything / "trajectory.zarr", engine="zarr", consolidated=False) as tree:
        assert tree["checkpoint"].sizes["checkpoint"] == len(opened.trajectory().checkpoint_steps)
        np.testing.assert_array_equal(
            tree["checkpoint/weights"][-1], opened.trajectory().checkpoint(-1).weights
        )


@pytest.mark.filterwarnings("error")
def test_the_buffers_of_a_model_are_opened(tmp_path: Path) -> None:
    out = Path(serial(tmp_path / "run", BatchNormed(), epochs=1).uri)
    for name, group in groups(out):
        check_opens(out / name, group)
    assert xarray.open_zarr(out / "trajectory.zarr" / "checkpoint", consolidated=False).sizes["byte"] > 0


class _Stop(Exception):
    pass


def test_a_run_without_names_of_axes_resumes_to_the_same_bits(tmp_path, monkeypatch):
    """What was written before axes had names: opened, verified, finished, and added to."""
    out, fields = tmp_path / "old", {"shards": 3, "epochs": 2}
    spec = RunSpec(recipe=Small(), out=str(out), executor="serial", device="cpu", **fields)
    right = numbers(serial(tmp_path / "right", Small(), **fields).uri)
    real = arrays._documents

    def nameless(shape: Any, kind: Any, chunk: Any, dimensions: Any, fill: Any) -> Any:
        return real(shape, kind, chunk, None, fill)

    def stop_after_the_first_shard(event: Any) -> None:
        if isinstance(event, UnitFinished) and event.unit.startswith("shard"):
            raise _Stop

    with monkeypatch.context() as patch:
        patch.setattr(arrays, "_documents", nameless)
        with pytest.raises(_Stop):
            run(spec, observer=stop_after_the_first_shard)
    old = zarr.open_array(out / "hypergradients" / "method=hydra.zarr" / "hypergradient", mode="r")
    assert old.metadata.dimension_names is None
    heard = Heard()
    run(spec, observer=heard)
    assert ("record", "trajectory") in heard.skipped
    assert [unit for stage, unit in heard.done if stage == "hydra/replay"] == ["shard-00001", "shard-00002"]
    assert_same_bits(numbers(out), right)
    assert cli("verify", out, "--quiet").exit_code == 0
    serial(out, Small(), **fields, mode="adjoint", hessian="exact")  # a method beside it
    xarray.open_zarr(out / "by_test" / "method=hydra-exact.zarr", consolidated=False)

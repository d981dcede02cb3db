"""The trajectory: everything comes back, nothing half-written has the final name."""

from __future__ import annotations

import errno
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hydra_pipe.storage import arrays, files, trajectory_writer
from hydra_pipe.storage.errors import CorruptStore, IncompleteStage, StorageFull, StoreError
from hydra_pipe.storage.trajectory import ParameterEntry, TrajectoryWriter, open_trajectory
from hydra_pipe.storage.uri import is_local, join

T, B, G, D, P, EPOCHS = 6, 4, 2, 7, 2, 2
STEPS = [0, 3, 6]
PARAMETERS = (
    ParameterEntry(name="a.weight", shape=(2, 3), group=0, start=0),
    ParameterEntry(name="scale", shape=(), group=-1, start=6),
)
RNG = np.random.default_rng(1)
WEIGHTS = RNG.standard_normal((3, D))
MOMENTUM = RNG.standard_normal((3, D))
EXISTS = np.array([[False, False], [True, False], [True, True]])


def arguments(**changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "batches": RNG.integers(-1, 20, (T, B)).astype(np.int32),
        **{name: RNG.random((T, G)) for name in ("learning_rate", "momentum", "weight_decay", "dampening")},
        "nesterov": RNG.random((T, G)) > 0.5,
        "coefficient": RNG.standard_normal((T, G)),
        "loss": RNG.random(T),
        "digest_step": np.array([0, 3, 6]),
        "digest": np.array([1, 2**32 - 1, 3], dtype=np.uint32),
        "epoch_digest": ["ab" * 32, "cd" * 32],
        "parameters": PARAMETERS,
        "epochs": {"train_loss": np.array([0.5, 0.25]), "test_accuracy": np.array([np.nan, 0.9])},
        "attrs": {"n_train": 20, "batch_size": B, "seed": 0, "environment": {"torch": "2.13", "threads": 1}},
        "noisy": (np.array([3, 5]), np.array([1, 0])),
    }
    return {**given, **changes}


def a_writer(place: str, dtype: str = "float64", buffers: int = 3) -> TrajectoryWriter:
    return TrajectoryWriter(
        join(place, "trajectory.zarr"),
        dimension=D,
        dtype=dtype,
        checkpoint_steps=STEPS,
        buffer_bytes=buffers,
        parameter_count=P,
    )


def checkpoints(writer: TrajectoryWriter, dtype: str = "float64", buffers: int = 3) -> None:
    for k, step in enumerate(STEPS):
        data = bytes([k]) * buffers
        writer.write_checkpoint(k, step, WEIGHTS[k].astype(dtype), MOMENTUM[k].astype(dtype), EXISTS[k], data)


@pytest.mark.parametrize(("dtype", "buffers"), [("float64", 3), ("float32", 0)])
def test_everything_comes_back(place: str, dtype: str, buffers: int) -> None:
    writer, given = a_writer(place, dtype, buffers), arguments()
    checkpoints(writer, dtype, buffers)
    writer.finish(**given)
    writer.abort()  # after the end: nothing
    found = pickle.loads(pickle.dumps(open_trajectory(join(place, "trajectory.zarr"))))
    types = {"batches": "int32", "nesterov": "bool", "digest_step": "int64", "digest": "uint32"}
    for name in ("batches", "learning_rate", "momentum", "weight_decay", "dampening", "nesterov"):
        np.testing.assert_array_equal(getattr(found, name), given[name])
        assert getattr(found, name).dtype == types.get(name, "float64")
    for name in ("coefficient", "loss", "digest_step", "digest"):
        np.testing.assert_array_equal(getattr(found, name), given[name])
        assert getattr(found, name).dtype == types.get(name, "float64")
    assert found.epoch_digest == given["epoch_digest"]
    assert found.parameters == PARAMETERS
    assert found.attrs == {**given["attrs"], "dimension": D, "dtype": dtype}
    assert set(found.epochs) == set(given["epochs"])
    np.testing.assert_array_equal(found.epochs["test_accuracy"], [np.nan, 0.9])
    assert found.noisy is not None
    assert [a.tolist() for a in found.noisy] == [[3, 5], [1, 0]]
    assert found.checkpoint_steps.tolist() == STEPS
    for k, step in enumerate(STEPS):
        checkpoint = found.checkpoint(k)
        assert checkpoint.step == step
        assert checkpoint.buffers == bytes([k]) * buffers
        assert checkpoint.weights.tobytes() == WEIGHTS[k].astype(dtype).tobytes()
        assert checkpoint.momentum.tobytes() == MOMENTUM[k].astype(dtype).tobytes()
        np.testing.assert_array_equal(checkpoint.has_momentum, EXISTS[k])
    assert found.checkpoint(-1).step == 6
    with pytest.raises(IndexError):
        found.checkpoint(3)


def test_the_layout_of_the_contract(tmp_path: Path) -> None:
    writer = a_writer(str(tmp_path))
    checkpoints(writer)
    writer.finish(**arguments())
    group = zarr.open_group(str(tmp_path / "trajectory.zarr"), mode="r")
    for name in ("batches", "loss", "checkpoint/step", "label_noise/original_label", "epochs/train_loss"):
        assert np.asarray(group[name][...]).size
    np.testing.assert_array_equal(group["checkpoint/weights"][...], WEIGHTS)
    attrs = dict(group.attrs)
    assert attrs["parameters"][0] == {"name": "a.weight", "shape": [2, 3], "group": 0, "start": 0}


def test_no_noise(place: str) -> None:
    writer = a_writer(place)
    checkpoints(writer)
    writer.finish(**arguments(noisy=None))
    assert open_trajectory(join(place, "trajectory.zarr")).noisy is None


def test_nothing_is_read_before_the_end(place: str) -> None:
    uri = join(place, "trajectory.zarr")
    with pytest.raises(IncompleteStage):
        open_trajectory(uri)
    writer = a_writer(place)
    checkpoints(writer)
    with pytest.raises(IncompleteStage):
        open_trajectory(uri)
    assert not is_local(place) or not os.path.exists(uri)
    writer.abort()
    assert files.list_files(place) == []


def test_a_failing_block_aborts(place: str) -> None:
    with pytest.raises(RuntimeError, match="mine"), a_writer(place):
        raise RuntimeError("mine")
    assert files.list_files(place) == []


def test_a_second_record_replaces_the_first(place: str) -> None:
    for seed in (0, 1):
        writer = a_writer(place)
        checkpoints(writer)
        writer.finish(**arguments(attrs={"seed": seed}))
    assert open_trajectory(join(place, "trajectory.zarr")).attrs["seed"] == 1
    assert not [name for name in files.list_files(place) if files.PARTIAL in name]


def test_what_was_not_announced_is_refused(place: str) -> None:
    writer = a_writer(place)
    row = (WEIGHTS[0], MOMENTUM[0], EXISTS[0], b"123")
    with pytest.raises(StoreError, match=r"steps are \[0, 3, 6\]"):
        writer.write_checkpoint(1, 4, *row)
    with pytest.raises(StoreError, match="float32"):
        writer.write_checkpoint(0, 0, WEIGHTS[0].astype(np.float32), *row[1:])
    with pytest.raises(StoreError, match=r"\(1, 4\)"):
        writer.write_checkpoint(0, 0, *row[:3], b"1234")
    writer.write_checkpoint(0, 0, *row)
    with pytest.raises(StoreError, match=r"steps \[3, 6\]"):
        writer.finish(**arguments())
    checkpoints(writer)
    with pytest.raises(StoreError, match="'loss': 5"):
        writer.finish(**arguments(loss=np.zeros(T - 1)))
    with pytest.raises(StoreError, match="reserved"):
        writer.finish(**arguments(attrs={"parameters": 1}))


def test_damage_is_noticed(place: str) -> None:
    writer = a_writer(place)
    checkpoints(writer)
    writer.finish(**arguments())
    uri = join(place, "trajectory.zarr")
    found = open_trajectory(uri)
    for name in ("checkpoint/weights/c/1/0", "batches/c/0/0", "zarr.json"):
        data = bytearray(files.read_bytes(join(uri, name)))
        data[len(data) // 2 if "/c/" in name else 0] ^= 4
        files.write_bytes(join(uri, name), bytes(data))
        with pytest.raises(CorruptStore, match=name.split("/c/")[0]):
            found.checkpoint(1) if "weights" in name else open_trajectory(uri)
    found.checkpoint(0)


def test_wide_checkpoints_are_split(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_writer, "_CHECKPOINT_CHUNK_BYTES", 24)
    writer = a_writer(place)
    checkpoints(writer)
    writer.finish(**arguments())
    found = open_trajectory(join(place, "trajectory.zarr"))
    assert arrays.StoredArray.open(found.uri, "checkpoint/weights").chunk == (1, 3)
    np.testing.assert_array_equal(found.checkpoint(2).weights, WEIGHTS[2])


def test_a_full_disk_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = a_writer(str(tmp_path))
    checkpoints(writer)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("hydra_pipe.storage.files.os.write", full)
    with pytest.raises(StorageFull):
        writer.finish(**arguments())
    monkeypatch.undo()
    assert not (tmp_path / "trajectory.zarr").exists()
    writer.abort()
    assert os.listdir(tmp_path) == []


def test_a_really_full_disk(small_disk: Path) -> None:
    arguments_: dict[str, Any] = {"dtype": "float32", "buffer_bytes": 0, "parameter_count": 1}
    wide = np.random.default_rng(0).standard_normal(100_000).astype(np.float32)
    writer = TrajectoryWriter(
        str(small_disk / "trajectory.zarr"), dimension=100_000, checkpoint_steps=range(9), **arguments_
    )

    def fill() -> None:
        for k in range(9):
            writer.write_checkpoint(k, k, wide, wide, np.array([True]), b"")

    with pytest.raises(StorageFull):
        fill()
    assert not (small_disk / "trajectory.zarr").exists()
    writer.abort()
    assert os.listdir(small_disk) == []

"""CIFAR-10: its pickles read as data, hostile ones refused, normalised and augmented access."""

from __future__ import annotations

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.recipes.cifar10 import Cifar10
from hydra_pipe.workers.recipes.data_images import ImageBytes
from torch.utils.data import DataLoader, default_collate


def cifar_batch(count: int, seed: int) -> dict[bytes, object]:
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"batch_label": b"batch", b"labels": [int(i) % 10 for i in range(count)], b"data": data}


def write_cifar(directory: Path, *, count: int = 10, protocol: int = 2) -> Path:
    folder = directory / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    for k, name in enumerate([f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]):
        (folder / name).write_bytes(pickle.dumps(cifar_batch(count, k), protocol=protocol))
    return directory


def python2_pickle(data: np.ndarray, labels: list[int]) -> bytes:
    """Return a batch as Python 2 wrote the published files: byte strings, numpy.core names."""

    def text(value: bytes) -> bytes:
        return b"U" + bytes((len(value),)) + value

    def integer(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    raw = data.tobytes()
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R(K\x03" + text(b"|") + b"NNN"
    dtype += integer(-1) + integer(-1) + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    array += b"(K\x01" + integer(data.shape[0]) + integer(data.shape[1]) + b"\x86" + dtype + b"\x89"
    array += b"T" + struct.pack("<i", len(raw)) + raw + b"tb"
    items = text(b"labels") + b"](" + b"".join(map(integer, labels)) + b"e" + text(b"data") + array
    return b"\x80\x02}(" + items + b"u."


# --- CIFAR-10 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_cifar_files_of_every_protocol(tmp_path, protocol):
    recipe = Cifar10(data_dir=write_cifar(tmp_path, protocol=protocol))
    train, validation, test = recipe.train_dataset(), recipe.validation_dataset(), recipe.test_dataset()
    assert [len(part) for part in (train, validation, test)] == [40, 10, 10]
    pixels = np.concatenate([cifar_batch(10, k)[b"data"] for k in range(5)]).reshape(-1, 3, 32, 32)
    source = train.source_index.numpy()
    assert np.array_equal(train.images.numpy(), pixels[source])
    assert np.array_equal(train.targets.numpy(), source % 10)
    assert sorted(np.concatenate([train.source_index, validation.source_index])) == list(range(50))
    image, target = test[3]
    raw = cifar_batch(10, 5)[b"data"][3].reshape(3, 32, 32) / 255
    mean, std = np.array(Cifar10.MEAN)[:, None, None], np.array(Cifar10.STD)[:, None, None]
    assert np.allclose(image.numpy(), (raw - mean) / std, atol=1e-5)
    assert int(target) == 3


def test_cifar_files_as_python_2_wrote_them(tmp_path):
    write_cifar(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    data = np.arange(2 * 3072, dtype=np.int64).astype(np.uint8).reshape(2, 3072)
    content = python2_pickle(data, [7, 4])
    assert np.array_equal(pickle.loads(content, encoding="bytes")[b"data"], data)  # the format is genuine
    (folder / "test_batch").write_bytes(content)
    test = Cifar10(data_dir=folder).test_dataset()  # the folder itself is accepted too
    assert np.array_equal(test.images.numpy().reshape(2, 3072), data)
    assert test.targets.tolist() == [7, 4]


class Touch:
    """Unpickled with ``pickle.load``, this creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def hostile(path: Path) -> dict[str, object]:
    good = cifar_batch(2, 0)
    objects = np.empty((2, 3072), dtype=object)
    return {
        "code": {**good, b"x": Touch(path)},
        "code in an array": {**good, b"data": np.array([[Touch(path)] * 3072], dtype=object)},
        "object array": {**good, b"data": objects},
        "float array": {**good, b"data": np.zeros((2, 3072))},
        "wrong width": {**good, b"data": np.zeros((2, 3071), np.uint8)},
        "too few labels": {**good, b"labels": [1]},
        "label too large": {**good, b"labels": [1, 10]},
        "label no number": {**good, b"labels": [1, b"2"]},
        "no labels": {b"data": good[b"data"]},
        "a list": [good],
        "a class": {**good, b"x": Path("here")},
    }


@pytest.mark.parametrize("case", list(hostile(Path("x"))))
@pytest.mark.parametrize("protocol", [2, 5])
def test_other_pickles_are_refused_and_run_nothing(tmp_path, case, protocol):
    write_cifar(tmp_path)
    file, sign = tmp_path / "cifar-10-batches-py" / "test_batch", tmp_path / "it ran"
    file.write_bytes(pickle.dumps(hostile(sign)[case], protocol=protocol))
    with pytest.raises(RecipeError, match="is not a CIFAR-10 batch") as caught:
        Cifar10(data_dir=tmp_path).test_dataset()
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not sign.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}",
        b"not a pickle",
        b"\x80\x02cposix\nsystem\nU\x04true\x85R.",
        b"\x80\x02cnumpy\nndarray\nNb.",
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00aX\x03\x00\x00\x00zip\x86R.",
        b"\x80\x02(K\x01K\x02t.",
    ],
)
def test_broken_pickles_are_refused(tmp_path, content):
    write_cifar(tmp_path)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(content)
    with pytest.raises(RecipeError, match="unpack the original"):
        Cifar10(data_dir=tmp_path).test_dataset()


# --- access --------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [False, True])
def test_items_and_batches_are_the_same_bits(tmp_path, augment):
    data = Cifar10(data_dir=write_cifar(tmp_path), augment=augment).train_dataset()
    chosen = [5, 1, 1, 30]
    torch.manual_seed(4)
    single = default_collate([data[i] for i in chosen])
    torch.manual_seed(4)
    batched = default_collate(data.__getitems__(chosen))
    for one, other in zip(single, batched, strict=True):
        assert torch.equal(one, other)
    if not augment:  # PyTorch's own loader takes the batched way, after a draw of its own
        loaded = next(iter(DataLoader(data, batch_sampler=[chosen])))
        assert torch.equal(loaded[0], single[0])


def test_augmentation_crops_and_flips_training_images_only(tmp_path):
    recipe = Cifar10(data_dir=write_cifar(tmp_path), augment=True)
    data = recipe.train_dataset()
    plain = Cifar10(data_dir=tmp_path).train_dataset()[0][0]
    padded = torch.nn.functional.pad(plain, (4,) * 4)
    allowed = [padded[:, t : t + 32, s : s + 32] for t in range(9) for s in range(9)]
    allowed += [image.flip(2) for image in allowed]
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        image = data[0][0]
        assert image.is_contiguous()
        seen.add(next(k for k, other in enumerate(allowed) if torch.equal(image, other)))
    assert len(seen) > 10
    for part in (recipe.test_dataset(), recipe.validation_dataset()):
        assert torch.equal(part[0][0], part[0][0])


def test_bytes_take_a_quarter_of_the_memory(tmp_path):
    data = Cifar10(data_dir=write_cifar(tmp_path)).train_dataset()
    assert isinstance(data, ImageBytes)
    assert data.images.dtype == torch.uint8

"""The built-in data sets: file formats, splits, access in batches, and what is refused."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.recipes import digits
from hydra_pipe.workers.recipes.cifar10 import Cifar10
from hydra_pipe.workers.recipes.data_images import ImageTensors
from hydra_pipe.workers.recipes.data_split import held_out_split, stratified_split, with_label_noise
from hydra_pipe.workers.recipes.digits import Digits
from hydra_pipe.workers.recipes.mnist import FashionMnist, Mnist
from sklearn.datasets import load_digits
from torch.utils.data import default_collate

DEBIAN = Path("/usr/share/datasets/fashion-mnist")
PLAIN = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


def idx(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def images_and_labels(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
    return images, (np.arange(count) % 10).astype(np.uint8)


def write_idx(
    directory: Path, *, dotted: bool = False, zipped: bool = False, train: int = 60, test: int = 20
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    arrays = (*images_and_labels(train, 0), *images_and_labels(test, 1))
    for name, array in zip(PLAIN, arrays, strict=True):
        spelled = name.replace("-idx", ".idx") if dotted else name
        content = idx(array)
        if zipped:
            (directory / f"{spelled}.gz").write_bytes(gzip.compress(content))
        else:
            (directory / spelled).write_bytes(content)
    return directory


# --- IDX -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_in_every_spelling(tmp_path, dotted, zipped):
    recipe = Mnist(data_dir=write_idx(tmp_path, dotted=dotted, zipped=zipped))
    train, validation, test = recipe.train_dataset(), recipe.validation_dataset(), recipe.test_dataset()
    assert [len(part) for part in (train, validation, test)] == [50, 10, 20]
    images, labels = images_and_labels(60, 0)
    for part in (train, validation):
        source = part.source_index.numpy()
        assert np.array_equal(part.targets.numpy(), labels[source])
        scaled = (images[source, None] / 255.0 - 0.1307) / 0.3081
        assert np.allclose(part.tensors[0].numpy(), scaled, atol=1e-5)
        assert part.tensors[0].dtype == torch.float32
    together = np.concatenate([train.source_index, validation.source_index])
    assert sorted(together) == list(range(60))
    assert test.source_index.tolist() == list(range(20))


def test_split_does_not_follow_the_training_seed(tmp_path):
    write_idx(tmp_path)
    one, two = (Mnist(data_dir=tmp_path, seed=seed).train_dataset() for seed in (0, 1))
    assert torch.equal(one.source_index, two.source_index)


def test_pinned_splits():
    """Indices of stored runs must mean the same samples for ever."""
    assert held_out_split(12, 2)[1].tolist() == [0, 3]
    digits = Digits()
    assert digits.train_dataset().source_index[:5].tolist() == [716, 896, 292, 421, 106]
    assert digits.test_dataset().source_index[:5].tolist() == [1172, 24, 1001, 1463, 1390]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        (PLAIN[0], b"", "starts with nothing"),
        (PLAIN[0], b"\x00\x00\x0d\x03" + bytes(12), "starts with 00000d03"),
        (PLAIN[0], idx(np.zeros((60, 28, 27), np.uint8)), "28 x 27"),
        (PLAIN[0], idx(np.zeros((59, 28, 28), np.uint8)), "59 images"),
        (PLAIN[0], idx(np.zeros((60, 28, 28), np.uint8))[:-1], "only 47039"),
        (PLAIN[0], idx(np.zeros((60, 28, 28), np.uint8)) + b"\x00", "more than"),
        (PLAIN[0], b"\x00\x00\x08\x03" + b"\xff" * 12, "claims the shape"),
        (PLAIN[1], idx(np.full(60, 10, np.uint8)), "label 10"),
    ],
)
def test_damaged_idx_file_is_named(tmp_path, name, content, words):
    write_idx(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=words) as caught:
        Mnist(data_dir=tmp_path).train_dataset()
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("keep", [0, 10, 500])
def test_cut_gzip_file_is_named(tmp_path, keep):
    write_idx(tmp_path, zipped=True)
    path = tmp_path / f"{PLAIN[0]}.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(RecipeError, match=r"train-images-idx3-ubyte\.gz"):
        Mnist(data_dir=tmp_path).train_dataset()


@pytest.mark.parametrize("recipe_class", [Mnist, FashionMnist, Cifar10])
def test_missing_directory_names_place_files_and_remedy(tmp_path, recipe_class):
    with pytest.raises(RecipeError) as caught:
        recipe_class(data_dir=tmp_path / "nowhere").train_dataset()
    message = str(caught.value)
    assert str(tmp_path / "nowhere") in message
    assert ("data_batch_1" if recipe_class is Cifar10 else PLAIN[0]) in message
    assert "--set data_dir=DIR" in message
    assert "\n" not in message


def test_missing_file_is_named(tmp_path):
    write_idx(tmp_path)
    (tmp_path / PLAIN[3]).unlink()
    with pytest.raises(RecipeError, match=f"lacks {PLAIN[3]};"):
        Mnist(data_dir=tmp_path).train_dataset()


def test_environment_gives_the_place(tmp_path, monkeypatch):
    monkeypatch.delenv("HYDRA_PIPE_DATA", raising=False)
    with pytest.raises(RecipeError, match="neither data_dir nor HYDRA_PIPE_DATA is set"):
        Mnist().train_dataset()
    monkeypatch.setenv("HYDRA_PIPE_DATA", str(tmp_path))
    write_idx(tmp_path / "mnist")
    write_idx(tmp_path / "fashion-mnist", test=30)
    assert len(Mnist().test_dataset()) == 20
    assert len(FashionMnist().test_dataset()) == 30  # the environment goes before the usual place


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_real_fashion_mnist(monkeypatch):
    monkeypatch.delenv("HYDRA_PIPE_DATA", raising=False)
    recipe = FashionMnist()
    train, validation, test = recipe.train_dataset(), recipe.validation_dataset(), recipe.test_dataset()
    assert [len(part) for part in (train, validation, test)] == [50_000, 10_000, 10_000]
    assert test.targets[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert abs(float(train.tensors[0].mean())) < 0.01
    assert abs(float(train.tensors[0].std()) - 1) < 0.01
    assert recipe.losses(recipe.model(), default_collate(train.__getitems__([0, 1, 2]))).shape == (3,)


def test_tensor_datasets_give_batches_in_one_gather():
    data = Digits().train_dataset()
    assert isinstance(data, ImageTensors)
    images, targets = default_collate(data.__getitems__([3, 0, 3]))
    assert torch.equal(images, data.tensors[0][[3, 0, 3]])
    assert torch.equal(targets, data.targets[[3, 0, 3]])


# --- splits and noise ----------------------------------------------------------------------------


def test_stratified_split_keeps_class_shares():
    labels = np.repeat(np.arange(3), [100, 55, 7]).astype(np.int64)
    kept, out = stratified_split(labels, 33)
    assert len(out) == 33
    assert sorted(np.concatenate([kept, out])) == list(range(162))
    exact = np.array([100, 55, 7]) * 33 / 162
    assert np.all(np.abs(np.bincount(labels[out], minlength=3) - exact) < 1)


def test_digits_split():
    train, test = Digits().train_dataset(), Digits().test_dataset()
    assert (len(train), len(test)) == (1437, 360)
    assert sorted(np.concatenate([train.source_index, test.source_index])) == list(range(1797))
    assert train.tensors[0].shape == (1437, 1, 8, 8)
    assert train.tensors[0].dtype == torch.float32
    assert (float(train.tensors[0].min()), float(train.tensors[0].max())) == (0.0, 1.0)
    assert np.bincount(test.targets).tolist() == pytest.approx([36] * 10, abs=2)


def test_uniform_noise_is_always_wrong_and_uniform():
    labels = np.arange(20_000, dtype=np.int64) % 10
    noisy = with_label_noise(labels, share=0.5, kind="uniform", seed=1, classes=10)
    changed = noisy != labels
    assert changed.sum() == 10_000
    shifts = np.bincount((noisy - labels)[changed] % 10, minlength=10)
    assert shifts[0] == 0
    assert np.all(np.abs(shifts[1:] - 10_000 / 9) < 5 * np.sqrt(10_000 / 9))


@pytest.mark.parametrize("kind", ["symmetric", "pairflip", "asymmetric"])
def test_noise_by_class_changes_that_share_of_every_class(kind):
    labels = np.repeat(np.arange(5), [41, 100, 7, 3, 60])
    partners = {0: 3, 3: 0, 4: 1}
    given = {"kind": kind, "seed": 1, "classes": 5, "partners": partners}
    small, large = (with_label_noise(labels, share=share, **given) for share in (0.2, 0.55))
    for share, noisy in ((0.2, small), (0.55, large)):
        for label, size in enumerate([41, 100, 7, 3, 60]):
            wrong = noisy[labels == label][noisy[labels == label] != label]
            spared = kind == "asymmetric" and label not in partners
            assert len(wrong) == (0 if spared else int(share * size))
            if kind == "pairflip":
                assert set(wrong) <= {(label + 1) % 5}
            if kind == "asymmetric":
                assert set(wrong) <= {partners.get(label)}
    changed = small != labels
    assert np.array_equal(small[changed], large[changed])  # a larger share adds to the smaller one
    if kind == "symmetric":
        assert set(large[(labels == 1) & (large != 1)]) == {0, 2, 3, 4}
    chosen = np.isin(labels, list(partners)) if kind == "asymmetric" else np.ones(len(labels), dtype=bool)
    assert np.array_equal(with_label_noise(labels, share=1.0, **given) != labels, chosen)


def test_permuted_noise_keeps_class_counts():
    labels = np.arange(5_000, dtype=np.int64) % 10
    noisy = with_label_noise(labels, share=0.4, kind="permuted", seed=1, classes=10)
    assert np.array_equal(np.bincount(noisy), np.bincount(labels))
    assert 1_700 < (noisy != labels).sum() < 1_900  # 2,000 chosen, one in ten gets its own class


@pytest.mark.parametrize("kind", ["uniform", "permuted"])
def test_noise_is_seeded_and_leaves_its_input_alone(kind):
    labels = np.arange(100, dtype=np.int64) % 10
    one, same, other = (
        with_label_noise(labels, share=0.3, kind=kind, seed=seed, classes=10) for seed in (1, 1, 2)
    )
    assert np.array_equal(one, same)
    assert not np.array_equal(one, other)
    assert np.array_equal(labels, np.arange(100) % 10)


def test_a_larger_share_adds_to_the_smaller():
    labels = np.arange(1_000, dtype=np.int64) % 10
    small, large = (
        with_label_noise(labels, share=share, kind="uniform", seed=1, classes=10) for share in (0.1, 0.3)
    )
    assert np.all(large[small != labels] == small[small != labels])


@pytest.mark.parametrize("found", [True, False])
def test_digits_are_those_of_scikit_learn_wherever_its_file_lies(found, monkeypatch):
    if not found:
        monkeypatch.setattr(digits, "find_spec", lambda name: None)
    digits._digits.cache_clear()
    pixels, labels = digits._digits()
    digits._digits.cache_clear()
    right = load_digits()
    assert np.array_equal(pixels, right.images)
    assert np.array_equal(labels, right.target)

"""Classes come from what the batches hold; what contradicts them, or is missing, is said."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.workers.data.labels import Accuracy, Labels, class_labels, label_notes, with_labels
from hydra_pipe.workers.recipe import Recipe
from torch.utils.data import Dataset, Subset, TensorDataset

from tests.recipes import Small, gaussian


class Items(Dataset[Any]):
    """Items as given, counting how often each is read; attributes as given."""

    def __init__(self, items: list[Any], **attributes: Any) -> None:
        self.items, self.reads = items, 0
        for name, value in attributes.items():
            setattr(self, name, value)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        torch.rand(1), np.random.rand(), random.random()  # as augmentation does
        return self.items[index]


def pairs(held: list[Any], **attributes: Any) -> Items:
    return Items([(torch.zeros(2), target) for target in held], **attributes)


DIGITS = [k % 10 for k in range(200)]
PARITY = [digit % 2 for digit in DIGITS]


def test_an_attribute_that_agrees_spares_reading_the_items():
    dataset = pairs(DIGITS, targets=DIGITS)
    found = class_labels(Small(), dataset)
    assert (found.values, found.missing, found.differing) == (DIGITS, None, None)
    assert dataset.reads == 66


@pytest.mark.parametrize("name", ["targets", "labels"])
def test_a_target_transform_wins_over_the_attribute_and_is_said(name):
    dataset = pairs(PARITY, **{name: DIGITS})
    found = class_labels(Small(), dataset)
    assert found.values == PARITY
    chosen = np.unique(np.linspace(0, 199, 66).astype(int))
    wrong = sum(DIGITS[i] != PARITY[i] for i in chosen)
    first = next(int(i) for i in chosen if DIGITS[i] != PARITY[i])
    assert (
        f"differ in {wrong} of 66 samples looked at (sample {first}: {DIGITS[first]} and {PARITY[first]})"
        in (found.differing or "")
    )
    assert label_notes({"training": found}, None) == [found.differing]


def test_both_ends_are_looked_at():
    for end in (0, 199):
        wrong = DIGITS.copy()
        wrong[end] = 5
        assert class_labels(Small(), pairs(DIGITS, targets=wrong)).values == DIGITS


def test_a_subset_of_a_dataset_with_a_transform():
    dataset = Subset(pairs(PARITY, targets=DIGITS), range(50, 150))
    assert class_labels(Small(), dataset).values == PARITY[50:150]


def test_without_an_attribute_all_items_are_read():
    dataset = pairs(DIGITS)
    found = class_labels(Small(), dataset)
    assert (found.values, found.differing) == (DIGITS, None)
    assert dataset.reads == 66 + 200


def test_no_generator_of_the_process_moves():
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    class_labels(Small(), pairs(PARITY, targets=DIGITS))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert random.getstate() == states[2]


def test_the_method_of_the_base_class_says_the_same():
    assert Small().labels(pairs(PARITY, targets=DIGITS)) == PARITY
    dataset = gaussian(20, (6,), 3, 1)
    assert Small().labels(dataset) == dataset.tensors[1].tolist()


def test_a_recipe_that_numbers_classes_itself_is_followed_and_told():
    class Own(Small):
        def labels(self, dataset: Any) -> list[int]:
            return DIGITS

    found = class_labels(Own(), pairs(PARITY))
    assert found.values == DIGITS
    assert "labels() and the targets in the batches differ" in (found.differing or "")
    assert "labels() is used" in (found.differing or "")
    assert class_labels(Own(), pairs(DIGITS)).differing is None
    assert class_labels(Own(), Items([torch.zeros(2)] * 200)).differing is None


def test_a_recipe_without_classes_on_purpose_is_left_alone():
    class Nothing(Small):
        def labels(self, dataset: Any) -> None:
            return None

    found = class_labels(Nothing(), pairs(DIGITS))
    assert (found.values, found.missing, found.differing) == (None, None, None)


@pytest.mark.parametrize(
    ("dataset", "reason"),
    [
        (pairs([-100, 1, 2]), "range from -100 to 2"),
        (pairs([-1, 1, 1], targets=[-1, 1, 1]), "range from -1 to 1"),
        (TensorDataset(torch.zeros(3, 2), torch.tensor([0, 40000, 1])), "range from 0 to 40000"),
        (pairs([torch.zeros(4, 4, dtype=torch.long)] * 3), "int64 of shape (B, 4, 4)"),
        (pairs([0.5, 1.5, 2.5]), "float64 of shape (B,)"),
        (pairs(["cat", "dog", "cat"], targets=["cat", "dog", "cat"]), "targets are text, such as 'cat'"),
        (Items([torch.zeros(2)] * 3), "inputs alone"),
        (Items([(torch.zeros(2), 1, 2)] * 3), "3 parts"),
        (Items([{"x": torch.zeros(2), "y": 1}] * 3), "x, y and no integer under labels"),
    ],
)
def test_what_is_no_class_is_none_and_said(dataset, reason):
    found = class_labels(Small(), dataset)
    assert found.values is None
    assert reason in (found.missing or "")
    (note,) = label_notes({"training": found, "test": found}, "the model returns no classes")
    assert note.startswith(f"no class labels (training set and test set: {found.missing})")
    assert "define labels(dataset)" in note
    assert Small().labels(dataset) is None


def test_mappings_and_longer_tuples():
    items = [{"x": torch.zeros(2), "labels": k % 3} for k in range(9)]
    assert class_labels(Small(), Items(items)).values == [k % 3 for k in range(9)]
    lengths = [(torch.zeros(2), 7, k % 3) for k in range(9)]
    assert class_labels(Small(), Items(lengths, targets=[k % 3 for k in range(9)])).values == [
        k % 3 for k in range(9)
    ]
    indexed = [(torch.zeros(2), k % 2, k) for k in range(9)]
    found = class_labels(Small(), Items(indexed, targets=[k % 3 for k in range(9)]))
    assert found.values == [k % 2 for k in range(9)]
    assert found.differing is not None


def test_batches_give_the_classes_that_the_dataset_does():
    dataset = pairs(PARITY, targets=DIGITS)
    labels, chosen = Labels(Small(), dataset), np.array([3, 8, 199])
    batch = Small().collate([dataset[i] for i in chosen])
    assert labels.of(batch, chosen).tolist() == [PARITY[i] for i in chosen]


def test_an_accuracy_over_what_is_no_class_is_unknown():
    found = Accuracy()
    found.add(torch.tensor([1, 0]), torch.tensor([1, 1]))
    assert found.value == 0.5
    found.add(None, torch.tensor([1, 1]))
    found.add(torch.tensor([1, 0]), None)
    assert found.value == 0.5
    found.add(torch.tensor([1]), torch.tensor([-1]))
    assert np.isnan(found.value)


def test_an_item_that_cannot_be_read_is_named():
    class Broken(Items):
        def __getitem__(self, index: int) -> Any:
            if index == 151:
                raise OSError("truncated image")
            return super().__getitem__(index)

    from hydra_pipe.storage.errors import RecipeError

    dataset = Broken([(torch.zeros(2), 1)] * 200)
    with pytest.raises(RecipeError, match=r"training samples 128 to 191 .* OSError: truncated image"):
        class_labels(Small(), dataset)


def test_an_item_that_only_the_digest_reads_is_explained(tmp_path):
    from hydra_pipe.storage.errors import RecipeError

    class Broken(Items):
        def __getitem__(self, index: int) -> Any:
            if index == 7:
                raise OSError("truncated image")
            return torch.zeros(6), 1

    class Reading(Small):
        def test_dataset(self) -> Dataset[Any]:
            return Broken([0] * 2000, targets=[1] * 2000)

    with pytest.raises(RecipeError, match="test set could not be read: OSError: truncated image"):
        go(Reading(), tmp_path / "run")


def test_labels_that_the_driver_knows():
    recipe = Small()
    assert with_labels(recipe, np.array([2, 1])).labels(None) == [2, 1]
    assert with_labels(recipe, np.array([-1, -1])).labels(None) is None
    assert recipe.labels.__func__ is Recipe.labels


# ---------------------------------------------------------------- through a whole run


class Parity(Dataset[Any]):
    """Odd or even, from a dataset whose ``targets`` are the ten digits, as with ``target_transform``."""

    def __init__(self, count: int, seed: int) -> None:
        self.data = gaussian(count, (6,), 10, seed)
        self.targets = self.data.tensors[1]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> Any:
        inputs, digit = self.data[index]
        return inputs + 0.01 * torch.rand(6), int(digit) % 2


class OddOrEven(Small):
    classes = 10

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(6, 2)

    def train_dataset(self) -> Dataset[Any]:
        return Parity(45, 1)

    def test_dataset(self) -> Dataset[Any]:
        return Parity(30, 2)


class Described(OddOrEven):
    """The same training, told by attributes that are right."""

    def train_dataset(self) -> Dataset[Any]:
        return self._right(super().train_dataset())

    def test_dataset(self) -> Dataset[Any]:
        return self._right(super().test_dataset())

    def _right(self, dataset: Any) -> Dataset[Any]:
        dataset.targets = dataset.targets % 2
        dataset.__class__ = Raw
        return dataset


class Raw(Parity):
    def __getitem__(self, index: int) -> Any:
        return self.data[index][0] + 0.01 * torch.rand(6), int(self.data[index][1]) % 2


def go(recipe: Recipe, out: Any, **fields: Any) -> Any:
    from hydra_pipe.pipeline.executors.events import Note
    from hydra_pipe.pipeline.run import run
    from hydra_pipe.pipeline.spec.spec import RunSpec

    notes: list[str] = []
    asked = {"executor": "serial", "device": "cpu", "dtype": "float64", **fields}
    found = run(
        RunSpec(recipe=recipe, out=str(out), **asked),
        observer=lambda event: notes.append(event.message) if isinstance(event, Note) else None,
    )
    return found, notes


def test_a_run_with_a_target_transform_reports_the_accuracy_of_what_it_trains(tmp_path):
    found, notes = go(OddOrEven(), tmp_path / "a")
    right, quiet = go(Described(), tmp_path / "b")
    assert [("of the training set" in n, "of the test set" in n) for n in notes] == [
        (True, False),
        (False, True),
    ]
    assert quiet == []
    # The bits of training do not depend on how labels were found.
    assert found.trajectory().epoch_digest == right.trajectory().epoch_digest
    # Accuracy by hand, from the stored weights.
    trajectory = found.trajectory()
    weights = trajectory.checkpoint(len(trajectory.checkpoint_steps) - 1).weights
    store = found.test_gradients()
    truth = gaussian(30, (6,), 10, 2).tensors[1].numpy() % 2
    assert (store.column("label") == truth).all()
    model = OddOrEven().model().double()
    torch.nn.utils.vector_to_parameters(torch.from_numpy(weights), model.parameters())
    by_hand = (store.column("prediction") == truth).mean()
    assert found.info["summary"]["test_accuracy"] == pytest.approx(
        by_hand, abs=0.04
    )  # 1% noise in the inputs
    for name in ("train_accuracy", "test_accuracy"):
        assert found.info["summary"][name] == right.info["summary"][name]
    labels = gaussian(45, (6,), 10, 1).tensors[1].numpy() % 2
    assert found.samples().sort_by("train_index")["label"].to_pylist() == labels.tolist()
    pairs_found = found.contributions().to_table().to_pandas()
    assert (pairs_found.train_label.to_numpy() == labels[pairs_found.train_index]).all()
    assert (pairs_found.test_label.to_numpy() == truth[pairs_found.test_index]).all()


def test_shares_and_class_targets_follow_what_is_trained(tmp_path):
    found, _ = go(OddOrEven(), tmp_path / "a", track="20%", mode="adjoint", targets="classes")
    labels = gaussian(45, (6,), 10, 1).tensors[1].numpy() % 2
    tracked = found.samples(found.methods()[0])["train_index"].to_numpy()
    counts = np.bincount(labels[tracked])
    assert counts.tolist() == [max(1, round(0.2 * n)) for n in np.bincount(labels)]
    rows = found.contributions(found.methods()[0]).to_table()
    assert set(rows["test_label"].to_pylist()) == {0, 1}


def test_evaluate_counts_right_predictions_by_what_is_trained(tmp_path):
    from hydra_pipe.workers.training.metrics import evaluate
    from hydra_pipe.workers.training.retrain import sample_losses
    from hydra_pipe.workers.training.training import Compute, Training

    training = Training(OddOrEven(), Compute(device="cpu"))
    dataset = training.recipe.test_dataset()
    found = sample_losses(training, dataset, np.arange(30))
    assert (found.correct >= 0).all()
    _, accuracy = evaluate(
        training.recipe,
        training.model,
        dataset,
        Labels(training.recipe, dataset),
        training.device,
        training.dtype,
    )
    assert accuracy == found.correct.mean()


class Ignoring(Small):
    """Some samples are ignored, by the convention of ``cross_entropy``."""

    ignored = -100

    def train_dataset(self) -> Dataset[Any]:
        inputs, targets = super().train_dataset().tensors
        return TensorDataset(inputs, torch.where(torch.arange(45) % 9 == 0, self.ignored, targets))

    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none", ignore_index=self.ignored)


class Segments(Small):
    def model(self) -> torch.nn.Module:
        return torch.nn.Conv2d(2, 3, 1)

    def _data(self, count: int, seed: int) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(seed)
        inputs = torch.randn(count, 2, 4, 4, generator=generator)
        return TensorDataset(inputs, (inputs.sum(1) > 0).long())

    def train_dataset(self) -> Dataset[Any]:
        return self._data(20, 1)

    def test_dataset(self) -> Dataset[Any]:
        return self._data(6, 2)

    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none").mean((1, 2))


class OneLogit(Small):
    """Binary targets and one logit: labels, but no arg max."""

    def model(self) -> torch.nn.Module:
        return torch.nn.Linear(6, 1)

    def losses(self, model: Any, batch: Any) -> torch.Tensor:
        return F.binary_cross_entropy_with_logits(
            model(batch[0])[:, 0], (batch[1] > 0).to(batch[0]), reduction="none"
        )


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        (Ignoring(), ["no class labels (training set: targets range from -100 to 2"]),
        (Segments(), ["no class labels (training set and test set: targets are int64 of shape (B, 4, 4))"]),
        (OneLogit(), ["accuracy cannot be computed: the model returns shape (B, 1) and not (B, classes)"]),
    ],
)
def test_runs_without_classes_or_predictions_finish_and_say_so_once(recipe, says, tmp_path, caplog):
    found, notes = go(recipe, tmp_path / "run")
    assert [note.startswith(says[k]) for k, note in enumerate(notes)] == [True] * len(says)
    assert "train_accuracy" not in found.info["summary"]
    from hydra_pipe.pipeline.run import run
    from hydra_pipe.pipeline.spec.spec import RunSpec

    caplog.clear()  # with nobody listening it goes to the log
    run(RunSpec(recipe=recipe, out=str(tmp_path / "run"), executor="serial", device="cpu", dtype="float64"))
    assert [record.getMessage().startswith(says[0]) for record in caplog.records] == [True]

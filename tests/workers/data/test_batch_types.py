"""A batch of any mapping, dataclass or NamedTuple gives what a tuple gives, and keeps its type."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.data.batch_types import Shell, leaves
from hydra_pipe.workers.data.batches import batch_length, to_device
from hydra_pipe.workers.training.same_data import data_digests
from hydra_pipe.workers.training.validate import check_losses
from torch.utils._pytree import tree_map

from tests.end_to_end.support import assert_same_bits, numbers, serial
from tests.recipes import Augmented, Sequences

CPU = torch.device("cpu")


class Encoding(UserDict):
    """Like ``transformers.BatchEncoding``: a UserDict with attributes, and more than its contents."""

    def __init__(self, data: dict[str, Any] | None = None, encodings: Any = None) -> None:
        super().__init__(data)
        self._encodings = encodings

    def __getattr__(self, name: str) -> Any:
        try:
            return self.__dict__["data"][name]
        except KeyError:
            raise AttributeError(name) from None


class Loud(dict):
    """A dict of another type whose items are attributes too, as ``ModelOutput``'s."""

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(key, value)
        super().__setattr__(key, value)


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


@dataclass
class Plain:
    x: torch.Tensor
    y: torch.Tensor
    note: str = "kept"
    made: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Fixed:
    x: torch.Tensor
    y: torch.Tensor


def loud(x: torch.Tensor, y: torch.Tensor) -> Loud:
    made = Loud()
    made["x"], made["y"] = x, y
    return made


MAKERS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "UserDict": lambda x, y: Encoding({"x": x, "y": y}, "tokens"),
    "dict of another type": loud,
    "NamedTuple": Pair,
    "dataclass": Plain,
    "frozen dataclass with slots": Fixed,
    "SimpleNamespace": lambda x, y: SimpleNamespace(x=x, y=y),
}


class Wrapped(Sequences):
    """Sequences (whose parameters go by rule, ``func`` and twice) with batches of a given type."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def collate(self, items):
        return MAKERS[self.kind](*super().collate(items))

    def train_dataset(self):
        return Listed(super().train_dataset())

    def test_dataset(self):
        return Listed(super().test_dataset())

    def losses(self, model, batch):
        assert type(batch) is type(MAKERS[self.kind](torch.zeros(1), torch.zeros(1)))
        if isinstance(batch, UserDict):
            assert batch["x"] is batch.x
            assert batch._encodings == "tokens"
            return F.cross_entropy(self.call(model, **batch), batch["y"], reduction="none")
        return F.cross_entropy(model(batch.x), batch.y, reduction="none")

    @staticmethod
    def call(model, x, y):
        return model(x)


class Listed:
    """The samples of a TensorDataset, one at a time, so that ``collate`` is called."""

    def __init__(self, inner) -> None:
        self.inner, self.targets = inner, inner.tensors[1]

    def __len__(self) -> int:
        return len(self.inner)

    def __getitem__(self, index):
        return self.inner[index]


class Opaque:
    def __init__(self, x, y) -> None:
        self.x, self.y = x, y


class OpaqueBatch(Augmented):
    def collate(self, items):
        return Opaque(*super().collate(items))

    def losses(self, model, batch):
        return super().losses(model, (batch.x, batch.y))


@pytest.mark.parametrize("kind", MAKERS)
def test_to_device_keeps_the_type_and_leaves_the_batch_alone(kind):
    batch = MAKERS[kind](torch.ones(4, 2), torch.arange(4))
    moved = to_device(batch, CPU, torch.float64)
    assert type(moved) is type(batch)
    assert [leaf.dtype for leaf in leaves(moved)[:2]] == [torch.float64, torch.int64]
    assert [leaf.dtype for leaf in leaves(batch)[:2]] == [torch.float32, torch.int64]
    assert batch_length(batch) == 4
    assert batch_length({"inner": batch}) == 4
    halved = tree_map(lambda leaf: leaf[:2] if isinstance(leaf, torch.Tensor) else leaf, {"inner": [batch]})
    assert batch_length(halved) == 2


def test_attributes_beside_the_contents_are_kept():
    moved = to_device(Encoding({"x": torch.ones(2)}, encodings="e"), CPU, torch.float64)
    assert moved._encodings == "e"
    assert to_device(Plain(torch.ones(2), torch.ones(2), "n"), CPU, torch.float64).note == "n"


def test_shells_are_equal_where_types_and_names_are():
    batch = Encoding({"x": torch.ones(2)})
    assert Shell(batch, batch) == Shell(Encoding({"x": torch.zeros(3)}), ["x"])
    assert Shell(batch, ["x"]) != Shell(batch, ["y"])
    assert Shell(batch, ["x"]) != Shell({}, ["x"])
    assert hash(Shell(batch, ["x"])) == hash(Shell(batch, ("x",)))


@pytest.fixture(scope="module")
def right(tmp_path_factory: Any) -> Any:
    return serial(tmp_path_factory.mktemp("right") / "run", Sequences(), test="4")


@pytest.mark.parametrize("kind", MAKERS)
def test_a_run_has_the_bits_of_one_with_tuples(kind, right, tmp_path):
    found = serial(tmp_path / "found", Wrapped(kind), test="4")
    assert "func" in right.info["strategies"].values()
    assert found.info["strategies"] == right.info["strategies"]
    assert_same_bits(numbers(found.uri), numbers(right.uri))


def test_digests_of_the_data_see_inside():
    class Moved(Wrapped):
        def test_dataset(self):
            dataset = super().test_dataset()
            dataset.inner.tensors[0][3] += 1
            return dataset

    found, moved = data_digests(Wrapped("UserDict")), data_digests(Moved("UserDict"))
    assert {name for name in found if found[name] != moved[name]} == {"test samples"}


def test_a_batch_nobody_can_look_into_is_refused_by_name():
    recipe = OpaqueBatch()
    with pytest.raises(RecipeError, match=r"type Opaque, in which no tensor can be found; make it a tuple"):
        check_losses(recipe, recipe.model(), recipe.train_dataset(), torch.float32)

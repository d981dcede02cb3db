"""What is cast keeps its kind, and survives being packed."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.data.batches import to_device
from hydra_pipe.workers.data.cast import cast_dtype, cast_model, raw_bytes
from hydra_pipe.workers.model.layout import flatten
from hydra_pipe.workers.model.state import load_buffers, pack_buffers
from hydra_pipe.workers.training.training import Compute, Training
from hydra_pipe.workers.training.validate import check_layers
from torch import nn

from tests.end_to_end.support import serial
from tests.recipes import Small

CPU = torch.device("cpu")
DTYPES = {
    torch.float16: (torch.float32, torch.float64),
    torch.float32: (torch.float32, torch.float64),
    torch.float64: (torch.float32, torch.float64),
    torch.bfloat16: (torch.float32, torch.float64),
    torch.complex64: (torch.complex64, torch.complex128),
    torch.complex128: (torch.complex64, torch.complex128),
    torch.int64: (torch.int64, torch.int64),
    torch.bool: (torch.bool, torch.bool),
}


class Rotary(nn.Module):
    """Rotates pairs of features by a complex buffer, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("turn", torch.polar(torch.ones(3), torch.arange(3.0) + 1))
        self.register_buffer("flag", torch.tensor([True, False]))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("none", torch.zeros(0))
        self.out = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.steps += 1
        pairs = torch.view_as_complex(x.reshape(-1, 3, 2).contiguous())
        return self.out(torch.view_as_real(pairs * self.turn).flatten(1))


class Rotated(Small):
    def model(self):
        return Rotary()


class ComplexInputs(Small):
    """Inputs that are complex numbers."""

    def losses(self, model, batch):
        inputs, targets = batch
        return F.cross_entropy(model(torch.view_as_real(inputs).flatten(1)), targets, reduction="none")

    def collate(self, items):
        inputs, targets = super().collate(items)
        return torch.view_as_complex(inputs.view(-1, 3, 2).contiguous()), targets


def own_training(recipe: Small, run: Any) -> np.ndarray:
    """The recipe's recorded training by a plain loop in float64, from the recorded initial weights."""
    trajectory = run.trajectory()
    model = recipe.model()
    turn = model.turn.to(torch.complex128)
    model = model.double()  # makes the buffer real, so it is put back
    model.turn = turn
    nn.utils.vector_to_parameters(torch.tensor(trajectory.checkpoint(0).weights), model.parameters())
    optimizer, dataset = recipe.optimizer(model), recipe.train_dataset()
    for row in trajectory.batches:
        members = [int(i) for i in row if i >= 0]
        inputs, targets = (tensor[members] for tensor in dataset.tensors)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs.double()), targets).backward()
        optimizer.step()
    return nn.utils.parameters_to_vector(model.parameters()).detach().numpy()


@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_kinds(source):
    assert (cast_dtype(source, torch.float32), cast_dtype(source, torch.float64)) == DTYPES[source]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_of_every_kind_survive_casting_and_packing(dtype):
    module = nn.Module()
    kinds = {
        "complex": torch.tensor([1 + 2j, 3 - 4j]),
        "conjugate": torch.tensor([1 + 2j, 3 - 4j]).conj(),
        "negative": torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
        "bool": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "count": torch.tensor(3),
        "brain": torch.ones(2, dtype=torch.bfloat16),
        "expanded": torch.arange(3.0).expand(4, 3),
        "transposed": torch.arange(6.0).view(2, 3).T,
        "empty": torch.zeros(0),
    }
    for name, tensor in kinds.items():
        module.register_buffer(name, tensor)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cast_model(module, CPU, dtype)
    for name, tensor in kinds.items():
        assert module.get_buffer(name).dtype == cast_dtype(tensor.dtype, dtype)
        assert torch.equal(module.get_buffer(name), tensor.to(module.get_buffer(name).dtype))
    packed, right = pack_buffers(module), [buffer.clone() for buffer in module.buffers()]
    for buffer in module.buffers():
        buffer.zero_()
    load_buffers(module, packed)
    assert all(torch.equal(found, value) for found, value in zip(module.buffers(), right, strict=True))


def test_tied_parameters_stay_tied_and_frozen_ones_frozen():
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    module[0].bias.requires_grad_(False)
    cast_model(module, None, torch.float64)
    assert module[1].weight is module[0].weight
    assert module[0].weight.dtype == torch.float64
    assert not module[0].bias.requires_grad


def test_raw_bytes_are_the_numbers():
    numbers = torch.arange(6.0).view(2, 3)
    assert raw_bytes(numbers.T) == numbers.T.contiguous().numpy().tobytes()
    assert raw_bytes(torch.tensor(True)) == b"\x01"


def test_complex_inputs_are_cast_to_the_runs_kind():
    batch = (torch.ones(2, dtype=torch.complex64), torch.ones(2), torch.ones(2, dtype=torch.int64))
    assert [t.dtype for t in to_device(batch, CPU, torch.float64)] == [
        torch.complex128,
        torch.float64,
        torch.int64,
    ]


def test_a_complex_buffer_is_trained_with_as_the_user_would(tmp_path):
    run = serial(tmp_path / "run", Rotated(), dtype="float64")
    right = own_training(Rotated(), run)
    assert np.abs(run.trajectory().checkpoint(-1).weights - right).max() <= 1e-12 * np.abs(right).max()


@pytest.mark.parametrize(("dtype", "kind"), [("float32", torch.complex64), ("float64", torch.complex128)])
def test_training_keeps_complex_buffers_complex(dtype, kind):
    training = Training(Rotated(), Compute(device="cpu", dtype=dtype))
    assert training.model.turn.dtype == kind
    assert flatten(training.parameters).dtype == training.dtype


def test_complex_inputs_run_and_are_the_real_ones(tmp_path):
    found = serial(tmp_path / "complex", ComplexInputs(), dtype="float64")
    right = serial(tmp_path / "real", Small(), dtype="float64")
    assert np.array_equal(found.hypergradients()[:], right.hypergradients()[:])


def test_complex_parameters_stay_refused():
    module = nn.Linear(2, 2, dtype=torch.complex64)
    with pytest.raises(RecipeError, match=r"complex64; use a real floating dtype"):
        check_layers(module)

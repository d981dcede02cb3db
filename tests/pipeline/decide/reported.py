"""Runs that explain and report are tried on: digits with wrong labels and a detection, and hostile texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.pipeline.decide.detection import Detection, write_detection
from hydra_pipe.pipeline.opened_run import Run, open_run
from hydra_pipe.pipeline.reading.unit_values import DetectionValues
from hydra_pipe.storage.schemas import DETECTION
from torch import Tensor, nn
from torch.utils.data import Dataset

from hydra_pipe import Recipe
from tests.end_to_end.support import serial

ATTACKS = (
    "<script>window.hacked = 1</script>",
    '"><img src=x onerror="window.hacked = 1">',
    "'); window.hacked = 1; ('",
    "</style></title><script>window.hacked = 1</script>",
    "plain \U0001f600 words \u202edesrever\u202c \u0645\u0631\u062d\u0628\u0627",
    "&amp; &lt;b&gt; \x00\x1b[31m",
)
TRAIN, TEST = 120, 24


class Texts(Dataset[dict[str, Any]]):
    """Texts that are attacks, with two features and two classes."""

    def __init__(self, count: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.features = torch.randn(count, 2, generator=generator)
        self.labels = [int(row[0] > 0) for row in self.features]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        text = ATTACKS[index % len(ATTACKS)]
        return {"text": text, "x": self.features[index], "label": self.labels[index]}


class Words(Recipe):
    NAME = "words"
    epochs, batch_size, seed = 2, 8, 0

    def model(self) -> nn.Module:
        return nn.Linear(2, 2)

    def train_dataset(self) -> Dataset[Any]:
        return Texts(30, 0)

    def test_dataset(self) -> Dataset[Any]:
        return Texts(8, 1)

    def collate(self, items: Any) -> Any:
        return [torch.stack([i["x"] for i in items]), torch.tensor([i["label"] for i in items])]

    def losses(self, model: nn.Module, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1)


def detect(run: Run, name: str = "margin", reason: str = "mean margin {:.2f}") -> None:
    """Leave a detection in a run: wrong labels first, every third sample of the rest with a suggestion."""
    table = run.samples()
    index, label = (table[column].to_numpy().astype(int) for column in ("train_index", "label"))
    noisy = run.noisy()
    wrong = np.array([], int) if noisy is None else noisy[0]
    suspicion = np.random.default_rng(0).normal(size=len(index)) * 0.3 + np.isin(index, wrong) * 2.0
    suggested = np.where(np.arange(len(index)) % 3 == 0, (label + 1) % (label.max() + 1), -1)
    order, n = np.argsort(-suspicion), len(index)
    flagged = max(3, len(wrong) // 2)
    columns = {
        "by": [name] * n,
        "train_index": index[order],
        "given_label": label[order],
        "suggested_label": suggested[order],
        "score": (np.arange(n) + 0.5) / n,
        "suspicion": suspicion[order],
        "rank": np.arange(1, n + 1),
        "is_label_issue": np.arange(n) < flagged,
        "reason": [reason.format(-value) for value in suspicion[order]],
    }
    values = DetectionValues(
        by=name, flag="two-means", flagged=flagged, cut=float(suspicion[order][flagged - 1]), separation=2.5
    )
    found = Detection(name=name, table=pa.table(columns).cast(DETECTION), values=values)
    write_detection(run.directory, found)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """120 digits, every fifth label wrong, with a detection."""
    place: Path = tmp_path_factory.mktemp("reported") / "digits"
    arguments = {"label_noise": 0.2, "train_size": TRAIN, "test_size": TEST}
    run = serial(place, "digits", recipe_args=arguments, epochs=2)
    detect(run)
    return open_run(run.uri)


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """30 hostile texts, and a detection whose reasons are no better."""
    run = serial(tmp_path_factory.mktemp("hostile") / "run's <b>", Words())
    detect(run, reason="<script>window.hacked = 1</script> {:.2f}")
    return open_run(run.uri)

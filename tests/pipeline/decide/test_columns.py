"""Detections and decisions as columns of a datasets.Dataset."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pyarrow as pa
import pytest

datasets = pytest.importorskip("datasets")

from hydra_pipe.storage.errors import InputError
from hydra_pipe.storage.schemas import DECISION, DETECTION

from hydra_pipe import Decision, Detection, with_columns

DATA = datasets.Dataset.from_dict({"text": ["a", "b", "c"]})


def table(schema, rows):
    def filled(row):
        usual = {pa.string(): "", pa.bool_(): False}
        return {field.name: row.get(field.name, usual.get(field.type, 0)) for field in schema}

    return pa.Table.from_pylist([filled(row) for row in rows], schema=schema)


def detection(rows):
    return Detection(name="joint", table=table(DETECTION, rows), values=SimpleNamespace())


def test_a_detection_becomes_columns():
    rows = [
        {"train_index": 2, "suspicion": 0.9, "rank": 1, "is_label_issue": True, "suggested_label": 4},
        {"train_index": 0, "suspicion": 0.1, "rank": 2, "suggested_label": -1, "reason": "near b"},
    ]
    found = with_columns(DATA, detection(rows))
    assert found["text"] == ["a", "b", "c"]
    assert found["hydra_rank"] == [2, 0, 1]
    assert found["hydra_is_label_issue"] == [False, False, True]
    assert found["hydra_suggested_label"] == [-1, -1, 4]
    assert found["hydra_reason"] == ["near b", "", ""]
    assert math.isnan(found["hydra_suspicion"][1])
    assert DATA.column_names == ["text"]


def test_a_decision_becomes_columns():
    rows = [
        {"train_index": k, "action": a, "weight": w}
        for k, (a, w) in enumerate(zip("kdk", (1.5, 0, 1.5), strict=True))
    ]
    made = Decision(
        name="drop", folder="", table=table(DECISION, rows), weights=None, values=SimpleNamespace()
    )
    found = with_columns(DATA, made, prefix="")
    assert found["action"] == ["k", "d", "k"]
    assert found["weight"] == [1.5, 0.0, 1.5]
    with pytest.raises(InputError, match="3 training samples or more and the dataset has 2"):
        with_columns(DATA.select([0, 1]), made)


def test_another_dataset_is_refused():
    with pytest.raises(InputError, match="joint is of 6 training samples or more and the dataset has 3"):
        with_columns(DATA, detection([{"train_index": 5}]))
    with pytest.raises(InputError, match=r"the dataset is a list and must be a datasets\.Dataset"):
        with_columns([1, 2], detection([{"train_index": 0}]))

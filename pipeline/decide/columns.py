"""What was found of training samples, as columns of the dataset that they are of."""

from __future__ import annotations

from typing import Any

import numpy as np

from ...storage.errors import InputError
from ..reading.decisions import Decision
from ..reading.detections import Detection

DETECTED = {
    "suspicion": np.nan,
    "rank": 0,
    "is_label_issue": False,
    "suggested_label": -1,
    "reason": "",
}
DECIDED = {"action": "keep", "weight": 1.0, **DETECTED}
"""By column: what a sample has that is not in the table, because nothing judged it."""


def with_columns(dataset: Any, found: Detection | Decision, *, prefix: str = "hydra_") -> Any:
    """Return a ``datasets.Dataset`` with what ``detect`` or ``clean`` found, a row a training sample.

    ``dataset.filter(lambda row: row["hydra_action"] != "drop")`` is then what is to be kept.

    Args:
        dataset: The run's training dataset, in its order; anything with ``add_column`` and a length.
        found: What ``detect`` returned, or a decision (``Cleaned.decision``, ``load_decision``).
        prefix: Of the columns: ``suspicion`` (NaN: not judged), ``rank`` (1: most suspicious; 0: not judged),
            ``is_label_issue``, ``suggested_label`` (-1: none), ``reason``; of a decision also ``action`` and
            ``weight``.

    Raises:
        InputError: The dataset is of another length, or is no ``datasets.Dataset``.
    """
    if not hasattr(dataset, "add_column"):
        raise InputError(
            f"the dataset is a {type(dataset).__name__} and must be a datasets.Dataset; use found.table with others"
        )
    rows = found.table["train_index"].to_numpy()
    count, decided = len(dataset), isinstance(found, Decision)
    if (decided and count != len(rows)) or (len(rows) and rows.max() >= count):
        least = len(rows) if decided else int(rows.max()) + 1
        raise InputError(
            f"{found.name} is of {least:,} training samples or more and the dataset has {count:,}; give the run's "
            "training dataset, with the rows in its order"
        )
    for name, missing in (DECIDED if decided else DETECTED).items():
        values = [missing] * count
        for row, value in zip(rows.tolist(), found.table[name].to_pylist(), strict=True):
            values[row] = value
        dataset = dataset.add_column(f"{prefix}{name}", values)
    return dataset

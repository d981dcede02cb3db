"""A detection in a run, made by a rule of the test's own: what decisions are made from."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from hydra_pipe.pipeline.decide.detection import Detection, labels_digest, write_detection
from hydra_pipe.pipeline.reading.reader import Reader
from hydra_pipe.pipeline.reading.unit_values import DetectionValues


def put_detection(
    run: Reader,
    given: npt.ArrayLike,
    suspicion: npt.ArrayLike,
    *,
    name: str = "harm",
    tracked: npt.ArrayLike | None = None,
    suggested: npt.ArrayLike | None = None,
    flagged: int = 0,
    **values: Any,
) -> str:
    """Store a detection that judges ``tracked`` (all) samples by ``suspicion``; return its name."""
    given, suspicion = np.asarray(given), np.asarray(suspicion, dtype=float)
    index = np.arange(len(given)) if tracked is None else np.asarray(tracked)
    n = len(index)
    order = np.argsort(-suspicion, kind="stable")
    other = np.full(n, -1) if suggested is None else np.asarray(suggested)
    table = pa.table(
        {
            "by": [name] * n,
            "train_index": index[order].astype(np.int32),
            "given_label": given[index][order].astype(np.int16),
            "suggested_label": other[order].astype(np.int16),
            "score": np.arange(n) / max(1, n - 1),
            "suspicion": suspicion[order],
            "rank": np.arange(1, n + 1, dtype=np.int32),
            "is_label_issue": np.arange(n) < flagged,
            "reason": [f"suspicion {one:.2f}" for one in suspicion[order]],
        }
    )
    known = {"by": name, "labels_sha256": labels_digest(given[index]), "flag": "known", "flagged": flagged}
    write_detection(
        run.directory, Detection(name=name, table=table, values=DetectionValues(**{**known, **values}))
    )
    return name

"""The schema of every Parquet table that a run holds.

Integers count or point, and -1 stands for none; positive contributions are helpful.
"""

from __future__ import annotations

from typing import Literal

import pyarrow as pa

Kind = Literal["contributions", "samples", "interclass", "contributions_spread", "samples_spread"]
"""Tables of a method."""

CONTRIBUTIONS = pa.schema(
    [
        pa.field("train_index", pa.int32(), nullable=False),
        pa.field("test_index", pa.int32(), nullable=False),
        pa.field("train_label", pa.int16(), nullable=False),
        pa.field("test_label", pa.int16(), nullable=False),
        pa.field("contribution", pa.float32(), nullable=False),
    ]
)
"""One row a (training sample, test sample); labels -1 where there is none; positive = helpful."""

SAMPLES = pa.schema(
    [
        pa.field("train_index", pa.int32(), nullable=False),
        pa.field("label", pa.int16(), nullable=False),
        pa.field("visits", pa.int32(), nullable=False),
        pa.field("contribution", pa.float64(), nullable=False),
        pa.field("contribution_std", pa.float64(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
    ]
)
"""One row a training sample; ``contribution`` is the mean over the test samples (Eq. 7)."""

INTERCLASS = pa.schema(
    [
        pa.field("train_class", pa.int16(), nullable=False),
        pa.field("test_class", pa.int16(), nullable=False),
        pa.field("pairs", pa.int64(), nullable=False),
        pa.field("contribution", pa.float64(), nullable=False),
        pa.field("normalized", pa.float64(), nullable=False),
    ]
)
"""One row a pair of classes. ``contribution`` is the mean over its ``pairs`` (Eq. 23); ``normalized``
is that entry / sqrt(sum of its column * sum of its row), NaN where the product is not positive."""

CONTRIBUTIONS_SPREAD = pa.schema(
    [*list(CONTRIBUTIONS)[:-1], pa.field("contribution_spread", pa.float32(), nullable=False)]
)
"""Beside an average over seeds: the sample standard deviation of C(i, j) over them (divisor K - 1)."""

SAMPLES_SPREAD = pa.schema(
    [
        pa.field("train_index", pa.int32(), nullable=False),
        pa.field("label", pa.int16(), nullable=False),
        pa.field("contribution", pa.float64(), nullable=False),
        pa.field("contribution_spread", pa.float64(), nullable=False),
    ]
)
"""Likewise of C(i), beside its mean over the seeds."""

SCHEMAS: dict[Kind, pa.Schema] = {
    "contributions": CONTRIBUTIONS,
    "samples": SAMPLES,
    "interclass": INTERCLASS,
    "contributions_spread": CONTRIBUTIONS_SPREAD,
    "samples_spread": SAMPLES_SPREAD,
}

RETRAIN_LOSSES = pa.schema(
    [
        pa.field("unit", pa.string(), nullable=False),
        pa.field("test_index", pa.int32(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("correct", pa.int8(), nullable=False),
    ]
)
"""One row a (retraining, test sample); ``correct`` is 1, 0, or -1 where unknown."""

RETRAIN_WEIGHTS = pa.schema(
    [
        pa.field("unit", pa.string(), nullable=False),
        pa.field("train_index", pa.int32(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
    ]
)
"""The training samples whose weight a retraining changed, before any scaling; 0: removed."""

TRAINING_LOSS = pa.schema(
    [
        pa.field("unit", pa.string(), nullable=False),
        pa.field("train_index", pa.int32(), nullable=False),
        pa.field("final_loss", pa.float64(), nullable=False),
        pa.field("mean_loss", pa.float64(), nullable=False),
    ]
)
"""Of each tracked sample: its loss at w_T in eval mode, and the mean over its visits in training."""

LDS = pa.schema(
    [
        pa.field("fraction", pa.float64(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("test_index", pa.int32(), nullable=False),
        pa.field("test_label", pa.int16(), nullable=False),
        pa.field("lds", pa.float64(), nullable=False),
    ]
)
"""One row a (share kept, method, target); test_index -1 where that is no single test sample."""

TRIALS = pa.schema(
    [
        pa.field("kind", pa.string(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("fraction", pa.float64()),
        pa.field("size", pa.float64()),
        pa.field("ranking", pa.string()),
        pa.field("direction", pa.string()),
        pa.field("train_index", pa.int32()),
        pa.field("index", pa.int32()),
        pa.field("changed", pa.int32(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
        pa.field("accuracy", pa.float64()),
    ]
)
"""One row a question asked of a retraining; two questions may share a ``unit``."""

BY_EPOCH_SAMPLES = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("train_index", pa.int32(), nullable=False),
        pa.field("contribution", pa.float64(), nullable=False),
        pa.field("norm", pa.float64(), nullable=False),
    ]
)
"""One row a (epoch, form, tracked sample): C(i), and the norm of the hypergradient (NaN: has none)."""

BY_EPOCH_ERRORS = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("reference", pa.string(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("train_index", pa.int32(), nullable=False),
        pa.field("error", pa.float64(), nullable=False),
    ]
)
"""The norm of the difference of two forms' hypergradients."""

BY_EPOCH_CONTRIBUTIONS = pa.schema(
    [
        pa.field("epoch", pa.int32(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("train_index", pa.int32(), nullable=False),
        pa.field("test_index", pa.int32(), nullable=False),
        pa.field("contribution", pa.float32(), nullable=False),
    ]
)
"""C(i, j), sorted by (test_index, train_index) for each (epoch, form)."""

DETECTION = pa.schema(
    [
        pa.field("by", pa.string(), nullable=False),
        pa.field("train_index", pa.int32(), nullable=False),
        pa.field("given_label", pa.int16(), nullable=False),
        pa.field("suggested_label", pa.int16(), nullable=False),
        pa.field("score", pa.float64(), nullable=False),
        pa.field("suspicion", pa.float64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("is_label_issue", pa.bool_(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""One row a judged training sample, most suspicious first. ``score`` is in 0 .. 1, low = bad (cleanlab's label quality);
``suspicion`` is the same on the scale of what judged, high = bad; ``rank`` 1 is the most suspicious; ``is_label_issue``
says whether it was flagged. Labels are -1 where there is none."""

DECISION = pa.schema(
    [
        pa.field("train_index", pa.int32(), nullable=False),
        pa.field("source_index", pa.int64(), nullable=False),
        pa.field("given_label", pa.int16(), nullable=False),
        pa.field("suggested_label", pa.int16(), nullable=False),
        pa.field("suspicion", pa.float64(), nullable=False),
        pa.field("label_score", pa.float64(), nullable=False),
        pa.field("rank", pa.int32(), nullable=False),
        pa.field("is_label_issue", pa.bool_(), nullable=False),
        pa.field("action", pa.string(), nullable=False),
        pa.field("weight", pa.float64(), nullable=False),
        pa.field("method", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""One row a training sample, ascending. ``source_index`` is its place in the user's files, -1 where the dataset does not
say; ``action`` is keep, drop, relabel or downweight; ``weight`` has mean 1 over what is kept, 0: dropped; ``rank`` is 0
and ``suspicion`` NaN for samples that nothing judged."""

RETRAINED = pa.schema(
    [
        pa.field("arm", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("unit", pa.string(), nullable=False),
        pa.field("samples", pa.int32(), nullable=False),
        pa.field("accuracy", pa.float64(), nullable=False),
        pa.field("loss", pa.float64(), nullable=False),
    ]
)
"""One row a (arm, seed): on how many ``samples`` was trained, and accuracy (NaN where unknown) and mean loss after the last
epoch on the test samples that judge. Two arms that train on the same share a ``unit``."""

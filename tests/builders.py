"""A small, finished run on disk, made through the storage API without torch or ray.

The model is linear enough to be done by hand: sample i has the loss ||w - x_i||^2 / 2, so that its
gradient at w is w - x_i. Training is real SGD on it, with momentum and weight decay in one of two
parameter groups, and the hypergradients are those of Algorithm 1 without the Hessian: what readers
such as ``verify`` check about a run holds for this one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from hydra_pipe.storage import contributions as store
from hydra_pipe.storage.rows import RowStore
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.storage.trajectory import ParameterEntry, TrajectoryWriter
from hydra_pipe.workers.coefficients import Settings, coefficients

N, M, B, EPOCHS, CLASSES = 20, 6, 8, 3, 3
PARAMETERS = (
    ParameterEntry(name="layer.weight", shape=(3, 4), group=0, start=0),
    ParameterEntry(name="layer.bias", shape=(3,), group=1, start=12),
)
D = 15
SHARDS = ((0, 12), (12, 20))

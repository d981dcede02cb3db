"""A small, finished run on disk, made through the storage API without torch or ray.

Sample i has the loss ``||w - x_i||^2 / 2``, so that its gradient at w is ``w - x_i``. Training is
real SGD on it, with momentum and weight decay in one of two parameter groups, and the
hypergradients are those of Algorithm 1 without the Hessian: what readers such as ``verify`` check
about a run holds for this one. Files, units and values are those that the driver commits.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from hydra_pipe.storage import contributions as parquet
from hydra_pipe.storage import schemas
from hydra_pipe.storage.files import list_files
from hydra_pipe.storage.rows import RowStore
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.storage.trajectory import ParameterEntry, TrajectoryWriter
from hydra_pipe.workers.recursion.coefficients import Settings, coefficients

N, M, B, EPOCHS, CLASSES, D = 20, 6, 8, 3, 3, 15
"""Training samples, test samples, batch size, epochs, classes, parameters."""

CHUNK_ROWS = 4
SHARDS = ((0, 12), (12, 20))
STAGES = ("record", "test-gradients", "replay", "reduce")
NOISY = (np.array([3, 7]), np.array([2, 0]))
PARAMETERS = (
    ParameterEntry(name="layer.weight", shape=(3, 4), group=0, start=0),
    ParameterEntry(name="layer.bias", shape=(3,), group=1, start=12),
)

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class Built:
    """A run directory and the numbers that were put into it.

    Attributes:
        uri: Where it is.
        tracked: Train indices, (n,).
        tested: Test indices, (M,); not contiguous.
        contributions: C(i, j), (n, M) float32.
    """

    def __init__(self, path: Path, *, dtype: str = "float64", track: int = N, method: str = "hydra") -> None:
        self.directory = RunDirectory(str(path))
        self.uri = self.directory.uri
        self.dtype, self.method = dtype, method
        self.tracked: Integers = np.arange(track)
        self.tested: Integers = np.arange(M) * 2 + 1
        self.train_label: Integers = np.arange(N) % CLASSES
        self.test_label: Integers = np.arange(M) % CLASSES
        self._train()
        self.test_gradients = np.random.default_rng(2).normal(size=(M, D)).astype(dtype)
        exact = -(self.hypergradients @ self.test_gradients.T) / N
        self.exact: Floats = exact.astype(np.float64)
        self.contributions = exact.astype(np.float32)
        self.info: dict[str, Any] = {
            "format": 1,
            "spec": {"recipe": "digits", "recipe_args": {"noise": 0.1}, "epochs": EPOCHS, "shards": 2},
            "recipe": {"name": "digits", "class": "x:Digits", "arguments": {"noise": 0.1}},
            "n_train": N,
            "n_test": 2 * M,
            "n_tracked": track,
            "n_test_tracked": M,
            "dimension": D,
            "steps": len(self.batches),
            "method": method,
            "conservation": True,
            "layout": {"shards": len(SHARDS)},
            "methods": {method: {"state": "partial"}},
            "stages": {},
            "summary": {},
        }

    def _train(self) -> None:
        generator = np.random.default_rng(1)
        samples = generator.normal(size=(N, D))
        order = np.concatenate([generator.permutation(N) for _ in range(EPOCHS)]).reshape(EPOCHS, N)
        rows = [np.resize(epoch[i : i + B], B) for epoch in order for i in range(0, N, B)]
        self.batches = np.array(rows, dtype=np.int32)
        self.batches[2::3, N % B :] = -1
        steps = len(rows)
        self.settings = Settings(
            learning_rate=np.tile(np.linspace(0.1, 0.05, steps)[:, None], 2),
            momentum=np.tile([[0.9, 0.0]], (steps, 1)),
            weight_decay=np.tile([[0.01, 0.0]], (steps, 1)),
            dampening=np.zeros((steps, 2)),
            nesterov=np.zeros((steps, 2), dtype=bool),
        )
        group = np.repeat([0, 1], [12, 3])
        factor = coefficients(self.settings)[:, group]
        rate, inertia = self.settings.learning_rate[:, group], self.settings.momentum[:, group]
        decay = self.settings.weight_decay[:, group]
        weights, momentum = generator.normal(size=D), np.zeros(D)
        total = np.zeros((N, D))
        self.weights = [weights.astype(self.dtype)]
        for t, batch in enumerate(self.batches):
            batch = batch[batch >= 0]
            gradient = weights - samples[batch]
            total[batch] += factor[t] * (N / len(batch)) * gradient
            momentum = inertia[t] * momentum + gradient.mean(0) + decay[t] * weights
            weights = weights - rate[t] * momentum
            self.weights.append(weights.astype(self.dtype))
        self.hypergradients = total[self.tracked].astype(self.dtype)
        self.visits: Integers = np.bincount(self.batches[self.batches >= 0], minlength=N)[self.tracked]

    def build(self, upto: str = "reduce") -> Built:
        """Write the stages up to ``upto``, as the driver would, and return this."""
        for stage in STAGES[: STAGES.index(upto) + 1]:
            getattr(self, f"_{stage.replace('-', '_')}")()
        if upto == "reduce":
            self.info["methods"][self.method]["state"] = "complete"
            self.info["summary"] = {
                "train_accuracy": 0.9875,
                "test_accuracy": 0.91,
                "peak_bytes": 612 << 20,
                "predicted_bytes": 700 << 20,
            }
        self.directory.update(lambda _: self.info)
        return self

    def _note(self, stage: str, units: int, seconds: float) -> None:
        self.info["stages"][stage] = {"units": units, "seconds": seconds}

    def _record(self) -> None:
        steps = len(self.batches)
        kept = [0, 4, steps]
        uri = self.directory.path("trajectory.zarr")
        writer = TrajectoryWriter(
            uri,
            dimension=D,
            dtype=self.dtype,
            checkpoint_steps=kept,
            buffer_bytes=0,
            parameter_count=len(PARAMETERS),
        )
        for k, step in enumerate(kept):
            held = np.array([step > 0, False])
            writer.write_checkpoint(k, step, self.weights[step], np.zeros(D, self.dtype), held, b"")
        crc = [zlib.crc32(self.weights[step].tobytes()) for step in kept]
        unknown = np.full(EPOCHS, np.nan)
        writer.finish(
            batches=self.batches,
            learning_rate=self.settings.learning_rate,
            momentum=self.settings.momentum,
            weight_decay=self.settings.weight_decay,
            dampening=self.settings.dampening,
            nesterov=self.settings.nesterov,
            coefficient=coefficients(self.settings),
            loss=np.linspace(2, 1, steps),
            digest_step=np.array(kept, dtype=np.int64),
            digest=np.array(crc, dtype=np.uint32),
            epoch_digest=["0" * 64] * EPOCHS,
            parameters=PARAMETERS,
            epochs={
                "train_loss": np.linspace(2, 1, EPOCHS),
                "train_accuracy": np.linspace(0.5, 0.9, EPOCHS),
                "validation_loss": unknown,
                "validation_accuracy": unknown,
                "test_loss": unknown,
                "test_accuracy": unknown,
            },
            noisy=NOISY,
            attrs={"n_train": N, "batch_size": B, "seed": 0, "epochs": EPOCHS, "steps_per_epoch": 3},
        )
        files = [f"trajectory.zarr/{name}" for name in list_files(uri)]
        self.directory.commit("record", "trajectory", files, {"steps": steps, "seconds": 1.25})
        self._note("record", 1, 1.5)

    def _test_gradients(self) -> None:
        name = "test_gradients.zarr"
        store = RowStore.create(
            self.directory.path(name),
            name="gradient",
            rows=M,
            columns=D,
            dtype=self.dtype,
            chunk_rows=CHUNK_ROWS,
            dimensions=("test_index", "parameter"),
            row_columns={
                "test_index": self.tested.astype(np.int32),
                "loss": np.linspace(0, 1, M),
                "label": self.test_label.astype(np.int16),
                "prediction": self.test_label.astype(np.int16),
            },
            attrs={"n_test": 2 * M},
        )
        store.write(0, self.test_gradients)
        files = [f"{name}/{file}" for file in store.files(0, M)]
        values = {"rows": M, "start": 0, "seconds": 0.25, "peak_bytes": 500 << 20}
        self.directory.commit("test-gradients", "block-00000", files, values)
        self._index("test-gradients", name, store)
        self._note("test-gradients", 2, 0.5)

    def _replay(self) -> None:
        name, stage = f"hypergradients/method={self.method}.zarr", f"{self.method}/replay"
        store = RowStore.create(
            self.directory.path(*name.split("/")),
            name="hypergradient",
            rows=len(self.tracked),
            columns=D,
            dtype=self.dtype,
            chunk_rows=CHUNK_ROWS,
            dimensions=("train_index", "parameter"),
            row_columns={"train_index": self.tracked.astype(np.int32)},
            attrs={"n_train": N, "method": self.method},
        )
        self._index(stage, name, store)
        for k, (start, stop) in enumerate(self._shards()):
            store.write(start, self.hypergradients[start:stop])
            files = [f"{name}/{file}" for file in store.files(start, stop)]
            values = {"rows": stop - start, "start": start, "seconds": 2.0, "peak_bytes": 600 << 20}
            self.directory.commit(stage, f"shard-{k:05d}", files, values)
        self._note(stage, len(self._shards()) + 1, 3.0)

    def _reduce(self) -> None:
        stage = f"{self.method}/reduce"
        for k, (start, stop) in enumerate(self._shards()):
            rows = slice(start, stop)
            tile = f"contributions/method={self.method}/part-{k:05d}-00000.parquet"
            samples = f"samples/method={self.method}/part-{k:05d}.parquet"
            parquet.write_tile(
                self.directory.path(*tile.split("/")),
                train_index=self.tracked[rows],
                test_index=self.tested,
                train_label=self.train_label[self.tracked[rows]],
                test_label=self.test_label,
                contribution=self.contributions[rows],
            )
            table = pa.table(
                {
                    "train_index": self.tracked[rows],
                    "label": self.train_label[self.tracked[rows]],
                    "visits": self.visits[rows],
                    "contribution": self.exact[rows].mean(1),
                    "contribution_std": self.exact[rows].std(1),
                    "shard": np.full(stop - start, k),
                }
            )
            parquet.write_table(
                self.directory.path(*samples.split("/")), table.cast(schemas.SAMPLES), schemas.SAMPLES
            )
            self.directory.commit(stage, f"rows-{k:05d}", [tile, samples], {"rows": stop - start})
        self._interclass(stage)
        self._note(stage, len(self._shards()) + 1, 0.75)

    def _interclass(self, stage: str) -> None:
        pairs = [(a, b) for a in np.unique(self.train_label) for b in np.unique(self.test_label)]
        chosen = [
            self.exact[np.ix_(self.train_label[self.tracked] == a, self.test_label == b)] for a, b in pairs
        ]
        table = pa.table(
            {
                "train_class": [a for a, _ in pairs],
                "test_class": [b for _, b in pairs],
                "pairs": [block.size for block in chosen],
                "contribution": [float(block.mean()) for block in chosen],
                "normalized": [float("nan")] * len(pairs),
            }
        )
        file = f"interclass/method={self.method}/part-00000.parquet"
        parquet.write_table(
            self.directory.path(*file.split("/")), table.cast(schemas.INTERCLASS), schemas.INTERCLASS
        )
        self.directory.commit(stage, "interclass", [file], {})

    def _shards(self) -> list[tuple[int, int]]:
        total = len(self.tracked)
        return [(start, min(stop, total)) for start, stop in SHARDS if start < total]

    def _index(self, stage: str, name: str, store: RowStore) -> None:
        files = [f"{name}/{file}" for file in store.metadata_files()]
        self.directory.commit(stage, "index", files, {})

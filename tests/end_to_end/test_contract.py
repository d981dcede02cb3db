"""One small run against the contract: what lies where, of which type, and every number rebuilt by hand."""

from __future__ import annotations

import copy
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import zarr
from hydra_pipe.pipeline.opened_run import Run

from tests import oracle
from tests.end_to_end.support import METHOD, serial
from tests.recipes import Small, TwoGroups

N, M, B, EPOCHS, STEPS, CLASSES = 45, 12, 8, 3, 18, 3
TRACKED = [0, 3, 4, 8, 17, 30, 43, 44]
TESTED = [1, 2, 5, 6, 11]
G, D = 2, 6 * 5 + 5 + 4 + 16 + 4 + 12 + 3  # the weight 5 x 4 is frozen

SAMPLES = {
    "train_index": pa.int32(),
    "label": pa.int16(),
    "visits": pa.int32(),
    "contribution": pa.float64(),
    "contribution_std": pa.float64(),
    "shard": pa.int32(),
}
CONTRIBUTIONS = {
    "train_index": pa.int32(),
    "test_index": pa.int32(),
    "train_label": pa.int16(),
    "test_label": pa.int16(),
    "contribution": pa.float32(),
}


@pytest.fixture(scope="module", params=["float64", "float32"])
def finished(request: Any, tmp_path_factory: Any) -> Run:
    """Eight tracked and five test samples of a recipe with two groups, a frozen and a forgotten weight."""
    out = tmp_path_factory.mktemp("contract") / "run"
    return serial(out, TwoGroups(), dtype=request.param, track=TRACKED, test=TESTED, shards=3)


@pytest.fixture(scope="module")
def right(finished: Run) -> dict[str, np.ndarray]:
    """What the oracle says about the same run, in float64."""
    found = oracle.dense(TwoGroups(), finished.trajectory(), TRACKED)
    gradients = oracle.test_gradients(TwoGroups(), copy.deepcopy(found.model), TESTED)
    return {
        "hypergradient": found.hypergradient,
        "weights": found.weights,
        "loss": found.loss,
        "gradient": gradients,
        "contribution": oracle.contributions(found.hypergradient, gradients, N),
    }


def dtype_of(finished: Run) -> str:
    return str(finished.info["spec"]["dtype"])


def table(finished: Run, kind: str) -> pa.Table:
    paths = sorted(Path(finished.uri, kind, METHOD).iterdir())
    assert paths
    assert all(path.name.startswith("part-") and path.suffix == ".parquet" for path in paths)
    # Each file read alone: the partition column is no part of them.
    return pa.concat_tables([pq.ParquetFile(path).read() for path in paths])


def matrix(finished: Run) -> np.ndarray:
    """Contributions as (n, M), placed by the indices in the rows."""
    rows = table(finished, "contributions").to_pylist()
    assert len(rows) == len(TRACKED) * len(TESTED)
    found = np.full((len(TRACKED), len(TESTED)), np.nan)
    for row in rows:
        found[TRACKED.index(row["train_index"]), TESTED.index(row["test_index"])] = row["contribution"]
    assert np.isfinite(found).all()
    return found


# ---------------------------------------------------------------------- section 4: what lies where


def test_trajectory_arrays_have_their_names_shapes_and_types(finished):
    group = zarr.open_group(str(Path(finished.uri, "trajectory.zarr")), mode="r")
    own = dtype_of(finished)
    kept = len(finished.trajectory().checkpoint_steps)
    expected = {
        "batches": ((STEPS, B), "int32"),
        "learning_rate": ((STEPS, G), "float64"),
        "momentum": ((STEPS, G), "float64"),
        "weight_decay": ((STEPS, G), "float64"),
        "dampening": ((STEPS, G), "float64"),
        "nesterov": ((STEPS, G), "bool"),
        "coefficient": ((STEPS, G), "float64"),
        "loss": ((STEPS,), "float64"),
        "checkpoint/weights": ((kept, D), own),
        "checkpoint/momentum": ((kept, D), own),
        "checkpoint/has_momentum": ((kept, 7), "bool"),
        "checkpoint/step": ((kept,), "int64"),
        "checkpoint/buffers": ((kept, 0), "uint8"),
    }
    for name, (shape, dtype) in expected.items():
        assert (group[name].shape, str(group[name].dtype)) == (shape, dtype), name
    assert str(group["digest"].dtype) == "uint32"
    assert group["digest"].shape == group["digest_step"].shape
    steps = group["checkpoint/step"][:]
    assert (steps[0], steps[-1]) == (0, STEPS)
    assert (np.diff(steps) > 0).all()


def test_batches_are_permutations_padded_with_minus_one(finished):
    batches = finished.trajectory().batches
    for epoch in batches.reshape(EPOCHS, -1, B):
        assert sorted(epoch[epoch >= 0].tolist()) == list(range(N))
        assert epoch[-1].tolist()[N % B :] == [-1] * (B - N % B)
        assert (epoch[:-1] >= 0).all()


def test_attributes_name_the_parameters_in_flattening_order(finished):
    trajectory = finished.trajectory()
    model = TwoGroups().model()
    named = [(name, tuple(p.shape)) for name, p in model.named_parameters() if p.requires_grad]
    assert [(e.name, e.shape) for e in trajectory.parameters] == named
    sizes = [int(np.prod(shape)) for _, shape in named]
    assert [e.start for e in trajectory.parameters] == np.cumsum([0, *sizes[:-1]]).tolist()
    assert sum(sizes) == D == finished.info["dimension"]
    groups = {e.name: e.group for e in trajectory.parameters}
    assert groups == {
        "0.weight": 0,
        "0.bias": 1,
        "2.bias": 1,
        "4.weight": -1,
        "4.bias": 1,
        "5.weight": 0,
        "5.bias": 1,
    }


def test_checkpoint_zero_is_the_initial_weights_row_major(finished):
    torch.manual_seed(TwoGroups.seed)
    model = TwoGroups().model().to(getattr(torch, dtype_of(finished)))
    first = finished.trajectory().checkpoint(0)
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters() if p.requires_grad]).numpy()
    assert np.array_equal(first.weights, flat)
    assert not first.has_momentum.any()


def test_digests_are_the_crc32_of_the_checkpoints(finished):
    trajectory = finished.trajectory()
    digest = dict(zip(trajectory.digest_step.tolist(), trajectory.digest.tolist(), strict=True))
    both = [k for k, step in enumerate(trajectory.checkpoint_steps.tolist()) if step in digest]
    assert {0, STEPS} <= {int(trajectory.checkpoint_steps[k]) for k in both}
    for k in both:
        found = trajectory.checkpoint(k)
        assert zlib.crc32(found.weights.tobytes()) == digest[found.step]
    assert len(trajectory.epoch_digest) == EPOCHS


def test_hypergradients_and_test_gradients_have_their_columns(finished):
    own = dtype_of(finished)
    store = zarr.open_group(str(Path(finished.uri, "hypergradients", f"{METHOD}.zarr")), mode="r")
    assert (store["hypergradient"].shape, str(store["hypergradient"].dtype)) == ((len(TRACKED), D), own)
    assert store["train_index"][:].tolist() == TRACKED
    assert str(store["train_index"].dtype) == "int32"
    store = zarr.open_group(str(Path(finished.uri, "test_gradients.zarr")), mode="r")
    assert (store["gradient"].shape, str(store["gradient"].dtype)) == ((len(TESTED), D), own)
    assert store["test_index"][:].tolist() == TESTED
    types = {name: str(store[name].dtype) for name in ("test_index", "loss", "label", "prediction")}
    assert types == {"test_index": "int32", "loss": "float64", "label": "int16", "prediction": "int16"}


def test_parquet_files_have_exactly_the_columns_of_the_contract(finished):
    for kind, schema in (("contributions", CONTRIBUTIONS), ("samples", SAMPLES)):
        found = table(finished, kind)
        assert {field.name: field.type for field in found.schema} == schema, kind
        assert found.column_names == list(schema)
        assert all(column.null_count == 0 for column in found.columns)
    assert {"train_class", "test_class"} < set(table(finished, "interclass").column_names)
    names = {path.name for path in Path(finished.uri).iterdir()}
    assert names == {
        "run.json",
        "log.jsonl",
        "manifests",
        "trajectory.zarr",
        "hypergradients",
        "test_gradients.zarr",
        "contributions",
        "samples",
        "interclass",
    }
    assert not list(Path(finished.uri).rglob("*.partial*"))


def test_rows_are_sorted_by_test_then_train_index(finished):
    found = table(finished, "contributions")
    keys = list(zip(found["test_index"].to_pylist(), found["train_index"].to_pylist(), strict=True))
    assert keys == [(j, i) for j in TESTED for i in TRACKED]


def test_run_json_says_what_was_run(finished):
    info = json.loads(Path(finished.uri, "run.json").read_text())
    assert (info["n_train"], info["n_test"], info["dimension"], info["steps"]) == (N, M, D, STEPS)
    assert (info["n_tracked"], info["n_test_tracked"]) == (len(TRACKED), len(TESTED))
    assert list(info["methods"]) == ["hydra"]
    assert info["methods"]["hydra"]["state"] == "complete"
    assert info["versions"]["torch"] == torch.__version__
    assert info["environment"]["device"] == "cpu"
    assert info["recipe"]["epochs"] == EPOCHS


# ---------------------------------------------------------------------- section 5: the numbers


def limit(finished: Run) -> float:
    return oracle.DENSE_FLOAT64 if dtype_of(finished) == "float64" else oracle.DENSE_FLOAT32


def test_hypergradients_are_those_of_dense_algorithm_1(finished, right):
    assert oracle.relative_error(finished.hypergradients()[:], right["hypergradient"]) <= limit(finished)


def test_weights_losses_and_test_gradients_are_those_of_the_oracle(finished, right):
    trajectory = finished.trajectory()
    scale = 1 if dtype_of(finished) == "float64" else 1e6
    assert np.abs(trajectory.loss - right["loss"]).max() <= 1e-12 * scale
    assert np.abs(trajectory.checkpoint(-1).weights - right["weights"]).max() <= 1e-12 * scale
    store = finished.test_gradients()
    assert oracle.relative_error(store.read(0, len(TESTED)), right["gradient"]) <= limit(finished)


def test_contributions_are_those_of_the_oracle(finished, right):
    # The column is float32, whatever computed it.
    allowed = 1e-6 if dtype_of(finished) == "float64" else 1e-4
    found = matrix(finished)
    assert np.abs(found - right["contribution"]).max() <= allowed * np.abs(right["contribution"]).max()
    assert np.array_equal(np.sign(found), np.sign(right["contribution"]))


def test_contributions_can_be_rebuilt_from_the_stores(finished):
    hypergradients = finished.hypergradients()[:].astype(np.float64)
    gradients = finished.test_gradients().read(0, len(TESTED)).astype(np.float64)
    rebuilt = -(hypergradients @ gradients.T) / N
    allowed = 1e-7 if dtype_of(finished) == "float64" else 1e-5
    assert np.abs(matrix(finished) - rebuilt).max() <= allowed * np.abs(rebuilt).max()


def test_the_coefficients_give_the_hypergradients_from_plain_gradients(finished):
    """The record alone is enough: sum over steps of c_t N / B_t times the sample's gradient."""
    trajectory = finished.trajectory()
    torch.manual_seed(TwoGroups.seed)  # for the frozen weight, which is no part of the vector
    model = TwoGroups().model().double()
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = np.repeat([e.group for e in trajectory.parameters], [p.numel() for p in parameters])
    coefficient = np.where(groups < 0, 0, trajectory.coefficient[:, groups])
    x, y = TwoGroups().train_dataset().tensors
    sample = TRACKED[4]
    total = np.zeros(D)
    kept = dict(zip(trajectory.checkpoint_steps.tolist(), range(STEPS + 1), strict=False))
    for step, row in enumerate(trajectory.batches):
        if sample not in row:
            continue
        weights = torch.from_numpy(trajectory.checkpoint(kept[step]).weights).double()
        torch.nn.utils.vector_to_parameters(weights, parameters)
        loss = torch.nn.functional.cross_entropy(
            model(x[sample : sample + 1].double()), y[sample : sample + 1]
        )
        flat = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]).numpy()
        total += coefficient[step] * (N / (row >= 0).sum()) * flat
    found = finished.hypergradients()[TRACKED.index(sample)]
    assert np.linalg.norm(found - total) <= limit(finished) * np.linalg.norm(total)


def test_labels_losses_and_predictions_are_the_samples_own(finished):
    train, test = TwoGroups().train_dataset().tensors, TwoGroups().test_dataset().tensors
    for row in table(finished, "contributions").to_pylist():
        assert row["train_label"] == train[1][row["train_index"]]
        assert row["test_label"] == test[1][row["test_index"]]
    store = finished.test_gradients()
    torch.manual_seed(TwoGroups.seed)  # for the frozen weight, which is no part of the vector
    model = TwoGroups().model().double()
    weights = torch.from_numpy(finished.trajectory().checkpoint(-1).weights).double()
    torch.nn.utils.vector_to_parameters(weights, [p for p in model.parameters() if p.requires_grad])
    with torch.no_grad():
        output = model(test[0][TESTED].double())
        losses = torch.nn.functional.cross_entropy(output, test[1][TESTED], reduction="none")
    assert store.column("prediction").tolist() == output.argmax(1).tolist()
    assert store.column("label").tolist() == test[1][TESTED].tolist()
    assert store.column("loss") == pytest.approx(losses.numpy(), rel=1e-5)


def test_samples_hold_mean_population_deviation_and_visits(finished):
    found, rows = matrix(finished), table(finished, "samples").sort_by("train_index").to_pylist()
    assert [row["train_index"] for row in rows] == TRACKED
    means = [float(np.mean(block)) for block in found]  # Eq. 7: over the test samples
    deviations = [float(np.sqrt(np.mean((block - np.mean(block)) ** 2))) for block in found]
    size = np.abs(found).max()
    assert [row["contribution"] for row in rows] == pytest.approx(means, abs=1e-6 * size)
    assert [row["contribution_std"] for row in rows] == pytest.approx(deviations, abs=1e-6 * size)
    batches = finished.trajectory().batches
    assert [row["visits"] for row in rows] == [int((batches == i).sum()) for i in TRACKED] == [3] * 8
    labels = TwoGroups().train_dataset().tensors[1]
    assert [row["label"] for row in rows] == labels[TRACKED].tolist()
    # Shards are contiguous blocks of whole chunks, three of them.
    assert [row["shard"] for row in rows] == sorted(row["shard"] for row in rows)
    assert {row["shard"] for row in rows} == {0, 1, 2}


def test_interclass_is_the_mean_of_each_block_and_its_normal_form(finished):
    found = matrix(finished)
    train = TwoGroups().train_dataset().tensors[1][TRACKED].numpy()
    test = TwoGroups().test_dataset().tensors[1][TESTED].numpy()
    classes = sorted(set(train.tolist())), sorted(set(test.tolist()))
    means = np.array([[found[np.ix_(train == a, test == b)].mean() for b in classes[1]] for a in classes[0]])
    rows = {(r["train_class"], r["test_class"]): r for r in table(finished, "interclass").to_pylist()}
    assert set(rows) == {(a, b) for a in classes[0] for b in classes[1]}
    size = np.abs(means).max()
    for p, a in enumerate(classes[0]):
        for q, b in enumerate(classes[1]):
            row = rows[a, b]
            assert row["pairs"] == (train == a).sum() * (test == b).sum()
            assert row["contribution"] == pytest.approx(means[p, q], abs=1e-5 * size)
            product = means[p].sum() * means[:, q].sum()
            if product > 0:
                assert row["normalized"] == pytest.approx(means[p, q] / np.sqrt(product), rel=1e-3, abs=1e-4)
            else:
                assert np.isnan(row["normalized"])


def test_a_positive_contribution_is_a_helpful_sample(tmp_path):
    """Two runs with a sample's loss weighed up and down: the slope of the test loss is -C(i, j)."""
    step, chosen = 1e-4, [2, 9, 30]
    recipe = Short()
    finished = serial(tmp_path / "run", recipe, dtype="float64", track=chosen)
    found = (
        finished.contributions()
        .to_table()
        .to_pandas()
        .pivot_table(index="train_index", columns="test_index", values="contribution")
    )
    for i in chosen:
        up, down = (trained_losses(recipe, finished, i, sign * step) for sign in (1, -1))
        # The loss of sample i is weighed by 1 + eps, with eps 0 in the run and -1 when it is left out.
        slope = (up - down) / (2 * step) / N
        measured = -slope
        mine = found.loc[i].to_numpy()
        big = np.abs(measured) > 0.3 * np.abs(measured).max()
        assert np.array_equal(np.sign(mine[big]), np.sign(measured[big]))
        assert np.corrcoef(mine, measured)[0, 1] > 0.99


class Short(Small):
    """So little training that the Hessian which Algorithm 1 drops hardly matters."""

    epochs = 1

    def optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.5)


def trained_losses(recipe: Short, finished: Run, sample: int, eps: float) -> np.ndarray:
    """Train along the recorded batches with the sample's loss times 1 + N eps; return test losses."""
    trajectory = finished.trajectory()
    model = recipe.model().double()
    start = torch.from_numpy(trajectory.checkpoint(0).weights)
    torch.nn.utils.vector_to_parameters(start, model.parameters())
    optimizer = recipe.optimizer(model)
    x, y = recipe.train_dataset().tensors
    for row in trajectory.batches:
        members = torch.from_numpy(row[row >= 0]).long()
        weights = torch.where(members == sample, 1 + N * eps, 1.0).double()
        losses = recipe.losses(model, (x[members].double(), y[members]))
        optimizer.zero_grad()
        (losses * weights).mean().backward()
        optimizer.step()
    x, y = recipe.test_dataset().tensors
    with torch.no_grad():
        return recipe.losses(model, (x.double(), y)).numpy()

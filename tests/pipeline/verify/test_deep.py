"""verify --deep: sound runs pass, one wrong number that every digest vouches for does not."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from hydra_pipe.cli import main
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.executors.events import Note, UnitProgress
from hydra_pipe.pipeline.verify.deep import verify_deep
from hydra_pipe.pipeline.verify.deep_checks import Findings, spread
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage import contributions as parquet
from hydra_pipe.storage.errors import IncompleteStage, InputError, ReplayDiverged, SpecError, SpecMismatch
from hydra_pipe.storage.rows import RowStore
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.workers.reference import tolerances
from torch.utils.data import TensorDataset

from hydra_pipe import Run, RunSpec, open_run, run
from tests.forging import vouch
from tests.recipes import Augmented, BatchNormed, Images, Small
from tests.workers.replay.test_optimisers import Stepped


def spec(recipe, out, **changes):
    values = {"executor": "serial", "device": "cpu", "dtype": "float64", "shards": 3, **changes}
    return RunSpec(recipe=recipe, out=str(out), **values)


def make(recipe, out, **changes):
    """Forward with every form of the Hessian, in one run."""
    run(spec(recipe, out, **changes))
    run(spec(recipe, out, hessian="exact", **changes))
    return run(spec(recipe, out, hessian="ekfac", exact_rank=3, **changes))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("deep") / "run"
    make(Small(), out)
    attribute(str(out), {"tracin": {}}, Small(), executor="serial")
    return out


@pytest.fixture(scope="module")
def sound(made):
    """What is found of it, and what was heard meanwhile."""
    heard = []
    return verify_deep(open_run(made), Small(), observer=heard.append), heard


@pytest.fixture
def place(made, tmp_path):
    return shutil.copytree(made, tmp_path / "run")


def by_name(found):
    return {(check.method, check.check): check for check in found.checks}


DIFFERENCED = "double backward and differences of the gradient"


def test_every_method_of_a_run_is_covered_or_named(sound):
    found, heard = sound
    assert found.ok, found.problems
    checks = by_name(found)
    for method in ("hydra", "hydra-ekfac", "hydra-exact"):
        assert checks[method, "hypergradients"].values == 3 * checks["all", "test gradients"].values // 4
        assert checks[method, "contributions in Parquet"].values == 12
    assert checks["hydra-exact", "forward = adjoint"].values == 6
    assert checks["hydra-ekfac-rank3", "corrections"].values == 9
    assert checks["hydra-ekfac-rank3", "contributions in Parquet"].values == 12
    assert checks["hydra", "hypergradients"].limit == 1e-12
    assert checks["hydra-exact", "hypergradients"].limit == 1e-9
    assert [note for note in found.notes if note.startswith("tracin: not covered")]
    rough = ("contributions in Parquet", DIFFERENCED)
    assert max(c.deviation for c in found.checks if c.check not in rough) < 1e-13
    assert checks["hydra-exact", DIFFERENCED].deviation < 1e-6
    cost = next(event.message for event in heard if isinstance(event, Note))
    assert "3 training samples; 18 training steps again" in cost
    assert "54 at most" in cost
    assert 0 < found.products <= 54
    stages = {event.stage for event in heard if isinstance(event, UnitProgress)}
    assert stages == {"verify/reference", "verify/adjoint"}


@pytest.mark.parametrize(("kind", "dtype"), [(Images, "float32"), (BatchNormed, "float64")])
def test_adjoint_mode_dropout_and_batch_statistics(kind, dtype, tmp_path):
    for hessian in ("none", "exact", "ekfac"):
        fields = {"mode": "adjoint", "hessian": hessian, "dtype": dtype, "track": "0:30", "shards": 2}
        run(spec(kind(), tmp_path / "r", **fields))
    found = verify_deep(open_run(tmp_path / "r"), kind(), rows=5)
    assert found.ok, found.problems
    names = {check.method for check in found.checks if check.check == "contributions (adjoint = forward)"}
    assert names == {"hydra", "hydra-exact", "hydra-ekfac"}
    assert len(found.train_index) == 5
    assert max(found.train_index) < 30
    for check in found.checks:
        if check.check != DIFFERENCED:
            assert check.limit <= (1e-3 if dtype == "float32" else 1e-6)


def test_coupled_statistics_are_those_of_the_run(tmp_path):
    done = run(spec(BatchNormed(), tmp_path / "r", batch_norm="coupled"))
    assert verify_deep(done, BatchNormed()).ok
    identity = {**done.info["identity"], "batch_norm": "constant"}
    found = verify_deep(Run(done.directory, {**done.info, "identity": identity}), BatchNormed())
    assert not by_name(found)["hydra", "hypergradients"].ok


def rewrite_row(place, base, name, row):
    """Change one row by 1% and make every checksum and digest vouch for it."""
    directory = RunDirectory(str(place))
    store = RowStore.open(directory.path(*base.split("/")), name)
    first = row // store.chunk_rows * store.chunk_rows
    last = min(first + store.chunk_rows, store.rows)
    block = store.read(first, last)
    block[row - first] *= 1.01
    store.write(first, block)
    vouch(place)


@pytest.mark.parametrize("method", ["hydra-exact", "hydra-ekfac"])
def test_one_wrong_row_that_every_digest_vouches_for_is_caught(place, sound, method):
    row = sound[0].train_index[1]
    rewrite_row(place, f"hypergradients/method={method}.zarr", "hypergradient", row)
    opened = open_run(place)
    assert verify(opened).ok  # that is what the reference is for
    found = verify_deep(opened, Small())
    wrong = {key: check for key, check in by_name(found).items() if not check.ok}
    assert set(wrong) == {(method, "hypergradients"), (method, "contributions in Parquet")}
    assert wrong[method, "hypergradients"].where == f"train_index {row}"
    assert 1e-4 < wrong[method, "hypergradients"].deviation < 0.011
    assert f"{method}: hypergradients differ by" in found.problems[0]


def test_a_wrong_test_gradient_is_caught(place, sound):
    columns = sound[0].test_index
    rewrite_row(place, "test_gradients.zarr", "gradient", columns[1])
    found = by_name(verify_deep(open_run(place), Small()))
    assert found["all", "test gradients"].where == f"test_index {columns[1]}"
    assert not found["all", "test gradients"].ok
    assert found["hydra", "hypergradients"].ok


def test_a_wrong_contribution_is_caught(made, sound, monkeypatch):
    """In the table only: the stores are right."""
    train, test = sound[0].train_index[0], sound[0].test_index[2]
    opened = open_run(made)
    table = opened.contributions("hydra").to_table()
    values = table["contribution"].to_numpy().copy()
    at = (table["train_index"].to_numpy() == train) & (table["test_index"].to_numpy() == test)
    values[at] += 1e-3 * np.abs(values).max()
    columns = {name: table[name] for name in table.column_names if name != "method"}
    changed = parquet.pa.table({**columns, "contribution": values.astype(np.float32)})
    monkeypatch.setattr(opened, "contributions", lambda method=None: parquet.pa.dataset.dataset(changed))
    checks = by_name(verify_deep(opened, Small()))
    assert checks["hydra", "contributions in Parquet"].where == f"train_index {train}, test_index {test}"
    assert not checks["hydra", "contributions in Parquet"].ok


def test_what_cannot_be_verified_is_said(made, tmp_path):
    with pytest.raises(InputError, match="name it yourself: hydra-pipe verify --deep"):
        verify_deep(open_run(made))
    with pytest.raises(SpecError, match="rows 0: must be at least 1"):
        verify_deep(open_run(made), Small(), rows=0)
    with pytest.raises(SpecMismatch, match="what differs: training samples"):
        verify_deep(open_run(made), Augmented())
    newer = open_run(made)
    info = {key: value for key, value in newer.info.items() if key != "made_of"}
    with pytest.raises(ReplayDiverged):  # a run of an earlier version: replaying tells
        verify_deep(Run(newer.directory, info), Augmented())
    part = run(spec(Small(), tmp_path / "part"), stages=["record"])
    with pytest.raises(IncompleteStage, match="no complete method"):
        verify_deep(part, Small())


def test_samples_come_from_different_shards():
    for seed in range(20):
        found = spread([(0, 10), (10, 20), (20, 21)], 3, np.random.default_rng(seed))
        assert [position // 10 for position in found] == [0, 1, 2]
        assert sorted(spread([(0, 3)], 5, np.random.default_rng(seed))) == [0, 1, 2]


def test_what_is_not_a_number_fails():
    found = Findings("float64", np.array([7]), np.array([3]))
    for value in (np.nan, np.inf):
        stored = np.array([[value]])
        found.numbers("m", "c", stored, np.ones((1, 1)), tolerances.STORED, found.pair)
    found.numbers("m", "c", np.zeros((1, 1)), np.zeros((1, 1)), tolerances.STORED, found.pair)
    found.numbers("m", "c", np.ones((1, 1)), np.zeros((1, 1)), tolerances.STORED, found.pair)
    assert [check.ok for check in found.checks] == [False, False, True, False]
    assert found.checks[0].where == "train_index 7, test_index 3"


def test_the_promised_tolerances():
    """The contract's numbers; loosening one must be a decision."""
    assert tolerances.FORM["none"] == {"float64": 1e-12, "float32": 1e-4}
    assert tolerances.FORM["exact"] == {"float64": 1e-9, "float32": 1e-3}


def test_the_command(tmp_path):
    place = tmp_path / "digits"
    sizes = {"train_size": 120, "test_size": 20}
    run(spec("digits", place, recipe_args=sizes, dtype="float32", track="6", test="6", epochs=1))
    runner = CliRunner()
    done = runner.invoke(main, ["verify", str(place), "--deep", "--rows", "2", "--rows-seed", "1"])
    assert done.exit_code == 0, done.output
    assert "computed again in float64: training samples" in done.stdout
    assert "verify --deep: 2 training samples" in done.stderr
    rewrite_row(place, "hypergradients/method=hydra.zarr", "hypergradient", 2)
    done = runner.invoke(main, ["verify", "--deep", str(place), "--rows", "6", "--format", "json", "-q"])
    assert done.exit_code == 1
    document = json.loads(done.stdout)
    assert (document["ok"], document["deep"]["ok"]) == (False, False)
    assert {c["check"] for c in document["deep"]["checks"] if not c["ok"]} >= {"hypergradients"}
    lines = runner.invoke(
        main, ["verify", str(place), "--deep", "--rows", "6", "--format", "csv", "-q"]
    ).stdout
    assert 'problem,"hydra: hypergradients differ by' in lines
    assert runner.invoke(main, ["verify", str(place), "digits"]).exit_code == 2


class Sure(Small):
    """Classes so far apart that a few steps predict each sample with p = 1 - 1e-6."""

    epochs = 4

    def model(self):
        return torch.nn.Linear(6, 3)

    def train_dataset(self):
        return self._apart(super().train_dataset())

    def test_dataset(self):
        return self._apart(super().test_dataset())

    def optimizer(self, model):
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    def _apart(self, dataset):
        inputs, labels = dataset.tensors
        return TensorDataset(0.1 * inputs + 2 * F.one_hot(labels, 6), labels)


def test_gradients_of_sure_predictions_may_lose_what_float32_loses(tmp_path, monkeypatch):
    """A sample predicted with p = 1 - 1e-6: plain autograd in float32 has its gradient to two places."""
    done = run(spec(Sure(), tmp_path / "run", track=4, test=4, dtype="float32", shards=1))
    assert 1e-7 < done.test_gradients().column("loss").max() < 1e-5
    assert verify_deep(done, Sure()).ok
    monkeypatch.setattr(tolerances, "ROUNDINGS", 0.0)
    assert not by_name(verify_deep(done, Sure()))["all", "test gradients"].ok


def test_adamw_clipped_and_accumulated_is_made_again(tmp_path):
    recipe = Stepped("adamw", 0.3, 3, "late")
    run(spec(recipe, tmp_path / "run"))
    found = verify_deep(run(spec(recipe, tmp_path / "run", hessian="exact")), recipe, rows=3)
    assert found.problems == found.notes == ()
    assert {check.method for check in found.checks} >= {"hydra", "hydra-exact"}
    assert found.products > 0


@pytest.mark.parametrize(
    ("recipe", "mode"),
    [
        (Stepped("adamw", 0.3, 3, "late"), "forward"),
        (Stepped("adam", 0.3), "adjoint"),
        (Stepped("sgd", 0.3), "forward"),
    ],
    ids=["adamw", "adam", "sgd"],
)
def test_ekfac_of_adam_and_of_clipped_trainings_is_made_again(recipe, mode, tmp_path):
    place = tmp_path / "run"
    done = run(spec(recipe, place, hessian="ekfac", mode=mode, shards=2))
    found = verify_deep(done, recipe, rows=4)
    assert found.problems == found.notes == ()
    assert {check.method for check in found.checks} == {"all", "hydra-ekfac"}
    if mode == "forward":
        store = f"hypergradients/method={done.methods()[0]}.zarr"
        rewrite_row(place, store, "hypergradient", 7)
        found = by_name(verify_deep(open_run(place), recipe, rows=13))
        wrong = found["hydra-ekfac", "hypergradients"]
        assert not wrong.ok
        assert wrong.where == "train_index 7"

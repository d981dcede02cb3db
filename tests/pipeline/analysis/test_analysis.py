"""What is read off a finished run: top, export, status, summary."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hydra_pipe.pipeline.analysis import export as exporting
from hydra_pipe.pipeline.analysis.export import export
from hydra_pipe.pipeline.analysis.status import command_line, status
from hydra_pipe.pipeline.analysis.summary import summary
from hydra_pipe.pipeline.opened_run import Run, open_run
from hydra_pipe.storage.errors import CorruptStore, IncompleteStage, InputError
from hydra_pipe.storage.rows import RowStore

from tests.builders import Built, M, N
from tests.end_to_end.support import cli


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    return Built(tmp_path_factory.mktemp("runs") / "digits").build()


@pytest.fixture
def run(built: Built) -> Run:
    return open_run(built.uri)


@pytest.fixture
def copy(built: Built, tmp_path: Path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(built.uri, tmp_path / "copy"))


# ---------------------------------------------------------------- top


@pytest.mark.parametrize("harmful", [False, True])
def test_top_over_the_test_set(run: Run, built: Built, harmful: bool) -> None:
    mean = built.exact.mean(1)
    order = np.lexsort((np.arange(N), mean if harmful else -mean))
    table = run.top(4, harmful=harmful)
    assert table["rank"].to_pylist() == [1, 2, 3, 4]
    assert table["train_index"].to_pylist() == order[:4].tolist()
    assert table["contribution"].to_pylist() == mean[order[:4]].tolist()
    assert table["label"].to_pylist() == built.train_label[order[:4]].tolist()
    assert table["visits"].to_pylist() == built.visits[order[:4]].tolist()


@pytest.mark.parametrize("harmful", [False, True])
def test_top_for_one_test_sample(run: Run, built: Built, harmful: bool) -> None:
    for column, test in enumerate(built.tested.tolist()):
        values = built.contributions[:, column]
        order = np.lexsort((np.arange(N), values if harmful else -values))
        table = run.top(7, test=test, harmful=harmful)
        assert table["train_index"].to_pylist() == order[:7].tolist()
        assert table["contribution"].to_pylist() == values[order[:7]].tolist()
        assert set(table["test_index"].to_pylist()) == {test}
        assert set(table["test_label"].to_pylist()) == {built.test_label[column]}


def test_top_breaks_ties_by_index_across_files(tmp_path: Path) -> None:
    built = Built(tmp_path / "r")
    built.contributions[:, 0] = 1.0
    built.contributions[[15, 2], 0] = 2.0
    built.exact[:] = 0.0
    built.build()
    run = open_run(built.uri)
    assert run.top(4, test=1)["train_index"].to_pylist() == [2, 15, 0, 1]
    assert run.top(3, test=1, harmful=True)["train_index"].to_pylist() == [0, 1, 3]
    assert run.top(3)["train_index"].to_pylist() == [0, 1, 2]


def test_top_gives_what_there_is(run: Run) -> None:
    assert len(run.top(1000)) == N
    assert len(run.top(1000, test=3)) == N


@pytest.mark.parametrize("k", [0, -1])
def test_top_refuses_k_below_one(run: Run, k: int) -> None:
    with pytest.raises(InputError, match=f"k is {k}"):
        run.top(k)


@pytest.mark.parametrize("test", [0, 12, -1, 2**40])
def test_top_refuses_a_test_sample_that_is_not_there(run: Run, test: int) -> None:
    with pytest.raises(InputError, match=rf"test sample {test} .*6 test samples, from 1 to 11.*--test"):
        run.top(3, test=test)


# ---------------------------------------------------------------- export


def test_export_csv_and_parquet_hold_every_row(run: Run, built: Built, tmp_path: Path) -> None:
    for name, read in (("a.csv", pa_csv.read_csv), ("a.parquet", pq.read_table)):
        found = export(run, tmp_path / name)
        assert found["rows"] == N * M
        assert found["bytes"] == (tmp_path / name).stat().st_size
        table: pa.Table = read(tmp_path / name)
        assert table.column_names == [
            "train_index",
            "test_index",
            "train_label",
            "test_label",
            "contribution",
        ]
        values = table.sort_by([("train_index", "ascending"), ("test_index", "ascending")])["contribution"]
        assert np.array_equal(values.to_numpy().astype(np.float32).reshape(N, M), built.contributions)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.csv", "a.parquet"]


def test_export_streams(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "BATCH_ROWS", 16)
    seen: list[int] = []
    export(run, tmp_path / "a.parquet", progress=seen.append)
    assert len(seen) >= N * M // 16
    assert seen[-1] == N * M


def test_export_refuses_what_would_surprise(run: Run, tmp_path: Path) -> None:
    (tmp_path / "old.csv").write_text("mine")
    with pytest.raises(InputError, match=r"exists; .*--overwrite"):
        export(run, tmp_path / "old.csv")
    assert (tmp_path / "old.csv").read_text() == "mine"
    export(run, tmp_path / "old.csv", overwrite=True)
    assert (tmp_path / "old.csv").read_text().startswith('"train_index"')
    with pytest.raises(InputError, match=r"\.csv or \.parquet"):
        export(run, tmp_path / "a.json")
    with pytest.raises(InputError, match="does not exist"):
        export(run, tmp_path / "no" / "a.csv")
    with pytest.raises(InputError, match="local path"):
        export(run, "s3://bucket/a.csv")
    (tmp_path / "d.csv").mkdir()
    with pytest.raises(InputError, match="is a directory"):
        export(run, tmp_path / "d.csv", overwrite=True)


def test_a_failed_export_leaves_nothing(copy: Path, tmp_path: Path) -> None:
    run = open_run(copy)
    run.info["n_tracked"] = N + 1
    run._state = lambda stage: "complete"  # type: ignore[method-assign]
    with pytest.raises(CorruptStore, match=r"120 contributions .* says 126"):
        export(run, tmp_path / "a.csv")
    assert not [path for path in tmp_path.iterdir() if path.name != "copy"]


def test_export_of_an_unfinished_run_is_refused(tmp_path: Path) -> None:
    built = Built(tmp_path / "r").build(upto="replay")
    with pytest.raises(IncompleteStage):
        export(open_run(built.uri), tmp_path / "a.csv")


# ---------------------------------------------------------------- status


def test_status_of_a_complete_run(run: Run) -> None:
    found = status(run)
    assert (found["state"], found["resume"], found["methods"]) == ("complete", None, {"hydra": "complete"})
    rows = {row["stage"]: (row["state"], row["done"], row["units"], row["rows"]) for row in found["stages"]}
    assert rows == {
        "record": ("complete", 1, 1, None),
        "test-gradients": ("complete", 1, 1, M),
        "hydra/replay": ("complete", 2, 2, N),
        "hydra/reduce": ("complete", 2, 2, N),
    }
    assert all(row["bytes"] > 0 and row["seconds"] > 0 for row in found["stages"])


def test_status_of_a_killed_run_names_what_resumes_it(tmp_path: Path) -> None:
    built = Built(tmp_path / "a run").build(upto="replay")
    built.directory.drop("hydra/replay", "shard-00001")
    del built.info["stages"]["hydra/replay"]  # killed before the driver noted how many
    built.directory.update(lambda _: built.info)
    found = status(open_run(built.uri))
    rows = {row["stage"]: (row["state"], row["done"], row["units"]) for row in found["stages"]}
    assert rows["hydra/replay"] == ("partial", 1, 2)
    assert rows["hydra/reduce"] == ("missing", 0, None)
    words = shlex.split(found["resume"])
    assert words == [
        *("hydra-pipe", "run", "--out", built.uri),
        *("--epochs", "3", "--shards", "2", "--set", "noise=0.1"),
    ]


def test_the_resuming_command_is_read_back_as_the_same_spec() -> None:
    import click
    from hydra_pipe.cli.spec_options import build_spec, spec_options
    from hydra_pipe.pipeline.spec.spec import RunSpec

    given = RunSpec(
        recipe="my file.py:A",
        recipe_args={"a": 1, "b": "3", "c": "text it", "d": None},
        out="/x y",
        shards=8,
        track="10%",
        seed=0,
        memory=1 << 30,
        hessian="ekfac",
        exact_rank=2,
        gpus_per_actor=0.5,
    )
    stored = {name: getattr(given, name) for name in RunSpec.__dataclass_fields__}
    found: list[RunSpec] = []

    @click.command()
    @spec_options
    @click.pass_context
    def probe(ctx: click.Context, /, **_: Any) -> None:
        found.append(build_spec(ctx))

    line = command_line(stored, uri="/x y")
    assert CliRunner().invoke(probe, shlex.split(line)[2:]).exit_code == 0
    assert found == [given]


# ---------------------------------------------------------------- summary


def test_the_summary_says_what_happened(run: Run, built: Built) -> None:
    found = summary(run)
    assert found["accuracy"] == {"train": 0.9875, "test": 0.91}
    assert found["memory"] == {"peak_bytes": 612 << 20, "predicted_bytes": 700 << 20}
    assert [row["path"] for row in found["disk"]] == [
        "trajectory.zarr",
        "hypergradients/method=hydra.zarr",
        "test_gradients.zarr",
        "contributions/method=hydra",
        "samples/method=hydra",
        "interclass/method=hydra",
    ]
    mean = built.exact.mean(1)
    assert [row["train_index"] for row in found["helpful"]] == np.argsort(-mean)[:5].tolist()
    assert [row["train_index"] for row in found["harmful"]] == np.argsort(mean)[:5].tolist()
    assert all(row["label"] == row["train_index"] % 3 for row in found["helpful"])
    noisy = {row["train_index"]: row["original_label"] for row in found["helpful"] + found["harmful"]}
    assert {k: v for k, v in noisy.items() if v is not None}.items() <= {3: 2, 7: 0}.items()
    assert found["next"][0] == f"hydra-pipe top {built.uri} --test 1 --harmful"


def test_every_hint_of_the_summary_is_a_command_that_is_there(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is typed into a shell; the directory's name needs quotes, and DuckDB's sums are those of numpy."""
    place = tmp_path / 'it\'s a "run"'
    shutil.copytree(run.uri, place)
    hints = summary(open_run(str(place)))["next"]
    assert [shlex.split(hint)[1] for hint in hints[:4]] == ["top", "detect", "report", "verify"]
    # What a shell makes of the words is tried with a program that tells them; they are run in this process.
    program = shlex.join([sys.executable, "-S", "-c", "import json, sys; print(json.dumps(sys.argv[1:]))"])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    monkeypatch.chdir(tmp_path)
    shown = []
    for hint in hints:
        ours = hint.startswith("hydra-pipe ")
        command = hint.replace("hydra-pipe", program, 1) if ours else hint
        done = subprocess.run(
            command, shell=True, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (hint, done.stderr)
        if ours:
            found = cli(*json.loads(done.stdout))
            assert found.exit_code == 0, (hint, found.stderr)
        shown.append(found.stdout if ours else done.stdout)
    pairs = run.contributions().to_table().to_pandas()
    other = pairs[pairs.train_label != pairs.test_label].groupby("train_index").contribution.mean()
    order = [int(line.split("│")[1]) for line in shown[-1].splitlines() if re.match(r"│ +\d", line)]
    assert order == other.sort_values().index[:10].tolist()


def test_the_python_that_is_not_on_the_path_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: sys.executable)
    assert summary(run)["next"][-1].startswith("python -c 'import duckdb; ")
    monkeypatch.setattr(shutil, "which", lambda name: "/another/python")
    assert shlex.split(summary(run)["next"][-1])[0] == sys.executable


def test_without_duckdb_nothing_asks_for_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert [hint.split()[:2] for hint in summary(run)["next"]] == [
        ["hydra-pipe", "top"],
        ["hydra-pipe", "detect"],
        ["hydra-pipe", "report"],
        ["hydra-pipe", "verify"],
    ]


def test_the_summary_of_a_record_alone(tmp_path: Path) -> None:
    built = Built(tmp_path / "r").build(upto="record")
    found = summary(open_run(built.uri))
    assert found["accuracy"] == {"train": 0.9, "test": None}
    assert (found["method"], found["helpful"], found["harmful"]) == (None, [], [])
    assert [row["stage"] for row in found["stages"]] == ["record"]
    assert found["next"][0].startswith("hydra-pipe run --out")


def test_row_stores_are_those_that_were_written(built: Built) -> None:
    store = RowStore.open(built.directory.path("test_gradients.zarr"), "gradient")
    assert store.column("test_index").tolist() == built.tested.tolist()

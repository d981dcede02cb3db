"""compare: measures worked out by hand on a tiny run, bounded panels, the command."""

from __future__ import annotations

import builtins
import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from hydra_pipe.cli import main
from hydra_pipe.pipeline.compare.compare import compare
from hydra_pipe.pipeline.compare.ranking import auc, overlap, ranks, sign_errors, spearman
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.reading.panels import panels
from hydra_pipe.storage.errors import CorruptStore, InputError
from scipy import stats

from tests.builders import Built, M, N


def add_method(built: Built, name: str, contributions: np.ndarray) -> None:
    """Write another method's tables into a finished run."""
    built.method = name
    built.exact = contributions.astype(np.float64)
    built.contributions = contributions.astype(np.float32)
    built._reduce()
    built.info["methods"][name] = {"state": "complete"}
    built.directory.update(lambda _: built.info)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory):
    """hydra-exact counts up by 1 from -2; hydra is the same but for three changes; flat is 0."""
    built = Built(tmp_path_factory.mktemp("runs") / "r").build()
    base = np.tile(np.arange(N, dtype=np.float64)[:, None] - 2, (1, M))  # -2, -1, 0, 1, ... 17
    changed = base.copy()
    changed[0, 0] = 3  # a harmful sample called helpful, for one test sample
    changed[:, 1] *= -1  # everything upside down, for another
    changed[:, 2] *= 10  # the same order ten times as large
    add_method(built, "hydra", changed)
    add_method(built, "hydra-exact", base)
    add_method(built, "flat", np.zeros((N, M)))
    return open_run(built.uri)


def test_ranks_and_correlations_are_scipys():
    draw = np.random.default_rng(0)
    left, right = draw.integers(0, 7, (30, 5)).astype(float), draw.normal(size=(30, 5))
    left[:, 4] = 1.0
    assert np.array_equal(ranks(left), stats.rankdata(left, axis=0) - 1)
    assert np.array_equal(ranks(left[:, 0]), stats.rankdata(left[:, 0]) - 1)
    expected = [stats.spearmanr(left[:, j], right[:, j])[0] for j in range(4)]
    assert spearman(left, right) == pytest.approx([*expected, 0.0])


def test_auc_by_hand():
    wrong = np.array([True, False, True, False, False])
    assert auc(np.array([5.0, 4, 3, 2, 1]), wrong) == pytest.approx(5 / 6)  # one of six pairs is wrong
    assert auc(np.array([1.0, 0, 1, 0, 0]), wrong) == 1
    assert auc(-np.array([1.0, 0, 1, 0, 0]), wrong) == 0
    assert auc(np.zeros(5), wrong) == 0.5
    assert np.isnan(auc(np.zeros(5), np.zeros(5, dtype=bool)))


def test_signs_and_overlaps_by_hand():
    base = np.array([[1.0], [-1], [0], [2]])
    assert sign_errors(np.array([[2.0], [3], [-4], [0]]), base)[0] == pytest.approx(2 / 3)
    assert overlap(np.array([[9.0], [8], [1], [0]]), base, 2)[0] == 0.5
    assert overlap(np.array([[9.0], [-8], [-1], [0]]), base, 1, lowest=True)[0] == 1


def test_measures_by_hand(run):
    found = compare(run, k=2, methods=["hydra"])
    first, second = found["methods"]
    assert (found["reference"], found["n_tracked"], found["n_test"]) == ("hydra-exact", N, M)
    assert (first["method"], first["sign_error"], first["spearman"]) == ("hydra-exact", 0, pytest.approx(1))
    assert (first["relative_error"], first["scale"], first["overlap_helpful"]) == (0, 1, 1)
    # Of 19 signs that there are, one is wrong for the first test sample and all for the second.
    assert second["sign_error"] == pytest.approx((1 / 19 + 1) / M)
    size = (np.arange(-2, 18) ** 2).sum()
    assert second["relative_error"] == pytest.approx(np.sqrt((25 + 4 * size + 81 * size) / (M * size)))
    by_test = [np.sqrt(25 / size), 2.0, 9.0]
    assert second["relative_error_by_test"] == pytest.approx(sum(by_test) / M)
    scale = (size + 5) + size + 100 * size + 3 * size
    assert second["scale"] == pytest.approx(np.sqrt(scale / (M * size)))
    # Moving sample 0 up leaves the two largest alone; upside down shares none of them.
    assert second["overlap_helpful"] == pytest.approx(5 / 6)
    # The two lowest of the first test sample are then samples 1 and 2 instead of 0 and 1.
    assert second["overlap_harmful"] == pytest.approx((0.5 + 0 + 4) / M)
    moved = stats.spearmanr(np.r_[3, np.arange(-1, 18)], np.arange(20))[0]
    assert second["spearman_by_test"] == pytest.approx([moved, -1, 1, 1, 1, 1])
    assert second["spearman"] == pytest.approx((moved + 3) / M)
    assert second["mean_spearman"] > 0.99
    assert second["mean_sign_error"] == 0


def test_a_method_that_says_nothing_gets_nothing(run):
    flat = compare(run, methods=["flat"])["methods"][1]
    assert (flat["spearman"], flat["scale"], flat["relative_error"]) == (0, 0, 1)
    assert flat["sign_error"] == 1


def test_panels_change_nothing(run):
    whole, narrow = compare(run), compare(run, panel=1)
    assert whole == narrow
    blocks = list(panels(run, "hydra", panel=4))
    assert [block.shape for _, block in blocks] == [(N, 4), (N, 2)]


def test_cost_is_that_of_the_method_alone(run):
    by_name = {row["method"]: row for row in compare(run)["methods"]}
    assert by_name["hydra"]["seconds"] == 4.0  # two shards of 2 s
    assert by_name["flat"]["seconds"] is None


def test_a_missing_pair_is_noticed(tmp_path: Path):
    built = Built(tmp_path / "r").build()
    add_method(built, "hydra-exact", built.exact)
    part = next(Path(built.uri).glob("contributions/method=hydra-exact/part-00001*"))
    part.unlink()
    with pytest.raises(CorruptStore, match=r"part-00001-00000\.parquet is damaged: missing"):
        compare(open_run(built.uri))


def test_the_reference_has_to_be_there_or_named(tmp_path: Path, run):
    alone = open_run(Built(tmp_path / "r").build().uri)
    with pytest.raises(InputError, match="no method hydra-exact to compare with, only hydra"):
        compare(alone)
    with pytest.raises(InputError, match="no other method"):
        compare(alone, reference="hydra")
    with pytest.raises(InputError, match="no method 'tracin'"):
        compare(run, methods=["tracin"])
    with pytest.raises(InputError, match="k is 0"):
        compare(run, k=0)
    assert compare(run, reference="flat")["reference"] == "flat"


def call(*words: str, code: int = 0) -> Result:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(main, words, prog_name="hydra-pipe")
    assert result.exit_code == code, result.output
    return result


def test_the_command_in_all_formats(run, tmp_path: Path):
    out = call("compare", run.uri, "-k", "3").stdout
    assert "C(i, j) against hydra-exact" in out
    assert max(map(len, out.splitlines())) <= 90
    document = json.loads(call("compare", run.uri, "--format", "json", "--methods", "hydra").stdout)
    assert [row["method"] for row in document["methods"]] == ["hydra-exact", "hydra"]
    rows = list(csv.DictReader(io.StringIO(call("compare", run.uri, "--format", "csv").stdout)))
    assert {row["method"] for row in rows} == {"hydra", "hydra-exact", "flat"}
    pytest.importorskip("matplotlib")
    out = call("compare", run.uri, "--figures", str(tmp_path / "new" / "f")).stdout
    assert sorted(p.name for p in (tmp_path / "new" / "f").iterdir()) == ["contributions.png", "spearman.png"]
    assert f"wrote {tmp_path}/new/f/spearman.png" in out


def test_figures_name_the_extra_they_need(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def without(name: str, *rest, **more):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    result = call("compare", run.uri, "--figures", str(tmp_path / "f"), code=1)
    assert "pip install 'hydra-pipe[plots]'" in result.stderr
    assert not (tmp_path / "f").exists()

"""verify finds what is wrong with a run, and the conservation law holds for a sound one."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra_pipe.pipeline.opened_run import Run, open_run
from hydra_pipe.pipeline.verify import conservation as law
from hydra_pipe.pipeline.verify.conservation import conservation
from hydra_pipe.pipeline.verify.verify import verify

from tests.builders import Built, M, N


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


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_sound_run_verifies_and_conserves(tmp_path: Path, dtype: str) -> None:
    built = Built(tmp_path / "r", dtype=dtype).build()
    moves: list[tuple[int, int]] = []
    found = verify(open_run(built.uri), progress=lambda done, total, what: moves.append((done, total)))
    assert (found.ok, found.problems, found.notes) == (True, (), ())
    assert found.conservation["ok"]
    assert [group["group"] for group in found.conservation["groups"]] == [0, 1]
    assert max(g["error"] for g in found.conservation["groups"]) < (1e-6 if dtype == "float32" else 1e-13)
    assert found.rows["contributions/method=hydra"] == N * M
    assert found.rows["hypergradients/method=hydra.zarr"] == N
    assert moves == sorted(moves)
    assert 0 < moves[-1][0] <= moves[-1][1]


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[len(data) // 2] ^= 1
        path.write_bytes(bytes(data))
    elif how == "truncate":
        path.write_bytes(bytes(data[:-1]))
    else:
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "truncate", "remove"])
@pytest.mark.parametrize(
    "pattern",
    [
        "trajectory.zarr/batches/c/**/*",
        "trajectory.zarr/zarr.json",
        "test_gradients.zarr/gradient/c/**/*",
        "hypergradients/method=hydra.zarr/hypergradient/c/**/*",
        "hypergradients/method=hydra.zarr/zarr.json",
        "contributions/method=hydra/*.parquet",
        "samples/method=hydra/*.parquet",
        "interclass/method=hydra/*.parquet",
    ],
)
def test_every_damaged_file_is_one_line(copy: Path, pattern: str, how: str) -> None:
    victim = next(path for path in sorted(copy.glob(pattern)) if path.is_file())
    damage(victim, how)
    found = verify(open_run(copy))
    assert len(found.problems) == 1, found.problems
    assert found.problems[0].startswith(f"{victim.relative_to(copy)}: ")
    assert "\n" not in found.problems[0]


def test_a_damaged_manifest_is_one_line(copy: Path) -> None:
    damage(copy / "manifests" / "hydra" / "replay" / "shard-00000.json", "flip")
    found = verify(open_run(copy))
    assert not found.ok
    assert "shard-00000.json" in found.problems[0]


@pytest.mark.parametrize(
    "stray",
    [
        "contributions/method=hydra/part-99999.parquet",
        "contributions/method=unknown/part-00000.parquet",
        "contributions/_SUCCESS",
        "samples/method=hydra/.crc",
        "hypergradients/method=hydra.zarr/hypergradient/c/9/9",
        "trajectory.zarr/extra",
    ],
)
def test_files_that_no_manifest_lists_are_reported(copy: Path, stray: str) -> None:
    (copy / stray).parent.mkdir(parents=True, exist_ok=True)
    (copy / stray).write_bytes(b"x")
    found = verify(open_run(copy))
    assert any(line.startswith(f"{stray}: no manifest lists this file") for line in found.problems)


def test_a_users_own_files_beside_the_results_are_nobodys_business(copy: Path) -> None:
    (copy / "notes.txt").write_text("mine")
    (copy / "plots").mkdir()
    (copy / "plots" / "a.png").write_bytes(b"x")
    assert verify(open_run(copy)).ok


def test_litter_is_noted_and_no_problem(copy: Path) -> None:
    (copy / "hypergradients" / "x.abc.partial").write_bytes(b"x")
    found = verify(open_run(copy))
    assert found.ok
    assert "1 temporary file" in found.notes[0]


def test_an_unfinished_run_is_noted_and_no_problem(tmp_path: Path) -> None:
    built = Built(tmp_path / "r").build(upto="replay")
    built.directory.drop("hydra/replay", "shard-00001")
    found = verify(open_run(built.uri))
    assert found.ok
    notes = " ".join(found.notes)
    assert "hydra/replay: 1 of 2 units committed" in notes
    assert "hydra/replay: 2 files are not committed yet" in notes
    assert found.conservation["applicable"] is False


def rewrite(built: Built, change: Callable[[Built], None], tmp_path: Path) -> Run:
    """Build a run whose numbers were changed before they were hashed: digests cannot notice."""
    changed = Built(tmp_path / "changed", dtype=built.dtype)
    change(changed)
    return open_run(changed.build().uri)


def test_a_wrong_row_breaks_the_conservation_law(built: Built, tmp_path: Path) -> None:
    def change(run: Built) -> None:
        run.hypergradients[4] = run.hypergradients[5]

    found = verify(rewrite(built, change, tmp_path))
    assert not found.conservation["ok"]
    assert "the sum of all rows is off the recorded weights" in found.problems[0]


def test_the_conservation_law_stands_alone(run: Run) -> None:
    found = conservation(run)
    assert found == verify(run).conservation
    assert found["applicable"]


def test_the_conservation_law_reads_in_blocks(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = conservation(run)
    monkeypatch.setattr(law, "BLOCK_BYTES", 1)
    for group, other in zip(conservation(run)["groups"], whole["groups"], strict=True):
        assert group["error"] == pytest.approx(other["error"], abs=1e-14)


def test_the_conservation_law_says_why_it_does_not_apply(tmp_path: Path) -> None:
    part = open_run(Built(tmp_path / "a", track=15).build().uri)
    assert conservation(part) == {
        "applicable": False,
        "reason": "15 of 20 training samples are tracked, not all",
    }
    assert verify(part).ok
    other = open_run(Built(tmp_path / "b", method="hydra-exact").build().uri)
    assert "no complete method 'hydra'" in conservation(other)["reason"]
    assert verify(other).ok
    normed = Built(tmp_path / "c")
    normed.info["conservation"] = False
    assert "batch statistics" in conservation(open_run(normed.build().uri))["reason"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b.hypergradients.__setitem__((6, 1), np.nan), "1 rows are not finite, first row 6"),
        (lambda b: b.test_gradients.__setitem__((2, 0), np.inf), "1 rows are not finite, first row 2"),
        (lambda b: b.contributions.__setitem__((3, 3), np.nan), "1 values are not finite"),
        (lambda b: b.contributions.__setitem__((3, 3), 99.0), "1 means are not those of"),
        (
            lambda b: b.info.__setitem__("n_test_tracked", M + 1),
            "test-gradients: 1 of 1 units committed, though",
        ),
        (lambda b: b.info.__setitem__("dimension", 16), "15 columns, run.json says 16"),
        (lambda b: b.info.__setitem__("n_train", 19), "outside 0..18"),
    ],
)
def test_contents_that_were_wrong_when_hashed_are_found(
    built: Built, tmp_path: Path, change: Callable[[Any], None], message: str
) -> None:
    found = verify(rewrite(built, change, tmp_path))
    assert any(message in line for line in found.problems), found.problems


def test_a_lost_manifest_of_a_complete_run_is_found(copy: Path) -> None:
    damage(copy / "manifests" / "hydra" / "replay" / "shard-00001.json", "remove")
    found = verify(open_run(copy))
    assert found.problems[0].startswith("hydra/replay: 1 of 2 units committed, though run.json")


def test_a_checkpoint_that_is_not_what_was_trained_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = Built(tmp_path / "r")
    crc = {weights.tobytes(): zlib.crc32(weights) for weights in built.weights}
    crc[built.weights[4].tobytes()] = 1
    with monkeypatch.context() as patch:
        patch.setattr("tests.builders.zlib.crc32", lambda data: crc[data])
        built.build()
    found = verify(open_run(built.uri))
    assert any("checkpoint/weights[1]: not the weights" in line for line in found.problems)

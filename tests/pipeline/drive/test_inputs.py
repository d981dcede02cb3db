"""What a run was made from is known: swapped chunks, foreign manifests and tables of other runs never pass unseen."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from hydra_pipe.pipeline.opened_run import Run, open_run
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.errors import CorruptStore, HydraError, IncompleteStage
from hydra_pipe.storage.rundir import RunDirectory

from tests.end_to_end.support import Heard, assert_same_bits, cli, manifests, numbers

SMALL = {"epochs": 1, "batch_size": 16, "threads": 1, "shards": 3}
ARGS = {"train_size": 48, "test_size": 8}


def a_run(out: Path, observer: Heard | None = None, seed: int = 0) -> Run:
    from hydra_pipe.pipeline.run import run
    from hydra_pipe.pipeline.spec.spec import RunSpec

    spec = RunSpec(
        recipe="digits", out=str(out), executor="serial", device="cpu", recipe_args=ARGS, seed=seed, **SMALL
    )
    return run(spec, observer=observer) if observer else run(spec)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(a_run(tmp_path_factory.mktemp("runs") / "whole").uri)


@pytest.fixture(scope="module")
def right(whole: Path) -> dict[str, np.ndarray]:
    return numbers(whole)


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def chunks(run: Path) -> list[Path]:
    return sorted(
        path
        for path in (run / "hypergradients/method=hydra.zarr/hypergradient/c").rglob("*")
        if path.is_file()
    )


def swap(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


def words_of(out: Path, command: str = "run") -> list[str]:
    spec = ["digits", "--set", "train_size=48", "--set", "test_size=8", "--epochs", "1", "--batch-size", "16"]
    return [
        command,
        *spec,
        "--threads",
        "1",
        "--shards",
        "3",
        "--executor",
        "serial",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]


def test_swapped_chunks_are_refused_by_reduce_named_by_verify_and_repaired_by_run(
    copy: Path, right: dict[str, np.ndarray]
) -> None:
    files = chunks(copy)
    swap(files[0], files[-1])
    shutil.rmtree(copy / "contributions")
    shutil.rmtree(copy / "manifests/hydra/reduce")
    with pytest.raises(CorruptStore, match=r"hypergradient/c/.* is damaged: .*the manifest says.*run again"):
        open_run(copy).hypergradients()[:]
    said = cli(*words_of(copy, "reduce"))
    assert said.exit_code == 1
    assert "is damaged" in said.output
    assert not (copy / "manifests/hydra/reduce").exists()
    found = verify(open_run(copy)).problems
    for path in (files[0], files[-1]):
        assert any(line.startswith(f"{path.relative_to(copy)}: ") for line in found)
    a_run(copy)
    assert_same_bits(numbers(copy), right)


def test_what_was_made_from_swapped_chunks_does_not_outlive_their_repair(
    copy: Path, right: dict[str, np.ndarray]
) -> None:
    """Tables with good manifests, made from wrong hypergradients with good manifests of the time."""
    directory = RunDirectory(str(copy))
    files = chunks(copy)
    swap(files[0], files[-1])
    for unit in ("shard-00000", "shard-00002"):  # as if they had been written so
        manifest = directory.manifest("hydra/replay", unit)
        assert manifest is not None
        reading = directory.ledger.remember()
        directory.commit(
            "hydra/replay", unit, [entry.path for entry in manifest.files], manifest.values, reading
        )
    with pytest.raises(
        IncompleteStage, match=r"hydra/reduce .* was made from another version of hydra/replay shard"
    ):
        open_run(copy).contributions()
    found = verify(open_run(copy)).problems
    assert any(
        line.startswith("hydra/reduce rows-00000: made from another version of hydra/replay")
        for line in found
    )
    said = cli("top", copy)
    assert said.exit_code == 1
    assert "another version" in said.output
    heard = Heard()
    swap(files[0], files[-1])
    a_run(copy, heard)
    assert {unit for stage, unit in heard.done if stage == "hydra/replay"} == {"shard-00000", "shard-00002"}
    assert_same_bits(numbers(copy), right)
    assert verify(open_run(copy)).ok


def test_a_manifest_under_another_name_counts_for_nothing(copy: Path, right: dict[str, np.ndarray]) -> None:
    manifest = copy / "manifests/hydra/replay"
    shutil.copy(manifest / "shard-00000.json", manifest / "shard-00001.json")
    chunks(copy)[len(chunks(copy)) // 2].unlink()
    found = verify(open_run(copy)).problems
    assert "shard-00001.json is the manifest of hydra/replay shard-00000" in found[0]
    heard = Heard()
    a_run(copy, heard)
    assert ("hydra/replay", "shard-00001") in heard.done
    assert_same_bits(numbers(copy), right)


def test_a_unit_done_again_with_the_same_bits_voids_nothing(copy: Path) -> None:
    before = manifests(copy)
    directory = RunDirectory(str(copy))
    directory.drop("record")
    directory.drop("hydra/replay", "shard-00001")
    heard = Heard()
    a_run(copy, heard)
    assert set(heard.done) == {("record", "trajectory"), ("hydra/replay", "shard-00001")}
    after = manifests(copy)
    assert {name for name in before if after[name] != before[name]} == {
        "record/trajectory.json",
        "hydra/replay/shard-00001.json",
    }


def test_other_numbers_void_everything_made_from_them(
    copy: Path, whole: Path, right: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """The record of another seed, whole with its manifest, put in the place of this run's."""
    other = Path(a_run(tmp_path / "other", seed=1).uri)
    for part in ("trajectory.zarr", "manifests/record"):
        shutil.rmtree(copy / part)
        shutil.copytree(other / part, copy / part)
    for read in (
        lambda run: run.contributions(),
        lambda run: run.hypergradients(),
        lambda run: run.samples(),
    ):
        with pytest.raises(IncompleteStage, match="made from another version of record trajectory"):
            read(open_run(copy))
    shutil.rmtree(copy / "trajectory.zarr")
    shutil.copytree(whole / "trajectory.zarr", copy / "trajectory.zarr")
    a_run(copy)
    assert_same_bits(numbers(copy), right)
    assert verify(open_run(copy)).ok


def test_tables_that_no_manifest_lists_are_not_read(
    copy: Path, whole: Path, right: dict[str, np.ndarray]
) -> None:
    tables = [
        path
        for kind in ("contributions", "samples", "interclass")
        for path in (copy / kind).rglob("*.parquet")
    ]
    for path in tables:
        for name in (
            f"{path}.bak",
            f"{path}~",
            str(path).replace("part-", "part-9"),
            f"{path.parent}/part-x.parquet",
        ):
            shutil.copy(path, name)
    assert_same_bits(numbers(copy), right)
    assert cli("top", copy, "--format", "csv").output == cli("top", whole, "--format", "csv").output
    found = verify(open_run(copy)).problems
    assert len(found) == 4 * len(tables)
    assert all("no manifest lists this file" in line for line in found)


@pytest.mark.parametrize(
    "stray",
    [
        "manifests/hydra/replay/shard-00000.json~",
        "manifests/x.json",
        "run.json.bak",
        "trajectory.zarr.old/zarr.json",
    ],
)
def test_strays_among_manifests_and_beside_results_are_found(copy: Path, stray: str) -> None:
    (copy / stray).parent.mkdir(exist_ok=True)
    (copy / stray).write_text("{}")
    assert f"{stray}: no manifest lists this file; remove it" in verify(open_run(copy)).problems


def test_a_table_of_another_run_is_refused(copy: Path, tmp_path: Path) -> None:
    other = Path(a_run(tmp_path / "other", seed=1).uri)
    mine = next((copy / "contributions/method=hydra").glob("*.parquet"))
    data = next((other / "contributions/method=hydra").glob("*.parquet")).read_bytes()
    mine.write_bytes(data)
    said = cli("top", copy, "--test", 0)
    assert said.exit_code == 1
    assert "is damaged" in said.output
    size = mine.stat().st_size
    said = cli("top", copy, "--test", 0, "--no-check")
    assert (said.exit_code == 0) == (
        size == json.loads((copy / "manifests/hydra/reduce/rows-00000.json").read_text())["files"][0]["bytes"]
    )


def test_no_flipped_bit_gives_other_rows(copy: Path) -> None:
    """Wherever in the table of contributions it is, and whether digests are compared or pages alone."""
    path = next((copy / "contributions/method=hydra").glob("*.parquet"))
    sound = path.read_bytes()
    rows = open_run(copy).contributions().to_table()
    generator = random.Random(0)
    seen = 0
    for _ in range(60):
        data = bytearray(sound)
        data[generator.randrange(len(data))] ^= 1 << generator.randrange(8)
        path.write_bytes(bytes(data))
        with pytest.raises(CorruptStore):
            open_run(copy).contributions()
        try:
            found = open_run(copy, check=False).contributions().to_table()
        except (HydraError, OSError, ValueError, MemoryError):
            continue
        seen += not found.equals(rows)
    assert seen <= 6  # headers and footer, which no page checksum covers


def test_run_json_is_sealed_and_an_old_one_opens(copy: Path) -> None:
    path = copy / "run.json"
    text = path.read_text()
    path.write_text(text.replace('"n_tracked": 48', '"n_tracked": 47', 1))
    with pytest.raises(CorruptStore, match=r"run\.json was changed after it was written"):
        open_run(copy)
    body = json.loads(path.read_text())
    del body["document_sha256"]
    path.write_text(json.dumps(body))
    assert open_run(copy).info["n_tracked"] == 47


def test_export_refuses_a_place_inside_any_run(copy: Path, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(whole)
    for place in (
        copy / "x.csv",
        whole / "contributions/method=hydra/part-x.parquet",
        tmp_path / "link" / "x.csv",
    ):
        said = cli("export", copy, "--to", place)
        assert said.exit_code == 1
        assert "lies inside the run" in said.output
        assert not place.exists()
    assert cli("export", copy, "--to", tmp_path / "x.csv").exit_code == 0

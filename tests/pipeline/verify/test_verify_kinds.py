"""verify knows every kind of results: strays, losses, flipped bits, truncation and contents that disagree."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zarr
from hydra_pipe.pipeline.verify.verify import Verification, verify
from hydra_pipe.pipeline.vocabulary import stages_of
from hydra_pipe.storage import layout
from hydra_pipe.storage.rundir import RunDirectory

from hydra_pipe import open_run
from tests.every_kind import every_kind, listed
from tests.forging import vouch

# Sums of segments are gone from a run that is whole; their own tests damage them.
FOLDERS = [kind.folder for kind in layout.KINDS if kind.folder != layout.PARTIAL_SUMS]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return every_kind(tmp_path_factory.mktemp("kinds") / "r")


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "r"))


def victim(place: Path, folder: str) -> str:
    """Return the largest file of a kind, that is one with numbers in it."""
    mine = {path for path in listed(place) if path.startswith(f"{folder}/")}
    return max(sorted(mine), key=lambda path: (place / path).stat().st_size)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, Callable[[Path], None]] = {"flip": flip, "truncate": truncate, "remove": Path.unlink}


@pytest.fixture(scope="session")
def damaged(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Verification]:
    """What verify says of a copy with one file of every kind damaged, by how."""
    found = {}
    for how, change in DAMAGE.items():
        place = Path(shutil.copytree(whole, tmp_path_factory.mktemp(how) / "r"))
        for folder in FOLDERS:
            change(place / victim(place, folder))
        found[how] = verify(open_run(place))
    return found


def test_the_whole_run_is_sound_and_has_every_kind(whole: Path) -> None:
    found = verify(open_run(whole))
    assert (found.problems, found.notes) == ((), ())
    assert {path.split("/")[0] for path in listed(whole)} == set(FOLDERS)


def test_nothing_lies_where_the_layout_does_not_say(whole: Path) -> None:
    for path in listed(whole):
        place = layout.locate(path)
        assert place is not None, path
        assert place.kind.form == "run" or stages_of(place), path


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_file_of_every_kind_is_named(
    whole: Path, damaged: dict[str, Verification], how: str, folder: str
) -> None:
    path = victim(whole, folder)
    lines = [line for line in damaged[how].problems if line.startswith(f"{path}: ")]
    assert len(lines) == 1, damaged[how].problems
    word = {"flip": "sha256", "truncate": "bytes", "remove": "missing"}[how]
    assert word in lines[0]
    assert "\n" not in lines[0]


@pytest.fixture(scope="session")
def littered(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Verification, list[str]]:
    """What verify says of a copy with files of nobody's beside one of every kind, and atop it; and these."""
    place = Path(shutil.copytree(whole, tmp_path_factory.mktemp("stray") / "r"))
    strays = [str(Path(victim(place, folder)).parent / "part-stray.parquet") for folder in FOLDERS]
    strays += [f"{folder}/stray" for folder in FOLDERS]
    for path in strays:
        (place / path).write_bytes(b"x")
    return verify(open_run(place)), strays


@pytest.mark.parametrize("at", range(2 * len(FOLDERS)))
def test_a_stray_file_of_every_kind_is_named(littered: tuple[Verification, list[str]], at: int) -> None:
    found, strays = littered
    assert f"{strays[at]}: no manifest lists this file; remove it" in found.problems


def change_store(place: Path, store: str, array: str, value: float) -> None:
    """Write a value into the first place of an array."""
    found = zarr.open_array(str(place / store / array), mode="r+")
    found[(0,) * found.ndim] = value


def change_table(place: Path, table: str, change: Callable[[pa.Table], pa.Table]) -> None:
    """Change the first file of a table."""
    path = place / table if table.endswith(".parquet") else min((place / table).glob("*.parquet"))
    before = pq.ParquetFile(path).read()
    pq.write_table(change(before).cast(before.schema), path)


def with_nan(column: str) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[column].to_numpy().copy()
        values[0] = np.nan
        return table.set_column(table.schema.get_field_index(column), column, pa.array(values))

    return change


def shorter(table: pa.Table) -> pa.Table:
    return table.slice(1)


def other_unit(table: pa.Table) -> pa.Table:
    at = table.schema.get_field_index("unit")
    return table.set_column(at, "unit", pa.array(["unheard-of"] * len(table)))


NORMS = layout.training_gradients("norms")
RANK, FAST, EXACT, SEEDS = "hydra-ekfac-rank2", "hydra", "hydra-exact", "hydra-seeds2"
LOOKED = "over_training/every-2-ekfac"
CONTENTS: list[tuple[str, Callable[..., None], tuple[Any, ...], str]] = [
    (layout.TRAJECTORY, change_store, ("loss", np.nan), "1 values are not finite"),
    (layout.TEST_GRADIENTS, change_store, ("gradient", np.nan), "1 rows are not finite, first row 0"),
    (layout.hypergradients(FAST), change_store, ("hypergradient", np.nan), "1 rows are not finite"),
    (layout.target_gradients("classes"), change_store, ("gradient", 99.0), "row 0 is not the mean"),
    (layout.by_test(EXACT), change_store, ("contribution", np.nan), "1 rows are not finite"),
    (layout.by_test(EXACT), change_store, ("contribution", 99.0), "1 means are not those of"),
    (layout.by_test(EXACT), change_store, ("test_index", -1), "not the targets of the run"),
    (layout.by_test(f"{EXACT}-classes"), change_store, ("label", 77), "not the targets of the run"),
    (layout.prepared("relatif"), change_store, ("value", np.nan), "1 rows are not finite"),
    (layout.prepared("relatif"), change_store, ("train_index", 44), "not strictly increasing"),
    (layout.TRAINING_OUTPUTS, change_store, ("feature", np.nan), "1 rows are not finite"),
    (layout.TRAINING_OUTPUTS, change_store, ("output", np.inf), "output: 1 values are not finite"),
    (layout.TRAINING_OUTPUTS, change_store, ("loss", np.nan), "loss: 1 values are not finite"),
    (layout.TRAINING_OUTPUTS, change_store, ("prediction", -7), "prediction: 1 values are no class"),
    (layout.TRAINING_OUTPUTS, change_store, ("train_index", -1), "train_index: not the tracked samples"),
    (NORMS, change_store, ("value", np.nan), "1 rows are not finite"),
    (NORMS, change_store, ("absolute", -1.0), "absolute: 1 values are below 0"),
    (NORMS, change_store, ("train_index", 44), "not strictly increasing"),
    (layout.curvature("hydra-ekfac"), change_store, ("eigenvalues", np.nan), "1 values are not finite"),
    (layout.corrections(RANK, layout.DIRECTIONS), change_store, ("direction", np.inf), "not finite"),
    (layout.corrections(RANK, layout.COORDINATES), change_store, ("coordinate", np.inf), "not finite"),
    (layout.corrections(RANK, layout.CORRECTED), change_store, ("contribution", np.inf), "not finite"),
    (layout.table("contributions", FAST), change_table, (with_nan("contribution"),), "not finite"),
    (layout.table("contributions", FAST), change_table, (shorter,), "rows, run.json says 45"),
    (layout.table("samples", FAST), change_table, (with_nan("contribution"),), "not finite"),
    (layout.table("interclass", FAST), change_table, (with_nan("contribution"),), "not finite"),
    (layout.table("contributions_spread", SEEDS), change_table, (shorter,), "rows, run.json says 45"),
    (layout.table("samples_spread", SEEDS), change_table, (with_nan("contribution_spread"),), "not those"),
    ("evaluate/retrain", change_table, (with_nan("loss"),), "loss: 1 values are not finite"),
    ("evaluate/retrain", change_table, (shorter,), "test_index holds 4 rows, expected 5"),
    ("evaluate/training_loss", change_table, (shorter,), "train_index holds 8 rows, expected 9"),
    (layout.evaluation(layout.TRIALS), change_table, (other_unit,), "is no retraining of this run"),
    (f"{LOOKED}/samples", change_table, (with_nan("contribution"),), "not finite"),
    (f"{LOOKED}/samples", change_table, (shorter,), "train_index holds"),
    (f"{LOOKED}/errors", change_table, (shorter,), "train_index holds"),
    (f"{LOOKED}/contributions", change_table, (shorter,), "test_index holds"),
]


def round_of(at: int) -> int:
    """Return in which copy a change is made: one copy bears one change of each store or table."""
    return sum(CONTENTS[k][0] == CONTENTS[at][0] for k in range(at))


@pytest.fixture(scope="session")
def disagreeing(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Verification]:
    """What verify says of copies whose contents were changed and committed anew, by round."""
    found = {}
    rounds = [round_of(at) for at in range(len(CONTENTS))]
    for number in sorted(set(rounds)):
        place = Path(shutil.copytree(whole, tmp_path_factory.mktemp("contents") / "r"))
        mine = [case for case, its in zip(CONTENTS, rounds, strict=True) if its == number]
        for where, change, given, _ in mine:
            change(place, where, *given)
        vouch(place)
        found[number] = verify(open_run(place))
    return found


@pytest.mark.parametrize("at", range(len(CONTENTS)), ids=lambda at: f"{CONTENTS[at][0]}-{CONTENTS[at][3]}")
def test_contents_that_disagree_are_named_where_digests_agree(
    disagreeing: dict[int, Verification], at: int
) -> None:
    where, message = CONTENTS[at][0], CONTENTS[at][3]
    problems = disagreeing[round_of(at)].problems
    assert any(line.startswith(where) and message in line for line in problems), problems


def test_an_interrupted_evaluation_has_files_that_are_not_committed_yet(copy: Path) -> None:
    directory = RunDirectory(str(copy))
    directory.drop("evaluate/scores")
    directory.drop("evaluate/retrain", directory.units("evaluate/retrain")[0])
    found = verify(open_run(copy))
    assert found.ok, found.problems
    assert any(note.startswith("evaluate/scores: ") for note in found.notes)
    assert any(note.startswith("evaluate/retrain: ") for note in found.notes)

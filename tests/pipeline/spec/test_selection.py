from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hydra_pipe.pipeline.spec.selection import Indices, select
from hydra_pipe.storage.errors import SpecError

LABELS = [0] * 60 + [1] * 39 + [2]


def chosen(
    choice: object, total: int = 100, labels: list[int] | None = LABELS, seed: int = 0, what: str = "--track"
) -> Indices:
    return select(choice, total=total, labels=labels, seed=seed, what=what)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("all", range(100)),
        (" all ", range(100)),
        ("3", range(3)),
        (3, range(3)),
        ("100", range(100)),
        ("10:12", [10, 11]),
        (":2", [0, 1]),
        ("98:", [98, 99]),
        ("-2:", [98, 99]),
        (":", range(100)),
        ("0:100", range(100)),
        ([5, 3, 4], [3, 4, 5]),
        (np.array([9, 1]), [1, 9]),
    ],
)
def test_choices(choice: object, expected: object) -> None:
    result = chosen(choice)
    assert result.dtype == np.int64
    assert result.tolist() == list(expected)  # type: ignore[call-overload]


def test_a_share_is_taken_of_every_class() -> None:
    result = chosen("10%")
    assert [int((np.array(LABELS)[result] == label).sum()) for label in range(3)] == [6, 4, 1]
    assert result.tolist() == sorted(set(result.tolist()))
    assert chosen("10%").tolist() == result.tolist()
    assert chosen("10%", seed=1).tolist() != result.tolist()
    assert chosen("100%").tolist() == list(range(100))


def test_a_larger_share_holds_the_smaller() -> None:
    shares = [set(chosen(f"{percent}%").tolist()) for percent in (1, 2.5, 10, 50)]
    assert all(small <= large for small, large in pairwise(shares))


def test_a_share_without_labels_is_plain() -> None:
    assert len(chosen("25 %", labels=None)) == 25
    assert len(chosen("0.1%", labels=None)) == 1


def test_a_share_is_the_same_for_ever() -> None:
    # Runs resume years later: the draw may not change with a release of numpy or of ours.
    assert chosen("5%", total=20, labels=[0, 1] * 10).tolist() == [2, 11]


def test_file(tmp_path: Path) -> None:
    file = tmp_path / "100"
    file.write_text("# the hard ones\n7\n\n  3  # a two\n12\n")
    assert chosen(str(file)).tolist() == [3, 7, 12]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n1\n", r"list\.txt, line 3: 1 is already at .*line 1"),
        ("1\n-2\n", r"line 2: -2 is outside 0 to 99"),
        ("100\n", r"line 1: 100 is outside 0 to 99"),
        ("1.5\n", r"line 1: '1\.5' is no integer"),
        ("1 2\n", r"line 1: '1 2' is no integer"),
        ("# nothing\n\n", r"no sample is named"),
        ("9" * 30, r"line 1: '9+' is no integer"),
    ],
)
def test_wrong_files_name_the_line(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "list.txt"
    file.write_text(text)
    with pytest.raises(SpecError, match=message):
        chosen(str(file))


def test_a_file_from_windows_is_read(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbf4\r\n2\r\n")
    assert chosen(str(tmp_path / "list.txt")).tolist() == [2, 4]


def test_a_binary_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "list.npy"
    file.write_bytes(b"\x93NUMPY\xff")
    with pytest.raises(SpecError, match="not a text file"):
        chosen(str(file))
    with pytest.raises(SpecError, match=r"cannot be read \(Is a directory\)"):
        chosen(str(tmp_path))


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("0", r"--test 0: must be 1 to 100"),
        ("101", r"--test 101: must be 1 to 100, the samples there are"),
        ("50:101", r"--test 50:101: 101 is outside a dataset of 100 samples"),
        ("-101:", r"-101 is outside"),
        ("7:7", r"no sample lies in 7:7"),
        ("7:-99", r"no sample lies in 7:1"),
        ("1:2:3", r"neither all, N, A:B, F% nor a file"),
        ("0%", r"--test 0%: must be above 0%"),
        ("100.5%", r"at most 100%"),
        ("ten", r"--test ten: neither all"),
        ([], r"no sample is named"),
        ([1, 1], r"--test\[1\]: 1 is already at --test\[0\]"),
        ([True], r"'True' is no integer"),
        ([1.0], r"'1\.0' is no integer"),
    ],
)
def test_wrong_choices(choice: object, message: str) -> None:
    with pytest.raises(SpecError, match=message) as caught:
        chosen(choice, what="--test")
    assert "\n" not in str(caught.value)


def test_labels_must_match_the_dataset() -> None:
    with pytest.raises(SpecError, match=r"5%: the recipe gives 3 labels for 100 samples"):
        chosen("5%", labels=[0, 1, 2])
    with pytest.raises(SpecError, match="dataset is empty"):
        chosen("all", total=0, labels=[])

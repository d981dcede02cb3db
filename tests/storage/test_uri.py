"""Addresses: what is accepted, what is refused and how that is said."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hydra_pipe.storage.errors import SpecError
from hydra_pipe.storage.uri import check_name, check_uri, is_local, join, parent


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("/a/b/../c/", "/a/c"),
        ("file:///a/b", "/a/b"),
        ("S3://Bucket/run/", "s3://Bucket/run"),
        ("gs://bucket", "gs://bucket"),
        ("az://container/run", "az://container/run"),
        ("memory://a/b", "memory://a/b"),
        ("memory:///a", "memory://a"),
        ("/a/with space/ü", "/a/with space/ü"),
        ("/a/odd:name", "/a/odd:name"),
    ],
)
def test_accepted(given: str, expected: str) -> None:
    assert check_uri(given) == expected
    assert check_uri(check_uri(given)) == expected


def test_local_paths_become_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert check_uri("runs/x") == os.path.join(os.getcwd(), "runs/x")
    assert check_uri("~/x") == "/home/someone/x"
    assert check_uri(tmp_path / "x") == str(tmp_path / "x")


@pytest.mark.parametrize(
    "given",
    [
        "",
        " ",
        "http://host/x",
        "ftp://host/x",
        "github://a:b/c",
        "simplecache::s3://bucket/x",
        "s3://bucket/zip::x",
        "zip://x.zip",
        "file://host/x",
        "file:/x",
        "s3:/bucket/x",
        "s3://",
        "s3://bucket//x",
        "s3://bucket/../other",
        "/a\nb",
        "/a\0b",
        "memory://",
    ],
)
def test_refused(given: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_uri(given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "given", ["s3://KEY:hunter2@bucket/x", "http://user:hunter2@host/x", "a::s3://k:hunter2@b/c"]
)
def test_a_secret_is_not_repeated(given: str) -> None:
    with pytest.raises(SpecError) as caught:
        check_uri(given)
    assert "hunter2" not in str(caught.value)


def test_join_stays_inside() -> None:
    assert join("/a", "b", "c/d") == "/a/b/c/d"
    assert join("s3://bucket/run", "method=hydra.zarr") == "s3://bucket/run/method=hydra.zarr"
    assert join("/a") == "/a"
    assert join("/", "b") == "/b"
    for part in ("..", "b/../../c", "/etc/passwd", "", "b//c", "b\\c"):
        with pytest.raises(SpecError):
            join("/a", part)


def test_is_local_and_parent() -> None:
    assert is_local("/a/b")
    assert not is_local("memory://a")
    assert parent("/a/b") == "/a"
    assert parent("/a") == "/"


def test_names() -> None:
    for good in ("a", "hydra-ekfac", "part.0_1", "9", "x" * 64):
        assert check_name(good, "method") == good
    for bad in ("", ".hidden", "-x", "a/b", "a b", "é", "x" * 65, "a\n"):
        with pytest.raises(SpecError, match="method"):
            check_name(bad, "method")

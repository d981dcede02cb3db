"""Whole files: atomic, complete or absent."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra_pipe.storage import files
from hydra_pipe.storage.errors import StorageFull, StoreError
from hydra_pipe.storage.refused import full_disk_guard
from hydra_pipe.storage.uri import join


def test_write_read_list_digest_remove(place: str) -> None:
    data = b"x" * 3_000_000
    files.write_bytes(join(place, "a/b.bin"), data)
    files.write_bytes(join(place, "c.json"), b"{}")
    files.write_bytes(join(place, "c.json"), b"[]")
    assert files.read_bytes(join(place, "c.json")) == b"[]"
    assert files.list_files(place) == ["a/b.bin", "c.json"]
    assert files.digest(join(place, "a/b.bin")) == (hashlib.sha256(data).hexdigest(), len(data))
    assert files.size_of(join(place, "a/b.bin")) == len(data)
    assert files.exists(join(place, "a"))
    files.remove(join(place, "c.json"))
    files.remove(join(place, "c.json"))
    files.remove(join(place, "a"), recursive=True)
    files.remove(join(place, "a"), recursive=True)
    assert files.list_files(place) == []
    assert not files.exists(join(place, "c.json"))


def test_a_sibling_with_the_same_beginning_is_not_listed(place: str) -> None:
    files.write_bytes(join(place, "run/a"), b"1")
    files.write_bytes(join(place, "run2/b"), b"2")
    assert files.list_files(join(place, "run")) == ["a"]


def test_what_is_absent_raises_file_not_found(place: str) -> None:
    for read in (files.read_bytes, files.digest, files.size_of):
        with pytest.raises(FileNotFoundError):
            read(join(place, "nothing"))
    assert files.list_files(join(place, "nothing")) == []


def test_a_link_is_removed_not_followed(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").write_text("x")
    (tmp_path / "link").symlink_to(kept)
    files.remove(str(tmp_path / "link"), recursive=True)
    assert not (tmp_path / "link").exists()
    assert (kept / "file").exists()


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, full_writes: None) -> None:
    target = tmp_path / "f"
    target.write_bytes(b"old")
    with pytest.raises(StorageFull, match="--out") as caught:
        files.write_bytes(str(target), b"new" * 100)
    assert str(target) in str(caught.value)
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["f"]


def test_a_really_full_disk(small_disk: Path) -> None:
    with pytest.raises(StorageFull, match="MB free"):
        files.write_bytes(str(small_disk / "f"), bytes(2 << 20))
    assert os.listdir(small_disk) == []


def test_the_guard_sees_through_wrapped_errors() -> None:
    def wrapped() -> None:
        try:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        except OSError as error:
            raise RuntimeError("codec failed") from error

    with pytest.raises(StorageFull), full_disk_guard("/x/y"):
        wrapped()
    with pytest.raises(StorageFull), full_disk_guard("s3://bucket/y"):
        raise OSError("Error writing bytes. Detail: [errno 28] No space left on device")
    with pytest.raises(StorageFull), full_disk_guard("/x"):
        raise ExceptionGroup("several", [ValueError("x"), OSError(errno.ENOSPC, "full")])
    with pytest.raises(ValueError, match="mine"), full_disk_guard("/x"):
        raise ValueError("mine")
    # An unrelated text about space is no full disk.
    with pytest.raises(ValueError, match="no space"), full_disk_guard("/x"):
        raise ValueError("no space left on device tree")


def test_a_place_that_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="Not a directory") as caught:
        files.write_bytes(str(tmp_path / "file" / "run" / "x"), b"")
    assert "\n" not in str(caught.value)


def test_a_killed_writer_leaves_only_partial_litter(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from hydra_pipe.storage import files\n"
        "real = os.write\n"
        "def slow(fd, data):\n"
        "    real(fd, data[:1000]); real(1, b'.'); import time; time.sleep(60)\n"
        "files.os.write = slow\n"
        f"files.write_bytes({str(tmp_path / 'f')!r}, bytes(1 << 20))\n"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}
    )
    assert process.stdout is not None
    assert process.stdout.read(1) == b"."
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    (left,) = os.listdir(tmp_path)
    assert files.PARTIAL in left


def test_no_reader_sees_a_part(tmp_path: Path) -> None:
    """Versions of one byte each, replaced while another process reads: never a mixture."""
    target = str(tmp_path / "f")
    files.write_bytes(target, b"a" * 100_000)
    code = (
        "import sys\n"
        "print('up', flush=True)\n"
        f"while True:\n    data = open({target!r}, 'rb').read()\n"
        "    assert len(data) == 100_000 and len(set(data)) == 1\n"
    )
    reader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert reader.stdout is not None
    reader.stdout.readline()
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        for letter in b"abc":
            files.write_bytes(target, bytes([letter]) * 100_000)
    assert reader.poll() is None
    reader.kill()
    reader.wait()
    reader.stdout.close()

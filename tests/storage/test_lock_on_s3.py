"""The lock on an object store that speaks S3: conditional puts, by many at once, and answers that are lost."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import fsspec
import pytest
from hydra_pipe.storage import files, layout
from hydra_pipe.storage.errors import RunLocked, StoreError
from hydra_pipe.storage.lock import RunLock
from hydra_pipe.storage.lock_file import LockFile, lock_file

pytest.importorskip("s3fs")
moto = pytest.importorskip("moto.server")


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """Address of an empty bucket on a server of our own."""
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        fs = fsspec.filesystem("s3", skip_instance_cache=True)
        fs.mkdir("locks")
        fsspec.filesystem("s3").clear_instance_cache()
        yield "s3://locks"
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


def at_once(files_: list[LockFile], act: Any) -> list[Any]:
    with ThreadPoolExecutor(len(files_)) as pool:
        return [found for found in pool.map(act, enumerate(files_)) if found is not None]


def test_of_many_one_makes_it_one_takes_it_over_and_only_its_owner_removes_it(bucket):
    address = f"{bucket}/many/lock.json"
    several = [lock_file(address) for _ in range(6)]
    assert several[0].exact
    (made,) = at_once(several, lambda one: one[1].create(f"first {one[0]}".encode()))
    assert several[0].read() == made
    (taken,) = at_once(several, lambda one: one[1].swap(f"second {one[0]}".encode(), made))
    assert several[0].read() == taken != made
    assert not several[0].remove(made)
    assert several[0].remove(taken)
    assert several[0].read() is None
    assert several[0].swap(b"third", taken) is None


def test_an_answer_that_was_lost_is_looked_up(bucket, monkeypatch):
    """The put is done, its answer is not heard, and the one tried again is refused."""
    one = lock_file(f"{bucket}/lost/lock.json")
    fs, _ = files.filesystem(one.uri)
    bound = fs.pipe_file

    def lost(path: str, data: bytes, **given: Any) -> None:
        bound(path, data, **given)
        raise OSError(22, "At least one of the pre-conditions you specified did not hold")

    monkeypatch.setattr(fs, "pipe_file", lost)
    made = one.create(b"mine")
    assert made is not None
    assert one.swap(b"mine again", made) is not None


def test_a_run_there_has_one_writer(bucket):
    first = RunLock(f"{bucket}/run", "hydra-pipe run")
    first.acquire()
    with pytest.raises(RunLocked, match="in use by hydra-pipe run"):
        RunLock(first.uri, "hydra-pipe detect").acquire()
    first._beat()
    first.check()
    assert json.loads(files.read_bytes(f"{first.uri}/{layout.LOCK}"))["beat"] == 1
    first.release()
    assert files.list_files(first.uri) == []


class ClientError(Exception):
    """What clients of object stores raise: no OSError, and of several lines."""


def broken(*_arguments: Any, **_given: Any) -> None:
    raise ClientError("400, message=\n  b'SlowDown'")


@pytest.mark.parametrize("method", ["info", "cat_file", "pipe_file", "rm_file"])
def test_what_a_client_raises_is_an_error_of_ours_and_ends_no_heartbeat(bucket, method, monkeypatch, caplog):
    lock = RunLock(f"{bucket}/broken-{method}", "hydra-pipe run")
    lock.acquire()
    fs, _ = files.filesystem(lock.uri)
    with monkeypatch.context() as patch:
        patch.setattr(fs, method, broken)
        lock._look_for_stop()
        lock._beat()
        if method in ("info", "cat_file"):
            with pytest.raises(
                StoreError, match=r"^cannot read .*lock.json: ClientError: 400, message= b'SlowDown'; check"
            ):
                lock_file(f"{lock.uri}/{layout.LOCK}").read()
        if method == "pipe_file":
            with pytest.raises(
                StoreError, match=r"^cannot write .*: ClientError: 400, message= b'SlowDown'; check"
            ):
                lock_file(f"{lock.uri}/other.json").create(b"mine")
        if method == "rm_file":
            lock.release()
            assert "its lock stays behind (cannot write" in caplog.text
            assert "\n  b'SlowDown'" not in caplog.text
            return
    lock.check()
    lock.release()

"""One writer a run: who gets the lock, who waits, who takes it over, and who finds out that it is gone."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.storage import files, layout, lock, lock_file
from hydra_pipe.storage.documents import dump
from hydra_pipe.storage.errors import RunLocked, RunLost
from hydra_pipe.storage.lock import Holder, RunLock, fenced, holding, holding_here, read_holder
from hydra_pipe.storage.processes import Process, is_gone, this_process
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.storage.typed import to_json
from hydra_pipe.storage.uri import join
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Signs of life ten times a second, and death after half of one."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(lock, "LOOK_SECONDS", 0.02)


@pytest.fixture
def taken() -> Iterator[Any]:
    """Take locks, and give them up at the end."""
    locks: list[RunLock] = []

    def take(uri: str, command: str = "hydra-pipe test", **given: Any) -> RunLock:
        one = RunLock(uri, command)
        one.acquire(**given)
        locks.append(one)
        return one

    yield take
    for one in locks:
        one.release()


def address(uri: str) -> str:
    return join(uri, layout.LOCK)


def put_holder(uri: str, *, process: Process, owner: str = "x", beat: int = 3) -> None:
    """Leave a lock as a holder that is not here does."""
    holder = Holder(owner=owner, command="hydra-pipe run", process=process, since="then", beat=beat)
    files.write_bytes(address(uri), dump(to_json(holder)))


ELSEWHERE = Process(host="far-away", machine="another boot", pid=7, started="1")


def gone() -> Process:
    """Return a process of this machine that has ended."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = this_process()
    return Process(host=here.host, machine=here.machine, pid=ended.pid, started="1")


def test_one_has_it_and_the_next_is_told_who(place, taken):
    first = taken(place, "hydra-pipe run")
    there = this_process()
    told = rf"in use by hydra-pipe run on {there.host}, process {os.getpid()}, since .*last sign of life .*--wait"
    with pytest.raises(RunLocked, match=told) as refused:
        RunLock(place, "hydra-pipe detect").acquire()
    assert "\n" not in str(refused.value)
    assert f"hydra-pipe stop {place}" in str(refused.value)
    first.release()
    assert not files.exists(address(place))
    second = taken(place)
    assert json.loads(files.read_bytes(address(place)))["owner"] == second.owner


def test_what_the_lock_made_goes_with_it_and_nothing_else(tmp_path, taken):
    place = tmp_path / "a" / "b"
    taken(str(place)).release()
    assert not (tmp_path / "a").exists()
    one = taken(str(place))
    (place / "file").touch()
    one.release()
    assert [path.name for path in place.iterdir()] == ["file"]


def test_who_waits_gets_it_next_and_says_for_whom(place, taken, quick):
    first, heard = taken(place, "hydra-pipe run"), []
    threading.Timer(0.3, first.release).start()
    second = taken(place, wait=True, tell=heard.append)
    assert heard == [
        f"waiting for hydra-pipe run on {this_process().host}, process {os.getpid()}, since {first._me.since}"
    ]
    assert read_holder(place).owner == second.owner


def test_a_process_of_this_machine_that_is_gone_is_followed_at_once(place, taken):
    put_holder(place, process=gone())
    heard: list[str] = []
    began = time.monotonic()
    taken(place, tell=heard.append)
    assert time.monotonic() - began < 5
    assert heard[0].startswith(f"took {place} over from hydra-pipe run on ")
    assert heard[0].endswith("that process has ended")


def test_a_number_that_was_given_to_a_later_process_is_no_sign_of_life(place, taken):
    here = this_process()
    put_holder(place, process=Process(host=here.host, machine=here.machine, pid=here.pid, started="1"))
    taken(place)


def test_a_process_that_nobody_has_asked_about_has_ended():
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = this_process()
    process = Process(host=here.host, machine=here.machine, pid=child.pid, started="")
    assert not is_gone(process)
    child.kill()
    deadline = time.monotonic() + 10
    while not is_gone(process) and time.monotonic() < deadline:  # a zombie until wait()
        time.sleep(0.01)
    assert is_gone(process)
    child.wait()
    assert not is_gone(ELSEWHERE)


def test_on_another_machine_silence_is_awaited_by_the_own_clock(place, taken, quick):
    put_holder(place, process=ELSEWHERE)
    heard: list[str] = []
    began = time.monotonic()
    taken(place, tell=heard.append)
    assert time.monotonic() - began > 0.4
    assert "looking for a sign of life" in heard[0]
    assert "it gave no sign of life for" in heard[1]


def test_on_another_machine_a_sign_of_life_is_enough_to_be_refused(place, quick):
    put_holder(place, process=ELSEWHERE)
    threading.Timer(0.2, put_holder, (place,), {"process": ELSEWHERE, "beat": 4}).start()
    with pytest.raises(RunLocked, match="far-away, process 7"):
        RunLock(place, "hydra-pipe run").acquire()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"owner": 3}', b"\xff"])
def test_a_lock_that_says_nothing_is_taken_over_after_a_while(place, taken, quick, content):
    files.write_bytes(address(place), content)
    heard: list[str] = []
    taken(place, tell=heard.append)
    assert "from a command whose lock cannot be read" in heard[-1]


def test_signs_of_life_keep_the_lock(place, taken, quick):
    first = taken(place)
    time.sleep(1.0)
    first.check()
    assert json.loads(files.read_bytes(address(place)))["beat"] > 3
    with pytest.raises(RunLocked):
        RunLock(place, "hydra-pipe run").acquire()


def test_who_lost_the_run_writes_nothing_any_more(place, taken, quick):
    directory = RunDirectory(place)
    mine = taken(place)
    directory.update(lambda noted: {"x": 1})
    directory.commit("record", "trajectory", [], {})
    put_holder(place, process=ELSEWHERE, owner="another")
    deadline = time.monotonic() + 5
    while mine._lost is None and time.monotonic() < deadline:
        time.sleep(0.02)
    for write in (
        lambda: directory.update(lambda noted: {"x": 2}),
        lambda: directory.commit("record", "other", [], {}),
        lambda: directory.drop("record"),
        directory.clear_litter,
        directory.delete_results,
        lock.stop_asked,
    ):
        with pytest.raises(RunLost, match="far-away, process 7, since then has taken it over"):
            write()
    assert directory.read() == {"x": 1}
    assert directory.units("record") == ["trajectory"]
    mine.release()
    assert json.loads(files.read_bytes(address(place)))["owner"] == "another", "only an own lock is removed"


def test_a_command_that_slept_looks_before_it_writes(place, taken, monkeypatch):
    mine = taken(place)
    put_holder(place, process=ELSEWHERE, owner="another")
    monkeypatch.setattr(lock, "clock", lambda: mine._alive + 26)
    with pytest.raises(RunLost, match="has taken it over"):
        mine.check()


def test_a_lock_that_cannot_be_renewed_for_long_is_lost(place, taken, monkeypatch):
    mine = taken(place)

    def refuse(*given: Any) -> None:
        raise OSError(errno.ECONNRESET, "reset")

    monkeypatch.setattr(mine._file, "swap", refuse)
    monkeypatch.setattr(lock, "clock", lambda: mine._alive + 26)
    mine.check()
    monkeypatch.setattr(lock, "clock", lambda: mine._alive + 61)
    with pytest.raises(RunLost, match="could not be renewed for 60 s"):
        mine.check()


def test_a_sign_of_life_needs_no_room_on_the_disk(tmp_path, taken, monkeypatch):
    mine = taken(str(tmp_path / "run"))

    def full(self: Any, data: bytes) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(lock_file._Local, "_written", full)
    mine._beat()
    assert json.loads((tmp_path / "run" / layout.LOCK).read_bytes())["beat"] == 1
    mine.check()


def test_where_there_are_no_hard_links_a_new_file_does(tmp_path, taken, monkeypatch):
    def refuse(*given: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    place = str(tmp_path / "run")
    taken(place)
    with pytest.raises(RunLocked):
        RunLock(place, "hydra-pipe run").acquire()
    assert os.listdir(place) == [layout.LOCK]


def test_a_worker_commits_for_the_holder_alone(place, taken):
    directory = RunDirectory(place)
    mine = taken(place)
    lock._HELD.remove(mine)  # as in another process
    try:
        with fenced(place, mine.owner):
            directory.commit("record", "a", [], {})
        with fenced(place, "an older one"), pytest.raises(RunLost, match="hydra-pipe test on"):
            directory.commit("record", "b", [], {})
        mine._file.remove(mine._seen)
        with fenced(place, mine.owner), pytest.raises(RunLost, match="nobody holds it"):
            directory.commit("record", "c", [], {})
    finally:
        lock._HELD.append(mine)
    assert directory.units("record") == ["a"]
    directory.commit("record", "d", [], {})  # no holder is known here: a tool, a test


def test_a_thread_holds_for_itself(place, taken):
    mine = taken(place)
    seen = []

    def look() -> None:
        seen.append(holding_here(place))
        try:
            RunLock(place, "hydra-pipe other").acquire()
        except RunLocked:
            seen.append("refused")

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [None, "refused"]
    assert holding(place) is holding_here(place) is mine


def test_a_request_to_stop_reaches_its_holder_alone(place, taken, quick):
    first = taken(place)
    lock.ask_to_stop(place, Holder(owner="one before", command="c", process=ELSEWHERE, since="s"))
    time.sleep(0.3)
    assert not lock.stop_asked()
    lock.ask_to_stop(place, read_holder(place))
    deadline = time.monotonic() + 5
    while not lock.stop_asked() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert lock.stop_asked()
    first.release()
    assert files.list_files(place) == []
    taken(place)
    assert not lock.stop_asked()


CONTENDER = """
import sys, time
from hydra_pipe.storage import lock
from hydra_pipe.storage.lock import RunLock
lock.LOOK_SECONDS = 0.005
place, counter, times, die = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "die"
for k in range(times):
    one = RunLock(place, "hydra-pipe contend")
    one.acquire(wait=True)
    with open(counter, "r+") as file:  # two at a time would lose a count, or see each other
        text = file.read()
        assert not text.endswith("in"), text
        file.write("in"); file.flush()
        time.sleep(0.002)
        file.seek(0); file.truncate(); file.write(str(int(text) + 1)); file.flush()
    if die and k == times - 1:
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    one.release()
"""


def test_many_processes_contend_and_some_are_killed_holding_it(tmp_path):
    place, counter = str(tmp_path / "run"), tmp_path / "counter"
    counter.write_text("0")
    started = [
        subprocess.Popen(
            [sys.executable, "-c", CONTENDER, place, str(counter), "15", "die" if k % 2 else "live"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for k in range(6)
    ]
    ends = [(one.communicate(timeout=120)[1], one.returncode) for one in started]
    assert [code for _, code in ends] == [0, -signal.SIGKILL] * 3, ends
    assert counter.read_text() == str(6 * 15)
    assert not [name for name in files.list_files(place) if name != layout.LOCK]


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.sampled_from(["create", "swap", "remove", "read"])), max_size=30
    ),
    st.booleans(),
)
def test_the_file_is_changed_only_by_who_has_seen_what_it_says(tmp_path_factory, steps, local):
    """Three users, in any order: as a register with compare-and-swap."""
    name = f"lock-{time.monotonic_ns()}"
    uri = str(tmp_path_factory.getbasetemp() / name) if local else f"memory://{name}/lock"
    users = [lock_file.lock_file(uri) for _ in range(3)]
    seen: list[lock_file.Seen | None] = [None] * 3
    holds: bytes | None = None
    for number, (user, act) in enumerate(steps):
        data = f"{user} {number}".encode()
        had = seen[user]
        if act == "create":
            made = users[user].create(data)
            assert (made is not None) == (holds is None)
            if made is not None:
                holds, seen[user] = data, made
        elif act == "read":
            found = users[user].read()
            assert (None if found is None else found.data.rstrip()) == holds
            seen[user] = found
        elif had is not None:
            right = holds is not None and had.data.rstrip() == holds
            if act == "swap":
                made = users[user].swap(data, had)
                assert (made is not None) == right
                holds, seen[user] = (data, made) if made is not None else (holds, had)
            else:
                assert users[user].remove(had) == right
                holds = None if right else holds

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hydra_pipe.pipeline.executors import events
from hydra_pipe.pipeline.executors.ray import make_executor
from hydra_pipe.pipeline.executors.serial import SerialExecutor
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage.errors import (
    NonFiniteLoss,
)

from tests.faults import Count, FaultPlan, Faulty, OddError, Recorder, totals, units

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
def count(tmp_path: Path) -> Count:
    return Count(directory=str(tmp_path))


def test_serial_runs_in_order_and_reports(count: Count, recorder: Recorder) -> None:
    executor = make_executor(RunSpec(executor="serial"))
    results = executor.run("test", units(3), count, recorder)
    assert list(results) == ["unit-0", "unit-1", "unit-2"]
    assert totals(results) == {"unit-0": 10, "unit-1": 11, "unit-2": 12}
    assert [event.unit for event in recorder.of(events.UnitFinished)] == list(results)
    assert recorder.of(events.UnitProgress)[-1] == events.UnitProgress(
        stage="test", unit="unit-2", done=4, total=4
    )
    assert executor.slots == executor.capacity().slots == 1
    assert executor.capacity().memory_per_worker > 0


def test_serial_progress_is_thinned_by_the_clock(tmp_path: Path, recorder: Recorder) -> None:
    executor = SerialExecutor(clock=lambda: 0.0)
    executor.run("test", units(1), Count(directory=str(tmp_path), steps=50, pause=0), recorder)
    assert [event.done for event in recorder.of(events.UnitProgress)] == [1, 50]


@pytest.mark.parametrize(
    ("action", "kind", "text"),
    [("raise:mine", ValueError, "mine"), ("hydra:nan", NonFiniteLoss, "nan"), ("odd", OddError, "one")],
)
def test_serial_lets_errors_through(
    count: Count, tmp_path: Path, action: str, kind: type[Exception], text: str
) -> None:
    plan = FaultPlan(directory=str(tmp_path), script={"unit-1": [action]})
    with pytest.raises(kind, match=text) as caught:
        SerialExecutor().run("test", units(3), Faulty(plan=plan, handler=count), events.null)
    assert type(caught.value) is kind
    assert plan.attempts("unit-1") == 1
    assert plan.attempts("unit-2") == 0


def test_a_killed_serial_run_goes_on_where_it_stood(tmp_path: Path) -> None:
    script = {"unit-1": ["kill@2", "kill-after"], "unit-2": ["kill"]}
    program = f"""
        from tests.faults import *
        from hydra_pipe.pipeline.executors.serial import SerialExecutor
        from hydra_pipe.pipeline.executors.events import null
        plan = FaultPlan(directory={str(tmp_path)!r}, script={script!r})
        handler = Faulty(plan=plan, handler=Count(directory={str(tmp_path)!r}))
        todo = [u for u in units(3) if not Path({str(tmp_path)!r}, u.name + ".done").exists()]
        SerialExecutor().run("test", todo, handler, null)
    """
    codes: list[int] = []
    while not codes or codes[-1] != 0:
        command = [sys.executable, "-c", textwrap.dedent(program)]
        codes.append(subprocess.run(command, cwd=ROOT, check=False).returncode)
    # The second attempt of unit-1 had committed before it was killed: it is not done a third time.
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, -signal.SIGKILL, 0]
    plan = FaultPlan(directory=str(tmp_path))
    assert [plan.attempts(f"unit-{n}") for n in range(3)] == [1, 2, 2]


def test_serial_needs_no_ray() -> None:
    program = (
        "import sys; from hydra_pipe.pipeline.executors.ray import make_executor; "
        "from hydra_pipe.pipeline.spec.spec import RunSpec; make_executor(RunSpec(executor='serial')).capacity(); "
        "make_executor(RunSpec()); assert 'ray' not in sys.modules and 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)

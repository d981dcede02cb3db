"""Guards: what digests, manifests, the lock, a run's identity and the law cost a clean run, in processor seconds.

Whole runs scatter by more than that. So the time within these modules is taken itself, in every thread, during one
run in this process: of each thread's outermost call, everything below it included, reading and hashing files too.
"""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any
from unittest import mock

from hydra_pipe.pipeline.drive import replay as driven
from hydra_pipe.pipeline.plan import survey
from hydra_pipe.pipeline.run import run as drive
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage.ledger import Ledger
from hydra_pipe.storage.lock import RunLock
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.workers.recursion.conservation import RowSums

from .report import Result

SIZES: Mapping[str, Any] = {"recipe": "digits", "shards": 8, "epochs": None, "rounds": 3, "threads": 1}
QUICK: Mapping[str, Any] = {**SIZES, "shards": 2, "epochs": 1, "rounds": 1}

GUARDS: Mapping[str, tuple[tuple[Any, Sequence[str]], ...]] = {
    "manifests, digests, seals": ((Ledger, ()), (RunDirectory, ())),
    "the lock": ((RunLock, ()),),
    "what the run is made of": ((survey, ("made_of",)),),
    "the conservation law": ((RowSums, ()), (driven, ("trust_of",))),
}
"""By what they do: classes, all of whose methods are meant, and modules with names that they call functions by."""


class Meter:
    """Takes the processor time of calls, each thread's outermost ones.

    Attributes:
        seconds: By what was called.
        calls: Outermost ones.
    """

    def __init__(self) -> None:
        self.seconds, self.calls = dict.fromkeys(GUARDS, 0.0), dict.fromkeys(GUARDS, 0)
        self._within, self._adding = threading.local(), threading.Lock()

    def timed(self, what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function, which notes its time."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._within, "any", False):
                return function(*args, **kwargs)
            self._within.any, begun = True, time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._within.any = False
                with self._adding:
                    self.seconds[what] += time.thread_time() - begun
                    self.calls[what] += 1

        return call

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note the time of every method of `GUARDS` while this lasts."""
        with ExitStack() as stack:
            for what, owners in GUARDS.items():
                for owner, names in owners:
                    for name, function in list(vars(owner).items()):
                        if isinstance(function, FunctionType) and (not names or name in names):
                            stack.enter_context(mock.patch.object(owner, name, self.timed(what, function)))
            yield


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Measure clean runs."""
    result, shares, out = Result(name="guards", sizes=sizes), list[float](), folder / "guards"
    seconds: dict[str, list[float]] = {what: [] for what in (*GUARDS, "the whole run")}
    meter = Meter()
    for number in range(sizes["rounds"] + 1):
        shutil.rmtree(out, ignore_errors=True)
        meter, begun = Meter(), time.process_time()
        with meter.listening():
            drive(
                RunSpec(
                    recipe=sizes["recipe"],
                    out=str(out),
                    executor="serial",
                    device="cpu",
                    shards=sizes["shards"],
                    epochs=sizes["epochs"],
                    threads=sizes["threads"],
                )
            )
        whole, guarded = time.process_time() - begun, sum(meter.seconds.values())
        if number == 0:  # a process does much for the first time
            continue
        shares.append(guarded / (whole - guarded))
        for what, taken in {**meter.seconds, "the whole run": whole}.items():
            seconds[what].append(taken)
    for what, taken_each in seconds.items():
        note = f"{meter.calls[what]:,} calls" if what in meter.calls else ""
        result.add(what, taken_each, "s", note=note)
    result.add("guards / all the rest", shares, "", at_most=0.05)
    return result

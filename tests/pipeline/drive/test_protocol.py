"""The protocol of a run, tried at random: a reader never returns what nobody computed, and doing it again repairs.

Three toy stages on the real run directory and the real runner: a record, two shards made from it, two tables made
from both shards. Files are damaged, swapped, deleted and brought back from earlier, manifests are copied and
deleted, the record is made again with other numbers, in any order. What a reader gives must be what follows from
the record that is there; or it refuses.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra_pipe.pipeline.drive.stages import Runner, Stage, run_stage
from hydra_pipe.pipeline.executors.base import Unit
from hydra_pipe.pipeline.executors.events import null
from hydra_pipe.storage.errors import HydraError
from hydra_pipe.storage.files import write_bytes
from hydra_pipe.storage.rundir import RunDirectory
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

STAGES = ("record", "hydra/replay", "hydra/reduce")
UNITS = {
    "record": ("trajectory",),
    "hydra/replay": ("shard-0", "shard-1"),
    "hydra/reduce": ("rows-0", "rows-1"),
}
FILES = {
    "trajectory": ("trajectory.zarr/batches/c/0", "trajectory.zarr/loss/c/0"),
    "shard-0": ("hypergradients/method=hydra.zarr/hypergradient/c/0",),
    "shard-1": ("hypergradients/method=hydra.zarr/hypergradient/c/1",),
    "rows-0": ("contributions/method=hydra/part-0.parquet", "samples/method=hydra/part-0.parquet"),
    "rows-1": ("contributions/method=hydra/part-1.parquet", "samples/method=hydra/part-1.parquet"),
}
ALL_FILES = [name for names in FILES.values() for name in names]
ALL_UNITS = [(stage, unit) for stage in STAGES for unit in UNITS[stage]]


def computed(name: str, sources: Sequence[bytes]) -> bytes:
    """Return the only right content of a file made from others; all have one size, so that no size tells."""
    return hashlib.sha256(name.encode() + b"".join(sources)).digest()


def flip(path: Path, at: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << (at % 8)
    path.write_bytes(bytes(data))


def right(version: int) -> dict[str, bytes]:
    """Return what every file of a run holds whose record is of a version."""
    found: dict[str, bytes] = {}
    for stage, above in zip(STAGES, (None, *STAGES), strict=False):
        sources = (
            [str(version).encode()] if above is None else [found[n] for u in UNITS[above] for n in FILES[u]]
        )
        for unit in UNITS[stage]:
            found |= {name: computed(name, sources) for name in FILES[unit]}
    return found


@dataclass(frozen=True, kw_only=True)
class Work:
    """Does a unit as handlers do: reads by manifests, writes, commits with what it read."""

    run: RunDirectory
    version: int

    def __call__(self, unit: Unit, report: Callable[[int, int], None]) -> dict[str, Any]:
        run = RunDirectory(self.run.uri)
        reading = run.ledger.remember()
        if unit.stage == "record":
            sources = [str(self.version).encode()]
        else:
            above = STAGES[STAGES.index(unit.stage) - 1]
            sources = [run.vouched(run.path(name)) for one in UNITS[above] for name in FILES[one]]
        for name in FILES[unit.name]:
            write_bytes(run.path(name), computed(name, sources))
        run.commit(unit.stage, unit.name, list(FILES[unit.name]), {"seconds": 0.1}, reading)
        return {}


class InThisProcess:
    """An executor without anything around it."""

    slots = 1

    def run(
        self, stage: str, units: Sequence[Unit], handler: Any, observer: Any, **_: Any
    ) -> Mapping[str, Any]:
        return {unit.name: handler(unit, lambda done, total: None) for unit in units}


class Protocol(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.place = Path(tempfile.mkdtemp(prefix="hydra-pipe-protocol-"))
        self.directory = RunDirectory(str(self.place / "run"))
        self.directory.update(lambda noted: {})
        self.version = self.recorded = self.latest = 0
        self.kept: list[tuple[str, str, int, bytes, dict[str, bytes]]] = []
        self._drive(STAGES)
        self._keep()
        self.record_other_numbers()
        self._drive(STAGES)
        self._keep()

    def teardown(self) -> None:
        shutil.rmtree(self.place)

    # ------------------------------------------------------------------ what a run does

    @rule()
    def repair(self) -> None:
        self._drive(STAGES)
        assert self._read() == {
            n: c for n, c in right(self.recorded).items() if n.startswith(("contrib", "samples"))
        }
        for stage, unit in ALL_UNITS:
            manifest = RunDirectory(self.directory.uri).manifest(stage, unit)
            assert manifest is not None
            assert self.directory.check(manifest, digests=True) == []

    @rule(stage=st.sampled_from(STAGES[1:]), lost=st.booleans())
    def do_one_stage(self, stage: str, lost: bool) -> None:
        if lost:
            self.directory.drop(stage)
        with contextlib.suppress(HydraError):  # what it needs is damaged: told, and nothing is committed
            self._drive((stage,))

    @rule()
    def record_other_numbers(self) -> None:
        """Make the record again with another outcome, and be killed before anything else is done."""
        self.latest += 1
        self.version = self.latest
        self.directory.drop("record", "trajectory")
        self._drive(("record",))

    @rule(which=st.sampled_from(ALL_UNITS))
    def do_again_with_the_same_bits(self, which: tuple[str, str]) -> None:
        """Lose a manifest: the unit is done again, and nothing made from it is, where its inputs are sound."""
        self._drive(STAGES)
        before = {one: self._manifest(*one).read_bytes() for one in ALL_UNITS}
        self.directory.drop(*which)
        self._drive(STAGES)
        assert {one: self._manifest(*one).read_bytes() for one in ALL_UNITS} == before

    # ------------------------------------------------------------------ what befalls it

    @rule(
        how=st.sampled_from(("flip", "flip", "delete", "swap", "swap", "stray")),
        one=st.sampled_from(ALL_FILES),
        other=st.sampled_from(ALL_FILES),
        at=st.integers(0, 31),
    )
    def damage(self, how: str, one: str, other: str, at: int) -> None:
        path, second = self._path(one), self._path(other)
        if not (path.exists() and second.exists()):
            return
        if how == "flip":
            flip(path, at)
        elif how == "delete":
            path.unlink()
        elif how == "swap":
            data = path.read_bytes()
            path.write_bytes(second.read_bytes())
            second.write_bytes(data)
        else:
            for ending in (".bak", "~", "0.parquet"):
                shutil.copy(path, f"{path}{ending}")

    @rule(
        how=st.sampled_from(("lose", "copy", "flip")),
        one=st.sampled_from(ALL_UNITS),
        other=st.sampled_from(ALL_UNITS),
        at=st.integers(0, 10_000),
    )
    def damage_manifest(self, how: str, one: tuple[str, str], other: tuple[str, str], at: int) -> None:
        path, second = self._manifest(*one), self._manifest(*other)
        if not (path.exists() and second.exists()):
            return
        if how == "flip":
            flip(path, at)
        elif how == "lose":
            path.unlink()
        else:
            second.write_bytes(path.read_bytes())

    @rule(choice=st.integers(0, 2 * len(ALL_UNITS) - 1), whole=st.booleans())
    def bring_back(self, choice: int, whole: bool) -> None:
        """Restore a unit from a backup of the run, or its files alone."""
        stage, unit, version, manifest, data = self.kept[choice]
        for name, content in data.items():
            self._path(name).write_bytes(content)
        if whole:
            self._manifest(stage, unit).write_bytes(manifest)
            if stage == "record":
                self.recorded = self.version = version  # the same numbers come out where it is done again

    # ------------------------------------------------------------------ what a reader gets

    @invariant()
    def what_is_read_is_right(self) -> None:
        try:
            found = self._read()
        except HydraError:
            return  # refused, which is always right
        expected = [right(version) for version in self._versions()]
        assert any(all(one[name] == content for name, content in found.items()) for one in expected)

    def _versions(self) -> Sequence[int]:
        """Return of which records tables may be: of any one where no record is there that they could be held against."""
        with contextlib.suppress(HydraError):
            if RunDirectory(self.directory.uri).manifest("record", "trajectory") is not None:
                return [self.recorded]
        return range(self.latest + 1)

    def _read(self) -> dict[str, bytes]:
        """Read the tables as `Reader.contributions` does."""
        run = RunDirectory(self.directory.uri)
        units = run.ledger.readable("hydra/reduce")
        why = run.ledger.outdated(units)
        if why:
            raise HydraError(why)
        entries = [
            e for kind in ("contributions", "samples") for e in run.ledger.listed(f"{kind}/method=hydra")
        ]
        run.ledger.trust(entries)
        return {entry.path: self._path(entry.path).read_bytes() for entry in entries}

    def _keep(self) -> None:
        for stage, unit in ALL_UNITS:
            data = {name: self._path(name).read_bytes() for name in FILES[unit]}
            self.kept.append((stage, unit, self.recorded, self._manifest(stage, unit).read_bytes(), data))

    def _drive(self, stages: Sequence[str]) -> None:
        runner = Runner(directory=self.directory, executor=InThisProcess(), observer=null)  # type: ignore[arg-type]
        for name in stages:
            done = run_stage(
                runner,
                Stage(
                    name=name,
                    units=[Unit(stage=name, name=unit) for unit in UNITS[name]],
                    handler=lambda: Work(run=self.directory, version=self.version),
                    total=0,
                    label="",
                    closing=False,
                ),
            )
            if name == "record" and done:
                self.recorded = self.version

    def _path(self, name: str) -> Path:
        return Path(self.directory.path(name))

    def _manifest(self, stage: str, unit: str) -> Path:
        return Path(self.directory.manifest_path(stage, unit))


TestProtocol = Protocol.TestCase
TestProtocol.settings = settings(
    max_examples=40,
    stateful_step_count=12,
    deadline=None,
    suppress_health_check=list(HealthCheck),
    derandomize=True,
)

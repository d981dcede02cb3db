"""A replay in units of shards and segments of steps: the rows of one replay, whatever is killed, damaged or cut."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra_pipe.pipeline.drive import segments as driving
from hydra_pipe.pipeline.executors.ray import RayExecutor
from hydra_pipe.pipeline.opened_run import Run, open_run
from hydra_pipe.pipeline.plan.plan import cut
from hydra_pipe.pipeline.plan.survey import survey
from hydra_pipe.pipeline.reading.kept_rows import store_losses
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.pipeline.units.segments import AddWork, SegmentWork
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage import layout
from hydra_pipe.storage.errors import IncompleteStage, ReplayDiverged, SpecMismatch
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.storage.trajectory import Trajectory
from hydra_pipe.workers.training.borders import cut_at, wanted_borders
from hydra_pipe.workers.training.training import Compute, Training
from hydra_pipe.workers.training.verified import VerifiedReplay

from tests.end_to_end.support import Heard, assert_same_bits, cli, numbers, serial
from tests.faults import FaultPlan, spoiled
from tests.pipeline.plan.test_plan import machines
from tests.recipes import BatchNormed, Images, Small

EXACT = {"dtype": "float64", "visits": "off"}


class Clipped(Small):
    """AdamW, most of whose steps are clipped, two batches a step: states, groups and what rows leave out."""

    clip_grad_norm, accumulate = 0.5, 2

    def optimizer(self, model: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=1e-2)


def rows(found: Run) -> np.ndarray:
    return found.hypergradients(found.methods()[0])[:]


def off(found: np.ndarray, right: np.ndarray) -> float:
    return float(np.abs(found - right).max() / np.abs(right).max())


def told(found: Run) -> list[str]:
    """What `verify` says, after it found nothing wrong."""
    seen = verify(found)
    assert seen.ok, seen.problems
    return [*seen.notes]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return serial(tmp_path_factory.mktemp("one") / "run", Small(), **EXACT)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return serial(tmp_path_factory.mktemp("four") / "run", Small(), segments=4, **EXACT)


# ---------------------------------------------------------------------- numbers


def test_segments_give_the_rows_of_one_replay(one, four):
    assert off(rows(four), rows(one)) < 1e-12
    for column in ("contribution", "contribution_std"):
        assert np.allclose(four.samples()[column], one.samples()[column], rtol=1e-12, atol=0)
    assert told(four) == []
    assert verify(four).conservation["ok"]
    # Training is the same, and so is what others see of its checkpoints.
    mine, theirs = four.trajectory(), one.trajectory()
    assert mine.digest.tolist() == theirs.digest.tolist()
    assert mine.checkpoint_steps.tolist() == theirs.checkpoint_steps.tolist()


def test_the_sums_are_gone_once_they_are_added_up(four):
    assert not Path(four.uri, layout.PARTIAL_SUMS).exists()
    directory = RunDirectory(four.uri)
    assert directory.units("hydra/segments") == []
    for manifest in directory.manifests("hydra/replay"):
        if manifest.unit != "index":
            assert manifest.values["segments"] == 4
            made_from = {name.rpartition("/")[0] for name in manifest.inputs}
            assert made_from == {"record", "hydra/ways", "hydra/replay"}


def test_a_file_among_sums_that_are_gone_is_a_stray(four, tmp_path):
    out = Path(shutil.copytree(four.uri, tmp_path / "run"))
    stray = layout.partial_sums("hydra", "shard-00000-segment-00009") + "/zarr.json"
    (out / stray).parent.mkdir(parents=True)
    (out / stray).write_text("{}")
    assert f"{stray}: no manifest lists this file; remove it" in verify(open_run(out)).problems


def test_shards_change_no_bit(four, tmp_path):
    other = serial(tmp_path / "run", Small(), segments=4, shards=2, **EXACT)
    assert_same_bits(numbers(other.uri, shard=False), numbers(four.uri, shard=False))
    assert set(other.samples()["shard"].to_pylist()) == {0, 1}
    assert told(other) == []


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        (Clipped(), {"segments": 3, "shards": 2}),  # a law with a rest, steps of two batches
        (Images(), {"segments": 4}),  # dropout, segments inside an epoch
        (BatchNormed(), {"segments": 3}),  # running statistics
        (Small(), {"segments": 3, "hessian": "ekfac", "curvature_core": 8}),
        (Small(), {"segments": 6, "track": "2"}),  # segments that visit nobody
    ],
)
def test_forms_and_recipes_agree_with_one_segment(recipe, fields, tmp_path):
    many = serial(tmp_path / "many", recipe, **EXACT, **fields)
    right = serial(tmp_path / "one", recipe, **EXACT, **{**fields, "segments": 1})
    assert off(rows(many), rows(right)) < 1e-12
    assert told(many) == []
    law = verify(many).conservation
    assert law["ok"] if law["applicable"] else law["reason"]


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        (Small(), {"project": 40}),
        (Small(), {"layers": ("*.weight",), "shards": 2}),
        (Small(), {"project": 40, "hessian": "ekfac", "curvature_core": 8}),
        (Small(), {"layers": ("0",), "hessian": "ekfac", "curvature_core": 8}),
        (Clipped(), {"project": 40, "layers": ("*.weight",)}),  # a law with a rest of kept parameters
        (Clipped(), {"layers": ("*.weight",)}),  # picked from rows that clipping mixed
        (Images(), {"project": 100, "store_dtype": "bfloat16"}),
        (Small(), {"store_dtype": "float16", "dtype": "float32"}),
        (Small(), {"project": 40, "track": "2"}),  # segments that visit nobody
    ],
    ids=lambda value: (
        type(value).__name__ if not isinstance(value, dict) else ",".join(map(str, value.values()))
    ),
)
def test_rows_that_are_kept_in_part_are_those_of_one_segment(recipe, fields, tmp_path):
    fields = {**EXACT, **fields}
    many = serial(tmp_path / "many", recipe, segments=3, **fields)
    right = serial(tmp_path / "one", recipe, **fields)
    narrow = {"bfloat16": 2**-7, "float16": 2**-9}.get(fields.get("store_dtype", ""), 1e-12)
    assert rows(many).shape == rows(right).shape
    assert off(rows(many), rows(right)) < narrow
    assert told(many) == told(right)
    assert verify(many).conservation.get("ok") == verify(right).conservation.get("ok")
    lost, known = (store_losses(found) for found in (many, right))
    assert len(lost) == len(known) == ("project" in fields or "store_dtype" in fields)
    for mine, theirs in zip(lost, known, strict=True):
        assert mine.rows == theirs.rows
        assert mine.error == pytest.approx(theirs.error, rel=2e-2)
        assert mine.spearman_mean == pytest.approx(theirs.spearman_mean, abs=2e-2)


def test_sums_of_projected_rows_are_as_short_as_the_rows(tmp_path):
    spec = RunSpec(
        recipe=Images(), out=str(tmp_path), executor="serial", device="cpu", segments=3, project=100, **EXACT
    )
    surveyed = survey(spec, trial=False)
    folded, whole = (
        cut(one, surveyed_of, machines(slots=3)).segments
        for one, surveyed_of in (
            (spec, surveyed),
            (replace(spec, project=None), replace(surveyed, row_map=None, outer=())),
        )
    )
    assert surveyed.columns <= 100 < surveyed.dimension
    assert folded.buffers * surveyed.dimension == whole.buffers * surveyed.columns


def test_several_seeds_have_segments_each(tmp_path):
    fields = {"seeds": 2, "epochs": 1, **EXACT}
    many = serial(tmp_path / "many", Small(), segments=2, **fields)
    right = serial(tmp_path / "one", Small(), **fields)
    found, wanted = (r.samples("hydra-seeds2")["contribution"].to_numpy() for r in (many, right))
    assert off(found, wanted) < 1e-12
    assert told(many) == []


# ---------------------------------------------------------------------- a state at every border


def test_a_segment_must_end_where_the_next_begins(four, monkeypatch):
    trajectory = four.trajectory()
    training = Training(Small(), Compute(dtype="float64", device="cpu"))
    (first, stop), *_ = cut_at(trajectory.stands, 4)
    VerifiedReplay(training, trajectory, np.arange(3)).segment(first, stop)
    true = Trajectory.at

    def at(self: Trajectory, step: int) -> Any:
        kept = true(self, step)
        return replace(kept, momentum=kept.momentum * (1 + 1e-15)) if step == stop else kept

    monkeypatch.setattr(Trajectory, "at", at)
    training = Training(Small(), Compute(dtype="float64", device="cpu"))
    with pytest.raises(ReplayDiverged, match=f"momentum after {stop} steps are not those of the checkpoint"):
        VerifiedReplay(training, trajectory, np.arange(3)).segment(first, stop)


def test_borders_lie_where_segments_are_equal():
    kept = list(range(0, 1001, 50))
    assert wanted_borders(1000, 4, kept) == []
    assert wanted_borders(1000, 8, kept) == [125, 375, 625, 875]
    stands = sorted({*kept, *wanted_borders(1000, 8, kept)})
    assert cut_at(stands, 8) == [(k * 125, (k + 1) * 125) for k in range(8)]
    assert cut_at([0, 10], 5) == [(0, 10)]
    assert cut_at([0, 4, 10], 3) == [(0, 4), (4, 10)]
    assert cut_at(list(range(6)), 99) == [(k, k + 1) for k in range(5)]


def test_a_record_that_was_made_without_them_has_fewer_borders(tmp_path):
    fields = {"checkpoint_every": 7, **EXACT}
    notes: list[str] = []
    serial(tmp_path / "right", Small(), **fields)
    out = tmp_path / "run"
    asked = RunSpec(recipe=Small(), out=str(out), executor="serial", device="cpu", **fields)
    run(asked, stages=("record",))
    run(replace(asked, segments=9), observer=lambda event: notes.append(getattr(event, "message", "")))
    assert off(rows(open_run(out)), rows(open_run(tmp_path / "right"))) < 1e-12
    (said,) = [note for note in notes if "segments" in note]
    assert "keeps 4 states, which make 3 segments of at most 7 steps where 9 were asked for" in said


# ---------------------------------------------------------------------- killed, damaged, asked otherwise


class Killed(KeyboardInterrupt):
    """Passes everything that handles errors, as if the process ended."""


def killed(monkeypatch: pytest.MonkeyPatch, kind: Any, unit: str) -> None:
    true = kind.do

    def do(self: Any, run: RunDirectory, one: Any, report: Any) -> Any:
        if one.name == unit:
            raise Killed
        return true(self, run, one, report)

    monkeypatch.setattr(kind, "do", do)


@pytest.fixture(scope="module")
def left(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed when all segments were done and one block of rows was added up."""
    out = tmp_path_factory.mktemp("left") / "run"
    with pytest.MonkeyPatch.context() as patch:
        killed(patch, AddWork, "rows-00001")
        with pytest.raises(Killed):
            serial(out, Small(), segments=4, **EXACT)
    return out


@pytest.fixture
def between(left: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(left, tmp_path / "run"))


def again(out: Path, **fields: Any) -> Heard:
    heard = Heard()
    asked = {"executor": "serial", "device": "cpu", "segments": 4, **EXACT, **fields}
    run(RunSpec(recipe=Small(), out=str(out), **asked), observer=heard)
    return heard


def test_killed_while_segments_are_done(four, tmp_path, monkeypatch):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        killed(patch, SegmentWork, "shard-00000-segment-00002")
        with pytest.raises(Killed):
            serial(out, Small(), segments=4, **EXACT)
    assert "2 of 4 units committed" in " ".join(told(open_run(out)))
    shown = cli("status", out).output
    assert [line.split()[1:3] for line in shown.splitlines() if "hydra/segments" in line] == [
        ["partial", "2/4"]
    ]
    with pytest.raises(IncompleteStage):
        open_run(out).hypergradients("hydra")
    heard = again(out)
    done = [unit for stage, unit in heard.done if stage == "hydra/segments"]
    assert done == ["shard-00000-segment-00002", "shard-00000-segment-00003"]
    assert_same_bits(numbers(out), numbers(four.uri))
    assert told(open_run(out)) == []


def test_killed_while_rows_are_added_up(between, four):
    assert told(open_run(between))
    heard = again(between)
    assert {stage for stage, _ in heard.done} == {"hydra/replay", "hydra/reduce"}
    assert ("hydra/replay", "rows-00000") not in heard.done
    assert_same_bits(numbers(between), numbers(four.uri))


def test_killed_before_sums_are_removed(between, four, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(driving, "remove", lambda *_, **__: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            again(between)
    assert Path(between, layout.PARTIAL_SUMS).exists()
    assert not [unit for stage, unit in again(between).done if stage == "hydra/segments"]
    assert not Path(between, layout.PARTIAL_SUMS).exists()
    assert_same_bits(numbers(between), numbers(four.uri))


def test_damaged_sums_are_made_again(between, four):
    folder = Path(between, layout.partial_sums("hydra", "shard-00000-segment-00001"))
    victim = next(path for path in sorted((folder / "sums/c").rglob("*")) if path.is_file())
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    assert cli("verify", between, "--quiet").exit_code == 1
    heard = again(between)
    assert ("hydra/segments", "shard-00000-segment-00001") in heard.done
    assert_same_bits(numbers(between), numbers(four.uri))


def test_a_damaged_block_needs_its_segments_again(four, tmp_path):
    out = Path(shutil.copytree(four.uri, tmp_path / "run"))
    manifest = RunDirectory(out).manifest("hydra/replay", "rows-00002")
    victim = out / manifest.files[0].path
    victim.write_bytes(victim.read_bytes()[:-1] + b"x")
    heard = again(out)
    assert [unit for stage, unit in heard.done if stage == "hydra/replay"] == ["rows-00002"]
    assert len([unit for stage, unit in heard.done if stage == "hydra/segments"]) == 4
    assert_same_bits(numbers(out), numbers(four.uri))
    assert not Path(out, layout.PARTIAL_SUMS).exists()


def test_another_number_is_refused_and_none_is_that_of_the_run(four, tmp_path):
    out = Path(shutil.copytree(four.uri, tmp_path / "run"))
    with pytest.raises(SpecMismatch, match="segments: stored 4, asked 2"):
        again(out, segments=2)
    assert again(out, segments=None).done == []
    assert again(out, segments="auto").done == []


def test_one_cannot_become_several(one):
    with pytest.raises(SpecMismatch, match="segments: stored 1, asked 4"):
        again(Path(one.uri))


# ---------------------------------------------------------------------- Ray


@pytest.mark.ray
def test_killed_workers_change_no_bit(warm_ray, four, tmp_path, monkeypatch):
    (tmp_path / "faults").mkdir()
    plan = FaultPlan(
        directory=str(tmp_path / "faults"),
        script={
            "shard-00000-segment-00001": ["kill@2"],
            "shard-00001-segment-00003": ["kill-after"],
            "rows-00001": ["kill"],
        },
    )
    monkeypatch.setattr(RayExecutor, "run", spoiled(RayExecutor.run, plan))
    fields = {"executor": "ray", "address": warm_ray, "workers": 2, "shards": 2, "segments": 4}
    found = serial(tmp_path / "run", Small(), **EXACT, **fields)
    assert [plan.attempts(name) for name in plan.script] == [2, 2, 2]
    assert_same_bits(numbers(found.uri, shard=False), numbers(four.uri, shard=False))
    assert told(found) == []


# ---------------------------------------------------------------------- the plan


@pytest.fixture(scope="module")
def surveyed() -> Any:
    found = survey(RunSpec(recipe=Images(), executor="serial"), trial=False)
    return replace(found, steps=20_000, epochs=20, step_seconds=(0.01, 0.02))


def test_auto_keeps_every_worker_busy(surveyed):
    spec = RunSpec(recipe=Images(), executor="serial", segments="auto")
    for slots in (1, 8, 64, 1000):
        plan = cut(spec, surveyed, machines(slots))
        assert (plan.segments.count, len(plan.shards)) == (slots, 1)
        one = cut(replace(spec, segments=1), surveyed, machines(slots))
        # One replay in shards trains once a shard: more workers share only the work of rows.
        assert plan.seconds["replay"] <= one.seconds["replay"]
    shown = plan.as_dict()
    assert shown["run"]["units of the replay"] == 1000
    assert shown["disk"]["sums of segments, until added up"] == plan.segments.bytes > 0


def test_a_number_that_is_asked_for_is_taken(surveyed):
    spec = RunSpec(recipe=Images(), executor="serial", segments=4)
    assert len(cut(spec, surveyed, machines(8)).shards) == 2  # eight workers, eight units
    plan = cut(replace(spec, shards=1), surveyed, machines(8))
    assert [len(plan.shards), plan.segments.count] == [1, 4]
    blocks = plan.collected
    assert blocks[0].start == 0
    assert blocks[-1].stop == plan.n_tracked
    assert all(a.stop == b.start for a, b in itertools.pairwise(blocks))


@pytest.mark.parametrize(
    ("fields", "why"), [({"mode": "adjoint"}, "--mode adjoint"), ({"hessian": "exact"}, "exact")]
)
def test_what_carries_vectors_has_one_segment_and_says_so(surveyed, fields, why):
    plan = cut(RunSpec(recipe=Images(), executor="serial", segments=8, **fields), surveyed, machines(8))
    assert plan.segments.count == 1
    (warning,) = plan.warnings
    assert "--segments 8 is not followed with" in warning
    assert why in warning

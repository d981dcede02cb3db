"""Several seeds: whole runs inside the first, their average and its spread; resumed, refused, read back."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from hydra_pipe.cli import main
from hydra_pipe.pipeline.analysis.export import export
from hydra_pipe.pipeline.analysis.status import status
from hydra_pipe.pipeline.analysis.summary import summary
from hydra_pipe.pipeline.compare.compare import compare, seconds
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.evaluate.evaluate import Questions, evaluate
from hydra_pipe.pipeline.executors import events
from hydra_pipe.pipeline.plan.plan import make_plan
from hydra_pipe.pipeline.units.average import AverageWork
from hydra_pipe.pipeline.units.work import Work
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.contributions import write_table
from hydra_pipe.storage.errors import (
    IncompleteStage,
    InputError,
    NonFiniteLoss,
    RecipeError,
    SpecError,
    SpecMismatch,
)
from hydra_pipe.storage.schemas import SAMPLES, SAMPLES_SPREAD
from hydra_pipe.workers.training.same_data import check_same_data, data_digests
from torch.utils.data import TensorDataset

from hydra_pipe import RunSpec, open_run, run
from tests.recipes import Augmented, Images, Plateau, Small, gaussian


class Heard(list):
    def done(self):
        return [(event.stage, event.unit) for event in self if isinstance(event, events.UnitFinished)]

    def notes(self):
        return [event.message for event in self if isinstance(event, events.Note)]


def spec(out, recipe=None, **changes):
    values = {"executor": "serial", "device": "cpu", "epochs": 1, "track": "20", "test": "7", "shards": 2}
    return RunSpec(recipe=recipe or Small(), out=str(out), **{**values, **changes})


def pairs(found, method, column="contribution"):
    """(train, test) numbers, rows and columns ascending."""
    data = found.spread(method) if column == "contribution_spread" else found.contributions(method)
    table = data.to_table().to_pandas()
    return table.pivot_table(index="train_index", columns="test_index", values=column).to_numpy()


def bits(place, method):
    """Everything a method wrote, by file."""
    kinds = ("contributions", "samples", "interclass", "contributions_spread", "samples_spread")
    return {
        str(path.relative_to(place)): path.read_bytes()
        for kind in kinds
        for path in sorted((Path(place) / kind / f"method={method}").glob("*.parquet"))
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Small with seeds 3, 4 and 5; copied by tests that change it."""
    out = tmp_path_factory.mktemp("seeds") / "run"
    run(spec(out, seeds=3))
    return out


@pytest.fixture
def place(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "run"))


# ---------------------------------------------------------------- the numbers


def check_average(found, source, seeds):
    members = [found, *(found.members()[seed] for seed in seeds[1:])]
    each = np.stack([pairs(m, source).astype(np.float32).astype(np.float64) for m in members])
    name = f"{source}-seeds{len(seeds)}"
    mean = pairs(found, name)
    assert np.array_equal(mean.astype(np.float32), each.mean(0).astype(np.float32))
    spread = pairs(found, name, "contribution_spread")
    assert np.array_equal(spread.astype(np.float32), each.std(0, ddof=1).astype(np.float32))
    assert (each.std(0) > 0).all()  # other seeds are other trainings
    samples = found.samples(name)
    assert np.allclose(samples["contribution"].to_numpy(), each.mean(0).mean(1), rtol=1e-12, atol=0)
    assert np.allclose(samples["contribution_std"].to_numpy(), each.mean(0).std(1), rtol=1e-12, atol=0)
    own = np.stack([m.samples(source)["contribution"].to_numpy() for m in members])
    table = found.samples_spread(name)
    assert table["train_index"].to_pylist() == samples["train_index"].to_pylist()
    assert np.array_equal(table["contribution"].to_numpy(), own.mean(0))
    assert np.array_equal(table["contribution_spread"].to_numpy(), own.std(0, ddof=1))
    classes = found.interclass(name)
    total = (classes["contribution"].to_numpy() * classes["pairs"].to_numpy()).sum()
    assert total == pytest.approx(mean.sum(), rel=1e-5)


def test_averages_and_spreads_are_those_of_the_members(made):
    found = open_run(made)
    assert found.methods() == ["hydra", "hydra-seeds3"]
    assert found.averages("hydra-seeds3") == [3, 4, 5]
    assert found.averages("hydra") == []
    check_average(found, "hydra", [3, 4, 5])


@pytest.mark.parametrize(
    ("recipe", "options", "source"),
    [
        (Images, {"mode": "adjoint"}, "hydra"),
        (Small, {"hessian": "exact", "mode": "adjoint", "dtype": "float64"}, "hydra-exact"),
        (Small, {"hessian": "ekfac"}, "hydra-ekfac"),
        (Small, {"hessian": "ekfac", "exact_rank": 3, "mode": "adjoint"}, "hydra-ekfac-rank3"),
        (Plateau, {"track": "40%", "epochs": 3}, "hydra"),
    ],
)
def test_every_mode_and_hessian(recipe, options, source, tmp_path):
    found = run(spec(tmp_path / "r", recipe(), seeds=2, **options))
    check_average(found, source, [3, 4])
    checked = verify(found)
    assert checked.ok, checked.problems


def test_a_member_is_the_run_with_that_seed(made, tmp_path):
    run(spec(tmp_path / "alone", seed=4))
    assert bits(tmp_path / "alone", "hydra") == bits(made / "seeds" / "seed=4", "hydra")
    heard = Heard()
    shutil.copytree(made / "seeds" / "seed=4", tmp_path / "moved")
    again = run(spec(tmp_path / "moved", seed=4), observer=heard.append)  # a run like any other
    assert heard.done() == []
    assert again.info["recipe"]["seed"] == 4


def test_a_share_is_the_same_samples_for_every_seed(tmp_path):
    found = run(spec(tmp_path / "r", seeds=2, track="30%", test="50%"))
    alone = run(spec(tmp_path / "alone", seed=4, track="30%", test="50%"))
    index = found.samples("hydra")["train_index"].to_pylist()
    assert index != alone.samples("hydra")["train_index"].to_pylist()  # drawn with the seed
    for member in found.members().values():
        assert member.samples("hydra")["train_index"].to_pylist() == index
        assert np.array_equal(
            member.test_gradients().column("test_index"), found.test_gradients().column("test_index")
        )


def test_the_same_bits_for_any_shards_and_panels(made, tmp_path, monkeypatch):
    monkeypatch.setattr("hydra_pipe.pipeline.units.average.panel_width", lambda rows: 3)
    run(spec(tmp_path / "r", seeds=3, shards=1))
    assert bits(tmp_path / "r", "hydra-seeds3") == bits(made, "hydra-seeds3")


@pytest.mark.ray
def test_ray_gives_the_same_bits(made, tmp_path, warm_ray):
    heard = Heard()
    run(
        spec(tmp_path / "r", seeds=3, executor="ray", address=warm_ray, workers=1),
        observer=heard.append,
    )
    assert bits(tmp_path / "r", "hydra-seeds3") == bits(made, "hydra-seeds3")
    assert {("record", "seed-4"), ("record", "seed-5")} <= set(heard.done())


def test_blocks_of_tracked_samples(tmp_path):
    """A small budget cuts the join, and with it the average, into several units."""
    found = run(spec(tmp_path / "r", seeds=2, track="all", test="all", reduce_memory=4000))
    units = found.directory.units("hydra-seeds2/reduce")
    assert len(units) > 2, units
    check_average(found, "hydra", [3, 4])


# ---------------------------------------------------------------- resumed, extended


def test_the_same_again_does_nothing(place):
    before, heard = bits(place, "hydra-seeds3"), Heard()
    run(spec(place, seeds=3), observer=heard.append)
    assert heard.done() == []
    assert bits(place, "hydra-seeds3") == before


def test_more_seeds_do_what_is_missing(place):
    heard = Heard()
    found = run(spec(place, seeds=5), observer=heard.append)
    assert found.methods() == ["hydra", "hydra-seeds3", "hydra-seeds5"]
    assert [unit for stage, unit in heard.done() if stage == "record"] == ["seed-6", "seed-7"]
    assert sorted(found.members()) == [4, 5, 6, 7]
    check_average(found, "hydra", [3, 4, 5, 6, 7])
    assert verify(found).ok
    fewer = run(spec(place, seeds=2))
    check_average(fewer, "hydra", [3, 4])
    assert sorted(fewer.members()) == [4, 5, 6, 7]


def test_a_run_killed_again_and_again_goes_on_where_it_stood(made, tmp_path, monkeypatch):
    """5 units a seed; those of the other seeds' records come first, the average last."""
    begun: list[tuple[str, str]] = []
    heard = Heard()
    real = Work.__call__

    def killed(self, unit, report):
        begun.append((unit.stage, unit.name))
        if len(heard.done()) + 1 == failing:
            raise KeyboardInterrupt
        return real(self, unit, report)

    kills = [1, 6, 7, 8, 12, 16]
    for failing in kills:
        with monkeypatch.context() as patch:
            patch.setattr(Work, "__call__", killed)
            with pytest.raises(KeyboardInterrupt):
                run(spec(tmp_path / "r", seeds=3), observer=heard.append)
        found = status(open_run(tmp_path / "r"))
        assert found["state"] == "partial"
        assert "--seeds 3" in found["resume"]
        assert len(heard.done()) == failing - 1
    run(spec(tmp_path / "r", seeds=3), observer=heard.append)
    # Whatever was committed stays; each unit is done once, the interrupted ones were begun once more.
    assert len(heard.done()) == 16
    assert len(begun) == 15 + len(kills)  # the last unit, after the last kill, is not watched
    assert bits(tmp_path / "r", "hydra-seeds3") == bits(made, "hydra-seeds3")
    assert verify(open_run(tmp_path / "r")).ok


def test_a_damaged_member_is_done_again_and_the_average_stays(place):
    before = bits(place, "hydra-seeds3")
    lost = next((place / "seeds" / "seed=5" / "contributions" / "method=hydra").glob("*.parquet"))
    lost.write_bytes(lost.read_bytes()[:-1])
    problems = verify(open_run(place)).problems
    assert problems[0].startswith("seeds/seed=5/contributions/method=hydra/")
    heard = Heard()
    run(spec(place, seeds=3), observer=heard.append)
    assert heard.done() == [("hydra/reduce", "rows-00000")]
    assert bits(place, "hydra-seeds3") == before


def test_other_numbers_of_a_member_are_averaged_anew(place):
    member = open_run(place).members()[5]
    manifest = member.directory.manifests("hydra/reduce")[-1]
    table = member.samples("hydra")
    twice = table.set_column(3, "contribution", pa.array(2 * table["contribution"].to_numpy()))
    # As another version of the program might leave it.
    (path,) = (entry.path for entry in manifest.files if entry.path.startswith("samples/"))
    write_table(member.directory.path(*path.split("/")), twice, SAMPLES)
    files = [entry.path for entry in manifest.files]
    member.directory.commit(manifest.stage, manifest.unit, files, manifest.values)
    heard = Heard()
    run(spec(place, seeds=3), observer=heard.append)
    assert heard.done() == [("hydra-seeds3/reduce", "rows-00000")]
    assert any("averaged again" in note for note in heard.notes())


def test_another_hessian_uses_the_records_that_are_there(place):
    heard = Heard()
    found = run(spec(place, seeds=3, hessian="exact"), observer=heard.append)
    assert not any(stage in ("record", "test-gradients") for stage, _ in heard.done())
    assert found.methods() == ["hydra", "hydra-seeds3", "hydra-exact", "hydra-exact-seeds3"]
    check_average(found, "hydra-exact", [3, 4, 5])
    checked = verify(found)
    assert checked.ok, checked.problems


def test_overwrite_replaces_the_seeds_too(place):
    with pytest.raises(SpecMismatch, match="epochs"):
        run(spec(place, seeds=2, epochs=2))
    found = run(spec(place, seeds=2, epochs=2, overwrite=True))
    assert found.methods() == ["hydra", "hydra-seeds2"]
    assert sorted(found.members()) == [4]
    assert not (place / "seeds" / "seed=5").exists()
    assert verify(found).ok


def test_one_seed_again_leaves_the_average_alone(place):
    before = bits(place, "hydra-seeds3")
    found = run(spec(place))
    assert found.methods() == ["hydra", "hydra-seeds3"]
    assert bits(place, "hydra-seeds3") == before
    assert verify(found).ok
    assert status(found)["state"] == "complete"


def test_single_stages(tmp_path):
    place = tmp_path / "r"
    for stages in (["record"], ["test-gradients", "replay"]):
        run(spec(place, seeds=2), stages=stages)
        assert status(open_run(place))["state"] == "partial"
        with pytest.raises(IncompleteStage):
            open_run(place).contributions("hydra-seeds2")
    check_average(run(spec(place, seeds=2), stages=["reduce"]), "hydra", [3, 4])


# ---------------------------------------------------------------- the same data


class SeedsItsLabels(Small):
    def train_dataset(self):
        return gaussian(45, self.shape, self.classes, self.seed)


class DrawsItsData(Small):
    """From the global generator, which is seeded before the call."""

    def train_dataset(self):
        return TensorDataset(torch.randn(45, 6), torch.arange(45) % 3)


class SeedsItsTests(Small):
    def test_dataset(self):
        return gaussian(12, self.shape, self.classes, 100 + self.seed)


class SeedsItsValidation(Plateau):
    def validation_dataset(self):
        return gaussian(10, self.shape, self.classes, self.seed)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        (SeedsItsLabels, "training labels"),
        (DrawsItsData, "training samples"),
        (SeedsItsTests, "test labels"),
        (SeedsItsValidation, "validation labels"),
    ],
)
def test_data_that_change_with_the_seed_are_refused(kind, what, tmp_path):
    text = f"the {what} with seed 4 are not those with seed 3.*generator with a seed of its own"
    with pytest.raises(RecipeError, match=text):
        run(spec(tmp_path / "r", kind(), seeds=2))
    assert not (tmp_path / "r").exists()  # before anything was computed
    run(spec(tmp_path / "r", kind()), stages=["record"])  # one seed is no trouble


def test_augmentation_is_no_change_of_data():
    check_same_data(Augmented(), 9, data_digests(Augmented()))


def test_built_in_noise_does_not_follow_the_seed():
    from hydra_pipe.workers.recipes.digits import Digits

    noisy = {"label_noise": 0.3, "train_size": 120, "test_size": 20}
    check_same_data(Digits(**noisy), 1, data_digests(Digits(**noisy)))
    other = data_digests(Digits(**noisy, noise_seed=1))
    assert other["training labels"] != data_digests(Digits(**noisy))["training labels"]
    assert other["test labels"] == data_digests(Digits(**noisy))["test labels"]


def test_other_data_than_the_first_seeds_had(place, monkeypatch):
    monkeypatch.setattr(Small, "train_dataset", lambda self: gaussian(45, (6,), 3, 17))
    with pytest.raises(SpecMismatch, match=r"another specification .training samples; training labels"):
        run(spec(place, seeds=4))
    info = json.loads((place / "run.json").read_text())
    del info["document_sha256"]
    del info["made_of"]  # a run of an earlier version knows the digests of its seeds' data alone
    (place / "run.json").write_text(json.dumps(info))
    with pytest.raises(SpecMismatch, match="training labels are not those of the seeds recorded before"):
        run(spec(place, seeds=4))


# ---------------------------------------------------------------- what goes wrong


class Explodes(Small):
    """With seed 5 the loss is no number."""

    def model(self):
        model = super().model()
        if self.seed == 5:
            torch.nn.init.constant_(model[0].weight, float("nan"))
        return model


def test_a_member_that_fails_is_named_and_the_others_stay(tmp_path):
    with pytest.raises(NonFiniteLoss, match=r"^seed 5: the batch loss is"):
        run(spec(tmp_path / "r", Explodes(), seeds=4))
    found = open_run(tmp_path / "r")
    assert found.methods() == ["hydra"]
    seeds = {row["seed"]: row["state"] for row in status(found)["seeds"]}
    assert seeds == {4: "partial", 5: "partial", 6: "partial"}
    assert found.members()[4].directory.manifest("record", "trajectory") is not None
    assert found.members()[5].directory.manifest("record", "trajectory") is None
    checked = verify(found)
    assert checked.ok, checked.problems
    assert any(note.startswith("seeds/seed=5/record: 0 of 1") for note in checked.notes)
    check_average(run(spec(tmp_path / "r", Explodes(), seeds=2)), "hydra", [3, 4])


@pytest.mark.parametrize("seeds", [0, -1, 1.5, "many", True])
def test_seeds_are_counted(seeds):
    with pytest.raises(SpecError, match=r"seeds .*: must be a whole number, at least 1"):
        RunSpec(seeds=seeds)


def test_names_and_identity():
    one, five = RunSpec(), RunSpec(seeds=5, hessian="ekfac", exact_rank=4)
    assert (one.averaged, five.averaged) == ("hydra", "hydra-ekfac-rank4-seeds5")
    assert five.method == "hydra-ekfac-rank4"
    assert one.identity() == RunSpec(seeds=3).identity()


def test_a_method_of_one_seed_has_no_spread(made):
    with pytest.raises(InputError, match="is that of one seed and has no spread"):
        open_run(made).spread("hydra")
    with pytest.raises(InputError, match="has no method 'hydra-seeds9'"):
        open_run(made).samples_spread("hydra-seeds9")


def test_plan_states_all_seeds():
    values = {"recipe": Small(), "executor": "serial"}
    one, three = (make_plan(RunSpec(**values, seeds=k)) for k in (1, 3))
    assert "other seeds" not in one.disk
    average = 2 * one.disk["contributions"]
    assert three.disk["other seeds"] == 2 * one.disk["total"]
    assert three.disk["total"] == 3 * one.disk["total"] + average
    assert three.seconds["total"] == pytest.approx(1.5 * three.seconds["other seeds"], rel=1e-9)
    assert three.as_dict()["run"]["seeds"] == 3
    assert three.memory.workers["average"] > 0


# ---------------------------------------------------------------- everything that reads


def test_readers_know_averages_and_members(made, tmp_path):
    found = open_run(made)
    checked = verify(found)
    assert checked.ok, checked.problems
    assert checked.notes == ()
    assert {"contributions_spread/method=hydra-seeds3", "seeds/seed=5/contributions/method=hydra"} <= set(
        checked.rows
    )
    shown = status(found)
    assert shown["state"] == "complete"
    assert shown["methods"] == {"hydra": "complete", "hydra-seeds3": "complete"}
    assert shown["seeds"] == [{"seed": 4, "state": "complete"}, {"seed": 5, "state": "complete"}]
    places = [row["path"] for row in summary(found)["disk"]]
    assert places[-2:] == ["seeds/seed=4", "seeds/seed=5"]
    assert summary(found)["method"] == "hydra-seeds3"
    assert export(found, tmp_path / "found.csv", method="hydra-seeds3")["rows"] == 20 * 7
    spread = dict(
        zip(
            *(
                found.samples_spread("hydra-seeds3")[c].to_pylist()
                for c in ("train_index", "contribution_spread")
            ),
            strict=True,
        )
    )
    table = found.top(4, method="hydra-seeds3").to_pylist()
    assert [row["contribution_spread"] for row in table] == [spread[row["train_index"]] for row in table]
    each = pairs(found, "hydra-seeds3", "contribution_spread")
    for row in found.top(4, test=3, method="hydra-seeds3", harmful=True).to_pylist():
        assert row["contribution_spread"] == each[row["train_index"], 3]
    assert "contribution_spread" not in found.top(4).column_names


def test_verify_sees_a_wrong_average_a_stray_file_and_a_lost_member(place):
    found = open_run(place)
    table = found.samples_spread("hydra-seeds3")
    (path,) = (place / "samples_spread" / "method=hydra-seeds3").glob("*.parquet")
    wrong = table.set_column(2, "contribution", pa.array(table["contribution"].to_numpy() + 1.0))
    write_table(str(path), wrong, SAMPLES_SPREAD)
    for manifest in found.directory.manifests("hydra-seeds3/reduce"):  # as if it had been written so
        found.directory.commit(
            manifest.stage, manifest.unit, [entry.path for entry in manifest.files], manifest.values
        )
    text = "\n".join(verify(open_run(place)).problems)
    assert "20 values of contribution are not those of its members, first at train_index 0" in text
    (place / "contributions_spread" / "method=hydra-seeds3" / "part-9.parquet").write_bytes(b"")
    (place / "seeds" / "seed=4" / "contributions" / "method=hydra" / "part-9.parquet").write_bytes(b"")
    text = "\n".join(verify(open_run(place)).problems)
    assert "contributions_spread/method=hydra-seeds3/part-9.parquet: no manifest lists this file" in text
    assert "seeds/seed=4/contributions/method=hydra/part-9.parquet: no manifest lists" in text
    for path in place.rglob("part-9.parquet"):
        path.unlink()
    shutil.rmtree(place / "seeds" / "seed=5")
    checked = verify(open_run(place))
    assert any("the run with seed 5 that it averages is not there" in line for line in checked.problems)
    assert "seeds/seed=5: not begun" in checked.notes


def test_litter_of_a_member_is_its_own(place):
    litter = place / "seeds" / "seed=4" / "x.0f.partial"
    litter.write_bytes(b"x")
    assert open_run(place).directory.litter() == []
    assert any(note.startswith("seeds/seed=4/1 temporary") for note in verify(open_run(place)).notes)
    run(spec(place))
    assert litter.exists()
    run(spec(place, seeds=3))
    assert not litter.exists()


def test_compare_and_evaluate_know_averages(place):
    found = compare(open_run(place), reference="hydra")
    (row,) = [row for row in found["methods"] if row["method"] == "hydra-seeds3"]
    assert 0 < row["spearman"] < 1
    # Its cost is all that its members cost, their records included.
    assert row["seconds"] > seconds(open_run(place), "hydra")
    spent = seconds(open_run(place).members()[4], "hydra")
    assert row["seconds"] > spent + seconds(open_run(place), "hydra")
    asked = Questions(subsets=3, fractions=(0.5,), remove=(0.2,), perturb=())
    scored = evaluate(str(place), Small(), questions=asked)
    assert {r["method"] for r in scored["lds"]} == {"hydra", "hydra-seeds3"}
    assert ("hydra-seeds3", "harmful") in {(r["ranking"], r["direction"]) for r in scored["removal"]}


def test_evaluate_averages_the_truth_too(place):
    asked = Questions(subsets=3, fractions=(0.5,), remove=(), perturb=(), retraining="subset", seeds=2)
    heard = Heard()
    scored = evaluate(str(place), Small(), questions=asked, observer=heard.append)
    assert len(heard.done()) == 2 * 4
    assert scored["retrainings"] == {"asked": 8, "stored": 8, "seconds": scored["retrainings"]["seconds"]}
    assert scored["questions"]["seeds"] == 2
    both = [
        pq.read_table(p / "evaluate" / "retrain").to_pandas() for p in (place, place / "seeds" / "seed=4")
    ]
    assert set(both[0].unit) == set(both[1].unit)
    loss = [table.groupby("unit")["loss"].mean() for table in both]
    assert (loss[0] != loss[1]).all()
    assert scored["baseline"]["loss"] == pytest.approx(
        np.mean([table[table.unit.str.startswith("weighted")]["loss"].mean() for table in both])
    )
    evaluate(str(place), Small(), questions=asked, observer=(again := Heard()).append)
    assert again.done() == []
    stored = pq.read_table(place / "evaluate" / "trials.parquet").to_pandas().set_index("unit")["loss"]
    wanted = ((loss[0] + loss[1]) / 2)[stored.index]
    assert np.allclose(stored, wanted, rtol=1e-12)
    with pytest.raises(InputError, match=r"no run with seed 6, only 3, 4, 5; make it with"):
        evaluate(str(place), Small(), questions=replace(asked, seeds=4))
    with pytest.raises(SpecError, match="seeds 0: must be a whole number, at least 1 and at most"):
        Questions(seeds=0)
    assert verify(open_run(place)).ok


# ---------------------------------------------------------------- estimators


def test_estimators_are_averaged_too(place):
    methods = {"tracin": {}, "gradient-dot": {"ensemble": 2}}
    heard = Heard()
    found = attribute(str(place), methods, Small(), seeds=2, observer=heard.append)
    assert not any(stage == "record" for stage, _ in heard.done())
    for method in methods:
        check_average(found, method, [3, 4])
    assert verify(found).ok
    assert status(found)["state"] == "complete"
    heard = Heard()
    attribute(str(place), methods, Small(), seeds=2, observer=heard.append)
    assert heard.done() == []
    with pytest.raises(SpecMismatch, match="ensemble: stored 2, asked 3"):
        attribute(str(place), {"gradient-dot": {"ensemble": 3}}, Small(), seeds=2)
    before = bits(place, "gradient-dot-seeds2")
    other = {"gradient-dot": {"ensemble": 3}}
    found = attribute(str(place), other, Small(), seeds=2, overwrite=True)
    assert bits(place, "gradient-dot-seeds2") != before
    check_average(found, "gradient-dot", [3, 4])


def test_attribute_records_the_seeds_that_are_missing(tmp_path, monkeypatch):
    place = str(tmp_path / "r")
    run(spec(place, mode="adjoint", hessian="exact", epochs=2))

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AverageWork, "do", killed)
        with pytest.raises(KeyboardInterrupt):
            attribute(place, {"tracin": {"checkpoints": 3}}, Small(), seeds=2)
    found = status(open_run(place))
    assert found["state"] == "partial"
    assert found["resume"].endswith(
        "--method tracin --option checkpoints=3 --option scale=contribution --option preconditioned=false --seeds 2"
    )
    found = attribute(place, {"tracin": {"checkpoints": 3}}, Small(), seeds=2)
    check_average(found, "tracin", [3, 4])
    assert found.members()[4].methods() == ["tracin"]
    assert status(found)["state"] == "complete"
    with pytest.raises(SpecError, match="seeds 0: must be a whole number"):
        attribute(place, {"tracin": {"checkpoints": 3}}, Small(), seeds=0)


def test_attribute_goes_on_beside_an_adjoint_run(tmp_path):
    run(spec(tmp_path / "r", mode="adjoint", seeds=2))
    found = attribute(str(tmp_path / "r"), {"gradient-dot": {}}, Small(), seeds=2)
    check_average(found, "gradient-dot", [3, 4])


# ---------------------------------------------------------------- the command line


def call(*words):
    return CliRunner(env={"COLUMNS": "100"}).invoke(main, [str(word) for word in words])


def test_the_commands(tmp_path):
    place = tmp_path / "r"
    words = ["digits", "--out", place, "--executor", "serial", "--epochs", 1, "--track", 12, "--test", 9]
    words += ["--set", "train_size=60", "--set", "test_size=9", "--seeds", 2]
    done = call("run", *words, "-q", "--method", "tracin")
    assert done.exit_code == 0, done.output
    assert open_run(place).methods() == ["hydra", "hydra-seeds2", "tracin", "tracin-seeds2"]
    assert "tracin-seeds2" in done.output
    done = call("attribute", place, "--method", "gradient-dot", "--seeds", 2, "-q", "--format", "json")
    assert json.loads(done.stdout)["method"] == "gradient-dot-seeds2"
    done = call("top", place, "--method", "hydra-seeds2", "-k", 3)
    assert "std over seeds" in done.stdout
    done = call("top", place, "--method", "hydra-seeds2", "-k", 3, "--test", 4, "--format", "csv")
    assert done.stdout.splitlines()[0].endswith("contribution_spread")
    assert "1 (complete)" in call("status", place).stdout
    done = call("plan", *words, "--format", "json")
    assert json.loads(done.stdout)["disk"]["other seeds"] > 0
    assert call("verify", place, "-q").exit_code == 0
    assert call("run", *words[:-1], 0).exit_code == 2
    assert call("attribute", place, "--method", "tracin", "--seeds", 0).exit_code == 2


def test_a_configuration_file(tmp_path):
    (tmp_path / "run.toml").write_text('recipe = "digits"\nseeds = 4\n')
    assert RunSpec.from_toml(str(tmp_path / "run.toml")).seeds == 4

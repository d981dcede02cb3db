"""detect: what each detector of contributions says, held against loops; what is stored, flagged and refused."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from hydra_pipe.cli import main
from hydra_pipe.pipeline.analysis.status import status
from hydra_pipe.pipeline.decide import detection as stored
from hydra_pipe.pipeline.decide.case import Options, Scorer, Scores
from hydra_pipe.pipeline.decide.cluster import jaccard
from hydra_pipe.pipeline.decide.detect import default_by, detect, name_of
from hydra_pipe.pipeline.decide.scorers import SCORERS
from hydra_pipe.pipeline.executors.events import Note
from hydra_pipe.storage.errors import CorruptStore, IncompleteStage, InputError, SpecError

from hydra_pipe import Recipe, Run, RunSpec, open_run, run, verify
from tests.builders import Built
from tests.recipes import Small

OWN = ("contribution", "harm", "harmed-class", "cluster")
"""The detectors that are judged here; others have tests of their own."""
DIGITS = {"label_noise": 0.1, "train_size": 160, "test_size": 24}


@pytest.fixture(autouse=True)
def detectors_in_order() -> Iterator[None]:
    """What monkeypatch takes out of a dictionary it puts back at the end: give the registry its order again."""
    kept = dict(SCORERS)
    yield
    SCORERS.clear()
    SCORERS.update(kept)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A small run with 10% wrong labels and contributions to samples, classes and the mean."""
    out = str(tmp_path_factory.mktemp("digits") / "run")
    given = {"recipe": "digits", "recipe_args": DIGITS, "epochs": 1, "executor": "serial", "device": "cpu"}
    run(RunSpec(out=out, **given))
    for targets in ("classes", "mean"):
        run(RunSpec(out=out, mode="adjoint", targets=targets, **given))
    return open_run(out)


@pytest.fixture
def built(tmp_path: Path) -> Run:
    """A run made through the storage API: 20 samples of 3 classes, 6 test samples, 2 wrong labels."""
    return open_run(Built(tmp_path / "run").build().uri)


def matrix(found: Run, method: str = "hydra") -> np.ndarray:
    """C(i, j), (n, M), one stored row after the other."""
    index = found.samples(method)["train_index"].to_pylist()
    tests = found.test_gradients().column("test_index").tolist()
    c_nM = np.full((len(index), len(tests)), np.nan)
    for row in found.contributions(method).to_table().to_pylist():
        c_nM[index.index(row["train_index"]), tests.index(row["test_index"])] = row["contribution"]
    assert not np.isnan(c_nM).any()
    return c_nM


def by_index(detection: stored.Detection, column: str) -> np.ndarray:
    return detection.table.sort_by("train_index")[column].to_numpy()


def call(*words: str, code: int = 0) -> Result:
    done = CliRunner().invoke(main, ["detect", *words])
    assert done.exit_code == code, done.output
    return done


def refused(*words: str) -> str:
    """The one line of a command that fails."""
    text = call(*words, "--quiet", code=1).stderr.strip()
    assert text.startswith("error: ")
    assert "\n" not in text
    return text


def by_loops(name: str, c_nM: np.ndarray, labels_M: np.ndarray) -> np.ndarray:
    """What a detector should say of each sample, one number at a time."""
    found = []
    for row in c_nM:
        if name == "contribution":
            found.append(-sum(row) / len(row))
        elif name == "harm":
            found.append(sum(max(0.0, -value) for value in row) / len(row))
        else:
            means = [
                np.mean([v for v, at in zip(row, labels_M, strict=True) if at == c]) for c in set(labels_M)
            ]
            found.append(-min(means))
    return np.array(found)


@pytest.mark.parametrize("name", ["contribution", "harm", "harmed-class"])
@pytest.mark.parametrize("split", [False, True])
def test_detectors_say_what_loops_say(digits, name, split):
    (found,) = detect(digits, by=name, split=split)
    labels = digits.test_gradients().column("label")
    tests = digits.test_gradients().column("test_index")
    looked = np.isin(tests, found.values.selecting) if split else np.full(len(tests), True)
    expected = by_loops(name, matrix(digits)[:, looked], labels[looked])
    assert by_index(found, "suspicion") == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_samples_and_test_samples_with_gaps_between_them(tmp_path):
    made = Built(tmp_path / "run")
    made.tracked = np.array([i for i in range(20) if i % 4])
    made.contributions, made.exact = made.contributions[made.tracked], made.exact[made.tracked]
    made.visits = made.visits[made.tracked]
    made.hypergradients = made.hypergradients[made.tracked]
    made.info["n_tracked"] = len(made.tracked)
    found = open_run(made.build().uri)
    (harm,) = detect(found, by="harm")
    assert by_index(harm, "suspicion") == pytest.approx(by_loops("harm", matrix(found), made.test_label))
    assert harm.values.measures["wrong"] == 2
    assert verify(found).ok


def test_the_harmed_class_is_suggested_where_it_is_not_the_given_one(digits):
    (found,) = detect(digits, by="harmed-class")
    labels, c_nM = digits.test_gradients().column("label"), matrix(digits)
    for row in found.table.to_pylist():
        own = c_nM[row["train_index"]]
        means = {int(label): own[labels == label].mean() for label in np.unique(labels)}
        worst = min(means, key=lambda label: means[label])
        expected = worst if means[worst] < 0 and worst != row["given_label"] else -1
        assert row["suggested_label"] == expected
    assert (found.table["suggested_label"].to_numpy() >= 0).any()


def test_coarser_targets_say_what_they_can(digits):
    finest = {d.values.by: d for d in detect(digits, by=["contribution", "harmed-class"])}
    for method, name in (("hydra-classes", "harmed-class"), ("hydra-mean", "contribution")):
        (found,) = detect(digits, by=name, method=method)
        assert found.name == f"{name}.{method}"
        assert found.values.method == method
        expected = by_index(finest[name], "suspicion")
        scale = np.abs(expected).max()
        assert by_index(found, "suspicion") == pytest.approx(expected, abs=1e-4 * scale)
    assert "targets 'mean'" in refused(digits.uri, "--by", "harm", "--method", "hydra-mean")
    assert "the mean over all test samples" in refused(
        digits.uri, "--by", "harmed-class", "--method", "hydra-mean"
    )
    assert "targets 'classes'" in refused(digits.uri, "--by", "cluster", "--method", "hydra-classes")
    assert "targets 'classes'" in refused(digits.uri, "--by", "harm", "--method", "hydra-classes", "--split")


def test_one_pass_serves_all_detectors_of_contributions(digits, monkeypatch):
    from hydra_pipe.pipeline.decide import contributions

    passes = []
    real = contributions.panels
    monkeypatch.setattr(contributions, "panels", lambda *given: (passes.append(given), real(*given))[1])
    detect(digits, by=["harm", "harmed-class", "contribution"])
    assert len(passes) == 1


def test_rows_are_ranked_and_scored(digits):
    for found in detect(digits, by=OWN):
        table = found.table
        assert table["rank"].to_pylist() == list(range(1, 161))
        assert sorted(table["train_index"].to_pylist()) == list(range(160))
        suspicion, index, score = (table[c].to_numpy() for c in ("suspicion", "train_index", "score"))
        order = list(zip(-suspicion, index, strict=True))
        assert order == sorted(order)
        assert score[0] == 1 / 160
        assert score[-1] == 1
        assert (np.diff(score) > 0).all()
        assert set(table["by"].to_pylist()) == {found.values.by}
        assert by_index(found, "given_label").tolist() == digits.samples()["label"].to_pylist()
        assert all(table["reason"].to_pylist())


def test_equals_go_by_index_and_those_of_which_nothing_is_said_last(built, monkeypatch):
    def some(case):
        suspicion = np.zeros(case.n)
        suspicion[[4, 7]] = 1
        suspicion[0] = np.nan
        quality = np.linspace(-1, 2, case.n)
        quality[0] = np.nan
        return Scores(suspicion=suspicion, suggested=np.full(case.n, -1), quality=quality)

    monkeypatch.setitem(SCORERS, "some", Scorer(name="some", needs="record", what="some", score=some))
    (found,) = detect(built, by="some", flag="known", share=0.99)
    index = found.table["train_index"].to_pylist()
    assert index == [4, 7, *(i for i in range(1, 20) if i not in (4, 7)), 0]
    score = dict(zip(index, found.table["score"].to_pylist(), strict=True))
    assert score[19] == 1
    assert score[1] == 0
    assert score[0] == 1  # nothing is held against it
    assert found.values.flagged == 19  # of 20, one of which nothing is said
    assert not found.table["is_label_issue"].to_pylist()[-1]


def test_signs_are_clustered_within_a_class(tmp_path):
    """Two kinds of samples in a class, told apart by their signs alone; the more harmful kind is called wrong."""
    made = Built(tmp_path / "run")
    made.train_label = np.repeat([0, 1, 2], [9, 9, 2])
    wrong = np.isin(np.arange(20), [1, 2, 3, 10, 11])
    draw = np.random.default_rng(0)
    size = draw.uniform(1, 2, (20, 6))
    signs = np.where(wrong[:, None], [1, -1, -1, 1, -1, -1], [-1, 1, 1, 1, 1, 1])
    signs[0, 1] = -1
    made.exact = (size * signs).astype(np.float32).astype(float)
    made.contributions = made.exact.astype(np.float32)
    found = open_run(made.build().uri)
    truth = np.flatnonzero(wrong).tolist()
    for options in (Options(), Options(clusters="average"), Options(wrong_cluster="smaller")):
        (detection,) = detect(found, by="cluster", options=options, truth=truth)
        suspicion = by_index(detection, "suspicion")
        assert (suspicion[:18] > 0).tolist() == wrong[:18].tolist()
        assert np.isnan(suspicion[18:]).all()
        assert detection.table["train_index"].to_pylist()[-2:] == [18, 19]
        notes = detection.values.notes
        assert notes["too_small"] == [2]
        assert notes["jaccard"]["wrong"] == notes["jaccard"]["correct"] == 1.0
        # The sample with one sign of the others lies nearest to them.
        right = [i for i in range(9) if not wrong[i]]
        assert max(right, key=lambda i: suspicion[i]) == 0
    (detection,) = detect(found, by="cluster", options=Options(wrong_cluster="contribution"))
    assert detection.name == "cluster.contribution"


def test_samples_with_one_row_of_signs_are_not_parted(built, monkeypatch):
    from hydra_pipe.pipeline.decide import cluster

    monkeypatch.setattr(cluster, "_signs", lambda case, count: np.ones((case.n, count), np.int8))
    (found,) = detect(built, by="cluster")
    assert found.values.notes["all_alike"] == [0, 1, 2]
    assert np.isnan(found.table["suspicion"].to_numpy()).all()
    assert found.values.flagged == 0


def test_few_test_samples_are_chosen_by_seed(digits, monkeypatch):
    from hydra_pipe.pipeline.decide import cluster

    monkeypatch.setattr(cluster, "MOST_TESTS", 7)
    first, again, other = (
        by_index(detect(digits, by="cluster", options=Options(seed=seed))[0], "suspicion")
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again, equal_nan=True)
    assert not np.array_equal(first, other, equal_nan=True)


def test_a_class_too_large_for_all_its_distances_is_refused(digits, monkeypatch):
    from hydra_pipe.pipeline.decide import cluster

    monkeypatch.setattr(cluster, "MOST_LINKED", 5)
    assert "average linkage" in refused(digits.uri, "--by", "cluster", "--clusters", "average")


def test_jaccard_is_counted_a_class():
    suspicion, given = np.array([1.0, 1.0, -1.0, -1.0, 1.0, -1.0, np.nan]), np.array([0, 0, 0, 0, 1, 1, 1])
    wrong = np.array([True, False, False, False, False, False, True])
    found = jaccard(suspicion, given, wrong)
    assert found["classes"] == [
        {"label": 0, "correct": 2 / 3, "wrong": 1 / 2},
        {"label": 1, "correct": 1 / 2, "wrong": 0.0},
    ]
    assert found["correct"] == pytest.approx(7 / 12)


def test_halves_are_stratified_disjoint_and_drawn_by_seed(digits):
    (found,) = detect(digits, by="harm", split=True)
    selecting, judging = found.values.selecting, found.values.judging
    tests = digits.test_gradients()
    label = dict(zip(tests.column("test_index").tolist(), tests.column("label").tolist(), strict=True))
    assert sorted((*selecting, *judging)) == sorted(label)
    for one in set(label.values()):
        counts = [sum(label[j] == one for j in half) for half in (selecting, judging)]
        assert abs(counts[0] - counts[1]) <= 1
    assert abs(len(selecting) - len(judging)) <= 1
    (other,) = detect(digits, by="harm", split=True, split_seed=1)
    assert found.name == "harm.split"
    assert other.name == "harm.split-1"
    assert other.values.selecting != selecting
    (whole,) = detect(digits, by="harm")
    assert whole.values.selecting is None


def test_detections_are_kept_and_replaced(digits, tmp_path):
    place = tmp_path / "run"
    shutil.copytree(digits.uri, place)
    made = detect(str(place), by=["harm", "contribution"], flag="none")
    again = open_run(place)
    assert set(again.detections()) >= {"harm", "contribution"}
    for one in made:
        read = again.detection(one.name)
        assert read.table.equals(one.table)
        assert read.values.by == one.values.by
        assert read.values.measures == one.values.measures
    detect(again, by="harm", flag="known")
    assert again.detection("harm").values.flagged == 16
    with pytest.raises(IncompleteStage, match="no detection 'nothing'; it has"):
        again.detection("nothing")
    found = verify(again)
    assert found.ok, found.problems
    assert found.rows["detections/harm/part-all.parquet"] == 160
    states = {state["stage"]: state for state in status(again)["stages"]}
    assert states["detect"]["state"] == "complete"
    assert status(again)["state"] == "complete"


def test_a_new_record_voids_detections(built):
    from hydra_pipe.pipeline.drive.stages import after_the_record

    detect(built, by="harm")
    assert "detect" in after_the_record(built.directory)


def test_what_a_killed_writer_left_is_no_result(built, monkeypatch):
    """Killed between table and manifest, at first and where an older detection is replaced."""

    def killed(*given):
        raise KeyboardInterrupt

    for before in (False, True):
        if before:
            detect(built, by="harm")
        with monkeypatch.context() as patch:
            patch.setattr(type(built.directory), "commit", killed)
            with pytest.raises(KeyboardInterrupt):
                detect(built, by="harm")
        assert Path(built.directory.path("detections/harm/part-all.parquet")).exists()
        assert built.detections() == []
        found = verify(built)
        assert found.ok, found.problems
        assert "detect: 1 files are not committed yet" in found.notes
        detect(built, by="harm")
        assert verify(built).ok


def rewrite(found: Run, name: str, column: str, values: list[object]) -> None:
    """Change a stored detection and its manifest: only the contents can give it away."""
    path = Path(found.directory.path(f"detections/{name}/part-all.parquet"))
    table = pq.ParquetFile(path).read()
    at = table.schema.get_field_index(column)
    field = table.schema.field(at)
    changed = table.set_column(at, field, pa.array(values, field.type))
    pq.write_table(changed, path)
    manifest = found.directory.manifest("detect", name)
    found.directory.commit("detect", name, [f.path for f in manifest.files], manifest.values)


@pytest.mark.parametrize(
    ("column", "change", "line"),
    [
        ("rank", lambda v: v[::-1], "ranks are not 1 to 20"),
        ("score", lambda v: [2.0, *v[1:]], "1 scores are not in 0 to 1"),
        ("score", lambda v: [float("nan"), *v[1:]], "1 scores are not in 0 to 1"),
        ("given_label", lambda v: [1 - v[0] % 2, *v[1:]], "not those whose digest"),
        ("is_label_issue", lambda v: [not v[0], *v[1:]], "samples are flagged"),
        ("train_index", lambda v: [v[1], *v[1:]], "not strictly increasing"),
    ],
)
def test_verify_judges_what_a_detection_holds(built, column, change, line):
    (found,) = detect(built, by="harm")
    rewrite(built, "harm", column, change(found.table[column].to_pylist()))
    assert any(line in problem for problem in verify(built).problems)


def test_verify_counts_the_rows_of_a_detection(built):
    detect(built, by="harm")
    path = Path(built.directory.path("detections/harm/part-all.parquet"))
    pq.write_table(pq.ParquetFile(path).read().slice(0, 19), path)
    manifest = built.directory.manifest("detect", "harm")
    built.directory.commit("detect", "harm", [f.path for f in manifest.files], manifest.values)
    assert any("19 rows, run.json says 20" in problem for problem in verify(built).problems)


def test_names_hold_what_is_not_as_usual():
    scorer = Scorer(
        name="outlier-gradient",
        needs="gradients",
        what="",
        score=lambda case: None,
        options=("layer", "scorer", "per_class", "normalise", "rows", "seed"),
    )
    usual = {"method": "hydra", "default": "hydra", "split": None}
    assert name_of(scorer, Options(), **usual) == "outlier-gradient"
    options = Options(layer="fc/0 w", scorer="l1", per_class=True, normalise="unit", seed=3)
    assert name_of(scorer, options, **usual) == "outlier-gradient.layer-fc-0-w.l1.per-class.unit.seed-3"
    other = {**usual, "method": "hydra-exact"}
    assert name_of(scorer, Options(), **other) == "outlier-gradient"  # looks at no method's results
    rows = Options(rows="hypergradients")
    assert name_of(scorer, rows, **other) == "outlier-gradient.hydra-exact.hypergradients"
    harm = SCORERS["harm"]
    assert name_of(harm, options, **{**other, "split": 0}) == "harm.hydra-exact.split"


def test_all_is_everything_that_the_run_can_serve(digits, monkeypatch):
    def cannot(case):
        raise InputError("this run has no gold")

    monkeypatch.setitem(SCORERS, "gold", Scorer(name="gold", needs="record", what="gold", score=cannot))
    for name in [name for name in SCORERS if name not in (*OWN, "gold")]:
        monkeypatch.delitem(SCORERS, name)
    heard = []
    made = detect(digits, by="all", observer=heard.append)
    assert sorted(one.name for one in made) == sorted(OWN)
    assert [e.message for e in heard if isinstance(e, Note)] == ["gold: not made: this run has no gold"]
    with pytest.raises(InputError, match="no gold"):
        detect(digits, by="gold")


def test_the_default_is_the_first_there_is(monkeypatch):
    assert default_by() in SCORERS
    for name in ("joint", "margin"):
        monkeypatch.delitem(SCORERS, name, raising=False)
    assert default_by() == "harmed-class"


def test_a_run_with_its_record_alone_is_judged_by_what_that_says(tmp_path, monkeypatch):
    out = str(tmp_path / "run")
    run(
        RunSpec(recipe="digits", recipe_args=DIGITS, epochs=1, executor="serial", device="cpu", out=out),
        stages=("record",),
    )

    def first(case):
        return Scores(suspicion=-case.tracked.astype(float), suggested=np.full(case.n, -1))

    monkeypatch.setitem(SCORERS, "first", Scorer(name="first", needs="record", what="first", score=first))
    heard = []
    (found,) = detect(out, by="first", observer=heard.append)
    assert any("the recipe's" in e.message for e in heard if isinstance(e, Note))
    assert found.table["train_index"].to_pylist() == list(range(160))
    assert (found.table["given_label"].to_numpy() >= 0).all()
    assert found.values.measures["wrong"] == 16
    assert found.values.method is None
    assert verify(open_run(out)).ok
    assert "has no contributions yet" in refused(out, "--by", "harm")
    assert "looks at no test samples" in refused(out, "--by", "first", "--split")


class Unlabelled(Small):
    """Small, with classes that nobody is told of."""

    def labels(self, dataset):
        return None


class OneClass(Small):
    """Small, whose test samples are all of class 0."""

    def test_dataset(self):
        dataset = super().test_dataset()
        dataset.tensors[1].zero_()
        return dataset


def small_run(recipe: Recipe, out: Path, **given: object) -> str:
    run(RunSpec(recipe=recipe, out=str(out), executor="serial", device="cpu", **given))
    return str(out)


def test_bad_data_get_their_line(tmp_path):
    bare = small_run(Unlabelled(), tmp_path / "bare")
    assert "without labels" in refused(bare, "--by", "harmed-class")
    assert "have no labels" in refused(bare, "--by", "cluster")
    (found,) = detect(bare, by="harm")
    assert found.values.measures is None
    assert set(found.table["given_label"].to_pylist()) == {-1}
    one = small_run(OneClass(), tmp_path / "one", test=2)
    assert "all of class 0" in refused(one, "--by", "harmed-class")
    single = small_run(Small(), tmp_path / "single", track=1, test=1)
    assert "tracks 1 sample" in refused(single, "--by", "harm")
    few = small_run(Small(), tmp_path / "few", track=4, test=1)
    assert "2 halves need at least 2" in refused(few, "--by", "harm", "--split")
    assert "share of wrong labels is not known" in refused(few, "--by", "harm", "--flag", "known")


def test_bad_words_get_their_line(digits, tmp_path):
    where = digits.uri
    assert "did you mean 'harm'?" in refused(where, "--by", "harms")
    assert "no method 'nothing'" in refused(where, "--by", "harm", "--method", "nothing")
    assert "did you mean 'two-means'?" in refused(where, "--by", "harm", "--flag", "two-mean")
    assert "finds its own" in refused(where, "--by", "harm", "--flag", "mixture", "--share", "0.1")
    assert "above 0 and below 1" in refused(where, "--by", "harm", "--share", "1.5")
    assert "no such file" in refused(where, "--by", "harm", "--truth", str(tmp_path / "none.txt"))
    assert "'kmeans'" in refused(where, "--by", "cluster", "--clusters", "kmean")
    assert "at least 1" in refused(where, "--by", "harm", "--neighbours", "0")
    for option, seed in (("--seed", "-1"), ("--seed", str(2**32)), ("--split-seed", "-1")):
        name = option.removeprefix("--").replace("-", "_")
        line = refused(where, "--by", "harm", "--split", "--flag", "two-means", option, seed)
        assert line == f"error: {name} {seed}: must be 0 to 4294967295"
    assert "no run at" in refused(str(tmp_path / "nowhere"))
    assert "must end in .csv" in refused(where, "--by", "harm", "--to", str(tmp_path / "x.txt"))
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("4\n1600\n")
    assert "1600 is outside" in refused(where, "--by", "harm", "--truth", str(wrong))
    with pytest.raises(SpecError, match="did you mean"):
        detect(digits, by="clusters")


@pytest.mark.parametrize(
    ("table", "by"), [("contributions", "harm"), ("samples", "contribution"), ("detections", None)]
)
def test_a_damaged_table_gets_its_line(built, table, by):
    detect(built, by="harm")
    for file in (Path(built.uri) / table).rglob("part-*.parquet"):
        file.write_bytes(file.read_bytes()[:-9])
    if by is None:
        with pytest.raises(CorruptStore) as caught:
            built.detection("harm")
        line = str(caught.value)
    else:
        line = refused(built.uri, "--by", by)
    assert f"{built.uri}: {table}/" in line
    assert " is damaged: " in line
    assert "run again, does " in line
    assert "\n" not in line


def test_the_truth_may_be_a_file(built, tmp_path):
    file = tmp_path / "wrong.txt"
    file.write_text("# by hand\n3\n5\n6\n")
    (found,) = detect(built, by="harm", truth=str(file))
    assert found.values.measures["wrong"] == 3
    assert found.values.measures["truth"] == "wrong.txt"
    assert found.values.flag == "known"
    assert found.values.flagged == 3
    (found,) = detect(built, by="harm")
    assert found.values.measures["wrong"] == 2  # the record's own


def test_json_is_a_list_of_rows(digits):
    rows = json.loads(call(digits.uri, "--by", "harm", "--by", "harmed-class", "--format", "json").stdout)
    assert isinstance(rows, list)
    assert len(rows) == 320
    wanted = {"by", "train_index", "rank", "score", "given_label", "suggested_label", "reason"}
    assert all(wanted <= set(row) for row in rows)
    assert [row["by"] for row in rows[::160]] == ["harm", "harmed-class"]
    lines = list(csv.DictReader(io.StringIO(call(digits.uri, "--by", "harm", "--format", "csv").stdout)))
    assert [int(line["train_index"]) for line in lines] == [row["train_index"] for row in rows[:160]]


def test_tables_show_the_most_suspicious_and_compare(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    to, pictures = tmp_path / "rows.parquet", tmp_path / "pictures"
    words = [digits.uri, "--by", "harm", "--by", "harmed-class", "-k", "3", "--to", str(to)]
    text = call(*words, "--figures", str(pictures)).stdout
    assert "3 most suspicious of 160 by harm" in text
    assert "16 flagged (10%) by known, separation" in text
    assert "16 of 160 labels are wrong by the recipe's label noise" in text
    assert max(map(len, text.splitlines()[:-4])) <= 100
    table = pq.read_table(to)
    assert len(table) == 320
    names = {path.name for path in pictures.iterdir()}
    assert names == {"found.png", "suspicion-harm.png", "suspicion-harmed-class.png"}
    assert "exists" in refused(*words)
    call(*words, "--overwrite")
    assert "none flagged" in call(digits.uri, "--by", "harm", "--flag", "none").stdout
    assert "under 1%: inspect" in call(digits.uri, "--by", "harm", "--share", "0.005").stdout

"""The report as a file: what is on it, that it is inert and small, and what is refused."""

# ruff: noqa: F811
from __future__ import annotations

import base64
import hashlib
import html.parser
import json
import re
import shlex
import shutil
from pathlib import Path

import duckdb
import numpy as np
import pytest
from hydra_pipe.pipeline.decide.page import album
from hydra_pipe.pipeline.decide.page.charts import heat
from hydra_pipe.pipeline.decide.page.markup import element, escaped, number
from hydra_pipe.pipeline.decide.pictures import png, shrunk
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.reading.detections import detection_names
from hydra_pipe.pipeline.reading.run_info import read_info
from hydra_pipe.storage.errors import IncompleteStage, InputError

from hydra_pipe import clean, detect, report
from tests.builders import Built
from tests.end_to_end.support import cli, serial
from tests.pipeline.decide.reported import TRAIN, Words, digits, words  # noqa: F401


class Reader(html.parser.HTMLParser):
    """Notes elements, attributes and text."""

    VOID = ("meta", "link", "img", "input", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.seen if name == tag]


@pytest.fixture(scope="module")
def page(digits, tmp_path_factory):
    place = tmp_path_factory.mktemp("page") / "digits.html"
    found = report(digits, to=place, explain=[3, 5])
    return found, place.read_text(encoding="utf-8")


def test_a_report_says_what_was_run_and_ranks_samples(page, digits):
    found, text = page
    read = Reader(text)
    assert read.open == []
    said = " ".join(" ".join(read.text).split())
    assert (found.detection, found.rows, found.samples) == ("margin", TRAIN, TRAIN)
    for expected in (
        "digits",
        "accuracy, test",
        "Not measured",
        f"hydra-pipe evaluate {digits.uri}",
        "separation 2.5",
        "labels are wrong on purpose. AUROC",
        "Eq. 23",
        "the authors' code, Figure 2",
        "Test sample 3",
        "hydra/replay",
    ):
        assert expected in said, expected
    rows = [a for a in read.all("tr") if "data-given" in a]
    assert len(rows) == TRAIN
    pictures = read.all("img")
    assert len(pictures) > TRAIN
    assert all(a["alt"] and a["src"].startswith("data:image/png;base64,") for a in pictures)
    assert pictures[0]["alt"].startswith(("test sample", "training sample"))


def test_the_ranked_rows_are_those_of_the_detection(page, digits):
    _, text = page
    path = digits.directory.path("detections", "margin", "part-all.parquet")
    expected = duckdb.sql(f"SELECT train_index, given_label FROM '{path}' ORDER BY rank").fetchall()
    rows = re.findall(r'<tr id="train-(\d+)"[^>]* data-given="(\d+)"', text)
    assert [(int(i), int(c)) for i, c in rows] == expected
    table = digits.contributions().to_table().to_pandas()
    worst = table[table.train_index == expected[0][0]].nsmallest(3, "contribution")
    row = text[text.index(f'<tr id="train-{expected[0][0]}"') :]
    row = row[: row.index("</tr>")]
    for test in worst[worst.contribution < 0].test_index:
        assert f"test {test}" in row


def test_every_query_on_the_page_runs(page):
    _, text = page
    blocks = [html.unescape(b) for b in re.findall(r"<pre><code>(.*?)</code></pre>", text, re.DOTALL)]
    queries = {b for b in blocks if b.startswith("SELECT")}
    commands = {b for b in blocks if b.startswith("hydra-pipe ")}
    assert len(queries) >= 6
    for query in queries:
        assert duckdb.sql(query).fetchall(), query
    known = {"explain", "status"}  # the others are tried by their own tests
    tried = [c for c in sorted(commands) if shlex.split(c)[1] in known]
    assert len(tried) > TRAIN
    for command in tried[:2] + [c for c in tried if "--test" in c][:1]:
        done = cli(*shlex.split(command)[1:])
        assert done.exit_code == 0, command


def test_the_page_can_fetch_nothing_and_runs_one_script(page):
    _, text = page
    read = Reader(text)
    policy = next(a["content"] for a in read.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    script = text[text.index("<script>") + len("<script>") : text.index("</script>")]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'; ")
    assert f"script-src 'sha256-{digest}'" in policy
    assert len(read.all("script")) == 1
    for tag, attributes in read.seen:
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        for name in ("src", "href"):
            link = attributes.get(name)
            assert link is None or link.startswith(("data:", "#")), (tag, link)
    assert "http://" not in text
    assert "https://" not in text


def test_the_table_is_one_for_everybody(page):
    _, text = page
    read = Reader(text)
    start = text.index('<table id="ranked">')
    table = Reader(text[start : text.index("</table>", start) + len("</table>")])
    assert table.all("caption")
    assert {a.get("scope") for a in table.all("th")} == {"col", "row"}
    assert not any("aria-sort" in a for a in table.all("th"))  # nothing is sorted by the reader yet
    regions = [a for a in read.all("div") if a.get("role") == "region"]
    assert all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert [a for _, a in read.seen if a.get("aria-live") == "polite"]
    assert all("hidden" in a for a in read.all("form"))  # it does nothing without the script
    drawn = read.all("svg")
    assert len(drawn) >= 6
    assert text.count("<svg") <= text.count("<title>")
    assert text.count("<desc>") == len(drawn)


def test_hostile_texts_are_text(words, tmp_path):
    place = tmp_path / "words.html"
    report(words, Words(), to=place, explain=[1, 4])
    text = place.read_text(encoding="utf-8")
    read = Reader(text)
    assert read.open == []
    assert len(read.all("script")) == 1
    assert read.all("img") == []
    assert "<script>window.hacked = 1</script>" in "".join(read.text)
    assert "\U0001f600" in text
    assert "\x00" not in text
    assert "\x1b" not in text
    assert "run's <b>" in "".join(read.text)
    assert read.all("b") == []


def test_a_recipe_that_nobody_names_leaves_numbers(words, tmp_path):
    found = report(words, to=tmp_path / "words.html")
    assert any("not imported unasked" in note for note in found.notes)
    text = (tmp_path / "words.html").read_text(encoding="utf-8")
    assert "not imported unasked" in text
    assert Reader(text).all("img") == []


def test_without_a_detection_samples_are_ranked_by_contribution(tmp_path):
    built = Built(tmp_path / "digits").build()
    found = report(built.uri, to=tmp_path / "r.html", rows=5)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert found.detection is None
    order = np.argsort(built.exact.mean(1), kind="stable")[:5].tolist()
    assert [int(i) for i in re.findall(r'<tr id="train-(\d+)"', text)] == order
    assert "This run has no detection" in text
    assert any("so C(i) ranks" in note and "hydra-pipe detect" in note for note in found.notes)
    assert "15 more are in the run" in text


def test_the_default_detection_is_made_where_a_run_has_none(tmp_path, monkeypatch):
    def slow(run, *args, **kwargs):
        found = detect(run, *args, **kwargs)
        noted = read_info(run.directory).with_stage("training-outputs", units=1, seconds=77.7)
        run.directory.update(lambda _: noted.to_json())
        return found

    monkeypatch.setattr("hydra_pipe.pipeline.decide.report.detect", slow)
    arguments = {"label_noise": 0.2, "train_size": 60, "test_size": 12}
    run = serial(tmp_path / "digits", "digits", recipe_args=arguments, epochs=2)
    answer = cli("report", run.uri, "--to", str(tmp_path / "r.html"), "--rows", "5")
    assert answer.exit_code == 0, answer.output
    assert "the run had no detection: joint was made" in answer.stderr
    assert "samples ranked by detection joint" in answer.stdout
    assert detection_names(open_run(run.uri)) == ["joint"]
    again = report(run.uri, to=tmp_path / "again.html", rows=5)
    assert (again.detection, again.notes) == ("joint", ())
    assert b"77.7 s" in (tmp_path / "again.html").read_bytes()
    assert (tmp_path / "again.html").read_bytes() == (tmp_path / "r.html").read_bytes()


def test_a_detection_is_not_made_with_a_recipe_that_nobody_names(tmp_path):
    run = serial(tmp_path / "words", Words())
    found = report(run.uri, to=tmp_path / "r.html")
    assert found.detection is None
    assert any("so C(i) ranks" in note and "RECIPE" in note for note in found.notes)
    assert detection_names(open_run(run.uri)) == []
    named = report(run.uri, Words(), to=tmp_path / "named.html")
    assert named.detection == "joint"


def test_what_evaluate_found_is_told(digits, tmp_path, monkeypatch):
    rows = [{"fraction": 0.5, "method": "hydra", "lds": 0.4321, "low": 0.4, "high": 0.5}]
    module = "hydra_pipe.pipeline.evaluate.evaluate.read_summary"
    monkeypatch.setattr(module, lambda run: {"lds": rows})
    report(digits, to=tmp_path / "r.html", rows=3)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "0.432" in text
    assert "0.4 to 0.5" in text
    assert "Not measured" not in text


def test_what_cleaning_brought_is_told(digits, tmp_path):
    place = tmp_path / "cleaned"
    shutil.copytree(digits.uri, place)
    found = clean(str(place), detection="margin", drop="10%", retrain=2, executor="serial", device="cpu")
    report(str(place), to=tmp_path / "r.html", rows=3)
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    section = text[text.index('<section id="decision">') :]
    section = section[: section.index('<section id="timings">')]
    said = " ".join(Reader(section[: section.rindex("</section>") + len("</section>")]).text)
    for arm in found.outcome.arms:
        assert arm.arm in said
        assert f"{100 * arm.accuracy.mean:.1f}%" in said
    assert found.outcome.trust in said
    assert "Before and after" in text[: text.index("<main>")]
    (sql,) = [html.unescape(q) for q in re.findall(r"<code>(SELECT.*?)</code>", section)]
    assert len(duckdb.sql(sql).fetchall()) >= 2 * len(found.outcome.arms)
    (command,) = [html.unescape(q) for q in re.findall(r"<code>(hydra-pipe clean.*?)</code>", section)]
    again = cli(*shlex.split(command)[1:], "--executor", "serial", "--quiet")
    assert again.exit_code == 0, again.output


def test_rows_are_looked_at_only_as_far_as_they_may_fit(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("hydra_pipe.pipeline.decide.report_facts.MOST_ROWS", 7)
    found = report(digits, to=tmp_path / "r.html", rows=50)
    assert found.rows == 7
    assert "50 rows were asked for; 7 fit" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_pictures_stay_within_their_budget(digits, tmp_path, monkeypatch):
    monkeypatch.setattr(album.Album.__init__, "__defaults__", (3000,))
    report(digits, to=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert 0 < len(Reader(text).all("img")) < 40
    assert "pictures were left out" in text


def test_rows_that_do_not_fit_are_said(digits, tmp_path, monkeypatch):
    monkeypatch.setattr("hydra_pipe.pipeline.decide.page.page.MOST", 130_000)
    found = report(digits, to=tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert found.bytes < 140_000
    assert f"{TRAIN} rows were asked for" in text


@pytest.mark.parametrize(
    ("fields", "kind", "told"),
    [
        ({"to": "page.pdf"}, InputError, "must end in .html"),
        ({"to": "no/such/page.html"}, InputError, "does not exist"),
        ({"to": "s3://bucket/page.html"}, InputError, "local path"),
        ({"to": "page.html", "rows": 0}, InputError, "rows is 0"),
        ({"to": "page.html", "explain": [999]}, InputError, "test sample 999 is not in"),
        ({"to": "page.html", "detection": "knn"}, IncompleteStage, "no detection 'knn'"),
        ({"to": "page.html", "method": "tracin"}, InputError, "no method 'tracin'"),
    ],
)
def test_what_cannot_be_written_is_said_and_nothing_is_left(
    digits, tmp_path, monkeypatch, fields, kind, told
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=told) as caught:
        report(digits, **fields)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_not_replaced_unasked_and_none_lies_in_the_run(digits, tmp_path):
    place = tmp_path / "r.html"
    place.write_text("mine")
    with pytest.raises(InputError, match="--overwrite"):
        report(digits, to=place)
    assert place.read_text() == "mine"
    report(digits, to=place, rows=2, overwrite=True)
    assert place.read_text().startswith("<!doctype html>")
    with pytest.raises(InputError, match="lies inside the run"):
        report(digits, to=Path(digits.uri) / "page.html")


def test_an_unfinished_run_has_no_report(tmp_path):
    built = Built(tmp_path / "r").build(upto="record")
    with pytest.raises(IncompleteStage):
        report(built.uri, to=tmp_path / "r.html")


def test_the_command_writes_and_says_so(digits, tmp_path):
    place = str(tmp_path / "r.html")
    done = cli(
        "report", digits.uri, "--to", place, "--rows", "4", "--explain", "3", "--explain", "5", "--quiet"
    )
    assert done.exit_code == 0, done.output
    assert f"wrote {place}: 4 of {TRAIN} samples ranked by detection margin" in done.stdout.replace("\n", " ")
    told = json.loads(
        cli("report", digits.uri, "--to", place, "--overwrite", "--format", "json", "--quiet").stdout
    )
    assert told["explained"] == []
    refused = cli("report", digits.uri, "--to", place)
    assert refused.exit_code == 1
    assert len(refused.stderr.splitlines()) == 1


def test_a_run_with_spoilt_labels_and_no_classes_is_reported(tmp_path):
    built = Built(tmp_path / "bare")
    built.train_label[:], built.test_label[:] = -1, -1
    built.build()
    report(built.uri, to=tmp_path / "r.html")
    assert "Class by class" not in (tmp_path / "r.html").read_text(encoding="utf-8")
    assert open_run(built.uri).methods() == ["hydra"]


def test_markup_escapes_what_it_is_given():
    assert (
        element("p", "<b>", title='"<', hidden=False, data_x=0)
        == '<p title="&quot;&lt;" data-x="0">&lt;b&gt;</p>'
    )
    assert escaped("\ud800\x07\ufffe\ufdd0\U0001ffff") == "\ufffd" * 5
    assert escaped("\u202e\u2028é\U0001f600") == "\u202e\u2028é\U0001f600"
    assert number(-0.00123) == "−0.00123"
    assert number(float("nan")) == "–"


def test_a_png_is_what_other_readers_read(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for pixels in (
        np.arange(35, dtype=np.uint8).reshape(5, 7),
        np.arange(105, dtype=np.uint8).reshape(5, 7, 3),
    ):
        (tmp_path / "p.png").write_bytes(png(pixels))
        assert np.array_equal(np.asarray(image.open(tmp_path / "p.png")), pixels)
    whole = np.repeat(np.repeat(np.arange(16, dtype=np.uint8).reshape(4, 4), 3, 0), 3, 1)
    assert np.array_equal(shrunk(whole, 4), np.arange(16).reshape(4, 4))
    assert shrunk(np.zeros((100, 10, 3), np.uint8), 20).shape == (20, 2, 3)


def test_small_numbers_of_a_map_are_told_apart():
    values = [[1.42, -0.0301], [-0.0004, 0.25]]
    drawn = heat([0, 1], [0, 1], lambda i, j: values[i][j], title="t", down="d", across="a")
    assert re.findall(r'class="cell">([^<]*)<', drawn) == ["+1.42", "−0.03", "0", "+0.25"]

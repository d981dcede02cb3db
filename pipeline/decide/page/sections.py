"""The views of the page beside the ranked table: the run, scores, classes, timings."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

import numpy as np

from ....storage import layout
from ...analysis.interclass import SCALES
from ..report_facts import Facts, detection_table
from .charts import Line, bars, heat, lines
from .markup import Markup, data_table, element, hostile, joined, number, percent, query

MAPPED = 40
"""Classes that a map shows at most: those with the most flagged samples, or else the largest."""

BINS = 40
_POINTS = 200


def facts_list(pairs: Sequence[tuple[str, object]]) -> Markup:
    """Return names and values; those that are None are left out."""
    entries = (
        element("div", element("dt", name), element("dd", value))
        for name, value in pairs
        if value is not None
    )
    return element("dl", *entries, class_="facts")


def run_section(facts: Facts) -> Markup:
    """Return what was run, and how far it is to be trusted."""
    found, run = facts.summary, facts.run
    accuracy = found["accuracy"]
    warnings = [element("p", element("strong", "Warning: "), hostile(text)) for text in found["warnings"]]
    trust = [element("li", hostile(line.strip())) for line in found["trust"]]
    return element(
        "section",
        element("h2", "The run"),
        facts_list(
            (
                ("recipe", hostile(run.recipe)),
                ("method", facts.method),
                ("training samples, N", _count(found["n_train"])),
                ("tracked, n", _count(found["n_tracked"])),
                ("test samples, M", _count(found["n_test_tracked"])),
                ("parameters", _count(found["dimension"])),
                ("epochs", facts.epochs),
                ("accuracy, training", percent(accuracy["train"])),
                ("accuracy, test", percent(accuracy["test"])),
            )
        ),
        element("h3", "How far to trust it"),
        *warnings,
        _fidelity(facts),
        element("ul", *trust) if trust else None,
        query(f"hydra-pipe status {shlex.quote(run.uri)}"),
        id="run",
    )


def _fidelity(facts: Facts) -> Markup:
    where, found = shlex.quote(facts.run.uri), facts.evaluation
    rows = [] if found is None else [row for row in found.get("lds", ()) if row.get("method") == facts.method]
    if found is None or not rows:
        told = (
            "Not measured: nobody has retrained this run to see how well its contributions foretell what happens. "
            if found is None
            else f"Not measured for {facts.method}: the evaluation scored other methods. "
        )
        return element("p", told, "To measure: ", element("code", f"hydra-pipe evaluate {where}"))
    table = data_table(
        "Linear datamodelling score: rank correlation of what contributions foretell with the loss after retraining",
        ("kept", "score", "95% interval"),
        (
            (
                percent(row.get("fraction"), 0),
                number(row.get("lds")),
                f"{number(row.get('low'))} to {number(row.get('high'))}",
            )
            for row in rows
        ),
    )
    return joined((table, query(f"hydra-pipe evaluate {where} --methods {facts.method}")))


def scores_section(facts: Facts) -> Markup:
    """Return how suspicion is spread and cut, and what it finds where that is known."""
    found = facts.detection
    scores = facts.scores[np.isfinite(facts.scores)]
    counts, edges = np.histogram(scores, BINS) if len(scores) else (np.zeros(1, int), np.array([0.0, 1.0]))
    where = shlex.quote(facts.run.uri)
    if found is None:
        told = (
            "This run has no detection: samples are ranked by C(i), lowest first. That is a weak sign of wrong labels; "
            "a detection is better: "
        )
        said = element("p", told, element("code", f"hydra-pipe detect {where}"))
        title, axis, cut = "C(i) of all tracked training samples", "C(i); negative harms", None
        sql = f"SELECT contribution FROM read_parquet('{_sql(facts, layout.table_parts('samples', facts.method))}');"
    else:
        values = found.values
        flagged = f"{values.flagged:,} of {len(facts.ranking):,} flagged"
        flagged += f" by the rule {values.flag}" if values.flag else ""
        if values.separation is not None:
            flagged += f", separation {number(values.separation)}"
        by = "" if found.name == values.by else f", by {values.by}"
        said = element("p", f"Detection {found.name}{by}: {flagged}.")
        if values.inspect:
            said = joined(
                (
                    said,
                    element("p", "So few are flagged that each should be looked at: inspect, do not drop."),
                )
            )
        title, axis, cut = "Suspicion of all judged training samples", "suspicion; high is bad", values.cut
        sql = f"SELECT suspicion FROM read_parquet('{_quoted(detection_table(facts.run, found))}');"
    histogram = bars(
        edges.tolist(),
        counts.tolist(),
        title=title,
        axis=axis,
        cut=cut,
        split=0.0 if found is None else None,
    )
    parts = [element("div", histogram, query(sql), class_="wide")]
    if facts.truth is not None:
        parts.append(_curve(facts))
    return element(
        "section",
        element("h2", "Scores"),
        said,
        element("div", *parts, class_="grid"),
        id="scores",
    )


def _curve(facts: Facts) -> Markup:
    truth = facts.truth
    assert truth is not None
    n = len(truth.inspected) - 1
    chosen = np.unique(np.linspace(0, n, min(n, _POINTS) + 1).astype(int))
    share = truth.wrong / n
    points = list(zip(truth.inspected[chosen].tolist(), truth.found[chosen].tolist(), strict=True))
    recall = ", ".join(f"{percent(found, 0)} after {percent(at, 0)}" for at, found in truth.recall.items())
    told = f"{truth.wrong:,} labels are wrong on purpose. AUROC {truth.auroc:.3f}; found: {recall}."
    drawn = lines(
        (
            Line(name="by chance", style="chance", points=((0, 0), (1, 1))),
            Line(name="perfect", style="ideal", points=((0, 0), (share, 1), (1, 1))),
            Line(name="this ranking", style="main", points=points),
        ),
        title="Wrong labels found over samples inspected",
        told=told,
        across="inspected, most suspicious first",
        up="found",
    )
    by = f" --by {facts.detection.values.by}" if facts.detection is not None else " --by contribution"
    return element(
        "div", drawn, element("p", told), query(f"hydra-pipe detect {shlex.quote(facts.run.uri)}{by}")
    )


def _counts(facts: Facts) -> Markup:
    judged, truth = facts.detection is not None, facts.truth is not None
    headers = ["class", "training"]
    headers += ["flagged", "share flagged"] if judged else []
    headers += ["wrong on purpose"] if truth else []
    headers += ["test"]
    rows = []
    for one in facts.counts:
        row: list[object] = [one.label, f"{one.train:,}"]
        row += [f"{one.flagged:,}", percent(one.flagged / one.train if one.train else None)] if judged else []
        row += [f"{one.wrong:,}"] if truth else []
        rows.append([*row, f"{one.test:,}"])
    table = data_table("Tracked training samples and test samples by given label", headers, rows[:MAPPED])
    sql = (
        "SELECT label, count(*) AS samples FROM read_parquet("
        f"'{_sql(facts, layout.table_parts('samples', facts.method))}') GROUP BY label ORDER BY label;"
    )
    more = f"{len(rows) - MAPPED:,} more classes are left out." if len(rows) > MAPPED else None
    return joined((table, element("p", more) if more else None, query(sql)))


def classes_section(facts: Facts) -> Markup | None:
    """Return the samples by class and the class by class maps; None where there are no classes."""
    if not facts.counts:
        return None
    chosen = _mapped(facts)
    parts: list[Markup] = []
    if facts.moves:
        labels = sorted({c for pair in facts.moves for c in pair} & chosen)
        flagged = facts.detection is not None and facts.detection.values.flagged
        drawn = heat(
            labels,
            labels,
            lambda i, j: facts.moves.get((labels[i], labels[j]), 0) if i != j else None,
            title=f"Given against suggested label of {'flagged' if flagged else 'all judged'} samples",
            down="given",
            across="suggested",
            sign=False,
        )
        assert facts.detection is not None
        sql = (
            "SELECT given_label, suggested_label, count(*) AS samples FROM read_parquet("
            f"'{_quoted(detection_table(facts.run, facts.detection))}') WHERE suggested_label >= 0 AND "
            f"suggested_label <> given_label{' AND is_label_issue' if flagged else ''} GROUP BY ALL;"
        )
        parts.append(element("div", drawn, query(sql)))
    found = facts.interclass
    if found is not None:
        rows = [i for i, c in enumerate(found.train_classes) if c in chosen]
        columns = [j for j, c in enumerate(found.test_classes) if c in chosen]
        sql = (
            "SELECT train_class, test_class, contribution, normalized FROM read_parquet("
            f"'{_sql(facts, layout.table_parts('interclass', facts.method))}') ORDER BY ALL;"
        )
        for scale, title in (
            ("raw", f"Eq. 23: {SCALES['raw']}"),
            ("code", f"As Figure 2 of the HyDRA paper: {SCALES['code']}"),
        ):
            values = found.scaled(scale)  # type: ignore[arg-type]
            drawn = heat(
                [found.train_classes[i] for i in rows],
                [found.test_classes[j] for j in columns],
                lambda i, j, values=values: float(values[rows[i], columns[j]]),  # type: ignore[misc]
                title=title,
                down="training",
                across="test",
            )
            parts.append(element("div", drawn, query(sql)))
    note = (
        "Blue helps, orange harms, and the signs are written. The entry divided by √(row sum × column sum), as the "
        "paper's text has it, is not defined where that product is negative; it is the column normalized of the table."
    )
    return element(
        "section",
        element("h2", "Class by class"),
        _counts(facts),
        element("h3", "Maps"),
        element("p", note, class_="note"),
        element("div", *parts, class_="grid"),
        id="classes",
    )


def _mapped(facts: Facts) -> set[int]:
    counts = sorted(facts.counts, key=lambda one: (-one.flagged, -one.train, one.label))
    return {one.label for one in counts[:MAPPED]}


def timings_section(facts: Facts) -> Markup:
    """Return how long the stages took."""
    rows = [
        (
            stage["stage"],
            stage["units"],
            _count(stage["rows"]) or "–",
            f"{stage['bytes'] / 1e6:,.1f} MB",
            "–" if stage["seconds"] is None else f"{stage['seconds']:,.1f} s",
        )
        for stage in facts.summary["stages"]
    ]
    return element(
        "section",
        element("h2", "Timings"),
        data_table("Stages of the run", ("stage", "units", "rows", "size", "time"), rows),
        query(f"hydra-pipe status {shlex.quote(facts.run.uri)} --format csv"),
        id="timings",
    )


def rest_of(facts: Facts) -> str:
    """Return the SQL that gives all ranked samples."""
    if facts.detection is not None:
        return f"SELECT * FROM read_parquet('{_quoted(detection_table(facts.run, facts.detection))}') ORDER BY rank;"
    place = _sql(facts, layout.table_parts("samples", facts.method))
    return f"SELECT * FROM read_parquet('{place}') ORDER BY contribution, train_index;"


def _sql(facts: Facts, relative: str) -> str:
    return _quoted(facts.run.directory.path(relative))


def _quoted(path: str) -> str:
    return path.replace("'", "''")


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"

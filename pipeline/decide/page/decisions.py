"""Before and after: what retraining said of each decision that was made upon suspicions."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING

from ....storage import layout
from ...reading.decisions import DROP, decision_names, read_decision
from ...reading.outcomes import ArmOutcome, Outcome, Spread, read_outcome
from .charts import chart
from .markup import Markup, data_table, element, hostile, number, percent, query

if TYPE_CHECKING:
    from ...reading.reader import Reader


def decisions_section(run: Reader) -> Markup | None:
    """Return what the retrainings of a run's decisions gave; None: there were none."""
    outcomes = [found for name in decision_names(run) if (found := read_outcome(run, name)) is not None]
    if not outcomes:
        return None
    return element(
        "section", element("h2", "Before and after"), *(_outcome(run, one) for one in outcomes), id="decision"
    )


def _outcome(run: Reader, found: Outcome) -> Markup:
    accurate = all(arm.accuracy is not None for arm in found.arms)
    rows = (
        (
            arm.arm,
            f"{arm.samples:,.0f}",
            _spread(arm.accuracy, share=True) if accurate else _spread(arm.loss),
            _difference(arm.to_before, share=accurate),
            _difference(arm.to_random, share=accurate),
        )
        for arm in found.arms
    )
    table = data_table(
        f"{'Accuracy' if accurate else 'Loss'} after retraining with {len(found.seeds)} seeds; 95% intervals",
        ("trained on", "samples", "mean", "to before", "to random"),
        rows,
    )
    place = run.directory.path(layout.decision(found.decision, layout.OUTCOME_TABLE)).replace("'", "''")
    return element(
        "div",
        element("h3", hostile(found.decision)),
        element("p", f"Judged by {found.judging:,} test samples: ", hostile(found.trust)),
        element("div", element("div", _picture(found.arms, accurate)), element("div", table), class_="grid"),
        *(element("p", hostile(note), class_="note") for note in found.notes),
        query(_command(run, found), f"SELECT * FROM read_parquet('{place}');"),
    )


def _command(run: Reader, found: Outcome) -> str:
    """Return the command that makes the decision and its retrainings."""
    values = read_decision(run, found.decision).values
    words = ["hydra-pipe", "clean", run.uri]
    words += ["--list", "FILE"] if values.detection is None else ["--detection", values.detection]
    words += [f"--{values.rule}", *([values.cut] if values.rule == DROP else ["--cut", values.cut])]
    words += ["--name", found.decision, "--retrain", str(len(found.seeds)), "--way", found.way]
    return shlex.join(words)


def _picture(arms: tuple[ArmOutcome, ...], accurate: bool) -> Markup:
    """Return a dot an arm with its interval, and fainter ones for the seeds."""
    wide, left, step, top = 460, 110, 30, 12
    spreads = [arm.accuracy if accurate and arm.accuracy is not None else arm.loss for arm in arms]
    singles = [arm.accuracies if accurate else arm.losses for arm in arms]
    ends = [end for one in spreads for end in (one.low, one.high, one.mean) if end is not None]
    ends += [value for values in singles for value in values]
    if accurate:  # an interval by Student's t may leave what an accuracy can be
        ends = [min(max(end, 0.0), 1.0) for end in ends]
    low, high = min(ends), max(ends)
    span = (high - low) or 1.0
    high_px = top + step * len(arms) + 34

    def x(value: float) -> str:
        return f"{left + (wide - left - 24) * (min(max(value, low), high) - low) / span:.1f}"

    parts: list[Markup] = []
    for at, (arm, spread, values) in enumerate(zip(arms, spreads, singles, strict=True)):
        y = top + step * (at + 0.5)
        parts.append(element("text", arm.arm, x=left - 10, y=y + 4, text_anchor="end"))
        if spread.low is not None and spread.high is not None:
            parts.append(element("line", x1=x(spread.low), x2=x(spread.high), y1=y, y2=y, class_="main"))
        parts += [element("circle", cx=x(v), cy=y, r=2.5, class_="plain", fill_opacity=0.5) for v in values]
        told = f"{arm.arm}: {_spread(spread, share=accurate)}"
        parts.append(element("circle", element("title", told), cx=x(spread.mean), cy=y, r=5, class_="plain"))
    for value, anchor in ((low, "start"), (high, "end")):
        shown = percent(value) if accurate else number(value)
        parts.append(element("text", shown, x=x(value), y=high_px - 8, text_anchor=anchor))
    what = "accuracy" if accurate else "loss"
    told = "; ".join(f"{arm.arm} {_spread(s, share=accurate)}" for arm, s in zip(arms, spreads, strict=True))
    return chart(wide, high_px, f"Test {what} by what was trained on; small dots are seeds", told, *parts)


def _spread(found: Spread | None, *, share: bool = False) -> str:
    if found is None:
        return "–"
    shown = percent if share else number
    mean = shown(found.mean)
    return mean if found.low is None else f"{mean} ({shown(found.low)} to {shown(found.high)})"


def _difference(found: Spread | None, *, share: bool) -> str:
    if found is None:
        return "–"
    scale, unit = (100, " points") if share else (1, "")
    text = f"{number(scale * found.mean, 2, sign=True)}{unit}"
    if found.low is None or found.high is None:
        return text
    return f"{text} ({number(scale * found.low, 2, sign=True)} to {number(scale * found.high, 2, sign=True)})"

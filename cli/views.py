"""How documents (plain dictionaries) become tables of at most 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .output import Column, Table, plain, show, show_bytes, show_seconds, typed

SHOWN_ROWS = 20
"""Rows of a plan's or status' list that a table shows; JSON and CSV show all."""

_KEY_VALUE = (Column(key="key", header=""), Column(key="value", header=""))


def summary_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """Return the closing summary of a run."""
    accuracy, memory = found["accuracy"], found["memory"]
    peak, predicted = memory["peak_bytes"], memory["predicted_bytes"]
    facts = {
        "run": found["run"],
        "recipe": found["recipe"],
        "method": found["method"],
        "training samples": _of(found["n_tracked"], found["n_train"], "tracked"),
        "test samples": _of(found["n_test_tracked"], found["n_test"], "tracked"),
        "parameters": found["dimension"],
        "accuracy": f"train {_percent(accuracy['train'])}, test {_percent(accuracy['test'])}",
        "peak memory": None
        if peak is None
        else show_bytes(peak)
        + ("" if predicted is None else f", planned were {show_bytes(predicted)} (largest worker)"),
    }
    parts: list[Table | str] = [*_warnings(found), _facts(None, facts), ""]
    stages = Table(
        title=None,
        columns=(
            Column(key="stage", header="stage"),
            Column(key="units", header="units", right=True),
            Column(key="rows", header="rows", right=True),
            Column(key="bytes", header="size", right=True),
            Column(key="seconds", header="time", right=True),
        ),
        rows=found["stages"],
    )
    disk = Table(
        title=None,
        columns=(
            Column(key="path", header="where it is, below the run"),
            Column(key="files", header="files", right=True),
            Column(key="bytes", header="size", right=True),
        ),
        rows=[*found["disk"], {"path": "together", **_sum(found["disk"], "files", "bytes")}],
    )
    parts += [stages, "", disk, ""]
    if found["helpful"]:
        for kind in ("helpful", "harmful"):
            title = f"most {kind} training samples, C(i)"
            parts += [samples_table(title, found[kind], found.get("targets")), ""]
    if found["trust"]:
        parts += ["trust:", *(f"  {plain(line)}" for line in found["trust"]), ""]
    return [*parts, "next:", *(f"  {typed(command)}" for command in found["next"])]


def samples_table(title: str, rows: list[dict[str, Any]], targets: str | None = None) -> Table:
    """Return training samples with their contributions; columns nobody filled are left out.

    Args:
        title: Above the table.
        rows: One a sample.
        targets: What the spread is over: test samples, unless ``classes``; ``mean`` has none.
    """
    over = "std over classes" if targets == "classes" else "std over tests"
    columns = [
        Column(key="rank", header="rank", right=True),
        Column(key="train_index", header="train_index", right=True, kind="text"),
        Column(key="label", header="label", right=True, kind="text"),
        Column(key="original_label", header="true label", right=True, kind="text"),
        Column(key="contribution", header="contribution", right=True, kind="signed"),
        *([Column(key="contribution_std", header=over, right=True, kind="signed")] * (targets != "mean")),
        Column(key="contribution_spread", header="std over seeds", right=True, kind="signed"),
        Column(key="visits", header="visits", right=True),
    ]
    filled = [c for c in columns if any(row.get(c.key) is not None for row in rows)]
    if any(column.key == "contribution_spread" for column in filled):  # no room for both
        filled = [column for column in filled if column.key != "visits"]
    # -1 is how files say that there is no label; people are told with a dash.
    rows = [{**row, "label": None if row.get("label") == -1 else row.get("label")} for row in rows]
    return Table(title=title, columns=filled, rows=rows)


def status_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """Return how far a run has come."""
    facts = {
        "run": found["run"],
        "recipe": found["recipe"],
        "state": found["state"],
        "training samples": _of(found["n_tracked"], found["n_train"], "tracked"),
        "test samples": _of(found["n_test_tracked"], found["n_test"], "tracked"),
        "parameters": found["dimension"],
        "rows": _rows_kept(found["rows_kept"]),
        "methods": ", ".join(f"{name} ({state})" for name, state in found["methods"].items()) or None,
    }
    rows = [
        {**stage, "of": f"{stage['done']}/{'?' if stage['units'] is None else stage['units']}"}
        for stage in found["stages"]
    ]
    stages = Table(
        title=None,
        columns=(
            Column(key="stage", header="stage"),
            Column(key="state", header="state"),
            Column(key="of", header="units", right=True),
            Column(key="rows", header="rows", right=True),
            Column(key="bytes", header="size", right=True),
            Column(key="seconds", header="time", right=True),
        ),
        rows=rows,
    )
    facts["other seeds"] = ", ".join(f"{r['seed']} ({r['state']})" for r in found["seeds"]) or None
    facts |= _writer_facts(found["writer"])
    parts: list[Table | str] = [*_warnings(found), _facts(None, facts), "", stages]
    if found["resume"] and not found["writer"]:
        parts += ["", "to do what is missing:", f"  {typed(found['resume'])}"]
    return parts


def _rows_kept(kept: Mapping[str, Any]) -> str | None:
    """Return what is kept of rows, in words; None where that is all."""
    told = []
    if kept["layers"] is not None:
        told.append(f"parameters {','.join(kept['layers'])}")
    if kept["columns"] is not None:
        told.append(f"{kept['columns']:,} numbers")
    told += [f"{method} as {dtype}" for method, dtype in kept["store_dtype"].items()]
    return ", ".join(told) or None


def _writer_facts(writer: Mapping[str, Any] | None) -> dict[str, str]:
    """Return who writes to a run now, and how far that is."""
    if writer is None:
        return {}
    facts = {
        "in work": f"{writer['command']} on {writer['host']}, process {writer['pid']}, since {writer['since']}",
        "last sign of life": f"{writer['at']} (its clock)",
    }
    standing = writer["standing"]
    if standing is not None:
        told = [f"{standing['stage']}: {standing['finished']}/{standing['units']} units"]
        if standing["total"]:
            told.append(f"{standing['amount']:,}/{standing['total']:,} {standing['label']}s")
        if standing["rate"]:
            told.append(f"{standing['rate']:,.3g} {standing['label']}s/s")
        if standing["left_seconds"] is not None:
            told.append(f"about {show_seconds(standing['left_seconds'])} left")
        facts["its progress"] = ", ".join(told)
        facts["last progress"] = f"{standing['moved']} (its clock)"
    return facts


def verification_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """Return what verify found: one line a problem, then the counts."""
    law = found["conservation"]
    if not law["applicable"]:
        conserved = f"not applicable: {law['reason']}"
    else:
        worst = max(law["groups"], key=lambda group: group["error"], default=None)
        size = "" if worst is None else f" (error {worst['error']:.1e}, limit {worst['limit']:.1e})"
        conserved = ("holds" if law["ok"] else "broken") + size
    count = len(found["problems"])
    facts = {
        "run": found["run"],
        "files": f"{found['files']:,} checked, {show_bytes(found['bytes'])}",
        "conservation": conserved,
        "result": "ok" if not count else f"{count} problem{'s' if count > 1 else ''}",
    }
    lines = [f"problem: {plain(text)}" for text in found["problems"]]
    lines += [f"note: {plain(text)}" for text in found["notes"]]
    rows = Table(
        title=None,
        columns=(Column(key="part", header="contents read"), Column(key="rows", header="rows", right=True)),
        rows=[{"part": part, "rows": count} for part, count in found["rows"].items()],
    )
    parts: list[Table | str] = [*lines]
    if lines:
        parts.append("")
    if found["stores"]:
        parts += [_losses_table(found["stores"]), ""]
    if found["rows"]:
        parts += [rows, ""]
    return [*parts, _facts(None, facts)]


def _losses_table(stores: Sequence[Mapping[str, Any]]) -> Table:
    """Return what storing rows in fewer numbers or bits costs, on a sample."""
    first = stores[0]
    return Table(
        title=f"hypergradients as they are stored, against whole ones: {first['rows']} samples, {first['targets']} targets",
        columns=(
            Column(key="method", header="method"),
            Column(key="numbers", header="numbers a row", right=True),
            Column(key="dtype", header="stored as"),
            Column(key="spearman", header="Spearman", right=True),
            Column(key="spearman_mean", header="of the means", right=True),
            Column(key="error", header="error", right=True),
        ),
        rows=[
            {
                **row,
                "numbers": f"{row['columns']:,} of {row['parameters']:,}",
                **{
                    key: "-" if row[key] is None else f"{row[key]:.4f}"
                    for key in ("spearman", "spearman_mean")
                },
                "error": f"{row['error']:.1e}",
            }
            for row in stores
        ],
    )


def plan_tables(sections: Mapping[str, Any]) -> list[Table | str]:
    """Return a plan: a table a section; numbers of memory and disk are bytes, of time seconds."""
    parts: list[Table | str] = []
    for name, section in sections.items():
        kind = {"memory": "bytes", "disk": "bytes", "time": "seconds"}.get(name, "auto")
        if isinstance(section, Mapping):
            if not section:
                continue
            rows = [{"key": words(key), "value": show(value, kind, key)} for key, value in section.items()]
            parts.append(Table(title=name, columns=_KEY_VALUE, rows=rows, header=False))
        elif isinstance(section, list) and section and isinstance(section[0], Mapping):
            columns = [
                Column(key=key, header=words(key), right=not isinstance(value, str), kind=kind)
                for key, value in section[0].items()
            ]
            title = f"{name}: {len(section):,}"
            parts.append(Table(title=title, columns=columns, rows=section[:SHOWN_ROWS]))
            if len(section) > SHOWN_ROWS:
                parts.append(f"  and {len(section) - SHOWN_ROWS:,} more; --format json shows all")
        else:
            rows = [{"key": words(name), "value": show(section, kind, name)}]
            parts.append(Table(title=None, columns=_KEY_VALUE, rows=rows, header=False))
        parts.append("")
    return parts[:-1]


def plan_rows(sections: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a plan as flat rows: ``section``, ``row`` (of a list, from 0), ``key``, ``value``."""

    def flat() -> Iterator[tuple[str, int | None, str, Any]]:
        for name, section in sections.items():
            if isinstance(section, Mapping):
                yield from ((name, None, key, value) for key, value in section.items())
            elif isinstance(section, list):
                for number, row in enumerate(section):
                    items = row.items() if isinstance(row, Mapping) else [("", row)]
                    yield from ((name, number, key, value) for key, value in items)
            else:
                yield name, None, "", section

    return [dict(zip(("section", "row", "key", "value"), row, strict=True)) for row in flat()]


def words(key: str) -> str:
    """Return a key as people read it: units are shown with the value, so their suffix goes."""
    return key.removesuffix("_bytes").removesuffix("_seconds").replace("_", " ")


def _facts(title: str | None, facts: Mapping[str, Any]) -> Table:
    rows = [{"key": key, "value": value} for key, value in facts.items() if value is not None]
    return Table(title=title, columns=_KEY_VALUE, rows=rows, header=False)


def _warnings(found: Mapping[str, Any]) -> list[Table | str]:
    lines: list[Table | str] = [f"warning: {plain(text)}" for text in found.get("warnings", ())]
    return [*lines, ""] if lines else []


def _of(tracked: int | None, total: int | None, what: str) -> str | None:
    if total is None:
        return None
    if tracked is None or tracked == total:
        return f"{total:,}"
    return f"{total:,}, {tracked:,} {what}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


def _sum(rows: list[dict[str, Any]], *keys: str) -> dict[str, int]:
    return {key: sum(row[key] for row in rows) for key in keys}

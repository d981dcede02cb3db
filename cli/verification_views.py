"""How what ``verify --deep`` found becomes a table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .output import Column, Table, show_seconds


def deep_tables(found: Mapping[str, Any]) -> list[Table | str]:
    """Return the checks of ``--deep``: the largest deviation of each beside its limit."""
    samples, tests = (", ".join(map(str, found[key])) for key in ("train_index", "test_index"))
    rows = [
        {
            **check,
            "deviation": f"{check['deviation']:.1e}",
            "limit": f"{check['limit']:.0e}",
            "result": "ok" if check["ok"] else "FAILED",
        }
        for check in found["checks"]
    ]
    table = Table(
        title=f"computed again in float64: training samples {samples}; test samples {tests}",
        columns=(
            Column(key="method", header="method"),
            Column(key="check", header="what"),
            Column(key="values", header="numbers", right=True),
            Column(key="deviation", header="deviation", right=True),
            Column(key="limit", header="limit", right=True),
            Column(key="result", header="result"),
        ),
        rows=rows,
    )
    cost = (
        f"{found['steps']:,} steps, {found['products']:,} Hessian products, {show_seconds(found['seconds'])}"
    )
    return [table, f"  {cost}", ""]

"""The Grafana dashboard asks for what there is, and shows all of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

from hydra_pipe.pipeline.executors.ray_metrics import COUNTERS, TAG

ROOT = Path(__file__).resolve().parents[2]


def test_the_dashboard_asks_for_every_counter_and_for_nothing_else():
    dashboard = json.loads((ROOT / "deploy" / "grafana-dashboard.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked = {name for query in queries for name in re.findall(r"\b(ray_\w+)\b", query)}
    assert asked == {f"ray_{name}_total" for name in COUNTERS}
    assert {tag for query in queries for tag in re.findall(r"by \((\w+)\)", query)} == {TAG}
    assert {target["legendFormat"] for p in dashboard["panels"] for target in p["targets"]} == {
        f"{{{{{TAG}}}}}"
    }
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    (source,) = dashboard["templating"]["list"]
    assert {panel["datasource"]["uid"] for panel in dashboard["panels"]} == {f"${{{source['name']}}}"}

"""Draw the dial from EKFAC to exact: fidelity against exact adjoint passes.

    python -m benchmarks fidelity
    python docs/images/make_dial.py

reads `benchmarks/results/fidelity.json` and writes `docs/images/dial.png`. Needs the `plots` extra.
"""

from __future__ import annotations

import argparse
import io
import json
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

RESULT = Path(__file__).parents[2] / "benchmarks" / "results" / "fidelity.json"
OUTPUT = Path(__file__).with_name("dial.png")
COLORS = ("#b2182b", "#2166ac", "#333333")
Points = dict[float, list[tuple[int, float, float, float]]]


def points(result: dict[str, Any]) -> tuple[Points, dict[float, float]]:
    """Read the measurements.

    Returns:
        Share kept -> rows (exact passes, LDS, low, high), ascending: `hydra-ekfac` with 0 passes, its
        corrected forms with R, `hydra-exact` with one pass a test sample; and share kept -> LDS of
        the fast form.
    """
    found: Points = {}
    fast: dict[float, float] = {}
    for line in result["lines"]:
        named = re.fullmatch(r"(\S+), ([\d.]+)% kept", line["what"])
        if line["unit"] != "LDS" or named is None:
            continue
        method, share = named[1], float(named[2]) / 100
        low, high = (float(text) for text in re.findall(r"-?\d\.\d+", line["note"]))
        if method == "hydra":
            fast[share] = line["value"]
        elif (passes := _passes(method, result["sizes"])) is not None:
            found.setdefault(share, []).append((passes, line["value"], low, high))
    return {share: sorted(rows) for share, rows in sorted(found.items())}, fast


def _passes(method: str, sizes: dict[str, Any]) -> int | None:
    if method == "hydra-exact":
        return int(sizes["test_size"])
    if method == "hydra-ekfac":
        return 0
    rank = re.fullmatch(r"hydra-ekfac-rank(\d+)", method)
    return int(rank[1]) if rank else None


def draw(result: dict[str, Any], output: Path) -> Points:
    """Write the picture; return what it shows."""
    found, fast = points(result)
    figure, axis = plt.subplots(figsize=(7.2, 4.0), layout="constrained")
    for color, (share, rows) in zip(COLORS, found.items(), strict=False):
        passes = [row[0] for row in rows]
        axis.fill_between(passes, [r[2] for r in rows], [r[3] for r in rows], color=color, alpha=0.12, lw=0)
        label = f"{100 * share:g}% kept"
        if share in fast:
            label += f" (fast form: {fast[share]:.2f})"
        axis.plot(passes, [row[1] for row in rows], "o-", color=color, ms=4, lw=1.5, label=label)
    axis.set_xscale("symlog", linthresh=5, linscale=0.6)
    ticks = sorted({row[0] for rows in found.values() for row in rows})
    names = {0: "0\nekfac", max(ticks): f"{max(ticks)}\nexact"}
    axis.set_xticks(ticks, [names.get(t, f"{t}\n") for t in ticks])
    axis.minorticks_off()
    axis.set_xlabel("exact adjoint passes (--exact-rank R)", fontsize=9)
    axis.set_ylabel("LDS: rank correlation with real retraining", fontsize=9)
    axis.tick_params(labelsize=8.5)
    axis.grid(axis="y", color="#dddddd", lw=0.6)
    axis.legend(frameon=False, fontsize=8.5, loc="lower right")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    with io.BytesIO() as full:
        figure.savefig(full, dpi=120)
        plt.close(figure)
        Image.open(full).convert("RGB").quantize(64).save(output, optimize=True)
    return found


def main() -> None:
    """Read the result's place from the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw docs/images/dial.png from the fidelity benchmark.")
    parser.add_argument("result", nargs="?", type=Path, default=RESULT, help="fidelity.json")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    for share, rows in draw(json.loads(arguments.result.read_text()), arguments.output).items():
        print(f"{share:g} kept: " + ", ".join(f"{passes}: {score:.3f}" for passes, score, _, _ in rows))


if __name__ == "__main__":
    main()

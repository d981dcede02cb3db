"""Draw the picture of the README from a finished run of the digits recipe.

    hydra-pipe run digits --set label_noise=0.1 --out runs/noisy
    python docs/images/make.py runs/noisy

With `hydra-pipe run digits --set label_noise=0.1 --mode adjoint --hessian exact --out runs/noisy` between
the two, the numbers of the exact form are printed beside those of the fast one.

Left: the most harmful training images, with the label they were trained on and, where that was
wrong on purpose, the true one. Right: Eq. 23, the mean contribution of a training class to a test
class. Needs the `plots` extra.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from hydra_pipe.workers.recipes.digits import Digits
from matplotlib.colors import SymLogNorm
from PIL import Image

from hydra_pipe import Run, open_run

WRONG, RIGHT = "#b2182b", "#333333"
ROWS, COLUMNS = 3, 4
OUTPUT = Path(__file__).with_name("digits.png")


def draw(run: Run, output: Path) -> dict[str, Any]:
    """Write the picture and return the numbers that the README states about this run.

    Args:
        run: A finished run of the built-in recipe ``digits``.
        output: The PNG to write.

    Returns:
        ``samples``, ``wrong``: training samples, and those with a wrong label; ``shown``: images in
        the gallery; and for each method of the run how many of that many most harmful (most
        helpful) samples have a wrong label, with the lowest and highest C(i).
    """
    if run.recipe != "digits":
        raise SystemExit(f"{run.uri} is a run of {run.recipe}; this picture is drawn from one of digits")
    dataset: Any = Digits(**run.info["recipe"]["arguments"]).train_dataset()
    noisy = run.noisy()
    truth = {} if noisy is None else dict(zip(noisy[0].tolist(), noisy[1].tolist(), strict=True))
    count = ROWS * COLUMNS
    harmful = run.top(count, harmful=True).to_pylist()

    figure = plt.figure(figsize=(9.6, 4.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1.0, 1.12], wspace=0.03)
    _gallery(left, dataset, harmful, truth)
    _heat_map(right, run)
    with io.BytesIO() as full:
        figure.savefig(full, dpi=120)
        plt.close(figure)
        # A palette: a third of the size, and nobody sees the difference.
        Image.open(full).convert("RGB").quantize(160).save(output, optimize=True)
    numbers: dict[str, Any] = {"samples": len(dataset), "wrong": len(truth), "shown": count}
    for method in run.methods():
        lowest, highest = (run.top(count, harmful=low, method=method) for low in (True, False))
        numbers[method] = {
            "wrong_harmful": sum(i in truth for i in lowest["train_index"].to_pylist()),
            "wrong_helpful": sum(i in truth for i in highest["train_index"].to_pylist()),
            "lowest": lowest["contribution"][0].as_py(),
            "highest": highest["contribution"][0].as_py(),
        }
    return numbers


def _gallery(figure: Any, dataset: Any, rows: list[dict[str, Any]], truth: dict[int, int]) -> None:
    figure.suptitle(f"The {len(rows)} most harmful training images", fontsize=11)
    for axis, row in zip(figure.subplots(ROWS, COLUMNS).flat, rows, strict=True):
        index = row["train_index"]
        axis.imshow(dataset[index][0][0].numpy(), cmap="gray_r", vmin=0, vmax=1, interpolation="bicubic")
        axis.set(xticks=[], yticks=[])
        label = f"label {row['label']}"
        if index in truth:
            label += f", truly {truth[index]}"
        color = WRONG if index in truth else RIGHT
        axis.set_title(label, fontsize=9, color=color, pad=3)
        axis.set_xlabel(
            f"#{index}   C = {row['contribution']:+.2f}", fontsize=7.5, color="#444444", labelpad=2
        )
        for spine in axis.spines.values():
            spine.set_color(color)


def _heat_map(figure: Any, run: Run) -> None:
    table = run.interclass()
    train, test = (table[name].to_numpy() for name in ("train_class", "test_class"))
    matrix = np.full((train.max() + 1, test.max() + 1), np.nan)
    matrix[train, test] = table["contribution"].to_numpy()
    figure.suptitle("Mean contribution of a training class to a test class", fontsize=11)
    axis = figure.subplots()
    largest = float(np.nanmax(np.abs(matrix)))
    # Linear up to a tenth of the largest entry: the diagonal would drown everything else.
    norm = SymLogNorm(linthresh=largest / 10, vmin=-largest, vmax=largest)
    axis.imshow(matrix, cmap="RdBu", norm=norm)
    axis.set(
        xticks=range(matrix.shape[1]),
        yticks=range(matrix.shape[0]),
    )
    axis.set_xlabel("test class", fontsize=9)
    axis.set_ylabel("training class", fontsize=9)
    axis.tick_params(length=0, labelsize=9)
    for spine in axis.spines.values():
        spine.set_visible(False)
    for (i, j), value in np.ndenumerate(matrix):
        if np.isfinite(value):
            light = abs(norm(value) - 0.5) > 0.34
            color = "white" if light else "#222222"
            shown = "0" if abs(value) < 0.005 else f"{value:+.2f}"
            axis.text(j, i, shown, ha="center", va="center", fontsize=6.5, color=color)
    figure.supxlabel(
        "blue: helps (the loss would rise without it)   red: hurts (it would fall)",
        fontsize=8,
        color="#555555",
    )


def main() -> None:
    """Read the run's address from the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw docs/images/digits.png from a run of digits.")
    parser.add_argument("run", help="run directory")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    numbers = draw(open_run(arguments.run), arguments.output)
    print(f"{arguments.output}: {numbers}")


if __name__ == "__main__":
    main()

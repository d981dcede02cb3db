"""Pictures of a run as matplotlib figures; matplotlib is an extra and is imported when one is asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import pyarrow.dataset as pa_dataset

from ...storage.errors import IncompleteStage, InputError
from .found import found_curve
from .interclass import SCALES, Scale, interclass
from .top import top

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..reading.reader import Reader

BINS = 60


def new_figure(width: float, height: float, columns: int = 1) -> tuple[Figure, list[Any]]:
    """Return a figure with axes side by side; it shows itself in a notebook and touches no global state.

    Raises:
        InputError: matplotlib is missing; names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            "figures need matplotlib, which is not installed: pip install 'hydra-pipe[plots]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False)[0])


def plot_top(
    run: Reader, k: int = 10, test: int | None = None, method: str | None = None, *, label: int | None = None
) -> Figure:
    """Draw the ``k`` most helpful and the ``k`` most harmful training samples as bars; see `top.top`."""
    tables = [top(run, k=k, test=test, label=label, harmful=h, method=method) for h in (False, True)]
    figure, axes = new_figure(9, 1.2 + 0.28 * max(map(len, tables)), 2)
    for axis, table, kind, colour in zip(axes, tables, ("helpful", "harmful"), ("C0", "C1"), strict=True):
        names = [
            f"#{i}" + ("" if c < 0 else f" ({c})")
            for i, c in zip(table["train_index"].to_pylist(), table["label"].to_pylist(), strict=True)
        ]
        axis.barh(range(len(names)), table["contribution"].to_numpy(), color=colour)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.axvline(0, color="0.5", linewidth=0.8)
        axis.set(title=f"most {kind}", xlabel=_target(test, label))
    return figure


def plot_interclass(run: Reader, method: str | None = None, scale: Scale | None = None) -> Figure:
    """Draw Eq. 23 class by class: raw, and on both scales that the paper's Figure 2 can mean.

    Args:
        run: The run.
        method: The estimator; the run's default when None.
        scale: One of `interclass.SCALES`; None: all of them side by side.

    Raises:
        InputError: There are no classes, or there is no such scale.
    """
    if scale is not None and scale not in SCALES:
        raise InputError(f"scale {scale!r}: must be one of {', '.join(SCALES)}")
    found = interclass(run, method)
    if found is None:
        raise InputError(f"{run.uri}: training or test samples have no class labels, so nothing is by class")
    chosen: list[Scale] = [scale] if scale is not None else list(get_args(Scale))
    figure, axes = new_figure(4.6 * len(chosen) + 0.4, 4.6, len(chosen))
    for axis, name in zip(axes, chosen, strict=True):
        values = found.scaled(name)
        most = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 1.0
        image = axis.imshow(values, cmap="RdBu", vmin=-most, vmax=most)
        axis.set_xticks(range(len(found.test_classes)), found.test_classes)
        axis.set_yticks(range(len(found.train_classes)), found.train_classes)
        axis.set(xlabel="test class", ylabel="training class")
        axis.set_title(SCALES[name].replace(", ", ",\n").replace(" (", "\n("), fontsize="small")
        figure.colorbar(image, ax=axis, shrink=0.75)
    return figure


def plot_contributions(
    run: Reader, test: int | None = None, train: int | None = None, method: str | None = None
) -> Figure:
    """Draw how contributions are spread: C(i), or all to one test sample, or all of one training sample.

    Raises:
        InputError: Both are given, or the run does not hold the sample.
    """
    if test is not None and train is not None:
        raise InputError(
            f"test sample {test} and training sample {train}: their contribution is one number; give one"
        )
    name = run.method(method)
    if test is None and train is None:
        values, what = run.samples(name)["contribution"].to_numpy(), "C(i) of all tracked training samples"
    else:
        key, index = ("test_index", test) if test is not None else ("train_index", train)
        assert index is not None
        if not 0 <= index < 2**31:
            raise InputError(f"{key} {index} is not in {run.uri} ({name}); choose one that it holds")
        table = run.contributions(name).to_table(
            columns=["contribution"], filter=pa_dataset.field(key) == index
        )
        if not len(table):
            raise InputError(f"{key} {index} is not in {run.uri} ({name}); choose one that it holds")
        values = table["contribution"].to_numpy()
        what = (
            f"C(i, {index}) of all training samples"
            if test is not None
            else f"C({index}, j) to all test samples"
        )
    figure, (axis,) = new_figure(6, 3.6)
    axis.hist(values, min(BINS, max(10, len(values) // 4)), color="C0")
    axis.axvline(0, color="0.3", linewidth=0.8)
    axis.set(
        xlabel=f"{what}; negative harms",
        ylabel="pairs" if test is not None or train is not None else "samples",
    )
    axis.set_yscale("symlog", linthresh=10)
    return figure


def plot_curve(run: Reader, detection: str | None = None) -> Figure:
    """Draw what share of the known wrong labels detections find after inspecting a share of the samples.

    Args:
        run: The run.
        detection: Which one; None: all that the run has.

    Raises:
        InputError: No label of the run is known to be wrong.
        IncompleteStage: The run has no detection, or none of that name.
    """
    from ..reading.detections import detection_names, read_detection

    noisy = run.noisy()
    if noisy is None:
        raise InputError(
            f"{run.uri}: no label is known to be wrong, so nothing says what is found; make one with noise"
        )
    names = detection_names(run) if detection is None else [detection]
    if not names:
        raise IncompleteStage(f"{run.uri} has no detection; make one with `hydra-pipe detect {run.uri}`")
    figure, (axis,) = new_figure(5.4, 4.4)
    for name in names:
        table = read_detection(run, name).table.sort_by("rank")
        found = found_curve(table["train_index"].to_numpy(), noisy[0].tolist())
        if found is None:
            raise InputError(f"{run.uri}: all or none of the judged labels are wrong; there is no curve")
        axis.plot(found.inspected, found.found, label=f"{name}, AUROC {found.auroc:.3f}")
        share = found.wrong / (len(found.inspected) - 1)
    axis.plot([0, share, 1], [0, 1, 1], color="0.3", linestyle="--", linewidth=1, label="perfect")
    axis.plot([0, 1], [0, 1], color="0.6", linestyle=":", linewidth=1, label="by chance")
    axis.set(
        xlabel="inspected, most suspicious first", ylabel="wrong labels found", xlim=(0, 1), ylim=(0, 1.02)
    )
    axis.legend(frameon=False, loc="lower right")
    return figure


def _target(test: int | None, label: int | None) -> str:
    if test is not None:
        return f"C(i, {test})"
    return "C(i)" if label is None else f"mean C(i, j) over class {label}"

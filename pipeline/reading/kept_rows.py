"""What is kept of the rows of a run, and what that costs: read off its own files.

Letters: S sampled rows, T sampled targets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ...storage.errors import CorruptStore, InputError, SpecError
from ..vocabulary import REPLAY
from .unit_values import LossValues, ReplayValues, all_values

if TYPE_CHECKING:
    from ...workers.model.row_map import RowMap
    from .reader import Reader


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreLoss:
    """What storing hypergradients in fewer numbers or bits costs, on the sample that the shards noted.

    Attributes:
        method: Whose hypergradients.
        parameters: Numbers of a row before it is folded: those of the parameters that are kept.
        columns: Numbers of a stored row.
        dtype: What a number is stored as.
        rows: S.
        targets: T.
        spearman: Of the contributions of the sampled rows to a target, by whole and by stored rows; mean over the targets.
        spearman_mean: Of their means over the targets.
        error: Norm of the difference of all S x T contributions, relative.
    """

    method: str
    parameters: int
    columns: int
    dtype: str
    rows: int
    targets: int
    spearman: float | None
    spearman_mean: float | None
    error: float


def row_map_of(run: Reader) -> RowMap | None:
    """Return what is kept of the rows of a run; None: all.

    Raises:
        CorruptStore: ``run.json`` does not say it of this model.
    """
    layers, project = (run.noted.identity.get(name) for name in ("layers", "project"))
    if layers is None and project is None:
        return None
    from ...workers.model.row_map import RowMap

    trajectory = run.trajectory()
    try:
        return RowMap.of(trajectory.parameters, layers, project, int(trajectory.attrs["seed"]))
    except (SpecError, TypeError, ValueError, KeyError) as error:
        raise CorruptStore(
            f"{run.uri}/run.json: layers {layers!r:.60} and project {project!r:.20} are none of this model ({error}); restore run.json"
        ) from None


def refuse_parts(run: Reader, what: str) -> None:
    """Refuse what looks at whole gradients, in a run that keeps parts of them.

    Raises:
        InputError: Names the option of the run.
    """
    for name in ("layers", "project"):
        value = run.noted.identity.get(name)
        if value is not None:
            shown = ",".join(value) if isinstance(value, list) else value
            raise InputError(
                f"{run.uri} was made with {name} {shown!r:.60}, and {what} needs whole gradients of all parameters; use a run "
                f"without --{name}"
            )


def store_losses(run: Reader) -> list[StoreLoss]:
    """Return what the shards of each method noted; nothing of methods whose rows are stored as they are."""
    found = []
    kept = row_map_of(run)
    for method in run.noted.method_names():
        noted = [v.loss for v in all_values(ReplayValues, run.directory, f"{method}/{REPLAY}") if v.loss]
        if noted:
            found.append(_joined(run, method, noted, kept))
    return found


def _joined(run: Reader, method: str, noted: list[LossValues], kept: RowMap | None) -> StoreLoss:
    whole, stored = (
        np.concatenate([np.asarray(getattr(one, name), dtype=np.float64) for one in noted])
        for name in ("whole", "stored")
    )
    dimension = run.noted.dimension or 0
    norm = float(np.linalg.norm(whole))
    ranks = [_spearman(a, b) for a, b in zip(whole.T, stored.T, strict=True)]
    known = [rank for rank in ranks if rank is not None]
    entry = run.noted.entry(method)
    return StoreLoss(
        method=method,
        parameters=dimension if kept is None else kept.whole.columns,
        columns=dimension if kept is None else kept.columns,
        dtype=entry.store_dtype or str(run.noted.identity.get("dtype")),
        rows=whole.shape[0],
        targets=whole.shape[1],
        spearman=float(np.mean(known)) if known else None,
        spearman_mean=_spearman(whole.mean(1), stored.mean(1)),
        error=float(np.linalg.norm(stored - whole)) / norm if norm else 0.0,
    )


def _spearman(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float | None:
    """Return the rank correlation; None where all values of one side are the same."""
    from scipy.stats import rankdata

    left, right = (rankdata(values) - (len(values) + 1) / 2 for values in (a, b))
    size = float(np.linalg.norm(left) * np.linalg.norm(right))
    return float(left @ right) / size if size else None

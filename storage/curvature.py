"""``curvature/method=….zarr``: an eigenbasis per layer and the eigenvalues of the curvature in it.

A block is a matrix of parameters (O, I), usually a layer's weight with its bias as last column; its
coordinates in the eigenbasis are ``left^T block right``. Some leading coordinates, the core, are then
turned once more, together. K checkpoints, D coordinates in all, C of them in the core, U steps of the
optimiser, L lanes (see ``workers.recursion.settings``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from . import files
from .arrays import Source, StoredArray, read_group, write_group
from .documents import taken_apart
from .errors import IncompleteStage
from .uri import check_uri

MARK = "hydra_pipe_curvature"
Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlockBasis:
    """One block of parameters and its basis.

    Attributes:
        entries: Parameters (positions in flattening order) that make it up: the weight, then the bias.
        rows: O.
        columns: I, the bias column included.
        left: (O, O) orthogonal, None for the identity.
        right: (I, I) orthogonal, None for the identity.
    """

    entries: tuple[int, ...]
    rows: int
    columns: int
    left: Matrix | None
    right: Matrix | None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class CoreBasis:
    """The leading coordinates and the basis in which they do not couple.

    Attributes:
        coordinates: (C,) positions among the D coordinates, ascending.
        vectors: (C, C) orthogonal: in place of their values x stand ``x vectors``.
    """

    coordinates: npt.NDArray[np.int64]
    vectors: Matrix


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Metric:
    """What an optimiser multiplies gradients with, brought into the form ``rate_t scale``.

    Attributes:
        scale: (D,) in the order of the flat vector; 0 where no step ever moved anything.
        rate: (U, L), a number a step of the optimiser and lane.
        decay: (D,) what a decay of 1 that is part of the gradient adds to the eigenvalues, in their order;
            None: there is no such decay.
    """

    scale: Matrix
    rate: Matrix
    decay: Matrix | None = None


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Curvature:
    """Bases and eigenvalues.

    Attributes:
        blocks: In the order of their coordinates.
        core: The coordinates that are turned once more; None: there are none.
        steps: (K,) steps of the checkpoints the eigenvalues belong to.
        eigenvalues: (K, D) float64, block after block, each row-major, the core as it is turned.
        attrs: How they were made.
        metric: Where it is not None, basis and eigenvalues are those of ``scale^1/2 H scale^1/2``.
    """

    blocks: tuple[BlockBasis, ...]
    core: CoreBasis | None
    steps: npt.NDArray[np.int64]
    eigenvalues: Matrix
    attrs: dict[str, Any]
    metric: Metric | None = None


def write_curvature(uri: str, curvature: Curvature) -> list[str]:
    """Write a curvature store; return its files, relative to it.

    Raises:
        StorageFull: The disk is full.
    """
    uri = check_uri(uri)
    files.remove(uri, recursive=True)
    write_group(uri, {})
    _put(uri, "steps", curvature.steps, "checkpoint")
    _put(uri, "eigenvalues", curvature.eigenvalues, "checkpoint", "coordinate")
    described = []
    for k, block in enumerate(curvature.blocks):
        described.append({"entries": list(block.entries), "rows": block.rows, "columns": block.columns})
        for side, matrix in (("left", block.left), ("right", block.right)):
            described[-1][side] = matrix is not None
            if matrix is not None:
                name = f"block{k:04d}_{side}"
                _put(uri, name, matrix, f"{name}_entry", f"{name}_eigenvector")
    if curvature.core is not None:
        _put(uri, "core_coordinates", curvature.core.coordinates, "core")
        _put(uri, "core_vectors", curvature.core.vectors, "core", "core_eigenvector")
    mark: dict[str, Any] = {"blocks": described, "core": curvature.core is not None}
    if curvature.metric is not None:
        metric = curvature.metric
        _put(uri, "metric_scale", metric.scale, "parameter")
        _put(uri, "metric_rate", metric.rate, "update", "lane")
        if metric.decay is not None:
            _put(uri, "metric_decay", metric.decay, "coordinate")
        mark["metric"] = {"decay": metric.decay is not None}
    write_group(uri, {**curvature.attrs, MARK: mark})
    return files.list_files(uri)


def read_curvature(uri: str, source: Source = files.read_bytes) -> Curvature:
    """Read a curvature store, whose files ``source`` reads.

    Raises:
        IncompleteStage: It is not there.
        CorruptStore: Its bytes are not what was written.
    """
    uri = check_uri(uri)
    attrs = read_group(uri, source)
    if MARK not in attrs:
        raise IncompleteStage(f"{uri} was not written to its end; run the stage again")
    with taken_apart(f"{uri}/zarr.json"):
        return _read(uri, attrs, attrs.pop(MARK), source)


def _read(uri: str, attrs: dict[str, Any], mark: Any, source: Source) -> Curvature:
    def read(name: str) -> Any:
        return StoredArray.open(uri, name, source).read()

    def side(k: int, block: dict[str, Any], name: str) -> Matrix | None:
        return read(f"block{k:04d}_{name}") if block[name] else None

    return Curvature(
        blocks=tuple(
            BlockBasis(
                entries=tuple(block["entries"]),
                rows=block["rows"],
                columns=block["columns"],
                left=side(k, block, "left"),
                right=side(k, block, "right"),
            )
            for k, block in enumerate(mark["blocks"])
        ),
        core=CoreBasis(
            coordinates=read("core_coordinates"),
            vectors=read("core_vectors"),
        )
        if mark.get("core")
        else None,
        steps=read("steps"),
        eigenvalues=read("eigenvalues"),
        attrs=attrs,
        metric=Metric(
            scale=read("metric_scale"),
            rate=read("metric_rate"),
            decay=read("metric_decay") if mark["metric"]["decay"] else None,
        )
        if mark.get("metric")
        else None,
    )


def _put(uri: str, name: str, values: Sequence[Any] | npt.NDArray[Any], *dimensions: str) -> None:
    array = np.ascontiguousarray(values)
    stored = StoredArray.create(
        uri, name, shape=array.shape, dtype=array.dtype, chunk=array.shape, dimensions=dimensions
    )
    stored.write(0, array)

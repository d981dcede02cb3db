"""The numbers of eight small runs as digests: what a change of the house, and not of the mathematics, must leave alone.

``python -m tests.bits`` from the root writes ``tests/data/bits.json`` anew; do so only where numbers are meant to change,
and say why. Digests are of values, not of files: metadata may grow.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import zarr
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.evaluate.evaluate import Questions, evaluate
from hydra_pipe.pipeline.run import run
from hydra_pipe.pipeline.spec.spec import RunSpec
from threadpoolctl import threadpool_limits

KEPT = Path(__file__).parent / "data" / "bits.json"

SMALL: dict[str, Any] = {
    "recipe": "digits",
    "recipe_args": {"train_size": 96, "test_size": 24, "label_noise": 0.1},
    "epochs": 2,
    "batch_size": 20,
    "executor": "serial",
    "device": "cpu",
    "threads": 1,
}


def environment() -> dict[str, str]:
    """Return what the bits hold for."""
    return {"torch": torch.__version__.split("+")[0], "cpu": torch.backends.cpu.get_cpu_capability()}


def _specs(place: Path) -> Iterator[tuple[str, RunSpec]]:
    def spec(name: str, **fields: Any) -> tuple[str, RunSpec]:
        return name, RunSpec(**{**SMALL, "out": str(place / name), **fields})

    yield spec("fast", shards=3)
    yield spec("ekfac", hessian="ekfac", exact_rank=3, curvature_core=16, shards=2)
    yield spec("exact", hessian="exact", track="20", dtype="float64")
    yield spec("adjoint", hessian="exact", mode="adjoint", test="10")
    yield spec("mean", hessian="exact", mode="adjoint", targets="mean")
    yield spec("seeds", seeds=2, track="40")


def made(place: Path) -> dict[str, dict[str, str]]:
    """Make the runs below ``place`` and return the digests of each.

    With one thread in numpy too: eigenvectors have other last bits with more.
    """
    with threadpool_limits(1):
        return _made(place)


def _made(place: Path) -> dict[str, dict[str, str]]:
    for _name, one in _specs(place):
        run(one)
    fast = place / "fast"
    methods = {"tracin": {}, "gradient-dot": {}}
    attribute(str(fast), methods, "digits", executor="serial")
    evaluated = place / "adjoint"
    evaluate(
        str(evaluated),
        "digits",
        questions=Questions(subsets=3, fractions=(0.5,)),
        executor="serial",
        device="cpu",
    )
    return {path.name: digests(path) for path in sorted(place.iterdir())}


def digests(root: Path) -> dict[str, str]:
    """Return the digest of every array and table below a run, by path."""
    found = {}
    for store in sorted(path for path in root.rglob("*.zarr") if path.is_dir()):
        for name, array in _arrays(zarr.open_group(str(store), mode="r")):
            found[f"{store.relative_to(root)}/{name}"] = _sha(np.asarray(array[...]))
    for table in sorted(root.rglob("*.parquet")):
        found[str(table.relative_to(root))] = _of_table(pq.ParquetFile(table).read())
    return found


def _arrays(group: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    for name, member in sorted(group.members()):
        if isinstance(member, zarr.Group):
            yield from _arrays(member, f"{above}{name}/")
        else:
            yield f"{above}{name}", member


def _of_table(table: pa.Table) -> str:
    digest = hashlib.sha256()
    for name in sorted(table.column_names):
        if "seconds" in name:
            continue
        digest.update(name.encode())
        column = table[name].combine_chunks()
        numbers = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
        values = column.to_numpy(zero_copy_only=False)
        digest.update(_sha(values).encode() if numbers else json.dumps(column.to_pylist()).encode())
    return digest.hexdigest()[:32]


def _sha(values: np.ndarray) -> str:
    head = f"{values.dtype.str}{values.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(values).tobytes()).hexdigest()[:32]


def main() -> None:
    """Write the kept digests anew."""
    with tempfile.TemporaryDirectory() as place:
        kept = {"environment": environment(), "runs": made(Path(place))}
    KEPT.parent.mkdir(exist_ok=True)
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    sys.stderr.write(
        f"{sum(len(one) for one in kept['runs'].values())} digests of {len(kept['runs'])} runs\n"
    )


if __name__ == "__main__":
    main()

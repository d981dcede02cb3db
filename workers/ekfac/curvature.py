"""EKFAC curvature of the training loss: eigenvectors per layer, eigenvalues fitted in them.

Per layer with input x and output gradient d (one row a sample and position): eigenvectors of
E[x x^T] and E[d d^T] (Kronecker-factored curvature), then eigenvalues E[(left^T g_i right)^2] of the
per-sample gradients g_i in that basis (George et al. 2018). Targets are drawn from the model where its
outputs are class scores, which makes this the Gauss-Newton curvature; otherwise the given targets
are used. Parameters without a Kronecker form (norm layers, single vectors, grouped convolutions)
keep their own axes: a diagonal. The coordinates with the largest eigenvalues are then decoupled by
the eigenvectors of their full matrix of second moments (see ``core``).

With Adam all of this is done for gradients G_i scaled by P^1/2 (see ``metric``), which are outer products in
Linear layers only: the eigenvectors are those of E[G_i G_i^T] and E[G_i^T G_i].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...storage.curvature import BlockBasis, CoreBasis, Curvature, Metric
from ...storage.trajectory import Trajectory
from ..data.batches import fetch, to_device
from ..determinism import derived_seed, seed_everything
from ..persample.capture import Call
from ..persample.engine import PerSampleGradients
from ..persample.reference import constant_statistics
from ..persample.rules import AppliedLinear, is_transposed_linear, unfolded
from ..persample.trials import choose_ways
from ..recipe import Batch
from ..recursion.coefficients import recorded_settings
from ..recursion.eigencoefficients import coupled_decay
from ..recursion.steps import lanes_of
from ..training.fixed_pass import FixedPass, fixed_pass
from ..training.metrics import evaluating
from ..training.test_gradients import TEST_BATCH
from ..training.training import Training
from .core import axes, decoupled, leading
from .eigenbasis import Eigenbasis, diagonal
from .eigengradients import EigenGradients, are_outer
from .metric import metric_of

SAMPLES = 4096
"""Training samples the curvature is averaged over, at most."""

CHECKPOINTS = 5
"""Checkpoints of the record it is taken at."""

CORE = 256
"""Leading coordinates that keep their full curvature, at most."""

DRAWS = 4
"""How often a sample's targets are drawn for the core, at most: fewer samples leave more noise."""


def chosen_checkpoints(trajectory: Trajectory, count: int, at: Sequence[int] | None = None) -> list[int]:
    """Return which of the K checkpoints to use.

    Args:
        trajectory: The record.
        count: How many: those nearest the middles of as many equal parts of it.
        at: Steps; those nearest them instead.
    """
    if at is not None:
        return sorted({int(np.abs(trajectory.checkpoint_steps - step).argmin()) for step in at})
    last = len(trajectory.checkpoint_steps) - 1
    return sorted({min(last, round((k + 0.5) * last / count)) for k in range(count)})


def passes(core: int) -> int:
    """Return how often the samples are run at each checkpoint: factors, eigenvalues, core."""
    return 3 if core else 2


class CurvatureEstimate:
    """Estimates the curvature of a recorded run.

    Args:
        training: A fresh ``Training`` of the recipe.
        trajectory: The record.
        checkpoints: How many checkpoints.
        samples: At most how many training samples. Where there are fewer, those for the core are taken
            several times with targets drawn anew, as often as fits into this number (`DRAWS` at most).
        core: At most how many leading coordinates are decoupled; 0: none.
        at: Steps whose nearest checkpoints are taken, instead of so many.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        checkpoints: int = CHECKPOINTS,
        samples: int = SAMPLES,
        core: int = CORE,
        at: Sequence[int] | None = None,
    ) -> None:
        self.training, self.trajectory, self.core, self.most = training, trajectory, core, samples
        self.kept = chosen_checkpoints(trajectory, checkpoints, at)
        self.settings = recorded_settings(trajectory)
        self.lanes = lanes_of(self.settings, training.layout)
        self.metric: Metric | None = None
        self.root: Tensor | None = None
        count = min(samples, training.n_train)
        generator = np.random.default_rng(derived_seed(training.recipe.seed, "curvature"))
        self.samples = np.sort(generator.choice(training.n_train, count, replace=False))
        last = trajectory.checkpoint(self.kept[-1])
        training.load_weights(last.weights, last.buffers)
        with evaluating(training.model):
            batch = self._fetch(self.samples[:TEST_BATCH])
            self.ways = choose_ways(training.recipe, training.model, training.layout, batch, constant=True)
        self.sampled = True

    def run(self, report: Callable[[int, int], None] | None = None) -> Curvature:
        """Return the curvature: one basis over all checkpoints, eigenvalues at each."""
        training, count = self.training, len(self.kept)
        total = passes(self.core) * count
        engine = PerSampleGradients(training.recipe, training.model, training.layout, self.ways)
        factors = _Factors(training.layout.entries, engine, self.lanes)
        if training.family.scaled:
            lanes_D = training.layout.column_groups(self.lanes).numpy()
            outer = [layer for layer in factors.layers.values() if are_outer(self.ways, layer)]
            self.metric = metric_of(self.trajectory, self.settings, lanes_D, outer)
            scale = torch.from_numpy(np.sqrt(self.metric.scale))
            self.root = scale.to(device=training.device, dtype=training.dtype)
        for done, k in enumerate(self.kept, start=1):
            for found in self._passes(engine, k):
                root = self.root
                if root is None:
                    factors.add(engine.capture.take())
                else:
                    found.rows(partial(factors.take_scaled, root))
            if report:
                report(done, total)
        engine.close()
        blocks = factors.blocks()
        basis = Eigenbasis(blocks, training.layout, training.dtype, training.device, None)
        metric = self.metric
        scaled_by = None if metric is None else metric.scale
        eigen = EigenGradients(training.recipe, training.model, training.layout, self.ways, basis, scaled_by)
        rows = []
        for done, k in enumerate(self.kept, start=count + 1):
            rows.append(self._mean(eigen, k, lambda block: block.double().square().sum(0)))
            if report:
                report(done, total)
        eigenvalues, core = np.stack(rows), None
        if self.core:
            groups = basis.lanes(self.lanes).numpy()
            chosen = leading(eigenvalues, groups, self.core)
            index = torch.from_numpy(chosen).to(training.device)
            moments = []
            draws = max(1, min(DRAWS, self.most // len(self.samples))) if self.sampled else 1
            for done, k in enumerate(self.kept, start=2 * count + 1):
                drawn = [self._mean(eigen, k, lambda block: _moments(block, index), d) for d in range(draws)]
                moments.append(np.mean(drawn, axis=0))
                if report:
                    report(done, total)
            vectors, eigenvalues[:, chosen] = decoupled(np.stack(moments), groups[chosen])
            core = CoreBasis(coordinates=chosen, vectors=vectors)
        eigen.close()
        if training.weighted:  # what the steps divide by is not the number of samples
            assert self.trajectory.divisor is not None
            ends = training.updates.nonzero()[0]
            visits = int((training.batches >= 0).sum())
            eigenvalues *= visits / float(self.trajectory.divisor[ends].sum())
        if metric is not None and coupled_decay(self.settings).any():
            whole = Eigenbasis(blocks, training.layout, training.dtype, training.device, core)
            metric = replace(metric, decay=diagonal(whole, metric.scale))
        steps = self.trajectory.checkpoint_steps[self.kept]
        return Curvature(
            blocks=blocks,
            core=core,
            steps=np.asarray(steps, dtype=np.int64),
            eigenvalues=eigenvalues,
            attrs={
                "samples": len(self.samples),
                "targets": "sampled" if self.sampled else "given",
                "core": 0 if core is None else len(core.coordinates),
            },
            metric=metric,
        )

    def _mean(
        self, eigen: EigenGradients, k: int, of: Callable[[Tensor], Tensor], draw: int = 0
    ) -> npt.NDArray[np.float64]:
        """Return the mean over the samples at checkpoint ``k``; ``of`` sums over a block of rotated rows."""
        sums: list[Tensor] = []

        def add(_start: int, block: Tensor) -> None:
            found = of(block)
            if sums:
                sums[0].add_(found)
            else:
                sums.append(found)

        for found in self._passes(eigen, k, draw):
            found.rows(add)
        values: npt.NDArray[np.float64] = (sums[0] / len(self.samples)).cpu().numpy()
        return values

    def _passes(self, engine: PerSampleGradients, k: int, draw: int = 0) -> Iterator[FixedPass]:
        """Run the samples forward and backward at checkpoint ``k``, targets drawn from the model."""
        name = f"curvature/{k}/{draw}" if draw else f"curvature/{k}"
        training = self.training
        kept = self.trajectory.checkpoint(k)
        training.load_weights(kept.weights, kept.buffers)
        with evaluating(training.model):
            for start in range(0, len(self.samples), TEST_BATCH):
                chosen = self.samples[start : start + TEST_BATCH]
                batch = self._fetch(chosen)
                seed_everything(derived_seed(training.recipe.seed, name, start))  # fetching has its own seed
                with constant_statistics(training.model):
                    batch = self._drawn(batch)
                with fixed_pass(training, engine, batch, len(chosen)) as found:
                    yield found

    def _drawn(self, batch: Batch) -> Batch:
        drawn = self.training.recipe.sample_targets(self.training.model, batch)
        if drawn is None:
            self.sampled = False
            return batch
        return drawn

    def _fetch(self, indices: npt.NDArray[np.int64]) -> Batch:
        training = self.training
        seed_everything(derived_seed(training.recipe.seed, "curvature/data", int(indices[0])))
        return to_device(fetch(training.recipe, training.dataset, indices), training.device, training.dtype)


class _Factors:
    """Sums x x^T and d d^T over everything each layer saw."""

    def __init__(self, entries: Sequence[Any], engine: PerSampleGradients, lanes: Sequence[int]) -> None:
        self.entries, self.engine, self.lanes = entries, engine, lanes
        self.sums: dict[int, tuple[Tensor | None, Tensor]] = {}
        self.layers: dict[int, tuple[int, ...]] = {}
        self.modules: list[tuple[nn.Module, tuple[int, ...]]] = []
        owners: dict[int, int] = {}
        whole = [module for module in engine.capture.rules if not _in_part(module, "weight")]
        self.in_part: set[int] = set()
        for module in whole:
            for name, parameter in module.named_parameters(recurse=False):
                i = engine.index.get(id(parameter), -1)
                owners[i] = owners.get(i, 0) + (2 if _in_part(module, name) else 1)
        for module in whole:
            weight = engine.index.get(id(getattr(module, "weight", None)), -1)
            if weight >= 0 and owners[weight] == 1 and _has_form(module):
                self.layers[id(module)] = self._with_bias(module, weight, owners)
                self.modules.append((module, self.layers[id(module)]))

    def _with_bias(self, module: nn.Module, weight: int, owners: dict[int, int]) -> tuple[int, ...]:
        """A bias joins its weight's block unless it is optimised otherwise, or would be a row of it."""
        if is_transposed_linear(module):
            return (weight,)
        bias = self.engine.index.get(id(getattr(module, "bias", None)), -1)
        if bias >= 0 and owners[bias] == 1 and self.lanes[bias] == self.lanes[weight]:
            return (weight, bias)
        return (weight,)

    def add(self, calls: Sequence[Call]) -> None:
        for call in calls:
            if _in_part(call.module, "weight") and call.d_B is not None:
                self.in_part.add(self.engine.index.get(id(call.module.weight), -1))
            layer = self.layers.get(id(call.module))
            if layer is None or call.d_B is None:
                continue
            x, d = _rows(call.module, call.x_B, call.d_B)
            if x is not None and len(layer) == 2:
                x = torch.cat([x, x.new_ones(len(x), 1)], 1)
            left, right = None if x is None else (x.T @ x).double(), (d.T @ d).double()
            if is_transposed_linear(call.module):
                left, right = right, left
            self._sum(layer[0], left, right)

    def take_scaled(self, root_D: Tensor, _start: int, block: Tensor) -> None:
        """Take rows that are still to be scaled."""
        self.add_scaled(block * root_D)

    def add_scaled(self, rows_RD: Tensor) -> None:
        """Take scaled gradients: sums of G^T G and G G^T in place of x x^T and d d^T."""
        for module, layer in self.modules:
            parts = []
            for i in layer:
                start = self.entries[i].start
                width = math.prod(self.entries[i].shape)
                parts.append(
                    rows_RD[:, start : start + width].reshape(
                        len(rows_RD), self.entries[layer[0]].shape[0], -1
                    )
                )
            matrix = torch.cat(parts, 2)
            across = matrix.reshape(-1, matrix.shape[2])
            right = (across.T @ across).double()
            if isinstance(module, nn.Embedding):
                self._sum(layer[0], None, right)
            else:
                along = matrix.transpose(0, 1).reshape(matrix.shape[1], -1)
                self._sum(layer[0], right, (along @ along.T).double())

    def _sum(self, weight: int, left: Tensor | None, right: Tensor) -> None:
        before = self.sums.get(weight)
        if before is not None:
            left = None if left is None or before[0] is None else left + before[0]
            right = right + before[1]
        self.sums[weight] = (left, right)

    def blocks(self) -> tuple[BlockBasis, ...]:
        """Return one block a layer with a Kronecker form, and one for every parameter left over."""
        joined = {
            layer[0]: layer
            for layer in self.layers.values()
            if layer[0] in self.sums and layer[0] not in self.in_part
        }
        taken = {i for layer in joined.values() for i in layer}
        out = []
        for i, entry in enumerate(self.entries):
            size = int(np.prod(entry.shape)) if entry.shape else 1
            if i in joined:
                x, d = self.sums[i]
                if x is None:  # an embedding's inputs are one-hot: its rows are their own axes
                    basis = BlockBasis(
                        entries=(i,),
                        rows=entry.shape[0],
                        columns=size // entry.shape[0],
                        left=None,
                        right=_axes(d),
                    )
                else:
                    basis = BlockBasis(
                        entries=joined[i], rows=len(d), columns=len(x), left=_axes(d), right=_axes(x)
                    )
                out.append(basis)
            elif i not in taken:
                out.append(BlockBasis(entries=(i,), rows=1, columns=size, left=None, right=None))
        return tuple(out)


def _has_form(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1
    return isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag)) or is_transposed_linear(module)


def _in_part(module: nn.Module, name: str) -> bool:
    """Whether a layer uses some rows of a parameter alone."""
    return isinstance(module, AppliedLinear) and module.rows.get(name) is not None


def _rows(module: nn.Module, x_B: Tensor, d_B: Tensor) -> tuple[Tensor | None, Tensor]:
    """Return what a layer saw and got back as (rows, I) and (rows, O); no inputs for embeddings."""
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return unfolded(module, x_B, d_B.shape[2:]), d_B.flatten(2).transpose(1, 2).reshape(-1, d_B.shape[1])
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return None, d_B.reshape(-1, d_B.shape[-1])
    return x_B.reshape(-1, x_B.shape[-1]), d_B.reshape(-1, d_B.shape[-1])


def _axes(matrix: Tensor) -> npt.NDArray[np.float64]:
    return axes(matrix.cpu().numpy())


def _moments(block: Tensor, index: Tensor) -> Tensor:
    chosen = block.index_select(1, index).double()
    return chosen.T @ chosen

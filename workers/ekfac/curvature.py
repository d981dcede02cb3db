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

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ...storage.curvature import BlockBasis, CoreBasis, Curvature, Metric
from ...storage.trajectory import Trajectory
from ..data.batches import fetch, to_device
from ..determinism import derived_seed, seed_everything
from ..persample.engine import PerSampleGradients
from ..persample.reference import constant_statistics
from ..persample.trials import choose_ways
from ..recipe import Batch
from ..recursion.coefficients import recorded_settings
from ..recursion.eigencoefficients import coupled_decay, flat_directions
from ..recursion.steps import lanes_of
from ..training.fixed_pass import FixedPass, fixed_pass
from ..training.metrics import evaluating
from ..training.test_gradients import TEST_BATCH
from ..training.training import Training
from .core import decoupled, leading
from .drawing import OneForward, draw
from .eigenbasis import Eigenbasis, diagonal, wide_tile
from .eigengradients import are_outer
from .factors import Factors
from .metric import metric_of
from .moments import Matrix, Moments

SAMPLES = 1024
"""Training samples the curvature is averaged over, at most."""

CHECKPOINTS = 5
"""Checkpoints of the record it is taken at."""

FLAT = 0.01
"""Eigenvalues that change no coefficient of the recursion by more than this share are 0."""

CORE = 256
"""Leading coordinates that keep their full curvature, at most."""

DRAWS = 4
"""How often a sample's targets are drawn for the eigenvalues, at most: fewer samples leave more noise."""

PASSES = 2
"""How often the samples are run at each checkpoint: for factors, and for eigenvalues with the core."""

FACTOR_SAMPLES = 512
"""Samples that the eigenvectors come from, at most: they are had from fewer than the eigenvalues."""

PILOT = 64
"""Samples of each checkpoint that say which coordinates may be in the core."""

CANDIDATES = 2
"""So many times the core's coordinates are followed until it is known which lead."""


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
        flat: float = FLAT,
    ) -> None:
        self.training, self.trajectory, self.core, self.most = training, trajectory, core, samples
        self.flat = flat
        self.kept = chosen_checkpoints(trajectory, checkpoints, at)
        self.settings = recorded_settings(trajectory)
        self.lanes = lanes_of(self.settings, training.layout)
        self.metric: Metric | None = None
        count = min(samples, training.n_train)
        generator = np.random.default_rng(derived_seed(training.recipe.seed, "curvature"))
        self.samples = np.sort(generator.choice(training.n_train, count, replace=False))
        last = trajectory.checkpoint(self.kept[-1])
        training.load_weights(last.weights, last.buffers)
        with evaluating(training.model):
            batch = self._fetch(self.samples[:TEST_BATCH])
            self.ways = choose_ways(training.recipe, training.model, training.layout, batch, constant=True)
        self.sampled = True

    @property
    def draws(self) -> int:
        """How often the targets of each sample are drawn for the eigenvalues."""
        return max(1, min(DRAWS, self.most // len(self.samples))) if self.sampled else 1

    def run(self, report: Callable[[int, int], None] | None = None) -> Curvature:
        """Return the curvature: one basis over all checkpoints, eigenvalues at each."""
        training, done = self.training, 0
        total = PASSES * len(self.kept)

        def tell() -> None:
            nonlocal done
            done += 1
            if report:
                report(done, total)

        blocks = self._blocks(tell)
        metric = self.metric
        formed = training.layout.dimension - sum(
            training.layout.size(i) for i, strategy in enumerate(self.ways.strategies) if strategy == "outer"
        )
        place = (training.layout, training.dtype, training.device)
        basis = Eigenbasis(blocks, *place, None, wide_tile(formed))
        eigenvalues, core = self._eigenvalues(basis, tell)
        if training.weighted:  # what the steps divide by is not the number of samples
            assert self.trajectory.divisor is not None
            ends = training.updates.nonzero()[0]
            visits = int((training.batches >= 0).sum())
            eigenvalues *= visits / float(self.trajectory.divisor[ends].sum())
        if metric is not None and coupled_decay(self.settings).any():
            metric = replace(metric, decay=diagonal(Eigenbasis(blocks, *place, core), metric.scale))
        steps = self.trajectory.checkpoint_steps[self.kept]
        found = Curvature(
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
        if self.flat:
            found.eigenvalues[
                :, flat_directions(self.settings, basis.lanes(self.lanes).numpy(), found, self.flat)
            ] = 0.0
        return found

    def _blocks(self, tell: Callable[[], None]) -> tuple[BlockBasis, ...]:
        """Return the eigenvectors of the Kronecker factors, over all checkpoints; sets the metric."""
        training = self.training
        engine = PerSampleGradients(training.recipe, training.model, training.layout, self.ways)
        factors = Factors(training.layout.entries, engine, self.lanes)
        root: Tensor | None = None
        if training.family.scaled:
            lanes_D = training.layout.column_groups(self.lanes).numpy()
            outer = [layer for layer in factors.layers.values() if are_outer(self.ways, layer)]
            self.metric = metric_of(self.trajectory, self.settings, lanes_D, outer)
            root = torch.from_numpy(np.sqrt(self.metric.scale)).to(training.device, training.dtype)
        for k in self.kept:
            for found in self._passes(engine, k, most=FACTOR_SAMPLES):
                if root is None:
                    factors.add(engine.capture.take())
                else:
                    found.rows(partial(factors.take_scaled, root))
            tell()
        engine.close()
        return factors.blocks()

    def _eigenvalues(self, basis: Eigenbasis, tell: Callable[[], None]) -> tuple[Matrix, CoreBasis | None]:
        """Return the eigenvalues at each checkpoint, (K, D), and the core."""
        training = self.training
        scale = None if self.metric is None else self.metric.scale
        lanes_D = basis.lanes(self.lanes).numpy()
        candidates: npt.NDArray[np.int64] = np.empty(0, dtype=np.int64)
        given = (training.recipe, training.model, training.layout, self.ways, basis, scale)
        if self.core:  # which coordinates lead shows in a few samples; which of those the most, in all
            pilot = Moments(*given, None)
            few = np.stack([self._moments(pilot, k, PILOT)[0] for k in self.kept])
            candidates = leading(few, lanes_D, CANDIDATES * self.core)
            pilot.close()
        moments = Moments(*given, torch.from_numpy(candidates).to(training.device))
        rows, products = [], []
        for k in self.kept:
            own, joint = self._moments(moments, k)
            rows.append(own)
            products.append(joint)
            tell()
        moments.close()
        eigenvalues = np.stack(rows)
        if not self.core:
            return eigenvalues, None
        among = leading(eigenvalues[:, candidates], lanes_D[candidates], self.core)
        chosen = candidates[among]
        square = np.stack(products)[:, among[:, None], among]
        vectors, eigenvalues[:, chosen] = decoupled(square, lanes_D[chosen])
        return eigenvalues, CoreBasis(coordinates=chosen, vectors=vectors)

    def _moments(self, moments: Moments, k: int, most: int | None = None) -> tuple[Matrix, Matrix]:
        """Return the second moments at checkpoint ``k``, of the first samples alone where there is a ``most``."""
        for number in range(self.draws if most is None else 1):
            for found in self._passes(moments, k, number, most):
                found.rows(lambda _start, _rows: None)
        return moments.take()

    def _passes(
        self, engine: PerSampleGradients, k: int, draw: int = 0, most: int | None = None
    ) -> Iterator[FixedPass]:
        """Run the samples forward and backward at checkpoint ``k``, targets drawn from the model."""
        name = f"curvature/{k}/{draw}" if draw else f"curvature/{k}"
        training = self.training
        kept = self.trajectory.checkpoint(k)
        training.load_weights(kept.weights, kept.buffers)
        samples = self.samples if most is None else self.samples[:: max(1, len(self.samples) // most)][:most]
        with evaluating(training.model):
            for start in range(0, len(samples), TEST_BATCH):
                chosen = samples[start : start + TEST_BATCH]
                batch, compute = self._fetch(chosen), None
                seed_everything(derived_seed(training.recipe.seed, name, start))  # fetching has its own seed
                if engine.alone:  # samples are run again by themselves, and with the targets they have then
                    with constant_statistics(training.model):
                        batch, _counts = self._drawn(batch, evenly=False)
                else:
                    compute = partial(self._losses, engine, batch, len(chosen))
                with fixed_pass(training, engine, batch, len(chosen), compute) as found:
                    yield found

    def _losses(self, engine: PerSampleGradients, batch: Batch, size: int) -> Tensor:
        """Return the losses of drawn targets, one forward pass for both where that can be."""
        one = OneForward(self.training.model, engine.capture.forget)
        with one.answering():
            drawn, counts = self._drawn(batch, evenly=True)
            one.drawn()
            losses_B = self.training.losses(drawn, size)
        return losses_B if counts is None else losses_B * counts.sqrt().to(losses_B)

    def _drawn(self, batch: Batch, *, evenly: bool) -> tuple[Batch, Tensor | None]:
        found = draw(self.training.recipe, self.training.model, batch, evenly=evenly)
        if found is None:
            self.sampled = False
            return batch, None
        return found

    def _fetch(self, indices: npt.NDArray[np.int64]) -> Batch:
        training = self.training
        seed_everything(derived_seed(training.recipe.seed, "curvature/data", int(indices[0])))
        return to_device(fetch(training.recipe, training.dataset, indices), training.device, training.dtype)

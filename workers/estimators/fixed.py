"""A model held still at one checkpoint, in eval mode: gradients, losses, products by sample.

Per-sample gradients come from the same engine as everywhere (``persample``), a tile at a time, and
are multiplied with the targets at once, in Linear and Embedding layers without being formed: (N, D) is never
held. Shape letters as in ``base``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...storage.errors import EstimatorError, NonFiniteLoss
from ...storage.trajectory import Trajectory
from ..data.batches import fetch, to_device
from ..determinism import derived_seed, preserved_generators, seed_everything
from ..ekfac.metric import preconditioner_at
from ..model.layout import load_flat
from ..persample.engine import PerSampleGradients, TakeRows
from ..persample.ghost import GhostProducts
from ..persample.trials import choose_ways
from ..recipe import Batch
from ..recursion.coefficients import recorded_settings
from ..recursion.columns import Columns
from ..recursion.steps import lanes_of
from ..training.fixed_pass import fixed_pass
from ..training.metrics import evaluating
from ..training.training import Training
from .base import TARGETS, Integers

SAMPLES = 64
"""Samples a forward pass."""


class FixedWeights:
    """The recipe's model at a checkpoint's weights, w_T to begin with.

    Args:
        training: Its weights and buffers are replaced.
        trajectory: The record.

    Attributes:
        optimised: (D,), 1 where the optimiser holds the parameter and 0 where it never moves.
        decay: (1,) or (D,): the weight decay in force at the last step, the regulariser of the
            objective that w_T is taken to minimise.
    """

    def __init__(self, training: Training, trajectory: Trajectory) -> None:
        self.training, self.trajectory = training, trajectory
        self.columns = Columns(training.layout.column_groups(), torch.float64, training.device)
        groups = trajectory.weight_decay.shape[1]
        self.optimised = self.columns.spread(np.ones(groups)).expand(training.layout.dimension)
        self.decay = self.columns.spread(last_setting(training, trajectory, "weight_decay"))
        self._test: Dataset[Any] | None = None
        self.load(-1)
        with evaluating(training.model):
            batch = self.fetch(training.dataset, np.arange(min(SAMPLES, training.n_train)))
            self._ways = choose_ways(training.recipe, training.model, training.layout, batch, constant=True)
        # Where samples see each other in the losses, each is taken alone: a result must not depend on blocks.
        self.size = 1 if self._ways.coupled else SAMPLES
        self._engine = PerSampleGradients(training.recipe, training.model, training.layout, self._ways)

    def close(self) -> None:
        """Take the hooks off the model."""
        self._engine.close()

    @property
    def test_dataset(self) -> Dataset[Any]:
        """The recipe's test dataset."""
        if self._test is None:
            with preserved_generators():
                seed_everything(self.training.recipe.seed)
                self._test = self.training.recipe.test_dataset()
        return self._test

    def load(self, k: int) -> None:
        """Put checkpoint ``k`` into the model."""
        kept = self.trajectory.checkpoint(k)
        self.training.load_weights(kept.weights, kept.buffers)

    def preconditioner(self, k: int) -> Tensor:
        """Return D = 1 / (sqrt(vhat) + eps) of the optimiser at checkpoint ``k``, (D,) float64; 0 where v is 0.

        Raises:
            EstimatorError: The record is not one of Adam.
        """
        trajectory, layout = self.trajectory, self.training.layout
        if trajectory.beta1 is None or not len(trajectory.batches):
            raise EstimatorError(
                f"the record is of {trajectory.optimizer['class']}, whose steps have no preconditioner; leave preconditioned "
                "out, or use gradient-dot or tracin"
            )
        settings = recorded_settings(trajectory)
        lanes = layout.column_groups(lanes_of(settings, layout)).numpy()
        found = preconditioner_at(trajectory, settings, lanes, k % len(trajectory.checkpoint_steps))
        assert found is not None
        _update, logarithm, moved = found
        return torch.from_numpy(np.where(moved, np.exp(logarithm), 0.0)).to(self.training.device)

    def move(self, weights_D: Tensor) -> None:
        """Put other weights into the model."""
        load_flat(self.training.parameters, weights_D)

    def fetch(self, dataset: Dataset[Any], chosen: Integers) -> Batch:
        """Return the samples as a batch on the device; random items are the same at every call."""
        seed_everything(derived_seed(self.training.recipe.seed, "estimator", int(chosen[0])))
        batch = fetch(self.training.recipe, dataset, chosen)
        return to_device(batch, self.training.device, self.training.dtype)

    def gradients(self, dataset: Dataset[Any], indices: Integers, sink: TakeRows) -> None:
        """Hand over d loss / d w of each sample, a few rows at a time.

        Raises:
            NonFiniteLoss: A loss is NaN or infinite: named by its index.
        """
        training = self.training
        with evaluating(training.model):
            for first in range(0, len(indices), self.size):
                chosen = indices[first : first + self.size]
                batch = self.fetch(dataset, chosen)

                def keep(start: int, block: Tensor, first: int = first) -> None:
                    sink(first + start, block)

                with fixed_pass(training, self._engine, batch, len(chosen)) as found:
                    _check_finite(found.losses_B, chosen)
                    found.rows(keep)

    def rows(self, dataset: Dataset[Any], indices: Integers) -> Tensor:
        """Return the gradients of a few samples, (R, D)."""
        out = torch.empty(
            len(indices),
            self.training.layout.dimension,
            dtype=self.training.dtype,
            device=self.training.device,
        )

        def keep(start: int, block: Tensor) -> None:
            out[start : start + len(block)] = block

        self.gradients(dataset, indices, keep)
        return out

    def targets(self, indices: Integers) -> Tensor:
        """Return the gradients of a block's test samples at the present weights, (Q, D) float64.

        Blocks are whole multiples of ``TARGETS``: passes of so many have the same bits in any block.
        """
        parts = [
            self.rows(self.test_dataset, indices[start : start + TARGETS])
            for start in range(0, len(indices), TARGETS)
        ]
        return torch.cat(parts).double()

    def products(self, indices: Integers, directions_QD: Tensor) -> Tensor:
        """Return <g_i, v_k> for training samples i and directions v_k: (Q, n) float64."""
        training, directions = self.training, self._directions(directions_QD)
        out = torch.zeros(len(directions), len(indices), dtype=torch.float64, device=directions.device)

        def keep(start: int, block_RQ: Tensor) -> None:
            out[:, start : start + len(block_RQ)] = block_RQ.T

        # One engine at a time listens to the model.
        self._engine.close()
        self._engine = GhostProducts(
            training.recipe,
            training.model,
            training.layout,
            self._ways,
            targets_QD=directions,
            tile=TARGETS,
        )
        try:
            self.gradients(training.dataset, indices, keep)
        finally:
            self._engine.close()
            self._engine = PerSampleGradients(training.recipe, training.model, training.layout, self._ways)
        return out[: len(directions_QD)]

    def _directions(self, directions_QD: Tensor) -> Tensor:
        """Return them in the run's dtype, filled up with zeros to whole tiles of ``TARGETS``."""
        directions = directions_QD.to(device=self.training.device, dtype=self.training.dtype)
        missing = -len(directions) % TARGETS
        return torch.cat([directions, directions.new_zeros(missing, directions.shape[1])])

    def scaled_products(
        self, indices: Integers, directions_QD: Tensor, scale_D: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return <scale g_i, v_k>, (Q, n), and the lengths of ``scale g_i``, (n,), float64."""
        lengths = torch.zeros(len(indices), dtype=torch.float64, device=self.training.device)
        scale = scale_D.to(self.training.dtype)

        def measure(start: int, block: Tensor) -> None:
            lengths[start : start + len(block)] = (block * scale).norm(dim=1)

        directions = self._directions(directions_QD * scale_D)
        out = torch.zeros(len(directions), len(indices), dtype=torch.float64, device=directions.device)

        def multiply(start: int, block: Tensor) -> None:
            for k, tile in enumerate(directions.split(TARGETS)):
                out[k * TARGETS : (k + 1) * TARGETS, start : start + len(block)] = (block @ tile.T).T
            measure(start, block)

        self.gradients(self.training.dataset, indices, multiply)
        return out[: len(directions_QD)], lengths

    @torch.no_grad()
    def losses(self, dataset: Dataset[Any], indices: Integers) -> Tensor:
        """Return each sample's loss by forward passes alone, (R,) float64."""
        training, found = self.training, []
        with evaluating(training.model):
            for first in range(0, len(indices), self.size):
                chosen = indices[first : first + self.size]
                losses_B = training.losses(self.fetch(dataset, chosen), len(chosen))
                _check_finite(losses_B, chosen)
                found.append(losses_B.double())
        return torch.cat(found)


def last_setting(training: Training, trajectory: Trajectory, name: str) -> npt.NDArray[np.float64]:
    """Return a setting of the last step by group, (G,); without any steps, what the recipe's optimiser has."""
    recorded: npt.NDArray[np.float64] = getattr(trajectory, name)
    if len(recorded):
        last: npt.NDArray[np.float64] = recorded[-1]
        return last
    key = {"learning_rate": "lr"}.get(name, name)
    return np.array([float(group.get(key, 0.0)) for group in training.optimizer.param_groups])


def _check_finite(losses_B: Tensor, chosen: Integers) -> None:
    good = torch.isfinite(losses_B.detach()).cpu().numpy()
    if not good.all():
        bad = int(chosen[int(np.flatnonzero(~good)[0])])
        raise NonFiniteLoss(
            f"the loss of sample {bad} is not finite at the weights where an estimator looked; "
            "lower its step, or train with a lower learning rate"
        )

"""Algorithm 1 of the HyDRA paper as printed, as fast as it reasonably goes in torch.

Every tracked sample has two vectors, and both change at every step, whether the sample is in the
batch or not: ``dm <- p dm + L du + 1[i in batch] (N/B) g_i``, ``du <- du - h dm``. Only for
comparison: the package never does this. Shape letters: n tracked samples, D parameters.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from hydra_pipe.workers.persample.engine import PerSampleGradients
from hydra_pipe.workers.recipe import Batch
from hydra_pipe.workers.training.training import Training
from hydra_pipe.workers.training.trials import tried_ways

SWEEP = 1 << 20
"""Numbers of each buffer a sweep works on at a time: both pieces stay in cache for its three operations."""


class DenseAlgorithm:
    """Both buffers (n, D) of Algorithm 1 for all N samples, updated in place in one sweep a step.

    Per-sample gradients come from the package's own engine, so that only the bookkeeping differs.

    Args:
        training: Momentum above 0, one parameter group, no dampening, no Nesterov.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        ways = tried_ways(training)
        self.engine = PerSampleGradients(training.recipe, training.model, training.layout, ways)
        shape = (training.n_train, training.layout.dimension)
        self.hypergradient = torch.zeros(shape, dtype=training.dtype)
        self.momentum = torch.zeros(shape, dtype=training.dtype)

    def step(self, step: int, batch: Batch) -> None:
        """Take one training step and carry the two vectors of every sample along."""
        training = self.training
        (group,) = training.optimizer.param_groups
        rate, momentum, decay = (float(group[key]) for key in ("lr", "momentum", "weight_decay"))
        members = torch.from_numpy(training.batches[step][: training.batch_size(step)].astype(np.int64))
        # Divided by p, because the sweep multiplies by it: so one sweep is enough.
        scale = training.n_train / len(members) / momentum

        def add(start: int, block: torch.Tensor) -> None:
            self.momentum.index_add_(0, members[start : start + len(block)], block, alpha=scale)

        watch = self.engine.watch(torch.arange(len(members)), add)
        float(training.step(step, batch, watch))
        du, dm = self.hypergradient.view(-1), self.momentum.view(-1)
        for start in range(0, len(du), SWEEP):
            u, m = du[start : start + SWEEP], dm[start : start + SWEEP]
            m.mul_(momentum).add_(u, alpha=decay)
            u.add_(m, alpha=-rate)

    def rows(self) -> npt.NDArray[np.floating]:
        """Return the hypergradients, (n, D)."""
        found: npt.NDArray[np.floating] = self.hypergradient.numpy()
        return found

    def close(self) -> None:
        """Take the hooks off the model."""
        self.engine.close()

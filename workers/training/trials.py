"""How per-sample gradients are had in a training: tried along its record, before anything rests on it.

What is zero at the first weights (all that lies behind a factor that starts at 0) is not zero later, a
branch that no sample takes at first is taken later: so whole batches are tried at several checkpoints
of the record. The choice follows from the record alone, or bits would depend on who computes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ...storage.errors import RecipeError
from ...storage.trajectory import Trajectory
from ..data.batches import step_batch, to_device
from ..determinism import derived_seed, preserved_generators
from ..model.layout import Layout, load_flat
from ..model.state import copied, load_buffers
from ..persample.one_batch import Trial
from ..persample.trials import combined, try_batch, with_judge
from ..persample.ways import Ways, always_vjp
from .training import Training

LEAST, STEPS_A_TRIAL = 3, 200
"""A trial costs about six steps: one in so many steps of the record, but at least so many."""


def tried_ways(training: Training, trajectory: Trajectory | None = None) -> Ways:
    """Return the ways that agree with autograd on batches of the training itself.

    Args:
        training: At its first weights; left as it is.
        trajectory: The record; None: only the first step is tried.

    Raises:
        RecipeError: See ``persample.trials``; or a step cannot be differentiated.
    """
    if training.compute.per_sample == "vjp":
        return always_vjp(training.layout)
    if training.known_ways is not None:
        return with_judge(
            training.known_ways, training.recipe, training.layout, constant=training.holds_statistics
        )
    trials = some_trials(training, trajectory, (0, 1))
    if trajectory is not None and trials[0].rows:
        trials += some_trials(training, trajectory, range(2, trials_in_all(trajectory, training.steps)))
    ways = combined(trials, training.layout)
    return with_judge(ways, training.recipe, training.layout, constant=training.holds_statistics)


def trials_in_all(trajectory: Trajectory, steps: int) -> int:
    """Return how many trials `tried_ways` makes along a record, unless the first says that all goes by ``vjp``."""
    return 2 + len(_checkpoints(trajectory, steps))


def some_trials(training: Training, trajectory: Trajectory | None, which: Sequence[int]) -> list[Trial]:
    """Make some of the trials of `tried_ways`, which do not depend on each other: the first step's two come first.

    Args:
        training: At its first weights; left as it is.
        trajectory: The record; None: there are the first two.
        which: Their numbers.
    """
    with preserved_generators():
        found = [_at(training, None, 0, as_run=number == 1) for number in which if number < 2]
        if trajectory is not None:
            later = _checkpoints(trajectory, training.steps)
            found += [_at(training, trajectory, later[number - 2]) for number in which if number >= 2]
    return found


def ways_of(trials: Sequence[Trial], layout: Layout) -> Ways:
    """Return what all trials, in their order, come to; see ``Training.known_ways``."""
    return combined(trials if trials[0].rows else trials[:2], layout)


def _checkpoints(trajectory: Trajectory, steps: int) -> list[int]:
    """Return which checkpoints to try at: the second, the last, and evenly between."""
    last = len(trajectory.checkpoint_steps) - 1
    count = min(max(LEAST, steps // STEPS_A_TRIAL), last + 1) - 1  # the first is tried anyway
    return sorted({1, *(int(k) for k in np.linspace(1, last, max(count, 1)).round())} - {0})


def _at(training: Training, trajectory: Trajectory | None, k: int, *, as_run: bool = False) -> Trial:
    """Try the batch that follows checkpoint ``k``, at its weights, with its random numbers."""
    step, model = 0, training.model
    if trajectory is not None:
        kept = trajectory.checkpoint(k)
        step = min(kept.step, training.steps - 1)
        model = copied(model)
        weights = torch.from_numpy(np.ascontiguousarray(kept.weights)).to(training.device, training.dtype)
        load_flat(training.layout.parameters(model), weights)
        load_buffers(model, kept.buffers)
    recipe = training.recipe
    found = step_batch(recipe, training.dataset, training.batches, recipe.seed, step)
    batch = to_device(found, training.device, training.dtype)
    try:
        return try_batch(
            recipe,
            model,
            training.layout,
            batch,
            constant=training.holds_statistics,
            seed=derived_seed(recipe.seed, "step", step),
            as_run=as_run,
            first=trajectory is None and not as_run,
        )
    except RuntimeError as error:
        if trajectory is None:
            raise  # told as what it is, the first step
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise RecipeError(
            f"the gradients of the samples of step {step} cannot be computed: {type(error).__name__}: {first}; "
            "correct the recipe (--debug shows where)"
        ) from error

"""Choose a strategy per parameter by trying: no rule is believed before it agreed with autograd.

A copy of the model runs a whole batch. Some samples' own losses are differentiated through the very
graph of that batch (``vjp``), and the sum over all samples must be the gradient of the batch. A
parameter whose rule agrees keeps it, otherwise ``func`` is tried, otherwise ``vjp`` itself is used.
Layers with unusual calls (weights used functionally, batch not on the leading axis, samples coupled
by the loss) thus cost time, never correctness. A trial proves nothing where the gradients are zero:
more of the batch's samples are then looked at, and other batches, at other weights, must decide.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...storage.errors import DoesNotFit, HydraError, RecipeError
from ..data.batches import batch_length, rows_of, to_device
from ..data.cast import cast_model
from ..determinism import preserved_generators
from ..model.layout import Layout
from ..model.state import buffers_from, copied
from ..recipe import Batch, Recipe
from .one_batch import LOOSE, TOLERANCE, OneBatch, Trial, Verdict
from .ways import Before, Strategy, Ways
from .wide import widened

logger = logging.getLogger(__name__)


def choose_ways(
    recipe: Recipe, model: nn.Module, layout: Layout, batch: Batch, *, constant: bool, seed: int = 0
) -> Ways:
    """Return how to get the gradients of each parameter, by a trial on one batch.

    Args:
        recipe: Gives the losses.
        model: Left untouched: a copy is tried, in the model's present mode and at its weights.
        layout: The parameters.
        batch: A batch as it will be traced, on the model's device.
        constant: Whether BatchNorm statistics are held constant (else coupled: ``vjp`` throughout).
        seed: Of the generators while the losses are computed, and of the choice of samples.

    Raises:
        RecipeError: The model cannot be copied, or the gradient of no sample can be told from the batch's.
    """
    trial = try_batch(recipe, model, layout, batch, constant=constant, seed=seed)
    return with_judge(combined([trial], layout), recipe, layout, constant=constant)


def with_judge(ways: Ways, recipe: Recipe, layout: Layout, *, constant: bool) -> Ways:
    """Return the ways with what tries steps whose graph has another form."""

    def judge(model: nn.Module, batch: Batch, before: Before) -> frozenset[int]:
        fast = [i for i, way in enumerate(ways.strategies) if way != "vjp"]
        try:
            with buffers_from(before.buffers):
                trial = try_batch(
                    recipe, model, layout, batch, constant=constant, seed=0, random=before.random, first=False
                )
        except (HydraError, RuntimeError) as error:
            logger.debug("a step with another graph cannot be tried: %s", error)
            return frozenset(fast)
        return frozenset(
            i
            for i in fast
            if trial.verdicts[i] == "vjp"
            or (trial.verdicts[i] != "zero" and not _covered(trial.verdicts[i], ways.strategies[i]))
        )

    return replace(ways, judge=judge)


def _covered(verdict: Verdict, strategy: Strategy) -> bool:
    """Whether a strategy is right where a trial says ``verdict``: what a rule can give, ``func`` can too."""
    same = verdict == strategy or {verdict, strategy} == {"outer", "rule"}
    return same or strategy == "func"


def try_batch(
    recipe: Recipe,
    model: nn.Module,
    layout: Layout,
    batch: Batch,
    *,
    constant: bool,
    seed: int,
    as_run: bool = False,
    first: bool = True,
    random: Tensor | None = None,
) -> Trial:
    """Return what one batch shows; arguments as for ``choose_ways``.

    In float64, which tells rounding from error, where the model can compute in it.

    Args:
        as_run: Try in the dtype of the run instead, where a wrong result must be wrong by much.
        first: Whether to try too that gradients scale with the loss.
        random: State of torch's generator to begin with, in place of the seed.
    """
    parameter = next(model.parameters())
    own, wide = (recipe, parameter.dtype), (widened(recipe), torch.float64)
    tries = [own] if as_run else [wide, own]
    with preserved_generators():
        for left, (using, dtype) in zip(range(len(tries))[::-1], tries, strict=True):
            tolerance = LOOSE if as_run else TOLERANCE[dtype]
            try:
                trial = cast_model(copied(model), None, dtype)
                moved = to_device(batch, parameter.device, dtype)
                one = OneBatch(using, trial, layout, moved, seed, tolerance, first, random)
                return one.trial(constant)
            except torch.OutOfMemoryError:
                if not left:
                    break
            except RuntimeError as error:
                if "use_reentrant=True" in str(error):
                    raise RecipeError(
                        "activations are checkpointed with use_reentrant=True, whose backward pass cannot be taken sample "
                        "by sample; use torch.utils.checkpoint with use_reentrant=False (the same numbers)"
                    ) from error
                if not left:
                    raise
                logger.debug("trial in float64 failed, trying the run's dtype: %s", error)
    size = batch_length(batch)
    if size < 2:
        raise DoesNotFit(
            f"the gradients of single samples do not fit into the memory of {parameter.device}; use a larger device"
        )
    logger.info("a trial of %d samples does not fit, trying half of them", size)
    half = rows_of(batch, torch.arange(size // 2, device=parameter.device), size)
    return try_batch(
        recipe, model, layout, half, constant=constant, seed=seed, as_run=as_run, first=first, random=random
    )


def combined(trials: Sequence[Trial], layout: Layout) -> Ways:
    """Return the ways that no trial speaks against."""
    strategies: list[Strategy] = []
    untried: set[int] = set()
    drew = any(trial.random for trial in trials)
    for i in range(len(layout.entries)):
        said: set[Strategy] = {v for trial in trials if (v := trial.verdicts[i]) != "zero"}
        if not said:
            untried.add(i)
        if not said or "vjp" in said or ("func" in said and drew):
            strategies.append("vjp")
        elif "func" in said:
            strategies.append("func")
        elif len(said) == 1:
            strategies += said
        else:
            strategies.append("rule" if said == {"outer", "rule"} else "vjp")
    known = [trial.coupled for trial in trials if trial.coupled is not None]
    ways = Ways(
        strategies=tuple(strategies),
        untried=frozenset(untried),
        random=drew,
        coupled=any(known) if known else None,
        graphs=frozenset(trial.graph for trial in trials if trial.graph is not None),
        noise=max((trial.noise for trial in trials), default=0.0),
        trials=len(trials),
        rows=sum(trial.rows for trial in trials),
    )
    slow = {e.name: s for e, s in zip(layout.entries, strategies, strict=True) if s in ("func", "vjp")}
    if slow:
        logger.info("per-sample gradients without a layer rule: %s", slow)
    return ways

"""Choose a strategy per parameter by trying: no rule is believed before it agreed with autograd.

A copy of the model runs one small batch. Each sample's own loss is differentiated through the very
graph of that batch (``vjp``); a parameter whose rule agrees keeps it, otherwise ``func`` is tried,
otherwise ``vjp`` itself is used. Layers with unusual calls (weights used functionally, batch not on
the leading axis, samples coupled by the loss) thus cost time, never correctness.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...storage.errors import RecipeError
from ..data import batch_length, to_device
from ..determinism import derived_seed, preserved_generators, seed_everything
from ..layout import Layout
from ..recipe import Batch, Recipe
from .engine import PerSampleGradients, Strategy
from .reference import constant_statistics, func, vjp

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
"""Largest deviation from ``vjp``, relative to the parameter's largest per-sample gradient."""


def choose_strategies(
    recipe: Recipe, model: nn.Module, layout: Layout, batch: Batch, *, constant: bool
) -> tuple[Strategy, ...]:
    """Return one strategy per parameter of the layout.

    Args:
        recipe: Gives the losses.
        model: Left untouched: a copy is tried, in the model's present mode.
        layout: The parameters.
        batch: A few samples, on the model's device.
        constant: Whether BatchNorm statistics are held constant (else coupled: ``vjp`` throughout).

    Raises:
        RecipeError: The model cannot be copied.
    """
    device = next(model.parameters()).device
    with preserved_generators():
        for dtype in (torch.float64, torch.float32):
            trial = copied(model).to(dtype)
            try:
                found = _try(recipe, trial, layout, to_device(batch, device, dtype), constant, dtype)
            except RuntimeError as error:
                if dtype == torch.float32:
                    raise
                logger.debug("probe in float64 failed, trying float32: %s", error)
                continue
            _log(found, layout)
            return found
    raise AssertionError("unreachable")


def copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model.

    Raises:
        RecipeError: It cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RecipeError(
            f"the model cannot be copied ({type(error).__name__}: {error}); "
            "tensors kept on modules must be leaves or buffers"
        ) from error


def _try(
    recipe: Recipe, model: nn.Module, layout: Layout, batch: Batch, constant: bool, dtype: torch.dtype
) -> tuple[Strategy, ...]:
    size = batch_length(batch)
    positions = torch.arange(size, device=next(model.parameters()).device)
    engine = PerSampleGradients(recipe, model, layout, ["rule"] * len(layout.entries))
    parameters = layout.parameters(model)
    try:
        with constant_statistics(model) as coupled:
            if coupled and not constant:
                everywhere: Strategy = "vjp"
                return (everywhere,) * len(parameters)
            seed_everything(derived_seed(0, "probe"))
            with engine.capture.listen():
                losses_B = recipe.losses(model, batch)
                engine.capture.pause()
                right = vjp(losses_B, parameters, positions)
                engine.capture.resume()
                torch.autograd.grad(losses_B.mean(), parameters, allow_unused=True)
            outer = _outer_entries(engine)
            by_rule = _rule_rows(engine, positions, size)
            good = [_agrees(a, b, dtype) for a, b in zip(by_rule, right, strict=True)]
            missing = [i for i, ok in enumerate(good) if not ok]
            alone = _func_rows(recipe, model, layout, batch, positions, missing)
    finally:
        engine.close()
    strategies: list[Strategy] = ["outer" if i in outer else "rule" for i in range(len(parameters))]
    for i in missing:
        row = alone.get(i)
        strategies[i] = "func" if row is not None and _agrees(row, right[i], dtype) else "vjp"
    return tuple(strategies)


def _outer_entries(engine: PerSampleGradients) -> set[int]:
    """Return weights of Linear layers called once, with (batch, features) inputs."""
    calls: dict[int, list[bool]] = {}
    for call in engine.capture.calls:
        flat = isinstance(call.module, nn.Linear) and call.d_B is not None and call.d_B.ndim == 2
        for name, parameter in call.module.named_parameters(recurse=False):
            if id(parameter) in engine.index:
                calls.setdefault(engine.index[id(parameter)], []).append(flat and name == "weight")
    return {i for i, flat in calls.items() if flat == [True]}


def _rule_rows(engine: PerSampleGradients, positions: Tensor, size: int) -> list[Tensor]:
    """Rows by rule, one layer at a time so that one misfit does not hide the others."""
    rows = torch.cat([positions, positions[-1:].expand(engine.tile - size)])
    for view in engine.views:
        view.zero_()
    written: set[int] = set()
    for call in engine.capture.take():
        if call.d_B is None:
            continue
        try:
            x_B = engine.prepared(call, size)
            call.d_B = call.d_B * size
            engine.products(call, x_B, rows, written)
        except (RecipeError, RuntimeError) as error:
            logger.debug("rule of layer %s does not apply: %s", call.name, error)
            for parameter in call.module.parameters(recurse=False):
                index = engine.index.get(id(parameter))
                if index is not None:
                    engine.views[index].fill_(float("nan"))
                    written.add(index)
    return [view[:size] for view in engine.views]


def _func_rows(
    recipe: Recipe,
    model: nn.Module,
    layout: Layout,
    batch: Batch,
    positions: Tensor,
    missing: Sequence[int],
) -> dict[int, Tensor]:
    if not missing:
        return {}
    names = [layout.entries[i].name for i in missing]
    try:
        rows = func(recipe, model, names, batch, positions)
    except Exception as error:  # noqa: BLE001 - whatever torch.func cannot do is what vjp is for
        logger.debug("torch.func does not apply: %s", error)
        return {}
    return dict(zip(missing, rows, strict=True))


def _agrees(tried: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    scale = float(right.abs().max())
    return bool((tried - right).abs().max() <= TOLERANCE[dtype] * scale) if tried.numel() else True


def _log(strategies: Sequence[Strategy], layout: Layout) -> None:
    slow = {e.name: s for e, s in zip(layout.entries, strategies, strict=True) if s in ("func", "vjp")}
    if slow:
        logger.info("per-sample gradients without a layer rule: %s", slow)

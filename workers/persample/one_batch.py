"""What one batch shows of the ways to per-sample gradients, on a copy of the model.

The batch runs whole; the rows of some samples are held against autograd through its very graph, and the
sum over all samples against the gradient of the batch.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ...storage.errors import RecipeError
from ..data.batches import batch_length, rows_of
from ..determinism import generator_states, seed_everything
from ..model.layout import Layout
from ..model.state import (
    Kept,
    buffers_from,
    kept_buffers,
    own_parameters,
    unchanged_buffers,
    uses_batch_statistics,
)
from ..recipe import Batch, Recipe
from .capture import Call, lent, transposed
from .engine import PerSampleGradients
from .reference import constant_statistics, func, same_losses, vjp
from .rules import AppliedLinear
from .ways import Strategy, Ways, form_of
from .wide import mode_of

logger = logging.getLogger(__name__)

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
"""Largest deviation from ``vjp``, relative to the parameter's largest per-sample gradient."""

LOOSE = 5e-2
"""The same for a second trial in float32 of what agreed in float64: lower precision may be the model's own."""

NOISE = 1e-4
"""Share of the largest gradient below which a parameter's own scale is not used."""

SAMPLES = 2
"""Samples of a batch that are differentiated one by one."""

Verdict = Strategy | Literal["zero"]
"""What a trial says of a parameter; ``zero``: no sample of the batch has a gradient for it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """What one batch showed.

    Attributes:
        verdicts: One per entry of the layout.
        random: Whether the losses drew random numbers.
        coupled: Whether samples see each other; None where it could not be tried.
        rows: How many samples were differentiated alone.
        graph: The form of the batch's graph; None where there is nothing to compare it for.
        noise: How far the rows of a batch add up to something else than its gradient, relative.
    """

    verdicts: tuple[Verdict, ...]
    random: bool
    coupled: bool | None
    rows: int
    graph: int | None = None
    noise: float = 0.0


class OneBatch:
    """One batch on a copy of the model that may be used up.

    Args:
        recipe: Gives the losses.
        model: The copy.
        layout: The parameters.
        batch: In the model's dtype, on its device.
        seed: Of the generators and of the choice of samples.
        tolerance: How far a row may be from autograd's, relative.
        first: Whether to try too that gradients scale with the loss.
        random: State of torch's generator to begin with, in place of the seed.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        layout: Layout,
        batch: Batch,
        seed: int,
        tolerance: float,
        first: bool,
        random: Tensor | None,
    ) -> None:
        self.recipe, self.model, self.layout, self.batch = recipe, model, layout, batch
        self.seed, self.tolerance, self.size = seed, tolerance, batch_length(batch)
        self.first, self.random = first, random
        self.parameters = layout.parameters(model)
        device = next(model.parameters()).device
        order = torch.randperm(self.size, generator=torch.Generator().manual_seed(seed)).to(device)
        self.chosen, self.rest = order[:SAMPLES], order[SAMPLES:]
        rule: Strategy = "rule"
        self.engine = PerSampleGradients(
            recipe, model, layout, Ways(strategies=(rule,) * len(layout.entries))
        )

    def trial(self, constant: bool) -> Trial:
        """Return what the batch shows; ``constant``: whether BatchNorm statistics are held constant."""
        try:
            with constant_statistics(self.model) as statistics:
                if statistics and not constant:
                    everywhere: Verdict = "vjp"
                    verdicts = (everywhere,) * len(self.parameters)
                    return Trial(verdicts=verdicts, random=False, coupled=True, rows=0)
                return self._trial()
        finally:
            self.engine.close()

    def _trial(self) -> Trial:
        capture = self.engine.capture
        kept = kept_buffers(self.model)
        self._seed()
        fresh = generator_states()
        with capture.listen():
            losses_B = self.recipe.losses(self.model, self.batch)
            drew = fresh != generator_states()
            graph = form_of(losses_B, self.engine.index)
            capture.pause()
            self.right = vjp(losses_B, self.parameters, self.chosen)
            # What is smaller than this, in all of a parameter, is what rounding leaves of zero.
            self.floor = NOISE * max(
                (float(rows.abs().max()) for rows in self.right if rows.numel()), default=0.0
            )
            if self.first:
                self._check_linear(losses_B)
            capture.resume()
            found = torch.autograd.grad(
                losses_B.mean(), self.parameters, retain_graph=True, allow_unused=True
            )
        self.unseen: set[int] = set()
        self.of = dict.fromkeys(range(len(self.parameters)), self.chosen)
        self.moving = {i for i, rows in enumerate(self.right) if bool(rows.any())}
        self._look_further(losses_B)
        self.whole = [
            torch.zeros_like(p) if g is None else g * self.size
            for g, p in zip(found, self.parameters, strict=True)
        ]
        outer = self._outer_entries()
        good, noise = self._by_rule()
        missing = [i for i in range(len(self.parameters)) if i not in good]
        alone = self._by_func(missing, losses_B, kept) if missing and not drew else set()
        verdicts: list[Verdict] = []
        for i in range(len(self.parameters)):
            if i not in self.moving:
                verdicts.append("zero" if i in good and i not in self.unseen else "vjp")
            elif i in good:
                verdicts.append("outer" if i in outer and good[i] == "rule" else good[i])
            else:
                verdicts.append("func" if i in alone else "vjp")
        return Trial(
            verdicts=tuple(verdicts),
            random=drew,
            coupled=None if drew else self._coupled(losses_B, kept),
            rows=len(self.chosen),
            graph=graph,
            noise=noise,
        )

    def _seed(self) -> None:
        seed_everything(self.seed)
        if self.random is not None:
            torch.set_rng_state(self.random)

    def _check_linear(self, losses_B: Tensor) -> None:
        """Refuse a backward pass whose result does not scale with what goes in.

        Raises:
            RecipeError: Gradients are changed on their way (clipped, signed, made noisy).
        """
        # About 1 / B, as in the step; a power of two, so that layers of low precision round alike.
        scale = 2.0 ** -math.ceil(math.log2(self.size)) if self.size > 1 else 0.5
        scaled = vjp(losses_B, self.parameters, self.chosen[:1], scale)
        for i, (rows, small) in enumerate(zip(self.right, scaled, strict=True)):
            largest = float(rows[0].abs().max()) if rows.numel() else 0.0
            if not math.isfinite(largest):  # told elsewhere, by step and sample
                continue
            if not bool(((small[0] / scale - rows[0]).abs() <= LOOSE * max(largest, self.floor)).all()):
                raise RecipeError(
                    f"the gradient of parameter {self.layout.entries[i].name!r} does not scale with the loss: a hook or "
                    "a custom backward changes gradients on their way (clips or signs them), which the recursion does "
                    "not know; remove it"
                )

    def _look_further(self, losses_B: Tensor) -> None:
        """Look for samples with a gradient where the chosen ones have none."""
        still = [i for i in range(len(self.parameters)) if i not in self.moving]
        still = self.engine.moving(still, losses_B) if still else []
        for start in range(0, len(self.rest), self.engine.tile):
            if not still:
                return
            rows = self.rest[start : start + self.engine.tile]
            found = vjp(losses_B, [self.parameters[i] for i in still], rows)
            for i, values in zip(list(still), found, strict=True):
                if bool(values.any()):
                    self.of[i], self.right[i] = rows, values
                    self.moving.add(i)
                    still.remove(i)
        self.unseen = set(still)  # moves by random weights and by no sample: never believed

    def _outer_entries(self) -> set[int]:
        """Return weights of Linear layers called once, with (batch, features) inputs."""
        calls: dict[int, list[bool]] = {}
        for call in self.engine.capture.calls:
            flat = isinstance(call.module, nn.Linear) and call.d_B is not None and call.d_B.ndim == 2
            for name, parameter in call.module.named_parameters(recurse=False):
                if id(parameter) in self.engine.index:
                    calls.setdefault(self.engine.index[id(parameter)], []).append(flat and name == "weight")
        return {i for i, flat in calls.items() if flat == [True]}

    def _by_rule(self) -> tuple[dict[int, Verdict], float]:
        """Return the entries whose rows by rule agree, with the form of their calls, and how exactly they add up."""
        raw = self.engine.capture.take()
        good, noise = self._agreeing(raw)
        verdicts: dict[int, Verdict] = dict.fromkeys(good, "rule")
        others: list[tuple[Verdict, Callable[[Call], Call | None]]] = [
            ("second", transposed),
            ("lent", lambda call: lent(call, raw)),
        ]
        for verdict, change in others:
            missing = self.moving - verdicts.keys()
            left = [call for call in raw if not isinstance(call.module, AppliedLinear)]
            left = [call for call in left if missing & {i for _name, i in self.engine.owned(call)}]
            calls = [other for call in left if (other := change(call)) is not None]
            if calls:
                also, more = self._agreeing(calls)
                verdicts |= dict.fromkeys(also & missing, verdict)
                noise = max(noise, more)
        for owned in self.engine.owners():  # a layer's calls have one form
            if len({verdicts[i] for i in owned if i in verdicts and i in self.moving}) > 1:
                verdicts = {i: verdict for i, verdict in verdicts.items() if i not in owned}
        return verdicts, noise

    def _agreeing(self, raw: Sequence[Call]) -> tuple[set[int], float]:
        """Return the entries whose rows agree, and how exactly they add up.

        One layer at a time, so that no misfit hides others.
        """
        engine, size = self.engine, self.size
        calls, inputs, bad = [], [], set()
        for call in raw:
            if call.d_B is None:
                continue
            owned = {i for _name, i in engine.owned(call)}
            scaled = copy.copy(call)
            try:
                with mode_of(self.recipe):
                    x_B = engine.prepared(scaled, size)
                scaled.d_B = call.d_B * size
                engine.fill([scaled], [x_B], self.chosen[:1].expand(engine.tile), size)
            except (RecipeError, RuntimeError, AssertionError) as error:
                logger.debug("rule of layer %s does not apply: %s", call.name, error)
                bad |= owned
                continue
            calls.append(scaled)
            inputs.append(x_B)
        found = _Compared(self)
        device = self.chosen.device
        for start in range(0, size, engine.tile):
            count = min(engine.tile, size - start)
            rows = torch.arange(start, start + engine.tile, device=device).clamp(max=size - 1)
            engine.fill(calls, inputs, rows, size)
            for i, view in enumerate(engine.views):
                found.add(i, view[:count], start)
        good = {i for i in range(len(self.parameters)) if i not in bad and found.agrees(i)}
        return good, found.noise

    def _by_func(self, missing: Sequence[int], losses_B: Tensor, kept: Kept) -> set[int]:
        """Return those of the entries whose rows by ``torch.func`` agree."""
        names = [self.layout.entries[i].name for i in missing]
        found, together = _Compared(self), losses_B.detach()
        scale = float(together.abs().max())
        try:
            for start in range(0, self.size, self.engine.tile):
                stop = min(start + self.engine.tile, self.size)
                span = torch.arange(start, stop, device=self.chosen.device)
                with buffers_from(kept), own_parameters(self.model):
                    rows, losses = func(self.recipe, self.model, names, self.batch, span)
                if not same_losses(losses, together[span], scale):
                    return set()
                for i, values in zip(missing, rows, strict=True):
                    found.add(i, values, start)
        except Exception as error:  # noqa: BLE001 - whatever torch.func cannot do is what vjp is for
            logger.debug("torch.func does not apply: %s", error)
            return set()
        return {i for i in missing if found.agrees(i)}

    def _coupled(self, losses_B: Tensor, kept: Kept) -> bool | None:
        """Whether a sample loses alone what it loses in the batch; None where batch statistics forbid to ask."""
        if self.size < 2 or any(uses_batch_statistics(module) for module in self.model.modules()):
            return None
        together = losses_B.detach()
        alone = []
        try:
            with torch.no_grad():
                for k in self.chosen.tolist():
                    one = torch.tensor([k], device=self.chosen.device)
                    with buffers_from(kept), unchanged_buffers(self.model):
                        self._seed()
                        alone.append(self.recipe.losses(self.model, rows_of(self.batch, one, self.size))[0])
        except Exception as error:  # noqa: BLE001 - a loss that needs company
            logger.debug("a sample alone has no loss: %s", error)
            return True
        return not same_losses(torch.stack(alone), together[self.chosen], float(together.abs().max()))


class _Compared:
    """Rows of all samples, in pieces, against those of some and against the batch's gradient."""

    def __init__(self, batch: OneBatch) -> None:
        self.batch = batch
        self.sum = [torch.zeros_like(p) for p in batch.parameters]
        self.size = [torch.zeros_like(p) for p in batch.parameters]
        self.bad: set[int] = set()
        self.noise = 0.0

    def add(self, i: int, rows: Tensor, start: int) -> None:
        """Take rows ``start``, … of entry ``i``."""
        if not rows.numel():
            return
        self.sum[i] += rows.sum(0)
        self.size[i] += rows.abs().sum(0)
        right, of = self.batch.right[i], self.batch.of[i]
        here = (of >= start) & (of < start + len(rows))
        if bool(here.any()):
            allowed = self.batch.tolerance * max(float(right.abs().max()), self.batch.floor)
            if not bool(((rows[of[here] - start] - right[here]).abs() <= allowed).all()):
                self.bad.add(i)

    def agrees(self, i: int) -> bool:
        """Whether the rows were right, and their sum is the batch's."""
        if i in self.bad:
            return False
        if not self.sum[i].numel():
            return True
        scale = max(float(self.size[i].max()), self.batch.floor)
        off = float((self.sum[i] - self.batch.whole[i]).abs().max())
        if not off <= self.batch.tolerance * scale:
            return False
        self.noise = max(self.noise, off / scale if scale else 0.0)
        return True

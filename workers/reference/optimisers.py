"""How a step of the optimiser moves tangents, written out by hand: SGD, Adam, AdamW, clipping.

With G the gradient of the step's loss, n its norm over all parameters, s a tangent's part of it (what samples
and, in exact forms, moved weights do to G) and c the limit of clipping, where c < n + 1e-6:

    g = G c / (n + 1e-6),   s <- s c / (n + 1e-6) - G c <G, s> / (n (n + 1e-6)^2)

SGD moves as ``dense`` says. Adam (g and s with L w and L du added where the decay is coupled):

    m' = b1 m + (1 - b1) g,  v' = b2 v + (1 - b2) g^2,  a = m' / (1 - b1^t),  b = sqrt(v' / (1 - b2^t))
    dm <- b1 dm + (1 - b1) s;  dv <- b2 dv + (1 - b2) 2 g s
    du <- (1 - h L) du - h (dm / (1 - b1^t) / (b + e) - a db / (b + e)^2),  db = dv / (1 - b2^t) / (2 b), 0 where b = 0

m, v and t being those of the replayed training. In the forms without the Hessian a gradient comes in divided by
the b + e of its own step, and nothing else of Adam moves: ``dm <- b1 dm + (1 - b1) s / (b + e)``,
``du <- (1 - h L) du - h dm / (1 - b1^t)``, coupled decay left out. What EKFAC does is said in ``ekfac``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ...storage.trajectory import Trajectory
from ..training.training import Training
from .ekfac import DenseCurvature, step_settings


class Tangent:
    """What one sample does to the weights and to the optimiser's vectors, a tensor a parameter.

    Args:
        parameters: Their shapes.
        begun: Of each, whether training began with momentum: then dm is 0, and the first step none of its own.

    Attributes:
        du: Of the weights.
        dm: Of the momentum; None until it is first used.
        dv: Of Adam's second moment; so.
        source: Its part of the gradient of the step that is being made; None: none.
        moved: Whether it is anything but 0.
    """

    def __init__(self, parameters: Sequence[Tensor], begun: Sequence[bool]) -> None:
        self.du = [torch.zeros_like(p, requires_grad=False) for p in parameters]
        self.dm: list[Tensor | None] = [
            torch.zeros_like(p, requires_grad=False) if there else None
            for p, there in zip(parameters, begun, strict=True)
        ]
        self.dv: list[Tensor | None] = [None] * len(self.du)
        self.source: list[Tensor] | None = None
        self.moved = False

    def take(self, bent: Sequence[Tensor] | None, own: Sequence[Tensor] | None, share: float) -> None:
        """Add what a batch does: H du, and the sample's own gradients times their share."""
        # Until the step is taken, du stands still; then it moves.
        for part, factor in ((bent, 1.0), (own, share)):
            if part is not None:
                before = self.source or [torch.zeros_like(u) for u in self.du]
                self.source = [s + factor * p for s, p in zip(before, part, strict=True)]

    def flat(self) -> Tensor:
        """Return du as one vector, (D,)."""
        return torch.cat([u.reshape(-1) for u in self.du])


class StepMove:
    """One step of the optimiser, before it is taken.

    Args:
        training: Stands before it.
        trajectory: The record, for the settings.
        step: The batch that ends it.
        gradient: Of the step's loss, unclipped; None: the parameter is left alone.
        dtype: Of the tangents.
    """

    def __init__(
        self,
        training: Training,
        trajectory: Trajectory,
        step: int,
        gradient: Sequence[Tensor | None],
        dtype: torch.dtype,
    ) -> None:
        self.training, self.trajectory, self.step = training, trajectory, step
        self.gradient, self.dtype = gradient, dtype
        self.norm = float(torch.sqrt(sum(((g**2).sum() for g in gradient if g is not None), torch.zeros(()))))
        factors = trajectory.clip_factor
        clips = factors is not None and float(factors[step]) < 1.0
        self.factor = float(training.recipe.clip_grad_norm or 0.0) / (self.norm + 1e-6) if clips else 1.0
        self.clips = clips
        self.noted = trajectory.optimizer
        self.adam = [self._adam(k) for k in range(len(gradient))] if self.noted["family"] == "adam" else None

    def of(self, tangent: Tangent, *, frozen: bool) -> None:
        """Move a tangent; ``frozen``: in a form without the Hessian."""
        source = self._clipped(tangent)
        self._each(
            tangent,
            source,
            lambda step, k: (
                step.frozen(k, tangent, source[k]) if frozen else step.exact(k, tangent, source[k])
            ),
        )

    def bent(self, tangent: Tangent, curvature: DenseCurvature) -> None:
        """Move a tangent with EKFAC curvature, which clipping makes smaller and leaves its directions."""
        pull = curvature.apply(self.step, tangent.du) if tangent.moved else None
        source = self._clipped(tangent)
        if pull is not None:
            source = [s + b for s, b in zip(source, pull, strict=True)]
        self._each(
            tangent,
            source,
            lambda step, k: step.in_metric(
                k, tangent, source[k], curvature.rho(self.step, k) * curvature.scale[k]
            ),
        )

    def _each(self, tangent: Tangent, source: list[Tensor], adam: Callable[[_Adam, int], None]) -> None:
        """Move every parameter that is stepped: by SGD, or by what ``adam`` does with its step."""
        for k, group in self._stepped():
            if self.adam is None:
                self._sgd(k, group, tangent, source[k])
            else:
                step = self.adam[k]
                assert step is not None
                adam(step, k)

    def _clipped(self, tangent: Tangent) -> list[Tensor]:
        """Return a tangent's part of the gradient of the step's loss as clipping passes it on."""
        source = tangent.source
        tangent.moved = tangent.moved or source is not None
        if source is None:
            source = [torch.zeros_like(u) for u in tangent.du]
        if self.clips:
            along = sum(
                float((g * s).sum()) for g, s in zip(self.gradient, source, strict=True) if g is not None
            )
            less = self.factor * along / (self.norm * (self.norm + 1e-6))
            source = [
                self.factor * s if g is None else self.factor * s - less * g
                for g, s in zip(self.gradient, source, strict=True)
            ]
        return source

    def _stepped(self) -> Iterator[tuple[int, int]]:
        """Yield (parameter, its group) of those that the step moves."""
        for k, entry in enumerate(self.trajectory.parameters):
            if entry.group >= 0 and self.gradient[k] is not None:
                yield k, entry.group

    def _sgd(self, k: int, group: int, tangent: Tangent, part: Tensor) -> None:
        h, p, decay, damp, nesterov = step_settings(self.trajectory, self.step, group)
        source = part + decay * tangent.du[k]
        direction = source
        if p != 0:
            before = tangent.dm[k]
            after = source if before is None else p * before + (1 - damp) * source
            tangent.dm[k] = after
            direction = source + p * after if nesterov else after
        tangent.du[k] = tangent.du[k] - h * direction

    def _adam(self, k: int) -> _Adam | None:
        gradient, entry = self.gradient[k], self.trajectory.parameters[k]
        if gradient is None or entry.group < 0:
            return None
        parameter = self.training.parameters[k]
        state = self.training.optimizer.state.get(parameter, {})
        trajectory, at = self.trajectory, (self.step, entry.group)
        assert trajectory.beta1 is not None
        assert trajectory.beta2 is not None
        assert trajectory.eps is not None
        decay = float(trajectory.weight_decay[at])
        decoupled = bool(self.noted["decoupled"][entry.group])
        weight = parameter.detach().to(self.dtype)
        return _Adam(
            rate=float(trajectory.learning_rate[at]),
            beta1=float(trajectory.beta1[at]),
            beta2=float(trajectory.beta2[at]),
            eps=float(trajectory.eps[at]),
            shrink=decay if decoupled else 0.0,
            coupled=0.0 if decoupled else decay,
            count=int(state.get("step", 0)) + 1,
            gradient=self.factor * gradient + (0.0 if decoupled else decay) * weight,
            moments=[
                torch.zeros_like(weight) if state.get(key) is None else state[key].to(self.dtype)
                for key in ("exp_avg", "exp_avg_sq")
            ],
        )


class _Adam:
    """The step of one parameter."""

    def __init__(
        self,
        *,
        rate: float,
        beta1: float,
        beta2: float,
        eps: float,
        shrink: float,
        coupled: float,
        count: int,
        gradient: Tensor,
        moments: Sequence[Tensor],
    ) -> None:
        self.rate, self.beta1, self.beta2, self.coupled = rate, beta1, beta2, coupled
        self.keep, self.gradient = 1 - rate * shrink, gradient
        first = beta1 * moments[0] + (1 - beta1) * gradient
        second = beta2 * moments[1] + (1 - beta2) * gradient**2
        self.late1, self.late2 = 1 - beta1**count, 1 - beta2**count
        self.mean, self.root = first / self.late1, (second / self.late2).sqrt()
        self.below = self.root + eps

    def frozen(self, k: int, tangent: Tangent, source: Tensor) -> None:
        before = tangent.dm[k]
        kept = torch.zeros_like(source) if before is None else self.beta1 * before
        tangent.dm[k] = after = kept + (1 - self.beta1) * source / self.below
        tangent.du[k] = self.keep * tangent.du[k] - self.rate * after / self.late1

    def in_metric(self, k: int, tangent: Tangent, source: Tensor, metric: Tensor) -> None:
        before = tangent.dm[k]
        kept = torch.zeros_like(source) if before is None else self.beta1 * before
        tangent.dm[k] = after = kept + (1 - self.beta1) * source
        tangent.du[k] = self.keep * tangent.du[k] - self.rate * metric * after / self.late1

    def exact(self, k: int, tangent: Tangent, source: Tensor) -> None:
        source = source + self.coupled * tangent.du[k]
        dm, dv = (torch.zeros_like(source) if v is None else v for v in (tangent.dm[k], tangent.dv[k]))
        tangent.dm[k] = dm = self.beta1 * dm + (1 - self.beta1) * source
        tangent.dv[k] = dv = self.beta2 * dv + (1 - self.beta2) * 2 * self.gradient * source
        bend = torch.zeros_like(source)
        seen = self.root > 0
        bend[seen] = (dv / self.late2)[seen] / (2 * self.root[seen])
        move = dm / self.late1 / self.below - self.mean * bend / self.below**2
        tangent.du[k] = self.keep * tangent.du[k] - self.rate * move

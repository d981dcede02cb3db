"""Hessian products for tiles of directions: the way that is chosen once, and its tiles of fixed width.

See ``probe`` for what is tried before any way is believed.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...storage.errors import DoesNotFit, RecipeError
from ..determinism import preserved_generators
from ..model.state import unchanged_buffers, uses_batch_statistics
from ..recipe import Batch
from ..training.training import Training
from .differences import first_samples, one_line
from .gauss_newton_probe import chosen_products
from .probe import chosen_way, dependence
from .second_order import SecondOrder, TangentTile

logger = logging.getLogger(__name__)

TILE = 8
"""Directions of a tile, unless more stay near the processor."""

WIDEST = 64
"""Directions of a tile, at most."""

NEAR_BYTES = 64 << 20
"""Tangents of more than `TILE` directions together: worth it where calls cost more than their numbers do, which stay in caches."""

TANGENT_BYTES = 1 << 30
"""Room for the tangents of a tile; models with larger activations take narrower tiles."""

HELD = 4
"""Activations of the batch that a direction of a tile holds at its peak, and the graph of ``SecondOrder``;
measured on LeNet-5 and DenseNet-40: 3 to 4."""

WORTH = 4
"""Directions that must fit: narrower tiles cost as much a direction as ``SecondOrder``."""


class HessianTiles:
    """Gives each step of a replay its products; what is chosen here holds for all of them.

    Args:
        training: At its first weights, ``batch_norm`` coupled.
        alone: Whether a row's bits may depend neither on its place in a tile nor on the others. Tiles are
            then padded, and batch sizes for which that is not enough go one direction at a time.
        transposed: Whether J^T v is wanted where the derivative J of the update is not symmetric.
        share: Share of the Hessian in the products; the rest is the Gauss-Newton matrix's (``gauss_newton``).
        tile: Directions worked on at a time, at most.

    Attributes:
        refusal: Why the fast way is not taken; None where it is.
        slow_sizes: Batch sizes that do not take it all the same.
        width: Directions worked on at a time.
        field: What the update is where it is not the gradient of its loss; None where it is.
        checked: Whether the way was held against differences of the gradient.
        matrix: What stands in the Hessian's place; None: nothing.
    """

    def __init__(
        self,
        training: Training,
        *,
        alone: bool = False,
        transposed: bool = False,
        share: float = 1.0,
        tile: int = TILE,
    ) -> None:
        self.training, self.alone = training, alone
        with preserved_generators():
            activations = activation_bytes(training)
            self.width = min(tile, tile_width(activations))
            narrow = _narrow(activations)
            if share == 1.0:
                found = chosen_way(training, transposed=transposed, narrow=narrow)
            else:
                found = chosen_products(training, share=share, narrow=narrow)
            self.kind, self.refusal, self.fallback = found.kind, found.refusal, found.fallback
            self.field, self.checked, self.matrix = found.field, found.checked, found.matrix
            if found.alone:
                self.width = 1
            self.slow_sizes: set[int] = set()
            if alone and issubclass(self.kind, TangentTile):
                self.slow_sizes = dependence(training, self.kind, self.width)
        logger.info("%s products: %s", self.matrix or "Hessian", self.choice)

    @property
    def choice(self) -> str:
        """What was chosen, in words."""
        if self.refusal is not None:
            return f"one direction at a time, because {self.refusal}"
        text = f"{self.width} directions at a time"
        if self.field is not None:
            text += f" of the update itself, because {self.field}"
        if self.slow_sizes:
            sizes = " and ".join(map(str, sorted(self.slow_sizes)))
            text += f", one in batches of {sizes}, where the bits of a row depend on the others"
        return text

    def told(self) -> dict[str, Any]:
        """Return what a manifest says of the products."""
        norms = any(uses_batch_statistics(module) for module in self.training.model.modules())
        told = {
            "products": self.choice,
            "field": self.field,
            "differences": self.checked,
            "running_statistics": norms,
        }
        return told if self.matrix is None else {**told, "matrix": self.matrix}

    def at(self, step: int, batch: Batch) -> StepTiles:
        """Return the products of one step, at the model's present weights."""
        return StepTiles(self, step, batch)


class StepTiles:
    """Products with any number of directions at one step."""

    def __init__(self, tiles: HessianTiles, step: int, batch: Batch) -> None:
        self.tiles, self.step = tiles, step
        self.batch = batch
        self.alone = tiles.training.batch_size(step) in tiles.slow_sizes
        kind = tiles.fallback if self.alone and tiles.fallback is not None else tiles.kind
        self.way: TangentTile | SecondOrder = kind(tiles.training, step, batch)

    @property
    def losses(self) -> Tensor:
        """Own losses of the samples at these weights, (B,), once a tile was worked on."""
        return self.way.losses

    def tile(self, directions_QD: Tensor, out_QD: Tensor) -> Tensor:
        """Write H v for each direction into ``out_QD`` and return the <g_i, v>, (Q, B).

        Raises:
            DoesNotFit: The device's memory does not hold a tile.
            RecipeError: The fast way agreed when the replay began and does not exist for this step.
        """
        if isinstance(self.way, SecondOrder):
            return self.way.tile(directions_QD, out_QD)
        width, values = 1 if self.alone else self.tiles.width, []
        for start in range(0, len(directions_QD), width):
            part, out = directions_QD[start : start + width], out_QD[start : start + width]
            values.append(self._padded(part, out) if self.tiles.alone else self._fast(part, out))
        return torch.cat(values)

    def _padded(self, directions_QD: Tensor, out_QD: Tensor) -> Tensor:
        count, missing = len(directions_QD), self.tiles.width - len(directions_QD)
        if not missing or self.alone:
            return self._fast(directions_QD, out_QD)
        whole = torch.cat([directions_QD, directions_QD.new_zeros(missing, directions_QD.shape[1])])
        out = torch.empty_like(whole)
        values = self._fast(whole, out)
        out_QD.copy_(out[:count])
        return values[:count]

    def _fast(self, directions_QD: Tensor, out_QD: Tensor) -> Tensor:
        try:
            return self.way.tile(directions_QD, out_QD)
        except torch.OutOfMemoryError as error:
            raise DoesNotFit(
                f"{len(directions_QD)} Hessian products at a time do not fit into the memory of "
                f"{directions_QD.device} at step {self.step}; use a smaller batch size or a larger device"
            ) from error
        except RuntimeError as error:
            if self.tiles.fallback is not None:  # what the loss does here it did not do in the trial
                logger.info("one direction at a time at step %d: %s", self.step, one_line(error))
                self.way = self.tiles.fallback(self.tiles.training, self.step, self.batch)
                return self.way.tile(directions_QD, out_QD)
            raise RecipeError(
                f"Hessian products worked when the replay began and fail at step {self.step} "
                f"({one_line(error)}); let losses() do the same operations at every step"
            ) from error


def activation_bytes(training: Training) -> int:
    """Return the bytes that one forward pass of the first batch keeps for its backward pass."""
    known = {tensor.untyped_storage().data_ptr() for tensor in training.model.parameters()}
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    size = training.batch_size(0)
    batch = first_samples(training, 0)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with preserved_generators(), unchanged_buffers(training.model), sdpa_kernel(SDPBackend.MATH), hooks:
        kept = training.losses(batch, size)  # noqa: F841 - the graph holds what was noted until all is
    return sum(held.values())


def tile_width(activations: int) -> int:
    """Return how many directions go together, for a batch of so many bytes of activations."""
    each = max(1, HELD * activations)
    fitting = TANGENT_BYTES // each
    if fitting < WORTH:
        return 1
    near = min(WIDEST, fitting, NEAR_BYTES // each)
    return min(TILE, fitting) if near <= TILE else 1 << (near.bit_length() - 1)


def block_width(activations: int) -> int:
    """Return how many directions are carried together: a tile of them, or several where one is narrow."""
    return max(TILE, tile_width(activations))


def working_bytes(activations: int) -> int:
    """Return what products need beside the training and the directions themselves."""
    return HELD * activations * tile_width(activations)


def _narrow(activations: int) -> str | None:
    """Return why directions cannot be worked on together, or None."""
    if tile_width(activations) > 1:
        return None
    return (
        f"{WORTH} directions at a time need {WORTH * HELD * activations / 1e6:,.0f} MB for a batch, "
        f"more than {TANGENT_BYTES / 1e6:,.0f} MB"
    )

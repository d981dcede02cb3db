"""The first batches of a recorded loop, replayed with its recipe at once: what cannot be replayed is said then.

A replay that differs tells where it begins to: in the losses, in which parameters have a gradient, or in the
weights after a step; and whether two replays agree with each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from ...storage.errors import RecipeError
from ..data.batch_types import leaves
from ..data.batches import fetch, to_device
from ..data.cast import raw_bytes
from ..data.user_code import listed, user_code
from ..determinism import derived_seed, preserved_generators, seed_everything
from ..recipe import Recipe
from .recorded import LoopRecord, recorded_recipe
from .training import Compute, Training

ROUNDING = {"float32": 1e-5, "float64": 1e-13}
"""Weights that are off by less, relative to the largest, are off by rounding."""

SEE = "see own-loop.md, What a replay cannot follow"


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Seen:
    """What a loop was seen to do in its first T batches.

    Attributes:
        record: What its record says of them.
        digests: Checksum of the weights after so many batches.
        losses: (T,) of (B,) own losses; None: not known.
        active: (T, P) whether a parameter had a gradient.
        first_weights: (D,) after the first step.
    """

    record: LoopRecord
    digests: dict[int, int]
    losses: Sequence[npt.NDArray[Any] | None]
    active: npt.NDArray[np.bool_]
    first_weights: npt.NDArray[Any]


def check_replay(recipe: Recipe, compute: Compute, seen: Seen) -> int:
    """Replay what was seen, with the recipe; return how many batches.

    Raises:
        RecipeError: Says where the replay leaves the loop, and the likely reasons.
    """
    with preserved_generators():
        found, why = _replay(recipe, compute, seen)
        if why is not None:
            again, _ = _replay(recipe, compute, seen)
            if again != found:
                why = (
                    f"two replays of the first {len(again)} batches differ from each other: the recipe is not deterministic "
                    "(generators of its own, kernels, a state outside of the model)"
                )
            raise RecipeError(f"this loop cannot be replayed: {why}; {SEE}")
    return len(found)


def _replay(recipe: Recipe, compute: Compute, seen: Seen) -> tuple[list[int], str | None]:
    """Return the checksums after each batch up to where the replay left the loop, and in words how it did."""
    training = Training(recorded_recipe(recipe, seen.record), compute)
    found: list[int] = []
    for step, batch in enumerate(training.loader()):
        training.apply_settings(seen.record.settings, step)
        training.step(step, batch)
        found.append(training.weight_checksum())
        members = training.batches[step]
        samples = f"batch {step} (train_index {listed(members[members >= 0].tolist())})"
        own = seen.losses[step]
        if own is not None and not np.array_equal(own, training.own_losses.cpu().numpy(), equal_nan=True):
            mine = training.own_losses.cpu().numpy()
            k = int(np.abs(own - mine).argmax())
            return found, (
                f"the losses of {samples} are not the loop's (sample {int(members[k])}: {mine[k]:.9g}, in the loop {own[k]:.9g}): "
                "other data (augmentation drawn in the loader is not keyed), another model or losses(), autocast on one side "
                "alone, or random numbers drawn before the batch began"
            )
        if training.updates[step] and not np.array_equal(training.active[step], seen.active[step]):
            p = int((training.active[step] != seen.active[step]).argmax())
            name = training.layout.entries[p].name
            here, there = (
                ("has none", "has a gradient") if seen.active[step][p] else ("has one", "has no gradient")
            )
            return found, (
                f"parameter {name!r} {there} at {samples} in the loop and {here} in the replay: "
                "zero_grad(set_to_none=False), or another losses()"
            )
        expected = seen.digests.get(step + 1)
        if expected is not None and found[-1] != expected:
            return found, f"the weights after {samples} are not the loop's{_how_far(training, step, seen)}"
    return found, None


def _how_far(training: Training, step: int, seen: Seen) -> str:
    reasons = (
        "another reduction than the mean of the batch's losses over accumulate (say parts or divisor), gradients that were left "
        "from before, or kernels that are not deterministic"
    )
    if step != training.schedule.last[0]:
        return f": {reasons}"
    off = np.abs(training.weights().cpu().numpy() - seen.first_weights).max()
    limit = ROUNDING[training.compute.dtype] * np.abs(seen.first_weights).max()
    if off <= limit:
        return (
            f" by rounding alone (off by {off:.1e}): the same sum in another order; let rec.step(indices, losses) reduce, or take the "
            "mean of losses with reduction='none'"
        )
    return f" (off by {off:.1e}): {reasons}"


class InputCheck:
    """Holds what a loop says it trains on against what the recipe's dataset gives.

    Args:
        recipe: The recipe.
        compute: How a replay computes.
        seed: Keys the generators.
    """

    def __init__(self, recipe: Recipe, compute: Compute, seed: int) -> None:
        self.recipe, self.compute, self.seed = recipe, compute, seed
        with preserved_generators(), user_code(f"{recipe.name}.train_dataset() failed:", always=True):
            seed_everything(recipe.seed)
            self.dataset = recipe.train_dataset()

    def check(self, number: int, indices: npt.NDArray[np.int32], inputs: Any) -> None:
        """Compare each tensor of ``inputs`` with those of the recipe's batch.

        Raises:
            RecipeError: One is not among them.
        """
        given = [leaf for leaf in leaves(inputs) if isinstance(leaf, Tensor)]
        with (
            preserved_generators(),
            user_code(f"fetching batch {number} from the recipe raised", always=True),
        ):
            seed_everything(derived_seed(self.seed, "data", number))
            batch = fetch(self.recipe, self.dataset, indices)
        if not given:
            raise RecipeError(f"inputs of batch {number} hold no tensor; give the batch, or leave them out")
        device, dtype = given[0].device, self.compute.torch_dtype
        there = {_bits(leaf) for leaf in leaves(to_device(batch, device, dtype)) if isinstance(leaf, Tensor)}
        for k, leaf in enumerate(leaves(to_device(inputs, device, dtype))):
            if isinstance(leaf, Tensor) and _bits(leaf) not in there:
                raise RecipeError(
                    f"tensor {k} of the inputs of batch {number}, {tuple(leaf.shape)}, is not what the recipe gives for train_index "
                    f"{listed(indices.tolist())}: other data, other indices, or augmentation drawn in the loader, which is not keyed; {SEE}"
                )


def _bits(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    return str(tensor.dtype), tuple(tensor.shape), raw_bytes(tensor)

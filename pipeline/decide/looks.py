"""Samples of a run, looked at through its recipe: how they are shown, and what the trained model makes of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ...storage.errors import HydraError, RecipeError

if TYPE_CHECKING:
    from ...workers.data.show import Picture
    from ...workers.recipe import Recipe
    from ...workers.training.trained import Outputs, Part, Trained
    from ..reading.reader import Reader

Given = Mapping[str, Any]
"""Fields of ``RunSpec``, by name."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Looks:
    """How the samples of a run look.

    Attributes:
        trained: Model and datasets; None where no recipe is at hand.
        note: Why there is none, in a line; None: there is one.
    """

    trained: Trained | None = None
    note: str | None = None

    def look(self, part: Part, index: int) -> Picture | str | None:
        """Return a sample's picture or text; None where it has none, or where no recipe is at hand."""
        if self.trained is None or index < 0:
            return None
        from ...workers.data.show import look

        return look(self.trained.recipe, self.trained.item(part, index), f"{part} sample {index}")

    def outputs(self, part: Part, indices: Sequence[int]) -> Outputs | None:
        """Return what the trained model makes of samples; None where no recipe is at hand."""
        return None if self.trained is None else self.trained.outputs(part, indices)


@contextmanager
def looking(
    run: Reader, recipe: Recipe | str | None, *, command: str, given: Given | None = None
) -> Iterator[Looks]:
    """Open the recipe of a run for looking at its samples.

    A recipe that is not built in is used only where it is named: code that a stored run names is never
    imported unasked. What goes wrong with one that nobody named leaves numbers without pictures.

    Args:
        run: The run.
        recipe: What it was made from; None: a built-in one is found by itself.
        command: What is being done, for messages.
        given: ``recipe_args`` and ``device``, where they are not the run's.

    Raises:
        RecipeError: The recipe that was named does not work.
        SpecMismatch: It is not what the run was made from.
    """
    from ...workers.determinism import restored_process

    with restored_process():
        yield _open(run, recipe, command, given or {})


def _open(run: Reader, recipe: Recipe | str | None, command: str, given: Given) -> Looks:
    from ...workers.recipes import BUILT_IN

    reference = str(dict(run.noted.identity).get("recipe", ""))
    if recipe is None and reference not in BUILT_IN:
        return Looks(
            note=f"no pictures and no confidences: the recipe {reference!r} is not built in, and code that a stored "
            f"run names is not imported unasked; name it: hydra-pipe {command} {run.uri} {reference or 'RECIPE'}"
        )
    if recipe is not None or given:
        return Looks(trained=_trained(run, recipe, command, given))
    try:
        return Looks(trained=_trained(run, None, command, {}))
    except HydraError as error:
        return Looks(note=f"no pictures and no confidences: {error}")


def _trained(run: Reader, recipe: Recipe | str | None, command: str, given: Given) -> Trained:
    from ...workers.training.trained import Trained
    from ..plan.stored_spec import REPEATED, stored_spec
    from ..plan.survey import compute_of, resolve_recipe

    spec = stored_spec(run, recipe, given, command=command, free=REPEATED)
    found = resolve_recipe(spec)
    # A handful of samples: not worth a GPU, which the machine at hand may not have.
    trained = Trained(found, replace(compute_of(spec), device="cpu"), run.trajectory())
    sizes: dict[Part, int | None] = {"train": run.noted.n_train, "test": run.noted.n_test}
    for part, size in sizes.items():
        if size is not None and trained.size(part) != size:
            raise RecipeError(
                f"the {part} dataset of {found.name} has {trained.size(part):,} samples and that of the run had "
                f"{size:,}; name the recipe and --set options that it was made with"
            )
    return trained

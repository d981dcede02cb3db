"""What detectors have computed from the recipe: passes of the trained model over the tracked samples.

Done as stages of the run, on its executor, once; nothing is computed before a detector asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..executors.events import Observer, null

if TYPE_CHECKING:
    from ...workers.recipe import Recipe
    from ..reading.reader import Reader


class Passes:
    """Lazily computed passes over the tracked samples of a run; close it at the end.

    Args:
        run: The run.
        recipe: What it was made from; None: a built-in one is found by itself, another must be named.
        observer: Hears of what happens.
        given: Fields of `RunSpec` that say where the work is done.
    """

    def __init__(
        self,
        run: Reader,
        recipe: Recipe | str | None = None,
        observer: Observer = null,
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self.run, self.recipe, self.observer, self.given = run, recipe, observer, dict(given or {})

    def close(self) -> None:
        """Let go of the workers."""

"""Pictures and texts of samples on the page, within a budget of bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..pictures import data_uri, shrunk
from .markup import Markup, element, hostile, void

if TYPE_CHECKING:
    from ....workers.training.trained import Part
    from ..looks import Looks

SIDE = 64
"""Pixels of the longer side of a picture, at most."""

BUDGET = 2_600_000
"""Bytes that all pictures of a page may take."""


class Album:
    """Shows samples; once the budget is used up, pictures are left out and counted.

    Attributes:
        left_out: Samples whose picture was left out.
    """

    def __init__(self, looks: Looks, budget: int = BUDGET) -> None:
        self.looks, self.left, self.left_out = looks, budget, 0
        self._known: dict[tuple[Part, int], str | Markup | None] = {}

    def show(self, part: Part, index: int, told: str) -> Markup | None:
        """Return a sample's picture or text as HTML; None where it has none.

        Args:
            part: Which dataset.
            index: Which sample.
            told: What the picture shows, for those who do not see it.
        """
        found = self._look(part, index)
        if found is None or isinstance(found, Markup):
            return found
        if len(found) > self.left:
            self.left_out += 1
            return None
        self.left -= len(found)
        return void("img", src=found, alt=told, width=48, height=48)

    def _look(self, part: Part, index: int) -> str | Markup | None:
        if (part, index) not in self._known:
            looked = self.looks.look(part, index)
            shown: str | Markup | None
            if isinstance(looked, str):
                shown = element("span", hostile(looked), class_="text")
            else:
                shown = None if looked is None else data_uri(shrunk(looked.pixels, SIDE))
            self._known[part, index] = shown
        return self._known[part, index]

"""What drivers are disturbed with: how they are made, what is drawn, and where outcomes go."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.end_to_end.nursery import Nursery
from tests.torture.tally import Tally


@dataclass(frozen=True, kw_only=True, slots=True)
class Ground:
    """What faults are tried on.

    Attributes:
        nursery: Makes drivers.
        scratch: A directory.
        tally: Gets the outcomes.
        chance: What draws the faults.
        right: The answers of the undisturbed run.
        heard: Called after each fault.
    """

    nursery: Nursery
    scratch: Path
    tally: Tally
    chance: random.Random
    right: Mapping[str, str]
    heard: Callable[[], None] = lambda: None

    @property
    def said(self) -> Path:
        """File of what the last driver printed."""
        return self.scratch / "said"

"""Checkpoints of a training whose length nobody knows yet: kept aside, thinned as it goes on."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np


class Kept:
    """States of a training in a temporary directory.

    Args:
        most: How many are kept at a time, at least 2; when one more comes, every second goes.
        every: Steps between them, all of which are kept; None: as ``most`` allows.
    """

    def __init__(self, most: int, every: int | None) -> None:
        self._most, self._thins = max(2, most), every is None
        self._every = 1 if every is None else every
        self._place = Path(tempfile.mkdtemp(prefix="hydra-pipe-"))
        self.steps: list[int] = []

    def due(self, step: int) -> bool:
        """Whether the state after ``step`` steps is to be kept."""
        return not self.steps or step >= self.steps[-1] + self._every

    def add(self, step: int, state: dict[str, Any]) -> None:
        """Keep a state, arrays and bytes by name."""
        while self._thins and len(self.steps) >= self._most:
            gone = self.steps[1::2]
            self._every *= 2
            self.steps = self.steps[::2]
            for k in gone:
                self._file(k).unlink()
            if step < self.steps[-1] + self._every:
                return
        arrays = {
            name: np.frombuffer(value, np.uint8) if isinstance(value, bytes) else value
            for name, value in state.items()
        }
        np.savez(self._file(step), **arrays)  # type: ignore[arg-type]
        self.steps.append(step)

    def state(self, step: int) -> dict[str, Any]:
        """Return a state that was kept, ``buffers`` as bytes."""
        with np.load(self._file(step)) as found:
            state = dict(found)
        return {**state, "buffers": state["buffers"].tobytes()}

    def close(self) -> None:
        """Remove all of them."""
        shutil.rmtree(self._place, ignore_errors=True)

    def _file(self, step: int) -> Path:
        return self._place / f"{step}.npz"

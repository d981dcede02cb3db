"""Runs of a model that was trained elsewhere: one checkpoint, no steps. What they can be asked."""

from __future__ import annotations

from collections.abc import Mapping

from ...storage.errors import IncompleteStage, SpecError
from ...workers.estimators import ESTIMATORS, load
from ..reading.reader import Reader

HYDRA = "hydra"
"""Beginning of the names of methods that follow the training."""

COMMANDS = ("replay", "reduce", "evaluate", "compare", "verify --deep")
"""Commands that train again, or compare with training."""


def needs_training(method: str) -> SpecError:
    """Return the error of a method that follows the training, of a model that comes without one."""
    return SpecError(
        f"method {method} follows the recorded training, and a run at a checkpoint has none; use one of "
        f"{', '.join(allowed())} with attribute, or record the training: hydra-pipe run without --at-checkpoint"
    )


def allowed() -> list[str]:
    """Return the estimators that look at the trained model alone."""
    return [name for name in ESTIMATORS if not load(name).FOLLOWS_TRAINING]


def check_methods(methods: Mapping[str, object]) -> None:
    """Refuse methods that follow the training, and names that are none.

    Raises:
        SpecError: Names the method, and those that can be asked.
    """
    for name in methods:
        if name.split("-")[0] == HYDRA or (name in ESTIMATORS and load(name).FOLLOWS_TRAINING):
            raise needs_training(name)
        load(name)


def check_recorded(run: Reader, what: str) -> None:
    """Refuse what looks at the steps of a record where there are none.

    Raises:
        IncompleteStage: Names it.
    """
    if "at_checkpoint" in run.noted.identity:
        raise IncompleteStage(
            f"{run.uri} is a run at a checkpoint, without the training that {what} looks at; use a detector of the trained "
            "model, such as outlier-gradient, or record the training: hydra-pipe run without --at-checkpoint"
        )


def check_command(identity: Mapping[str, object], uri: str, command: str) -> None:
    """Refuse a command that trains again where there was no training.

    Raises:
        SpecError: Names the command.
    """
    if "at_checkpoint" in identity and command in COMMANDS:
        raise SpecError(
            f"{uri} is a run at a checkpoint ({str(identity['at_checkpoint']).split()[0]}), without a training that {command} could "
            "follow; record the training: hydra-pipe run without --at-checkpoint, another --out"
        )

"""RunSpec: everything a run can be asked for, checked when it is made.

The fields are the options of ``hydra-pipe run``. ``spec_file.py`` reads them from TOML.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...storage.errors import SpecError
from ..vocabulary import SAMPLES
from .groups import CurvatureSpec, ExecutionSpec, OutputSpec, QuestionSpec, TrainingSpec
from .setting import Decides, names, setting_of
from .spec_file import read_spec_file


@dataclass(frozen=True, kw_only=True)
class RunSpec(OutputSpec, ExecutionSpec, CurvatureSpec, QuestionSpec, TrainingSpec):
    """What to run, and where. Immutable; ``dataclasses.replace`` makes a changed, checked copy.

    A specification is each of its groups, by inheritance: its fields stay flat for whoever makes one,
    reads one or replaces a field, and a function that needs a part takes that group's type and is handed
    the whole. Each field is declared once, in ``groups.py``, with its check and with what it decides.
    (Bases from the last to the first: that puts fields and checks in the order of the groups.)

    Raises:
        SpecError: A field is wrong; the message has its value, the limit and the remedy.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.project is not None and self.exact_rank:
            raise SpecError(
                f"project {self.project}: exact_rank carries whole gradients, and a run with project keeps none; leave one "
                "of them out"
            )
        for name in ("layers", "project", "store_dtype"):
            if self.at_checkpoint and getattr(self, name) is not None:
                raise SpecError(
                    f"{name} {getattr(self, name)!r}: with at_checkpoint no hypergradients are made; leave it out"
                )

    @property
    def kept_dtype(self) -> str:
        """What a number of a stored hypergradient is."""
        return self.store_dtype or self.dtype

    @property
    def narrow_dtype(self) -> str | None:
        """The same where it is not ``dtype``; else None."""
        return None if self.kept_dtype == self.dtype else self.kept_dtype

    @property
    def precision(self) -> str | None:
        """What is kept of float32 in stored hypergradients, see ``storage.precision``; None: all."""
        return None if self.store_dtype in (None, "float32") else self.store_dtype

    @property
    def row_dtype(self) -> str:
        """What rows of hypergradients are written and read as."""
        return self.dtype if self.store_dtype is None else "float32"

    @property
    def base_method(self) -> str:
        """Name of the stores of this form and these targets, before any correction by ``exact_rank``."""
        return self.form if self.targets == SAMPLES else f"{self.form}-{self.targets}"

    @property
    def method(self) -> str:
        """Name of the results in the run directory: ``method=`` of the Hive partitions."""
        return f"{self.base_method}-rank{self.exact_rank}" if self.exact_rank else self.base_method

    @property
    def averaged(self) -> str:
        """Name of the average over ``seeds`` trainings; `method` where there is one."""
        return averaged(self.method, self.seeds) if self.seeds > 1 else self.method

    def identity(self) -> dict[str, Any]:
        """Return the fields that decide the numbers of a run, JSON-able, by name.

        Where the work is done, how often it is retried, the methods computed from one record
        (``mode``, ``hessian``, ``targets``, ``exact_rank``) and how many more records there are (``seeds``)
        are not among them: each field says in its declaration whether it is.
        """
        identity = {}
        for entry in fields(self):
            setting, value = setting_of(entry), getattr(self, entry.name)
            if setting.decides is not Decides.RUN or (setting.unless_default and value == entry.default):
                continue
            identity[entry.name] = _plain(
                entry.name, value if setting.stored is None else setting.stored(self)
            )
        return identity

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """Compare with an identity read back from a run; return one line a field that differs.

        Args:
            stored: What :meth:`identity` returned for the stored run, after JSON.
        """
        asked = self.identity()
        if is_open(stored):
            asked = {name: value for name, value in asked.items() if name in stored}
            stored = {name: stored[name] for name in asked}
        # What an older version counted among what decides numbers, and is none of it.
        free = names(type(self), Decides.NOTHING)
        both = [*asked, *(name for name in stored if name not in asked and name not in free)]
        return [
            f"{name}: stored {_short(stored, name)}, asked {_short(asked, name)}"
            for name in both
            if name not in stored or name not in asked or stored[name] != asked[name]
        ]

    @classmethod
    def from_toml(cls, path: str, **overrides: Any) -> RunSpec:
        """Read a spec from a TOML file; see :func:`load_toml`.

        Args:
            path: The file.
            overrides: Fields that win over the file; ``recipe_args`` is merged key by key.
        """
        values = load_toml(path)
        if "recipe_args" in values and "recipe_args" in overrides:
            overrides["recipe_args"] = {**values["recipe_args"], **overrides["recipe_args"]}
        return cls(**{**values, **overrides})


_OPEN = "open"


def first_identity(**known: object) -> dict[str, object]:
    """Return the identity of a run that no specification made: what is ``known``; the first command says the rest."""
    return {_OPEN: True, **known}


def is_open(identity: Mapping[str, object]) -> bool:
    """Whether the first command that goes on with a run says what else decides its numbers."""
    return bool(identity.get(_OPEN))


def averaged(method: str, seeds: int) -> str:
    """Return the name of the average of a method over ``seeds`` trainings."""
    return f"{method}-seeds{seeds}"


def load_toml(path: str) -> dict[str, Any]:
    """Read the keyword arguments of :class:`RunSpec` from a TOML file.

    Keys are the options of ``hydra-pipe run``, with ``-`` or ``_``; the table ``[set]`` holds the
    recipe's constructor arguments.

    Raises:
        SpecError: The file is missing or no TOML, or a key is unknown.
    """
    return read_spec_file(path, names(RunSpec))


def _plain(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise SpecError(
            f"{name} {value!r}: cannot be stored in run.json ({error}); use plain values"
        ) from None


def _short(values: Mapping[str, Any], name: str) -> str:
    if name not in values:
        return "nothing"
    text = json.dumps(values[name])
    return text if len(text) <= 60 else f"{text[:40]}... ({len(text)} characters)"

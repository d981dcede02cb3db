"""What a method depends on beyond the run's identity: how its curvature is estimated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...storage.errors import CorruptStore
from .groups import CurvatureSpec
from .setting import names

_PREFIX = "curvature_"


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvatureOptions:
    """The options of EKFAC's curvature; all None where the form of the Hessian has none.

    Fields are in the order of ``options`` in ``run.json``, and called there as in `CurvatureSpec` without
    ``curvature_``.

    Attributes:
        at: Steps whose nearest checkpoints it is taken at; None: spread evenly.
        checkpoints: Checkpoints of the record it is taken at.
        samples: At most how many training samples it is averaged over.
        core: Leading coordinates that keep their full curvature.
    """

    at: tuple[int, ...] | None = None
    checkpoints: int | None = None
    samples: int | None = None
    core: int | None = None

    @classmethod
    def asked_by(cls, spec: CurvatureSpec) -> CurvatureOptions:
        """Return the options that a specification comes to."""
        if spec.hessian != "ekfac":
            return cls()
        return cls(**{entry.name: getattr(spec, _PREFIX + entry.name) for entry in fields(cls)})

    @classmethod
    def from_json(cls, document: object, *, method: str) -> CurvatureOptions:
        """Return the options that ``run.json`` holds.

        Args:
            document: What :meth:`to_json` returned.
            method: Whose they are, for messages.

        Raises:
            CorruptStore: It is no mapping, a key is unknown, or a value is of another type.
        """
        if not isinstance(document, Mapping):
            raise CorruptStore(
                f"run.json: options {document!r} of method {method} are no JSON object; restore run.json"
            )
        known = [entry.name for entry in fields(cls)]
        for name, value in document.items():
            if name not in known or not _whole(value if name == "at" else [value]):
                raise CorruptStore(
                    f"run.json: option {name} {value!r} of method {method} is none of "
                    f"{', '.join(known)} with whole numbers; restore run.json"
                )
        values: dict[str, Any] = {**document}
        if "at" in values:
            values["at"] = tuple(values["at"])
        return cls(**values)

    def to_json(self) -> dict[str, int | list[int]]:
        """Return what ``run.json`` holds, and the keyword arguments of the estimate: what is not None."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            name: list(value) if name == "at" else value
            for name, value in values.items()
            if value is not None
        }

    def as_fields(self) -> dict[str, int | tuple[int, ...]]:
        """Return the fields of a `CurvatureSpec` that ask for these options."""
        values = {_PREFIX + entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


CURVATURE_FIELDS = tuple(
    name
    for name in names(CurvatureSpec)
    if name in {_PREFIX + entry.name for entry in fields(CurvatureOptions)}
)
"""Fields of `CurvatureSpec` that these options come from."""


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

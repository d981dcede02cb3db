"""What a method depends on beyond the run's identity: how its curvature is estimated, or mixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from ...storage.errors import CorruptStore
from .groups import CurvatureSpec
from .setting import names

_PREFIX = "curvature_"

_OPTIONS: Mapping[str, tuple[str, ...]] = {
    "ekfac": ("at", "checkpoints", "samples", "core", "flat"),
    "mixed": ("share",),
}
"""Options by form of the Hessian."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CurvatureOptions:
    """The options of a form of the Hessian: EKFAC's curvature, a mixture's share; None where it has none.

    Fields are in the order of ``options`` in ``run.json``, and called there as in `CurvatureSpec` without
    ``curvature_``.

    Attributes:
        at: Steps whose nearest checkpoints it is taken at; None: spread evenly.
        checkpoints: Checkpoints of the record it is taken at.
        samples: At most how many training samples it is averaged over.
        core: Leading coordinates that keep their full curvature.
        share: Share of the Hessian in a mixture.
        flat: Eigenvalues that change no coefficient by more than this share are 0.
    """

    at: tuple[int, ...] | None = None
    checkpoints: int | None = None
    samples: int | None = None
    core: int | None = None
    share: float | None = None
    flat: float | None = None

    @classmethod
    def asked_by(cls, spec: CurvatureSpec) -> CurvatureOptions:
        """Return the options that a specification comes to."""
        own = _OPTIONS.get(spec.hessian, ())
        return cls(**{name: getattr(spec, _PREFIX + name) for name in own})

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
            fits = _fits(name, value)
            if name not in known or not fits:
                raise CorruptStore(
                    f"run.json: option {name} {value!r} of method {method} is none of "
                    f"{', '.join(known)} with whole numbers, or shares; restore run.json"
                )
        values: dict[str, Any] = {**document}
        if "at" in values:
            values["at"] = tuple(values["at"])
        if "core" in values:  # before there was such an option, all eigenvalues were kept
            values.setdefault("flat", 0.0)
        return cls(**values)

    def to_json(self) -> dict[str, float | list[int]]:
        """Return what ``run.json`` holds, and the keyword arguments of the estimate: what is not None."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {
            name: list(value) if name == "at" else value
            for name, value in values.items()
            if value is not None
        }

    def as_fields(self) -> dict[str, float | tuple[int, ...]]:
        """Return the fields of a `CurvatureSpec` that ask for these options."""
        values = {_PREFIX + entry.name: getattr(self, entry.name) for entry in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


CURVATURE_FIELDS = tuple(
    name
    for name in names(CurvatureSpec)
    if name in {_PREFIX + entry.name for entry in fields(CurvatureOptions)}
)
"""Fields of `CurvatureSpec` that these options come from."""


def _fits(name: str, value: object) -> bool:
    if name == "share":
        return type(value) is float and 0 < value < 1
    if name == "flat":
        return type(value) is float and 0 <= value <= 1
    return _whole(value if name == "at" else [value])


def _whole(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)

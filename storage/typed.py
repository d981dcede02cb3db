"""Dataclasses to JSON and back, checked: a wrong type in a stored document is named by field.

Absent and null are the same, and stand for a field's default; a field that is None is not written, unless it is a `null_field`.
Keys that a class does not know are of a later version: they are left alone, and kept where the class
has a field for them (`rest_field`).
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, Union

from .errors import CorruptStore

_REST = "rest"
_NULL = "null"
_MOST = 2**63
"""No count, size or seed is beyond 64 bits; Python would read on."""

T = TypeVar("T")


def rest_field() -> Any:
    """Return a field (of type ``Mapping[str, Any]``) for all keys that the class has no field for."""
    return dataclasses.field(default_factory=dict, metadata={_REST: True})


def null_field() -> Any:
    """Return a field that is None by default and is then written as null, for readers that look it up."""
    return dataclasses.field(default=None, metadata={_NULL: True})


def to_json(value: Any) -> Any:
    """Return a dataclass as a mapping, and what it holds likewise."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        if isinstance(value, Mapping):
            return {key: to_json(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [to_json(item) for item in value]
        return value
    found: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if field.metadata.get(_REST):
            found = {**item, **found}
        elif item is not None or field.metadata.get(_NULL):
            found[field.name] = to_json(item)
    return found


def from_json(kind: type[T], data: Any, where: str) -> T:
    """Return a dataclass built from what `to_json` returned, after JSON.

    Args:
        kind: The dataclass.
        data: The mapping.
        where: Address of the document, for messages.

    Raises:
        CorruptStore: A value has not the type of its field; names document, field, value and type.
    """
    return typing.cast(T, _Reader(where).read(kind, data, ""))


@functools.cache
def _fields(kind: Any) -> tuple[tuple[str, Any, bool, bool], ...]:
    """Return (name, type, whether it is the rest, whether it must be there) of each field."""
    hints = typing.get_type_hints(kind)
    return tuple(
        (
            field.name,
            hints[field.name],
            bool(field.metadata.get(_REST)),
            field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING,
        )
        for field in dataclasses.fields(kind)
    )


@functools.cache
def _generic(kind: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return origin and arguments of a type."""
    return typing.get_origin(kind), typing.get_args(kind)


@dataclasses.dataclass(frozen=True, slots=True)
class _Reader:
    """Builds values; ``place`` is the field on the way, such as ``methods.hydra.shards``."""

    where: str

    def read(self, kind: Any, data: Any, place: str) -> Any:
        """Return a value of a type."""
        if type(data) is int and kind in (int, float) and not -_MOST <= data < _MOST:
            return self._wrong(data, place, "a number of 64 bits")
        if type(data) is kind:  # most values: texts and numbers
            return data
        if kind is Any or kind is object:
            return data
        if dataclasses.is_dataclass(kind):
            return self._dataclass(kind, data, place)
        origin, arguments = _generic(kind)
        if origin is Literal:
            return data if data in arguments else self._wrong(data, place, " or ".join(map(repr, arguments)))
        if origin in (Union, types.UnionType):
            return self._union(kind, arguments, data, place)
        if isinstance(origin, type) and issubclass(origin, Mapping):
            if not isinstance(data, Mapping):
                return self._wrong(data, place, "a mapping")
            return {key: self.read(arguments[1], item, f"{place}.{key}") for key, item in data.items()}
        if isinstance(origin, type) and issubclass(origin, Sequence):
            return self._sequence(origin, arguments, data, place)
        if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
            return float(data)
        if isinstance(data, kind) and (kind is bool or not isinstance(data, bool)):
            return data
        return self._wrong(data, place, kind.__name__)

    def _dataclass(self, kind: Any, data: Any, place: str) -> Any:
        if not isinstance(data, Mapping):
            return self._wrong(data, place, "a mapping")
        fields = _fields(kind)
        found: dict[str, Any] = {}
        for name, of, rest, needed in fields:
            inside = f"{place}.{name}" if place else name
            if rest:
                known = {other for other, _, of_rest, _ in fields if not of_rest}
                found[name] = {key: item for key, item in data.items() if key not in known}
            elif data.get(name) is not None:
                found[name] = self.read(of, data[name], inside)
            elif needed:
                self._wrong(None, inside, "there")
        return kind(**found)

    def _union(self, kind: Any, arguments: Sequence[Any], data: Any, place: str) -> Any:
        if data is None and type(None) in arguments:
            return None
        some = [one for one in arguments if one is not type(None)]
        if len(some) == 1:
            return self.read(some[0], data, place)
        for one in some:
            try:
                return self.read(one, data, place)
            except CorruptStore:
                continue
        return self._wrong(data, place, str(kind))

    def _sequence(self, origin: Any, arguments: Sequence[Any], data: Any, place: str) -> Any:
        if not isinstance(data, list | tuple):
            return self._wrong(data, place, "a list")
        of = arguments[0]
        items = [self.read(of, item, f"{place}[{k}]") for k, item in enumerate(data)]
        return tuple(items) if issubclass(origin, tuple) else items

    def _wrong(self, data: Any, place: str, kind: str) -> Any:
        shown = repr(data)
        raise CorruptStore(
            f"{self.where}: {place or 'the document'} is {shown[:60]}{'…' if len(shown) > 60 else ''} and must be "
            f"{kind}; restore the file, or remove it and run the stage again"
        )

"""Batches of a type of their own: mappings such as ``BatchEncoding``, dataclasses, namespaces.

Whatever walks a batch (moving it to a device, taking rows out of it, ``torch.func``) does so with
torch's pytrees, which know dict, list, tuple and NamedTuple alone. Other types are registered there
the first time one comes by, so that a recipe's losses get the type that its ``collate`` made.
"""

from __future__ import annotations

import copy
import threading
from collections import UserDict
from collections.abc import Callable, Iterable, MutableMapping
from dataclasses import fields, is_dataclass
from types import SimpleNamespace
from typing import Any

from torch import Tensor
from torch.utils._pytree import SUPPORTED_NODES, is_namedtuple_class, register_pytree_node, tree_flatten

Open = Callable[[Any], "tuple[list[Any], Shell]"]
Close = Callable[[Iterable[Any], "Shell"], Any]

_LOCK = threading.Lock()


class Shell:
    """A batch whose contents are to be replaced. Two are equal where type and names are."""

    def __init__(self, batch: Any, names: Iterable[Any]) -> None:
        self.batch, self.names = batch, tuple(names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Shell) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[type, tuple[Any, ...]]:
        return type(self.batch), self.names


def leaves(batch: Any) -> list[Any]:
    """Return what a batch holds, in order, after making its types known."""
    know(batch)
    return tree_flatten(batch)[0]


def know(value: Any) -> None:
    """Register the types of a batch, at any depth, that torch's pytrees do not know."""
    kind = type(value)
    if kind not in SUPPORTED_NODES and not is_namedtuple_class(kind):
        ways = _ways(value)
        if ways is None:  # a leaf
            return
        with _LOCK:
            if kind not in SUPPORTED_NODES:
                register_pytree_node(kind, *ways)
    inside = value if is_namedtuple_class(kind) else SUPPORTED_NODES[kind].flatten_fn(value)[0]
    for inner in inside:
        know(inner)


def _ways(value: Any) -> tuple[Open, Close] | None:
    """Return how a batch of this type is taken apart and put together; None for a leaf."""
    if isinstance(value, (Tensor, type)):
        return None
    if isinstance(value, MutableMapping):
        return _open_mapping, _close_mapping
    if is_dataclass(value):
        return _open_dataclass, _close_attributes
    if isinstance(value, SimpleNamespace):
        return _open_namespace, _close_attributes
    return None


def _open_mapping(value: MutableMapping[Any, Any]) -> tuple[list[Any], Shell]:
    return list(value.values()), Shell(value, value)


def _close_mapping(values: Iterable[Any], shell: Shell) -> Any:
    made, found = copy.copy(shell.batch), zip(shell.names, values, strict=True)
    if isinstance(made, UserDict):
        made.data = dict(found)  # past any __setitem__ of its own
    else:
        for name, value in found:
            made[name] = value
    return made


def _open_dataclass(value: Any) -> tuple[list[Any], Shell]:
    names = [field.name for field in fields(value) if hasattr(value, field.name)]
    return [getattr(value, name) for name in names], Shell(value, names)


def _open_namespace(value: Any) -> tuple[list[Any], Shell]:
    return list(vars(value).values()), Shell(value, vars(value))


def _close_attributes(values: Iterable[Any], shell: Shell) -> Any:
    made = copy.copy(shell.batch)
    for name, value in zip(shell.names, values, strict=True):
        object.__setattr__(made, name, value)  # a frozen one too: the copy is ours
    return made

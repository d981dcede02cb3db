"""Typed documents: the same after a round trip, wrong types named by field, later keys kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest
from hydra_pipe.storage.documents import dump, load
from hydra_pipe.storage.errors import CorruptStore
from hydra_pipe.storage.typed import from_json, null_field, rest_field, to_json


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    count: int
    share: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    name: str
    state: Literal["done", "open"] = "open"
    ok: bool | None = None
    parts: Mapping[str, Inner] = field(default_factory=dict)
    numbers: tuple[int, ...] = ()
    asked: int | str | None = None
    free: Mapping[str, Any] = field(default_factory=dict)
    shown: int | None = null_field()
    rest: Mapping[str, Any] = rest_field()


WHOLE = Outer(
    name="a",
    state="done",
    ok=False,
    parts={"x": Inner(count=3, share=0.5), "y": Inner(count=0)},
    numbers=(1, 2),
    asked="auto",
    free={"deep": [1, {"er": None}]},
    rest={"later": 1},
)


def test_a_round_trip_through_json_gives_the_same():
    assert from_json(Outer, load(dump(to_json(WHOLE)), "there"), "there") == WHOLE
    assert to_json(Inner(count=1)) == {"count": 1}
    assert to_json(Outer(name="a")) == {
        "name": "a",
        "state": "open",
        "parts": {},
        "numbers": [],
        "free": {},
        "shown": None,
    }


def test_absent_and_null_are_the_default():
    assert from_json(Outer, {"name": "a", "state": None, "parts": None}, "there") == Outer(name="a")


def test_whole_numbers_are_numbers_and_truth_is_not():
    assert from_json(Inner, {"count": 1, "share": 2}, "there").share == 2.0
    with pytest.raises(CorruptStore, match="count is True and must be int"):
        from_json(Inner, {"count": True}, "there")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", 3, "name is 3 and must be str"),
        ("state", "odd", "state is 'odd' and must be 'done' or 'open'"),
        ("ok", 1, "ok is 1 and must be bool"),
        ("parts", [1], r"parts is \[1\] and must be a mapping"),
        ("parts", {"x": {"count": "3"}}, "parts.x.count is '3' and must be int"),
        ("parts", {"x": {}}, "parts.x.count is None and must be there"),
        ("parts", {"x": {"count": 1, "share": "half"}}, "parts.x.share is 'half' and must be float"),
        ("numbers", 1, "numbers is 1 and must be a list"),
        ("numbers", [1, None], r"numbers\[1\] is None and must be int"),
        ("asked", [1], r"asked is \[1\] and must be int \| str"),
        ("free", "x" * 99, "free is '" + "x" * 59 + "… and must be a mapping"),
    ],
)
def test_a_wrong_type_is_named_by_document_and_field(key, value, message):
    with pytest.raises(CorruptStore, match=f"there/run.json: {message}") as caught:
        from_json(Outer, {"name": "a", key: value}, "there/run.json")
    assert "\n" not in str(caught.value)


def test_what_is_no_document_is_said():
    with pytest.raises(CorruptStore, match="the document is 3 and must be a mapping"):
        from_json(Outer, 3, "there")

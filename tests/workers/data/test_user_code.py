"""Whose mistake it is, in one line."""

from __future__ import annotations

import json

import pytest
import torch
from hydra_pipe.storage.errors import DoesNotFit, RecipeError
from hydra_pipe.workers.data.user_code import listed, raised, user_code


def user(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (KeyError("x"), "KeyError: 'x'"),
        (ValueError("a\nb"), "ValueError: a"),
        (ValueError(), "ValueError: no message"),
        (SystemExit(3), "SystemExit: sys.exit(3) was called"),
        (SystemExit(), "SystemExit: sys.exit() was called"),
        (SystemExit("no"), "SystemExit: sys.exit('no') was called"),
        (StopIteration(), "StopIteration: no message"),
    ],
)
def test_what_was_raised_and_where(error, told):
    assert raised(error) == told
    with pytest.raises(RecipeError) as caught, user_code("step 3 raised"):
        user(error)
    line = user.__code__.co_firstlineno + 1
    assert str(caught.value) == (
        f"step 3 raised {told} in user() ({__file__}, line {line}); correct the recipe (--debug shows where)"
    )
    assert caught.value.__cause__ is error


def test_the_line_is_the_recipes_where_a_library_raised():
    told = r"JSONDecodeError: .* in test_the_line_is_the_recipes"
    with pytest.raises(RecipeError, match=told) as caught, user_code("x"):
        json.loads("{")
    assert __file__ in str(caught.value)
    with pytest.raises(RecipeError, match=r"RuntimeError: .* in test_the_line"), user_code("x"):
        torch.ones(2) @ torch.ones(3)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), GeneratorExit(), DoesNotFit("large")])
def test_some_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, user_code("x", always=True):
        user(error)
    assert caught.value is error


def test_what_no_line_of_the_recipe_raised_passes_unless_asked():
    # Compiled under a name of hydra-pipe's own: as if one of its files had raised.
    place = user_code.__wrapped__.__code__.co_filename  # type: ignore[attr-defined]
    code = compile("def ours(cm):\n    with cm:\n        raise OSError('disk full')\n", place, "exec")
    space: dict = {}
    exec(code, space)  # noqa: S102
    with pytest.raises(OSError, match="disk full"):
        space["ours"](user_code("x"))
    with pytest.raises(RecipeError, match=r"^x OSError: disk full; correct the recipe"):
        space["ours"](user_code("x", always=True))


def test_lists_are_short():
    assert listed([1, 2]) == "1, 2"
    assert listed(list(range(9))) == "0, 1, 2, 3, 4, 5, 6, 7, …"

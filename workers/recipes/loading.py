"""From what the user typed to a recipe: a built-in name, ``module:Class`` or ``file.py:Class``.

The recipe is the user's code and runs with the user's rights. It is imported here because the user
named it in this call; nothing read from a stored run is ever passed to this module unasked.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ...storage.errors import HydraError, RecipeError
from . import BUILT_IN, names
from .importing import file_module, one_line, raised_where, searched_module, top_level_classes

if TYPE_CHECKING:
    from ..recipe import Recipe


def load_recipe(reference: str, arguments: Mapping[str, object]) -> Recipe:
    """Return the recipe that ``reference`` names, constructed with ``arguments`` as keywords.

    Args:
        reference: A built-in name (``digits``), ``module:Class`` (the module is looked for where
            Python looks, then in the working directory), or ``path/to/file.py:Class``. A recipe
            from a file or from the working directory is pickled by value, so that workers on
            machines without that file can run it.
        arguments: Keyword arguments of its constructor.

    Raises:
        RecipeError: There is no such thing, it is no recipe, or its constructor refuses the
            arguments; one line that says what to do.
    """
    recipe_class = _find_class(reference)
    _check_arguments(reference, recipe_class, arguments)
    try:
        return recipe_class(**arguments)
    except HydraError:
        raise
    except (Exception, SystemExit) as error:
        raise RecipeError(
            f"{reference} could not be constructed with {_shown(arguments)}: {type(error).__name__}: "
            f"{one_line(error)}{raised_where(error)}; {_accepted(recipe_class)}"
        ) from error


def _find_class(reference: str) -> type[Recipe]:
    if reference in BUILT_IN:
        place, _, class_name = BUILT_IN[reference].rpartition(":")
        return _recipe_class(reference, importlib.import_module(place), class_name)
    place, colon, class_name = reference.rpartition(":")
    if not colon:
        raise _no_such_recipe(reference)
    if not place or not class_name.isidentifier():
        raise RecipeError(
            f"recipe {reference!r} is not of the form module:Class or path/to/file.py:Class: correct it"
        )
    if place.endswith(".py") or os.sep in place:
        module = file_module(place, f"{place}:{class_name}")
    else:
        module = searched_module(place)
    return _recipe_class(reference, module, class_name)


def _no_such_recipe(reference: str) -> RecipeError:
    if reference.endswith(".py"):
        found = top_level_classes(Path(reference))
        hint = f"{reference}:{found[-1]}" if found else f"{reference}:Class"
        return RecipeError(f"recipe {reference!r} names a file but no class in it: say {hint}")
    near = difflib.get_close_matches(reference, names(), n=1)
    hint = f"did you mean {near[0]}?" if near else "or say module:Class or path/to/file.py:Class"
    return RecipeError(f"there is no built-in recipe {reference!r}, only {', '.join(names())}: {hint}")


def _recipe_class(reference: str, module: ModuleType, class_name: str) -> type[Recipe]:
    from ..recipe import Recipe  # here, since it needs torch

    recipes = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type)
        and issubclass(value, Recipe)
        and value.__module__ == module.__name__
        and value is not Recipe
    ]
    try:
        found = getattr(module, class_name)
    except AttributeError:
        near = difflib.get_close_matches(class_name, recipes, n=1) or recipes
        hint = f"did you mean {near[0]}?" if near else "define a subclass of hydra_pipe.Recipe there"
        raise RecipeError(f"recipe {reference!r}: its module has no class {class_name}: {hint}") from None
    if not isinstance(found, type) or not issubclass(found, Recipe) or found is Recipe:
        what = "is the base class itself" if found is Recipe else "is not a subclass of hydra_pipe.Recipe"
        more = f" and {len(recipes) - 8} more" if len(recipes) > 8 else ""
        hint = (
            f"the recipes there are {', '.join(recipes[:8])}{more}"
            if recipes
            else f"write class {'Mine' if found is Recipe else class_name}(Recipe) and name that"
        )
        raise RecipeError(f"recipe {reference!r}: {class_name} {what}: {hint}")
    return found


def _check_arguments(reference: str, recipe_class: type[Recipe], arguments: Mapping[str, object]) -> None:
    """Refuse what the constructor's signature does, naming the nearest accepted argument."""
    try:
        signature = inspect.signature(recipe_class)
        signature.bind(**arguments)
    except TypeError as error:
        problem = one_line(error)
    except ValueError:  # a constructor in C: no signature to check
        return
    else:
        accepted, open_ended = _parameters(recipe_class)
        unknown = [] if open_ended else [name for name in arguments if name not in accepted]
        if not unknown:
            return
        problem = f"got an unexpected keyword argument {unknown[0]!r}"
    wrong = [name for name in arguments if name not in _parameters(recipe_class)[0]]
    near = difflib.get_close_matches(wrong[0], _parameters(recipe_class)[0], n=1) if wrong else []
    hint = f"did you mean {near[0]}? " if near else ""
    raise RecipeError(
        f"{reference} {problem}: {hint}{_accepted(recipe_class)}; give them with --set KEY=VALUE"
    )


def _parameters(recipe_class: type[Recipe]) -> tuple[list[str], bool]:
    """Return the keyword arguments of the constructor and whether it takes others too.

    A constructor with ``**kwargs`` is taken to hand them to the next one in the class's order.
    """
    accepted: list[str] = []
    for constructor in _constructors(recipe_class):
        parameters = list(inspect.signature(constructor).parameters.values())[1:]
        keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        accepted += [p.name for p in parameters if p.kind in keyword and p.name not in accepted]
        if not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
            return accepted, False
    # No constructor at all takes nothing; one with **kwargs and none behind it takes anything.
    return accepted, next(_constructors(recipe_class), None) is not None


def _constructors(recipe_class: type[Recipe]) -> Iterator[Any]:
    return (kind.__dict__["__init__"] for kind in recipe_class.__mro__[:-1] if "__init__" in kind.__dict__)


def _accepted(recipe_class: type[Recipe]) -> str:
    accepted, open_ended = _parameters(recipe_class)
    if not accepted:
        return "it accepts any argument" if open_ended else "it accepts no arguments"
    return f"it accepts {', '.join(accepted)}"


def _shown(arguments: Mapping[str, object]) -> str:
    text = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    return text or "no arguments"

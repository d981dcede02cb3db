"""Where a training starts: the weights, buffers and optimiser state that a recipe gives, or a file.

Every process that trains loads them the same way, right after the recipe has built its model and its
optimiser; nothing is guessed. Weights must name each tensor of the model's ``state_dict()`` and no other.
The state of an optimiser goes to parameters by name: torch's own ``state_dict()`` numbers them by their place
in the parameter groups, so it is taken through the names that it notes (``param_names``), or through the
groups of the recipe's optimiser where these have the same sizes.
"""

from __future__ import annotations

import hashlib
import io
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...storage.errors import InputError, RecipeError
from ...storage.files import read_bytes
from ..data.user_code import user_code
from ..determinism import preserved_generators, seed_everything
from ..recipe import InitialState, Recipe
from ..recursion.families import family_of

SAFETENSORS = ".safetensors"
"""Ending of a file that the package safetensors reads; other files are PyTorch's."""

COUNT = "step"
"""The entry that counts steps: one number, the others have the parameter's shape."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StateFile:
    """An ``initial_state`` that is read from a file; picklable.

    Attributes:
        uri: Where it is, as seen from every machine that trains.
        sha256: What it must be.
    """

    uri: str
    sha256: str

    def __call__(self) -> InitialState:
        """Return the weights in the file.

        Raises:
            InputError: It is not there, is another one, or holds no weights.
        """
        try:
            data = read_bytes(self.uri, most=1 << 42)
        except OSError as error:
            raise InputError(
                f"initial state {self.uri}: {error.strerror or error}; every machine that trains must see it there"
            ) from error
        found = hashlib.sha256(data).hexdigest()
        if found != self.sha256:
            raise InputError(
                f"initial state {self.uri} has sha256 {found[:16]}… and the run began with {self.sha256[:16]}…; "
                "bring that file back, or make a run of its own: another --out"
            )
        return InitialState(weights=read_weights(data, self.uri))


def read_weights(data: bytes, uri: str) -> dict[str, Tensor]:
    """Return the tensors of a ``.safetensors`` or ``.pt`` file by name; no code in it is run.

    Raises:
        InputError: It is damaged, holds something else, or safetensors is not installed.
    """
    if uri.endswith(SAFETENSORS):
        try:
            from safetensors.torch import load
        except ImportError as error:
            raise InputError(
                f"initial state {uri}: reading it needs a package that is missing here; pip install 'hydra-pipe[safetensors]'"
            ) from error
        read: Callable[[], Any] = lambda: load(data)
    else:
        read = lambda: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    try:
        found = read()
    except pickle.UnpicklingError as error:
        raise InputError(
            f"initial state {uri} holds more than tensors, which is not loaded (weights_only=True); save a plain "
            "model.state_dict()"
        ) from error
    except Exception as error:  # damaged files raise whatever their parser stumbles over
        what = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"initial state {uri} cannot be read ({what[:120]}); save it again with torch.save(model.state_dict(), …) "
            "or safetensors.torch.save_file"
        ) from error
    return _tensors(found, f"initial state {uri}")


def _tensors(found: Any, what: str) -> dict[str, Tensor]:
    if not isinstance(found, Mapping):
        raise InputError(
            f"{what} holds a {type(found).__name__} and no tensors by name; save model.state_dict()"
        )
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(
                f"{what}: entry {name!r} is a {type(value).__name__} and no tensor; save the state_dict() of the model "
                "alone, or return it from initial_state()"
            )
    return dict(found)


def initial_state(recipe: Recipe) -> InitialState | None:
    """Return what a recipe starts from, checked for its form; None: freshly initialised weights.

    The generators are left as they were, so that what is built afterwards is the same with and without.

    Raises:
        RecipeError: ``initial_state()`` raised, or returned something else.
    """
    with (
        preserved_generators(),
        user_code(f"{recipe.name}.initial_state() failed:", always=True),
    ):
        seed_everything(recipe.seed)
        found = recipe.initial_state()
    if found is None:
        return None
    weights = getattr(found, "weights", None)
    if not isinstance(weights, Mapping):
        raise RecipeError(
            f"initial_state() returned {type(found).__name__} and must return None or "
            "InitialState(weights=state_dict, optimizer=state_dict or None)"
        )
    return InitialState(
        weights=_tensors(weights, "initial_state().weights"), optimizer=getattr(found, "optimizer", None)
    )


def leaves_of_state(recipe: Recipe) -> list[tuple[str, Tensor]]:
    """Return the tensors of what a recipe's own ``initial_state`` gives, by name; a file has its digest instead."""
    if isinstance(recipe.initial_state, StateFile):
        return []
    state = initial_state(recipe)
    if state is None:
        return []
    moments: Any = state.optimizer or {}
    return [*_leaves("weights", state.weights), *_leaves("optimizer", moments.get("state", moments))]


def _leaves(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Mapping):
        for key in value:
            yield from _leaves(f"{name}/{key}", value[key])
    elif value is not None:
        yield name, torch.as_tensor(value)


def source_of_state(recipe: Recipe) -> str:
    """Return how messages call a recipe's initial state."""
    given = recipe.initial_state
    return f"initial state {given.uri}" if isinstance(given, StateFile) else "initial_state()"


@torch.no_grad()
def load_weights(recipe: Recipe, model: nn.Module, state: InitialState | None) -> None:
    """Put the initial weights and buffers into a model that the recipe has just built.

    Args:
        recipe: The recipe.
        model: Its model, cast to the run's dtype.
        state: What `initial_state` returned.

    Raises:
        InputError: A tensor is missing, superfluous, of another shape, or of a dtype that would be rounded.
    """
    if state is None:
        return
    what, given, own = source_of_state(recipe), dict(state.weights), _own_tensors(model)
    missing = [name for name, tied in own.items() if not any(other in given for other in tied.names)]
    foreign = [name for name in given if name not in own]
    if missing or foreign:
        raise InputError(
            f"{what}: {_some(missing, 'missing', len(own))}; {_some(foreign, 'not the model’s', len(given))}; "
            "give the state_dict() of the model that model() builds, its names unchanged"
        )
    tensors = {name: own[name].tensor for name in given}
    _fit(what, given, tensors)
    for name, value in given.items():
        tensors[name].copy_(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Own:
    """A tensor of the model, and all names that it has there."""

    tensor: Tensor
    names: tuple[str, ...]


def _own_tensors(model: nn.Module) -> dict[str, _Own]:
    """Return what the model's ``state_dict()`` holds; of tied tensors one name is enough in a file."""
    found = {
        name: value for name, value in model.state_dict(keep_vars=True).items() if isinstance(value, Tensor)
    }
    names: dict[int, tuple[str, ...]] = {}
    for name, value in found.items():
        names[id(value)] = (*names.get(id(value), ()), name)
    return {name: _Own(tensor=value, names=names[id(value)]) for name, value in found.items()}


def _fit(what: str, given: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """Refuse tensors of another shape, of a dtype that would be rounded, and numbers that are none."""
    shapes = [name for name in given if given[name].shape != own[name].shape]
    if shapes:
        name = shapes[0]
        raise InputError(
            f"{what}: {_tensors_of(shapes)} another shape, first {name!r} with {tuple(given[name].shape)} where the model "
            f"has {tuple(own[name].shape)}; give the weights of this model"
        )
    dtypes = [name for name in given if not _keeps(given[name].dtype, own[name].dtype)]
    if dtypes:
        name = dtypes[0]
        raise InputError(
            f"{what}: {_tensors_of(dtypes)} another dtype, first {name!r} with {given[name].dtype} where the model has "
            f"{own[name].dtype}; convert it, or use a --dtype that holds it"
        )
    bad = [
        name
        for name, value in own.items()
        if value.requires_grad and not bool(torch.isfinite(given[name]).all())
    ]
    if bad:
        raise InputError(
            f"{what}: {_tensors_of(bad)} numbers that are not finite, first {bad[0]!r}; give weights of a training that held"
        )


def _keeps(given: torch.dtype, own: torch.dtype) -> bool:
    """Whether every number of one dtype is one of the other: float32 in float64, and nothing across kinds."""
    if not (given.is_floating_point and own.is_floating_point):
        return given == own
    return torch.promote_types(given, own) == own


def load_optimizer(
    recipe: Recipe, model: nn.Module, optimizer: torch.optim.Optimizer, state: InitialState | None
) -> None:
    """Put the initial state into an optimiser that the recipe has just built: moments, not settings.

    Raises:
        InputError: It is not of this optimiser, or not of these parameters.
    """
    given = None if state is None else state.optimizer
    if given is None:
        return
    what = "initial_state().optimizer"
    if not isinstance(given, Mapping):
        raise InputError(
            f"{what} is a {type(given).__name__}; give the optimizer's state_dict(), or a mapping from parameter names "
            "to what it keeps of each"
        )
    names = {id(p): name for name, p in model.named_parameters()}
    held = {names[id(p)]: p for group in optimizer.param_groups for p in group["params"] if id(p) in names}
    states = _by_name(what, given, optimizer, names)
    foreign = [name for name in states if name not in held]
    if foreign:
        raise InputError(
            f"{what}: {_some(foreign, 'not held by the optimizer', len(states))}; leave them out"
        )
    kind, family = type(optimizer).__name__, family_of(optimizer)
    keys = {*family.vectors, *([COUNT] if family.counts else [])}
    for name, entry in states.items():
        if set(entry) != keys:
            raise InputError(
                f"{what}: of parameter {name!r} it has {', '.join(sorted(entry))} and {kind} keeps {', '.join(sorted(keys))}; "
                "give the state of the same optimiser"
            )
    for key in sorted(keys - {COUNT}):
        _fit(
            f"{what}, {key}",
            {name: entry[key] for name, entry in states.items()},
            {n: held[n] for n in states},
        )
    for group in optimizer.param_groups:
        for p in group["params"]:
            for key, value in states.get(names.get(id(p), ""), {}).items():
                optimizer.state[p][key] = (
                    _count(value, p, group) if key == COUNT else value.detach().clone().to(p)
                )


def _by_name(
    what: str, given: Mapping[str, Any], optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> dict[str, dict[str, Tensor]]:
    """Return what is kept of each parameter, by its name; parameters of which nothing is kept are left out."""
    found: Mapping[Any, Any] = given
    if "param_groups" in given and "state" in given:
        numbered = [list(group["params"]) for group in given["param_groups"]]
        listed = [group.get("param_names") for group in given["param_groups"]]
        if any(one is None for one in listed):
            listed = [
                [names.get(id(p), f"#{k}") for k, p in enumerate(g["params"])] for g in optimizer.param_groups
            ]
        if [len(group) for group in numbered] != [len(group) for group in listed]:
            sizes = ["+".join(str(len(group)) for group in groups) for groups in (numbered, listed)]
            raise InputError(
                f"{what}: its groups have {sizes[0]} parameters and the recipe's optimizer {sizes[1]}, so that their order says "
                "nothing; give a mapping from parameter names to what it keeps of each"
            )
        name_of = {
            k: name
            for group, own in zip(numbered, listed, strict=True)
            for k, name in zip(group, own, strict=True)
        }
        found = {name_of.get(k, k): entry for k, entry in given["state"].items()}
    kept: dict[str, dict[str, Tensor]] = {}
    for name, entry in found.items():
        if not isinstance(entry, Mapping):
            raise InputError(
                f"{what}: of {name!r} it has a {type(entry).__name__} and no mapping; give what the optimizer keeps of each "
                "parameter, by its name"
            )
        some = {key: torch.as_tensor(value) for key, value in entry.items() if value is not None}
        if some:
            kept[str(name)] = some
    return kept


def _count(value: Tensor, parameter: Tensor, group: Mapping[str, Any]) -> Tensor:
    """Return a number of steps as Adam keeps it: where the parameter is for fused steps, else on the host."""
    there = parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")
    return value.detach().clone().to(device=there, dtype=torch.float32).reshape(())


def _some(names: Sequence[str], are: str, total: int) -> str:
    """Return how many of so many names are what, and the first of them."""
    first = f", first {names[0]!r}" if names else ""
    return f"{len(names)} of {total} tensors are {are}{first}"


def _tensors_of(names: Sequence[str]) -> str:
    return f"{len(names)} tensor{'s have' if len(names) > 1 else ' has'}"

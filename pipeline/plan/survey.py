"""What the driver must know of a recipe before anything runs: counts, labels, sizes, and one trial.

Building the model and datasets once in the driver finds every mistake a recipe can have before a
single worker starts.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ...storage import layout
from ...storage.errors import RecipeError, SpecMismatch
from ...storage.rundir import RunDirectory
from ...workers.data.labels import ClassLabels, class_labels, label_notes
from ...workers.data.user_code import user_code
from ...workers.determinism import compiled_parts, preserved_generators, run_uncompiled, seed_everything
from ...workers.hessian.tiles import activation_bytes
from ...workers.memory import peak_bytes, reset_peak
from ...workers.model.autocast import noticed
from ...workers.model.row_map import RowMap
from ...workers.persample.engine import PerSampleGradients
from ...workers.persample.ways import Ways
from ...workers.recipe import Recipe
from ...workers.replay.fast import factored_shapes, numbers_per_row
from ...workers.replay.sampled import TARGETS, evenly
from ...workers.training.initial import StateFile
from ...workers.training.last_batch import check_last_batch
from ...workers.training.made_of import FirstSteps, data_of, first_steps, made_of, with_first_steps
from ...workers.training.metrics import OutputWatch, why_unpredicted
from ...workers.training.recipe_names import unknown_names
from ...workers.training.recorded import LoopRecord, loop_record, recorded_recipe
from ...workers.training.training import Compute, Training
from ...workers.training.trials import tried_ways
from ...workers.training.validate import (
    check_dataset,
    check_layers,
    check_losses,
    check_numbers,
    check_overlap,
    check_scheduler,
)
from ..reading.unit_values import RecordValues, values_of
from ..spec.groups import TrainingSpec
from ..spec.selection import select
from ..spec.spec import RunSpec
from ..spec.state_file import sha256_of
from ..vocabulary import CARRIED, RECORD, TRAJECTORY

MOST_ENTRIES = 1 << 31
"""Places in all batches of a record: 8 GiB of indices."""

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class Survey:
    """A recipe, looked at: N training and M test samples, D parameters, T steps.

    Attributes:
        recipe: The recipe, with the spec's overrides applied.
        tracked: Train indices asked for, sorted.
        tested: Test indices asked for, sorted.
        train_labels: One per training sample, -1 where there are none.
        test_labels: One per test sample.
        conservation: Whether the conservation law holds for this recipe (not with BatchNorm
            statistics held constant).
        strategies: Per-sample strategy of each parameter name that has no layer rule.
        step_seconds: (plain, tracked) seconds of a step, tried here; None when not tried.
        row_numbers: Numbers that the replay's buffers hold per tracked sample (see ``buffers``).
        process_bytes: Peak resident set of a process that trains this recipe, without buffers.
        activation_bytes: What the batch's forward pass keeps for its backward pass; 0 where only
            products with the Hessian would need to know.
        warnings: What in the recipe is likely to be a mistake, one line each.
        notes: What the user should be told of the recipe, one line each.
        made_of: Digests of the recipe, its data and its first steps; see ``workers.training.made_of``.
        optimizer_vectors: Vectors like the weights that the optimiser keeps, as many as a tangent needs.
        moments: Whether derivatives of a step depend on where training is (Adam, clipping).
        autocast: The types that the losses compute in under ``torch.autocast``.
        row_map: What is kept of a row of D numbers, in stores and in buffers; None: all.
        epochs: E, epochs that are begun.
        outer: Shapes (O, I) of the weights whose visits may be kept as factors.
    """

    recipe: Recipe
    n_train: int
    n_test: int
    dimension: int
    steps: int
    tracked: Integers
    tested: Integers
    train_labels: Integers
    test_labels: Integers
    conservation: bool
    strategies: dict[str, str]
    step_seconds: tuple[float, float] | None
    row_numbers: int
    process_bytes: int
    activation_bytes: int = 0
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    made_of: dict[str, Any] = field(default_factory=dict)
    optimizer_vectors: int = 1
    moments: bool = False
    autocast: tuple[str, ...] = ()
    epochs: int = 1
    outer: tuple[tuple[int, ...], ...] = ()
    row_map: RowMap | None = None

    @property
    def columns(self) -> int:
        """Numbers of a stored row."""
        return self.dimension if self.row_map is None else self.row_map.columns

    @property
    def sampled_tests(self) -> Integers:
        """Test indices with which it is sampled what storing rows in fewer numbers or bits loses."""
        return self.tested[evenly(len(self.tested), TARGETS)]


def resolve_recipe(spec: TrainingSpec) -> Recipe:
    """Return the recipe instance with epochs, batch size and seed overridden by the spec.

    Raises:
        RecipeError: It cannot be loaded, or is no Recipe.
    """
    from ...workers.recipes.loading import load_recipe

    recipe = load_recipe(spec.recipe, spec.recipe_args) if isinstance(spec.recipe, str) else spec.recipe
    if not isinstance(recipe, Recipe):
        raise RecipeError(f"recipe {type(recipe).__name__} is not a hydra_pipe.Recipe; subclass it")
    recipe = copy.copy(recipe)  # an instance is the caller's: its attributes stay as they are
    if spec.epochs is not None and recipe.max_steps is not None:
        raise RecipeError(
            f"epochs {spec.epochs} was asked for, and recipe {recipe.name!r} has max_steps = {recipe.max_steps}, which stands in for "
            "epochs; change max_steps, or leave --epochs out"
        )
    for name in ("epochs", "batch_size", "seed"):
        value = getattr(spec, name)
        if value is not None:
            setattr(recipe, name, value)
    file = spec.init or spec.at_checkpoint
    if file is not None:  # in place of the recipe's own method, wherever the recipe goes
        vars(recipe)["initial_state"] = StateFile(uri=file, sha256=sha256_of(file))
    recipe._stop = spec.at
    if spec.at_checkpoint is not None:
        # Trained already: every process has the model as it is in the file, and no steps.
        recipe.epochs, recipe.max_steps = 0, None
    if isinstance(spec, RunSpec):
        loop = loop_of(RunDirectory(spec.out or f"runs/{recipe.name}"))
        if loop is not None:
            _check_loop(spec, recipe, loop)
            return recorded_recipe(recipe, loop)
    return recipe


def loop_of(directory: RunDirectory) -> LoopRecord | None:
    """Return what a loop of the user's own recorded in a run; None: there is nothing, or the record of a recipe.

    Raises:
        IncompleteStage: Such a record was not finished.
        CorruptStore: It is damaged.
    """
    record = directory.manifest(RECORD, TRAJECTORY) if directory.exists() else None
    if record is None or not values_of(RecordValues, record).loop:
        return None  # not asked of the trajectory itself: one of a recipe may be damaged, and is made again
    return loop_record(directory.path(layout.TRAJECTORY), directory.vouched)


def _check_loop(spec: RunSpec, recipe: Recipe, loop: LoopRecord) -> None:
    """Refuse what another training would be needed for.

    Raises:
        SpecMismatch: Names the option.
    """
    fixed = {
        "epochs": len(loop.schedule.epoch_ends),
        "batch_size": loop.schedule.batches.shape[1],
        "seed": loop.seed,
    }
    for name, value in fixed.items():
        asked = getattr(spec, name)
        if asked not in (None, value):
            raise SpecMismatch(
                f"{spec.out}: {name} is {asked}, and the loop that made this record had {value}; leave it out"
            )
    if spec.seeds > 1:
        raise SpecMismatch(
            f"{spec.out}: seeds is {spec.seeds}, and only its own loop can train again with another seed; leave it out, or record "
            "each seed in a run of its own"
        )


def compute_of(spec: RunSpec) -> Compute:
    """Return how every process of this run computes."""
    return Compute(
        device=spec.device,
        dtype=spec.dtype,
        threads=spec.torch_threads,
        batch_norm=spec.batch_norm,
        per_sample=spec.per_sample,
        graphs=spec.graphs,
    )


def survey(spec: RunSpec, *, trial: bool = True) -> Survey:
    """Build the recipe once, check all of it, and try a few steps.

    Args:
        spec: What to run.
        trial: Whether to time a few steps (on the driver's own device).

    Raises:
        RecipeError: See ``workers.training.validate``.
        SpecError: ``--track`` or ``--test`` selects what is not there.
    """
    reset_peak()
    recipe = resolve_recipe(spec)
    check_numbers(recipe, least_epochs=0 if spec.at_checkpoint else 1)
    run_uncompiled()
    with preserved_generators():
        return _survey(spec, recipe, trial)


def _survey(spec: RunSpec, recipe: Recipe, trial: bool) -> Survey:
    # Each as training builds it: a recipe may draw its data from the generators.
    seed_everything(recipe.seed)
    train = _call(recipe, "train_dataset")
    seed_everything(recipe.seed)
    test = _call(recipe, "test_dataset")
    n_train, n_test = check_dataset(train, "train"), check_dataset(test, "test")
    _check_batches(recipe, n_train)
    check_overlap(train, test)
    seed_everything(recipe.seed)
    model = _call(recipe, "model")
    check_layers(model)
    compiled = compiled_parts(model)
    dtype = compute_of(spec).torch_dtype
    watch = OutputWatch(model)
    check_losses(recipe, model, train, dtype)
    unpredicted = why_unpredicted(recipe, watch, min(3, n_train))
    watch.close()
    check_losses(recipe, model, test, dtype, "test")
    labels = {what: _labels(recipe, dataset, what) for what, dataset in (("training", train), ("test", test))}
    train_labels, test_labels = (labels[what].values for what in ("training", "test"))
    tracked = select(spec.track, total=n_train, labels=train_labels, seed=recipe.seed, what="--track")
    tested = select(spec.test, total=n_test, labels=test_labels, seed=recipe.seed, what="--test")
    seed_everything(recipe.seed)
    validation = _call(recipe, "validation_dataset")
    if validation is not None:
        check_dataset(validation, "validation")
        check_losses(recipe, model, validation, dtype, "validation")
    optimizer = _call(recipe, "optimizer", model)
    if isinstance(optimizer, torch.optim.Optimizer):  # else Training refuses it below
        check_scheduler(_call(recipe, "scheduler", optimizer))
    classes = {what: found.values for what, found in labels.items()}
    data = _data(recipe, {"training": train, "test": test, "validation": validation}, classes)
    del model, train, test, validation, optimizer
    # The driver may have no GPU where the workers have one; what it tries, it tries on what it has.
    device = "cpu" if spec.device == "cuda" and not torch.cuda.is_available() else spec.device
    compute = replace(compute_of(spec), device=device)
    with user_code("the first training step failed:", always=True):
        training = Training(recipe, compute)
        training.guarded = True
        # Here, since a layer that is not there should be said before anything is tried.
        row_map = RowMap.of(training.layout.entries, spec.layers, spec.project, recipe.seed)
        made = made_of(training, data)
        with noticed() as autocast:
            tried = _try_steps(training, row_map, trial=trial) if training.steps else _NO_STEPS
    return Survey(
        recipe=recipe,
        n_train=n_train,
        n_test=n_test,
        dimension=training.layout.dimension,
        steps=training.steps,
        tracked=tracked,
        tested=tested,
        train_labels=_array(train_labels, n_train),
        test_labels=_array(test_labels, n_test),
        conservation=tried.conservation,
        strategies=tried.strategies,
        step_seconds=tried.seconds,
        row_numbers=tried.row_numbers,
        process_bytes=peak_bytes(),
        made_of=with_first_steps(made, tried.first),
        notes=(*label_notes(labels, unpredicted), *_compiled_notes(compiled)),
        activation_bytes=activation_bytes(training) if spec.form in CARRIED or spec.exact_rank else 0,
        warnings=tuple(unknown_names(recipe)),
        optimizer_vectors=len(training.family.vectors),
        moments=training.family.scaled or training.max_norm is not None,
        autocast=tuple(sorted(autocast)),
        row_map=row_map,
        epochs=training.epochs,
        outer=tried.outer,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Tried:
    """What the first training steps showed; fields as of `Survey`."""

    first: FirstSteps
    conservation: bool
    strategies: dict[str, str]
    row_numbers: int
    seconds: tuple[float, float] | None
    outer: tuple[tuple[int, ...], ...] = ()


_NO_STEPS = _Tried(
    first=FirstSteps(settings={}, losses=[], seconds=[]),
    conservation=False,
    strategies={},
    row_numbers=0,
    seconds=None,
)


def _try_steps(training: Training, row_map: RowMap | None, *, trial: bool) -> _Tried:
    """Take the first steps, and see how per-sample gradients are had in them."""
    check_last_batch(training)
    ways = tried_ways(training)
    first = first_steps(training)
    entries = training.layout.entries
    return _Tried(
        first=first,
        conservation=not training.holds_statistics,
        strategies={e.name: s for e, s in zip(entries, ways.strategies, strict=True) if s in ("func", "vjp")},
        row_numbers=numbers_per_row(training, ways, row_map),
        outer=factored_shapes(training, ways, row_map),
        seconds=_time_steps(training, ways, first) if trial else None,
    )


def _compiled_notes(compiled: list[str]) -> list[str]:
    if not compiled:
        return []
    more = f" and {len(compiled) - 1} more" if len(compiled) > 1 else ""
    return [f"{compiled[0]}{more} is compiled: it is recorded and replayed as it is written, uncompiled"]


def _check_batches(recipe: Recipe, n_train: int) -> None:
    """Refuse a training whose batches alone no record could hold, before anything of that size is made."""
    size = int(recipe.batch_size)
    steps = recipe.max_steps or int(recipe.epochs) * -(-n_train // size)
    if steps * size > MOST_ENTRIES:
        raise RecipeError(
            f"recipe {recipe.name!r}: {steps:,} steps of batch_size {size:,} are {steps * size:,} places in batches to record, at "
            f"most {MOST_ENTRIES:,}; use a smaller batch size, or fewer epochs"
        )


def _call(recipe: Recipe, method: str, *arguments: Any) -> Any:
    with user_code(f"{recipe.name}.{method}() failed:", always=True):
        return getattr(recipe, method)(*arguments)


def _labels(recipe: Recipe, dataset: Any, what: str) -> ClassLabels:
    """Return the classes of a dataset, see ``workers.data.labels``, after explaining what goes wrong."""
    with user_code(f"{recipe.name}.labels() failed:", always=True):
        return class_labels(recipe, dataset, what)


def _data(recipe: Recipe, datasets: dict[str, Any], classes: dict[str, list[int] | None]) -> dict[str, Any]:
    """Return digests of the datasets, see ``workers.training.made_of``, after explaining what goes wrong."""
    names = " or ".join(name for name, held in datasets.items() if held is not None)
    with user_code(f"an item of the {names} set could not be read:", always=True):
        return data_of(recipe, datasets, classes)


def _array(labels: list[int] | None, count: int) -> Integers:
    return np.full(count, -1, dtype=np.int64) if labels is None else np.asarray(labels, dtype=np.int64)


def _time_steps(training: Training, ways: Ways, first: FirstSteps) -> tuple[float, float]:
    """Return median seconds of a plain step, the first ones, and of one that tracks the whole batch."""
    engine = PerSampleGradients(training.recipe, training.model, training.layout, ways)
    taken, done = [], len(first.losses)
    start = done if done + 1 < training.steps else 0  # go on from there: what a layer counts, it counts on
    stop = min(training.steps, start + done)
    for step, batch in enumerate(training.loader(start, stop), start=start):
        positions = torch.arange(training.batch_size(step), device=training.device)
        watch = engine.watch(positions, lambda _start, _block: None)
        begun = time.perf_counter()
        float(training.step(step, batch, watch))
        taken.append(time.perf_counter() - begun)
    engine.close()
    plain, follow = (float(np.median(seconds[1:] or seconds)) for seconds in (first.seconds, taken))
    return plain, follow

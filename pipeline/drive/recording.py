"""A record of a training loop that is not ours: `recording`."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ...storage import layout
from ...storage.errors import InputError, RecipeError, StoreError
from ...storage.files import list_files
from ...storage.lock import check_writable
from ...storage.place import check_place
from ...storage.rundir import RunDirectory
from ...storage.typed import to_json
from ...workers.data.user_code import user_code
from ...workers.determinism import prepare_process, restored_switches, seed_everything
from ...workers.memory import peak_bytes
from ...workers.recipe import Recipe
from ...workers.recipes.loading import load_recipe
from ...workers.training.loop import LoopRecorder
from ...workers.training.loop_check import InputCheck, Seen, check_replay
from ...workers.training.training import Compute
from ..executors.events import null
from ..reading.run_info import RunInfo, StageEntry, SummaryEntry, update_info
from ..reading.unit_values import RecordValues
from ..spec.spec import first_identity
from ..vocabulary import RECORD, TRAJECTORY
from .notes import versions
from .writing import writing

Indices: TypeAlias = Sequence[int] | npt.NDArray[np.integer] | Tensor

_log = logging.getLogger(__name__)


def recording(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    out: str | os.PathLike[str],
    recipe: Recipe | str | None = None,
    scheduler: Any = None,
    scheduler_interval: Literal["epoch", "step"] = "step",
    clip_grad_norm: float | None = None,
    accumulate: int = 1,
    scaler: Any = None,
    seed: int = 0,
    n_train: int | None = None,
    checkpoint_every: int | None = None,
    threads: int = 1,
    check: int = 8,
    overwrite: bool = False,
    wait: bool = False,
) -> Recording:
    """Record a training loop of your own; use it as ``with recording(...) as rec:``.

    In the loop, either call ``rec.step(indices, losses)`` in the place of zero_grad, backward, clipping and
    ``optimizer.step()``, or ``rec.batch(indices)`` before each forward pass and leave the rest as it is.
    When the block ends, ``out`` holds a record; when it raises, nothing.

    Args:
        model: What is trained, on its device, in float32 or float64.
        optimizer: Its optimiser; one with a rule (SGD, Adam, AdamW).
        out: Run directory.
        recipe: What a replay is made from (model, data and losses): an instance, or ``file.py:Class``. The first
            batches are replayed with it at once. None: nothing is checked before the first replay.
        scheduler: Moved by ``rec.step`` after each step of the optimiser, or by ``rec.end_epoch``. Leave it out
            where the loop moves its own.
        scheduler_interval: When.
        clip_grad_norm: Largest norm of a step's gradient. Clipped by ``rec.step``, or just before the optimiser's
            step, or where the loop calls ``rec.clip()``: a loop's own ``clip_grad_norm_`` must go.
        accumulate: Batches a step of the optimiser; the mean of each batch is divided by it.
        scaler: The loop's ``GradScaler``, whose skipped steps are then left out.
        seed: Keys the generators of each batch.
        n_train: Size of the training set; None: the recipe's, or the largest index and one.
        checkpoint_every: Batches between checkpoints; None: about 20 in all.
        threads: CPU threads of torch meanwhile; the replay needs the same (``--threads``).
        check: First batches that are replayed at once; 0: none.
        overwrite: Replace a run that is at ``out``.
        wait: Where another command writes to ``out`` when the block begins, wait for it.

    Raises:
        RecipeError: The optimiser has no rule, or the model or a number is none that can be recorded.
        StoreError: ``out`` holds something.
        RunLocked: On entering the block: another command writes to ``out``.
    """
    directory = RunDirectory(out)
    _check_place(directory, overwrite)
    if isinstance(recipe, str):
        recipe = load_recipe(recipe, {})
    if recipe is not None and not isinstance(recipe, Recipe):
        raise RecipeError(
            f"recipe is a {type(recipe).__name__}; give an instance of a hydra_pipe.Recipe, or file.py:Class"
        )
    for name, value, least in (
        ("threads", threads, 1),
        ("check", check, 0),
        ("checkpoint_every", checkpoint_every, 1),
    ):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise InputError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    if n_train is None:
        n_train = _length(recipe)
    recorder = LoopRecorder(
        model,
        optimizer,
        n_train=n_train,
        seed=seed,
        scheduler=scheduler,
        scheduler_interval=scheduler_interval,
        clip_grad_norm=clip_grad_norm,
        accumulate=accumulate,
        scaler=scaler,
        checkpoint_every=checkpoint_every,
    )
    compute = Compute(
        device=recorder.device.type, dtype=str(recorder.dtype).removeprefix("torch."), threads=threads
    )
    return Recording(recorder, directory, compute, recipe, check, overwrite=overwrite, wait=wait)


class Recording:
    """What `recording` returns.

    Attributes:
        uri: The run directory.
        notes: What was left out of the record, one line each; known when the block has ended.
    """

    def __init__(
        self,
        recorder: LoopRecorder,
        directory: RunDirectory,
        compute: Compute,
        recipe: Recipe | None,
        check: int,
        *,
        overwrite: bool,
        wait: bool,
    ) -> None:
        self._overwrite, self._wait = overwrite, wait
        self.uri, self.notes = directory.uri, list[str]()
        self._recorder, self._directory, self._compute, self._recipe = recorder, directory, compute, recipe
        self._check = check if recipe is not None else 0
        self._replayed = 0
        self._inputs: InputCheck | None = None
        self._stack: ExitStack | None = None
        self._ended = False
        self._begun = time.monotonic()

    @property
    def done(self) -> int:
        """Batches whose steps are done."""
        return self._recorder.done

    @property
    def begun(self) -> int:
        """Batches announced, those of no step yet included: the next one's number."""
        return self._recorder.begun

    def __enter__(self) -> Self:
        if self._stack is not None:
            raise InputError("a recording is entered once; call recording() again for another training")
        with ExitStack() as stack:
            stack.enter_context(writing(self._directory, null, command="recording", wait=self._wait))
            _check_place(self._directory, self._overwrite)  # again: nobody else writes there now
            stack.callback(self._recorder.close)
            stack.enter_context(restored_switches())
            prepare_process(self._compute.threads)
            self._recorder.after_step = self._look
            self._recorder.watch()
            self._stack = stack.pop_all()
        self._begun = time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._stack is not None
        self._ended = True
        if error is not None:
            self._stack.__exit__(kind, error, trace)
            return
        with self._stack:
            self._finish()

    def batch(
        self, indices: Indices, *, inputs: Any = None, parts: int | None = None, divisor: float | None = None
    ) -> None:
        """Begin a batch: call it before its forward pass, which draws from generators that are seeded here.

        Args:
            indices: Training indices of its samples, in order.
            inputs: Tensors of the batch, to be compared with what the recipe's dataset gives for these indices.
            parts: What the mean of its losses is divided by; None: ``accumulate``.
            divisor: What the sum of its losses is divided by instead, such as all tokens of the step.

        Raises:
            RecipeError: A replay could not follow; says why.
        """
        self._check_entered()
        found = self._recorder.begin(indices, parts, divisor)
        if inputs is not None:
            self._check_inputs(found, inputs)

    def step(
        self, indices: Indices, losses: Tensor, *, parts: int | None = None, divisor: float | None = None
    ) -> Tensor:
        """Take the losses of a batch, (B,), unreduced: backward, and after ``accumulate`` batches the step.

        Args:
            indices: Training indices of its samples, in order.
            losses: One a sample, in the same order.
            parts: See ``batch``.
            divisor: See ``batch``.

        Returns:
            What was differentiated, detached.

        Raises:
            RecipeError: A replay could not follow; says why.
            NonFiniteLoss: A loss is NaN or infinite.
        """
        self._check_entered()
        return self._recorder.step(indices, losses, parts, divisor)

    def clip(self) -> Tensor:
        """Clip the gradient now, as the step would; return its norm."""
        self._check_entered()
        return self._recorder.clip()

    def end_epoch(self) -> None:
        """End an epoch. Where it is never called, one ends when the next batch would be more than N samples."""
        self._check_entered()
        self._recorder.end_epoch()

    def _check_entered(self) -> None:
        if self._stack is None or self._ended:
            raise InputError("a recording watches inside of its block; write `with recording(...) as rec:`")
        check_writable(self.uri)

    def _check_inputs(self, indices: npt.NDArray[np.int32], inputs: Any) -> None:
        if self._recipe is None:
            raise InputError(
                "inputs are compared with the recipe's data; say recording(..., recipe=...) or leave them out"
            )
        if self._inputs is None:
            self._inputs = InputCheck(self._recipe, self._compute, self._recorder.seed)
        self._inputs.check(self._recorder.begun - 1, indices, inputs)

    def _look(self) -> None:
        """Replay what there is, once there is enough."""
        if self._check and not self._replayed and self.done >= self._check:
            self._replay()

    def _replay(self) -> None:
        recorder, taken = self._recorder, self._recorder.taken
        assert self._recipe is not None
        assert recorder.first_weights is not None
        seen = Seen(
            record=recorder.so_far(),
            digests=recorder.digests,
            losses=taken.own_losses,
            active=np.array(taken.active),
            first_weights=recorder.first_weights,
        )
        with user_code("replaying the first batches with the recipe failed:", always=True):
            self._replayed = check_replay(self._recipe, self._compute, seen)
        recorder.first_weights = None

    def _finish(self) -> None:
        """Write the run."""
        recorder, directory = self._recorder, self._directory
        self.notes = recorder.finish()
        if self._check and not self._replayed:
            self._replay()
        if self._recipe is None:
            self.notes.append(
                "no recipe was given, so nothing was replayed: the first replay says whether it follows"
            )
        for note in self.notes:
            _log.warning("%s: %s", self.uri, note)
        if directory.exists():
            directory.delete_results()
        update_info(directory, lambda _: self._info())
        try:
            self._write()
        except BaseException:
            directory.delete_results()
            raise

    def _write(self) -> None:
        """Write and commit the trajectory."""
        recorder, directory = self._recorder, self._directory
        uri = directory.path(layout.TRAJECTORY)
        recorder.write(uri)
        seconds = time.monotonic() - self._begun
        values = RecordValues(
            steps=recorder.done,
            dimension=recorder.layout.dimension,
            checked_steps=recorder.checked,
            seconds=seconds,
            peak_bytes=peak_bytes(),
            loop=True,
        )
        files = [f"{layout.TRAJECTORY}/{name}" for name in list_files(uri)]
        directory.commit(RECORD, TRAJECTORY, files, to_json(values))

    def _info(self) -> RunInfo:
        recorder, recipe = self._recorder, self._recipe
        seconds = time.monotonic() - self._begun
        return RunInfo(
            n_train=recorder.n_train,
            dimension=recorder.layout.dimension,
            steps=recorder.done,
            identity=first_identity(dtype=self._compute.dtype, threads=self._compute.threads),
            stages={RECORD: StageEntry(units=1, seconds=seconds)},
            summary=SummaryEntry(seconds=seconds),
            rest={
                "format": 1,
                "recipe": {
                    "name": "own_loop" if recipe is None else recipe.name,
                    "epochs": len(recorder.ends),
                    "batch_size": max(len(row) for row in recorder.taken.batches),
                    "seed": recorder.seed,
                },
                "versions": versions(),
                "replayed": self._replayed,
                "left out": self.notes,
            },
        )


def _check_place(directory: RunDirectory, overwrite: bool) -> None:
    """Refuse a place where something would be lost.

    Raises:
        StoreError: There is a run, or something that is none.
    """
    if not directory.exists():
        check_place(directory.uri)
    elif directory.stages() and not overwrite:
        raise StoreError(
            f"{directory.uri} holds a run; use another out, or overwrite=True to replace it when the loop has ended"
        )


def _length(recipe: Recipe | None) -> int:
    if recipe is None:
        raise InputError("n_train is not known; say recording(..., n_train=len(dataset)), or give the recipe")
    with restored_switches(), user_code(f"{recipe.name}.train_dataset() failed:", always=True):
        seed_everything(recipe.seed)
        return len(recipe.train_dataset())  # type: ignore[arg-type]

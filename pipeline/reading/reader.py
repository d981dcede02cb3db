"""A finished or half-finished run, opened for reading.

Everything here reads what manifests vouch for and nothing else: a part whose stage is not
committed raises `IncompleteStage` instead of returning half a result. Letters: N training
samples, M test samples, D trainable parameters.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self, TypeVar

from ...storage import layout
from ...storage.errors import IncompleteStage, InputError, RunNotFound
from ...storage.lock import holding, read_holder
from ...storage.rundir import RunDirectory
from ...storage.uri import check_uri
from ..vocabulary import COMPLETE, FAST, RECORD, REDUCE, REPLAY, TEST_GRADIENTS
from .run_info import RunInfo
from .stage_states import refuse_outdated, stage_state

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    import pyarrow.dataset as pa_dataset
    import zarr

    from ...storage.rows import RowStore
    from ...storage.schemas import Kind
    from ...storage.trajectory import Trajectory
    from ...storage.visits import Visits
    from .detections import Detection

AnyReader = TypeVar("AnyReader", bound="Reader")


class Reader:
    """One run directory, read-only; ``hydra_pipe.Run`` is this and what analyses offer on it.

    Attributes:
        uri: Where the run is.
        directory: The run directory with its manifests.
        info: The contents of ``run.json`` when the run was opened.
        noted: The same, as values.
    """

    def __init__(self, directory: RunDirectory, info: Mapping[str, Any]) -> None:
        self.directory = directory
        self.uri: str = directory.uri
        self.info: dict[str, Any] = dict(info)
        self.noted = RunInfo.from_json(info, directory.path(layout.RUN_INFO))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.uri!r}, recipe={self.recipe!r}, methods={self.methods()})"

    @property
    def recipe(self) -> str:
        """Name of the recipe that was run."""
        recipe = self.info.get("recipe", {})
        return str(recipe.get("name", "?")) if isinstance(recipe, Mapping) else str(recipe)

    def methods(self) -> list[str]:
        """Return the estimators whose results are complete, ``hydra`` first."""
        return [m for m in self.noted.method_names() if self._state(f"{m}/{REDUCE}") == COMPLETE]

    def method(self, method: str | None = None) -> str:
        """Return ``method``, or the default one: the only one there is, otherwise ``hydra`` first.

        Raises:
            InputError: The run has no such method.
            IncompleteStage: The method's results are not complete.
        """
        complete, known = self.methods(), self.noted.method_names()
        if method is None:
            if complete:
                return complete[0]
            method = known[0] if known else FAST
        elif method not in known:
            raise InputError(f"{self.uri} has no method {method!r}; it has {', '.join(known) or 'none'}")
        if method not in complete:
            raise self._incomplete(f"{method}/{REDUCE}")
        return method

    def contributions(self, method: str | None = None) -> pa_dataset.Dataset:
        """Return all C(i, j) of a method: one row a (train_index, test_index).

        Columns: ``train_index``, ``test_index`` int32, ``train_label``, ``test_label`` int16 (-1:
        none), ``contribution`` float32, ``method`` (partition). Files are sorted by (test_index,
        train_index), so that a filter on ``test_index`` reads little.
        """
        return self._dataset("contributions", method)

    def samples(self, method: str | None = None) -> pa.Table:
        """Return one row a training sample, sorted by ``train_index``.

        Columns: ``train_index``, ``label``, ``visits``, ``contribution`` (Eq. 7: the mean over the
        test samples), ``contribution_std`` (over the targets), ``shard``.
        """
        return _sorted(self.uri, self._dataset("samples", method), "train_index")

    def interclass(self, method: str | None = None) -> pa.Table:
        """Return Eq. 23: one row a (train_class, test_class), sorted by both."""
        return _sorted(self.uri, self._dataset("interclass", method), "train_class", "test_class")

    def spread(self, method: str) -> pa_dataset.Dataset:
        """Return how far the seeds of an average (``...-seedsK``) are apart, for each C(i, j).

        Columns as `contributions`, with ``contribution_spread`` (sample standard deviation over the
        seeds) in the place of ``contribution``.

        Raises:
            InputError: The method is no average.
        """
        return self._dataset("contributions_spread", self._average(method))

    def samples_spread(self, method: str) -> pa.Table:
        """Return mean and spread over the seeds of each C(i) of an average, sorted by ``train_index``.

        Columns: ``train_index``, ``label``, ``contribution``, ``contribution_spread``.

        Raises:
            InputError: The method is no average.
        """
        return _sorted(self.uri, self._dataset("samples_spread", self._average(method)), "train_index")

    def members(self) -> dict[int, Self]:
        """Return the runs with other seeds that lie inside this one, by seed; see ``--seeds``."""
        found = {seed: self.directory.of_seed(seed) for seed in self.noted.other_seeds}
        return {seed: type(self)(place, place.read()) for seed, place in found.items() if place.exists()}

    def averages(self, method: str) -> list[int]:
        """Return the seeds that a method is averaged over; empty where it is none."""
        return self.noted.averages(method)

    def hypergradients(self, method: str = FAST) -> zarr.Array[Any]:
        """Return the hypergradients, shape (n_tracked, D); row r is that of ``train_index[r]``."""
        return self.hypergradient_store(method).array

    def hypergradient_store(self, method: str = FAST) -> RowStore:
        """Return the store behind `hypergradients`, with its ``train_index`` column."""
        from ...storage.rows import RowStore

        self._require(f"{method}/{REPLAY}")
        return RowStore.open(
            self.directory.path(layout.hypergradients(method)), "hypergradient", self.directory.vouched
        )

    def test_gradients(self) -> RowStore:
        """Return the test gradients, (n_test_tracked, D), as a `RowStore`.

        Columns: ``test_index``, ``loss``, ``label``, ``prediction`` (-1: none).
        """
        from ...storage.rows import RowStore

        self._require(TEST_GRADIENTS)
        return RowStore.open(self.directory.path(layout.TEST_GRADIENTS), "gradient", self.directory.vouched)

    def trajectory(self) -> Trajectory:
        """Return the recorded training run."""
        from ...storage.trajectory import open_trajectory

        self._require(RECORD)
        return open_trajectory(self.directory.path(layout.TRAJECTORY), self.directory.vouched)

    def visits(self) -> Visits | None:
        """Return every training sample's own loss and margin at its visits; None: recorded without."""
        from ...storage.visits import read_visits

        self._require(RECORD)
        return read_visits(self.directory.path(layout.TRAJECTORY), self.directory.vouched)

    def noisy(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Return (train_index, original_label) of labels that are wrong on purpose, or None."""
        return self.trajectory().noisy

    def detections(self) -> list[str]:
        """Return the names of the detections that ``hydra-pipe detect`` left in the run, ascending."""
        from .detections import detection_names

        return detection_names(self)

    def detection(self, name: str) -> Detection:
        """Return a stored detection: its table (most suspicious first) and how it was made.

        Raises:
            IncompleteStage: The run has none of that name.
        """
        from .detections import read_detection

        return read_detection(self, name)

    def _average(self, method: str) -> str:
        method = self.method(method)
        if not self.averages(method):
            raise InputError(
                f"{self.uri}: method {method} is that of one seed and has no spread over seeds; "
                "make an average with hydra-pipe run ... --seeds K on the same --out"
            )
        return method

    def _dataset(self, kind: Kind, method: str | None) -> pa_dataset.Dataset:
        from ...storage.contributions import dataset

        method = self.method(method)
        refuse_outdated(self.directory, self.directory.ledger.readable(f"{method}/{REDUCE}"))
        return dataset(self.directory, kind, method)

    def _state(self, stage: str) -> str:
        return stage_state(self.directory, self.noted, stage).state

    def _require(self, stage: str) -> None:
        if self._state(stage) != COMPLETE:
            raise self._incomplete(stage)
        refuse_outdated(self.directory, self.directory.ledger.readable(stage))

    def _incomplete(self, stage: str) -> IncompleteStage:
        state = stage_state(self.directory, self.noted, stage)
        done = f"{state.done} of {'?' if state.units is None else state.units} units are committed"
        return IncompleteStage(
            f"{self.uri}: stage {stage} is {state.state} ({done}); "
            f"`hydra-pipe status {self.uri}` shows the command that resumes it"
        )


def opened(kind: type[AnyReader], uri: str | os.PathLike[str], *, check: bool = True) -> AnyReader:
    """Open a run directory for reading, as a `Reader` or as what is built on it.

    Args:
        kind: `Reader`, or a subclass.
        uri: Local path or ``s3://``, ``gs://``, ``az://`` address, as given to ``--out``.
        check: Whether files are compared with the digests of their manifests when they are first read.

    Raises:
        SpecError: The address is of a kind that is not allowed.
        RunNotFound: There is no run.
        CorruptStore: ``run.json`` cannot be read.
    """
    directory = RunDirectory(check_uri(uri), digests=check)
    if not directory.exists():
        if (holder := read_holder(directory.uri)) is not None and holding(directory.uri) is None:
            raise RunNotFound(
                f"no run at {directory.uri} yet: {holder} is about to make it; look again in a while"
            )
        raise RunNotFound(
            f"no run at {directory.uri}: run.json is missing there; make one with "
            f"`hydra-pipe run --out {directory.uri}`, or check the path"
        )
    return kind(directory, directory.read())


def open_reader(uri: str | os.PathLike[str]) -> Reader:
    """Open a run directory for reading alone; see `opened`."""
    return opened(Reader, uri)


def _sorted(uri: str, dataset: pa_dataset.Dataset, *keys: str) -> pa.Table:
    from ...storage.contributions import legible

    columns = [name for name in dataset.schema.names if name != "method"]
    with legible(uri):
        return dataset.to_table(columns=columns).sort_by([(key, "ascending") for key in keys])

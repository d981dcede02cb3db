"""The training loader of a ``lightning.Trainer``, knowing which rows of the dataset its batches are of."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ...storage.errors import RecipeError
from ...workers.data.batches import fetch
from ...workers.determinism import derived_seed, preserved_generators, seed_everything

Rows = npt.NDArray[np.int64]


class RowLoader(DataLoader[Any]):
    """The batches of another loader, in its order, by its sampler, fetched as a replay will.

    Generators are seeded before each batch is fetched, so that augmentation in the dataset is the same in a replay,
    with any number of workers.

    Args:
        loader: The user's.
        seed: Keys the generators.
        begun: Gives how many batches the record has so far.

    Attributes:
        given: The user's loader.

    Raises:
        RecipeError: Its batches are not rows of a map-style dataset.
    """

    def __init__(self, loader: Any, seed: int, begun: Callable[[], int]) -> None:
        _check(loader)
        self.given = loader
        self._drawn: deque[Rows] = deque()
        workers = {
            name: getattr(loader, name)
            for name in ("prefetch_factor", "persistent_workers", "timeout", "multiprocessing_context")
            if loader.num_workers
        }
        super().__init__(
            _Batches(loader.dataset, loader.collate_fn, seed),
            batch_size=None,
            sampler=_Numbered(loader, begun),
            num_workers=loader.num_workers,
            collate_fn=_as_it_is,
            pin_memory=loader.pin_memory,
            worker_init_fn=loader.worker_init_fn,
            generator=loader.generator,
            **workers,
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield batches; the rows of each wait in `next_rows`."""
        self._drawn.clear()
        for rows, batch in super().__iter__():
            self._drawn.append(rows)
            yield batch

    def next_rows(self) -> Rows:
        """Return the rows of the oldest batch that was yielded and not asked for."""
        return self._drawn.popleft()


class _Numbered:
    """Pairs of a batch's number in the record and its rows, in the order of a loader's sampler."""

    def __init__(self, loader: DataLoader[Any], begun: Callable[[], int]) -> None:
        self._loader, self._begun = loader, begun
        self.sampler = loader.sampler

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[tuple[int, Rows]]:
        assert self._loader.batch_sampler is not None
        for number, rows in enumerate(self._loader.batch_sampler, start=self._begun()):
            yield number, np.asarray(rows, dtype=np.int64)

    def set_epoch(self, epoch: int) -> None:
        """Tell samplers that want to know."""
        for sampler in (self._loader.batch_sampler, self._loader.sampler):
            told = getattr(sampler, "set_epoch", None)
            if told is not None:
                told(epoch)


class _Batches(Dataset[Any]):
    """Item (number, rows) is the batch of these rows, with the rows."""

    def __init__(self, dataset: Dataset[Any], collate: Callable[[list[Any]], Any], seed: int) -> None:
        self.dataset, self._seed = dataset, seed
        self._recipe: Any = SimpleNamespace(collate=collate)

    def __getitem__(self, drawn: tuple[int, Rows]) -> tuple[Rows, Any]:
        number, rows = drawn
        with preserved_generators():
            seed_everything(derived_seed(self._seed, "data", number))
            return rows, fetch(self._recipe, self.dataset, rows)


def _as_it_is(batch: Any) -> Any:
    return batch


def _check(loader: Any) -> None:
    name = type(loader).__name__
    if not isinstance(loader, DataLoader) or type(loader).__iter__ is not DataLoader.__iter__:
        raise RecipeError(
            f"train_dataloaders is a {name}, whose batches are of rows that are not known; give a torch.utils.data.DataLoader"
        )
    if isinstance(loader.dataset, IterableDataset):
        raise RecipeError(
            f"train_dataloaders reads a {type(loader.dataset).__name__}, which has no rows to trace; give a map-style dataset"
        )
    if loader.batch_sampler is None:
        raise RecipeError(
            "train_dataloaders has batch_size=None, so that rows are not samples; let the DataLoader make the batches"
        )

"""Calls side by side, where they mostly wait."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from .errors import ResourceError

T = TypeVar("T")
U = TypeVar("U")


def in_threads(function: Callable[[T], U], items: Iterable[T], threads: int) -> list[U]:
    """Call ``function`` on every item, some at a time; return what it returned, in order.

    The first error ends it: what has not begun is not begun any more.

    Raises:
        ResourceError: The system gives this process no more threads.
    """
    work = list(items)
    if len(work) < 2 or threads < 2:
        return [function(item) for item in work]
    pool = ThreadPoolExecutor(min(threads, len(work)))
    try:
        try:
            waiting = [pool.submit(function, item) for item in work]
        except RuntimeError as error:
            raise ResourceError(
                f"the system gives this process no more threads ({error}); raise the limit (ulimit -u), "
                "or end other work"
            ) from error
        return [one.result() for one in waiting]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)

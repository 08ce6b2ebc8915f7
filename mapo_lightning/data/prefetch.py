"""Runs jobs side by side, such as the reading of clips, and hands over their results in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

K = TypeVar("K")
T = TypeVar("T")


def prefetch(
    jobs: Iterable[tuple[K, Callable[[], T]]], in_flight: int
) -> Iterator[tuple[K, Callable[[], T]]]:
    """Run jobs side by side and hand them over in their order.

    Args:
        jobs: Name and work; taken from the iterable as they are needed.
        in_flight: Jobs at once; 1 runs each in this thread when its result is called for.

    Yields:
        The name, and a function that returns the job's result or raises its error.
    """
    if in_flight <= 1:
        yield from jobs
        return
    pool, waiting, source = ThreadPoolExecutor(in_flight, "clip"), deque[Any](), iter(jobs)
    try:
        while True:
            for name, job in source:
                waiting.append((name, pool.submit(job)))
                if len(waiting) >= in_flight:
                    break
            if not waiting:
                return
            name, future = waiting.popleft()
            yield name, future.result
    finally:
        pool.shutdown(wait=False, cancel_futures=True)

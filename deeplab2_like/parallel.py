"""Maps a function over items in threads; results come in order."""

import collections
import concurrent.futures
from collections.abc import Callable, Generator, Iterable
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def map_in_order(
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Generator[Result, None, None]:
    """Yields `function(item)` of each item, in the order of the items.

    Items are taken in the calling thread, and only a few ahead of the results that were yielded, so that memory stays
    bounded.

    Args:
        function: Called from `workers` threads. Threads help where it spends its time in code that releases the global
            interpreter lock, such as NumPy, OpenCV or TensorFlow.
        items: Any iterable, for instance a generator.
        workers: Number of threads.
    """
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        pending: collections.deque[concurrent.futures.Future[Result]] = collections.deque()
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * workers:  # One item in work and one waiting per thread.
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()

"""Adaptive batching: joins single items of concurrent requests to batches for a function that is faster with many.

MLServer's own batching joins whole requests before a model can look at them: a request whose shape does not fit its
data shifts the answers of the others, and after a canceled request the others of its batch wait forever. Here, items
are checked before they are joined, and each has an answer of its own.
"""

import asyncio
import concurrent.futures
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class TooManyWaitingError(Exception):
    """More items wait than allowed."""


class Batcher(Generic[Item, Answer]):
    """Calls a function in a thread of its own, with all items that have come while it was busy.

    Args:
        function: Returns an answer for each item of a batch, in order.
        max_size: Largest number of items of a batch, 1 or more.
        max_wait: Seconds for which an incomplete batch waits for more items; with 0 only items that are there already
            are joined.
        max_waiting: Number of items that may wait; more are refused.
    """

    def __init__(
        self,
        function: Callable[[list[Item]], Sequence[Answer]],
        *,
        max_size: int,
        max_wait: float = 0.0,
        max_waiting: int = 1000,
    ) -> None:
        self._function = function
        self._max_size, self._max_wait, self._max_waiting = max_size, max_wait, max_waiting
        self._queue: asyncio.Queue[tuple[Item, asyncio.Future[Answer]]] = asyncio.Queue()
        self._thread = concurrent.futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._task: asyncio.Task[None] | None = None

    async def submit(self, items: Sequence[Item]) -> list[Answer]:
        """Returns the answers for some items, which may be spread over several batches.

        Raises:
            TooManyWaitingError: If more items than `max_waiting` would wait.
            Exception: That of the function, for all items of a batch that fails.
        """
        if self._queue.qsize() + len(items) > self._max_waiting:
            raise TooManyWaitingError(f"{self._queue.qsize()} images wait already, and at most {self._max_waiting} may")
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())
        futures = []
        for item in items:
            future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
            self._queue.put_nowait((item, future))
            futures.append(future)
        return list(await asyncio.gather(*futures))

    def close(self) -> None:
        """Ends the thread after the batch at hand."""
        if self._task is not None:
            self._task.cancel()
        self._thread.shutdown(wait=False)

    async def _run(self) -> None:
        """Answers batch after batch, forever."""
        while True:
            batch = await self._next_batch()
            # The client of a canceled item has gone.
            batch = [(item, future) for item, future in batch if not future.done()]
            if not batch:
                continue
            try:
                loop = asyncio.get_running_loop()
                answers = await loop.run_in_executor(self._thread, self._function, [item for item, _ in batch])
                pairs = list(zip(batch, answers, strict=True))
            except Exception as error:  # Those who wait must learn of any error, and the next batch may be fine.
                for _, future in batch:
                    if not future.done():
                        future.set_exception(error)
                continue
            for (_, future), answer in pairs:
                if not future.done():
                    future.set_result(answer)

    async def _next_batch(self) -> list[tuple[Item, "asyncio.Future[Answer]"]]:
        """Waits for an item, and takes more up to the limits."""
        batch = [await self._queue.get()]
        deadline = asyncio.get_running_loop().time() + self._max_wait
        while len(batch) < self._max_size:
            if self._queue.empty():
                seconds = deadline - asyncio.get_running_loop().time()
                if seconds <= 0:
                    break
                try:
                    batch.append(await asyncio.wait_for(self._queue.get(), seconds))
                except TimeoutError:
                    break
            else:
                batch.append(self._queue.get_nowait())
        return batch

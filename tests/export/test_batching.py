import asyncio
import threading

import pytest

from deeplab2_like.export.batching import Batcher, TooManyWaitingError


class Recorder:
    """A function that doubles numbers, writes down its batches, and waits for `go` before each."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.started, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def __call__(self, items: list[int]) -> list[int]:
        self.batches.append(items)
        self.started.release()
        assert self.go.acquire(timeout=30)
        if -1 in items:
            raise ArithmeticError("minus one")
        return [2 * item for item in items]


async def _start_first(recorder: Recorder, batcher: Batcher) -> "asyncio.Task[list[int]]":
    """Submits item 0, and waits until the function has it, so that all later items wait."""
    first = asyncio.create_task(batcher.submit([0]))
    await asyncio.to_thread(recorder.started.acquire)
    return first


def _run(scenario, **limits) -> Recorder:
    recorder = Recorder()

    async def main() -> None:
        batcher = Batcher(recorder, **limits)
        try:
            await asyncio.wait_for(scenario(recorder, batcher), 30)
        finally:
            batcher.close()

    asyncio.run(main())
    return recorder


def test_joins_what_came_while_the_function_was_busy():
    async def scenario(recorder, batcher):
        first = await _start_first(recorder, batcher)
        others = [asyncio.create_task(batcher.submit(items)) for items in ([1, 2], [3], [4, 5])]
        await asyncio.sleep(0)
        recorder.go.release(3)
        assert await first == [0]
        assert await asyncio.gather(*others) == [[2, 4], [6], [8, 10]]

    # At most three at once, although a request is spread over two batches then.
    assert _run(scenario, max_size=3).batches == [[0], [1, 2, 3], [4, 5]]


def test_waits_for_an_incomplete_batch():
    async def scenario(recorder, batcher):
        recorder.go.release()
        first = asyncio.create_task(batcher.submit([1]))
        await asyncio.sleep(0.01)
        assert await batcher.submit([2]) == [4]
        assert await first == [2]

    # The batch is complete with the second item; nobody waits for the rest of the minute.
    assert _run(scenario, max_size=2, max_wait=60.0).batches == [[1, 2]]


def test_an_error_reaches_its_batch_only():
    async def scenario(recorder, batcher):
        first = await _start_first(recorder, batcher)
        others = [asyncio.create_task(batcher.submit([item])) for item in (-1, 1, 2)]
        await asyncio.sleep(0)
        recorder.go.release(3)
        assert await first == [0]
        answers = await asyncio.gather(*others, return_exceptions=True)
        assert [str(answer) for answer in answers] == ["minus one", "minus one", "[4]"]

    assert _run(scenario, max_size=2).batches == [[0], [-1, 1], [2]]


def test_a_canceled_item_is_left_out_and_nobody_else_waits():
    async def scenario(recorder, batcher):
        first = await _start_first(recorder, batcher)
        others = [asyncio.create_task(batcher.submit([item])) for item in (1, 2, 3)]
        await asyncio.sleep(0)
        others[1].cancel()
        await asyncio.sleep(0)
        recorder.go.release()
        assert await first == [0]
        await asyncio.to_thread(recorder.started.acquire)
        others[0].cancel()  # While the function has it.
        await asyncio.sleep(0)
        recorder.go.release()
        assert await others[2] == [6]

    assert _run(scenario, max_size=8).batches == [[0], [1, 3]]


def test_refuses_more_than_may_wait():
    async def scenario(recorder, batcher):
        first = await _start_first(recorder, batcher)
        second = asyncio.create_task(batcher.submit([1, 2]))
        await asyncio.sleep(0)
        with pytest.raises(TooManyWaitingError, match="2 images wait already, and at most 2 may"):
            await batcher.submit([3])
        recorder.go.release(2)
        assert await first == [0]
        assert await second == [2, 4]

    _run(scenario, max_size=8, max_waiting=2)


def test_no_items_need_no_batch():
    async def scenario(recorder, batcher):
        assert await batcher.submit([]) == []

    assert _run(scenario, max_size=8).batches == []

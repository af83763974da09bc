"""The queue with awaiting: nothing leaks and nobody is forgotten, whoever is cancelled when."""

from __future__ import annotations

import asyncio
from collections import Counter
from random import Random

import pytest

from shoal.errors import UnavailableError
from shoal.router.admission import AdmissionQueue, AsyncAdmission, Entry, EntryState, QueueLimits


async def turns(number: int = 5) -> None:
    """So many turns of the loop for all others."""
    for _ in range(number):
        await asyncio.sleep(0)


def is_clean(admission: AsyncAdmission) -> bool:
    queue = admission.queue
    return (queue.num_running, queue.num_waiting, queue.waiting_bytes, admission._wakers, admission._timer) == (
        0, 0, 0, {}, None,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(12))
async def test_many_random_cancellations(seed: int) -> None:
    random = Random(seed)
    admission = AsyncAdmission(AdmissionQueue(3, QueueLimits(max_waiting=20)))
    entries: list[Entry] = []
    inside = 0

    async def one(entry: Entry, num_turns: int, fails: bool) -> str:
        nonlocal inside
        try:
            async with admission.admit(entry):
                inside += 1
                assert inside <= max(admission.queue.capacity, 3)
                try:
                    await turns(num_turns)
                    if fails:
                        raise KeyError("the request's own error")
                    return "done"
                finally:
                    inside -= 1
        except UnavailableError as error:
            assert error.retry_after is not None and error.retry_after >= 1
            return "unavailable"
        except KeyError:
            return "failed"

    tasks: list[asyncio.Task[str]] = []
    for _ in range(250):
        max_wait = random.choice([0.0, 0.001, 5.0, 5.0])
        entry = Entry(random.choice("ab"), random.randint(0, 1), num_bytes=1, max_wait=max_wait)
        entries.append(entry)
        tasks.append(asyncio.create_task(one(entry, random.randint(0, 6), random.random() < 0.1)))
        for task in random.sample(tasks[-30:], min(len(tasks), random.choice([0, 0, 1, 3]))):
            task.cancel()
        if random.random() < 0.05:
            admission.set_capacity(random.randint(1, 3))
        await turns(random.choice([0, 0, 1, 2]))
    async with asyncio.timeout(30):
        results = await asyncio.gather(*tasks, return_exceptions=True)
    found = Counter(type(result).__name__ if isinstance(result, BaseException) else result for result in results)
    assert set(found) <= {"done", "failed", "unavailable", "CancelledError"}, found
    assert found["done"] > 20 and found["CancelledError"] > 20, found
    # A task that was cancelled before it began never offered its entry.
    ends = (EntryState.RELEASED, EntryState.REFUSED, EntryState.EXPIRED, EntryState.CANCELLED)
    assert all(entry.state in ends or (entry.state is EntryState.NEW) for entry in entries)
    assert is_clean(admission) and inside == 0
    async with asyncio.timeout(5), admission.admit(Entry()):  # every place is there again
        assert admission.queue.num_running == 1


async def test_room_for_those_who_wait_for_something_else() -> None:
    """They take places and bytes of the queue like those in it, and give them back however they end."""
    admission = AsyncAdmission(AdmissionQueue(1, QueueLimits(max_waiting=2, max_waiting_bytes=100)))
    with admission.room(60), pytest.raises(UnavailableError, match="too many requests wait") as caught:
        assert (admission.queue.num_waiting, admission.queue.waiting_bytes) == (1, 60)
        with admission.room(41):
            pass
    assert caught.value.retry_after is not None and caught.value.retry_after >= 1
    async with admission.admit(Entry()):
        with admission.room(1), admission.room(1):
            with pytest.raises(UnavailableError):
                async with admission.admit(Entry()):
                    pass
            with pytest.raises(UnavailableError), admission.room(1):
                pass
        admission.close()
        with pytest.raises(UnavailableError, match="shutting down"), admission.room(1):
            pass
    assert is_clean(admission)


async def test_those_who_wait_are_let_in_by_priority() -> None:
    admission = AsyncAdmission(AdmissionQueue(1))
    order: list[int] = []

    async def one(priority: int) -> None:
        async with admission.admit(Entry(priority=priority)) as entry:
            order.append(entry.priority)
            await turns()

    tasks = [asyncio.create_task(one(priority)) for priority in (5, 3, 1, 2)]
    await asyncio.gather(*tasks)
    assert order == [5, 1, 2, 3]
    assert is_clean(admission)


async def test_cancelled_in_the_turn_in_which_it_is_admitted() -> None:
    """The place goes to the next one: it was given, and given back unused."""
    admission = AsyncAdmission(AdmissionQueue(1))
    entered: list[str] = []

    async def one(name: str) -> None:
        async with admission.admit(Entry(name)):
            entered.append(name)
            await turns(2)

    async with admission.admit(Entry()):
        tasks = [asyncio.create_task(one(name)) for name in "ab"]
        await turns()
    tasks[0].cancel()  # it has its place, and has not run since
    await asyncio.wait(tasks)
    assert tasks[0].cancelled() and entered == ["b"]
    assert is_clean(admission)


async def test_waiting_too_long_is_an_error_with_retry_after() -> None:
    admission = AsyncAdmission(AdmissionQueue(1))
    async with admission.admit(Entry()):
        with pytest.raises(
            UnavailableError, match="waited 0.01 seconds and no server had room for it; try again"
        ) as caught:
            async with admission.admit(Entry(max_wait=0.01)):
                raise AssertionError("nobody left")
        assert caught.value.retry_after is not None
    assert is_clean(admission)


async def test_a_full_queue_is_an_error_at_once() -> None:
    admission = AsyncAdmission(AdmissionQueue(1, QueueLimits(max_waiting=0)))
    async with admission.admit(Entry()):
        with pytest.raises(
            UnavailableError, match=r"too many requests wait already \(0, 0 bytes\); try again in 5 seconds"
        ):
            async with admission.admit(Entry()):
                raise AssertionError("there is no room")
    assert is_clean(admission)


async def test_the_timer_follows_the_earliest_deadline() -> None:
    """The clock is the test's: the timer only says when to look at it."""
    now = 0.0
    admission = AsyncAdmission(AdmissionQueue(0), clock=lambda: now)

    async def one(max_wait: float) -> None:
        async with admission.admit(Entry(max_wait=max_wait)):
            raise AssertionError("there is no place")

    late = asyncio.create_task(one(500.0))
    await turns()
    soon = asyncio.create_task(one(100.0))
    await turns()
    assert admission._timer is not None
    assert admission._timer.when() - asyncio.get_running_loop().time() == pytest.approx(100, abs=5)
    soon.cancel()
    await turns()
    assert admission._timer.when() - asyncio.get_running_loop().time() == pytest.approx(500, abs=5)
    now = 501.0
    admission.set_capacity(1)
    with pytest.raises(UnavailableError, match="waited 500 seconds"):
        await late
    assert is_clean(admission)


async def test_closing_wakes_all_who_wait() -> None:
    admission = AsyncAdmission(AdmissionQueue(1))

    async def one() -> None:
        async with admission.admit(Entry()):
            raise AssertionError("it is closed")

    async with admission.admit(Entry()):
        tasks = [asyncio.create_task(one()) for _ in range(3)]
        await turns()
        admission.close()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all("shutting down and takes no new requests" in str(result) for result in results)
    assert is_clean(admission)

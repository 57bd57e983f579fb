"""The task that compacts a sparse device by itself."""

import asyncio
import random
import threading
import time

import pytest

from zramd.device import Zram
from zramd.errors import BadValue
from zramd.service import upkeep as module
from zramd.service.upkeep import upkeep
from zramd.store import PAGE, compaction

DEADLINE = 60
SIZE = 8 << 20


@pytest.fixture(autouse=True)
def often(monkeypatch):
    monkeypatch.setattr(module, "INTERVAL_S", 0.001)


@pytest.fixture
def zram():
    zram = Zram("zram7")
    yield zram
    zram.close()


def make_sparse(zram: Zram) -> None:
    zram.init(SIZE)
    opener = zram.open("test")
    opener.write(0, random.Random(1).randbytes(SIZE))
    for at in range(0, SIZE, 2 * PAGE):
        opener.discard(at, PAGE)
    opener.close()


async def until(fact) -> None:
    end = time.monotonic() + DEADLINE
    while not fact():
        assert time.monotonic() < end, "it never came true"
        await asyncio.sleep(0.001)


async def ended(task: asyncio.Task) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_sparse_device_is_compacted_in_another_thread_and_a_dense_one_is_not(zram, monkeypatch):
    compactions = []
    compact = Zram.compact
    monkeypatch.setattr(
        Zram, "compact", lambda self: compactions.append(threading.get_ident()) or compact(self)
    )

    async def main() -> None:
        task = asyncio.create_task(upkeep(zram))
        make_sparse(zram)
        await until(lambda: zram.statistics().pages_compacted == SIZE // PAGE // 2)
        await asyncio.sleep(0.05)
        assert len(compactions) == 1
        assert compactions[0] != threading.get_ident()
        await ended(task)

    asyncio.run(main())


def test_it_goes_on_through_resets_and_whatever_a_compaction_raises(zram, monkeypatch, caplog):
    raised = []
    compact = Zram.compact

    def fail_twice(self) -> None:
        if len(raised) < 2:
            raised.append([BadValue("no disksize"), MemoryError()][len(raised)])
            raise raised[-1]
        compact(self)

    monkeypatch.setattr(Zram, "compact", fail_twice)

    async def main() -> None:
        task = asyncio.create_task(upkeep(zram))
        for _ in range(2):
            await asyncio.sleep(0.01)
            make_sparse(zram)
            await until(lambda: zram.statistics().pages_compacted > 0)
            zram.reset(force=True)
        assert not task.done()
        await ended(task)

    asyncio.run(main())
    assert [record.exc_info[0] for record in caplog.records if record.exc_info] == [MemoryError]


def test_who_cancels_it_does_not_wait_for_a_compaction_and_the_devices_end_ends_that(
    zram, monkeypatch
):
    """What `zramd serve` does when it ends."""
    make_sparse(zram)
    reached, go = threading.Event(), threading.Event()
    moved = []
    move = compaction._move

    def slow_move(*at) -> None:
        move(*at)
        moved.append(at[2])
        reached.set()
        assert go.wait(DEADLINE)

    monkeypatch.setattr(compaction, "_move", slow_move)

    async def main() -> None:
        task = asyncio.create_task(upkeep(zram))
        await until(reached.is_set)
        await ended(task)

    asyncio.run(main())
    assert zram.statistics().in_flight == ("compact",)
    closer = threading.Thread(target=zram.close)
    closer.start()
    end = time.monotonic() + DEADLINE
    while zram._gate.init_done:
        assert time.monotonic() < end
        time.sleep(0.001)
    go.set()
    closer.join(DEADLINE)
    assert not closer.is_alive()
    assert moved == [0]

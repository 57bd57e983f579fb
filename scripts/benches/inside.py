"""Rows of zramd's parts, without a server: the store, the gate, the reset, recovery, snapshots.

What is compared runs alternately, round by round, and each round gives one ratio. Some rows are no
ratios of zramd to another: the gate's share of a write is that of a write with the gate to one
without, and what recoverability costs is one with the store as it is to one that publishes as it
likes; a drain's lateness is in milliseconds, a recovery in GiB of stored pages a second.
"""

import mmap
import os
import statistics
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import lz4.block

from zramd.device import Zram
from zramd.errors import DeviceBusy, NotInitialised
from zramd.gate import Gate, Record
from zramd.opener import Opener
from zramd.store import PAGE
from zramd.store.arena import Arena
from zramd.store.pages import Pages
from zramd.store.recovery import recover
from zramd.store.zcomp import Algorithm, Comp

MIB = 1 << 20
REQUEST = 128 << 10  # what the kernel sends


# The store alone


def measure_store(
    corpus: bytes, rounds: int, _seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    part = corpus[: min(len(corpus), 128 * MIB)]
    requests = [(at, part[at : at + REQUEST]) for at in range(0, len(part), REQUEST)]
    pages = [part[at : at + PAGE] for at in range(0, len(part), PAGE)]
    compress, decompress = lz4.block.compress, lz4.block.decompress
    writes, reads = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        blobs = [compress(page, store_size=False) for page in pages]
        bare_write = time.perf_counter() - started
        started = time.perf_counter()
        for blob in blobs:
            decompress(blob, uncompressed_size=PAGE)
        bare_read = time.perf_counter() - started

        store = Pages(Arena(len(part), "lz4"), Comp(Algorithm("lz4")))
        started = time.perf_counter()
        for at, data in requests:
            store.write(at, data)
        writes.append(bare_write / (time.perf_counter() - started))
        started = time.perf_counter()
        for at, data in requests:
            store.read(at, len(data))
        reads.append(bare_read / (time.perf_counter() - started))
        store.close()
    yield "store, lz4, 128 KiB writes / bare lz4 compress loop", ">= 0.65", writes
    yield "store, lz4, 128 KiB reads / bare lz4 decompress loop", ">= 0.50", reads


def measure_overhead(
    corpus: bytes, _rounds: int, _seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    for name in ("lz4", "zstd"):
        store = Pages(Arena(len(corpus), name), Comp(Algorithm(name)))
        store.write(0, corpus)
        overhead = store.arena.used / store.counters.compressed_bytes
        ratio = store.counters.pages * PAGE / store.arena.used
        store.close()
        yield f"mem_used_total / compr_data_size, {name}", "<= 1.04", [overhead]
        yield f"data / mem_used_total, {name}", "", [ratio]


# The gate and the reset

GIB = 1 << 30


def measure_reset(
    corpus: bytes, rounds: int, _seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    part = corpus[: 32 * MIB]
    shares = [gate_share(part) for _ in range(rounds)]
    yield "store, lz4, 4 KiB writes, with the gate / without", "<= 1.05", shares

    what = "forced reset under load, {}: ms from the last request's end to the drain's"
    for load, spins in (("6 threads", 0), ("6 threads and one that spins on EIO", 1)):
        yield what.format(load), "<= 10 ms", lateness(corpus[: 64 * MIB], 5 * rounds, spins)

    stored = min(2 * len(corpus), GIB)
    yield (
        f"reset of 8 GiB with {stored // MIB} MiB stored / munmap and close of as much",
        "<= 2.0",
        [full_reset(stored) for _ in range(rounds // 3 + 1)],
    )
    yield (
        "reset of an empty 30 GiB device / of an empty 1 GiB device",
        "<= 2.0",
        [empty_reset(30 * GIB, GIB) for _ in range(rounds)],
    )


def gate_share(part: bytes) -> float:
    """1 + a pass through the gate / a write of one page.

    The pass is timed alone: it is about 1 % of the write, and the difference of two times of
    writes swings by more than that.
    """
    gate = Gate()
    gate.open()
    passes = range(100_000)
    started = time.perf_counter()
    for _ in passes:
        pass
    empty = time.perf_counter() - started
    started = time.perf_counter()
    for _ in passes:
        record = gate.enter("bench")
        try:
            pass
        finally:
            gate.leave(record)
    one_pass = (time.perf_counter() - started - empty) / len(passes)

    pages = [(at, part[at : at + PAGE]) for at in range(0, len(part), PAGE)]
    store = Pages(Arena(len(part), "lz4"), Comp(Algorithm("lz4")))
    store.write(0, part)  # fresh memory's page faults would make the share look smaller
    started = time.perf_counter()
    for at, page in pages:
        store.write(at, page)
    one_write = (time.perf_counter() - started) / len(pages)
    store.close()
    return 1 + one_pass / one_write


class Stamps:
    """Notes when admitted requests end and when a drain begins and ends, of one device's gate."""

    def __init__(self, gate: Gate) -> None:
        self.last_end = self.begun = self.ended = 0.0
        self._inside: set[Record] = set()
        self._enter, self._leave, self._drain = gate.enter, gate.leave, gate.drain
        wrapped: Any = gate
        wrapped.enter, wrapped.leave, wrapped.drain = self.enter, self.leave, self.drain

    def enter(self, who: str) -> Record:
        record = self._enter(who)
        self._inside.add(record)
        return record

    def leave(self, record: Record) -> None:
        if record in self._inside:  # one that is refused leaves, too
            self._inside.remove(record)
            self.last_end = time.perf_counter()
        self._leave(record)

    def drain(self) -> None:
        self.begun = time.perf_counter()
        self._drain()
        self.ended = time.perf_counter()

    def late(self) -> float:
        """Milliseconds for which the drain went on with nobody inside."""
        return 1000 * (self.ended - max(self.begun, self.last_end))


def lateness(data: bytes, resets: int, spins: int) -> list[float]:
    """Per forced reset: the milliseconds its drain takes beyond the last request's end.

    Four threads read and write 4 KiB and two write 128 KiB. What is refused opens anew; each of
    `spins` more threads goes on and on asking a closed opener instead, as a server's loop does
    that answers EIO.
    """
    zram = Zram("bench")
    stamps = Stamps(zram._gate)
    done = threading.Event()

    def small(opener: Opener, at: int) -> None:
        opener.write(at, data[at : at + PAGE])
        opener.read(at, PAGE)

    def large(opener: Opener, at: int) -> None:
        at = at // REQUEST * REQUEST
        opener.write(at, data[at : at + REQUEST])

    def work(ask: Callable[[Opener, int], None], at: int) -> None:
        while not done.is_set():
            try:
                opener = zram.open("bench")
            except (NotInitialised, DeviceBusy):
                time.sleep(0.001)
                continue
            with suppress(NotInitialised):
                while not done.is_set():
                    at = (at + 37 * PAGE) % len(data)
                    ask(opener, at)
            opener.close()

    def spin(opener: Opener) -> None:
        while not done.is_set():
            with suppress(NotInitialised):
                opener.read(0, PAGE)

    zram.init(len(data))
    closed = zram.open("bench")
    zram.reset(force=True)
    threads = [threading.Thread(target=work, args=(small, n * 7 * MIB)) for n in range(4)]
    threads += [threading.Thread(target=work, args=(large, n * 11 * MIB)) for n in range(2)]
    threads += [threading.Thread(target=spin, args=(closed,)) for _ in range(spins)]
    for thread in threads:
        thread.start()
    late = []
    try:
        for _ in range(resets):
            zram.init(len(data))
            time.sleep(0.05)
            zram.reset(force=True)
            late.append(stamps.late())
    finally:
        done.set()
        for thread in threads:
            thread.join()
        zram.close()
    return late


def full_reset(stored: int) -> float:
    """The reset of a device of 8 GiB that stores so many bytes / unmapping and closing a memfd of
    the same size, with as many bytes touched."""
    noise = os.urandom(MIB)
    zram = Zram("bench")
    zram.init(8 * GIB)
    opener = zram.open("bench")
    for at in range(0, stored, MIB):
        opener.write(at, noise)
    meta = zram._meta
    assert meta is not None
    size, used = meta.arena.size, meta.arena.used
    started = time.perf_counter()
    zram.reset(force=True)
    ours = time.perf_counter() - started

    fd = os.memfd_create("bench")
    os.ftruncate(fd, size)
    bare = mmap.mmap(fd, size)
    bare.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, used - MIB, MIB):
        bare[at : at + MIB] = noise
    started = time.perf_counter()
    bare.close()  # unmaps
    os.close(fd)  # and this frees
    return ours / (time.perf_counter() - started)


def empty_reset(one: int, other: int) -> float:
    """The time of a reset of an empty device of one size / of another; medians of 20 in turn."""
    zram = Zram("bench")

    def one_reset(disksize: int) -> float:
        zram.init(disksize)
        started = time.perf_counter()
        zram.reset()
        return time.perf_counter() - started

    times = [(one_reset(one), one_reset(other)) for _ in range(20)]
    ones, others = zip(*times, strict=True)
    return statistics.median(ones) / statistics.median(others)


# Recovery


class Careless(Pages):
    """A store that cannot be recovered: it publishes many words at once. (The word of a page that
    comes alone is one store either way.)"""

    def _store_locked(self, start: int, olds: list[int], news: list[int]) -> None:
        self.arena.table[start : start + len(news)] = memoryview(array("Q", news))


def measure_recovery(
    corpus: bytes, rounds: int, _seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    yield (
        "a write of 128 KiB, recoverable / not",
        "<= 1.05",
        [
            write_time(Pages, corpus, REQUEST) / write_time(Careless, corpus, REQUEST)
            for _ in range(rounds)
        ],
    )
    stored = 1 << 30
    arena = Arena(stored, "lz4")
    pages = Pages(arena, Comp(Algorithm("lz4")))
    for at in range(0, stored, MIB):
        from_ = at % (len(corpus) - MIB)
        pages.write(at, corpus[from_ : from_ + MIB])

    def speed() -> float:
        adopted = Arena.adopt(arena.fd)
        started = time.perf_counter()
        recovered, _ = recover(adopted, pages.comp)
        seconds = time.perf_counter() - started
        recovered.pool.close()
        adopted.close()
        return stored / (1 << 30) / seconds

    yield "recovery of 1 GiB stored, GiB a second", ">= 2", [speed() for _ in range(rounds)]
    pages.close()


def measure_saving(
    corpus: bytes, rounds: int, seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    stored = 1 << 30
    pages = Pages(Arena(stored, "lz4"), Comp(Algorithm("lz4")))
    for at in range(0, stored, MIB):
        from_ = at % (len(corpus) - MIB)
        pages.write(at, corpus[from_ : from_ + MIB])

    def save() -> float:
        """Seconds that it takes; onto a tmpfs, which a memfd lies on."""
        file = os.memfd_create("snapshot")
        started = time.perf_counter()
        pages.save(file)
        took = time.perf_counter() - started
        os.close(file)
        return took

    yield (
        "a save to tmpfs, GiB of compressed data a second",
        ">= 1",
        [pages.counters.compressed_bytes / (1 << 30) / save() for _ in range(rounds)],
    )

    def written(beside: Callable[[], object]) -> float:
        """MiB a second that a thread writes meanwhile."""
        ended = threading.Event()
        amount = 0

        def write() -> None:
            nonlocal amount
            while not ended.is_set():
                at = amount % (min(stored, len(corpus)) - REQUEST)
                pages.write(at // PAGE * PAGE, corpus[at : at + REQUEST])
                amount += REQUEST

        thread = threading.Thread(target=write)
        started = time.perf_counter()
        thread.start()
        try:
            while time.perf_counter() < started + seconds:
                beside()
        finally:
            ended.set()
            thread.join()
        return amount / MIB / (time.perf_counter() - started)

    yield (
        "writes of 128 KiB by a thread, during saves / alone",
        ">= 0.5",
        [written(save) / written(lambda: time.sleep(0.1)) for _ in range(rounds)],
    )
    pages.close()


def write_time(store: type[Pages], corpus: bytes, size: int) -> float:
    """Seconds of overwriting 32 MiB in pieces of `size`."""
    arena = Arena(64 * MIB, "lz4")
    pages = store(arena, Comp(Algorithm("lz4")))
    view = memoryview(corpus)[: 32 * MIB]
    try:
        for at in range(0, len(view), MIB):
            pages.write(at, view[at : at + MIB])
        started = time.perf_counter()
        for at in range(0, len(view), size):
            pages.write(at, view[at : at + size])
        return time.perf_counter() - started
    finally:
        pages.close()

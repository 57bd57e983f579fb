"""Stores for the tests of what outlives one: made, recovered, killed and looked at."""

import functools
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

from tests.store import contents
from tests.store.audit import audit
from tests.store.contents import ZEROS, filled, noise, tagged, text
from zramd.errors import Corrupt
from zramd.store import PAGE
from zramd.store.arena import Arena
from zramd.store.pages import Pages
from zramd.store.recovery import recover
from zramd.store.zcomp import Algorithm, Comp

MIB = 1 << 20


def store(slots: int = 600, algorithm: str = "lz4", **options: Any) -> Pages:
    return Pages(Arena(slots * PAGE, algorithm, **options), Comp(Algorithm.parse(algorithm)))


def recovered(fd: int) -> tuple[Pages, list[int]]:
    arena = Arena.adopt(fd)
    return recover(arena, Comp(Algorithm.parse(arena.header.algorithm)))


def whole(pages: Pages) -> bytes:
    return pages.read(0, pages.arena.slots * PAGE)


def clone(fd: int, copy: int | None = None) -> int:
    """A copy of an arena, holes and all; in this file, which is empty, or a new one in memory."""
    if copy is None:
        copy = os.memfd_create("zramd-arena")
    size = os.fstat(fd).st_size
    os.ftruncate(copy, size)
    at = 0
    while True:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            return copy
        end = os.lseek(fd, at, os.SEEK_HOLE)
        os.pwrite(copy, os.pread(fd, end - at, at), at)
        at = end


SLOTS = 96


@functools.lru_cache(10_000)
def version(slot: int, number: int) -> bytes:
    kind = number % 8
    if kind == 0:
        return ZEROS
    if kind == 1:
        return filled(slot << 32 | number)
    if kind == 2:
        return filled(1 << 63 | slot << 32 | number)
    return tagged(slot, 0, number)


class Journal:
    """What each slot was asked for and has been promised, in memory that parent and child share."""

    def __init__(self) -> None:
        self._map = mmap.mmap(-1, 16 * PAGE)
        words = memoryview(self._map).cast("Q")
        self.begun, self.done, self.rest = words[:SLOTS], words[SLOTS : 2 * SLOTS], words[-2:]

    def request(self, pages: Pages, first: int, last: int, number: int) -> None:
        """Make these slots that version, of which 0 is a discard."""
        for slot in range(first, last):
            self.begun[slot] = number
        if number % 8 == 0:
            pages.discard(first * PAGE, (last - first) * PAGE)
        else:
            data = b"".join(version(slot, number) for slot in range(first, last))
            pages.write(first * PAGE, data)
        for slot in range(first, last):
            self.done[slot] = number

    def part(self, pages: Pages, slot: int) -> None:
        """Write a part of a page as it is already."""
        pages.write(slot * PAGE + 9, version(slot, self.done[slot])[9:99])

    def check(self, pages: Pages, lost: list[int]) -> None:
        """What was promised is there, what was asked for may be; from here on it is known."""
        assert lost == []
        for slot in range(SLOTS):
            page = pages.read(slot * PAGE, PAGE)
            if page != version(slot, self.done[slot]):
                assert page == version(slot, self.begun[slot]), f"slot {slot} is neither"
                self.done[slot] = self.begun[slot]
        audit(pages, snug=False)


def killed(child: int) -> bool:
    """Wait for the child; False where it has ended by itself."""
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0, "the child has failed"
    return False


def fork(body: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        try:
            body()
            os._exit(0)
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(1)
    return child


def work_for_ever(pages: Pages, journal: Journal, seed: int) -> None:
    """Three threads write, each to slots of its own; this one compacts."""

    def write(share: range) -> None:
        numbers = random.Random(seed * 31 + share.start)
        number = max(journal.begun[slot] for slot in share)
        while True:
            number += 1
            first = numbers.choice(share)
            if number % 9 == 0:
                journal.part(pages, first)
            else:
                last = min(share.stop, first + numbers.randrange(1, 20))
                journal.request(pages, first, last, number)

    third = SLOTS // 3
    for start in range(0, SLOTS, third):
        threading.Thread(target=write, args=(range(start, start + third),), daemon=True).start()
    while True:
        time.sleep(0.0005)
        pages.compact()


def some_of_all() -> Pages:
    """A store with pages of every kind, in two table pages."""
    pages = store(700)
    numbers = random.Random(5)
    kinds = [*map(noise, range(9)), *map(text, range(30)), *map(filled, contents.WORDS), ZEROS]
    kinds += [contents.part_noise(n, n * 97) for n in range(1, 40)]
    for _ in range(3):
        for slot in numbers.sample([*range(150), *range(500, 600)], 120):
            pages.write(slot * PAGE, numbers.choice(kinds))
        pages.discard(numbers.randrange(120) * PAGE, 20 * PAGE)
    return pages


def pages_of(pages: Pages) -> list[bytes | None]:
    """All pages, None for those that are corrupt."""
    found: list[bytes | None] = []
    for slot in range(pages.arena.slots):
        try:
            found.append(pages.read(slot * PAGE, PAGE))
        except Corrupt:
            found.append(None)
    return found


def use_up(pages: Pages) -> None:
    """A recovered store is sound, whatever it was made of: all can be written, and it is there."""
    audit(pages, snug=False)
    pages.compact()
    audit(pages, snug=False)
    for slot in range(0, pages.arena.slots, 3):
        pages.write(slot * PAGE, text(slot % 5))
    audit(pages, snug=False)
    pages.discard(0, pages.arena.slots * PAGE)
    assert audit(pages, snug=False).pages == 0
    pages.close()

"""A snapshot of a store in use: all of it as it was at one moment, while it goes on changing.

1. The moment: with all slot locks held, and no compaction under way, remember which table pages are
   occupied, and have the pool hold all spans that there are (`Pool.hold`): from now on no object of
   theirs changes, also where it is given back.
2. The table, a page at a time, under its slot lock. Who changes a page before that has it copied
   first (`keep`, under the same lock). So each is written as it was at the moment.
3. The span map as it is by now. It names all spans of the moment; what it names beside them holds
   nothing that the table of the moment names.
4. The spans, from the first to the last. Each is let go when it has been written.

Promises
1. The snapshot is what a kill at the moment would have left: a request that had ended is in it, one
   that had not begun is not, of one under way it may have a part.
2. Others wait for all slot locks once, for microseconds; for one as long as it takes to copy a
   table page; and for the pool's as long as it takes to copy PIECE bytes. Who finds no room while
   objects are held waits until some are let go, but no longer than PATIENCE_S in all: then the
   snapshot gives way.
3. However it ends, nothing is held any more.

Assumes that there is one at a time, and no compaction while anything is held.
"""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Final

from zramd.errors import SaveFailed
from zramd.store import PAGE
from zramd.store.arena import Arena
from zramd.store.image import BLOCK, Snapshot
from zramd.store.pace import Pace
from zramd.store.pool import Pool

PIECE: Final = BLOCK // 2
"""Copied, counted and written in a turn (`pace.py`), which takes 0.3 ms. Whole blocks added 0.4 ms
more to the 99th percentile of 4 KiB requests."""

PATIENCE_S: Final = 1.0
"""Enough for a GiB to memory, and nobody takes a device for dead that stands still so long."""


class Saving:
    """One snapshot; `begin`, `write_to`, and `end` in any case."""

    def __init__(self, arena: Arena, pool: Pool, pace: Pace) -> None:
        self._arena = arena
        self._pool = pool
        self._pace = pace
        self._header = b""
        self._of_the_moment = b""  # 1 for a table page that was occupied
        self._todo = bytearray()  # 1 for one of these that is not copied yet
        self._copies: dict[int, bytes] = {}
        self._progress = threading.Condition()
        self._is_over = False
        self._why_over = ""
        self.let_go = 0
        """How often something was let go; who waits for more looks here before he finds no room."""

    def begin(
        self, slot_locks: Sequence[threading.Lock], publish: Callable[["Saving"], None]
    ) -> None:
        """Move 1. `publish` has whoever changes a table page call `keep` from now on."""
        with ExitStack() as locked:
            for lock in slot_locks:
                locked.enter_context(lock)
            self._header = self._arena.map[:PAGE]
            self._of_the_moment = bytes(self._arena.table_pages.occupied)
            self._todo[:] = self._of_the_moment
            self._pool.hold()
            publish(self)

    def keep(self, page: int) -> None:
        """A table page is about to change; the caller holds its slot lock."""
        if self._todo[page]:
            self._copies[page] = self._take_locked(page)

    def _take_locked(self, page: int) -> bytes:
        self._todo[page] = 0
        return self._arena.map[(1 + page) * PAGE : (2 + page) * PAGE]

    def write_to(
        self, fd: int, slot_locks: Sequence[threading.Lock], checkpoint: Callable[[], None]
    ) -> None:
        """Moves 2 to 4. Calls `checkpoint` now and then, with no lock held; what that raises ends
        it. Raises SaveFailed."""
        file = Snapshot(fd)
        file.add_header(self._header)
        page = self._of_the_moment.find(1)
        while page >= 0:
            with slot_locks[page % len(slot_locks)]:
                block = self._take_locked(page) if self._todo[page] else self._copies.pop(page)
            self._must_go_on(checkpoint)
            file.add((1 + page) * PAGE, block)
            page = self._of_the_moment.find(1, page + 1)
        arena, pool = self._arena, self._pool
        for page in arena.map_pages.pages():
            at = arena.header.map_at + page * PAGE
            file.add(at, arena.map[at : at + PAGE])
        buffer = memoryview(bytearray(PIECE))  # a new one each time would be faulted in each time
        for start, stop in pool.copy_held(buffer):
            self._must_go_on(checkpoint)  # or it was not held any more when it was copied
            file.add(start, buffer[: stop - start])
            if pool.let_go(stop):
                self._tell()
        self._must_go_on(checkpoint)  # or there may have been nothing held to go through
        file.end()

    def _must_go_on(self, checkpoint: Callable[[], None]) -> None:
        checkpoint()
        if self._why_over:
            raise SaveFailed(self._why_over)
        self._pace.keep()

    def end(self, publish: Callable[[None], None]) -> None:
        """Hold nothing any more. Who finds no room and sees no snapshot is refused, so that there
        is none is published after that; who waits looks again, so before he is told."""
        self._pool.let_all_go()
        publish(None)
        self._tell(is_over=True)

    def give_way(self, why: str) -> None:
        """Hold nothing any more, and have `write_to` raise SaveFailed, saying why; any thread may
        call, at any time after `begin`."""
        self._why_over = why
        self._pool.let_all_go()
        self._tell(is_over=True)

    def _tell(self, *, is_over: bool = False) -> None:
        with self._progress:
            self.let_go += 1
            self._is_over |= is_over
            self._progress.notify_all()

    def makes_room(self, let_go: int, until: float) -> bool:
        """Whether something has been let go since that time; waits for it, and gives way when the
        monotonic clock says `until`."""
        with self._progress:
            self._progress.wait_for(
                lambda: self._is_over or self.let_go != let_go, until - time.monotonic()
            )
            if self._is_over or self.let_go != let_go:
                return self.let_go != let_go
        self.give_way("the device is full, and what is written to it goes before a snapshot")
        return True

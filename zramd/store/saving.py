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
2. Others wait for all slot locks once, for microseconds, and for one as long as it takes to copy a
   table page. Who finds no room while objects are held waits until some are let go.
3. However it ends, nothing is held any more.

Assumes that there is one at a time, and no compaction meanwhile.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from zramd.errors import SaveFailed
from zramd.store import PAGE
from zramd.store.arena import Arena
from zramd.store.header import SNAPSHOT_MAGIC
from zramd.store.image import BLOCK, Index, write
from zramd.store.pool import Pool
from zramd.store.zcomp import Buffer


class Saving:
    """One snapshot; `begin`, `write_to`, and `end` in any case."""

    def __init__(self, arena: Arena, pool: Pool) -> None:
        self._arena = arena
        self._pool = pool
        self._header = b""
        self._of_the_moment = b""  # 1 for a table page that was occupied
        self._todo = bytearray()  # 1 for one of these that is not copied yet
        self._copies: dict[int, bytes] = {}
        self._progress = threading.Condition()
        self._ended = False
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
        file = _File(fd)
        file.add(0, SNAPSHOT_MAGIC + self._header[len(SNAPSHOT_MAGIC) :])
        page = self._of_the_moment.find(1)
        while page >= 0:
            with slot_locks[page % len(slot_locks)]:
                block = self._take_locked(page) if self._todo[page] else self._copies.pop(page)
            file.add((1 + page) * PAGE, block)
            checkpoint()
            page = self._of_the_moment.find(1, page + 1)
        arena, pool = self._arena, self._pool
        for page in arena.map_pages.pages():
            at = arena.header.map_at + page * PAGE
            file.add(at, arena.map[at : at + PAGE])
        buffer = memoryview(bytearray(BLOCK))  # a new one each time would be faulted in each time
        for start, stop in pool.held(BLOCK):
            part = buffer[: stop - start]
            part[:] = arena.view[start:stop]  # others change what is free there
            file.add(start, part)
            if pool.let_go(stop):
                self._tell()
            checkpoint()
        file.end()

    def end(self, publish: Callable[[None], None]) -> None:
        """Hold nothing any more. Who finds no room and sees no snapshot is refused, so that there
        is none is published after that; who waits looks again, so before he is told."""
        self._pool.let_all_go()
        publish(None)
        self._tell(ended=True)

    def _tell(self, *, ended: bool = False) -> None:
        with self._progress:
            self.let_go += 1
            self._ended = ended
            self._progress.notify_all()

    def wait(self, let_go: int) -> None:
        """Until more has been let go than at that time, or all."""
        with self._progress:
            self._progress.wait_for(lambda: self._ended or self.let_go != let_go)


class _File:
    """Blocks, and then their index."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._index = Index()
        self._position = 0

    def add(self, at: int, block: Buffer) -> None:
        self._index.add(at, block)
        self._write(block)

    def end(self) -> None:
        self._write(self._index.pack(self._position))

    def _write(self, data: Buffer) -> None:
        try:
            write(self._fd, data, self._position)
        except OSError as error:
            raise SaveFailed(f"the snapshot cannot be written: {error.strerror}") from error
        self._position += len(data)

"""The memory of an arena, and somebody who is told of every look and every store before it is done.

A store of several bytes is a memcpy, which a kill may cut anywhere: it is done in two pieces, the
first of an odd number of bytes. An element of a table is stored at once.
"""

from typing import Any

from zramd.store import PAGE
from zramd.store.arena import Arena
from zramd.store.header import FIGURES_AT


class Watcher:
    """Who is told; `at` is a byte of the arena. What is raised ends the look or the store."""

    def look(self, at: int, size: int) -> None:
        pass

    def store(self, at: int, content: bytes) -> None:
        """This piece is about to be stored."""

    def punch(self, at: int, size: int) -> None:
        """This range is about to be given back."""

    def stored(self) -> None:
        """All of a store is done, or a punch."""


class Watched:
    """Memory that begins at byte `at` of an arena."""

    def __init__(self, memory: Any, at: int, watcher: Watcher) -> None:
        self._memory = memory
        self._bytes = memoryview(memory).cast("B")
        self._at = at
        self._watcher = watcher

    def __getitem__(self, key: Any) -> Any:
        start, stop = self._range(key)
        self._watcher.look(self._at + start, stop - start)
        return self._memory[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        start, stop = self._range(key)
        if isinstance(key, slice):
            content = bytes(value)
            middle = len(content) // 2 | 1
            for piece in content[:middle], content[middle:]:
                self._watcher.store(self._at + start, piece)
                self._bytes[start : start + len(piece)] = piece
                start += len(piece)
        else:
            self._watcher.store(self._at + start, value.to_bytes(stop - start, "little"))
            self._memory[key] = value
        self._watcher.stored()

    def _range(self, key: Any) -> tuple[int, int]:
        size = getattr(self._memory, "itemsize", 1)
        if not isinstance(key, slice):
            return key * size, (key + 1) * size
        start, stop, _ = key.indices(len(self._memory))
        return start * size, stop * size

    def release(self) -> None:
        self._bytes.release()
        self._memory.release()

    def close(self) -> None:
        self._bytes.release()
        self._memory.close()


def watch(arena: Arena, watcher: Watcher) -> None:
    """From now on tell of all that is done to this arena, and by it."""
    header = arena.header
    for name, at in (
        ("map", 0),
        ("table", PAGE),
        ("span_map", header.map_at),
        ("figures", FIGURES_AT),
    ):
        setattr(arena, name, Watched(getattr(arena, name), at, watcher))
    punch = arena.punch

    def watched_punch(offset: int, size: int) -> None:
        watcher.punch(offset, size)
        punch(offset, size)
        watcher.stored()

    arena.punch = watched_punch

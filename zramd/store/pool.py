"""The pool: objects of 1 to 4096 bytes in spans of one size class each; zsmalloc's part.

A span is 64 KiB of equal objects; none crosses its end. Classes from 1 KiB up are the sizes that
divide a span with the least left over, 65536 // n for n objects; below that they step by 16 bytes.
A span is opened in parts, as its objects are wanted: with 113 classes whole spans would keep 3 MiB
waiting, parts keep 1 MiB (used / compressed of 260 MiB of programs: 1.040 and 1.022).

Promises
1. An object taken is nobody else's until it is given back.
2. `take` gives all objects asked for or none; refused, it has taken no memory, but for a page of
   the span map that serves 256 MiB.
3. A span with no object left goes back to the system at once, and its memory off the account.
4. A span's class stands in the span map before its first object is handed out.

Assumes that an object is given back only after its slot word is gone. One lock guards all of it,
never held while bytes are copied or compressed.
"""

import heapq
import threading
from collections.abc import Iterable
from typing import Final

from zramd.errors import Corrupt, StoreFull
from zramd.store import PAGE
from zramd.store.arena import SPAN, Arena

PART: Final = SPAN // 4
"""What a span is opened by, and charged."""

UNIT: Final = 16
"""Objects begin at multiples of this; with 8, the table's address field would be a bit longer."""


def _classes() -> list[int]:
    exact = {SPAN // n // UNIT * UNIT for n in range(16, 65)}
    small = set(range(UNIT, min(exact), UNIT))
    return sorted(exact | small)


CLASSES: Final = _classes()
"""Object size of each class, ascending."""

CLASS_OF: Final = bytes(
    next(c for c, size in enumerate(CLASSES) if size >= units * UNIT)
    for units in range(CLASSES[-1] // UNIT + 1)
)
"""Class for a length, indexed by the length in units, rounded up."""


class Span:
    """64 KiB of objects of one class, from `base` on, the first `opened` bytes in use.

    `free` holds the addresses of the objects not taken, `capacity` counts those and the taken.
    """

    __slots__ = ("base", "capacity", "cls", "free", "index", "opened")

    def __init__(self, index: int, base: int, cls: int) -> None:
        self.index = index
        self.base = base
        self.cls = cls
        self.opened = 0
        self.capacity = 0
        self.free: list[int] = []

    def open_part(self) -> None:
        """Make the objects that end in the next part free to take; it is charged already."""
        size = CLASSES[self.cls]
        self.opened += PART
        first, self.capacity = self.capacity, self.opened // size
        # Taken from the end: addresses rise, so a span that is filled in order is read in order.
        objects = range(self.base + first * size, self.base + self.capacity * size, size)
        self.free.extend(reversed(objects))

    def close_part(self) -> None:
        """Take back the last `open_part`, whose objects are all free."""
        self.opened -= PART
        self.capacity = self.opened // CLASSES[self.cls]
        end = self.base + self.capacity * CLASSES[self.cls]
        self.free[:] = [address for address in self.free if address < end]


class Pool:
    """The objects of one arena."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._lock = threading.Lock()  # after every slot lock; protects all below
        self.spans: dict[int, Span] = {}
        # Per class, the spans with room; the last one is taken from, so others may run empty.
        self._partial: list[dict[int, Span]] = [{} for _ in CLASSES]
        # Per class, the free list of the span being taken from: what makes `take` short.
        self._open: list[list[int]] = [[] for _ in CLASSES]
        # Per class, the span that may have parts left to open.
        self._newest: list[Span | None] = [None for _ in CLASSES]
        self._grown: list[Span] = []  # spans to which the present take has added a part
        self._vacant: list[int] = []  # a heap of indexes given back, lowest first
        self._unused = 0  # indexes from here on were never used

    def close(self) -> None:
        """Drop the bookkeeping, which an opener of an old generation would keep alive."""
        self.spans.clear()
        self._partial.clear()
        self._open.clear()
        self._newest.clear()
        self._grown.clear()
        self._vacant.clear()

    def take(self, lengths: Iterable[int]) -> list[int]:
        """Addresses of new objects of these lengths, in order. Raises StoreFull, taking none."""
        taken: list[int] = []
        classes = CLASS_OF
        open_lists = self._open
        with self._lock:
            self._grown.clear()
            try:
                for length in lengths:
                    cls = classes[length + 15 >> 4]
                    free = open_lists[cls]
                    if not free:
                        free = self._open_span_locked(cls)
                    taken.append(free.pop())
            except StoreFull:
                self._give_locked(taken)
                self._shrink_locked()
                raise
        return taken

    def give(self, addresses: Iterable[int]) -> None:
        """Give objects back."""
        with self._lock:
            self._give_locked(addresses)

    def _open_span_locked(self, cls: int) -> list[int]:
        """The free list, not empty, of the span from now on taken from. Raises StoreFull."""
        partial = self._partial[cls]
        # A full span leaves `partial` here, when the next object is wanted, not when it fills up.
        while partial:
            _, span = partial.popitem()
            if span.free:
                break
        else:
            span = self._grow_locked(cls)
        partial[span.index] = span
        self._open[cls] = span.free
        return span.free

    def _grow_locked(self, cls: int) -> Span:
        """A span with a new part: the class's newest while it has parts left, or a new one."""
        arena = self._arena
        span = self._newest[cls]
        if span is not None and span.opened < SPAN:
            arena.occupy(PART)
            span.open_part()
            self._grown.append(span)
            return span
        index = self._vacant[0] if self._vacant else self._unused
        if index == len(arena.span_map):
            raise StoreFull("every span of the arena is in use")
        if not arena.map_pages.occupied[index // PAGE]:
            arena.map_pages.occupy(index // PAGE)
        arena.occupy(PART)
        if self._vacant:
            heapq.heappop(self._vacant)
        else:
            self._unused += 1
        arena.span_map[index] = cls + 1
        span = self.spans[index] = self._newest[cls] = Span(
            index, arena.spans_at + index * SPAN, cls
        )
        span.open_part()
        return span

    def _shrink_locked(self) -> None:
        """Undo what the refused take has grown; its objects have been given back."""
        for span in reversed(self._grown):
            if self.spans.get(span.index) is span:
                span.close_part()
                self._newest[span.cls] = span  # a newer one was opened by this take, and is gone
                self._arena.vacate(span.base + span.opened, PART)

    def _give_locked(self, addresses: Iterable[int]) -> None:
        spans, base = self.spans, self._arena.spans_at
        for address in addresses:
            span = spans[(address - base) // SPAN]
            free = span.free
            free.append(address)
            if len(free) == span.capacity:
                self._release_locked(span)
            elif len(free) == 1:
                self._partial[span.cls].setdefault(span.index, span)

    def _release_locked(self, span: Span) -> None:
        if self._open[span.cls] is span.free:
            self._open[span.cls] = []
        if self._newest[span.cls] is span:
            self._newest[span.cls] = None
        self._partial[span.cls].pop(span.index, None)
        del self.spans[span.index]
        self._arena.span_map[span.index] = 0
        self._arena.vacate(span.base, span.opened)
        heapq.heappush(self._vacant, span.index)

    def check(self, taken: dict[int, int]) -> None:
        """Compare with the objects that the table names, {address: length}. Raises Corrupt.

        For a pool at rest: every object lies in a span of its class, is not free as well, and
        no object is taken that the table does not name.
        """
        arena = self._arena
        with self._lock:
            left = {index: span.capacity - len(span.free) for index, span in self.spans.items()}
            for address, length in taken.items():
                index, at = divmod(address - arena.spans_at, SPAN)
                span = self.spans.get(index)
                if span is None:
                    raise Corrupt(f"object at {address:#x} lies in no span")
                size = CLASSES[span.cls]
                if arena.span_map[index] != span.cls + 1:
                    raise Corrupt(f"span {index} has class {span.cls}, the span map disagrees")
                if at % size or length > size or at // size >= span.capacity:
                    raise Corrupt(f"object at {address:#x} does not fit its span's class {size}")
                if address in span.free:
                    raise Corrupt(f"object at {address:#x} is free and in use")
                left[index] -= 1
        lost = {index: count for index, count in left.items() if count}
        if lost:
            raise Corrupt(f"objects taken that no slot names, by span: {lost}")

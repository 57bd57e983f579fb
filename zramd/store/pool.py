"""The pool: objects of 1 to 4096 bytes in spans of one size class each; zsmalloc's part.

A span is 64 KiB of equal objects; none crosses its end. Classes from 1 KiB up are the sizes that
divide a span with the least left over, 65536 // n for n objects; below that they step by 16 bytes.
A span is opened in parts, as its objects are wanted: with 113 classes whole spans would keep 3 MiB
waiting, parts keep 1 MiB (used / compressed of 260 MiB of programs: 1.040 and 1.022).

While a snapshot is made (`saving.py`), the pool holds the spans that it has not reached: what is
given back there is nobody's until it is let go, and the spans stay.

A compaction (`compaction.py` moves the bytes) empties the sparsest spans of each class, as many as
the free objects of the others can take in: `begin_compaction` marks them as leaving, and then
nothing new comes to lie there. `end_compaction` makes ordinary again what is not empty by then.

Promises
1. An object taken is nobody else's until it is given back.
2. `take` gives all objects asked for or none; refused, it has taken no memory, but for a page of
   the span map that serves 256 MiB.
3. A span with no object left goes back to the system at once, and its memory off the account.
4. A span's class stands in the span map before its first object is handed out.
5. Compaction takes no memory: what moves goes where room is already.

Assumes that an object is given back only after its slot word is gone, and that there is one
compaction at a time. One lock guards all of it, never held while bytes are compressed, nor, but for
a snapshot, copied.
"""

import heapq
import threading
from collections.abc import Iterable, Iterator
from typing import Final

from zramd.errors import Corrupt, StoreFull
from zramd.store import PAGE, SPAN
from zramd.store.arena import Arena

PARTS: Final = 4
PART: Final = SPAN // PARTS
"""What a span is opened by, and charged."""

UNIT: Final = 16
"""Objects begin at multiples of this; with 8, the table's address field would be a bit longer."""


def _classes() -> list[int]:
    exact = {SPAN // n // UNIT * UNIT for n in range(16, 65)}
    small = set(range(UNIT, min(exact), UNIT))
    return sorted(exact | small)


CLASSES: Final = _classes()
"""Object size of each class, ascending."""

PER_SPAN: Final = [SPAN // size for size in CLASSES]
"""Objects of a whole span of each class."""

CLASS_OF: Final = bytes(
    next(c for c, size in enumerate(CLASSES) if size >= units * UNIT)
    for units in range(CLASSES[-1] // UNIT + 1)
)
"""Class for a length, indexed by the length in units, rounded up."""

NUMBER_SHIFT: Final = SPAN.bit_length() - 1
"""An address shifted down by this is the number of its span, counted from the arena's start."""


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

    def restore(self, mask: int, parts: int) -> None:
        """Open so many parts, with the objects in use that the mask says."""
        size = CLASSES[self.cls]
        self.opened = parts * PART
        self.capacity = count = self.opened // size
        if mask != (1 << count) - 1:
            backwards = range(self.base + (count - 1) * size, self.base - 1, -size)
            bits = f"{mask:0{count}b}"  # from the last object to the first
            self.free = [
                address for address, bit in zip(backwards, bits, strict=True) if bit == "0"
            ]

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
        # Per class, the objects that are open and not taken, also in spans that are leaving.
        self._free = [0 for _ in CLASSES]
        # Per class, the span that may have parts left to open: no other has.
        self._newest: list[Span | None] = [None for _ in CLASSES]
        self._grown: list[Span] = []  # spans to which the present take has added a part
        self._vacant: list[int] = []  # a heap of indexes given back, lowest first
        self._unused = 0  # indexes from here on were never used
        self.leaving: dict[int, Span] = {}
        """The spans that compaction empties, by number. Who looks without the lock may be late."""
        self._given_back = 0  # pages, by the present compaction
        self._held = range(0)  # indexes of the spans that are held
        self._given_while_held: dict[int, list[int]] = {}  # by index, objects not to be taken yet

    def close(self) -> None:
        """Drop the bookkeeping, which an opener of an old generation would keep alive."""
        self.spans.clear()
        self._partial.clear()
        self._open.clear()
        self._newest.clear()
        self._free.clear()
        self._grown.clear()
        self._vacant.clear()
        self.leaving.clear()

    def restore(self, named: dict[int, int]) -> int:
        """Make the objects of a new pool those that are named: by the number of a span, whose class
        stands in the span map, a mask with bit n set where object n is in use; no mask is 0.

        Returns the bytes that the spans occupy, for the caller to charge. All but one of a class
        are opened to the end; which one need not be, no mask tells: the one of which that saves
        most. So they occupy no more than they did when the objects were taken. The one that was not
        open to the end then is among those to choose from, its objects in what was open of it; or
        nothing of it is named, and all others were open to the end.
        """
        arena, occupied = self._arena, 0
        first = arena.spans_at >> NUMBER_SHIFT
        parts = [PARTS for _ in CLASSES]
        chosen = [-1 for _ in CLASSES]
        for number, mask in named.items():
            cls = arena.span_map[number - first] - 1
            needed = -(-mask.bit_length() * CLASSES[cls] // PART)
            if needed < parts[cls]:
                parts[cls], chosen[cls] = needed, number
        with self._lock:
            for number, mask in named.items():
                cls = arena.span_map[number - first] - 1
                span = Span(number - first, number << NUMBER_SHIFT, cls)
                span.restore(mask, parts[cls] if number == chosen[cls] else PARTS)
                self.spans[span.index] = span
                occupied += span.opened
                self._free[cls] += len(span.free)
                if span.free:
                    self._partial[cls][span.index] = span
                if span.opened < SPAN:
                    self._newest[cls] = span
            self._unused = max(self.spans, default=-1) + 1
            self._vacant = [index for index in range(self._unused) if index not in self.spans]
        return occupied

    def take(self, lengths: Iterable[int], *, larger: bool = False) -> list[int]:
        """Addresses of new objects of these lengths, in order. Raises StoreFull, taking none.

        With `larger`, a length whose class has no room and cannot grow gets an object of the next
        larger class that has: full is then only what is full for all lengths.
        """
        taken: list[int] = []
        classes = CLASS_OF
        open_lists = self._open
        count = self._free
        with self._lock:
            self._grown.clear()
            try:
                for length in lengths:
                    cls = classes[length + 15 >> 4]
                    free = open_lists[cls]
                    if not free:
                        cls, free = self._open_span_locked(cls, larger)
                    taken.append(free.pop())
                    count[cls] -= 1
            except StoreFull:
                self._give_locked(taken)
                self._shrink_locked()
                raise
        return taken

    def take_one(self, length: int) -> int:
        """`take` of one object, 0.35 us less where a span of its class has room."""
        with self._lock:
            cls = CLASS_OF[length + 15 >> 4]
            free = self._open[cls]
            if free:
                self._free[cls] -= 1
                return free.pop()
        return self.take([length])[0]

    def give(self, addresses: Iterable[int]) -> None:
        """Give objects back."""
        with self._lock:
            if self._held:
                addresses = self._hold_back_locked(addresses)
            self._give_locked(addresses)

    def _open_span_locked(self, cls: int, larger: bool) -> tuple[int, list[int]]:
        """The class and the free list, not empty, of the span from now on taken from.

        Raises StoreFull.
        """
        free = self._room_locked(cls)
        if not free:
            try:
                free = self._grow_locked(cls)
            except StoreFull:
                found = self._larger_locked(cls) if larger else None
                if found is None:
                    raise
                return found
        return cls, free

    def _room_locked(self, cls: int) -> list[int]:
        """The free list of a span of this class that has room without growing, empty if none."""
        partial = self._partial[cls]
        # A full span leaves `partial` here, when the next object is wanted, not when it fills up.
        while partial and not self._open[cls]:
            index, span = partial.popitem()
            if span.free:
                partial[index] = span
                self._open[cls] = span.free
        return self._open[cls]

    def _larger_locked(self, cls: int) -> tuple[int, list[int]] | None:
        """The next larger class with room, or with a part that can still be opened."""
        may_grow = True
        for larger in range(cls + 1, len(CLASSES)):
            free = self._room_locked(larger)
            newest = self._newest[larger]
            if not free and may_grow and newest is not None and newest.opened < SPAN:
                try:
                    free = self._grow_locked(larger)
                except StoreFull:
                    may_grow = False  # a part costs the same in every class
            if free:
                return larger, free
        return None

    def _grow_locked(self, cls: int) -> list[int]:
        """The free list, from now on taken from, of a span with a new part: the class's newest
        while it has parts left, or a new one. Raises StoreFull."""
        arena = self._arena
        span = self._newest[cls]
        if span is not None and span.opened < SPAN:
            arena.occupy(span.base + span.opened, PART)
            self._open_part_locked(span)
            self._grown.append(span)
            return span.free
        index = self._vacant[0] if self._vacant else self._unused
        if index == arena.spans:
            raise arena.full()
        if not arena.map_pages.occupied[index // PAGE]:
            arena.map_pages.occupy(index // PAGE)
        base = arena.spans_at + index * SPAN
        arena.occupy(base, PART)
        if self._vacant:
            heapq.heappop(self._vacant)
        else:
            self._unused += 1
        arena.span_map[index] = cls + 1
        span = self.spans[index] = self._newest[cls] = Span(index, base, cls)
        self._open_part_locked(span)
        return span.free

    def _open_part_locked(self, span: Span) -> None:
        before = span.capacity
        span.open_part()
        self._free[span.cls] += span.capacity - before
        self._partial[span.cls][span.index] = span
        self._open[span.cls] = span.free

    def _shrink_locked(self) -> None:
        """Undo what the refused take has grown; its objects have been given back."""
        for span in reversed(self._grown):
            if self.spans.get(span.index) is span:
                before = span.capacity
                span.close_part()
                self._free[span.cls] -= before - span.capacity
                self._newest[span.cls] = span  # a newer one was opened by this take, and is gone
                self._arena.vacate(span.base + span.opened, PART)

    def _give_locked(self, addresses: Iterable[int]) -> None:
        spans, base = self.spans, self._arena.spans_at
        count, opened = self._free, self._open
        for address in addresses:
            span = spans[(address - base) // SPAN]
            free = span.free
            free.append(address)
            count[span.cls] += 1
            if len(free) == span.capacity:
                self._release_locked(span)
            elif len(free) == 1 and address >> NUMBER_SHIFT not in self.leaving:
                self._partial[span.cls].setdefault(span.index, span)
                # Where all spans are full an overwrite would look for this one: 2 us of a write.
                if not opened[span.cls]:
                    opened[span.cls] = free

    def _release_locked(self, span: Span) -> None:
        if self._open[span.cls] is span.free:
            self._open[span.cls] = []
        if self._newest[span.cls] is span:
            self._newest[span.cls] = None
        self._partial[span.cls].pop(span.index, None)
        if self.leaving.pop(span.base >> NUMBER_SHIFT, None) is not None:
            self._given_back += span.opened // PAGE
        self._free[span.cls] -= span.capacity
        del self.spans[span.index]
        self._arena.span_map[span.index] = 0
        self._arena.vacate(span.base, span.opened)
        heapq.heappush(self._vacant, span.index)

    def in_use(self) -> Iterator[tuple[int, int]]:
        """(start, stop) of all of the arena that is in use, ascending, neighbours not merged. For
        an arena at rest."""
        arena = self._arena
        yield 0, PAGE
        for start, region in ((PAGE, arena.table_pages), (arena.header.map_at, arena.map_pages)):
            for page in region.pages():
                yield start + page * PAGE, start + (page + 1) * PAGE
        for index in sorted(self.spans):
            span = self.spans[index]
            yield span.base, span.base + span.opened

    def room(self) -> int:
        """Bytes that can still be occupied, in whole spans at most."""
        arena = self._arena
        spans = (arena.spans - len(self.spans)) * SPAN
        return min(spans, arena.limit - arena.used) if arena.limit else spans

    # Compaction

    def gain(self) -> int:
        """Bytes that a compaction would give back now. Microseconds; where other threads take and
        give, and during a compaction, it is an estimate."""
        return 0 if self._held else SPAN * sum(self._emptiable())

    def _emptiable(self) -> list[int]:
        """Per class, how many spans can be emptied into the others.

        What n whole spans hold and what is free in them make n times PER_SPAN objects, so what
        they hold finds room in the others just when so many objects are free in all.
        """
        return [free // whole for free, whole in zip(self._free, PER_SPAN, strict=True)]

    def begin_compaction(self) -> None:
        """Mark the spans to be emptied as leaving. Until `end_compaction` nobody takes there.

        They are chosen without the lock, which some 100,000 spans would have us hold for long: what
        others do meanwhile makes the choice a little worse, and that is all.
        """
        with self._lock:
            self._given_back = 0
            counts = [] if self._held else self._emptiable()
        for cls, count in enumerate(counts):
            if count:
                for span in self._sparsest(cls, count):
                    with self._lock:
                        self._leave_locked(span)

    def _sparsest(self, cls: int, count: int) -> list[Span]:
        with self._lock:
            spans = list(self._partial[cls].values())
        # One that is not opened to the end stays: it must be the newest, the only one of its kind.
        whole = [span for span in spans if span.opened == SPAN]
        return heapq.nlargest(count, whole, key=lambda span: len(span.free))

    def _leave_locked(self, span: Span) -> None:
        if self.spans.get(span.index) is span and span.opened == SPAN and span.free:
            self.leaving[span.base >> NUMBER_SHIFT] = span
            self._partial[span.cls].pop(span.index, None)
            if self._open[span.cls] is span.free:
                self._open[span.cls] = []

    def destinations(self, addresses: Iterable[int]) -> list[int]:
        """For each of these objects one of its span's class to move to, taken; 0 where its span is
        not leaving (any more) or its class has no room."""
        taken: list[int] = []
        with self._lock:
            for address in addresses:
                span = self.leaving.get(address >> NUMBER_SHIFT)
                free = self._room_locked(span.cls) if span is not None else None
                if span is None or not free:
                    taken.append(0)
                else:
                    taken.append(free.pop())
                    self._free[span.cls] -= 1
        return taken

    def end_compaction(self) -> int:
        """Make ordinary what is still leaving; returns how many pages this compaction gave back."""
        with self._lock:
            for span in self.leaving.values():
                if span.free:
                    self._partial[span.cls][span.index] = span
            self.leaving.clear()
            return self._given_back

    # Saving

    def hold(self) -> None:
        """Hold all spans that there are. Not during a compaction."""
        with self._lock:
            self._held = range(self._unused)

    def copy_held(self, buffer: memoryview) -> Iterator[tuple[int, int]]:
        """Copy what is held into `buffer`, of a span or more, ascending, as many spans at a time as
        lie together and fit; (start, stop) of each part. A span that has come since in the place of
        one that was gone may be among them."""
        spans, view = self.spans, self._arena.view
        for index in self._held:
            if index < self._held.start or index not in spans:
                continue
            with self._lock:
                # A take that is refused gives back what it has opened. A look at that would fill a
                # hole of the mapping, behind the account's back; with the lock it is not seen.
                span = spans.get(index)
                if span is None:
                    continue
                start = stop = span.base
                while span is not None and span.base == stop < start + len(buffer):
                    stop += span.opened
                    span = spans.get(span.index + 1)
                buffer[: stop - start] = view[start:stop]
            yield start, stop

    def let_go(self, stop: int) -> int:
        """Hold no span that begins before this address; how many objects that lets go."""
        index = -(-(stop - self._arena.spans_at) // SPAN)
        count = 0
        with self._lock:
            for passed in range(self._held.start, index):
                addresses = self._given_while_held.pop(passed, [])
                self._give_locked(addresses)
                count += len(addresses)
            self._held = range(index, self._held.stop)
        return count

    def let_all_go(self) -> None:
        """Hold none. Any thread may call, also while another goes through `copy_held`."""
        with self._lock:
            self._held = range(0)
        while self._given_while_held:
            with self._lock:  # a span at a time: 200,000 objects at once took 0.2 s
                if self._given_while_held:
                    self._give_locked(self._given_while_held.popitem()[1])

    def _hold_back_locked(self, addresses: Iterable[int]) -> list[int]:
        """Those of `addresses` that are not held."""
        base, held = self._arena.spans_at, self._held
        free = []
        for address in addresses:
            index = (address - base) // SPAN
            if index in held:
                self._given_while_held.setdefault(index, []).append(address)
            else:
                free.append(address)
        return free

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
            free = [0 for _ in CLASSES]
            for span in self.spans.values():
                free[span.cls] += len(span.free)
                if span.free and span.index not in self._partial[span.cls]:
                    raise Corrupt(f"nobody will find what is free in span {span.index}")
            if free != self._free:
                raise Corrupt(f"objects free, by class: {free}, counted: {self._free}")
        lost = {index: count for index, count in left.items() if count}
        if lost:
            raise Corrupt(f"objects taken that no slot names, by span: {lost}")

"""Going on with an arena whose process was killed, at whatever instruction.

`Arena.adopt` has mapped it. The slot table is the truth; `recover` rebuilds all else from it:

1. Find the table's pages. Only what the system has in memory is looked at: a look at a hole of the
   mapping would fill it.
2. Check each word. One that names no object of a span of a fitting class is lost, and so are two
   that name the same object: nobody can say whose it is. Only then, each such word becomes LOST
   (`table.py`): its page reads as Corrupt, and as nothing else, until it is overwritten as a whole
   or discarded.
3. Zero the class of every span that no word names, or whose class is none.
4. Rebuild the pool: what no word names is free. So goes what a killed write or compaction held.
5. Give the system back all that is not in use, unless it is reserved: empty table pages, spans and
   parts of spans. Then, in a file, have disk for all that is: there are holes in what was not open
   to the end before, and in a copy.
6. Count. What a table does not tell comes from the header's figures.

Promises
1. After a kill, with the memory intact, nothing is lost: a page reads as its last completed write
   left it; one that a request was about to change, as before or after.
   And `used` is not more than it was, so not more than `limit` if it was not.
2. The arena occupies no more than `used`, or what is reserved.
3. Damage of table, span map and objects costs the pages that it is of, which read as Corrupt, and
   raises nothing here; NoMemory says that a disk is full. Not seen is damage that makes what could
   have been stored: other bytes of a raw page or a fill, or of an object that still decompresses;
   another word that is a fill, empty, or names an object that fits and that no other word names.
4. Killed itself, it can be repeated, and reports the same slots lost, with those of recoveries
   before.

Costs about 1 us for each page stored, and decompresses nothing. Assumes that nobody else uses the
arena. The order of stores on which all this rests stands in `arena.py`.
"""

import os
from collections.abc import Iterator
from typing import Final

from zramd.errors import NoMemory, StoreFull
from zramd.store import PAGE, SPAN
from zramd.store.arena import Arena, data_from
from zramd.store.header import COMPACTED, HUGE_SINCE, figure
from zramd.store.pages import HUGE_LENGTH, Counters, Pages
from zramd.store.pool import CLASSES, NUMBER_SHIFT, UNIT, Pool
from zramd.store.table import (
    ADDRESS_SHIFT,
    HUGE,
    INLINE,
    LENGTH_MASK,
    LENGTH_SHIFT,
    LOST,
    SAME,
    SLOTS_PER_TABLE_PAGE,
)
from zramd.store.zcomp import Comp

_KIND: Final = (1 << ADDRESS_SHIFT) - 1
"""The bits of a word that say length and flags of its object."""

_NEEDS: Final = {
    **{length << LENGTH_SHIFT: -(-length // UNIT) for length in range(1, HUGE_LENGTH)},
    8 << LENGTH_SHIFT | SAME: 1,
    PAGE << LENGTH_SHIFT | HUGE: PAGE // UNIT,
}
"""Every kind of object that is stored, and the units of space it needs."""
del _NEEDS[8 << LENGTH_SHIFT]  # 8 bytes are a fill

_UNITS: Final = SPAN // UNIT
_NUMBER_SHIFT: Final = ADDRESS_SHIFT + _UNITS.bit_length() - 1
"""A word shifted down by this is the number of its object's span, counted from the arena's start;
what is between it and the kind is the place in the span, in units."""

_SHARES: Final = 1 << 7
"""Marks a word while it is being lost because another names the same object; no kind has it."""

_ZEROS: Final = bytes(PAGE)


def recover(arena: Arena, comp: Comp) -> tuple[Pages, list[int]]:
    """The pages of an adopted arena, and the slots that are lost, ascending."""
    pages = Pages(arena, comp)
    for page in _in_memory(arena, arena.header.map_at, len(arena.map_pages.occupied)):
        arena.map_pages.occupied[page] = 1
    counters, named, lost = _check(arena)
    _zero_classes(arena, named)
    occupied = pages.pool.restore(named)
    if not arena.reserved:
        _give_back(arena, pages.pool)
    if arena.is_file:
        _back(arena, pages.pool)
    regions = arena.table_pages.occupied.count(1) + arena.map_pages.occupied.count(1)
    arena.used = (1 + regions) * PAGE + occupied
    arena.used_max = max(arena.used_max, arena.used)
    figures = arena.figures
    counters.huge_since = max(figure(figures, HUGE_SINCE), counters.huge)
    counters.compacted = figure(figures, COMPACTED)
    # They may differ from what stands there: a page is counted after it is published.
    figures[HUGE_SINCE], figures[COMPACTED] = counters.huge_since, counters.compacted
    pages.counters = counters
    return pages, lost


def _in_memory(arena: Arena, start: int, pages: int) -> Iterator[int]:
    """Which of the pages from byte `start` on are not holes."""
    at, stop = start, start + pages * PAGE
    while (at := data_from(arena.fd, at, stop)) < stop:
        end = min(os.lseek(arena.fd, at, os.SEEK_HOLE), stop)
        yield from range((at - start) // PAGE, -(-(end - start) // PAGE))
        at = end


def _check(arena: Arena) -> tuple[Counters, dict[int, int], list[int]]:
    """Moves 1 and 2: what is stored; per span, by number, a mask of the objects that are named; the
    slots that are lost."""
    memory, occupied = arena.map, arena.table_pages.occupied
    needs, more_than_any = _NEEDS, _UNITS + 1
    named: dict[int, int] = {}
    units_of: dict[int, int] = {}  # per span, by number, the size of its objects; 0: no span
    shared: set[int] = set()  # addresses, in units
    lost: list[int] = []
    pages = same = huge = size = 0
    for page in _in_memory(arena, PAGE, len(occupied)):
        content = memory[(page + 1) * PAGE : (page + 2) * PAGE]
        if content == _ZEROS:
            continue
        first = page * SLOTS_PER_TABLE_PAGE
        words = memoryview(content).cast("Q")[: arena.slots - first].tolist()
        for slot, word in enumerate(words, first):
            if word & INLINE:
                same += 1
                if word == LOST:
                    lost.append(slot)
            elif word:
                number = word >> _NUMBER_SHIFT
                units = units_of.get(number)
                if units is None:
                    units = units_of[number] = _units(arena, number)
                    named[number] = 0
                if needs.get(word & _KIND, more_than_any) <= units:
                    at = word >> ADDRESS_SHIFT & _UNITS - 1
                    n, rest = divmod(at, units)
                    if not rest and at + units <= _UNITS:
                        mask, bit = named[number], 1 << n
                        if mask & bit:
                            shared.add(word >> ADDRESS_SHIFT)
                        named[number] = mask | bit
                        size += word >> LENGTH_SHIFT & LENGTH_MASK
                        if word & HUGE:
                            huge += 1
                        elif word & SAME:
                            same += 1
                        continue
                if word & _SHARES:
                    shared.add(word >> ADDRESS_SHIFT)
                lost.append(slot)
                same += 1
        stored = len(words) - words.count(0)
        if stored:
            occupied[page] = 1
            pages += stored
    counters = Counters(pages=pages, compressed_bytes=size, same=same, huge=huge)
    if shared:
        for slot, word in _sharers(arena, shared, set(lost)):
            lost.append(slot)
            number = word >> _NUMBER_SHIFT
            named[number] &= ~(1 << (word >> ADDRESS_SHIFT & _UNITS - 1) // units_of[number])
            counters.compressed_bytes -= word >> LENGTH_SHIFT & LENGTH_MASK
            counters.huge -= bool(word & HUGE)
            counters.same += not word & SAME
        lost.sort()
    for slot in lost:
        arena.table[slot] = LOST
    for number in [number for number, mask in named.items() if not mask]:
        del named[number]
    return counters, named, lost


def _sharers(arena: Arena, shared: set[int], lost: set[int]) -> list[tuple[int, int]]:
    """The words, and their slots, that name one of these objects, beside those lost already.

    Were they lost one after the other, a kill would leave the last of them as if nobody else had
    named its object. So all are marked first, which is no word that passes the check, and still
    says which object it shares.
    """
    table = arena.table
    found = []
    for page in arena.table_pages.pages():
        first = page * SLOTS_PER_TABLE_PAGE
        words = table[first : first + SLOTS_PER_TABLE_PAGE].tolist()
        for slot, word in enumerate(words, first):
            is_object = word and not word & INLINE
            if is_object and word >> ADDRESS_SHIFT in shared and slot not in lost:
                found.append((slot, word))
    for slot, word in found:
        table[slot] = word | _SHARES
    return found


def _units(arena: Arena, number: int) -> int:
    """The size of the objects in this span, in units; 0 where it is none."""
    index = number - (arena.spans_at >> NUMBER_SHIFT)
    if 0 <= index < arena.spans and arena.map_pages.occupied[index // PAGE]:
        cls = arena.span_map[index]
        if 0 < cls <= len(CLASSES):
            return CLASSES[cls - 1] // UNIT
    return 0


def _zero_classes(arena: Arena, named: dict[int, int]) -> None:
    """Move 3; and which pages of the span map are occupied."""
    occupied, span_map = arena.map_pages.occupied, arena.span_map
    first = arena.spans_at >> NUMBER_SHIFT
    for page in arena.map_pages.pages():
        classes = bytes(span_map[page * PAGE : (page + 1) * PAGE])
        kept = 0
        if any(classes):
            for index, cls in enumerate(classes, page * PAGE):
                if cls:
                    if index + first in named:
                        kept = 1
                    else:
                        span_map[index] = 0
        occupied[page] = kept


def _give_back(arena: Arena, pool: Pool) -> None:
    """Move 5: punch all that lies between what is in use, where there is anything."""
    at = 0
    for start, stop in (*pool.in_use(), (arena.size, arena.size)):
        # In a file what has been taken and not been written is not told from a hole.
        if at < start and (arena.is_file or data_from(arena.fd, at, start) < start):
            arena.punch(at, start - at)
        at = stop


def _back(arena: Arena, pool: Pool) -> None:
    """Have disk for all that is in use. NoMemory where there is none, which takes somebody else on
    that file system: no more is in use than was before."""
    try:
        for start, stop in pool.in_use():
            arena.back(start, stop - start)
    except StoreFull as error:
        raise NoMemory(error.message, hint=error.hint) from error

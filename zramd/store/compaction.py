"""Moving objects out of the spans that are to be emptied, so that these go back.

The pool has marked the spans as leaving (`Pool.begin_compaction`). Every object of theirs that a
slot names is found in one scan of the table, a piece of a page at a time, and moved:

1. Under the slot lock of the table page, find its words whose objects lie in a leaving span, and
   take for each an object of the same class elsewhere. Where there is none, it stays.
2. Copy the bytes: nobody else knows the new object.
3. Publish: the word names the new object. A process killed before this instruction leaves the old.
4. Drop the lock and give the old objects back. Nobody can still be reading them: readers copy out
   under the slot lock.

Promises
1. A page reads the same before, between and after all moves.
2. No object is lost, whatever is raised, and wherever.
3. Others wait for a slot lock no longer than one piece's moves take (PIECE objects, 0.25 ms), and
   for the GIL not much longer.

What a slot names no more, or not yet, because a write is between its moves, is not found. It keeps
its span from going back this time, and nothing else comes of it.
"""

import threading
from collections.abc import Callable, Sequence
from typing import Final

from zramd.store.arena import Arena
from zramd.store.pace import Pace
from zramd.store.pool import NUMBER_SHIFT, Pool
from zramd.store.table import (
    ADDRESS_SHIFT,
    INLINE,
    SLOTS_PER_TABLE_PAGE,
    address_of,
    length_of,
    with_address,
)

PIECE: Final = 128
"""Slots. Whole table pages added 0.3 ms more to the 99th percentile of 4 KiB requests."""

_SPAN_SHIFT: Final = ADDRESS_SHIFT - 4 + NUMBER_SHIFT
"""A word shifted down by this is the number of its object's span."""


def empty_leaving_spans(
    arena: Arena,
    pool: Pool,
    slot_locks: Sequence[threading.Lock],
    checkpoint: Callable[[], None],
    pace: Pace,
) -> None:
    """Move all that is found out of the pool's leaving spans.

    Calls `checkpoint` after each piece, with no lock held; what that raises ends it.
    """
    for page in arena.table_pages.pages():
        slot_lock = slot_locks[page % len(slot_locks)]
        for at in range(0, SLOTS_PER_TABLE_PAGE, PIECE):
            if not pool.leaving:
                return
            _move(arena, pool, page, at, slot_lock)
            checkpoint()
            pace.keep()


def _move(arena: Arena, pool: Pool, page: int, at: int, slot_lock: threading.Lock) -> None:
    """Move the objects that the PIECE words of this table page from `at` on name."""
    memory, table, leaving = arena.map, arena.table, pool.leaving
    first = page * SLOTS_PER_TABLE_PAGE + at
    spare: list[int] = []  # of each pair of objects, old and new, the one that no word names
    try:
        with slot_lock:
            # A look at a hole of the mapping would fill it, behind the account's back.
            if not arena.table_pages.occupied[page]:
                return
            words = table[first : first + PIECE].tolist()
            found = [
                (slot, word)
                for slot, word in enumerate(words, first)
                if word >> _SPAN_SHIFT in leaving and not word & INLINE
            ]
            if not found:
                return
            spare = pool.destinations([address_of(word) for _, word in found])
            for i, (slot, word) in enumerate(found):
                old, new, length = address_of(word), spare[i], length_of(word)
                if new:
                    memory[new : new + length] = memory[old : old + length]
                    table[slot] = with_address(word, new)
                    spare[i] = old
    finally:
        pool.give(filter(None, spare))

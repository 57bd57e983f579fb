"""The slot table: one little-endian 64-bit word per slot says where and what its page is.

    word == 0           empty: reads as zeros, a hole
    word == 1 << 63 | 1 lost: the page that stood here cannot be trusted; reads as Corrupt
    bit 0 set           same-filled: bits 1..63 are the repeated word, sign-extended from bit 62
    bit 0 clear         an object in the pool:
        bits 1..7           flags: SAME, HUGE, IDLE, WRITTEN_BACK, INCOMPRESSIBLE, priority (2)
        bits 8..20          its length in bytes, 1 to 4096
        bits 21..63         its address in the arena, in units of 16 bytes

A 64-bit fill does not fit beside a flag. 63 bits hold all that occur in practice (zeros, ones,
small numbers, pointers); any other fill is an object of its 8 bytes, flagged SAME. So is the fill
whose inline word means a lost page; a lost page counts as same-filled, until it is overwritten or
discarded.

The word is the truth: the pool's free lists and all counters can be rebuilt from the table
(`recovery.py`). So each is stored by one aligned store, which no kill can cut: an assignment to one
element of the table. An assignment to a slice is a memcpy, which may go byte by byte.
"""

import enum
import re
from collections.abc import Iterator
from itertools import groupby
from typing import Final

from zramd.store import PAGE

SLOTS_PER_TABLE_PAGE: Final = PAGE // 8

INLINE: Final = 1
SAME: Final = 1 << 1
HUGE: Final = 1 << 2
# 1 << 3 to 1 << 7: idle, written back, incompressible, two bits of priority

LENGTH_SHIFT: Final = 8
LENGTH_MASK: Final = 0x1FFF
ADDRESS_SHIFT: Final = 21
ADDRESS_UNIT: Final = 16

FILL_ZERO: Final = INLINE
"""The word of a page written as zeros: stored, but without an object."""

LOST: Final = 1 << 63 | INLINE
"""The word of a page that recovery could not trust."""

_WORD_MASK: Final = (1 << 64) - 1


class Kind(enum.IntEnum):
    """How a page is stored, as far as it can be told from its word."""

    HOLE = 0  # not at all; reads as zeros
    ZERO = 1  # as zeros that were written
    SAME = 2
    COMPRESSED = 3
    HUGE = 4
    LOST = 5


def kind_of(word: int) -> Kind:
    if not word:
        return Kind.HOLE
    if word & INLINE:
        return Kind.ZERO if word == FILL_ZERO else Kind.LOST if word == LOST else Kind.SAME
    return Kind.SAME if word & SAME else Kind.HUGE if word & HUGE else Kind.COMPRESSED


def kinds_of(words: bytes) -> Iterator[tuple[int, Kind]]:
    """(how many, kind) along these words, in runs that are not always merged.

    A word's kind is in its flags, but for what is empty and what is INLINE. So all are told at
    once, a byte each, by what bytes can do: 25 us for 512, where one by one they take 90.
    """
    count = len(words) // 8
    flags = words[::8].translate(_CLASSES)
    lengths = int.from_bytes(words[1::8]) | int.from_bytes(words[2::8])  # bits 8 to 20, and more
    stored = lengths.to_bytes(count).translate(_ANY)
    classes = (int.from_bytes(flags) | int.from_bytes(stored)).to_bytes(count)
    for run in _RUN.finditer(classes):
        start, stop = run.span()
        kind = _KINDS.get(classes[start])
        part = words[start * 8 : stop * 8]
        if kind is None and part == _ZERO_WORD * (stop - start):
            kind = Kind.ZERO
        if kind is not None:
            yield stop - start, kind
        else:
            for inline, group in groupby(map(kind_of, memoryview(part).cast("Q"))):
                yield len(list(group)), inline


def _class_of(flags: int) -> int:
    """Of a word, by its lowest byte; 0 where that leaves open whether it is empty."""
    if flags & INLINE:
        return 8
    return 2 if flags & SAME else 4 if flags & HUGE else 1 if flags else 0


_CLASSES: Final = bytes(map(_class_of, range(256)))
_ANY: Final = bytes([0]) + bytes([1]) * 255
_KINDS: Final = {
    0: Kind.HOLE,
    1: Kind.COMPRESSED,
    **dict.fromkeys((2, 3), Kind.SAME),
    **dict.fromkeys((4, 5), Kind.HUGE),
}
_RUN: Final = re.compile(rb"(.)\1*", re.DOTALL)
_ZERO_WORD: Final = FILL_ZERO.to_bytes(8, "little")


def inline_fill(fill: bytes) -> int:
    """The slot word for a page that repeats these 8 bytes; 0 where there is none."""
    value = int.from_bytes(fill, "little", signed=True)
    if not -(1 << 62) < value < 1 << 62:
        return 0
    return (value << 1 | INLINE) & _WORD_MASK


def fill_of(word: int) -> bytes:
    """The 8 bytes that an INLINE word stands for."""
    if word >> 63:
        word -= 1 << 64
    return (word >> 1).to_bytes(8, "little", signed=True)


def object_word(address: int, length: int, flags: int) -> int:
    """The slot word for an object of `length` bytes at byte `address`, a multiple of 16."""
    return address // ADDRESS_UNIT << ADDRESS_SHIFT | length << LENGTH_SHIFT | flags


def address_of(word: int) -> int:
    """Byte address in the arena of the object that this word names."""
    return (word >> ADDRESS_SHIFT) * ADDRESS_UNIT


def with_address(word: int, address: int) -> int:
    """The word of the same page, when its object has moved to byte `address`, a multiple of 16."""
    return address // ADDRESS_UNIT << ADDRESS_SHIFT | word & (1 << ADDRESS_SHIFT) - 1


def length_of(word: int) -> int:
    """Stored bytes of the object that this word names."""
    return word >> LENGTH_SHIFT & LENGTH_MASK

"""The first page of an arena: what another process has to know to go on with it.

    0       magic: what this is, and in its last byte the version
    8       CRC-32 of all that follows up to byte 128
    16      disksize, table, span map, spans: where they begin; number of spans; the limit that it
            was reserved with, 0 where nothing is reserved; the algorithm, as text
    256     of a file of the user's: in which run of the machine it was opened last, 16 bytes
    512     the figures, a 64-bit word each, in the order below

What stands up to byte 128 is written once, magic last, and says all of the layout. The figures
change, each by one aligned store of its own, so each is whole at any instant; they are not in the
CRC, and who reads them holds them for hints: `figure` gives what is sane in any case.

A snapshot (`image.py`) begins with the same page, but for the magic.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Final

from zramd.errors import BadArena
from zramd.store import PAGE, SPAN

MAX_DISKSIZE: Final = 4 << 40
"""16 times this is taken as address space, half of what x86-64 and arm64 give a process."""

VERSION: Final = 2
MAGIC: Final = b"zramd\0\0" + bytes([VERSION])
SNAPSHOT_MAGIC: Final = b"zramd\0S" + bytes([VERSION])
_KINDS: Final = {
    MAGIC: ("arena", "is an arena: `zramd serve --arena` it"),
    SNAPSHOT_MAGIC: ("snapshot", "is a snapshot: `zramd restore` it"),
}

_START: Final = struct.Struct("<8sQ")  # magic, CRC
_FIELDS: Final = struct.Struct("<QQQQQQ64s")
SIZE: Final = _START.size + _FIELDS.size

RUN_AT: Final = 256
RUN_SIZE: Final = 16

FIGURES_AT: Final = 512
MEM_LIMIT, USED_MAX, HUGE_SINCE, COMPACTED = range(4)
FAILED_READS, FAILED_WRITES, INVALID_IO, NOTIFY_FREE = range(4, 8)
FIGURES: Final = 8

_MOST: Final = 1 << 62
"""No figure comes to this: 4 EiB, or what 100,000 years of a discard each microsecond count."""


@dataclass(frozen=True, slots=True)
class Header:
    """The layout of an arena, and what its pages are compressed with."""

    disksize: int
    spans: int
    """How many spans there is room for."""
    reserved_limit: int
    algorithm: str

    @property
    def slots(self) -> int:
        return self.disksize // PAGE

    @property
    def map_at(self) -> int:
        return map_at(self.disksize)

    @property
    def spans_at(self) -> int:
        return round_up(self.map_at + self.spans, SPAN)

    @property
    def size(self) -> int:
        """Bytes of the whole arena."""
        return self.spans_at + self.spans * SPAN

    def pack(self) -> bytes:
        """What stands from the magic on."""
        fields = _FIELDS.pack(
            *(self.disksize, PAGE, self.map_at, self.spans_at, self.spans, self.reserved_limit),
            self.algorithm.encode(),
        )
        return _START.pack(MAGIC, zlib.crc32(fields)) + fields

    @classmethod
    def unpack(cls, page: bytes, size: int, *, more: bool = False) -> "Header":
        """Of an arena whose file has `size` bytes and begins with `page`; `more`: there may be more
        in it, behind the arena. Raises BadArena."""
        header = cls.of(page)
        if size < header.size or (size > header.size and not more):
            raise BadArena(
                f"the arena's file has {size} bytes where its header says {header.size}",
                hint="a file that was cut off, or copied in part, cannot be used",
            )
        return header

    @classmethod
    def of(cls, page: bytes, magic: bytes = MAGIC) -> "Header":
        """Of a file that begins with `page`, or with another `magic` of this page. Raises
        BadArena."""
        what = _KINDS[magic][0]
        for other, (_, hint) in _KINDS.items():
            if other != magic and page[: len(other) - 1] == other[:-1]:
                raise BadArena(f"this is no {what} of zramd", hint=f"it {hint}")
        if len(page) < SIZE or page[: len(magic) - 1] != magic[:-1]:
            raise BadArena(f"this is no {what} of zramd: it does not begin as one")
        version = page[len(magic) - 1]
        if version != VERSION:
            raise BadArena(
                f"the {what} has version {version} of the format, and this zramd knows {VERSION}",
                hint="go on with it by the version of zramd that made it",
            )
        packed = page[_START.size : SIZE]
        if _START.unpack_from(page)[1] != zlib.crc32(packed):
            raise BadArena(f"the {what}'s header is damaged: its checksum is wrong")
        disksize, table_at, at, spans_at, spans, limit, text = _FIELDS.unpack(packed)
        header = cls(disksize, spans, limit, text.rstrip(b"\0").decode(errors="replace"))
        if (
            not 0 < disksize <= MAX_DISKSIZE
            or disksize % PAGE
            or not 0 < spans <= most_spans(disksize)
        ):
            raise BadArena(f"the {what}'s header is senseless: disksize {disksize}, {spans} spans")
        if (table_at, at, spans_at) != (PAGE, header.map_at, header.spans_at):
            raise BadArena(f"the {what}'s header is senseless: its parts are not where they belong")
        if limit and header.size > limit:
            raise BadArena(f"the {what}'s header is senseless: it is larger than its reserve")
        return header


def figure(figures: memoryview, which: int) -> int:
    """The figure as it stands, 0 where it cannot be true."""
    value: int = figures[which]
    return value if value < _MOST else 0


def most_spans(disksize: int) -> int:
    """Every live object can come to sit alone in its span, so as many spans as slots are enough for
    any history; the slack is for objects that replace others, in flight."""
    return disksize // PAGE + 4096


def map_at(disksize: int) -> int:
    """Where the span map begins: behind the header and the table."""
    return PAGE + round_up(disksize // PAGE * 8, PAGE)


def round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit

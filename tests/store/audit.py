"""An account of a store at rest, made from the bytes of its arena and nothing else."""

import os
import struct
import zlib
from array import array

from zramd.store import PAGE
from zramd.store.arena import SPAN
from zramd.store.pages import Counters, Pages
from zramd.store.pool import CLASSES


def audit(pages: Pages, *, snug: bool = True) -> Counters:
    """Assert that everything `pages` believes is what stands in the arena; returns the counters.

    `snug`: no object lies in a larger class than it needs, as it may since a limit was reached.

    Reads the file, not the mapping, by the layout that arena.py and table.py document: a look at
    a hole of the mapping would fill it.
    """
    arena = pages.arena
    magic, crc, disksize, table_at, map_at, spans_at, spans, _, _ = struct.unpack(
        "<8sQQQQQQQ64s", os.pread(arena.fd, 128, 0)
    )
    assert magic == b"zramd\0\0\2"
    assert crc == zlib.crc32(os.pread(arena.fd, 112, 16))
    figures = struct.unpack("<8Q", os.pread(arena.fd, 64, 512))
    counters = pages.counters
    assert figures[:4] == (arena.limit, arena.used_max, counters.huge_since, counters.compacted)
    words = array("Q", os.pread(arena.fd, disksize // PAGE * 8, table_at))
    classes = os.pread(arena.fd, spans, map_at).rstrip(b"\0")
    found = Counters(huge_since=pages.counters.huge_since, compacted=pages.counters.compacted)
    objects = []
    for word in words:
        if word == 0:
            continue
        found.pages += 1
        if word & 1:
            found.same += 1
            continue
        address, length = word >> 21 << 4, word >> 8 & 0x1FFF
        objects.append((address, length))
        found.compressed_bytes += length
        found.same += word >> 1 & 1
        found.huge += word >> 2 & 1
        assert word & 0xF8 == 0, f"word {word:#x} has bits that nobody sets"
        assert (length == PAGE) == bool(word & 4)
        assert (length == 8) == bool(word & 2)
    used_spans = set()
    end = 0
    for address, length in sorted(objects):
        span, at = divmod(address - spans_at, SPAN)
        assert span < len(classes), "an object beyond all spans"
        assert classes[span], "an object in a span that has no class"
        size = CLASSES[classes[span] - 1]
        assert address >= end, "two objects overlap"
        assert at % size == 0
        assert at + size <= pages.pool.spans[span].opened <= SPAN
        assert size >= length
        assert not snug or length > (CLASSES[classes[span] - 2] if classes[span] > 1 else 0)
        end = address + size
        used_spans.add(span)
    assert used_spans == {span for span, cls in enumerate(classes) if cls}, "an empty span is kept"
    assert used_spans == set(pages.pool.spans)
    assert not pages.pool.leaving
    assert set(pages.pool._vacant) | used_spans == set(range(pages.pool._unused))

    table_pages = [any(words[at : at + PAGE // 8]) for at in range(0, len(words), PAGE // 8)]
    assert [bool(page) for page in arena.table_pages.occupied] == table_pages
    opened = {index: span.opened for index, span in pages.pool.spans.items()}
    assert arena.used == PAGE * (1 + sum(table_pages) + sum(arena.map_pages.occupied)) + sum(
        opened.values()
    )
    growing = [classes[span] for span, size in opened.items() if size < SPAN]
    assert len(growing) == len(set(growing)), "two spans of a class are opened in part"
    assert arena.resident() <= max(arena.used, arena.reserved)
    assert arena.used <= arena.used_max
    assert found == pages.counters == pages.recount() == pages.snapshot()
    return found

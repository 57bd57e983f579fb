"""What a device is to its user: a bytearray, of which a request that fails may change a part."""

import bisect
from itertools import pairwise

from zramd.store import PAGE
from zramd.store.table import Kind

PART = 512 * PAGE
"""Requests are cut at multiples of this, 2 MiB."""


class Model:
    """`size` bytes, zeros at first."""

    def __init__(self, size: int) -> None:
        self.content = bytearray(size)

    def write(self, offset: int, data: bytes) -> None:
        self.content[offset : offset + len(data)] = data

    def zero(self, offset: int, length: int) -> None:
        self.write(offset, bytes(length))

    def discard(self, offset: int, length: int) -> int:
        """Returns how many pages lie wholly in the range."""
        first, last = whole_pages(offset, length)
        self.zero(first, last - first)
        return (last - first) // PAGE

    def write_failed(self, offset: int, data: bytes, now: bytes) -> None:
        """Of a write that failed, take over the parts that it did: the first ones, not all."""
        old = self.content[offset : offset + len(data)]
        *cuts, _ = _cuts(offset, len(data))
        for cut in cuts:
            at = cut - offset
            if now == data[:at] + old[at:]:
                self.write(offset, data[:at])
                return
        raise AssertionError(f"a failed write of {len(data)} bytes at {offset} left a mixture")

    def zero_failed(self, offset: int, length: int, now: bytes) -> None:
        """A zero that failed emptied the whole pages, and may have zeroed the head."""
        self.discard(offset, length)
        end = offset + length
        if now != self.content[offset:end]:
            self.zero(offset, min(-offset % PAGE, length))
        assert now == self.content[offset:end], "a failed zero left a mixture"


def whole_pages(offset: int, length: int) -> tuple[int, int]:
    """First byte and end of the pages that lie wholly in the range; equal where there are none."""
    first, last = -(-offset // PAGE) * PAGE, (offset + length) // PAGE * PAGE
    return (first, last) if first < last else (first, first)


def _cuts(offset: int, length: int) -> list[int]:
    """Where a write is cut into its parts, both ends included."""
    end = offset + length
    first, last = whole_pages(offset, length)
    inner = {cut for cut in range(PART, end, PART) if first < cut < last}
    cuts = sorted({offset, first, last, end} | inner)
    return cuts[bisect.bisect_left(cuts, offset) : bisect.bisect_right(cuts, end)]


def extents_agree(content: bytes, extents: list[tuple[int, Kind]]) -> None:
    """Assert that extents cover the content, and that what they call zeros reads as zeros."""
    assert sum(size for size, _ in extents) == len(content)
    assert all(size > 0 for size, _ in extents)
    assert all(a[1] != b[1] for a, b in pairwise(extents)), "neighbours not merged"
    at = 0
    for size, kind in extents:
        if kind in (Kind.HOLE, Kind.ZERO):
            assert not any(content[at : at + size]), f"data in a {kind.name}"
        at += size

"""The mapped memory of one initialisation, and the account of what it occupies.

    header      1 page: magic, version, geometry, algorithm
    table       a 64-bit word per slot (`table.py`)
    span map    a byte per span: its size class plus one, 0 where the span is not in use
    spans       64 KiB each, the pool's objects (`pool.py`)

The file is a memfd, or a file of the user's, and sparse: only what has been written occupies
memory. Nothing here is moved or resized while it is mapped, so views stay valid until `close`.

Promises
1. `used` is at least what the file occupies in the system, in whole pages, and never passes
   `limit` through `occupy`, not even for a moment: it is charged before the memory is touched.
2. A page or span given back with `vacate` is back with the system when the call returns.
3. A process killed at any instruction leaves a readable header: it is written once, magic last.

Assumes little-endian hosts, and that its caller touches no byte of the table, the span map or a
span that it has not occupied first.
"""

import mmap
import os
import struct
import sys
import threading
from pathlib import Path
from typing import Final

from zramd.errors import BadValue, NoMemory, StoreFull
from zramd.sizes import human
from zramd.store import PAGE

SPAN: Final = 65536
"""Bytes of a span: 16 raw pages; large enough that punching a hole (about 3 us) is rare."""

MAGIC: Final = b"zramd\x00\x00\x01"
_HEADER: Final = struct.Struct("<8sQQQQQ64s")  # magic, disksize, three offsets, spans, algorithm

MAX_DISKSIZE: Final = 4 << 40
"""16 times this is reserved as address space, half of what x86-64 and arm64 give a process."""


class Arena:
    """The memory for `disksize` bytes (a multiple of PAGE) of device.

    A memfd, or a new file at `path`, which goes when the arena closes. Raises BadValue for a
    disksize beyond MAX_DISKSIZE or a file that exists, NoMemory where the system refuses.
    `algorithm` is kept in the header for whoever reads the arena later.
    """

    def __init__(
        self, disksize: int, algorithm: str, *, limit: int = 0, path: Path | None = None
    ) -> None:
        if sys.byteorder != "little":
            raise BadValue("zramd's arena is defined for little-endian machines only")
        if disksize > MAX_DISKSIZE:
            raise BadValue(
                f"a disksize of {human(disksize)} is too large",
                hint=f"the largest device is {human(MAX_DISKSIZE)}",
            )
        slots = disksize // PAGE
        table_at = PAGE
        map_at = table_at + _round_up(slots * 8, PAGE)
        # Every live object can come to sit alone in its span, so as many spans as slots are
        # enough for any history; the slack is for objects that replace others, in flight.
        spans = slots + 4096
        spans_at = _round_up(map_at + spans, SPAN)
        self.size = spans_at + spans * SPAN
        self.slots = slots
        self.spans_at = spans_at
        self.limit = limit
        self.used = 0
        self.used_max = 0
        self._lock = threading.Lock()  # leaf lock; protects used and used_max
        self._path = path
        self.table_pages = Region(self, table_at, _pages(slots * 8))
        self.map_pages = Region(self, map_at, _pages(spans))
        self.fd = _create(path)  # last of what can fail alone: from here on there is much to undo
        try:
            os.ftruncate(self.fd, self.size)
            self.map = mmap.mmap(self.fd, self.size)
            self._prepare_map()
        except (OSError, OverflowError, ValueError) as error:
            os.close(self.fd)
            if path is not None:
                path.unlink()
            raise NoMemory(
                f"no memory for a device of {human(disksize)}: {error}",
                hint=f"the arena needs {human(self.size)} of address space (not of RAM):"
                " raise RLIMIT_AS, or choose a smaller disksize",
            ) from error
        self.view = memoryview(self.map)
        self.table = self.view[table_at : table_at + slots * 8].cast("Q")
        self.span_map = self.view[map_at : map_at + spans]
        self.used = self.used_max = PAGE
        fields = (disksize, table_at, map_at, spans_at, spans, algorithm.encode())
        _HEADER.pack_into(self.map, 0, bytes(8), *fields)
        self.map[0:8] = MAGIC

    def _prepare_map(self) -> None:
        """See that memory comes page by page and goes back; raises OSError where it does not."""
        try:
            self.map.madvise(mmap.MADV_NOHUGEPAGE)
        except OSError:
            pass  # a kernel without huge pages
        self.map.madvise(mmap.MADV_REMOVE, 0, PAGE)

    def occupy(self, size: int) -> None:
        """Charge `size` bytes about to be touched. Raises StoreFull, having charged nothing."""
        with self._lock:
            used = self.used + size
            if self.limit and used > self.limit:
                raise StoreFull(
                    f"mem_limit of {human(self.limit)} reached",
                    hint="raise mem_limit, or discard what is no longer needed",
                )
            self.used = used
            if used > self.used_max:
                self.used_max = used

    def vacate(self, offset: int, size: int) -> None:
        """Give `size` occupied bytes at `offset` (both multiples of PAGE) back to the system."""
        self.map.madvise(mmap.MADV_REMOVE, offset, size)
        with self._lock:
            self.used -= size

    def forget_used_max(self) -> None:
        """Let the peak be what is used now."""
        with self._lock:
            self.used_max = self.used

    def resident(self) -> int:
        """Bytes the file occupies in the system's own account: the oracle for `used`."""
        return os.fstat(self.fd).st_blocks * 512

    def close(self) -> None:
        """Unmap and drop all. Nobody may use any part of the arena any more."""
        self.span_map.release()
        self.table.release()
        self.view.release()
        self.map.close()
        os.close(self.fd)
        if self._path is not None:
            self._path.unlink(missing_ok=True)


class Region:
    """Which 4 KiB pages of a part of the arena are occupied: the table's, or the span map's."""

    def __init__(self, arena: Arena, offset: int, pages: int) -> None:
        self._arena = arena
        self._offset = offset
        self.occupied = bytearray(pages)
        """1 where the page is occupied. Read freely; changed only by occupy and vacate."""

    def occupy(self, page: int) -> None:
        """Charge this page; the caller holds the lock that guards it. Raises StoreFull."""
        self._arena.occupy(PAGE)
        self.occupied[page] = 1

    def vacate(self, page: int) -> None:
        """Give this page, all zeros, back; the caller holds the lock that guards it."""
        self.occupied[page] = 0
        self._arena.vacate(self._offset + page * PAGE, PAGE)


def _create(path: Path | None) -> int:
    try:
        if path is None:
            return os.memfd_create("zramd-arena", os.MFD_CLOEXEC)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise BadValue(
            f"{path} exists already", hint="name a file that does not exist, or remove it"
        ) from error
    except OSError as error:
        raise NoMemory(f"cannot create the arena: {error}") from error


def _round_up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def _pages(size: int) -> int:
    return -(-size // PAGE)

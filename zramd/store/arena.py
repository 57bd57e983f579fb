"""The mapped memory of one initialisation, and the account of what it occupies.

    header      1 page: magic, version, layout, algorithm, figures (`header.py`)
    table       a 64-bit word per slot (`table.py`)
    span map    a byte per span: its size class plus one, 0 where the span is not in use
    spans       64 KiB each, the pool's objects (`pool.py`)

The file is a memfd, or a file of the user's, and sparse: only what has been written occupies
memory, or disk. Or it is reserved: no larger than `limit`, every page of it faulted in and locked
before the first write, and kept until `close`. Then no write ever has to ask the system for memory,
which is what swap wants: the system asks for writes when it has none. Nothing here is moved or
resized while it is mapped, so views stay valid until `close`.

The arena outlives its process where another one holds a descriptor of it, and in a file of the
user's: `adopt` maps it again, and `recovery.py` finds what is stored in it. `image.py` has what
makes such a file outlive the machine's run.

Promises
1. `used` never passes `limit` through `occupy`, not even for a moment: it is charged before the
   memory is touched, and disk is taken then: to find its end by a store would end the process.
   Unless reserved, it is at least what the file occupies in the system, in whole pages; reserved,
   the file occupies `reserved`, which is at most `limit`.
2. A page or span given back with `vacate` is back with the system when the call returns, or with
   the reserve.
3. A process killed at any instruction leaves an arena that can be adopted, or one without magic.

The order of stores, by which that holds. Here and in the modules named, each is made only when the
one before is done; a kill between two of them costs nothing but memory, which recovery gives back.
1. Header: all of it, then the magic. [here]
2. A span's class in the span map, then an object of it is handed out. [pool]
3. An object's bytes, then the slot word that names it. [pages, compaction]
4. The slot word, by one aligned store, never a part of it. [pages, compaction, recovery]
5. The old object's slot word is gone, then the object is given back. [pages, compaction]
6. No slot names an object of the span, then its class is zero, then its memory goes. [pool]
7. All words of a table page are zero, then it goes. [pages]
Processors keep it, too: what is killed has done all stores before some instruction, and those that
other threads could have seen.

Assumes little-endian hosts, and that its caller touches no byte of the table, the span map or a
span that it has not occupied first.
"""

import ctypes
import errno
import fcntl
import mmap
import os
import re
import stat
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from xxhash import xxh3_128_digest

from zramd.errors import BadArena, BadValue, NoMemory, StoreFull
from zramd.files import stands_at
from zramd.sizes import human
from zramd.store import PAGE, SPAN
from zramd.store.header import (
    FIGURES,
    FIGURES_AT,
    MAGIC,
    MAX_DISKSIZE,
    MEM_LIMIT,
    RUN_AT,
    RUN_SIZE,
    USED_MAX,
    Header,
    figure,
    map_at,
    most_spans,
    round_up,
)

_libc = ctypes.CDLL(None, use_errno=True)
_off_t: Final = ctypes.c_int64
_PUNCH_HOLE: Final = 1 | 2  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_GETFLAGS: Final = 0x80086601  # FS_IOC_GETFLAGS, and below FS_IOC_SETFLAGS, FS_NOCOW_FL
_SETFLAGS: Final = 0x40086602
_NOCOW: Final = 0x00800000
_MADV_POPULATE_WRITE: Final = 23  # Linux 5.14; Python has no name for it


class Arena:
    """The memory for `disksize` bytes (a multiple of PAGE) of device.

    A memfd, or a new file at `path`, locked against other servers. Raises BadValue for a disksize
    beyond MAX_DISKSIZE or a file that exists, NoMemory where the system refuses.
    `algorithm` is kept in the header for whoever reads the arena later.

    `reserve`: take all of `limit` now. BadValue where that is no more than the table needs.
    """

    def __init__(
        self,
        disksize: int,
        algorithm: str,
        *,
        limit: int = 0,
        reserve: bool = False,
        path: Path | None = None,
    ) -> None:
        if sys.byteorder != "little":
            raise BadValue("zramd's arena is defined for little-endian machines only")
        if disksize > MAX_DISKSIZE:
            raise BadValue(
                f"a disksize of {human(disksize)} is too large",
                hint=f"the largest device is {human(MAX_DISKSIZE)}",
            )
        spans = most_spans(disksize)
        if reserve:
            # What is stored raw, all of it, and a span that every class has begun.
            spans = min(-(-disksize // SPAN) + 128, reserved_spans(disksize, limit))
        header = Header(disksize, spans, limit if reserve else 0, algorithm)
        self._plan(header)
        if reserve:
            must_be_available(self.size)
        self._path = path
        self.fd = create(path)  # last of what can fail alone: from here on there is much to undo
        self._map(new=True)
        self._view()
        packed = header.pack()
        self.map[len(MAGIC) : len(packed)] = packed[len(MAGIC) :]
        self.limit = limit
        self.used = self.used_max = PAGE
        if path is not None:
            self.map[RUN_AT : RUN_AT + RUN_SIZE] = run_of(self.fd)
        self.map[: len(MAGIC)] = MAGIC
        if path is not None:
            try:
                self.map.flush(0, PAGE)  # it shall be known for what it is, whatever becomes of it
            except OSError as error:
                self.close()
                raise NoMemory(f"{path} cannot be written: {error.strerror}") from error

    @classmethod
    def adopt(cls, fd: int) -> "Arena":
        """The arena that `fd` is open on, in memory or a file, made by a process that has ended.

        Of what is stored `used` and the regions know nothing before `recovery.recover`. The
        descriptor stays the caller's; the arena has its own. Raises BadArena, NoMemory.
        """
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise BadArena("this is no arena of zramd: it is no file")
        if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
            raise BadArena("the arena is not open for reading and writing")
        name = os.readlink(f"/proc/self/fd/{fd}")
        path = None if name.startswith("/memfd:") else Path(name)
        header = Header.unpack(os.pread(fd, PAGE, 0), status.st_size, more=path is not None)
        self = cls.__new__(cls)
        self._plan(header)
        self._path = path
        self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 0)
        self._map(new=False)
        self._view()
        limit, most = figure(self.figures, MEM_LIMIT), header.reserved_limit
        self.limit = most if most and not 0 < limit <= most else limit
        self.used = PAGE
        self.used_max = min(figure(self.figures, USED_MAX), self.size)
        return self

    def _plan(self, header: Header) -> None:
        """All that can be said before there is memory."""
        self.header = header
        self.size = header.size
        self.slots = header.slots
        self.spans = header.spans
        """How many spans there are room for."""
        self.spans_at = header.spans_at
        self.reserved = self.size if header.reserved_limit else 0
        """Bytes taken from the system for good; 0 where memory is taken as it is needed."""
        self._lock = threading.Lock()  # leaf lock; protects used and used_max
        self.table_pages = Region(self, PAGE, _pages(self.slots * 8))
        self.map_pages = Region(self, header.map_at, _pages(self.spans))

    def _map(self, *, new: bool) -> None:
        """Map the file, and hold what is reserved; all or nothing. Raises NoMemory."""
        try:
            if new:
                os.ftruncate(self.fd, self.size)
            self.map = mmap.mmap(self.fd, self.size)
            try:
                self.map.madvise(mmap.MADV_NOHUGEPAGE)  # memory is to come page by page
            except OSError:
                pass  # a kernel without huge pages
            if new:
                self.punch(0, PAGE)  # see that memory goes back
                self.back(0, PAGE)
            elif self.is_file:
                self.punch(os.fstat(self.fd).st_size, PAGE)  # the same; behind its end is nothing
            if self.reserved:
                self.back(0, self.size)
                self.hold()
        except (NoMemory, StoreFull) as error:
            self._drop(new=new)
            raise NoMemory(error.message, hint=error.hint) from error
        except (OSError, OverflowError, ValueError) as error:
            self._drop(new=new)
            raise self._no_map(error) from error

    def _no_map(self, error: Exception) -> NoMemory:
        if isinstance(error, OSError) and error.errno == errno.EAGAIN:
            # mlockall(MCL_FUTURE) has been called, after which what is mapped counts as locked.
            step = ", which counts as locked: raise RLIMIT_MEMLOCK, give it CAP_IPC_LOCK"
        else:
            step = " (not of RAM): raise RLIMIT_AS"
        return NoMemory(
            f"no memory for a device of {human(self.header.disksize)}: {error}",
            hint=f"the arena needs {human(self.size)} of address space{step},"
            " or choose a smaller disksize",
        )

    def _view(self) -> None:
        self.view = memoryview(self.map)
        self.table = self.view[PAGE : PAGE + self.slots * 8].cast("Q")
        at = self.header.map_at
        self.span_map = self.view[at : at + self.spans]
        self.figures = self.view[FIGURES_AT : FIGURES_AT + FIGURES * 8].cast("Q")
        """What is to outlive the process, by the names in header.py."""

    @property
    def limit(self) -> int:
        """What `used` may not pass; 0 where nothing is said."""
        return self._limit

    @limit.setter
    def limit(self, limit: int) -> None:
        self._limit = self.figures[MEM_LIMIT] = limit

    @property
    def used_max(self) -> int:
        """The peak of `used`."""
        return self._used_max

    @used_max.setter
    def used_max(self, used_max: int) -> None:
        self._used_max = self.figures[USED_MAX] = used_max

    def _drop(self, *, new: bool) -> None:
        """Undo what has been made so far."""
        if hasattr(self, "map"):
            self.map.close()
        if self._path is not None and new:
            remove(self.fd, self._path)  # before the lock goes: then it may be another's
        os.close(self.fd)

    def hold(self) -> None:
        """Have every page of a reserved arena in memory, and keep it there; again after a fork,
        whose child inherits the map and not the lock. Raises OSError, NoMemory."""
        try:
            self.map.madvise(_MADV_POPULATE_WRITE)
        except OSError:  # an old kernel, or no memory: which of them, writing tells
            for page in range(0, self.size, PAGE):
                self.map[page] = self.map[page]
        try:
            lock_in_memory(self.map)
        except OSError as error:
            raise NoMemory(
                f"{human(self.size)} cannot be locked in memory: {error.strerror}",
                hint="raise RLIMIT_MEMLOCK (systemd: LimitMEMLOCK=infinity), give it CAP_IPC_LOCK,"
                " or do not preallocate",
            ) from error

    def occupy(self, offset: int, size: int) -> None:
        """Charge `size` bytes at `offset` that are about to be touched. Raises StoreFull, having
        charged nothing."""
        with self._lock:
            used = self.used + size
            if self._limit and used > self._limit:
                raise self.full()
            self.back(offset, size)
            self.used = used
            if used > self._used_max:
                self.used_max = used

    def back(self, offset: int, size: int) -> None:
        """Have disk for this part of a file of the user's. Raises StoreFull."""
        if self._path is None:
            return
        try:
            os.posix_fallocate(self.fd, offset, size)
        except OSError as error:
            raise StoreFull(
                f"{self._path} cannot grow: {error.strerror}",
                hint="make room on its file system, or discard what is no longer needed",
            ) from error

    def full(self) -> StoreFull:
        """The error for what does not fit any more."""
        if not self.limit:
            return StoreFull("every span of the arena is in use")
        if self.reserved:
            hint = "discard what is no longer needed, or reset the device for a higher mem_limit"
        else:
            hint = "raise mem_limit, or discard what is no longer needed"
        return StoreFull(f"mem_limit of {human(self.limit)} reached", hint=hint)

    def vacate(self, offset: int, size: int) -> None:
        """Give `size` occupied bytes at `offset` (both multiples of PAGE) back to the system, or
        leave them to whoever occupies them next."""
        if not self.reserved:
            self.punch(offset, size)
        with self._lock:
            self.used -= size

    def punch(self, offset: int, size: int) -> None:
        """Give this range back to the system; the account says nothing of it."""
        # Not MADV_REMOVE, which does the same, but not where memory is locked.
        if _libc.fallocate(self.fd, _PUNCH_HOLE, _off_t(offset), _off_t(size)) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    def forget_used_max(self) -> None:
        """Let the peak be what is used now."""
        with self._lock:
            self.used_max = self.used

    def resident(self) -> int:
        """Bytes the file occupies in the system's own account: the oracle for `used`."""
        return os.fstat(self.fd).st_blocks * 512

    @property
    def path(self) -> Path | None:
        """The file of the user's that it is; None for memory."""
        return self._path

    @property
    def is_file(self) -> bool:
        return self._path is not None

    @property
    def stands(self) -> bool:
        """Whether that file is where it was."""
        return self._path is not None and stands_at(self._path, self.fd)

    def close(self, *, keep: bool = False) -> None:
        """Unmap and drop all; `keep`: but for a file of the user's. Nobody may use any part of the
        arena any more."""
        self.figures.release()
        self.span_map.release()
        self.table.release()
        self.view.release()
        self._drop(new=not keep)


class Region:
    """Which 4 KiB pages of a part of the arena are occupied: the table's, or the span map's."""

    def __init__(self, arena: Arena, offset: int, pages: int) -> None:
        self._arena = arena
        self._offset = offset
        self.occupied = bytearray(pages)
        """1 where the page is occupied. Read freely; changed only by occupy and vacate."""

    def pages(self, first: int = 0, stop: int | None = None) -> Iterator[int]:
        """Those that are occupied, ascending; what changes meanwhile may be among them or not."""
        page = self.occupied.find(1, first, stop)
        while page >= 0:
            yield page
            page = self.occupied.find(1, page + 1, stop)

    def occupy(self, page: int) -> None:
        """Charge this page; the caller holds the lock that guards it. Raises StoreFull."""
        self._arena.occupy(self._offset + page * PAGE, PAGE)
        self.occupied[page] = 1

    def vacate(self, page: int) -> None:
        """Give this page, all zeros, back; the caller holds the lock that guards it."""
        self.occupied[page] = 0
        self._arena.vacate(self._offset + page * PAGE, PAGE)


def lock_in_memory(memory: mmap.mmap) -> None:
    """mlock(2) all of this map, for this process. Raises OSError."""
    here = ctypes.c_char.from_buffer(memory)
    try:
        start = ctypes.c_void_p(ctypes.addressof(here))
        if _libc.mlock(start, ctypes.c_size_t(len(memory))) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    finally:
        del here  # or the map could not be closed


def default_mem_limit(disksize: int) -> int:
    """What is reserved where nobody says how much, in bytes: half of what the device can hold, and
    its table. lz4 makes 2.5 of programs' memory (docs/performance.md); the rest is for what swap
    keeps though nobody needs it any more."""
    return round_up(disksize // 2 + disksize // 512, PAGE)


def reserved_spans(disksize: int, limit: int) -> int:
    """How many spans fit into a reserve of `limit` bytes, with all that stands before them.
    BadValue: none."""
    at = map_at(disksize)
    spans = (limit - at) // (SPAN + 1)
    while spans > 0 and round_up(at + spans, SPAN) + spans * SPAN > limit:
        spans -= 1
    if spans <= 0:
        raise BadValue(
            f"a mem_limit of {human(limit)} cannot be reserved for a device of {human(disksize)}",
            hint=f"its table alone takes {human(at)}; half the disksize is usual",
        )
    return spans


def must_be_available(size: int) -> None:
    """NoMemory where the machine has less: taking it would have programs killed."""
    try:
        found = re.search(r"^MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text(), re.M)
    except OSError:
        return
    if found is not None and int(found[1]) * 1024 < size:
        raise NoMemory(
            f"{human(size)} of RAM cannot be reserved: {human(int(found[1]) * 1024)} is available",
            hint="choose a lower mem_limit, or do not preallocate",
        )


def create(path: Path | None = None) -> int:
    """The descriptor of a new file for an arena, locked where it is a file of the user's."""
    try:
        if path is None:
            return os.memfd_create("zramd-arena", os.MFD_CLOEXEC)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)  # who has just found it lets go: there is nothing in it
        except OSError:
            path.unlink(missing_ok=True)
            os.close(fd)
            raise
        _write_in_place(fd)
        return fd
    except FileExistsError as error:
        raise BadValue(
            f"{path} exists already", hint="name a file that does not exist, or remove it"
        ) from error
    except OSError as error:
        raise NoMemory(f"cannot create the arena: {error}") from error


def remove(fd: int, path: Path) -> None:
    """Remove the file that `fd` is open on, if it still stands at `path`."""
    if stands_at(path, fd):
        path.unlink(missing_ok=True)


def _write_in_place(fd: int) -> None:
    """Where the file system writes what changes to new places (btrfs), it must not: it would need
    more disk for what we have taken, and a store that finds none ends the process."""
    try:
        flags = bytearray(8)
        fcntl.ioctl(fd, _GETFLAGS, flags)
        changed = int.from_bytes(flags, sys.byteorder) | _NOCOW
        fcntl.ioctl(fd, _SETFLAGS, changed.to_bytes(8, sys.byteorder))
    except OSError:
        pass  # it does not know that


def data_from(fd: int, at: int, stop: int) -> int:
    """Where the first byte from `at` on is that does not lie in a hole of the file; `stop` or
    beyond where there is none before it."""
    try:
        return os.lseek(fd, at, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return stop


def run_of(fd: int) -> bytes:
    """What tells this run of the machine, and this file, from all others. Raises OSError."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    status = os.fstat(fd)
    return xxh3_128_digest(b"%b %d %d" % (boot, status.st_dev, status.st_ino))


def _pages(size: int) -> int:
    return -(-size // PAGE)

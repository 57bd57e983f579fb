"""An arena at rest: all of it that is in use, under checksums. In one of two files.

    snapshot    the header page, with a magic of its own, and the other blocks, one after the other
    arena       the arena itself (`arena.py`), each block where it belongs; sealed when it is closed

and behind that, in both, the index:

    entries     24 bytes for each block, ascending: where it lies in the arena; length; checksum
    end         32 bytes: bytes before the entries; how many; checksum of entries and end; magic

A block is at most BLOCK bytes long. The first one is the header page. What no block covers is
nothing. The checksum is XXH3, 64 bits of it: 27 GiB/s, where zlib's CRC-32 makes 2.1 and would take
a third of a save's time.

An arena file is *sealed* while it has an index, and *open* while it has none: who uses it takes the
index off first. Open, it is good as long as the machine runs that opened it, and a copy is not: a
process that was killed leaves all in the page cache. After that nobody knows which of its pages
have reached the disk, and it is refused.

Promises
1. A snapshot or a sealed file that is taken for good is as it was written: every byte of it is
   under a checksum, and so is how many there are. An open file is as its processes have left it,
   unless its disk has failed or been unplugged since.
2. A file that is refused has not been changed. Raises BadArena, with the reason.
"""

import fcntl
import os
import stat
import struct
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from xxhash import xxh3_64_intdigest

from zramd.errors import BadArena, BadValue, DeviceBusy, NoMemory, SaveFailed
from zramd.files import stands_at
from zramd.store import PAGE
from zramd.store.arena import (
    Arena,
    create,
    data_from,
    must_be_available,
    remove,
    run_of,
)
from zramd.store.header import MAGIC, RUN_AT, RUN_SIZE, SNAPSHOT_MAGIC, Header
from zramd.store.zcomp import Algorithm, Buffer

BLOCK: Final = 1 << 20
"""The longest. In blocks of a span a save beside a thread that writes got an eighth of the speed,
as each call waits for the GIL."""

_ENTRY: Final = struct.Struct("<QQQ")
_END: Final = struct.Struct("<QQQ8s")
_END_MAGIC: Final = b"zramdend"

_POLL_S: Final = 0.02

Entry = tuple[int, int, int]
"""Where the block lies in the arena, its length, its checksum."""


class Index:
    """What a file's blocks are, as they are written."""

    def __init__(self) -> None:
        self._entries = bytearray()

    def add(self, at: int, block: Buffer) -> None:
        self._entries += _ENTRY.pack(at, len(block), xxh3_64_intdigest(block))

    def pack(self, position: int) -> bytes:
        """What comes behind the blocks, `position` bytes into the file."""
        count = len(self._entries) // _ENTRY.size
        checksum = _of_index(bytes(self._entries), position, count)
        return bytes(self._entries) + _END.pack(position, count, checksum, _END_MAGIC)


def _entries(fd: int, what: str) -> tuple[list[Entry], int]:
    """The index of this file, and where it begins."""
    size = os.fstat(fd).st_size
    end = os.pread(fd, _END.size, max(0, size - _END.size))
    if len(end) < _END.size or not end.endswith(_END_MAGIC):
        raise BadArena(
            f"the {what} does not end as one: it was cut off, or never finished",
            hint="take another copy of it",
        )
    position, count, checksum, _ = _END.unpack(end)
    if position + count * _ENTRY.size + _END.size != size or count * PAGE > position:
        raise BadArena(f"the {what} is damaged: its index and its size do not go together")
    packed = os.pread(fd, count * _ENTRY.size, position)
    if _of_index(packed, position, count) != checksum:
        raise BadArena(f"the {what} is damaged: the checksum of its index is wrong")
    return list(_ENTRY.iter_unpack(packed)), position


def _must_be_file(fd: int, what: str) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise BadArena(f"this is no {what} of zramd: it is no file")


def _of_index(entries: bytes, position: int, count: int) -> int:
    """The checksum of an index."""
    return xxh3_64_intdigest(entries + _END.pack(position, count, 0, _END_MAGIC))


def _check_layout(entries: list[Entry], header: Header, what: str) -> None:
    """The blocks are whole pages, in order, each in one part of the arena; the header first."""
    end = 0
    for at, length, _ in entries:
        if at % PAGE or length % PAGE or not 0 < length <= BLOCK or not end <= at:
            raise BadArena(f"the {what} is senseless: a block of {length} bytes at {at}")
        end = at + length
    if end > header.size or not entries or entries[0][:2] != (0, PAGE):
        raise BadArena(f"the {what} is senseless: its blocks are not those of an arena")


# Snapshots


class Snapshot:
    """One that is written to the file `fd`, from its beginning on: the header page, the other
    blocks in order, and then `end`. Each call raises SaveFailed."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._index = Index()
        self._position = 0

    def add_header(self, page: bytes) -> None:
        """That of the arena."""
        self.add(0, SNAPSHOT_MAGIC + page[len(SNAPSHOT_MAGIC) :])

    def add(self, at: int, block: Buffer) -> None:
        """At most BLOCK bytes that lie there in the arena."""
        self._index.add(at, block)
        self._write(block)

    def end(self) -> None:
        self._write(self._index.pack(self._position))

    def _write(self, data: Buffer) -> None:
        try:
            write(self._fd, data, self._position)
        except OSError as error:
            raise SaveFailed(f"the snapshot cannot be written: {error.strerror}") from error
        self._position += len(data)


def pack(arena: int, fd: int) -> None:
    """Write a snapshot to the file `fd` of an arena that nobody uses, as the process that did so
    has left it. Raises BadArena, SaveFailed."""
    page = os.pread(arena, PAGE, 0)
    header = Header.unpack(page, os.fstat(arena).st_size, more=True)
    snapshot = Snapshot(fd)
    snapshot.add_header(page)
    at = PAGE
    while (at := data_from(arena, at, header.size)) < header.size:
        end = min(os.lseek(arena, at, os.SEEK_HOLE), at + BLOCK, header.size)
        snapshot.add(at, os.pread(arena, end - at, at))
        at = end
    snapshot.end()


def unpack(fd: int, path: Path | None = None) -> int:
    """The descriptor of a new arena in memory, or in the user's file `path`, as the snapshot that
    `fd` is open on has it.

    `fd` is read from its beginning on; its position says how far this is. Raises BadValue where
    there is such a file, and NoMemory.
    """
    what = "snapshot"
    _must_be_file(fd, what)
    header = Header.of(os.pread(fd, PAGE, 0), SNAPSHOT_MAGIC)
    entries, position = _entries(fd, what)
    _check_layout(entries, header, what)
    if sum(length for _, length, _ in entries) != position:
        raise BadArena(f"the {what} is damaged: its index and its size do not go together")
    if header.reserved_limit:
        must_be_available(header.size)
    elif path is None:
        must_be_available(position)
    arena = create(path)
    try:
        os.ftruncate(arena, header.size)
        os.lseek(fd, 0, os.SEEK_SET)
        first = b""
        for at, length, checksum in entries:
            block = _read(fd, length)
            _check_block(block, at, checksum, what)
            if at:
                write(arena, block, at)
            else:
                first = block
        write(arena, MAGIC + first[len(MAGIC) :], 0)
    except BaseException as error:
        if path is not None:
            remove(arena, path)
        os.close(arena)
        if isinstance(error, OSError):
            raise NoMemory(f"the snapshot cannot be restored: {error.strerror}") from error
        raise
    return arena


def _read(fd: int, length: int) -> bytes:
    block = os.read(fd, length)
    while len(block) < length:
        more = os.read(fd, length - len(block))
        if not more:
            raise BadArena("the snapshot was cut off while it was read")
        block += more
    return block


def _check_block(block: Buffer, at: int, checksum: int, what: str) -> None:
    if xxh3_64_intdigest(block) != checksum:
        raise BadArena(
            f"the {what} is damaged: the checksum of byte {at} to {at + len(block)} of the arena"
            " is wrong",
            hint="take another copy of it",
        )


# Arena files


def find(path: Path, wait_s: float = 0) -> int | None:
    """The descriptor of the user's arena, which is good, and locked; None where there is no such
    file.

    Waits so long for another process that uses it to end. Raises DeviceBusy where it does not, and
    BadValue where the file cannot be opened or its algorithm is not known here.
    """
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise BadValue(f"{path} cannot be opened: {error.strerror}") from error
        try:
            _lock(fd, path, wait_s)
            if stands_at(path, fd):  # or who had it locked has removed it
                _check(fd)
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _lock(fd: int, path: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise DeviceBusy(
                    f"{path} is in use by another server",
                    hint="choose another file, or end that server: `zramd list` shows which run",
                ) from None
            time.sleep(_POLL_S)
        except OSError as error:
            raise BadValue(f"{path} cannot be locked: {error.strerror}") from error


def _check(fd: int) -> None:
    """That all of the file, sealed or open, can be taken for good."""
    _must_be_file(fd, "arena")
    first = os.pread(fd, PAGE, 0)
    size = os.fstat(fd).st_size
    header = Header.unpack(first, size, more=True)
    Algorithm.parse(header.algorithm)
    if header.reserved_limit:
        must_be_available(header.size)
    # What was killed while it sealed has left a beginning of an index, and is open.
    if size > header.size and os.pread(fd, PAGE, size - len(_END_MAGIC)) == _END_MAGIC:
        _check_sealed(fd, header)
    elif first[RUN_AT : RUN_AT + RUN_SIZE] != run_of(fd):
        raise BadArena(
            "the arena was in use when the machine went down: which of its pages are good, nobody"
            " can tell",
            hint="restore a snapshot of it, or remove it",
        )


def _check_sealed(fd: int, header: Header) -> None:
    what = "arena"
    entries, position = _entries(fd, what)
    _check_layout(entries, header, what)
    if position != header.size:
        raise BadArena(f"the {what} is damaged: its index and its size do not go together")
    end = 0
    for at, length, checksum in entries:
        _must_be_zeros(fd, end, min(at, header.spans_at))
        block = os.pread(fd, length, at)
        _check_block(block if at else _without_run(block), at, checksum, what)
        end = at + length
    _must_be_zeros(fd, end, header.spans_at)


def _must_be_zeros(fd: int, start: int, stop: int) -> None:
    """What no block covers of table and span map: words there would be taken for good."""
    at = start
    while at < stop and (at := data_from(fd, at, stop)) < stop:
        block = os.pread(fd, min(BLOCK, stop - at), at)
        if block.strip(b"\0"):
            raise BadArena(f"the arena is damaged: at byte {at} is something without a checksum")
        at += len(block)


def _without_run(page: bytes) -> bytes:
    """The header page as it is counted: who opens a file changes that, and nothing else."""
    return page[:RUN_AT] + bytes(RUN_SIZE) + page[RUN_AT + RUN_SIZE :]


def unseal(arena: Arena) -> None:
    """Open the arena's file, if it is one, for use. Raises OSError."""
    if arena.is_file:
        # First: without it, an open file is good for nothing.
        arena.map[RUN_AT : RUN_AT + RUN_SIZE] = run_of(arena.fd)
        if os.fstat(arena.fd).st_size > arena.size:
            os.ftruncate(arena.fd, arena.size)
            os.fsync(arena.fd)


def seal(arena: Arena, in_use: Iterable[tuple[int, int]]) -> None:
    """Make the arena's file good for other runs of the machine: all of it is on the disk, with its
    index. `in_use`: (start, stop) of all that is, ascending. Nobody uses the arena any more, but to
    close it. Raises SaveFailed; then the file is still open."""
    if not arena.stands:
        raise SaveFailed(f"{arena.path} has been removed or replaced: what the device had is lost")
    index = Index()
    for start, stop in in_use:
        for at in range(start, stop, BLOCK):
            block = arena.map[at : min(at + BLOCK, stop)]
            index.add(at, block if at else _without_run(block))
    try:
        os.fsync(arena.fd)  # not msync(2): that would hold the GIL meanwhile
        write(arena.fd, index.pack(arena.size), arena.size)
        os.fsync(arena.fd)
    except OSError as error:
        raise SaveFailed(
            f"the arena's file cannot be sealed: {error.strerror}",
            hint="it is good until the machine goes down: make room on its file system, and have it"
            " served and closed once more before",
        ) from error


def write(fd: int, data: Buffer, at: int) -> None:
    """All of it. Raises OSError."""
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        at, view = at + written, view[written:]

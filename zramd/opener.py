"""Opener: a device held open for I/O, as an open block device in the kernel is.

One per NBD connection or nbdkit handle. It belongs to the initialisation it was opened on: when
that is reset, the opener is closed for good, and a later initialisation needs a new one. So a
request touches the pages and the counters of the generation it was admitted to, and no others.

Every request takes no device lock, and goes the same way:
1. Enter the gate. Refused (EIO): the device is not initialised, or is being reset.
2. Look whether this opener is closed (EIO). Inside the gate that cannot change through a reset:
   the resetter closes openers after its drain, and the drain waits for us.
3. Check bounds (EINVAL, counted in invalid_io).
4. Do the pages. Failures of the store are counted in failed_reads or failed_writes.
5. Leave the gate, in `finally`.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import groupby, islice

from zramd.errors import Corrupt, NotInitialised, OutOfRange, StoreFull
from zramd.gate import Gate
from zramd.store.header import FAILED_READS, FAILED_WRITES, INVALID_IO, NOTIFY_FREE, figure
from zramd.store.pages import Pages
from zramd.store.table import Kind
from zramd.store.zcomp import Buffer


@dataclass(slots=True)
class IoCounts:
    """The four counters of io_stat, of one initialisation, kept in its arena's figures as well."""

    failed_reads: int = 0
    failed_writes: int = 0
    invalid_io: int = 0
    notify_free: int = 0
    _figures: memoryview | None = field(default=None, repr=False, compare=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def kept_in(cls, figures: memoryview) -> "IoCounts":
        """Those that stand there; `add` is called no more when the arena is closed."""
        return cls(
            figure(figures, FAILED_READS),
            figure(figures, FAILED_WRITES),
            figure(figures, INVALID_IO),
            figure(figures, NOTIFY_FREE),
            figures,
        )

    def add(
        self,
        *,
        failed_reads: int = 0,
        failed_writes: int = 0,
        invalid_io: int = 0,
        notify_free: int = 0,
    ) -> None:
        with self._lock:
            self.failed_reads += failed_reads
            self.failed_writes += failed_writes
            self.invalid_io += invalid_io
            self.notify_free += notify_free
            figures = self._figures
            if figures is not None:
                figures[FAILED_READS] = self.failed_reads
                figures[FAILED_WRITES] = self.failed_writes
                figures[INVALID_IO] = self.invalid_io
                figures[NOTIFY_FREE] = self.notify_free


def _allocation(extent: tuple[int, Kind]) -> Kind:
    """Its kind, where all data are of one."""
    return min(extent[1], Kind.SAME)


class Opener:
    """What `Zram.open` gives. Any number of threads may call.

    Offsets and lengths are bytes, of any alignment. Every call raises NotInitialised (EIO) once
    the opener is closed, and OutOfRange (EINVAL) beyond its size.
    """

    def __init__(
        self,
        who: str,
        size: int,
        gate: Gate,
        pages: Pages,
        counts: IoCounts,
        let_go: Callable[["Opener"], None],
    ) -> None:
        self.who = who
        self.size = size
        self.closed = False
        """Set for good by `close`, or by the reset of what it was opened on."""
        self.at_once = pages.comp.at_once
        """Bytes that a write does not take long to compress."""
        self._gate = gate
        self._pages = pages
        self._counts = counts
        self._let_go = let_go

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes. Raises Corrupt where a stored page does not decompress."""
        return b"".join(self.parts(offset, length))  # which is no copy of one

    def parts(self, offset: int, length: int) -> list[bytes]:
        """What `read` returns, before it is joined: in order, a page at most each, none empty. A
        reply that is sent in parts is spared a copy."""
        record = self._gate.enter(self.who)
        try:
            self._check(offset, length)
            return self._pages.parts(offset, length)
        except Corrupt:
            self._counts.add(failed_reads=1)
            raise
        finally:
            self._gate.leave(record)

    def write(self, offset: int, data: Buffer, *, nowait: bool = False) -> None:
        """Write; `data` is the caller's again on return. Raises StoreFull at mem_limit, Corrupt
        where a page is written in part and its old content does not decompress; BlockingIOError
        where `nowait` and it may take long: to be called again without."""
        record = self._gate.enter(self.who)
        try:
            self._check(offset, len(data))
            self._pages.write(offset, data, nowait=nowait)
        except (StoreFull, Corrupt):
            self._counts.add(failed_writes=1)
            raise
        finally:
            self._gate.leave(record)

    def discard(self, offset: int, length: int) -> None:
        """Free the pages that lie wholly in the range; they read as zeros afterwards."""
        record = self._gate.enter(self.who)
        try:
            self._check(offset, length)
            self._counts.add(notify_free=self._pages.discard(offset, length))
        finally:
            self._gate.leave(record)

    def zero(self, offset: int, length: int, *, nowait: bool = False) -> None:
        """Make the range read as zeros, freeing whole pages. Raises what a write raises."""
        record = self._gate.enter(self.who)
        try:
            self._check(offset, length)
            self._counts.add(notify_free=self._pages.zero(offset, length, nowait=nowait))
        except (StoreFull, Corrupt):
            self._counts.add(failed_writes=1)
            raise
        finally:
            self._gate.leave(record)

    def flush(self) -> None:
        """Nothing: what a write has left in RAM is as safe as it gets. But who asks after a reset
        must not hear that all is well."""
        self.cache(0, 0)

    def cache(self, offset: int, length: int) -> None:
        """Nothing, in that range: it is in RAM."""
        record = self._gate.enter(self.who)
        try:
            self._check(offset, length)
        finally:
            self._gate.leave(record)

    def extents(
        self, offset: int, length: int, most: int, *, alike: bool = False
    ) -> list[tuple[int, Kind]]:
        """(bytes, how they are stored) along the range, neighbours merged, none empty: the first
        `most` of them, and fewer where that takes long; at least one, of a range not empty. Where
        `alike`, those before the first that differs in whether it is a hole, zeros or data."""
        record = self._gate.enter(self.who)
        try:
            self._check(offset, length)
            found = self._pages.extents(offset, length)
            if alike:
                _, found = next(groupby(found, key=_allocation), (None, iter(())))
            return list(islice(found, most))
        finally:
            self._gate.leave(record)

    def close(self) -> None:
        """Let go of the device. May be called again, and after a reset."""
        self.closed = True
        self._let_go(self)

    def _check(self, offset: int, length: int) -> None:
        if self.closed:
            raise NotInitialised("the device was reset since it was opened", hint="connect again")
        if offset < 0 or length < 0 or offset > self.size - length:
            self._counts.add(invalid_io=1)
            raise OutOfRange(f"{length} bytes at {offset} do not lie in {self.size} bytes")

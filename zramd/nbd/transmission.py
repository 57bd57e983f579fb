"""The transmission phase of one connection: requests out of bytes, replies out of requests.

No sockets here. The driver of a connection

1. lets the peer's bytes be written into `Receiver.get_buffer()` and reports how many came,
2. iterates over `Receiver.requests()` for the requests that are complete by now,
3. calls `answer` for each, here or in another thread, and sends the buffers it returns, and
4. when it leaves the iteration, calls `Receiver.keep()`: the buffer is all connections' own.

Promises:
- A request comes out once, when its last byte is in, whatever pieces the bytes came in.
- Whatever the peer sends, framing is kept: a WRITE that cannot be served has its payload consumed
  and is then answered. Only a bad magic number, or a payload no reasonable client sends, ends the
  connection (`Receiver.violation`).
- `answer` sends only errors the specification names, and raises nothing that it is not asked for.
- Between two calls a Receiver holds what was not asked for yet, at most one buffer of it, or less
  than OWN bytes; and the payload that is just coming.

Performance: this code runs once per 4 KiB, so requests are tuples, cookies stay bytes, and a small
payload is a view into the receive buffer. A larger one is received into a buffer of its own, which
may go to another thread.
"""

import errno
import logging
import mmap
from collections.abc import Iterator
from typing import Protocol

from zramd.errors import OutOfRange, ZramdError
from zramd.nbd.contexts import described
from zramd.nbd.replies import SIMPLE, Reply, Simple
from zramd.nbd.wire import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_CACHE,
    NBD_CMD_DISC,
    NBD_CMD_FLAG_DF,
    NBD_CMD_FLAG_FAST_ZERO,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLAG_PAYLOAD_LEN,
    NBD_CMD_FLAG_REQ_ONE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_READ_ONLY,
    NBD_FLAG_SEND_CACHE,
    NBD_FLAG_SEND_FAST_ZERO,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    nbd_error,
)
from zramd.store.table import Kind

FLAGS = (
    NBD_FLAG_HAS_FLAGS
    | NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_CAN_MULTI_CONN
    | NBD_FLAG_SEND_CACHE
    | NBD_FLAG_SEND_FAST_ZERO
)
"""What this module can do, as transmission flags. In RAM a completed write is as safe as it gets,
so FLUSH and FUA cost nothing and hold for all connections at once, and everything is cached."""

READ_ONLY_FLAGS = NBD_FLAG_READ_ONLY | (
    FLAGS & ~(NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO)
)
"""Of a read-only export, as nbdkit and qemu-nbd have it: what would change it is not offered."""

MAX_PAYLOAD = 32 << 20
"""The longest READ or WRITE; the limit clients assume when a server names none."""

MAX_SKIPPED = 128 << 20
"""The longest payload thrown away to keep the connection, as nbdkit does. With extended headers the
specification wants nothing thrown away that is longer than MAX_PAYLOAD."""

INLINE = 128 << 10
"""Longest request, in bytes, that is worth answering on the spot; the kernel's request size, too.
On 2 cores, fio with 8 of 128 KiB in flight got 1.2 to 1.9 times as many through here as through
threads with lz4, and about as many with zstd; reads of 1 MiB are faster in threads."""

BUFFER = 256 << 10
"""Of all connections: room for the longest WRITE that has no buffer of its own, and much more."""

OWN = 32 << 10
"""A payload of so many bytes that has not come whole is received into a buffer of its own. The rest
of a shorter one is copied, twice: that costs less than another system call."""

FILLED = 1 << 20
"""The buffer of a payload of so many bytes comes from the heap, which a hardened process has in
store; that of a longer one from the system, as it fills. No kernel swaps in such."""

MOST_EXTENTS = 64
"""In one block status: 0.1 ms."""

# FUA is valid on all commands once advertised. We keep zeroes without allocating them, so NO_HOLE
# asks for nothing that a compressed store could promise; it is accepted as any server may. And to
# free pages is always fast.
_ALLOWED_FLAGS = {
    NBD_CMD_READ: NBD_CMD_FLAG_FUA,
    NBD_CMD_WRITE: NBD_CMD_FLAG_FUA,
    NBD_CMD_FLUSH: NBD_CMD_FLAG_FUA,
    NBD_CMD_TRIM: NBD_CMD_FLAG_FUA,
    NBD_CMD_CACHE: NBD_CMD_FLAG_FUA,
    NBD_CMD_WRITE_ZEROES: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE | NBD_CMD_FLAG_FAST_ZERO,
}
_ALLOWED_CHUNKED = _ALLOWED_FLAGS | {
    NBD_CMD_READ: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_DF,
    NBD_CMD_BLOCK_STATUS: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_REQ_ONE,
}
_ALLOWED_EXTENDED = _ALLOWED_CHUNKED | {
    NBD_CMD_WRITE: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_PAYLOAD_LEN,
}
_CHANGING = (NBD_CMD_WRITE, NBD_CMD_TRIM, NBD_CMD_WRITE_ZEROES)

Refusal = tuple[int, str]
"""error, why"""

Request = tuple[Refusal | None, int, bytes, int, int, int, memoryview | None]
"""refusal, command, cookie, offset, length, flags, payload. A refusal is the answer already."""


class Opener(Protocol):
    """What requests are answered from: `zramd.opener.Opener`, or a stand-in."""

    def parts(self, offset: int, length: int) -> list[bytes]: ...
    def write(self, offset: int, data: memoryview, *, nowait: bool) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def zero(self, offset: int, length: int, *, nowait: bool) -> None: ...
    def flush(self) -> None: ...
    def cache(self, offset: int, length: int) -> None: ...
    def extents(
        self, offset: int, length: int, most: int, *, alike: bool
    ) -> list[tuple[int, Kind]]: ...


class Receiver:
    """The peer's byte stream, cut into requests.

    `size` is the export's, in bytes; `buffer`, of BUFFER bytes, is written to by nobody between
    `get_buffer` and `keep`; `head` is what arrived before there was a Receiver.
    """

    def __init__(
        self,
        size: int,
        buffer: memoryview,
        form: Simple = SIMPLE,
        *,
        read_only: bool = False,
        head: bytes = b"",
    ) -> None:
        self.ended = False
        """No request will come any more: DISC was read, or there was a `violation`."""
        self.violation = ""
        """What the peer did that no reply cures."""
        self._size = size
        self._form = form
        self._read_only = read_only
        self._allowed = (
            _ALLOWED_EXTENDED
            if form.extended
            else _ALLOWED_CHUNKED
            if form.chunked
            else _ALLOWED_FLAGS
        )
        self._buffer = buffer
        # What has come, in the buffer or kept, and where in it lies what is not parsed yet.
        self._data, self._start = memoryview(head), 0
        # A WRITE whose payload is still arriving, in its own buffer (or nowhere, if refused).
        self._pending: Request | None = None
        self._missing = 0

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; never empty. Only to be used once `requests` is exhausted."""
        if self._pending is not None:
            payload = self._pending[6]
            if payload is not None:
                return payload[len(payload) - self._missing :]
        rest = self._data[self._start :]
        self._buffer[: len(rest)] = rest
        return self._buffer[len(rest) :]

    def received(self, count: int) -> None:
        """`count` bytes were written to the start of `get_buffer()`."""
        if self._pending is not None and self._pending[6] is not None:
            self._missing -= count
        else:
            rest = len(self._data) - self._start
            self._data, self._start = self._buffer[: rest + count], 0

    def keep(self) -> None:
        """Leave the buffer to others."""
        rest = self._data[self._start :]
        if not rest:
            rest = _NOTHING
        elif rest.obj is self._buffer.obj:
            rest = memoryview(bytes(rest))
        self._data, self._start = rest, 0

    def requests(self) -> Iterator[Request]:
        """The requests that are complete. May be left early and asked again for the rest.

        A payload of at most INLINE bytes is good until the next request is asked for.
        """
        layout, magic_of, extended = self._form.request, self._form.magic, self._form.extended
        unpack, head = layout.unpack_from, layout.size
        # With the flags and lengths below: nothing that `_refusal` would refuse.
        last_plain = NBD_CMD_READ if self._read_only or extended else NBD_CMD_WRITE
        data = self._data
        while not self.ended:
            if self._pending is not None:
                self._absorb()
                if self._missing:
                    break
                request, self._pending = self._pending, None
                yield request
                continue
            start = self._start
            stop = start + head
            if stop > len(data):
                break
            magic, flags, command, cookie, offset, length = unpack(data, start)
            if magic != magic_of:
                self._violate(f"{magic:#x} where a request should begin")
                break
            if command <= last_plain and flags <= NBD_CMD_FLAG_FUA and 0 < length <= MAX_PAYLOAD:
                refusal = None
            else:
                refusal = self._refusal(command, flags, offset, length)
            payload = None
            if command == NBD_CMD_WRITE or (
                extended and flags & NBD_CMD_FLAG_PAYLOAD_LEN and command != NBD_CMD_DISC
            ):
                missing = stop + length - len(data)
                if length > INLINE or (missing > 0 and length >= OWN):
                    self._start = stop
                    self._expect(refusal, command, cookie, offset, length, flags)
                    continue
                if missing > 0:
                    break
                payload = data[stop : stop + length]
                stop += length
            self._start = stop
            if command == NBD_CMD_DISC:
                self.ended = True
                break
            yield refusal, command, cookie, offset, length, flags, payload

    def _refusal(self, command: int, flags: int, offset: int, length: int) -> Refusal | None:
        """What a request deserves before anyone looks at its range; None for nothing."""
        allowed = self._allowed.get(command)
        if allowed is None:
            return errno.EINVAL, f"there is no command {command} here"
        if flags & ~allowed:
            return errno.EINVAL, f"flags {flags & ~allowed:#x} are not for command {command} here"
        if self._read_only and command in _CHANGING:
            return errno.EPERM, "the export is read-only"
        if command == NBD_CMD_FLUSH:
            return (errno.EINVAL, "a flush has no range") if offset or length else None
        if length == 0:
            return errno.EINVAL, "a length of 0"  # unspecified; nbdkit's choice
        if (
            command == NBD_CMD_WRITE
            and self._form.extended
            and not flags & NBD_CMD_FLAG_PAYLOAD_LEN
        ):
            return errno.EINVAL, "a write without its flag for a payload"
        if length > MAX_PAYLOAD and command in (NBD_CMD_READ, NBD_CMD_WRITE):
            beyond = command == NBD_CMD_WRITE and offset + length > self._size
            return errno.ENOSPC if beyond else errno.EINVAL, f"more than {MAX_PAYLOAD} bytes"
        return None

    def _expect(
        self,
        refusal: Refusal | None,
        command: int,
        cookie: bytes,
        offset: int,
        length: int,
        flags: int,
    ) -> None:
        """Begins a request whose payload has a buffer of its own."""
        if length > (MAX_PAYLOAD if self._form.extended else MAX_SKIPPED):
            self._violate(f"a payload of {length} bytes")
            return
        payload = None if refusal else _buffer_for(length)
        self._pending = refusal, command, cookie, offset, length, flags, payload
        self._missing = length

    def _absorb(self) -> None:
        """Moves what came with the pending request's header to where the rest will come."""
        assert self._pending is not None
        start, payload = self._start, self._pending[6]
        count = min(self._missing, len(self._data) - start)
        if payload is not None and count:
            payload[:count] = self._data[start : start + count]
        self._start += count
        self._missing -= count

    def _violate(self, what: str) -> None:
        self.violation, self.ended = what, True


def answer(
    opener: Opener,
    request: Request,
    form: Simple = SIMPLE,
    contexts: tuple[int, ...] = (),
    *,
    nowait: bool = False,
) -> Reply:
    """Does what `request` asks and returns the reply in this form; `contexts` are those that a
    block status tells of.

    Raises BlockingIOError where `nowait` and it may take long, to be called again without; nothing
    else.
    """
    refusal, command, cookie, offset, length, flags, payload = request
    try:
        if refusal:
            error, why = refusal
        elif command == NBD_CMD_READ:
            return form.data(cookie, offset, length, opener.parts(offset, length))
        else:
            if command == NBD_CMD_WRITE:
                assert payload is not None
                opener.write(offset, payload, nowait=nowait)
            elif command == NBD_CMD_TRIM:
                opener.discard(offset, length)
            elif command == NBD_CMD_WRITE_ZEROES:
                opener.zero(offset, length, nowait=nowait)
            elif command == NBD_CMD_CACHE:
                opener.cache(offset, length)
            elif command == NBD_CMD_BLOCK_STATUS and contexts:
                # One is all that qemu ever asks for: told by kind of page it takes a request for
                # each page of data that differ, 15 times as long to copy.
                one = bool(flags & NBD_CMD_FLAG_REQ_ONE)
                extents = opener.extents(offset, length, MOST_EXTENTS, alike=one)
                most = 1 if one else None
                told = ((context, described(context, extents)[:most]) for context in contexts)
                return form.status(cookie, offset, told)
            elif command == NBD_CMD_BLOCK_STATUS:
                return form.error(cookie, offset, errno.EINVAL, "no context was negotiated")
            else:  # NBD_CMD_FLUSH
                opener.flush()
            return form.done(cookie, offset)
    except OutOfRange as beyond:
        error = errno.ENOSPC if command in _STORING else errno.EINVAL
        why = beyond.message
    except ZramdError as failure:
        error, why = nbd_error(failure.errno), failure.message
    except Exception as fault:
        if nowait and isinstance(fault, BlockingIOError):
            raise
        error, why = errno.EIO, "the server has failed; its log says how"
        _report(command, fault)
    return form.error(cookie, offset, error, why)


def _buffer_for(length: int) -> memoryview:
    """Zeros are written to a bytearray when it is made. Of a mapping only what comes is touched: or
    headers alone, of 32 MiB each, would cost 20 ms and as much memory as they promise."""
    if length <= FILLED:
        return memoryview(bytearray(length))
    return memoryview(mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE))


_STORING = (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES)
_NOTHING = memoryview(b"")
_log = logging.getLogger(__name__)
_reported: set[tuple[int, type[Exception]]] = set()


def _report(command: int, fault: Exception) -> None:
    """Logs a fault of ours, once per kind: it may come with every request from now on."""
    kind = command, type(fault)
    if kind not in _reported:
        _reported.add(kind)
        _log.error(
            "NBD command %d failed unexpectedly; the client sees EIO", command, exc_info=fault
        )

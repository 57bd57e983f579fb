"""The transmission phase of one connection: requests out of bytes, replies out of requests.

No sockets here. The driver of a connection

1. lets the peer's bytes be written into `Receiver.get_buffer()` and reports how many came,
2. iterates over `Receiver.requests()` for the requests that are complete by now, and
3. calls `answer` for each, here or in another thread, and sends the buffers it returns.

Promises:
- A request comes out once, when its last byte is in, whatever pieces the bytes came in.
- Whatever the peer sends, framing is kept: a WRITE that cannot be served has its payload consumed
  and is then answered. Only a bad magic number, or a payload no reasonable client sends, ends the
  connection (`Receiver.violation`).
- `answer` sends only errors the specification names, and raises nothing that it is not asked for.

Performance: this code runs once per 4 KiB, so requests are tuples, cookies stay bytes, and a small
payload is a view into the receive buffer. A larger one is received into a buffer of its own, which
may go to another thread.
"""

import errno
import logging
from collections.abc import Iterator
from typing import Protocol

from zramd.errors import OutOfRange, ZramdError
from zramd.nbd.wire import (
    NBD_CMD_DISC,
    NBD_CMD_FLAG_FUA,
    NBD_CMD_FLAG_NO_HOLE,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_CAN_MULTI_CONN,
    NBD_FLAG_HAS_FLAGS,
    NBD_FLAG_SEND_FLUSH,
    NBD_FLAG_SEND_FUA,
    NBD_FLAG_SEND_TRIM,
    NBD_FLAG_SEND_WRITE_ZEROES,
    NBD_REQUEST_MAGIC,
    REQUEST,
    SIMPLE_REPLY_OK,
    nbd_error,
    pack_simple_reply,
)

FLAGS = (
    NBD_FLAG_HAS_FLAGS
    | NBD_FLAG_SEND_FLUSH
    | NBD_FLAG_SEND_FUA
    | NBD_FLAG_SEND_TRIM
    | NBD_FLAG_SEND_WRITE_ZEROES
    | NBD_FLAG_CAN_MULTI_CONN
)
"""What this module can do, as transmission flags. In RAM a completed write is as safe as it gets,
so FLUSH and FUA cost nothing and hold for all connections at once."""

MAX_PAYLOAD = 32 << 20
"""The longest READ or WRITE; the limit clients assume when a server names none."""

MAX_SKIPPED = 128 << 20
"""The longest WRITE payload thrown away to keep the connection, as nbdkit does."""

INLINE = 128 << 10
"""Longest request, in bytes, that is worth answering on the spot; the kernel's request size, too.
On 2 cores, fio with 8 of 128 KiB in flight got 1.2 to 1.9 times as many through here as through
threads with lz4, and about as many with zstd; reads of 1 MiB are faster in threads."""

_BUFFER = 256 << 10
"""Room for the longest WRITE that has no buffer of its own, and much that follows it."""

# FUA is valid on all commands once advertised. We keep zeroes without allocating them, so NO_HOLE
# asks for nothing that a compressed store could promise; it is accepted as any server may.
_ALLOWED_FLAGS = {
    NBD_CMD_READ: NBD_CMD_FLAG_FUA,
    NBD_CMD_WRITE: NBD_CMD_FLAG_FUA,
    NBD_CMD_FLUSH: NBD_CMD_FLAG_FUA,
    NBD_CMD_TRIM: NBD_CMD_FLAG_FUA,
    NBD_CMD_WRITE_ZEROES: NBD_CMD_FLAG_FUA | NBD_CMD_FLAG_NO_HOLE,
}

Request = tuple[int, int, bytes, int, int, memoryview | None]
"""error, command, cookie, offset, length, payload of a WRITE. An error is the answer already."""


class Opener(Protocol):
    """What requests are answered from: `zramd.opener.Opener`, or a stand-in."""

    def read(self, offset: int, length: int) -> bytes: ...
    def write(self, offset: int, data: memoryview, *, nowait: bool) -> None: ...
    def discard(self, offset: int, length: int) -> None: ...
    def zero(self, offset: int, length: int, *, nowait: bool) -> None: ...
    def flush(self) -> None: ...


class Receiver:
    """The peer's byte stream, cut into requests.

    `size` is the export's, in bytes; `head` what arrived before there was a Receiver.
    """

    def __init__(self, size: int, head: bytes = b"") -> None:
        self.ended = False
        """No request will come any more: DISC was read, or there was a `violation`."""
        self.violation = ""
        """What the peer did that no reply cures."""
        self._size = size
        self._buffer = memoryview(bytearray(_BUFFER + len(head)))
        self._buffer[: len(head)] = head
        self._start, self._end = 0, len(head)  # the bytes not parsed yet
        # A WRITE whose payload is still arriving, in its own buffer (or nowhere, if refused).
        self._pending: Request | None = None
        self._missing = 0

    def get_buffer(self) -> memoryview:
        """Where the next bytes go; never empty. Only to be used once `requests` is exhausted."""
        if self._pending is not None:
            payload = self._pending[5]
            if payload is not None:
                return payload[len(payload) - self._missing :]
        return self._buffer[self._end :]

    def received(self, count: int) -> None:
        """`count` bytes were written to the start of `get_buffer()`."""
        if self._pending is not None and self._pending[5] is not None:
            self._missing -= count
        else:
            self._end += count

    def requests(self) -> Iterator[Request]:
        """The requests that are complete. May be left early and asked again for the rest.

        A payload of at most INLINE bytes is good until the next request is asked for.
        """
        buffer, unpack = self._buffer, REQUEST.unpack_from
        while not self.ended:
            if self._pending is not None:
                if self._absorb():
                    break
                request, self._pending = self._pending, None
                yield request
                continue
            start = self._start
            stop = start + REQUEST.size
            if stop > self._end:
                break
            magic, flags, command, cookie, offset, length = unpack(buffer, start)
            if magic != NBD_REQUEST_MAGIC:
                self._violate(f"{magic:#x} where a request should begin")
                break
            if command <= NBD_CMD_WRITE and flags <= NBD_CMD_FLAG_FUA and 0 < length <= MAX_PAYLOAD:
                error = 0  # all that `_refusal` would look at, for the commands that matter
            else:
                error = self._refusal(command, flags, offset, length)
            payload = None
            if command == NBD_CMD_WRITE:
                if length > INLINE:
                    self._start = stop
                    self._expect(error, command, cookie, offset, length)
                    continue
                payload = buffer[stop : stop + length]
                stop += length
                if stop > self._end:
                    break
            elif command == NBD_CMD_DISC:
                self.ended = True
                break
            self._start = stop
            yield error, command, cookie, offset, length, payload
        # All complete ones are out: what is left is less than one small request. Make room.
        left = self._end - self._start
        if left and self._start:
            buffer[:left] = buffer[self._start : self._end]
        self._start, self._end = 0, left

    def _refusal(self, command: int, flags: int, offset: int, length: int) -> int:
        """The error a request deserves before anyone looks at its range; 0 for none."""
        allowed = _ALLOWED_FLAGS.get(command)
        if allowed is None or flags & ~allowed:
            return errno.EINVAL
        if command == NBD_CMD_FLUSH:
            return errno.EINVAL if offset or length else 0
        if length == 0:
            return errno.EINVAL  # unspecified; nbdkit's choice
        if length > MAX_PAYLOAD and command in (NBD_CMD_READ, NBD_CMD_WRITE):
            beyond = command == NBD_CMD_WRITE and offset + length > self._size
            return errno.ENOSPC if beyond else errno.EINVAL
        return 0

    def _expect(self, error: int, command: int, cookie: bytes, offset: int, length: int) -> None:
        """Begins a WRITE too long for the buffer."""
        if length > MAX_SKIPPED:
            self._violate(f"a write of {length} bytes")
            return
        payload = None if error else memoryview(bytearray(length))
        self._pending = error, command, cookie, offset, length, payload
        self._missing = length

    def _absorb(self) -> int:
        """Moves buffered bytes to the pending WRITE; returns how many it still misses."""
        assert self._pending is not None
        start, count = self._start, min(self._missing, self._end - self._start)
        payload = self._pending[5]
        if payload is not None and count:
            there = len(payload) - self._missing
            payload[there : there + count] = self._buffer[start : start + count]
        self._start += count
        self._missing -= count
        return self._missing

    def _violate(self, what: str) -> None:
        self.violation, self.ended = what, True


def answer(opener: Opener, request: Request, *, nowait: bool = False) -> tuple[bytes, ...]:
    """Does what `request` asks and returns the reply's buffers, in order.

    Raises BlockingIOError where `nowait` and it may take long, to be called again without; nothing
    else.
    """
    error, command, cookie, offset, length, payload = request
    try:
        if error:
            pass
        elif command == NBD_CMD_READ:
            return SIMPLE_REPLY_OK + cookie, opener.read(offset, length)
        elif command == NBD_CMD_WRITE:
            assert payload is not None
            opener.write(offset, payload, nowait=nowait)
        elif command == NBD_CMD_TRIM:
            opener.discard(offset, length)
        elif command == NBD_CMD_WRITE_ZEROES:
            opener.zero(offset, length, nowait=nowait)
        else:  # NBD_CMD_FLUSH
            opener.flush()
    except OutOfRange:
        error = errno.ENOSPC if command in _STORING else errno.EINVAL
    except ZramdError as refusal:
        error = nbd_error(refusal.errno)
    except Exception as fault:
        if nowait and isinstance(fault, BlockingIOError):
            raise
        error = errno.EIO
        _report(command, fault)
    if error:
        return (pack_simple_reply(cookie, error),)
    return (SIMPLE_REPLY_OK + cookie,)


_STORING = (NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES)
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

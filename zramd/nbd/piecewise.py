"""What `stream.Stream` is, but on a transport of asyncio's: where TLS lies between it and the
socket, or the socket cannot be taken from it.

TLS encrypts at once all that it is given, and keeps that. So what is sent waits here, and is given
piece by piece.

Promises:
1. The transport is given no more than `batch` bytes and a piece in one turn of the event loop, and
   nothing while it has told us to pause.
2. The protocol hears `pause_writing` when something waits, and `resume_writing` when nothing does.
   What was sent before `close` goes out, if the peer reads it.
3. What waits at a `cut`, and what is sent after it, is given at once: TLS takes nothing any more
   when it has seen the end of file that follows.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Sequence
from typing import Any, Final, cast

_PIECE: Final = 128 << 10
"""In one write: the parts are joined, and a record of TLS has 16 KiB of it."""


class Piecewise(asyncio.Transport, asyncio.BufferedProtocol):
    """The protocol of `transport`, and the transport of `protocol`, between the two."""

    def __init__(
        self, transport: asyncio.Transport, protocol: asyncio.BufferedProtocol, batch: int
    ) -> None:
        self._transport = transport
        self._protocol = protocol
        self._batch = batch
        self._loop = asyncio.get_running_loop()
        self._unsent: deque[bytes] = deque()
        self._full = False  # the transport, as it has told us
        self._cut = self._closing = False
        transport.set_write_buffer_limits(high=batch)
        transport.set_protocol(self)

    # What the protocol calls

    def get_extra_info(self, name: str, default: object = None) -> Any:
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        self._transport.resume_reading()

    def get_write_buffer_size(self) -> int:
        return sum(map(len, self._unsent)) + self._transport.get_write_buffer_size()

    def send(self, parts: Sequence[bytes]) -> None:
        """All of them, in this order; nothing once this is closing."""
        if self._closing or self._transport.is_closing():
            return
        waits = bool(self._unsent)
        self._unsent += parts
        if not waits:
            self._give()

    def cut(self) -> None:
        """Read nothing that the peer has not sent by now."""
        self._cut = True
        self._give()
        shut_reading(self.get_extra_info("socket"))

    def close(self) -> None:
        if not self._closing:
            self._closing = True
            if not self._unsent:
                self._transport.close()

    def abort(self) -> None:
        self._transport.abort()

    def _give(self) -> None:
        given = 0
        while self._unsent and (self._cut or (not self._full and given < self._batch)):
            piece = [self._unsent.popleft()]
            size = len(piece[0])
            while self._unsent and size + len(self._unsent[0]) <= _PIECE:
                piece.append(self._unsent.popleft())
                size += len(piece[-1])
            # Not writelines: in Python 3.12 and 3.13 it forgets flow control (gh-127655), and that
            # the connection may be lost (gh-136234).
            self._transport.write(b"".join(piece))
            given += size
        if self._unsent:
            self._protocol.pause_writing()
            if not self._full:
                self._loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        """With what has waited for the peer to read, or for others to have a turn."""
        waited = bool(self._unsent)
        self._give()
        if self._unsent:
            return
        if not self._closing:
            if not self._full:
                self._protocol.resume_writing()
        elif waited:  # once: asyncio's TLS forgets all when it is closed again
            self._transport.close()

    # What the transport calls

    def get_buffer(self, sizehint: int) -> memoryview:
        return cast(memoryview, self._protocol.get_buffer(sizehint))

    def buffer_updated(self, count: int) -> None:
        self._protocol.buffer_updated(count)

    def eof_received(self) -> bool | None:
        stays = self._protocol.eof_received()
        if self._transport.can_write_eof():
            return stays
        self._unsent.clear()  # TLS ends as a whole: nothing goes out after this
        return False

    def pause_writing(self) -> None:
        self._full = True
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        self._full = False
        self._go_on()

    def connection_lost(self, error: Exception | None) -> None:
        self._unsent.clear()
        # TLS would keep our methods as we keep it, a cycle with all that it has encrypted: in a
        # hardened process that stays.
        self._transport.set_protocol(asyncio.BufferedProtocol())
        self._protocol.connection_lost(error)


def shut_reading(sock: socket.socket) -> None:
    """The end of file comes after what the peer has sent by now."""
    try:
        sock.shutdown(socket.SHUT_RD)
    except OSError:
        pass  # the peer is gone, and we are about to hear it

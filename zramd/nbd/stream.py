"""A connected socket, read and written on the event loop without a transport of asyncio's.

    stream = take_over(transport, protocol, batch)  # the same socket; the transport is done with

To its protocol (an asyncio.BufferedProtocol) it is the transport that it took over, but:

1. What is sent comes in parts, and goes from where they lie to the kernel. asyncio wants it in one
   piece, and copies twice what the socket does not take at once.
2. Who alone sends requests is listened to without the event loop in between; and the next request
   of a client that asks for one thing at a time is looked for before it is waited for (`_receive`).

Promises: the protocol hears `pause_writing` and `resume_writing` at the limits that it sets, and
`connection_lost` once, from the event loop. What was sent before `close` goes out, if the peer
reads it. Nobody waits more than _STAY_S longer because of the second point.
"""

import asyncio
import socket
from collections import deque
from collections.abc import Sequence
from itertools import islice
from time import perf_counter
from typing import Final

from zramd.nbd.piecewise import Piecewise, shut_reading

_MOST_PARTS: Final = 1024
"""In one sendmsg: IOV_MAX."""
_PARTS_AT_ONCE: Final = 128
"""Of what waits: more than a socket takes, pages being what there is most of."""

_STAY_S: Final = 0.0005
"""How long the only busy client keeps the event loop from all else."""

_SPIN_S: Final = 0.00005
"""How long a next request is looked for."""
_SOON_S: Final = 2 * _SPIN_S
"""A request that is waited for no longer would have been found, but for the waiting and waking."""
_MOST_DOUBT: Final = 1023


class Stream(asyncio.Transport):
    """What `take_over` gives."""

    _latest: "Stream | None" = None
    """Of all in this process, the one that was last read from."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        protocol: asyncio.BufferedProtocol,
        peername: object,
    ) -> None:
        super().__init__({"socket": sock, "peername": peername})
        self._loop = loop
        self._sock = sock
        self._fd = sock.fileno()  # a selector that is asked for a socket writes its name down first
        self._protocol = protocol
        self._reading = False
        self._closing = self._lost = False
        self._unsent: deque[memoryview | bytes] = deque()
        self._unsent_bytes = 0
        self._high = self._low = 0
        self._choked = False  # the protocol was told to pause
        self._waits_since = 0.0
        # Of finding requests by looking for them: how many promising moments to let pass, and how
        # many of them are still to come.
        self._doubt = self._skips = 0
        self.set_write_buffer_limits()
        self.resume_reading()

    # Reading

    def is_reading(self) -> bool:
        return self._reading

    def pause_reading(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._fd)

    def resume_reading(self) -> None:
        if not self._reading and not self._closing:
            self._reading = True
            self._loop.add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        alone, Stream._latest = Stream._latest is self, self
        try:
            self._receive(alone)
        except Exception as fault:
            what = {"message": "a protocol failed", "exception": fault, "protocol": self._protocol}
            self._loop.call_exception_handler(what)
            self._lose(fault)
        self._waits_since = perf_counter()

    def _receive(self, alone: bool) -> None:
        """Reads once; who is `alone` is read from again and again, for _STAY_S.

        To wait in epoll and be woken costs more than to answer a read of 4 KiB: the CPU goes to
        sleep for it. So where a request has come soon after we began to wait, we look for the next
        one for _SPIN_S first, as KVM does before it lets a virtual CPU sleep. Where that fails, as
        it does on a CPU that we share with the client, it is tried half as often each time.
        """
        recv_into, protocol = self._sock.recv_into, self._protocol
        now = looked_until = perf_counter()
        stays_until = now + _STAY_S
        patience = 0.0
        if alone and now - self._waits_since < _SOON_S:
            if self._skips:
                self._skips -= 1
            else:
                patience = _SPIN_S
        looked = False
        while True:
            try:
                count = recv_into(protocol.get_buffer(-1))
            except (BlockingIOError, InterruptedError):
                looked = True
                if perf_counter() < looked_until:
                    continue
                if patience and looked_until < stays_until:
                    self._skips = self._doubt = min(2 * self._doubt + 1, _MOST_DOUBT)
                return
            except OSError as error:
                self._lose(error)
                return
            if not count:
                self.pause_reading()
                if not protocol.eof_received():
                    self.close()
                return
            if looked:
                self._doubt = 0
                looked = False
            protocol.buffer_updated(count)
            if not alone or not self._reading:
                return
            now = perf_counter()
            if now >= stays_until:
                return
            looked_until = min(now + patience, stays_until)

    # Writing

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._high = 64 << 10 if high is None else high
        self._low = self._high // 4 if low is None else low

    def get_write_buffer_size(self) -> int:
        return self._unsent_bytes

    def send(self, parts: Sequence[bytes]) -> None:
        """All of them, in this order, none empty; nothing once this is closing."""
        if self._closing:
            return
        size = sum(map(len, parts))
        sent = 0
        if not self._unsent:
            try:
                sent = self._sock.sendmsg(parts[:_MOST_PARTS])
            except (BlockingIOError, InterruptedError):
                pass
            except OSError as error:
                self._lose(error)
                return
            if sent == size:
                return
            self._loop.add_writer(self._fd, self._writable)
        self._unsent += parts
        self._unsent_bytes += size
        self._forget(sent)
        if self._unsent_bytes > self._high and not self._choked:
            self._choked = True
            self._protocol.pause_writing()

    def _writable(self) -> None:
        try:
            self._forget(self._sock.sendmsg(list(islice(self._unsent, _PARTS_AT_ONCE))))
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self._lose(error)
            return
        if not self._unsent:
            self._loop.remove_writer(self._fd)
            if self._closing:
                self._lose(None)
                return
        if self._choked and self._unsent_bytes <= self._low:
            self._choked = False
            self._protocol.resume_writing()

    def _forget(self, sent: int) -> None:
        """So many bytes of what is unsent have gone out."""
        self._unsent_bytes -= sent
        unsent = self._unsent
        while sent:
            part = unsent.popleft()
            if len(part) > sent:
                unsent.appendleft(memoryview(part)[sent:])
                return
            sent -= len(part)

    # Ending

    def is_closing(self) -> bool:
        return self._closing

    def cut(self) -> None:
        """Read nothing that the peer has not sent by now."""
        shut_reading(self._sock)

    def close(self) -> None:
        if not self._closing:
            self.pause_reading()
            self._closing = True
            if not self._unsent:
                self._lose(None)

    def abort(self) -> None:
        self._lose(None)

    def _lose(self, error: Exception | None) -> None:
        if self._lost:
            return
        self.pause_reading()
        self._closing = self._lost = True
        if self._unsent:
            self._loop.remove_writer(self._fd)
            self._unsent.clear()
            self._unsent_bytes = 0
        if Stream._latest is self:
            Stream._latest = None
        self._loop.call_soon(self._tell_lost, error)

    def _tell_lost(self, error: Exception | None) -> None:
        self._sock.close()
        self._protocol.connection_lost(error)


def take_over(
    transport: asyncio.Transport, protocol: asyncio.BufferedProtocol, batch: int
) -> Stream | Piecewise:
    """`batch`: how many bytes may wait to be sent before the protocol is to pause.

    Piecewise where TLS is in between, the transport has something unsent, or there is no descriptor
    left: the protocol goes on with that, only slower."""
    if not transport.can_write_eof() or transport.get_write_buffer_size():  # TLS cannot
        return Piecewise(transport, protocol, batch)
    try:
        sock = transport.get_extra_info("socket").dup()
    except OSError:
        return Piecewise(transport, protocol, batch)
    peername = transport.get_extra_info("peername")
    transport.set_protocol(asyncio.Protocol())
    transport.abort()  # closes its descriptor, and nothing else
    stream = Stream(asyncio.get_running_loop(), sock, protocol, peername)
    stream.set_write_buffer_limits(high=batch)
    return stream

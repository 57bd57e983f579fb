"""The server's side of one connection, fed with bytes that anybody may send. The invariant:

1. No exception escapes, and no fault of ours is reported as EIO.
2. Every byte sent back is a valid server's, in the negotiated mode: see tests/fuzz/peer.py. Nothing
   is sent after the end.
3. Memory stays within the bounds that zramd/nbd/connection.py promises, whether the peer reads or
   not: requests in threads, their bytes, replies that wait.
4. What is read is what was written, in the order of the replies.
5. It ends: within a bound on loop turns for each thing that happens, and, once the peer has sent
   all, read all and closed, without waiting for any timer.
6. Then nothing is left: no opener, no request in flight or in the gate, no timer, no page stored
   that was zeroed, nothing charged to the pool.

The connection is the real one, of a real `Server` with a real `Zram`; the loop, the transport and
the threads are stand-ins, so that an execution is deterministic and takes less than a millisecond.
The limits are small, so that a few KiB reach them all (SMALL).

An input is one byte n, n % 64 events of two bytes (what happens, how much), and the client's
stream. n also says whether the export is read-only (READ_ONLY), and TLS required (TLS_REQUIRED), of
which there is no more than the beginning: each TLS handshake fails. The stream is delivered as the
events say, and what is left of it, and of all that waits, when they are over.
Cookies are made unique before: a client that has none has no right to any answer.
"""

import asyncio
import errno
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import zramd.nbd.connection
import zramd.nbd.negotiation
import zramd.nbd.transmission
from tests.fuzz import peer
from zramd.device import Zram
from zramd.nbd.connection import Connection
from zramd.nbd.server import Server
from zramd.store import PAGE

NAME = "zram0"
SIZE = 1 << 20
MEM_LIMIT = 384 << 10

SMALL = {
    "transmission.INLINE": 4 << 10,
    "transmission.BUFFER": 12 << 10,
    "transmission.OWN": 2 << 10,
    "transmission.MOST_EXTENTS": 8,
    "transmission.MAX_PAYLOAD": 64 << 10,
    "transmission.MAX_SKIPPED": 160 << 10,
    "connection.INLINE": 4 << 10,
    "connection._BATCH": 16 << 10,
    "connection._IN_FLIGHT": 4,
    "connection._IN_FLIGHT_BYTES": 96 << 10,
    "connection._MOST_GATHERED": 64,
    "connection._MOST_GATHERED_BYTES": 128 << 10,
    "negotiation.MAX_OPTIONS": 8,
    "negotiation.MAX_OPTION_LENGTH": 16 << 10,
    "negotiation.MAX_KEPT": 6 << 10,
}
"""What is smaller than in earnest, with the relations between them kept."""

FILLER = (bytes(1024), b"\x55" * 1024, bytes(range(256)) * 4, b"")
_OTHERS = b"\xa5" * SMALL["transmission.BUFFER"]
"""What another connection leaves in the buffer that all share."""

READ_ONLY, TLS_REQUIRED = 64, 128  # in the first byte

MOST_DELIVERED = 512 << 10  # by one input, filler included


def unsent(protocol: Any) -> int:
    return sum(map(len, protocol._unsent))


@contextmanager
def small() -> Iterator[None]:
    """The limits that SMALL says, and logging that costs nothing."""
    before = {name: getattr(*_place(name)) for name in SMALL}
    for name, value in SMALL.items():
        setattr(*_place(name), value)
    log = logging.getLogger("zramd")
    propagate, log.propagate = log.propagate, False
    log.addHandler(_FAULTS)
    loop = asyncio._get_running_loop()
    try:
        yield
    finally:
        asyncio._set_running_loop(loop)
        log.removeHandler(_FAULTS)
        log.propagate = propagate
        for name, value in before.items():
            setattr(*_place(name), value)


def _place(name: str) -> tuple[Any, str]:
    module, attribute = name.split(".")
    return getattr(zramd.nbd, module), attribute


class _Faults(logging.Handler):
    """Errors in the log are faults of ours."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.seen: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.seen.append(record)


_FAULTS = _Faults()


class Timer:
    def __init__(self, when: float, call: Callable[[], object]) -> None:
        self.when, self.call, self.live = when, call, True

    def cancel(self) -> None:
        self.live = False


class Loop:
    """As much of an event loop as a connection uses. Its time passes when it is told to, and by
    `tick` whenever somebody looks."""

    def __init__(self) -> None:
        self.now = self.tick = 0.0
        self.turns = 0
        self.ready: deque[Callable[[], object]] = deque()
        self.timers: list[Timer] = []

    def time(self) -> float:
        self.now += self.tick
        return self.now

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def create_task(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        return asyncio.Task(work, loop=self)  # type: ignore[arg-type]

    async def start_tls(self, transport: "Transport", *_: object, **__: object) -> None:
        transport.abort()
        raise ConnectionResetError("no TLS here")

    def get_debug(self) -> bool:
        return False

    def call_soon(self, call: Callable[..., object], *arguments: Any, context: Any = None) -> None:
        self.ready.append(lambda: call(*arguments))

    def call_soon_threadsafe(self, call: Callable[..., object], *arguments: Any) -> None:
        # At once, as if the thread had been a little slower: the order of replies is then that of
        # execution.
        self.ready.appendleft(lambda: call(*arguments))

    def call_later(self, seconds: float, call: Callable[..., object], *arguments: Any) -> Timer:
        timer = Timer(self.now + seconds, lambda: call(*arguments))
        self.timers.append(timer)
        return timer

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        raise peer.Wrong(f"the loop was told of {context}")

    def run(self, most: int = 4096) -> None:
        """Until nothing is ready."""
        ready = self.ready
        while ready:
            ready.popleft()()
            self.turns += 1
            most -= 1
            peer.must(most, "it spins")

    def pass_time(self, seconds: float) -> None:
        until = self.now + seconds
        while True:
            due = [timer for timer in self.timers if timer.live and timer.when <= until]
            if not due:
                break
            timer = min(due, key=lambda timer: timer.when)
            timer.live = False
            self.now = max(self.now, timer.when)
            timer.call()
            self.run()
        self.now = max(self.now, until)
        self.timers = self.live_timers()

    def live_timers(self) -> list[Timer]:
        return [timer for timer in self.timers if timer.live]


class Tls:
    context = None
    required = True


class Threads:
    """In the place of `Turns`: work waits until somebody has a piece of it done."""

    def __init__(self, loop: Loop) -> None:
        self.waiting: list[Callable[[], object]] = []
        self._loop = loop

    def submit(self, _connection: object, work: Callable[[], object]) -> None:
        self.waiting.append(work)

    def do(self, number: int) -> None:
        if self.waiting:
            self.waiting.pop(number % len(self.waiting))()
            self._loop.run()


class Socket:
    """The socket under a transport."""

    family = socket.AF_UNIX

    def __init__(self, transport: "Transport") -> None:
        self._transport = transport

    def getsockopt(self, *_: int) -> bytes:
        return struct.pack("3i", 0, 0, 0)

    def shutdown(self, _how: int) -> None:
        self._transport.cut = True

    def dup(self) -> None:
        raise OSError(errno.EMFILE, "the connection goes on with the transport")


class Transport:
    """What asyncio's transport of a socket does, with a peer that reads when it is told to."""

    def __init__(self, loop: Loop, shared: memoryview) -> None:
        self.got = bytearray()
        self.marks: list[tuple[int, int]] = []
        self.delivered = bytearray()
        self.unread = 0
        """Bytes that are kept for the peer here; the protocol may have more."""
        self.unread_then = self.in_flight_then = 0
        """When the connection was last told that they are many."""
        self.peer_reads = True
        self.reading = True
        self.cut = False
        self.closing = self.aborted = self.lost = False
        self.protocol: Any = None
        self._high, self._low = 64 << 10, 16 << 10
        self._protocol_paused = False
        self._loop = loop
        self._socket = Socket(self)
        self._shared = shared

    # What the protocol calls

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket if name == "socket" else default

    def set_write_buffer_limits(self, high: int, low: int | None = None) -> None:
        self._high, self._low = high, high // 4 if low is None else low

    def write(self, data: bytes | memoryview) -> None:
        if not data:
            return
        peer.must(not self.closing, "something is sent after the end")
        self.marks.append((len(self.got), len(self.delivered)))
        self.got += data
        if not self.peer_reads:
            self.unread += len(data)
            if self.unread > self._high and not self._protocol_paused:
                self._protocol_paused = True
                self.unread_then = self.unread + unsent(self.protocol)
                self.in_flight_then = self.protocol._in_flight_bytes
                self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self.unread

    def is_closing(self) -> bool:
        return self.closing

    def is_reading(self) -> bool:
        return self.reading and not self.closing

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = not self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            if not self.unread:
                self._loop.call_soon(self._lose, None)

    def abort(self) -> None:
        if not self.aborted and not self.lost:
            self.closing = self.aborted = True
            self._loop.call_soon(self._lose, None)

    def _lose(self, error: Exception | None) -> None:
        if not self.lost:
            self.lost = True
            self.protocol.connection_lost(error)

    # What the peer does

    def deliver(self, data: bytes) -> int:
        """As much of it as one read takes; what was taken."""
        if not data or not self.reading or self.closing or self.cut:
            return 0
        buffer = self.protocol.get_buffer(-1)
        peer.must(len(buffer), "no room to read into")
        count = min(len(buffer), len(data))
        buffer[:count] = data[:count]
        self.delivered += data[:count]
        self.protocol.buffer_updated(count)
        self._shared[:] = _OTHERS
        self._loop.run()
        return count

    def end_of_file(self) -> bool:
        """Whether it was heard."""
        if not self.reading or self.closing:
            return False
        self.reading = False
        if not self.protocol.eof_received():
            self.close()
        self._loop.run()
        return True

    def read(self, count: int) -> None:
        """The peer takes so many bytes."""
        self.unread = max(0, self.unread - count)
        if self._protocol_paused and self.unread <= self._low:
            self._protocol_paused = False
            self.protocol.resume_writing()
        if self.closing and not (self.unread or self.aborted or self.lost):
            self._loop.call_soon(self._lose, None)
        self._loop.run()

    def reset(self) -> None:
        """The peer is gone."""
        self.closing = self.aborted = True
        self._lose(ConnectionResetError())
        self._loop.run()


@dataclass
class Outcome:
    """What an execution has reached; for the tests of the fuzzer itself."""

    delivered: int
    got: int
    requests: int
    failed: int
    stored: int
    transmits: bool


_NO_MORE = 1 << 30


class World:
    """One device and one server, used again and again; see the module."""

    def __init__(self) -> None:
        self.zram = Zram(NAME)
        self.zram.limit(MEM_LIMIT)
        self.zram.init(SIZE)
        opener = self.zram.open("fuzzer")
        opener.write(0, bytes(range(256)) * 32)
        opener.close()
        self._empty = self._emptied()
        self._server = Server(self.zram)
        self._server.threads.shutdown()
        self._server.buffer = memoryview(bytearray(SMALL["transmission.BUFFER"]))
        self.executions = 0

    def close(self) -> None:
        self.zram.close()

    def abandon(self) -> None:
        """After something wrong: a request may be inside for ever, and nobody drains it."""
        meta = self.zram._meta
        assert meta is not None
        meta.arena.close()

    def run(self, data: bytes) -> Outcome:
        """Raises whatever is wrong."""
        self.executions += 1
        _FAULTS.seen.clear()
        zramd.nbd.transmission._reported.clear()
        one = _Execution(self.zram, self._server, data)
        one.run()
        one.settle()
        outcome = one.judge()
        self._nothing_left(one, outcome)
        return outcome

    def _nothing_left(self, one: "_Execution", outcome: Outcome) -> None:
        peer.must(not _FAULTS.seen, _FAULTS.seen and _FAULTS.seen[0].getMessage())
        peer.must(one.connection.gone.done(), "the connection has not ended")
        peer.must(not self._server.live, "the server still knows the connection")
        peer.must(not one.threads.waiting, "work is left")
        peer.must(not one.loop.live_timers(), "a timer is left")
        zram = self.zram
        if not zram.disksize:  # reset
            zram.limit(MEM_LIMIT)
            zram.init(SIZE)
        else:
            peer.must(not zram._openers, "an opener is left")
            peer.must(not zram._gate.inside(), "a request is left in the gate")
            if outcome.stored or one.left or one.lost:
                used = self._emptied()
                peer.must(used <= self._empty, f"{used} bytes used by an empty device")

    def _emptied(self) -> int:
        """Bytes that the device uses when all has been discarded."""
        opener = self.zram.open("fuzzer")
        opener.discard(0, SIZE)
        opener.close()
        self.zram.compact()
        meta = self.zram._meta
        assert meta is not None
        now = meta.snapshot()
        peer.must((now.pages, now.compressed_bytes) == (0, 0), "pages are left")
        return meta.arena.used


class _Execution:
    def __init__(self, zram: Zram, server: Server, data: bytes) -> None:
        first = data[0] if data else 0
        count = min(first % 64, (len(data) - 1) // 2)
        self.events = data[1 : 1 + 2 * count]
        self.stream = unique_cookies(data[1 + 2 * count :])
        self.zram, self.server = zram, server
        self.at = 0  # in the stream
        self.backlog = b""  # filler that the socket has not taken yet
        self.loop = loop = Loop()
        self.threads = server.turns = Threads(loop)  # type: ignore[assignment]
        asyncio._set_running_loop(loop)  # type: ignore[arg-type]
        server.closing = False
        server.read_only = bool(first & READ_ONLY)
        server.tls = Tls() if first & TLS_REQUIRED else None
        server._loop = loop  # type: ignore[assignment]
        self.transport = Transport(loop, server.buffer)
        self.connection = self.transport.protocol = Connection(server, server.tls)
        self.transport.protocol.connection_made(self.transport)
        loop.run()
        self.eof = self.lost = self.timed_out = False
        self.ended_by: set[int] = set()
        self.left = self.refuses = False

    def run(self) -> None:
        events = self.events
        for index in range(0, len(events), 2):
            self.event(events[index] % 16, events[index + 1])
            self.loop.run()
            self.within_bounds()

    def event(self, what: int, much: int) -> None:
        transport = self.transport
        if what == 0:
            self.deliver(much + 1)
        elif what == 1:
            self.deliver((much + 1) * 64)
        elif what == 2:
            for _ in range(much % 64):
                self.deliver(1)
        elif what == 3:
            self.deliver(_NO_MORE)
        elif what == 4:
            self.fill(
                FILLER[much & 3] or bytes((much * n * n >> 3) & 255 for n in range(1024)),
                (much >> 2) + 1,
            )
        elif what == 5:
            self.threads.do(much)
        elif what == 6:
            while self.threads.waiting:
                self.threads.do(much)
        elif what == 7:
            transport.peer_reads = False
        elif what == 8:
            transport.read(much << 8)
        elif what == 9:
            self.peer_reads_on()
        elif what == 10:
            before = transport.aborted
            self.loop.pass_time(much * 0.05)
            self.timed_out |= transport.aborted and not before
        elif what == 11:
            # The client's end of file: what has not been sent by now never will be.
            self.deliver_backlog()
            if not self.backlog:
                self.stream = self.stream[: self.at]
                self.eof = self.eof or transport.end_of_file()
        elif what == 12:
            if not transport.lost:
                self.lost = True
                transport.reset()
        elif what == 13:
            self.end(much)
        elif what == 14:
            self.loop.tick = (much & 3) * 0.002
        else:
            self.threads.do(-1)

    def end(self, how: int) -> None:
        kind = how % 4
        self.refuses = True
        if kind == 3:
            self.zram.reset(force=True)
            self.ended_by.add(errno.EIO)
        else:
            refusal = (errno.ESHUTDOWN, errno.EIO, None)[kind]
            if refusal is None:
                self.left = True
            else:
                self.ended_by.add(refusal)
            self.connection.end(refusal)

    def deliver(self, count: int) -> None:
        self.deliver_backlog()
        while count and self.at < len(self.stream) and not self.backlog:
            taken = self.transport.deliver(self.stream[self.at : self.at + min(count, 65536)])
            if not taken:
                return
            self.at += taken
            count -= taken

    def fill(self, piece: bytes, times: int) -> None:
        if len(self.transport.delivered) + len(self.backlog) < MOST_DELIVERED:
            self.backlog += piece * times
        self.deliver_backlog()

    def deliver_backlog(self) -> None:
        while self.backlog:
            taken = self.transport.deliver(self.backlog[:65536])
            if not taken:
                return
            self.backlog = self.backlog[taken:]

    def peer_reads_on(self) -> None:
        self.transport.peer_reads = True
        self.transport.read(self.transport.unread)

    def within_bounds(self) -> None:
        connection, small = self.connection, SMALL
        payload = small["transmission.MAX_PAYLOAD"]
        waiting = len(self.threads.waiting)
        peer.must(waiting == connection._in_flight, "requests in flight are not counted right")
        peer.must(waiting <= small["connection._IN_FLIGHT"], "too many requests in flight")
        most = small["connection._IN_FLIGHT_BYTES"] + payload
        most = most if waiting else 0
        peer.must(0 <= connection._in_flight_bytes <= most, "bytes in flight are not counted right")
        most = small["connection._IN_FLIGHT_BYTES"] + payload
        # Where the peer did not read any more: no more than one batch, and all that was in flight.
        if not self.ended_by and not self.left:
            most = small["connection._BATCH"] + small["transmission.INLINE"] + (4 << 10)
            most += self.transport.in_flight_then
            waits = self.transport.unread + unsent(connection) - self.transport.unread_then
            peer.must(waits <= most, f"{waits} bytes wait")
            peer.must(not connection._gathered, "replies are kept back")

    def settle(self) -> None:
        """The peer sends the rest, reads all, and closes; all threads come to an end."""
        loop, transport = self.loop, self.transport
        loop.tick = 0.0
        for _ in range(2):
            while True:
                before = self.at, len(self.backlog), loop.turns, transport.unread, self.eof
                self.peer_reads_on()
                self.deliver(_NO_MORE)
                while self.threads.waiting:
                    self.threads.do(0)
                sent = self.at == len(self.stream) and not self.backlog
                if (sent or transport.cut) and not self.eof:
                    self.eof = transport.end_of_file()
                loop.run()
                self.within_bounds()
                if before == (self.at, len(self.backlog), loop.turns, transport.unread, self.eof):
                    break
            if self.connection.gone.done():
                break
            # Only we ourselves may wait for time to pass, when we end a connection gently.
            peer.must(self.connection._gathers, "it waits for a timer, with all sent and read")
            loop.pass_time(30)

    def judge(self) -> Outcome:
        transport = self.transport
        ended = bool(self.ended_by) or self.left
        whole = not (self.lost or self.timed_out or ended)
        whole = whole and (not transport.aborted or self.server.tls is not None)
        said = peer.Conversation(
            bytes(transport.delivered),
            bytes(transport.got),
            transport.marks,
            whole=whole,
            ended_by=self.ended_by,
            refuses=self.refuses,
            ordered=not self.left,
        )
        limits = peer.Limits(
            NAME.encode(),
            SIZE,
            zramd.nbd.negotiation.MAX_OPTIONS,
            zramd.nbd.negotiation.MAX_OPTION_LENGTH,
            zramd.nbd.negotiation.MAX_KEPT,
            zramd.nbd.transmission.MAX_PAYLOAD,
            zramd.nbd.transmission.MAX_SKIPPED,
            read_only=self.server.read_only,
            tls_required=self.server.tls is not None,
        )
        judge = peer.judge(said, limits)
        if whole and judge.dropped:
            peer.must(transport.closing, "a connection that must be dropped goes on")
        if whole and not judge.dropped:
            peer.must(self.eof and self.at == len(self.stream), "a connection is dropped")
        return Outcome(
            *(len(transport.delivered), len(transport.got), judge.requests),
            *(judge.failed, judge.stored, judge.transmits),
        )


def unique_cookies(stream: bytes) -> bytes:
    """The same, with a number at the end of what may be a request's cookie."""
    out = bytearray(stream)
    for number, at in enumerate(_requests(stream)):
        out[at + 14 : at + 16] = number.to_bytes(2, "big")
    return bytes(out)


def _requests(stream: bytes) -> list[int]:
    """Where requests may begin."""
    found = []
    for magic in (peer.REQUEST_MAGIC, peer.LONG_REQUEST_MAGIC):
        at = stream.find(magic)
        while at >= 0:
            if at + 28 <= len(stream):
                found.append(at)
            at = stream.find(magic, at + 4)
    return sorted(found)


assert SMALL["transmission.INLINE"] % PAGE == 0

"""The server's side of one connection, fed with bytes that anybody may send. The invariant:

1. No exception escapes, and no fault of ours is reported as EIO.
2. Every byte sent back is a valid server's, in the negotiated mode: see tests/fuzz/peer.py. Nothing
   is sent after the end.
3. Memory stays within the bounds that zramd/nbd/connection.py promises, whether the peer reads or
   not: requests in threads, their bytes, replies that wait, wherever they do. Nor does one turn
   of the event loop take longer than promised: to look for requests, or to encrypt replies.
4. What is read is what was written, in the order of the replies.
5. It ends: within a bound on loop turns for each thing that happens, and, once the peer has sent
   all, read all and closed, without waiting for any timer.
6. Then nothing is left: no opener, no request in flight or in the gate, no timer, no page stored
   that was zeroed, nothing charged to the pool.

The connection is the real one, of a real `Server` with a real `Zram`, and so is its `Stream`; the
loop, asyncio's transports, the socket, the clock and the threads are stand-ins, so that an
execution is deterministic and takes a millisecond. The limits are small, so that a few KiB reach
them all (SMALL). TLS is there without its encryption, which is OpenSSL's: what begins anew with it,
and how its transport differs, is ours.

An input is one byte n, n % 64 events of two bytes (what happens, how much), and the client's
stream. n also says whether the export is read-only (READ_ONLY), and TLS required (TLS_REQUIRED);
the upper half of the first event's first byte says more (NO_DESCRIPTOR and what follows it). The
stream is delivered as the events say, and what is left of it, and of all that waits, when they are
over; but what follows STARTTLS goes through TLS.
Cookies are made unique before: a client that has none has no right to any answer.
"""

import asyncio
import errno
import logging
import socket
import struct
from collections import deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import zramd.nbd.connection
import zramd.nbd.negotiation
import zramd.nbd.stream
import zramd.nbd.transmission
from tests.fuzz import peer
from zramd.device import Zram
from zramd.nbd.connection import Connection
from zramd.nbd.piecewise import Piecewise
from zramd.nbd.server import Server
from zramd.nbd.stream import Stream
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
    "piecewise._PIECE": 4 << 10,
    "connection._BATCH": 16 << 10,
    "connection._IN_FLIGHT": 4,
    "connection._IN_FLIGHT_BYTES": 96 << 10,
    "connection._MOST_GATHERED": 64,
    "connection._MOST_GATHERED_BYTES": 128 << 10,
    "stream._MOST_PARTS": 16,
    "stream._PARTS_AT_ONCE": 8,
    "negotiation.MAX_OPTIONS": 8,
    "negotiation.MAX_OPTION_LENGTH": 16 << 10,
    "negotiation.MAX_KEPT": 6 << 10,
}
"""What is smaller than in earnest, with the relations between them kept."""

FILLER = (bytes(1024), b"\x55" * 1024, bytes(range(256)) * 4, b"")
_OTHERS = b"\xa5" * SMALL["transmission.BUFFER"]
"""What another connection leaves in the buffer that all share."""

READ_ONLY, TLS_REQUIRED = 64, 128  # in the first byte
NO_DESCRIPTOR, TLS_OPTIONAL, EARLY, SLIPPED_IN = 16, 32, 64, 128
"""In the first event's first byte: the connection goes on with asyncio's transport. TLS is offered
only, where it would be required. What follows STARTTLS comes with the end of the TLS handshake; it
comes before TLS, where one read takes both. Both: it is no TLS."""

STARTTLS = peer.IHAVEOPT + struct.pack(">II", peer.STARTTLS, 0)
ROOM = 8000
"""Bytes that a socket keeps for a peer that does not read, and the most that it takes at once."""
LOOK_S = 2e-5
"""What it takes to look at the clock."""
MOST_LOOKS = 30
"""What zramd.nbd.stream._STAY_S has room for, and a few."""
MOST_ENCRYPTED = 2 * (SMALL["connection._BATCH"] + SMALL["piecewise._PIECE"])
"""In one turn: what a thread has answered, and then a batch."""

MOST_DELIVERED = 512 << 10  # by one input, filler included


def unread_by_peer(connection: Connection) -> int:
    """Bytes of replies that are kept for the peer, outside of the kernel."""
    transport: Any = getattr(connection, "_transport", None)
    if isinstance(transport, Stream):
        parts = sum(map(len, transport._unsent))
        peer.must(parts == transport._unsent_bytes, "what is unsent is not counted right")
    return transport.get_write_buffer_size() if transport else 0


def kept_back(transport: object) -> bool:
    """Whether something is, from TLS."""
    return isinstance(transport, Piecewise) and bool(transport._unsent)


@contextmanager
def small() -> Iterator[None]:
    """The limits that SMALL says, a clock that the loop has, and logging that costs nothing."""
    changed = {**SMALL, "stream.perf_counter": _look}
    before = {name: getattr(*_place(name)) for name in changed}
    for name, value in changed.items():
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


def _look() -> float:
    loop: Any = asyncio._get_running_loop()
    return loop.look()  # type: ignore[no-any-return]


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
        self.turns = self.looks = 0
        self.reader: Callable[[], object] | None = None
        self.writer: Callable[[], object] | None = None
        self.poll: Callable[[], bool] = bool
        self.ready: deque[Callable[[], object]] = deque()
        self.timers: list[Timer] = []

    def time(self) -> float:
        self.now += self.tick
        return self.now

    def look(self) -> float:
        """At the clock that costs something."""
        self.looks += 1
        return self.time() + self.looks * LOOK_S

    def create_future(self) -> "asyncio.Future[Any]":
        return asyncio.Future(loop=self)  # type: ignore[arg-type]

    def create_task(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        return asyncio.Task(work, loop=self)  # type: ignore[arg-type]

    async def start_tls(self, transport: "Transport", *_: object, **__: object) -> "Secure":
        secure = Secure(transport)
        await secure.begun
        return secure

    def add_reader(self, _fd: int, call: Callable[[], object]) -> None:
        self.reader = call

    def remove_reader(self, _fd: int) -> None:
        self.reader = None

    def add_writer(self, _fd: int, call: Callable[[], object]) -> None:
        self.writer = call

    def remove_writer(self, _fd: int) -> None:
        self.writer = None

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
        while True:
            if ready:
                self.turns += 1
                ready.popleft()()
            elif not self.poll():
                return
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

    def __init__(self, *, required: bool) -> None:
        self.required = required


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


class Wire:
    """What has gone between the server and its peer, who reads when it is told to, and which of our
    stand-ins the server has at its end."""

    def __init__(self, loop: Loop, shared: memoryview, ways: int) -> None:
        self.got = bytearray()
        self.marks: list[tuple[int, int]] = []
        self.delivered = bytearray()
        self.unread = 0
        """Bytes that are kept for the peer here; the connection may have more."""
        self.peer_reads = True
        self.cut = False
        self.loop, self.shared, self.ways = loop, shared, ways
        self.end: Transport | Socket = Transport(self)

    def carry(self, data: bytes | memoryview) -> None:
        """To the peer."""
        self.marks.append((len(self.got), len(self.delivered)))
        self.got += data
        if not self.peer_reads:
            self.unread += len(data)


class Socket:
    """The socket under a transport, or its duplicate, under a Stream."""

    family = socket.AF_UNIX

    def __init__(self, wire: Wire) -> None:
        self.closing = self.aborted = self.lost = False
        self._wire, self._loop = wire, wire.loop
        self._offered: bytes | memoryview = b""
        self._at_once = 0
        self._late = False
        """What comes next comes when it has been looked for in vain."""
        self._eof = self._heard = False

    # What the server calls

    def getsockopt(self, *_: int) -> bytes:
        return struct.pack("3i", 0, 0, 0)

    def fileno(self) -> int:
        return 0

    def dup(self) -> "Socket":
        wire = self._wire
        peer.must(not isinstance(wire.end, Secure), "TLS is left again")
        peer.must(not wire.unread, "what the transport has not sent is lost")
        if wire.ways & NO_DESCRIPTOR:
            raise OSError(errno.EMFILE, "the connection goes on with the transport")
        wire.end = other = Socket(wire)
        self._loop.poll = other.poll
        return other

    def shutdown(self, _how: int) -> None:
        self._wire.cut = True
        if isinstance(self._wire.end, Secure):
            self._loop.call_soon(self._wire.end.mute)

    def recv_into(self, buffer: memoryview) -> int:
        peer.must(not self.closing and len(buffer), "no room to read into")
        if self.lost:
            raise ConnectionResetError
        if self._offered and not self._wire.cut:
            if self._late:
                self._late = False
                raise BlockingIOError
            count = min(len(buffer), len(self._offered), self._at_once)
            data = self._offered[:count]
            self._offered = self._offered[count:]
            self._late = self._at_once == 1
            buffer[:count] = data
            self._wire.delivered += data
            return count
        if self._eof or self._wire.cut:
            self._heard = True
            return 0
        raise BlockingIOError

    def sendmsg(self, parts: Sequence[bytes]) -> int:
        peer.must(not self.closing, "something is sent after the end")
        few = 0 < len(parts) <= SMALL["stream._MOST_PARTS"]
        peer.must(few and all(parts), "parts that no socket takes")
        room = ROOM - self._wire.unread
        if self.lost:
            raise BrokenPipeError
        if room <= 0:
            raise BlockingIOError
        data = b"".join(parts)[:room]
        self._wire.carry(data)
        return len(data)

    def close(self) -> None:
        loop = self._loop
        peer.must(not (self.closing or loop.reader or loop.writer), "it waits for a closed socket")
        self.closing = self.aborted = self.lost = True

    # What the peer and the selector do

    def poll(self) -> bool:
        """Whether there was anything to tell."""
        loop = self._loop
        told = False
        if loop.reader and (self._offered or self._eof or self._wire.cut or self.lost):
            looks, self._late = loop.looks, False
            loop.reader()
            self._wire.shared[:] = _OTHERS
            peer.must(loop.looks - looks <= MOST_LOOKS, "others wait for one who is alone")
            told = True
        if loop.writer and (self._wire.unread <= ROOM // 4 or self.lost):  # as Linux does
            loop.writer()
            told = True
        return told

    def deliver(self, data: bytes, at_once: int) -> int:
        self._offered, self._at_once = memoryview(data), at_once
        self._loop.run()
        left, self._offered = len(self._offered), b""
        return len(data) - left

    def end_of_file(self) -> bool:
        self._eof = True
        self._loop.run()
        self._eof = False
        return self._heard

    def read(self, count: int) -> None:
        self._wire.unread = max(0, self._wire.unread - count)
        self._loop.run()

    def reset(self) -> None:
        self.lost = True
        self._loop.run()


class Transport:
    """What asyncio's transport of a socket does."""

    def __init__(self, wire: Wire) -> None:
        self.reading = True
        self.closing = self.aborted = self.lost = False
        self.protocol: Any = None
        self.wire, self.loop = wire, wire.loop
        self._high, self._low = 64 << 10, 16 << 10
        self._protocol_paused = False
        self._socket = Socket(wire)

    # What the protocol calls

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        return self._socket if name == "socket" else default

    def set_protocol(self, protocol: Any) -> None:
        self.protocol = protocol

    def can_write_eof(self) -> bool:
        return True

    def set_write_buffer_limits(self, high: int, low: int | None = None) -> None:
        self._high, self._low = high, high // 4 if low is None else low

    def write(self, data: bytes | memoryview) -> None:
        if not data:
            return
        peer.must(not self.closing, "something is sent after the end")
        self.wire.carry(data)
        if self.wire.unread > self._high and not self._protocol_paused:
            self._protocol_paused = True
            self.protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return self.wire.unread

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
            if not self.wire.unread:
                self.loop.call_soon(self._lose, None)

    def abort(self) -> None:
        if not self.aborted and not self.lost:
            self.closing = self.aborted = True
            self.loop.call_soon(self._lose, None)

    def _lose(self, error: Exception | None) -> None:
        if not self.lost:
            self.lost = True
            self.protocol.connection_lost(error)

    # What the peer does

    def deliver(self, data: bytes, at_once: int) -> int:
        """As much of it as one read takes; what was taken."""
        if not data or not self.reading or self.closing or self.wire.cut:
            return 0
        buffer = self.protocol.get_buffer(-1)
        peer.must(len(buffer), "no room to read into")
        count = min(len(buffer), len(data), at_once)
        buffer[:count] = data[:count]
        self.wire.delivered += data[:count]
        self.protocol.buffer_updated(count)
        self.wire.shared[:] = _OTHERS
        self.loop.run()
        return count

    def end_of_file(self) -> bool:
        """Whether it was heard."""
        if not self.reading or self.closing:
            return False
        self.reading = False
        if self.protocol.eof_received():
            peer.must(not isinstance(self, Secure), "TLS is to stay half open")
        else:
            Transport.close(self)
        self.loop.run()
        return True

    def read(self, count: int) -> None:
        """The peer takes so many bytes."""
        self.wire.unread = max(0, self.wire.unread - count)
        if self._protocol_paused and self.wire.unread <= self._low:
            self._protocol_paused = False
            self.protocol.resume_writing()
        if self.closing and not (self.wire.unread or self.aborted or self.lost):
            self.loop.call_soon(self._lose, None)
        self.loop.run()

    def reset(self) -> None:
        """The peer is gone."""
        self.closing = self.aborted = True
        self._lose(ConnectionResetError())
        self.loop.run()


class Secure(Transport):
    """What asyncio's transport of TLS does, from the beginning of the handshake."""

    def __init__(self, raw: Transport) -> None:
        super().__init__(raw.wire)
        self.begun = self.loop.create_future()
        self.protocol, raw.protocol = raw.protocol, self
        self.wire.end = self
        self._raw = raw
        self._mute = self._closed = False
        self._turn = self._encrypted = 0

    def can_write_eof(self) -> bool:
        return False

    def close(self) -> None:
        peer.must(not self._closed, "TLS is closed again, and can be aborted no more")
        self._closed = True
        super().close()

    def is_closing(self) -> bool:
        return self.closing or self._raw.closing

    def write(self, data: bytes | memoryview) -> None:
        if self._mute:
            return
        if isinstance(self.protocol, Piecewise) and not self.protocol._cut:
            peer.must(not self._protocol_paused, "what the peer does not read is encrypted")
            if self._turn != self.loop.turns:
                self._turn, self._encrypted = self.loop.turns, 0
            self._encrypted += len(data)
            peer.must(self._encrypted <= MOST_ENCRYPTED, "much is encrypted in one turn")
        super().write(data)

    def succeeded(self) -> bool:
        return self.begun.done() and not self.begun.exception()

    def mute(self) -> None:
        """The socket has ended: what is not encrypted by now never will be."""
        self._mute = True
        peer.must(self.lost or not kept_back(self.protocol), "answers are kept back at the cut")

    def connection_lost(self, error: Exception | None) -> None:
        """As the protocol of the transport below."""
        self.closing = self.aborted = True
        if self.begun.done():
            self._lose(error)
        else:
            self.lost = True
            self.begun.set_exception(error or ConnectionAbortedError("no TLS"))

    def deliver(self, data: bytes, at_once: int) -> int:
        if not self.begun.done():
            if not ~self.wire.ways & (EARLY | SLIPPED_IN):
                self.reset()
                return 0
            self.begun.set_result(None)
            if not self.wire.ways & EARLY:
                self.loop.run()
        self._encrypted = 0
        return super().deliver(data, at_once)

    def end_of_file(self) -> bool:
        if not self.begun.done():
            self.reset()
            return True
        return super().end_of_file()

    def read(self, count: int) -> None:
        self._encrypted = 0
        super().read(count)

    def reset(self) -> None:
        self._raw.reset()


class Watched(Connection):
    """One that remembers what waited when it was told that this is much."""

    waited_then = in_flight_then = 0

    def pause_writing(self) -> None:
        self.waited_then, self.in_flight_then = unread_by_peer(self), self._in_flight_bytes
        super().pause_writing()


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
        if meta is not None:  # not reset
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
        peer.must(Stream._latest is None, "a stream that is gone is remembered")
        zram = self.zram
        if not zram.disksize:  # reset
            zram.limit(MEM_LIMIT)
            zram.init(SIZE)
        else:
            peer.must(not zram._openers, "an opener is left")
            peer.must(not zram._gate.inside(), "a request is left in the gate")
            if outcome.stored or not one.whole:
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
        self.ways = self.events[0] if self.events else 0
        self.loop = loop = Loop()
        self.threads = server.turns = Threads(loop)  # type: ignore[assignment]
        asyncio._set_running_loop(loop)  # type: ignore[arg-type]
        server.closing = False
        server.read_only = bool(first & READ_ONLY)
        server.tls = None
        if first & TLS_REQUIRED:
            server.tls = Tls(required=not self.ways & TLS_OPTIONAL)  # type: ignore[assignment]
        server._loop = loop  # type: ignore[assignment]
        Stream._latest = None
        self.wire = wire = Wire(loop, server.buffer, self.ways)
        self.connection = wire.end.protocol = Watched(server, server.tls)
        self.connection.connection_made(wire.end)
        loop.run()
        self.eof = self.lost = self.timed_out = self.cut_short = False
        self.ended_by: set[int] = set()
        self.left = self.refuses = False
        self.whole = True  # see peer.Conversation

    def run(self) -> None:
        events = self.events
        for index in range(0, len(events), 2):
            self.event(events[index] % 16, events[index + 1])
            self.loop.run()
            self.within_bounds()

    def event(self, what: int, much: int) -> None:
        end = self.wire.end
        if what == 0:
            self.deliver(much + 1)
        elif what == 1:
            self.deliver((much + 1) * 64)
        elif what == 2:
            pieces, of = much % 64, 1 + (much >> 7)  # of one byte: with pauses, see Socket
            self.deliver(pieces * of, at_once=of)
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
            self.wire.peer_reads = False
        elif what == 8:
            end.read(much << 8)
        elif what == 9:
            self.peer_reads_on()
        elif what == 10:
            before = end.aborted
            Stream._latest = None  # others are served meanwhile
            self.loop.pass_time(much * 0.05)
            self.timed_out |= end.aborted and not before
        elif what == 11:
            # The client's end of file: what has not been sent by now never will be.
            self.deliver_backlog()
            if not self.backlog:
                self.stream = self.stream[: self.at]
                waits = isinstance(end, Secure) and (
                    self.connection._in_flight > 0 or kept_back(end.protocol)
                )
                self.eof = self.eof or end.end_of_file()
                self.cut_short |= self.eof and waits
        elif what == 12:
            if not end.lost:
                self.lost = True
                end.reset()
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

    def deliver(self, count: int, at_once: int = 65536) -> None:
        self.deliver_backlog()
        while count and self.at < len(self.stream) and not self.backlog:
            piece = self.stream[self.at : self.at + min(count, 65536, self.plain())]
            taken = self.wire.end.deliver(piece, at_once)
            if not taken:
                return
            self.at += taken
            count -= taken

    def plain(self) -> int:
        """Bytes of the stream that come before TLS."""
        if self.server.tls and not (self.ways & SLIPPED_IN or isinstance(self.wire.end, Secure)):
            begins = self.stream.find(STARTTLS, max(0, self.at - len(STARTTLS) + 1))
            if begins >= 0:
                return begins + len(STARTTLS) - self.at
        return _NO_MORE

    def fill(self, piece: bytes, times: int) -> None:
        if len(self.wire.delivered) + len(self.backlog) < MOST_DELIVERED:
            self.backlog += piece * times
        self.deliver_backlog()

    def deliver_backlog(self) -> None:
        while self.backlog:
            taken = self.wire.end.deliver(self.backlog[:65536], 65536)
            if not taken:
                return
            self.backlog = self.backlog[taken:]

    def peer_reads_on(self) -> None:
        self.wire.peer_reads = True
        self.wire.end.read(self.wire.unread)

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
            most += connection.in_flight_then
            waits = unread_by_peer(connection) - connection.waited_then
            peer.must(waits <= most, f"{waits} bytes wait")
            peer.must(not connection._gathered, "replies are kept back")

    def settle(self) -> None:
        """The peer sends the rest, reads all, and closes; all threads come to an end."""
        loop, wire = self.loop, self.wire
        loop.tick = 0.0
        for _ in range(2):
            while True:
                before = self.at, len(self.backlog), loop.turns, wire.unread, self.eof
                self.peer_reads_on()
                self.deliver(_NO_MORE)
                while self.threads.waiting:
                    self.threads.do(0)
                sent = self.at == len(self.stream) and not self.backlog
                if (sent or wire.cut) and not self.eof:
                    self.eof = wire.end.end_of_file()
                loop.run()
                self.within_bounds()
                if before == (self.at, len(self.backlog), loop.turns, wire.unread, self.eof):
                    break
            if self.connection.gone.done():
                break
            # Only we ourselves may wait for time to pass, when we end a connection gently.
            peer.must(self.connection._gathers, "it waits for a timer, with all sent and read")
            loop.pass_time(30)

    def judge(self) -> Outcome:
        wire, tls = self.wire, self.server.tls
        end = wire.end
        ended = bool(self.ended_by) or self.left
        no_tls = isinstance(end, Secure) and not end.succeeded()
        cut_off = self.lost or self.timed_out or self.cut_short or no_tls
        self.whole = whole = not (ended or cut_off)
        said = peer.Conversation(
            bytes(wire.delivered),
            bytes(wire.got),
            wire.marks,
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
            tls_offered=tls is not None,
            tls_required=tls is not None and tls.required,
        )
        judge = peer.judge(said, limits)
        if whole and judge.dropped:
            peer.must(end.closing, "a connection that must be dropped goes on")
        if whole and not judge.dropped:
            peer.must(self.eof and self.at == len(self.stream), "a connection is dropped")
        return Outcome(
            *(len(wire.delivered), len(wire.got), judge.requests),
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

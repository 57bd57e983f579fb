"""One client of the NBD server, from its handshake to its end.

A connection is an asyncio protocol, on a transport of asyncio's while it negotiates, and then on a
`Stream`, or on `Piecewise` where there is TLS. Its bytes land in a buffer that all connections
share; every request that is complete there is answered, and all the replies leave in one write.
That, and doing nothing per request that can be done per batch, is where the speed comes from.

    negotiating --GO--> serving --DISC, EOF--> ending --nothing in flight--> gone

Promises:
1. Nothing slow runs on the event loop: what is longer than `transmission.INLINE` goes to a few
   threads (the compressors release the GIL) and is answered when it is done, in any order; so does
   a write that may have to wait for a compaction, or takes a slow compressor. Nor may a batch of
   short requests hold the loop for long: after _BATCH bytes or _TURN_SECONDS the others get a turn,
   and the next is shorter where one of them was content with less.
2. Bounded: at most _IN_FLIGHT requests, and about _IN_FLIGHT_BYTES of them, are in threads, and
   about _BATCH of replies, with those of what was in flight, wait for the peer to read. Beyond,
   the peer is not read from.
3. The Opener is closed once, after the last request that uses it has ended, however that ended.
4. When we end the connection (a forced reset, `Server.close`), every request that the peer has sent
   whole is answered, unless it sends without a pause for GATHER_SECONDS in spite of getting no
   answer. Over TCP what is still on its way is lost all the same. Where we only leave, as another
   process goes on for us, the answers are the true ones; the bounds of promise 2 hold then too, and
   for what was not begun by the cut there is no answer, as after a death.

The kernel makes promise 4 an art. A request that its nbd has sent and that never gets an answer
waits for ever; and when a send of its fails, it shuts its socket down and loses the answers that
have not arrived yet. So nothing may be cut while it is sending, and with an answer in its hands it
sends at once. We end (`end`) in four moves:
1. Gather: read on, but keep the answers back. The peer runs out of requests to send.
2. When it has sent nothing for QUIET_SECONDS and nothing is in flight, cut: SHUT_RD. From here on
   it cannot send; what it had sent by then can still be read.
3. Answer all that was gathered in one write, and what is read after it at once.
4. End of file. Close, when the peer has the answers.

Assumes: everything but `_work` is called on the event loop.
"""

import asyncio
import logging
import socket
import struct
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

from zramd import heap
from zramd.errors import BadValue, NotInitialised
from zramd.nbd import transmission
from zramd.nbd.address import address_of
from zramd.nbd.negotiation import Negotiation, State
from zramd.nbd.piecewise import Piecewise
from zramd.nbd.replies import SIMPLE, Reply, Simple
from zramd.nbd.stream import Stream, take_over
from zramd.nbd.transmission import INLINE, Receiver, Request, answer
from zramd.nbd.wire import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_READ,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    ExportInfo,
)
from zramd.opener import Opener
from zramd.store import PAGE

if TYPE_CHECKING:
    from zramd.nbd.server import Server
    from zramd.nbd.tls import Tls

_BATCH = 1 << 20
_TURN_SECONDS = 0.0005
"""Half of what 64 writes of 4 KiB take. Who has so many in flight gets 0.9 to 1 of what 5 ms give,
0.8 to 0.9 with 0.2 ms, 0.65 to 0.8 with 0.1 ms."""
_SHORT_TURN_SECONDS = 0.0001
"""A few times what one request of somebody else takes. The writes in it are shorter, too."""
_COMPRESSED = {NBD_CMD_WRITE: INLINE, NBD_CMD_WRITE_ZEROES: PAGE}
"""How much of a request may have to be compressed."""
_IN_FLIGHT = 64
_IN_FLIGHT_BYTES = 64 << 20
_MUCH = 8 << 20
"""In flight at once: then it is worth a few ms to have the C library give back what it was in. It
kept 66 MiB for ever, after one client that asked for much."""
QUIET_SECONDS = 0.02
"""A kernel that may send does so within a millisecond, unless the machine is overloaded."""
GATHER_SECONDS = 5.0
"""Less than LINGER_SECONDS, which `Server.close` waits for all of this."""
LEAVE_SECONDS = 2.0
"""The same for all of a leave, half of it for gathering. While we leave nobody is served: 128 reads
of 128 KiB, what a kernel can have under way, are answered within 0.2 s."""
_MOST_GATHERED = 4096
"""Requests. The kernel has at most 128 under way; who sends more does not mind being cut."""
_MOST_GATHERED_BYTES = 16 << 20
"""Of answers: 128 of 128 KiB."""
_HANDSHAKE_SECONDS = 10.0
LINGER_SECONDS = 10.0
"""How long a peer may take to read the last replies once the connection ends."""

_log = logging.getLogger(__name__)


class Connection(asyncio.BufferedProtocol):
    """One client, from its handshake to its end."""

    def __init__(self, server: "Server", tls: "Tls | None", *, private: bool = False) -> None:
        self._server = server
        self._private = private
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self.gone = self._loop.create_future()
        """Done when the socket and the Opener are closed."""
        self._transport: asyncio.Transport
        self._stream: Stream | Piecewise  # the same, since it serves
        self._opener: Opener | None = None
        self._negotiation: Negotiation | None = Negotiation(
            self, tls_offered=tls is not None, tls_required=tls is not None and tls.required
        )
        self._securing: asyncio.Task[None] | None = None
        self._secure = False
        self._early = b""
        self._receiver: Receiver | None = None  # set while serving, and after
        self._form: Simple = SIMPLE
        self._contexts: tuple[int, ...] = ()
        self._ending = False
        self._gathers = False  # set by `end`
        self._refusal: int | None = None  # then: the error that all requests get from now on
        self._gathered: list[bytes] = []  # their answers, kept back
        self._gathered_bytes = 0
        self._quiet_since = self._deadline = 0.0
        self._turn_due = False  # another turn of `_pump` is scheduled
        # While its turns are cut: the server's `content` when the last one was.
        self._content_at_cut: int | None = None
        self._held_back = False  # requests, for want of room
        self._cut = False
        self._lost = False
        self._reading = True
        self._peer_reads = True
        self._in_flight = 0
        self._in_flight_bytes = 0
        self._had_much = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def serving(self) -> bool:
        return self._receiver is not None

    @property
    def outdated(self) -> bool:
        """Whether the device was reset since this connection opened it."""
        return self._opener is not None and self._opener.closed

    # What the negotiation asks (Exports)

    def names(self) -> list[str]:
        return [self._server.zram.name]

    def describe(self, name: str) -> ExportInfo:
        self._must_be_there(name)
        return self._info(self._server.zram.disksize)

    def open(self, name: str) -> ExportInfo:
        self._must_be_there(name)
        self._opener = self._server.zram.open(f"nbd connection from {_peer(self._transport)}")
        return self._info(self._opener.size)

    def _must_be_there(self, name: str) -> None:
        zram = self._server.zram
        if name not in ("", zram.name):
            raise BadValue(f"there is no export {name!r} here, only {zram.name!r}")
        if not zram.disksize:
            raise NotInitialised(f"device {zram.name} has no disksize yet")

    def _info(self, size: int) -> ExportInfo:
        # Any length at any offset: nbd-client ignores the minimum and sets 512 whatever we say.
        zram = self._server.zram
        return ExportInfo(
            size,
            transmission.READ_ONLY_FLAGS if self._server.read_only else transmission.FLAGS,
            minimum_block=1,
            preferred_block=4096,
            maximum_payload=transmission.MAX_PAYLOAD,
            name=zram.name,
            description=zram.description,
        )

    # What asyncio tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if not self._server.admits(self._private):
            self._transport.abort()
            return
        self._server.live.add(self)
        if self._server.closing:
            self._transport.abort()
            return
        sock = self._transport.get_extra_info("socket")
        if sock.family != socket.AF_UNIX:  # asyncio has set TCP_NODELAY already
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._timer = self._loop.call_later(_HANDSHAKE_SECONDS, self.abort)
        self._transport.write(Negotiation.greeting())

    def get_buffer(self, _sizehint: int) -> memoryview:
        receiver = self._receiver
        return self._server.buffer if receiver is None else receiver.get_buffer()

    def buffer_updated(self, count: int) -> None:
        receiver = self._receiver
        if receiver is not None:
            receiver.received(count)
            self._pump()
        elif self._securing is not None and not self._secure:
            self._early += self._server.buffer[:count]  # through TLS, before `_begin_tls` goes on
        else:
            self._negotiate(self._server.buffer[:count])

    def eof_received(self) -> bool:
        self._answer_gathered()
        self._ending = True
        self._finish_if_idle()
        return self.serving  # keep the socket for the replies still to come

    def pause_writing(self) -> None:
        self._peer_reads = False

    def resume_writing(self) -> None:
        self._peer_reads = True
        if not self._turn_due:
            self._pump()

    def connection_lost(self, _error: Exception | None) -> None:
        self._lost = self._ending = True
        self._finish_if_idle()

    # Negotiating

    def _negotiate(self, data: memoryview) -> None:
        negotiation = self._negotiation
        assert negotiation is not None
        self._transport.write(negotiation.receive(data))
        if negotiation.state is State.SECURING:
            self._transport.pause_reading()  # what comes next is not for us
            begin = self._begin_tls(negotiation, _peer(self._transport))
            self._securing = self._loop.create_task(begin)
            return
        if not negotiation.done:
            return
        self._cancel_timer()
        self._negotiation = None
        if negotiation.export is None:
            _log.debug("handshake ended: %s", negotiation.reason)
            self._begin_ending()
            return
        self._transport = self._stream = take_over(self._transport, self, _BATCH)
        self._form, self._contexts = negotiation.form, negotiation.contexts
        self._receiver = Receiver(
            negotiation.export.size,
            self._server.buffer,
            self._form,
            read_only=self._server.read_only,
            head=negotiation.trailing,
        )
        self._pump()

    async def _begin_tls(self, negotiation: Negotiation, peer: str) -> None:
        """The handshake's time is that of the whole."""
        if self._lost:
            return
        assert self._tls is not None
        secured = None
        try:
            secured = await self._loop.start_tls(
                self._transport, self, self._tls.context, server_side=True
            )
        except OSError as error:
            self._server.drops(peer, f"no TLS: {str(error) or 'it has left'}")
        if secured is None:  # asyncio does not tell a protocol whose TLS has not begun
            self.connection_lost(None)
            return
        if self._lost:
            return
        self._transport, self._secure = secured, True
        negotiation.secured()
        early, self._early = self._early, b""
        if early:
            self._negotiate(memoryview(early))

    # Serving

    def _pump(self, *, continues: bool = False) -> None:
        """Answers what has arrived, as far as the bounds allow, with one write; `continues`, where
        the last turn was cut."""
        receiver, opener = self._receiver, self._opener
        if self._ending or receiver is None or opener is None:
            return
        if self._gathers:
            self._gather()
            return
        replies: list[bytes] = []
        worked = 0  # bytes read and written here, in this turn
        # Who asks for one thing at a time waits for a whole turn, each time, of who asks for all
        # that can be had. Among those who ask for much, long turns cost all of them less.
        hurries = self._content_at_cut not in (None, self._server.content)
        longest_write = opener.at_once // 8 & -PAGE if hurries else opener.at_once
        turn_ends = self._loop.time() + (_SHORT_TURN_SECONDS if hurries else _TURN_SECONDS)
        more = True  # whether there may be requests left that are complete
        if self._has_room():
            form, contexts = self._form, self._contexts
            for request in receiver.requests():
                length = request[4]
                if _is_long(request, longest_write):
                    self._submit(opener, request)
                    if not self._has_room():
                        break
                else:
                    try:
                        replies += answer(opener, request, form, contexts, nowait=True)
                    except BlockingIOError:
                        self._submit(opener, request)
                        if not self._has_room():
                            break
                    worked += length
                    if worked > _BATCH or self._loop.time() > turn_ends:
                        self._turn_due = True
                        self._content_at_cut = self._server.content
                        self._loop.call_soon(self._take_turn)
                        break
            else:
                more = False
                if not continues:
                    self._content_at_cut = None
                    self._server.content += 1
        receiver.keep()
        if replies:
            self._stream.send(replies)
        if receiver.ended:
            if receiver.violation:
                self._server.drops(_peer(self._transport), receiver.violation)
            self._begin_ending()
        elif more is self._reading:  # read on only when the buffer has nothing more to give
            self._reading = not more
            if more:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _take_turn(self) -> None:
        self._turn_due = False
        self._pump(continues=True)

    def _has_room(self) -> bool:
        return (
            self._peer_reads
            and self._in_flight < _IN_FLIGHT
            and self._in_flight_bytes < _IN_FLIGHT_BYTES
        )

    def _submit(self, opener: Opener, request: Request) -> None:
        """Has a request that may take long answered by a thread."""
        self._in_flight += 1
        self._in_flight_bytes += _held(request)
        self._had_much = self._had_much or self._in_flight_bytes >= _MUCH
        self._server.turns.submit(self, partial(self._work, opener, _kept(request)))

    def _work(self, opener: Opener, request: Request) -> None:
        """In a thread."""
        reply = answer(opener, request, self._form, self._contexts)
        self._loop.call_soon_threadsafe(self._worked, _held(request), reply)

    def _worked(self, held: int, reply: Reply) -> None:
        self._in_flight -= 1
        self._in_flight_bytes -= held
        self._stream.send(reply)
        if self._ending:
            self._finish_if_idle()
        elif not self._reading and not self._turn_due:
            self._pump()

    # Ending

    def end(self, refusal: int | None) -> None:
        """Admit nothing more, and end: what has not begun yet gets the error `refusal`; None: we
        leave, and it is done."""
        if self._negotiation is not None:
            self._negotiation.shutting_down = True
        elif not self._ending and not self._gathers:
            self._gathers, self._refusal = True, refusal
            gather_s = LEAVE_SECONDS / 2 if refusal is None else GATHER_SECONDS
            self._deadline = self._loop.time() + gather_s
            self._gather()
            self._end_when_quiet()

    def _gather(self) -> None:
        """Move 1, and 3 after the cut."""
        assert self._receiver is not None
        self._held_back = not self._may_gather()
        for request in self._receiver.requests() if not self._held_back else ():
            self._gather_answer(request)
            if self._cut and not self._may_gather():
                self._answer_gathered()
            if not self._may_gather():
                self._held_back = True
                break
        self._receiver.keep()
        self._quiet_since = self._loop.time()
        if self._cut or self._receiver.ended:
            self._answer_gathered()
        if self._receiver.ended or (self._cut and self._held_back):
            self._begin_ending()
        elif self._cut and not self._peer_reads:
            self.abort()  # over TCP one can send after the cut, and need not read
        elif self._held_back is self._reading:
            self._reading = not self._held_back
            if self._held_back:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    def _may_gather(self) -> bool:
        """Errors need room for themselves only."""
        return self._gathers_few() and (self._refusal is not None or self._has_room())

    def _gathers_few(self) -> bool:
        return len(self._gathered) < _MOST_GATHERED and self._gathered_bytes < _MOST_GATHERED_BYTES

    def _gather_answer(self, request: Request) -> None:
        if self._refusal is not None:
            refused = (self._refusal, "the device was reset, or the server ends"), *request[1:]
            request = cast(Request, refused)
        assert self._opener is not None
        try:
            if _is_long(request, self._opener.at_once):
                raise BlockingIOError
            parts = answer(self._opener, request, self._form, self._contexts, nowait=True)
        except BlockingIOError:
            self._submit(self._opener, request)
        else:
            self._gathered += parts
            self._gathered_bytes += sum(map(len, parts))

    def _end_when_quiet(self) -> None:
        """Move 2."""
        if self._ending:
            return
        now = self._loop.time()
        quiet = now - self._quiet_since >= QUIET_SECONDS
        quiet = quiet and not self._in_flight and not self._held_back
        if not quiet and self._gathers_few() and now < self._deadline:
            self._timer = self._loop.call_later(QUIET_SECONDS / 4, self._end_when_quiet)
            return
        self._cut = True
        self._stream.cut()
        self._answer_gathered()
        self._timer = self._loop.call_later(LINGER_SECONDS, self.abort)
        if self._held_back:
            self._gather()

    def _answer_gathered(self) -> None:
        gathered, self._gathered, self._gathered_bytes = self._gathered, [], 0
        if gathered:
            self._stream.send(gathered)

    def abort(self) -> None:
        """Gives up on the peer. The Opener still outlives the last request that uses it."""
        self._transport.abort()

    def _begin_ending(self) -> None:
        self._ending = True
        self._transport.pause_reading()  # whatever still comes has no place to go
        self._finish_if_idle()

    def _finish_if_idle(self) -> None:
        """Called whenever one of its conditions may have come true."""
        if not self._ending or self._in_flight:
            return
        self._cancel_timer()
        if self._opener is not None:
            opener, self._opener = self._opener, None
            opener.close()
        if not self._lost:
            self._transport.close()  # sends what is buffered first
            self._timer = self._loop.call_later(LINGER_SECONDS, self.abort)
        elif not self.gone.done():
            # Their buffers would stay until cycles of garbage are collected, which is never where
            # the process is hardened: 64 MiB of each client that left TLS with answers unread.
            if self.serving:
                del self._stream
            self._receiver = self._negotiation = None
            del self._transport
            self._server.live.discard(self)
            self.gone.set_result(None)
            if self._had_much:
                heap.trim()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _kept(request: Request) -> Request:
    """The same request, with a payload of its own, as one of more than INLINE has already."""
    *head, payload = request
    if payload is None or len(payload) > INLINE:
        return request
    return *head, memoryview(bytes(payload))  # type: ignore[return-value]


def _is_long(request: Request, longest_write: int) -> bool:
    """Whether it takes too long for the event loop. Looking does not: it ends early (`extents`)."""
    refusal, command, _cookie, _offset, length, _flags, _payload = request
    if refusal or command == NBD_CMD_BLOCK_STATUS:
        return False
    return length > INLINE or min(length, _COMPRESSED.get(command, 0)) > longest_write


def _held(request: Request) -> int:
    """Bytes of memory that a request in flight keeps."""
    _refusal, command, _cookie, _offset, length, _flags, _payload = request
    return length if command in (NBD_CMD_READ, NBD_CMD_WRITE) else 0


def _peer(transport: asyncio.BaseTransport) -> str:
    """Who is at the other end, in a few words."""
    sock = transport.get_extra_info("socket")
    if sock.family != socket.AF_UNIX:
        name = transport.get_extra_info("peername")
        return "a client that has left" if name is None else str(address_of(sock.family, name))
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid = struct.unpack("3i", credentials)[0]
    try:
        name = Path(f"/proc/{pid}/comm").read_text(errors="replace").rstrip()
    except OSError:
        return f"pid {pid}"
    # Its own choice, and shown on terminals.
    return f"{''.join(each if each.isprintable() else '?' for each in name)} (pid {pid})"

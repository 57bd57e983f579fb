"""The NBD protocol as its specification has it: the numbers, and a client that believes nothing.

Transcribed by hand from doc/proto.md of NetworkBlockDevice/nbd, extended headers from its branch
extension-ext-header. Nothing here comes from zramd.nbd, so that a number which is wrong there is
found here.

`Peer` fails where a server's bytes are not exactly what was negotiated: a magic number, a cookie, a
flag, a length, a chunk out of bounds, a reply too many, a message that is not UTF-8.
"""

import fcntl
import itertools
import socket
import struct
import termios
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEADLINE_S = 30

# Handshake

GREETING = b"NBDMAGIC" + b"IHAVEOPT" + b"\x00\x03"  # FIXED_NEWSTYLE and NO_ZEROES
C_FIXED_NEWSTYLE, C_NO_ZEROES = 1, 2

EXPORT_NAME, ABORT, LIST, PEEK_EXPORT, STARTTLS, INFO, GO = 1, 2, 3, 4, 5, 6, 7
STRUCTURED_REPLY, LIST_META_CONTEXT, SET_META_CONTEXT, EXTENDED_HEADERS = 8, 9, 10, 11

ACK, REP_SERVER, REP_INFO, REP_META_CONTEXT = 1, 2, 3, 4
ERR_UNSUP, ERR_POLICY, ERR_INVALID, ERR_PLATFORM, ERR_TLS_REQD = (2**31 + n for n in range(1, 6))
ERR_UNKNOWN, ERR_SHUTDOWN, ERR_BLOCK_SIZE_REQD, ERR_TOO_BIG = (2**31 + n for n in range(6, 10))
ERR_EXT_HEADER_REQD = 2**31 + 10

INFO_EXPORT, INFO_NAME, INFO_DESCRIPTION, INFO_BLOCK_SIZE = 0, 1, 2, 3

# Transmission

HAS_FLAGS, READ_ONLY, SEND_FLUSH, SEND_FUA, ROTATIONAL, SEND_TRIM = (1 << n for n in range(6))
SEND_WRITE_ZEROES, SEND_DF, CAN_MULTI_CONN, SEND_RESIZE = (1 << n for n in range(6, 10))
SEND_CACHE, SEND_FAST_ZERO, BLOCK_STATUS_PAYLOAD = (1 << n for n in range(10, 13))

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, RESIZE = range(9)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << n for n in range(6))

REQUEST_MAGIC, SIMPLE_REPLY_MAGIC = 0x25609513, 0x67446698
STRUCTURED_REPLY_MAGIC = 0x668E33EF
EXTENDED_REQUEST_MAGIC, EXTENDED_REPLY_MAGIC = 0x21E41C71, 0x6E8A278C

DONE = 1
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, STATUS_EXT, ERROR, ERROR_OFFSET = (
    0,
    1,
    2,
    5,
    6,
    32769,
    32770,
)

EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN = 1, 5, 12, 22, 28, 75, 95, 108

SIMPLE, STRUCTURED, EXTENDED = "simple", "structured", "extended"
"""The three forms of a reply."""
MODES = (SIMPLE, STRUCTURED, EXTENDED)
ENTRY = {SIMPLE: (), STRUCTURED: (STRUCTURED_REPLY,), EXTENDED: (EXTENDED_HEADERS,)}
"""The options that lead to each."""

HOLE, ZERO = 1, 2  # base:allocation

# What a client says


def u16(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}H", *numbers)


def u32(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}I", *numbers)


def u64(*numbers: int) -> bytes:
    return struct.pack(f">{len(numbers)}Q", *numbers)


def string(text: str | bytes) -> bytes:
    """With its length before it."""
    raw = text.encode() if isinstance(text, str) else text
    return u32(len(raw)) + raw


def option(number: int, data: bytes = b"") -> bytes:
    return b"IHAVEOPT" + u32(number, len(data)) + data


def wants(name: str | bytes, *infos: int) -> bytes:
    """The data of INFO and GO."""
    return string(name) + u16(len(infos), *infos)


def queries(name: str | bytes, *contexts: str) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    return string(name) + u32(len(contexts)) + b"".join(map(string, contexts))


@dataclass
class Request:
    command: int
    offset: int = 0
    length: int = 0
    flags: int = 0
    payload: bytes = b""
    cookie: int = 0x0102030405060708
    # What came of it so far:
    content: list[Any] = field(default_factory=list)
    error: int = 0

    def packed(self, mode: str) -> bytes:
        head = u16(self.flags, self.command) + u64(self.cookie, self.offset)
        if mode == EXTENDED:
            return u32(EXTENDED_REQUEST_MAGIC) + head + u64(self.length) + self.payload
        return u32(REQUEST_MAGIC) + head + u32(self.length) + self.payload


def write(mode: str, offset: int, payload: bytes, flags: int = 0) -> Request:
    flags |= PAYLOAD_LEN if mode == EXTENDED else 0
    return Request(WRITE, offset, len(payload), flags, payload)


# The ways to send it


def whole(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)


def single(byte: int) -> bytes:
    return bytes([byte])


def byte_by_byte(sock: socket.socket, data: bytes) -> None:
    """Each byte once the server has taken the one before; of what is long, those at both ends."""
    ends = (data, b"", b"") if len(data) < 300 else (data[:100], data[100:-100], data[-100:])
    first, middle, last = ends
    for piece in (*map(single, first), middle, *map(single, last)):
        sock.sendall(piece)
        while struct.unpack("i", fcntl.ioctl(sock, termios.TIOCOUTQ, bytes(4)))[0]:
            pass


class Peer:
    """One connection to a server, from its greeting on."""

    def __init__(self, path: Path, send: Callable[[socket.socket, bytes], None] = whole) -> None:
        self.mode = SIMPLE
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(DEADLINE_S)
        self.sock.connect(str(path))
        self.deliver = send
        self._asked: dict[int, Request] = {}
        assert self.receive(18) == GREETING

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, failure: object, *_: object) -> None:
        """Where nothing failed, nothing more may come than was asked for."""
        with self.sock:
            if failure is None:
                self.finish()
                assert self.rest() == b""

    def send(self, data: bytes) -> None:
        """Whoever was dropped meanwhile finds that out when he reads."""
        try:
            self.deliver(self.sock, data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            assert piece, f"the connection ended after {bytes(data)!r}, {size} bytes were due"
            data += piece
        return bytes(data)

    def rest(self) -> bytes:
        """All that comes before the server closes."""
        data = b""
        try:
            while piece := self.sock.recv(65536):
                data += piece
        except ConnectionResetError:
            pass  # it did not want all that we sent
        return data

    def finish(self) -> None:
        """No more from us."""
        try:
            self.sock.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # the server has closed

    # Handshake

    def option_reply(self, number: int) -> tuple[int, bytes]:
        """Type and data of the next one, which must answer option `number`."""
        magic, answered, kind, length = struct.unpack(">QIII", self.receive(20))
        assert magic == 0x3E889045565A9
        assert answered == number
        data = self.receive(length)
        assert kind != ACK or not data
        if kind >> 31:
            assert len(data) <= 4096
            data.decode()
        return kind, data

    def option_replies(self, number: int) -> list[tuple[int, bytes]]:
        """All of them, up to an acknowledgement or an error; an error's message left out."""
        found = []
        while True:
            kind, data = self.option_reply(number)
            found.append((kind, b"" if kind >> 31 else data))
            if kind == ACK or kind >> 31:
                return found

    def negotiate(self, number: int, data: bytes = b"") -> list[tuple[int, bytes]]:
        self.send(option(number, data))
        return self.option_replies(number)

    def enter(self, mode: str, *contexts: str, name: str = "") -> "Peer":
        """The transmission phase, by the shortest way."""
        self.send(u32(C_FIXED_NEWSTYLE | C_NO_ZEROES))
        for number in ENTRY[mode]:
            assert self.negotiate(number) == [(ACK, b"")]
        if contexts:
            replies = self.negotiate(SET_META_CONTEXT, queries(name, *contexts))
            assert [kind for kind, _ in replies] == [REP_META_CONTEXT] * len(contexts) + [ACK]
        assert self.negotiate(GO, wants(name))[-1] == (ACK, b"")
        self.mode = mode
        return self

    # Transmission

    def do(self, request: Request) -> Any:
        """The answer to it: an error, or 0, or what a READ or a BLOCK_STATUS was told."""
        self.ask(request)
        return self.answer()[1]

    def ask(self, *requests: Request, then: bytes = b"") -> None:
        """Sends them in one piece, and `then` behind."""
        self.expect(*requests)
        self.send(b"".join(request.packed(self.mode) for request in requests) + then)

    def expect(self, *requests: Request) -> None:
        """They were sent."""
        for request in requests:
            assert request.cookie not in self._asked
            self._asked[request.cookie] = request

    def answers_of(self, requests: list[Request]) -> dict[int, Any]:
        """Cookies and answers of all of these, sent without waiting for any."""
        self.expect(*requests)
        stream = b"".join(request.packed(self.mode) for request in requests)
        sender = threading.Thread(target=self.send, args=(stream,))
        sender.start()
        answers = dict(self.answer() for _ in requests)
        sender.join()
        return answers

    def answer(self) -> tuple[int, Any]:
        """Cookie and answer of the next request that is answered completely.

        READ: [(offset, data or the length of a hole)]; BLOCK_STATUS: {context: [(length, flags)]}.
        """
        while True:
            done = self._part()
            if done is None:
                continue
            del self._asked[done.cookie]
            if done.error:
                return done.cookie, done.error
            if done.command == READ:
                return done.cookie, _covering(done)
            if done.command == BLOCK_STATUS:
                assert done.content, "a status of nothing"
                assert len(dict(done.content)) == len(done.content)
                return done.cookie, dict(done.content)
            assert not done.content
            return done.cookie, 0

    def _part(self) -> Request | None:
        """Reads one message; the request, where that was the last of its reply."""
        if self.mode == EXTENDED:
            magic, flags, kind, cookie, offset, length = struct.unpack(">IHHQQQ", self.receive(32))
            assert magic == EXTENDED_REPLY_MAGIC
            assert offset == self._asked[cookie].offset
        else:
            (magic,) = struct.unpack(">I", self.receive(4))
            if magic == SIMPLE_REPLY_MAGIC:
                return self._simple()
            assert magic == STRUCTURED_REPLY_MAGIC
            assert self.mode == STRUCTURED
            flags, kind, cookie, length = struct.unpack(">HHQI", self.receive(16))
        request, payload = self._asked[cookie], self.receive(length)
        assert flags in (0, DONE)
        if kind == NONE:
            assert (flags, length) == (DONE, 0)
        elif kind == ERROR:
            request.error = _error(payload)
        else:
            {
                (READ, OFFSET_DATA): _data,
                (READ, OFFSET_HOLE): _hole,
                (BLOCK_STATUS, STATUS_EXT if self.mode == EXTENDED else STATUS): _status,
            }[request.command, kind](request, payload, self.mode)
        return request if flags == DONE else None

    def _simple(self) -> Request:
        error, cookie = struct.unpack(">IQ", self.receive(12))
        request = self._asked[cookie]
        if self.mode == STRUCTURED:
            # Errors SHOULD be chunks, with a message; ours all are.
            assert (request.command == READ, error) == (False, 0)
        elif request.command == READ and not error:
            request.content = [(request.offset, self.receive(request.length))]
        request.error = error
        return request


def _error(payload: bytes) -> int:
    error, length = struct.unpack_from(">IH", payload)
    assert error in (EPERM, EIO, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN)
    assert len(payload) == 6 + length <= 6 + 4096
    assert payload[6:].decode(), "an error chunk without a message"
    return int(error)


def _data(request: Request, payload: bytes, _mode: str) -> None:
    assert len(payload) >= 9
    request.content.append((int.from_bytes(payload[:8], "big"), payload[8:]))


def _hole(request: Request, payload: bytes, _mode: str) -> None:
    offset, length = struct.unpack(">QI", payload)
    assert length
    request.content.append((offset, length))


def _status(request: Request, payload: bytes, mode: str) -> None:
    if mode == EXTENDED:
        context, count = struct.unpack_from(">II", payload)
        extents = list(struct.iter_unpack(">QQ", payload[8:]))
        assert len(extents) == count
    else:
        (context,) = struct.unpack_from(">I", payload)
        extents = list(struct.iter_unpack(">II", payload[4:]))
    # Only the last may pass the request, and neighbours SHOULD differ; ours keep within it, and do.
    assert 0 < len(extents) <= 4096  # ours; the specification's limit is 2^20
    assert all(length for length, _ in extents)
    assert sum(length for length, _ in extents) <= request.length
    assert all(left[1] != right[1] for left, right in itertools.pairwise(extents))
    assert len(extents) == 1 or not request.flags & REQ_ONE
    request.content.append((context, extents))


def _covering(request: Request) -> list[Any]:
    """The chunks of a READ: each byte asked for must be in one of them, once."""
    at = request.offset
    for offset, content in sorted(request.content, key=lambda chunk: chunk[0]):
        assert offset == at
        at += content if isinstance(content, int) else len(content)
    assert at == request.offset + request.length
    assert len(request.content) == 1 or not request.flags & DF
    return request.content

"""`zramd.nbd.client.negotiate` against a server that says anything. The invariant:

1. It returns what the server said, or raises ServerFailed or BadValue; nothing else escapes.
2. It never asks for more bytes than the message that is coming has, and takes none that follow the
   handshake: they are the kernel's.
3. It sends what a client may: flags that were offered, then GO, then perhaps EXPORT_NAME.
4. What it says of a failure is one line that a terminal can show.
5. What it allocates is bounded, whatever lengths the server claims.

An input is one byte, which says how the stream is cut into pieces, and the server's stream.
"""

import contextlib
import socket
import struct
from collections.abc import Iterator
from typing import Any

from tests.fuzz import peer
from zramd.errors import BadValue, ServerFailed
from zramd.nbd.client import negotiate

EXPORT = "zram0"
MOST_AT_ONCE = 64 << 10


class Socket:
    """A peer whose every byte is known."""

    family = socket.AF_UNIX

    def __init__(self, stream: bytes, piece: int) -> None:
        self.sent = bytearray()
        self.stream, self.at = stream, 0
        self._piece = piece

    def recv(self, most: int) -> bytes:
        peer.must(0 < most <= MOST_AT_ONCE, f"{most} bytes at once")
        taken = self.stream[self.at : self.at + min(most, self._piece)]
        self.at += len(taken)
        return taken

    def sendall(self, data: bytes) -> None:
        self.sent += data


class World:
    def __init__(self) -> None:
        self.executions = 0

    def close(self) -> None:
        pass

    def run(self, data: bytes) -> bool:
        """Whether the handshake succeeded. Raises whatever is wrong."""
        self.executions += 1
        sock: Any = Socket(data[1:], (data[0] if data else 0) + 1)
        try:
            info = negotiate(sock, EXPORT)
        except (ServerFailed, BadValue) as error:
            peer.must(str(error).isprintable(), "what it says is no line of text")
            return False
        finally:
            must_be_a_client(bytes(sock.sent), sock.stream)
        end, size, flags = handshake(sock.stream)
        peer.must(sock.at == end, f"{sock.at} bytes are taken of a handshake of {end}")
        peer.must((info.size, info.flags) == (size, flags), "another size or other flags")
        return True


def must_be_a_client(sent: bytes, stream: bytes) -> None:
    if len(stream) < 18 or stream[:16] != peer.MAGIC + peer.IHAVEOPT:
        peer.must(not sent, "something is said to what is no server")
        return
    offered = int.from_bytes(stream[16:18], "big")
    peer.must(int.from_bytes(sent[:4], "big") == offered & 3, "client flags")
    name = EXPORT.encode()
    go = struct.pack(">I", len(name)) + name + struct.pack(">HH", 1, 3)
    first = peer.IHAVEOPT + struct.pack(">II", peer.GO, len(go)) + go
    last = peer.IHAVEOPT + struct.pack(">II", peer.EXPORT_NAME, len(name)) + name
    peer.must(sent[4:] in ((first, first + last) if offered & 1 else (last,)), "options")


def handshake(stream: bytes) -> tuple[int, int, int]:
    """Where a handshake that succeeds ends, and the size and flags that it tells."""
    offered = int.from_bytes(stream[16:18], "big")
    at = 18
    size = flags = None
    while offered & 1:
        of, reply, length = struct.unpack_from(">III", stream, at + 8)
        peer.must(stream[at : at + 8] == peer.REPLY_MAGIC and of == peer.GO, "not checked")
        body = stream[at + 20 : at + 20 + length]
        at += 20 + length
        peer.must(len(body) == length, "a message that is cut off is taken for one")
        if reply == peer.REP_INFO and body[:2] == b"\0\0":
            size, flags = struct.unpack(">QH", body[2:])
        if reply == peer.ACK:
            peer.must(size is not None, "an export without its size")
            assert size is not None
            assert flags is not None
            return at, size, flags
        if reply == peer.UNSUP:
            break
        peer.must(reply == peer.REP_INFO, "an error is taken for an answer")
    size, flags = struct.unpack_from(">QH", stream, at)
    return at + (10 if offered & 2 else 134), size, flags


@contextlib.contextmanager
def small() -> Iterator[None]:
    """There are no limits here."""
    yield

"""A real server in a thread of its own, and a client that says exactly what it is told to say."""

import asyncio
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any

from zramd.device import Zram
from zramd.nbd import wire
from zramd.nbd.address import Address, TcpAddress, UnixAddress
from zramd.nbd.client import negotiate
from zramd.nbd.server import Server

DEADLINE_S = 30


class RunningServer:
    """`Server` on an event loop in a thread. `do` runs a coroutine there, `ask` a function."""

    def __init__(self, zram: Zram, **options: Any) -> None:
        """The options are those of `Server`."""
        self.zram = zram
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server's loop")
        self._thread.start()
        self.server = self.ask(lambda: Server(zram, **options))

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.begin(work).result(DEADLINE_S)

    def begin(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def ask(self, question: Callable[[], Any]) -> Any:
        async def answer() -> Any:
            return question()

        return self.do(answer())

    def listen(self, address: Address) -> Address:
        self.do(self.server.listen(address))
        return self.server.addresses[-1]

    def close(self) -> None:
        try:
            self.do(self.server.close())
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()


class RawClient:
    """One connection. Numbers are cookies."""

    def __init__(self, address: Address, export: str | None = "") -> None:
        if isinstance(address, TcpAddress):
            self.sock = socket.create_connection((address.host, address.port), DEADLINE_S)
        else:
            unix = isinstance(address, UnixAddress)
            self.sock = socket.socket(socket.AF_UNIX if unix else socket.AF_VSOCK)
            self.sock.settimeout(DEADLINE_S)
            self.sock.connect(str(address.path) if unix else (address.cid, address.port))
        self.info = None if export is None else negotiate(self.sock, export)

    def __enter__(self) -> "RawClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def send(self, data: bytes) -> None:
        self.sock.sendall(data)

    def receive(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            piece = self.sock.recv(size - len(data))
            if not piece:
                raise EOFError(f"{len(data)} bytes instead of {size}")
            data += piece
        return bytes(data)

    def reply(self) -> tuple[int, int]:
        """(cookie, error)"""
        magic, error, cookie = wire.SIMPLE_REPLY.unpack(self.receive(16))
        assert magic == wire.NBD_SIMPLE_REPLY_MAGIC
        return struct.unpack(">Q", cookie)[0], error

    def ended(self) -> bool:
        """Waits for the server to close; False where it says something instead."""
        try:
            return self.sock.recv(1) == b""
        except ConnectionResetError:
            return True

    def error(self, data: bytes) -> int:
        """Sends one request that is not a READ; the error it gets."""
        self.send(data)
        return self.reply()[1]

    def read(self, offset: int, length: int) -> bytes:
        self.send(request(wire.NBD_CMD_READ, offset, length))
        assert self.reply() == (1, 0)
        return self.receive(length)

    def write(self, offset: int, data: bytes) -> None:
        assert self.error(request(wire.NBD_CMD_WRITE, offset, len(data)) + data) == 0


def request(command: int, offset: int = 0, length: int = 0, *, flags: int = 0, cookie: int = 1):
    return wire.pack_request(command, struct.pack(">Q", cookie), offset, length, flags)


def contexts(export: str, *queries: str) -> bytes:
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    strings = [struct.pack(">I", len(each)) + each.encode() for each in (export, *queries)]
    return strings[0] + struct.pack(">I", len(queries)) + b"".join(strings[1:])


def wait_for(fact: Callable[[], Any]) -> None:
    """Until another thread or process has made it so."""
    deadline = time.monotonic() + DEADLINE_S
    while not fact():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.001)

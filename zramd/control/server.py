"""Serving a device's control socket, on the caller's event loop or in a thread of its own.

`close` returns only after every reply that was made has been sent, the one to Stop included, or
its client has stopped reading for a second.

Assumes that the caller holds the claim on the device's name (zramd.service.runtime): whatever
stands at the socket's path is then a leftover, and is replaced.
"""

import asyncio
import os
import socket
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Final

from asyncvarlink import (
    FileDescriptorArray,
    VarlinkInterfaceRegistry,
    VarlinkInterfaceServerProtocol,
    VarlinkMethodReply,
    VarlinkUnixServer,
    create_unix_server,
)
from asyncvarlink.serviceinterface import VarlinkServiceInterface

from zramd import __version__
from zramd.control.interface import DeviceInterface, Upgrade
from zramd.errors import ServerFailed

if TYPE_CHECKING:
    from zramd.device import Zram

_BACKLOG: Final = 128
_FLUSH_S: Final = 1.0
_MOST_MESSAGE: Final = 64 << 10


class ControlServer:
    """One device's control socket; `start` and `close` on the same event loop."""

    def __init__(
        self,
        zram: "Zram",
        path: Path,
        stop: Callable[[], None],
        upgrade: Upgrade | None = None,
    ) -> None:
        """`stop` is called on the event loop when a client has asked the server to end, `upgrade`
        when it is to let another program go on, where it can."""
        self._path = path
        self._registry = VarlinkInterfaceRegistry()
        self._registry.register_interface(
            VarlinkServiceInterface("zramd", "zramd", __version__, "", self._registry)
        )
        self._registry.register_interface(DeviceInterface(zram, stop, upgrade))
        self._unsent: set[asyncio.Future[None]] = set()
        self._server: VarlinkUnixServer | None = None

    async def start(self, listener: socket.socket | None = None) -> int:
        """Bind, unless `listener` is, by a predecessor, and listen; the socket's descriptor. Raises
        ServerFailed."""
        if listener is None or not self._path.exists():
            listener = self._bind()
        self._server = await create_unix_server(
            lambda: _Connection(self._registry, self._unsent), sock=listener
        )
        listener.listen(_BACKLOG)  # asyncvarlink asks for 1: a burst of clients would be refused
        return listener.fileno()

    def _bind(self) -> socket.socket:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._path.unlink(missing_ok=True)
            os.fchmod(listener.fileno(), 0o600)  # the mode that bind() gives the file
            listener.bind(os.fspath(self._path))
        except OSError as error:
            listener.close()
            raise ServerFailed(f"cannot make {self._path}: {error.strerror or error}") from error
        return listener

    async def close(self, *, leave: bool = False) -> None:
        """Stop accepting, send what is to be sent, end all connections. Idempotent. `leave` the
        socket's file to another process that holds the socket."""
        server, self._server = self._server, None
        if server is None:
            return
        server.close()
        if not leave:
            self._path.unlink(missing_ok=True)
        if self._unsent:
            await asyncio.wait(self._unsent, timeout=_FLUSH_S)
        server.abort_clients()
        await server.wait_closed()


class _Connection(VarlinkInterfaceServerProtocol):
    """One client; its replies stay in `unsent` until the kernel has them.

    What is no message, or one without end, ends the connection: asyncvarlink would keep it, and
    look at all of it again and again, on the loop that serves the device.
    """

    def __init__(
        self, registry: VarlinkInterfaceRegistry, unsent: set[asyncio.Future[None]]
    ) -> None:
        super().__init__(registry)
        self._unsent = unsent
        self._client: asyncio.BaseTransport
        self._begun = 0  # bytes of a message whose end has not come
        self._over = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._client = transport
        super().connection_made(transport)

    def message_received(self, data: bytes, fds: FileDescriptorArray | None) -> None:
        if self._over:
            return
        ends = data.rfind(b"\0")
        self._begun = self._begun + len(data) if ends < 0 else len(data) - ends - 1
        try:
            super().message_received(data, fds)
        except (ValueError, RecursionError):  # no UTF-8, or JSON within JSON within JSON
            self._over = True
        if self._over or self._begun > _MOST_MESSAGE:
            self._over = True
            self._client.close()

    def send_reply(
        self, reply: VarlinkMethodReply, fds: list[int] | None = None, autoclose: bool = True
    ) -> asyncio.Future[None]:
        sent = super().send_reply(reply, fds, autoclose)
        self._unsent.add(sent)
        sent.add_done_callback(self._unsent.discard)
        return sent


class ControlThread:
    """The control socket served by a thread, for a host whose main loop is not ours (nbdkit).

    Threads do not survive a fork: start it after the host has daemonised (nbdkit: after_fork).
    """

    def __init__(self, zram: "Zram", path: Path, stop: Callable[[], None]) -> None:
        """`stop` is called in that thread when a client has asked the server to end."""
        self._server = ControlServer(zram, path, stop)
        self._loop: asyncio.AbstractEventLoop
        self._beside: list[Future[None]] = []
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        """Returns once the socket listens. Raises ServerFailed."""
        self._loop = asyncio.new_event_loop()
        self._thread.start()
        try:
            asyncio.run_coroutine_threadsafe(self._server.start(), self._loop).result()
        except BaseException:
            self._end_loop()
            raise

    def run_beside(self, work: Coroutine[None, None, None]) -> None:
        """Have `work` done on the same event loop, until `close`."""
        self._beside.append(asyncio.run_coroutine_threadsafe(work, self._loop))

    def close(self) -> None:
        """End the service and the thread. Idempotent; not to be called from that thread."""
        if self._thread.is_alive():
            for work in self._beside:
                work.cancel()
            asyncio.run_coroutine_threadsafe(self._server.close(), self._loop).result()
            self._end_loop()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()
        self._loop.run_until_complete(self._loop.shutdown_default_executor())
        self._loop.close()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

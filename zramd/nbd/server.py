"""NBD over sockets: where a device's server listens, and the connections it has.

Promises:
1. A unix socket has mode 0600 from its first moment; a stale one is replaced, a live one and
   anything that is no socket stay untouched, and we remove none but our own: not an adopted one.
2. A forced reset of the device ends the connections that were open before it, after all that was
   sent has been answered, with EIO where it was not admitted; those of the next generation live on.
3. After `close` nothing is left: no socket, no connection, no thread, no Opener; but where we only
   leave, the sockets' files, on which another process that holds the sockets goes on.
4. At most `max_connections` clients are served; who comes beyond is accepted and closed at once, so
   that nobody waits in vain, and there are descriptors left for all else. A place is held from the
   connection's first moment: who does not finish the handshake in time loses it. Others' clients
   never take the places of the device's own socket: the kernel is to be connected again there.

Assumes: everything but the device's callback is called on the event loop; two servers are not
started on one socket path at the same instant.
"""

import asyncio
import errno
import logging
import os
import resource
import socket
import stat
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from zramd.device import Zram
from zramd.errors import BadValue, ServerExists
from zramd.nbd.address import Address, TcpAddress, UnixAddress, VsockAddress, address_of
from zramd.nbd.connection import LEAVE_SECONDS, LINGER_SECONDS, Connection
from zramd.nbd.transmission import BUFFER
from zramd.nbd.turns import Turns

if TYPE_CHECKING:  # it imports OpenSSL
    from zramd.nbd.tls import Tls

THREADS = min(os.cpu_count() or 1, 8)
"""More would only queue for the GIL between two pages."""

_FILE_IS_OURS: Final[dict[str, Any]] = (
    {"cleanup_socket": False} if sys.version_info >= (3, 13) else {}
)
"""Where asyncio would remove a socket's file by itself."""

_BACKLOG = 1024
"""Clients that connect without blocking get EAGAIN from a unix socket whose backlog is full."""

_ACCEPTED_AT_ONCE: Final = 64
"""By asyncio, of each listener, before it looks at one of them; each time there may be as many of
the time before, and of the one before that, whom we have not refused yet."""

_MOST_CONNECTIONS: Final = 1024
"""If nobody says another number, and there are descriptors for so many."""
_FEWEST_CONNECTIONS: Final = 16
_OTHER_DESCRIPTORS: Final = 64 + 3 * _ACCEPTED_AT_ONCE  # _PRIVATE_CONNECTIONS among the 64
"""What a server has open beside its connections: about 20, control's clients, a snapshot, and who
is about to be refused."""

_PRIVATE_CONNECTIONS: Final = 16
"""On the device's own socket, beyond those that there may be in all."""

_BURST_SECONDS: Final = 10.0
"""Who is turned away, or dropped, so soon after another is not logged again."""

_WHERE: Final = "name an address of this machine, and a path or port that may be used"

_log = logging.getLogger(__name__)


def most_connections(asked: int | None) -> int:
    """How many clients this process can serve: as many as were asked for, or a number that fits its
    limit of descriptors, which is raised where that must be. Raises BadValue."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if asked is None:
        return max(_FEWEST_CONNECTIONS, min(_MOST_CONNECTIONS, soft - _OTHER_DESCRIPTORS))
    needed = asked + _OTHER_DESCRIPTORS
    if needed > soft:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (needed, max(needed, hard)))
        except (OSError, ValueError, OverflowError) as error:
            raise BadValue(
                f"{asked} connections take {needed} descriptors, and this process may have {hard}",
                hint="raise that, by ulimit -Hn or LimitNOFILE=, or allow fewer",
            ) from error
    return asked


class Server:
    """Serves one device, under its name and under the empty name, on any number of addresses."""

    def __init__(
        self,
        zram: Zram,
        *,
        tls: "Tls | None" = None,
        read_only: bool = False,
        max_connections: int | None = None,
    ) -> None:
        """`max_connections`: None is the most that fit the limit of descriptors. Raises BadValue
        where more are asked for than that can be raised to."""
        self.zram = zram
        self.tls = tls
        self.read_only = read_only
        self._max_connections = most_connections(max_connections)
        self._refused_at = self._dropped_at = -_BURST_SECONDS  # the last one
        self.buffer = memoryview(bytearray(BUFFER))
        """What each connection receives into, on the event loop, and leaves before the next."""
        self.threads = ThreadPoolExecutor(THREADS, thread_name_prefix="nbd")
        self.turns = Turns(self.threads, THREADS)
        self.content = 0
        """Turns that were not cut: of connections that had asked for no more."""
        self.closing = False
        self.live: set[Connection] = set()
        self.addresses: list[Address] = []
        """Where it listens; a TCP port of 0 has become the real one."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listeners: list[asyncio.Server] = []
        self._sockets: list[tuple[Path, os.stat_result]] = []
        zram.on_reset.append(self._device_was_reset)

    @property
    def connections(self) -> int:
        """Connections there are, those still negotiating included."""
        return len(self.live)

    @property
    def serving(self) -> list[Connection]:
        """Connections that have opened the device."""
        return [connection for connection in self.live if connection.serving]

    async def listen(
        self, address: Address, bound: Sequence[socket.socket] = (), *, private: bool = False
    ) -> list[int]:
        """Binds `address`, unless a predecessor has `bound` it, and accepts from now on; the
        descriptors of the sockets. `private`: only our own user can connect, and the kernel, which
        knows no TLS; so none is required there.

        Raises ServerExists where somebody listens already, BadValue where nobody can.
        """
        self._loop = loop = asyncio.get_running_loop()
        tls = self._private_tls() if private else self.tls
        accept = partial(Connection, self, tls, private=private)
        if isinstance(address, UnixAddress):
            sock = bound[0] if bound and address.path.exists() else _bind_unix(address)
            self._sockets.append((address.path, address.path.stat()))
            listeners = [
                await loop.create_unix_server(
                    accept, sock=sock, backlog=_ACCEPTED_AT_ONCE, **_FILE_IS_OURS
                )
            ]
        elif bound or isinstance(address, VsockAddress):
            listeners = [
                await loop.create_server(accept, sock=sock, backlog=_ACCEPTED_AT_ONCE)
                for sock in bound or [_bind_vsock(address)]  # type: ignore[arg-type]
            ]
        else:
            try:
                listener = await loop.create_server(
                    accept, address.host, address.port, backlog=_ACCEPTED_AT_ONCE
                )
            except OSError as error:
                raise _listen_failed(address, error) from error
            except UnicodeError as error:
                raise BadValue(
                    f"cannot listen on {address}: that is no name of a host", hint=_WHERE
                ) from error
            listeners = [listener]
        sockets = [sock for listener in listeners for sock in listener.sockets]
        if isinstance(address, TcpAddress):
            address = TcpAddress(address.host, sockets[0].getsockname()[1])
        self._add(listeners, address)
        return [sock.fileno() for sock in sockets]

    async def adopt(self, sock: socket.socket) -> None:
        """Accepts from a stream socket that listens already; whoever made its file removes it."""
        self._loop = loop = asyncio.get_running_loop()
        listener = await loop.create_server(
            partial(Connection, self, self.tls), sock=sock, backlog=_ACCEPTED_AT_ONCE
        )
        self._add([listener], address_of(sock.family, sock.getsockname()))

    def _add(self, listeners: list[asyncio.Server], address: Address) -> None:
        for sock in [sock for listener in listeners for sock in listener.sockets]:
            # asyncio has only one number for how many wait and how many are accepted at once.
            with socket.socket(fileno=os.dup(sock.fileno())) as same:
                same.listen(_BACKLOG)
        self._listeners += listeners
        self.addresses.append(address)

    async def serve(self, sock: socket.socket) -> Connection:
        """One client, on a stream socket that is connected already."""
        self._loop = loop = asyncio.get_running_loop()
        _, connection = await loop.connect_accepted_socket(
            partial(Connection, self, self.tls), sock
        )
        return connection

    def _private_tls(self) -> "Tls | None":
        return None if self.tls is None else replace(self.tls, required=False)

    def admits(self, private: bool) -> bool:
        """Whether there is room for one connection more."""
        if len(self.live) < self._max_connections + (_PRIVATE_CONNECTIONS if private else 0):
            return True
        last, self._refused_at = self._refused_at, self._now()
        if self._refused_at - last >= _BURST_SECONDS:
            _log.warning(
                "%d connections to %s, the most there may be: who comes now is turned away",
                *(len(self.live), self.zram.name),
            )
        return False

    def drops(self, peer: str, why: str) -> None:
        """Logs that a client is dropped."""
        last, self._dropped_at = self._dropped_at, self._now()
        if self._dropped_at - last >= _BURST_SECONDS:
            _log.info("dropping %s: %s", peer, why)

    def _now(self) -> float:
        return asyncio.get_running_loop().time()

    async def close(self, *, leave: bool = False) -> None:
        """Stops accepting, answers what is in flight, closes the connections, unlinks sockets.

        `leave`: to another process, which goes on: no request gets an error for it, and the
        sockets' files stay.
        """
        self.closing = True
        if self._device_was_reset in self.zram.on_reset:
            self.zram.on_reset.remove(self._device_was_reset)
        for listener in self._listeners:
            listener.close()
        for path, bound in self._sockets if not leave else ():
            _unlink_if_ours(path, bound)
        self._listeners, self._sockets, self.addresses = [], [], []
        serving = self.serving
        for connection in list(self.live):
            connection.end(None if leave else errno.ESHUTDOWN)
        if serving:
            within_s = LEAVE_SECONDS if leave else LINGER_SECONDS
            await asyncio.wait([c.gone for c in serving], timeout=within_s)
        # What is left has not finished its handshake, or does not read.
        rest = list(self.live)
        for connection in rest:
            connection.abort()
        if rest:
            await asyncio.wait([connection.gone for connection in rest])
        self.threads.shutdown()

    def _device_was_reset(self) -> None:
        """The device's callback, in the resetter's thread."""
        if self._loop is not None:
            try:
                self._loop.call_soon_threadsafe(self._end_old_generation)
            except RuntimeError:
                pass  # the loop is closed, and all connections with it

    def _end_old_generation(self) -> None:
        for connection in list(self.live):
            if connection.outdated:
                connection.end(errno.EIO)


def _bind_unix(address: UnixAddress) -> socket.socket:
    """A socket bound to the path, of mode 0600, in the place of a stale one."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _make_way(address)
        os.fchmod(sock.fileno(), 0o600)  # Linux: bind() gives the file this mode, from the start
        sock.bind(str(address.path))
    except OSError as error:
        sock.close()
        raise _listen_failed(address, error) from error
    except BaseException:
        sock.close()
        raise
    return sock


def _bind_vsock(address: VsockAddress) -> socket.socket:
    try:
        sock = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    except OSError as error:
        raise _listen_failed(address, error) from error
    try:
        sock.bind((address.cid, address.port))
    except OSError as error:
        sock.close()
        raise _listen_failed(address, error) from error
    return sock


def _make_way(address: UnixAddress) -> None:
    """Removes a socket on which nobody listens. Raises BadValue, ServerExists, OSError."""
    path = address.path
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise BadValue(
            f"{path} exists and is not a socket",
            hint="remove it, or choose another path for the socket",
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)  # a full backlog is a live server too
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except BlockingIOError:
            pass
    raise _exists(address)


def _listen_failed(address: Address, error: OSError) -> BadValue | ServerExists:
    if error.errno == errno.EADDRINUSE:
        return _exists(address)
    return BadValue(f"cannot listen on {address}: {error.strerror or error}", hint=_WHERE)


def _exists(address: Address) -> ServerExists:
    return ServerExists(
        f"a server listens on {address} already", hint="stop it, or listen elsewhere"
    )


def _unlink_if_ours(path: Path, bound: os.stat_result) -> None:
    """Another server may have replaced our socket; that one stays."""
    try:
        if os.path.samestat(path.lstat(), bound):
            path.unlink()
    except FileNotFoundError:
        pass

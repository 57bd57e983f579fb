"""The process of `zramd serve`: one device, its NBD sockets, its control socket.

Life: build the device in memory; claim its name; listen on NAME/nbd.sock and on whatever else was
asked for; serve control; say that it is ready; wait for SIGTERM, SIGINT or the Stop call; stop
accepting, finish what is in flight, close; drop the pages; remove the sockets and the directory.

Guarantees
1. When anything fails before readiness, all that was made is removed, and the error says what.
2. Readiness is told once all sockets listen: by sd_notify(3), and by one line on stderr.

SIGTERM ends the server even while clients are connected, a kernel that has the device attached
among them: their pages are gone then. `zramd down` is the end that asks first.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Sequence
from contextlib import AsyncExitStack, closing

from zramd import heap, sizes
from zramd.control.server import ControlServer
from zramd.device import Zram
from zramd.errors import BadValue
from zramd.nbd.address import Address, UnixAddress
from zramd.nbd.server import Server
from zramd.service.runtime import Paths, claim

_log = logging.getLogger(__name__)


def build(name: str, disksize: int, *, algorithm: str | None, mem_limit: int | None) -> Zram:
    """An initialised device; sizes in bytes, None for the default. Raises BadValue, NoMemory."""
    heap.use_one_arena()
    zram = Zram(name)
    if algorithm is not None:
        zram.set("comp_algorithm", algorithm)
    if mem_limit is not None:
        zram.set("mem_limit", str(mem_limit))
    zram.init(disksize)
    return zram


def run(zram: Zram, listen: Sequence[Address], *, background: bool = False) -> None:
    """Serve `zram` until told to end, and close it.

    `background`: from readiness on, stdout and stderr go to NAME/log and the working directory is
    the root, so that the process holds neither its starter's terminal nor any mount.

    Raises ServerExists where the name or a socket is taken, BadValue for an address.
    """
    with claim(zram.name) as held, closing(zram):
        asyncio.run(_serve(zram, held.paths, listen, background))


async def _serve(zram: Zram, paths: Paths, listen: Sequence[Address], background: bool) -> None:
    for address in listen:
        if isinstance(address, UnixAddress) and address.path.parent == paths.dir:
            raise BadValue(
                f"{address} lies in the device's own directory", hint="choose a path elsewhere"
            )
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    server = Server(zram)
    control = ControlServer(zram, paths.control_socket, ended.set)
    async with AsyncExitStack() as ends:  # one that fails, or is cancelled, does not keep the other
        ends.push_async_callback(control.close)
        ends.push_async_callback(server.close)
        await server.listen(UnixAddress(paths.nbd_socket))
        for address in listen:
            await server.listen(address)
        await control.start()
        _ready(zram, paths, listen, background)
        await ended.wait()
        notify("STOPPING=1")


def _ready(zram: Zram, paths: Paths, listen: Sequence[Address], background: bool) -> None:
    now = zram.statistics()
    where = ", ".join([str(paths.nbd_socket), *map(str, listen)])
    line = f"{zram.name} ({sizes.human(now.disksize)}, {now.algorithm}) is served on {where}"
    print(f"zramd: {line}", file=sys.stderr, flush=True)
    if background:
        log = os.open(paths.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log, stream.fileno())
        os.close(log)
        os.chdir("/")
        _log.info("%s", line)
    notify(f"READY=1\nSTATUS={line}")


def notify(state: str) -> None:
    """Tell systemd, or whoever set NOTIFY_SOCKET; nothing where nobody did. See sd_notify(3)."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect(address)
            sock.sendall(state.encode())
    except OSError as error:  # whoever waited is gone; those who are served are not
        _log.warning("nobody hears NOTIFY_SOCKET %s: %s", address, error.strerror or error)

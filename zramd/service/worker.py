"""The process of `zramd serve`: one device, its NBD sockets, its control socket.

Life: claim the device's name; build it in memory; listen on NAME/nbd.sock and on whatever else was
asked for or passed by systemd; serve control; say that it is ready; wait for SIGTERM, SIGINT or the
Stop call; stop accepting, finish what is in flight, close; drop the pages; remove the sockets and
the directory.

Guarantees
1. When anything fails before readiness, all that was made is removed, and the error says what.
2. Readiness is told once all sockets listen: by sd_notify(3), and by one line on stderr.

SIGTERM ends the server even while clients are connected, and their pages are gone then; but not one
that carries swap or a mount: that serves on until the last of them has left, as a shutdown needs
it. SIGINT ends any server at once. `zramd down` is the end that asks first.
"""

import asyncio
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from typing import Final

from zramd import heap, sizes
from zramd.control.server import ControlServer
from zramd.device import Zram
from zramd.errors import BadValue, NotHardened
from zramd.nbd.address import UnixAddress
from zramd.nbd.server import THREADS, Server, address_of
from zramd.service import hardening, systemd
from zramd.service.config import Config
from zramd.service.runtime import Claim, Paths
from zramd.service.upkeep import upkeep

_HELPERS: Final = 2
"""Threads for control calls that change the device, which must not hold the event loop."""

_log = logging.getLogger(__name__)


def build(name: str, config: Config) -> tuple[Zram, list[str]]:
    """An initialised device, in a process hardened for what it will carry, and what could not be
    had of that. To be called before there are threads.

    Raises BadValue, NoMemory; NotHardened for swap, unless the configuration allows it.
    """
    heap.use_one_arena()
    missing = hardening.prepare() + hardening.lock() if config.use else []
    if missing and config.use == "swap" and not config.allow_deadlock:
        raise NotHardened(
            f"swap on {name} could deadlock: there is no {'; no '.join(missing)}",
            hint="run it as root with these capabilities, or say --allow-deadlock",
        )
    zram = Zram(name)
    if config.comp_algorithm is not None:
        zram.set("comp_algorithm", config.comp_algorithm)
    if config.mem_limit is not None:
        zram.set("mem_limit", str(config.mem_limit))
    zram.set("prealloc", str(int(config.reserves)))
    zram.init(config.disksize)
    return zram, missing


def run(zram: Zram, config: Config, held: Claim, *, background: bool = False) -> None:
    """Serve `zram`, which `build` has made, until told to end, and close it. `held` is the claim on
    its name.

    `background`: from readiness on, stdout and stderr go to NAME/log and the working directory is
    the root, so that the process holds neither its starter's terminal nor any mount.

    Raises ServerExists where a socket is taken, BadValue for an address.
    """
    with closing(zram):
        asyncio.run(_serve(zram, held.paths, config, background))


async def _serve(zram: Zram, paths: Paths, config: Config, background: bool) -> None:
    manager = systemd.Manager()
    passed = systemd.passed_sockets()
    asked = config.listen
    config = replace(config, listen=(*asked, *map(address_of, passed)))
    for address in config.listen:
        if isinstance(address, UnixAddress) and address.path.parent == paths.dir:
            raise BadValue(
                f"{address} lies in the device's own directory", hint="choose a path elsewhere"
            )
    ended, told = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, ended.set)
    loop.add_signal_handler(signal.SIGTERM, told.set if config.use else ended.set)
    helpers = ThreadPoolExecutor(_HELPERS, thread_name_prefix="control")
    loop.set_default_executor(helpers)
    server = Server(zram)
    control = ControlServer(zram, paths.control_socket, ended.set)
    async with AsyncExitStack() as ends:  # one that fails, or is cancelled, does not keep the other
        ends.callback(manager.close)
        for keeper in (
            manager.keep_informed(zram),
            upkeep(zram),
            _end_unused(told, server, manager, ended),
        ):
            ends.callback(asyncio.create_task(keeper).cancel)
        ends.push_async_callback(control.close)
        ends.push_async_callback(server.close)
        await server.listen(UnixAddress(paths.nbd_socket))
        for address in asked:
            await server.listen(address)
        for sock in passed:
            await server.adopt(sock)
        await control.start()
        if config.use:
            hardening.start_threads(helpers, _HELPERS)
            hardening.start_threads(server.threads, THREADS)
        line = _ready(zram, paths, config, background)
        manager.tell(READY="1", STATUS=line)
        if config.use:
            hardening.settle()
        await ended.wait()
        manager.tell(STOPPING="1")


async def _end_unused(
    told: asyncio.Event, server: Server, manager: systemd.Manager, ended: asyncio.Event
) -> None:
    """Once told to, end when nobody is connected."""
    await told.wait()
    if server.serving:
        _log.warning("told to end, but in use: serving on until the last client has left")
        manager.note = "; told to end, but in use"
    while server.serving:
        await asyncio.wait([connection.gone for connection in server.serving])
    ended.set()


def _ready(zram: Zram, paths: Paths, config: Config, background: bool) -> str:
    """Say the line that tells readiness, and go to the background; the line."""
    now = zram.statistics()
    where = ", ".join([str(paths.nbd_socket), *map(str, config.listen)])
    line = f"{zram.name} ({sizes.human(now.disksize)}, {now.algorithm}) is served on {where}"
    print(f"zramd: {line}", file=sys.stderr, flush=True)
    if background:
        log = os.open(paths.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o600)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log, stream.fileno())
        os.close(log)
        os.chdir("/")
        _log.info("%s", line)
    return line

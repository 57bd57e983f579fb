"""The process of `zramd serve` that does the I/O: one device, its NBD sockets, its control socket.

Life: build the device in memory, or take over the pages of a worker that has died; listen on
NAME/nbd.sock and on whatever else was asked for or passed by systemd; serve control; say that it is
ready; wait for SIGTERM, SIGINT or the Stop call; stop accepting, finish what is in flight, close;
drop the pages; remove the sockets. What must outlive it, it hands to its supervisor as it makes it.
Or leave, in an upgrade: all that was sent is answered, the pages and the sockets stay.

Guarantees
1. When anything fails before readiness, all that was made is removed, and the error says what. But
   a worker that has taken over, or was ready, leaves all to another, and says why by that one.
2. Readiness is told once all sockets listen: by sd_notify(3), and by one line on stderr.
3. Who takes over says which pages did not survive, one by one; these answer EIO.

SIGTERM ends the server even while clients are connected, and their pages are gone then; but not one
that carries swap or a mount: that serves on until the last of them has left, as a shutdown needs
it. SIGINT ends any server at once. `zramd down` is the end that asks first.
"""

import asyncio
import json
import logging
import os
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from zramd import heap, sizes
from zramd.control.server import ControlServer
from zramd.device import Settings, Zram
from zramd.errors import BadArena, BadValue, NotHardened, ServerFailed, ZramdError
from zramd.gate import SWITCH_S
from zramd.nbd import stdio as nbd_stdio
from zramd.nbd.address import Address, UnixAddress, address_of
from zramd.nbd.server import THREADS, Server
from zramd.service import hardening, systemd
from zramd.service.background import go_to_background
from zramd.service.config import Config
from zramd.service.kept import PASSED, SETTINGS
from zramd.service.link import Link
from zramd.service.runtime import Paths
from zramd.service.systemd import ARENA
from zramd.service.upkeep import upkeep
from zramd.store import PAGE
from zramd.store.zcomp import Algorithm

if TYPE_CHECKING:  # it imports OpenSSL
    from zramd.nbd.tls import Tls

_HELPERS: Final = 2
"""Threads for control calls that change the device, which must not hold the event loop."""

_GRACE_S: Final = 10.0
"""How long a device whose worker died is not taken for unused: clients have to connect again."""
_GRACE_POLL_S: Final = 0.1

_OTHER_ENDS_S: Final = 2.0
"""How long a server that has the same file may still take to end: one that was killed."""

_to_say: list[str] = []
"""What there is to say of a takeover, when the kernel is connected again: the log may lie on what
it waits for."""

_CONTROL: Final = "control"
"""The name of what the supervisor keeps, beside the arena and the sockets for NBD."""

_log = logging.getLogger(__name__)


def say_later(line: str) -> None:
    """Of a takeover, when the log may be written to."""
    _to_say.append(line)


def build(
    name: str, config: Config, link: Link | None = None, snapshot: Path | None = None
) -> tuple[Zram, list[str]]:
    """An initialised device, in a process hardened for what it will carry, and what could not be
    had of that. To be called before there are threads. `link`: the supervisor, which has prepared
    this process, and may have the pages of a predecessor. `snapshot`: what to begin with.

    Raises BadValue, NoMemory, BadArena, DeviceBusy; NotHardened for swap, unless the configuration
    allows it.
    """
    heap.use_one_arena()
    sys.setswitchinterval(SWITCH_S)
    missing = []
    if config.use:
        missing = (hardening.prepare() if link is None else link.missing) + hardening.lock()
    takes_over = link is not None and link.takes_over
    must_come = takes_over and not (link is not None and link.waits)
    if missing and config.use == "swap" and not config.allow_deadlock and not must_come:
        raise NotHardened(
            f"swap on {name} could deadlock: there is no {'; no '.join(missing)}",
            hint="run it as root with these capabilities, or say --allow-deadlock",
        )
    if takes_over:
        # Less hardened is better than not there: the swap is in use.
        _to_say.extend(f"{name} has to do without {what} from now on" for what in missing)
    zram = Zram(name, config.arena)
    if link is not None:
        link.take_turn()
        zram.on_arena = partial(_hand_over, link)
        zram.on_settings = partial(_hand_settings_over, link)
        if takes_over:
            _take_over(zram, link)
            return zram, []
    lost: list[int] | None = None
    if snapshot is not None:
        lost = _restore(zram, snapshot)
    elif config.arena is not None:
        lost = zram.load(_OTHER_ENDS_S)
    if lost is None:
        _make(zram, config)
        return zram, missing
    _to_say.extend(_lost(zram, lost))
    try:
        _must_agree(zram, config, snapshot or config.arena)
    except BaseException:
        zram.close() if snapshot is None else zram.reset(force=True)
        raise
    return zram, missing


def _make(zram: Zram, config: Config) -> None:
    if config.disksize is None:
        raise BadValue(
            f"{config.arena} is not there, and nothing says how large to make it",
            hint="give it a --disksize",
        )
    algorithm = Settings().algorithm if config.comp_algorithm is None else config.comp_algorithm
    _set(zram, Settings(algorithm, config.mem_limit or 0, config.reserves))
    zram.init(config.disksize)


def _restore(zram: Zram, snapshot: Path) -> list[int]:
    try:
        # Or a FIFO would have us wait for who writes to it, before it is refused.
        file = os.open(snapshot, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadValue(f"{snapshot} cannot be read: {error.strerror}") from error
    try:
        return zram.restore(file)
    except BadArena as error:
        raise error.of(snapshot) from error
    finally:
        os.close(file)


def _must_agree(zram: Zram, config: Config, file: Path | None) -> None:
    """BadValue where the device that was found is another than the one that is asked for."""
    now = zram.statistics()
    asked = -(-(config.disksize or 0) // PAGE) * PAGE
    if asked and asked != now.disksize:
        raise BadValue(
            f"{file} has a device of {sizes.human(now.disksize)}, not {sizes.human(asked)}",
            hint="ask for that, or name another file",
        )
    algorithm = config.comp_algorithm
    if algorithm is not None and str(Algorithm.parse(algorithm)) != now.algorithm:
        raise BadValue(
            f"{file} has a device with {now.algorithm}, not {algorithm}",
            hint="ask for that, or name another file",
        )
    is_told = config.prealloc is not None or config.use == "swap"
    if is_told and config.reserves != bool(now.mem_reserved):
        raise BadValue(
            f"{file} has a device with{'' if now.mem_reserved else 'out'} preallocated memory",
            hint="ask for that, or name another file",
        )
    if config.mem_limit is not None:
        zram.limit(config.mem_limit)


def _hand_over(link: Link, descriptor: int | None) -> None:
    """The supervisor keeps a new arena, and drops one that is gone."""
    if descriptor is None:
        link.drop(ARENA)
    else:
        link.keep(ARENA, descriptor)


def _hand_settings_over(link: Link, settings: Settings) -> None:
    """The supervisor keeps what no arena tells."""
    with open(os.memfd_create("zramd-settings", os.MFD_CLOEXEC), "wb") as file:
        file.write(json.dumps(asdict(settings)).encode())
        file.flush()
        link.keep(SETTINGS, file.fileno())


def _set(zram: Zram, settings: Settings) -> None:
    algorithm = Algorithm.parse(settings.algorithm)
    zram.choose("comp_algorithm", lambda _: algorithm)
    zram.limit(settings.mem_limit)
    zram.prealloc = settings.prealloc


def _take_over(zram: Zram, link: Link) -> None:
    """The device as a predecessor left it."""
    descriptor = link.kept.pop(ARENA, None)
    if descriptor is None:  # it had been reset
        settings = link.kept.pop(SETTINGS, None)
        if settings is not None:
            with open(settings, "rb") as file:
                file.seek(0)  # who wrote it has moved on
                _set(zram, Settings(**json.load(file)))
        return
    _to_say.extend(_lost(zram, zram.adopt(descriptor)))


def _lost(zram: Zram, pages: list[int]) -> list[str]:
    return [f"page {page} of {zram.name} is lost: reading it is an I/O error" for page in pages]


def run(
    zram: Zram,
    config: Config,
    paths: Paths,
    link: Link,
    *,
    tls: "Tls | None" = None,
    stdio: nbd_stdio.Taken | None = None,
    background: bool = False,
    reconnect: Callable[[], object] = lambda: None,
) -> None:
    """Serve `zram`, which `build` has made, until told to end, and close it. `stdio`: or until the
    client on these has left; a successor of the worker that has spoken with him cannot go on.

    `background`: from readiness on, stdout and stderr go to NAME/log and the working directory is
    the root, so that the process holds neither its starter's terminal nor any mount. `reconnect` is
    called in a thread by who has taken over, when it serves NBD: the kernel's connection has ended
    with the predecessor.

    Raises ServerExists where a socket is taken, BadValue for an address.
    """
    leaving = threading.Event()
    try:
        asyncio.run(_serve(zram, paths, config, link, leaving, tls, stdio, background, reconnect))
    finally:
        if leaving.is_set():
            # No word more: the log may lie on swap, and nobody serves that until we have gone.
            os._exit(0)
        if not link.relied_on:
            zram.close()


@contextmanager
def pages_stay(link: Link) -> Iterator[None]:
    """A worker that fails in it, and has pages on which somebody relies, ends at once, as if
    killed: no client gets an error, and the next worker finds all in its place."""
    try:
        yield
    except BaseException as error:
        if not link.relied_on:
            raise
        # Not to be said by us: the log may lie on the swap that nobody serves now.
        try:
            link.failing(_in_words(error))
        finally:
            os._exit(error.exit_code if isinstance(error, ZramdError) else 1)


def _in_words(error: BaseException) -> str:
    if isinstance(error, ZramdError):
        return error.line()
    at = traceback.extract_tb(error.__traceback__)[-1]
    return f"unforeseen: {type(error).__name__}: {error}, in {at.filename}, line {at.lineno}"


async def _serve(
    zram: Zram,
    paths: Paths,
    config: Config,
    link: Link,
    leaving: threading.Event,
    tls: "Tls | None",
    stdio: nbd_stdio.Taken | None,
    background: bool,
    reconnect: Callable[[], object],
) -> None:
    manager = systemd.Manager()
    takes_over = link.takes_over
    passed = _kept(link, PASSED)
    listen = (*config.listen, *map(_where, passed))
    if not takes_over:  # else it has been found good, and to look at it may ask a name server
        replace(config, listen=listen)
        for address in listen:
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
    with pages_stay(link):
        server = Server(
            zram, tls=tls, read_only=config.read_only, max_connections=config.max_connections
        )

    async def upgrade(program: list[str]) -> int:
        process = await asyncio.to_thread(link.upgrade, program)
        if ended.is_set():
            raise ServerFailed(f"{zram.name} has been told to end", hint="start it anew")
        leaving.set()
        ended.set()
        return process

    control = ControlServer(zram, paths.control_socket, ended.set, upgrade)

    def end_saving() -> None:
        zram.end_saving(f"the server of {zram.name} ends, or leaves to another")

    async def close_control() -> None:
        await control.close(leave=leaving.is_set())
        end_saving()  # one more may have begun

    async def close_server() -> None:
        await server.close(leave=leaving.is_set())

    async with AsyncExitStack() as ends:  # one that fails, or is cancelled, does not keep the other
        ends.callback(manager.close)
        for keeper in (
            manager.keep_informed(zram),
            upkeep(zram),
            _end_unused(told, server, manager, ended, _GRACE_S if takes_over else 0),
        ):
            ends.callback(asyncio.create_task(keeper).cancel)
        ends.push_async_callback(close_control)
        ends.push_async_callback(close_server)
        ends.enter_context(pages_stay(link))  # before the others, and instead
        own = UnixAddress(paths.nbd_socket)
        for asked_for in (own, *config.listen):
            name = f"listen {asked_for}"
            sockets = await server.listen(asked_for, _kept(link, name), private=asked_for is own)
            for n, descriptor in enumerate(sockets):
                link.keep(f"{name} {n}", descriptor)
        for left in [name for name in link.kept if name.startswith("listen ")]:
            link.drop(left)  # an upgrade has found other addresses in the configuration
            os.close(link.kept.pop(left))
        for sock in passed:
            await server.adopt(sock)
        if takes_over:  # before anyone can ask us, and take the node for one whose server is dead
            await loop.run_in_executor(None, _reconnect, reconnect)
        link.keep(f"{_CONTROL} 0", await control.start(*_kept(link, _CONTROL)))
        if config.use:
            hardening.start_threads(helpers, _HELPERS)
            hardening.start_threads(server.threads, THREADS)
        line = _line(zram, paths, listen)
        if background and not takes_over:
            print(f"zramd: {line}", file=sys.stderr, flush=True)
            go_to_background(paths.log)  # as our supervisor does when it hears that we are ready
        link.ready()
        _log.info("%s", line)
        for said in _to_say:
            _log.error("%s", said)
        manager.tell(READY="1", STATUS=line)
        if config.use:
            hardening.settle()
        if stdio is not None and takes_over:
            _log.error("the client on stdin has lost its server with the worker")
            ended.set()
        elif stdio is not None:
            with_client = asyncio.create_task(_end_with(server, stdio, ended))
            ends.callback(with_client.cancel)
        await ended.wait()
        end_saving()
        if not leaving.is_set():
            link.ending()
            manager.tell(STOPPING="1")


async def _end_with(server: Server, stdio: nbd_stdio.Taken, ended: asyncio.Event) -> None:
    """The client on stdin and stdout."""
    sock, drained = nbd_stdio.connected(stdio)
    connection = await server.serve(sock)
    await connection.gone
    await asyncio.to_thread(drained)
    ended.set()


async def _end_unused(
    told: asyncio.Event,
    server: Server,
    manager: systemd.Manager,
    ended: asyncio.Event,
    grace_s: float,
) -> None:
    """Once told to, end when nobody is connected; after `grace_s`, or when somebody was."""
    loop = asyncio.get_running_loop()
    grace_ends = loop.time() + grace_s
    while loop.time() < grace_ends and not server.serving:
        await asyncio.sleep(_GRACE_POLL_S)
    await told.wait()
    if server.serving:
        _log.warning("told to end, but in use: serving on until the last client has left")
        manager.note = "; told to end, but in use"
    while server.serving:
        await asyncio.wait([connection.gone for connection in server.serving])
    ended.set()


def _where(sock: socket.socket) -> Address:
    return address_of(sock.family, sock.getsockname())


def _kept(link: Link, name: str) -> list[socket.socket]:
    """The sockets `name 0`, `name 1`, ... of a predecessor."""
    found: list[socket.socket] = []
    while (descriptor := link.kept.pop(f"{name} {len(found)}", None)) is not None:
        found.append(socket.socket(fileno=descriptor))
    return found


def _reconnect(reconnect: Callable[[], object]) -> None:
    try:
        reconnect()
    except Exception as error:
        _log.error("the kernel waits, and cannot be connected again: %s", error)


def _line(zram: Zram, paths: Paths, listen: tuple[Address, ...]) -> str:
    """What there is to say of readiness."""
    now = zram.statistics()
    where = ", ".join([str(paths.nbd_socket), *map(str, listen)])
    return f"{zram.name} ({sizes.human(now.disksize)}, {now.algorithm}) is served on {where}"

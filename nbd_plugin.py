"""zramd as an nbdkit plugin: a thin translation of nbdkit's callbacks into calls of one Zram.

    nbdkit -U /run/zramd/zram0/nbd.sock python ./nbd_plugin.py name=zram0 disksize=1G \\
           [algorithm=zstd] [mem_limit=300M] [for=swap] [prealloc=1] [allow_deadlock=1]

nbdkit's Python plugin embeds one interpreter, the distribution's, and knows of no virtual
environment. So before anything of zramd is imported this file looks for its packages where it
stands (a checkout), and in the environment of $VIRTUAL_ENV or in `.venv` beside it, as far as that
is of the same Python minor version.

The control socket is that of `zramd serve`, so every verb works on a device that nbdkit carries.
With `-U` as above, `zramd attach` finds the device too.
"""

import ctypes
import fcntl
import os
import site
import socket
import sys
import termios
import threading
import time
import traceback
import types
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn, cast, get_args

import nbdkit

API_VERSION = 2


def _find_packages(here: Path) -> None:
    """Put zramd and what it depends on on sys.path, or say which interpreter wants what."""
    if (here / "zramd").is_dir():
        sys.path.insert(0, str(here))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    foreign = ""
    for environment in (os.environ.get("VIRTUAL_ENV"), here / ".venv"):
        if environment is None or not Path(environment, "pyvenv.cfg").is_file():
            continue
        packages = Path(environment, "lib", f"python{version}", "site-packages")
        if packages.is_dir():
            site.addsitedir(str(packages))
        else:
            foreign += f"; {environment} is for another version"
    try:
        import zramd.without_ssl  # noqa: I001 - first
        import zramd.control.server
        import zramd.device  # noqa: F401
    except ImportError as missing:
        # No class of zramd's own can be had here, and a traceback would bury the message.
        sys.exit(
            f"nbdkit embeds Python {version}, and zramd cannot be imported there:"
            f" {missing}{foreign}; make an environment for that version:"
            f" python{version} -m venv {here}/.venv && {here}/.venv/bin/pip install {here}"
        )


_find_packages(Path(__file__).resolve().parent)

from zramd import __version__, sizes  # noqa: E402 - only now can it be found
from zramd.control.server import ControlThread  # noqa: E402
from zramd.device import Zram  # noqa: E402
from zramd.errors import BadValue, NotHardened, NotInitialised, ZramdError  # noqa: E402
from zramd.nbd.connection import GATHER_SECONDS, QUIET_SECONDS  # noqa: E402
from zramd.nbd.transmission import MAX_PAYLOAD  # noqa: E402
from zramd.opener import Opener  # noqa: E402
from zramd.service import hardening, worker  # noqa: E402
from zramd.service.config import Config, Use  # noqa: E402
from zramd.service.runtime import Claim, check_name, claim  # noqa: E402
from zramd.service.upkeep import upkeep  # noqa: E402
from zramd.store import PAGE  # noqa: E402
from zramd.store.table import Kind  # noqa: E402
from zramd.store.zcomp import NAMES  # noqa: E402

_MOST_EXTENTS = 1024
"""That one reply names; nbdkit asks again for the rest."""

_GILSTATE_LOCKED = 0  # PyGILState_STATE: the caller had it before PyGILState_Ensure, too

_format_exception = traceback.format_exception


def _format_briefly(*args, **kwargs):  # type: ignore[no-untyped-def]
    """nbdkit logs an exception through traceback.format_exception. Ours are said in one line: it
    is all the user needs, and a full store would else format a thousand tracebacks a second.

    nbdkit 1.32 then never drops the exception and its traceback. A kernel whose swap is full has
    ten thousand requests refused in a few seconds, and there is no memory then: so they are emptied
    here, and dropped in nbdkit's place when the thread's next one comes. (Nobody else in this
    process formats exceptions with their traceback.)
    """
    _drop_what_nbdkit_keeps()
    error = next((arg for arg in args if isinstance(arg, BaseException)), None)
    trace = next((arg for arg in args if isinstance(arg, types.TracebackType)), None)
    try:
        return (
            [error.line()] if isinstance(error, ZramdError) else _format_exception(*args, **kwargs)
        )
    finally:
        if trace is not None:
            traceback.clear_frames(trace)
            trace.tb_next = None
        if error is not None:
            error.__traceback__ = error.__context__ = error.__cause__ = None
            error.args = ()
            error.__dict__.clear()
        _last.kept = [error, trace]


_last = threading.local()


def _drop_what_nbdkit_keeps() -> None:
    """The last exception of this thread, and its traceback: nbdkit is done with them."""
    kept = getattr(_last, "kept", [])
    while kept:
        thing = kept.pop()
        # Ours are `thing` and the argument of the call; one more is what a fixed nbdkit has not.
        if thing is not None and sys.getrefcount(thing) > 2:
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(thing))


traceback.format_exception = _format_briefly


class _Plugin:
    """What the callbacks share: the parameters, then the device, its name's claim, its control."""

    given: dict[str, str]
    config: Config
    zram: Zram
    claim: Claim
    control: ControlThread
    refused = 0
    """Requests that met a device which is not initialised."""


_plugin = _Plugin()
_plugin.given = {}
_PARAMETERS = (
    *("name", "disksize", "algorithm", "mem_limit"),
    *("for", "prealloc", "allow_deadlock"),
)


# Life of the process, in the order in which nbdkit calls


def config(key: str, value: str) -> None:
    if key not in _PARAMETERS:
        raise BadValue(
            f"there is no parameter {key!r}", hint=f"the parameters are {', '.join(_PARAMETERS)}"
        )
    _plugin.given[key] = value


def config_complete() -> None:
    given = _plugin.given
    for needed in ("name", "disksize"):
        if needed not in given:
            raise BadValue(f"the parameter {needed} is missing", hint="name=zram0 disksize=1G")
    use: Use | None = None
    if "for" in given:
        if given["for"] not in get_args(Use):
            raise BadValue(f"for={given['for']} is no use", hint="say for=swap or for=mount")
        use = cast(Use, given["for"])
    check_name(given["name"])
    _plugin.config = Config(
        disksize=sizes.parse(given["disksize"]),
        comp_algorithm=given.get("algorithm"),
        mem_limit=sizes.parse(given["mem_limit"]) if "mem_limit" in given else None,
        prealloc=_switch("prealloc"),
        use=use,
        allow_deadlock=bool(_switch("allow_deadlock")),
    )


def _switch(key: str) -> bool | None:
    given = _plugin.given.get(key)
    if given not in (None, "0", "1"):
        raise BadValue(f"{key}={given} is neither {key}=1 nor {key}=0")
    return None if given is None else given == "1"


def thread_model() -> int:
    # One request at a time per connection. Measured, docs/performance.md: threads that hold the GIL
    # for most of a request spend more on passing it round than they gain. One at a time for all
    # would be faster still, but then a client that halts in its handshake halts everybody.
    return int(nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS)


def get_ready() -> None:
    """Before the socket is bound and before the fork: errors still reach the terminal."""
    name = _plugin.given["name"]
    _plugin.claim = claim(name)
    (_plugin.claim.paths.nbd_socket).unlink(missing_ok=True)
    try:
        _plugin.zram, missing = worker.build(name, _plugin.config)
    except BaseException:
        _plugin.claim.release()
        raise
    for what in missing:
        print(f"zramd: {name} can do without, but had better have, {what}", file=sys.stderr)


def after_fork() -> None:
    """Threads made before the fork would not survive it, nor do locks on memory."""
    try:
        _begin()
    except BaseException:
        cleanup()  # nbdkit ends by exit() then, and does not call it
        raise


def _begin() -> None:
    _plugin.claim.adopt()
    _plugin.zram.forked()
    _plugin.zram.on_reset.append(_end_connections)
    path = _plugin.claim.paths.control_socket
    _plugin.control = ControlThread(_plugin.zram, path, nbdkit.shutdown)
    _plugin.control.start()
    _plugin.control.run_beside(upkeep(_plugin.zram))
    if _plugin.config.use:
        _lock_again()
        hardening.settle()


def _lock_again() -> None:
    """`get_ready` could, but with more rights (-u takes them) and less memory mapped. Raises
    NotHardened."""
    name, config = _plugin.zram.name, _plugin.config
    for what in hardening.lock():
        if config.use == "swap" and not config.allow_deadlock:
            raise NotHardened(
                f"swap on {name} could deadlock: after the fork there is no {what}",
                hint="run nbdkit as root with these capabilities, or say allow_deadlock=1",
            )
        print(f"zramd: {name} can do without, but had better have, {what}", file=sys.stderr)


def cleanup() -> None:
    """After the last connection has ended."""
    if hasattr(_plugin, "control"):
        _plugin.control.close()
    if hasattr(_plugin, "claim"):
        # nbdkit may end without closing its handles, and threads must not begin any more.
        if hasattr(_plugin, "zram"):
            _plugin.zram.on_reset.clear()
            _plugin.zram.close()
        _plugin.claim.release()


def dump_plugin() -> None:
    print(f"zramd_version={__version__}")
    print(f"zramd_algorithms={' '.join(NAMES)}")
    print(f"zramd_python={sys.version.split()[0]}")


# The end of a generation


def _end_connections() -> None:
    """After a forced reset: nbdkit's connections end, once what was sent has been answered (EIO).

    Which connection is whose nbdkit does not tell, so one that is in its handshake just now ends
    with the others.
    """
    try:
        clients = list(_clients())
        threading.Thread(target=_end_when_quiet, args=(clients,), name="end", daemon=True).start()
    except (OSError, RuntimeError) as error:  # no descriptors, no threads: they answer EIO and stay
        nbdkit.debug(f"zramd: connections of a device that was reset stay: {error}")


def _end_when_quiet(clients: list[socket.socket]) -> None:
    """nbdkit 1.32 has no call for it, but a socket with nothing more to read is a client that has
    left. It must not be cut while the client sends: the kernel would lose the answers that are on
    their way (zramd/nbd/connection.py tells why). We cannot keep answers back here, so wait until
    nobody has anything under way, or goes on and on in spite of all errors."""
    refused = _plugin.refused
    now = quiet_since = time.monotonic()
    deadline = now + GATHER_SECONDS
    while now - quiet_since < QUIET_SECONDS and now < deadline:
        time.sleep(QUIET_SECONDS / 4)
        now = time.monotonic()
        if _plugin.refused != refused or any(map(_has_unread, clients)):
            refused, quiet_since = _plugin.refused, now
    for client in clients:
        try:
            client.shutdown(socket.SHUT_RD)
        except OSError:
            pass  # it has left already
        client.close()


def _has_unread(sock: socket.socket) -> bool:
    count = bytearray(4)
    try:
        fcntl.ioctl(sock, termios.FIONREAD, count)
    except OSError:
        pass  # a kind of socket that cannot tell
    return any(count)


def _clients() -> Iterator[socket.socket]:
    """A descriptor of our own for each connection to a socket on which nbdkit listens."""
    sockets = list(_stream_sockets())
    control = os.fspath(_plugin.claim.paths.control_socket)
    listening = {_place(sock) for sock in sockets if _listens(sock)} - {control}
    for sock in sockets:
        if _place(sock) in listening and not _listens(sock):
            yield sock
        else:
            sock.close()


def _listens(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _stream_sockets() -> Iterator[socket.socket]:
    for name in os.listdir("/proc/self/fd"):
        try:
            if not os.readlink(f"/proc/self/fd/{name}").startswith("socket:"):
                continue
            descriptor = os.dup(int(name))
        except OSError:
            continue  # closed meanwhile
        try:
            sock = socket.socket(fileno=descriptor)
        except OSError:
            os.close(descriptor)  # another's meanwhile, and no socket
            continue
        if sock.type == socket.SOCK_STREAM:
            yield sock
        else:
            sock.close()


def _place(sock: socket.socket) -> object:
    """Where a socket is bound, as far as it is the same for a listening one and what it accepts."""
    name = sock.getsockname()
    return name if isinstance(name, (str, bytes)) else name[1]  # a path; a port whatever its host


# Exports and connections


def default_export(readonly: bool, is_tls: bool) -> str:
    return _plugin.zram.name


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    return [(_plugin.zram.name, export_description(None))]


def export_description(opener: Opener | None) -> str:
    return _plugin.zram.description


def open(readonly: bool) -> Opener:
    name = nbdkit.export_name()
    if name not in ("", _plugin.zram.name):
        _fail(BadValue(f"there is no export {name!r}", hint=f"ask for {_plugin.zram.name}"))
    try:
        opener = _plugin.zram.open("nbdkit connection")
    except ZramdError as error:
        _fail(error)
    # nbdkit gives a thread back to Python after every call. What is kept by thread (the gate's
    # record, the compressor's streams) would be made anew for every request: hold the thread until
    # `close`. By our thread model it has one connection, from its beginning to its end.
    ctypes.pythonapi.PyGILState_Ensure()
    return opener


def close(opener: Opener) -> None:
    opener.close()
    ctypes.pythonapi.PyGILState_Release(_GILSTATE_LOCKED)


def get_size(opener: Opener) -> int:
    return opener.size


def block_size(opener: Opener) -> tuple[int, int, int]:
    return (1, PAGE, MAX_PAYLOAD)


def can_write(opener: Opener) -> bool:
    return True


def can_flush(opener: Opener) -> bool:
    return True


def can_trim(opener: Opener) -> bool:
    return True


def can_zero(opener: Opener) -> bool:
    return True


def can_fast_zero(opener: Opener) -> bool:
    return True


def can_extents(opener: Opener) -> bool:
    return True


def can_multi_conn(opener: Opener) -> bool:
    # A completed write is in the store that all connections share.
    return True


def is_rotational(opener: Opener) -> bool:
    return False


def can_fua(opener: Opener) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_cache(opener: Opener) -> int:
    return int(nbdkit.CACHE_NATIVE)


# I/O. FUA needs nothing: a write that has returned is as safe as RAM gets.


def pread(opener: Opener, buf: memoryview, offset: int, flags: int) -> None:
    try:
        buf[:] = opener.read(offset, len(buf))
    except ZramdError as error:
        _fail(error)


def pwrite(opener: Opener, buf: memoryview, offset: int, flags: int) -> None:
    try:
        opener.write(offset, buf)
    except ZramdError as error:
        _fail(error)


def flush(opener: Opener, flags: int) -> None:
    try:
        opener.flush()
    except ZramdError as error:
        _fail(error)


def trim(opener: Opener, count: int, offset: int, flags: int) -> None:
    try:
        opener.discard(offset, count)
    except ZramdError as error:
        _fail(error)


def zero(opener: Opener, count: int, offset: int, flags: int) -> None:
    try:
        opener.zero(offset, count)
    except ZramdError as error:
        _fail(error)


def cache(opener: Opener, count: int, offset: int, flags: int) -> None:
    try:
        opener.cache(offset, count)
    except ZramdError as error:
        _fail(error)


def extents(opener: Opener, count: int, offset: int, flags: int) -> list[tuple[int, int, int]]:
    types = {Kind.HOLE: nbdkit.EXTENT_HOLE | nbdkit.EXTENT_ZERO, Kind.ZERO: nbdkit.EXTENT_ZERO}
    found = []
    one = bool(flags & nbdkit.FLAG_REQ_ONE)
    try:
        for size, kind in opener.extents(offset, count, _MOST_EXTENTS, alike=one):
            found.append((offset, size, types.get(kind, 0)))
            offset += size
    except ZramdError as error:
        _fail(error)
    return found


def _fail(error: ZramdError) -> NoReturn:
    """Answer with the error's own errno; nbdkit makes EIO of an exception alone."""
    _plugin.refused += isinstance(error, NotInitialised)
    nbdkit.set_error(error.errno)
    raise error

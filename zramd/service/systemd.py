"""systemd's side of a server: what it passes (sd_listen_fds(3)), what it is told (sd_notify(3)),
and what it keeps for us, should we die (FDSTORE). Without systemd, all of this is nothing; but a
server that has pages and fails in a way that nobody foresaw ends by a signal all the same.

Nothing here ever waits for systemd, whose memory may lie on our swap: what it cannot take now is
told the next time.
"""

import array
import asyncio
import logging
import os
import signal
import socket
import stat
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from zramd import sizes
from zramd.device import Zram
from zramd.errors import BadValue
from zramd.statistics import Statistics

ARENA: Final = "arena"
"""The name of what systemd keeps."""

_FIRST_DESCRIPTOR: Final = 3
_STATUS_S: Final = 5.0
_FAMILIES: Final = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, socket.AF_VSOCK)

_log = logging.getLogger(__name__)


class Passed(NamedTuple):
    """What we were started with."""

    sockets: list[socket.socket]
    """They listen."""
    arena: int | None
    """The descriptor that a server of this unit, which has died, has had stored as ARENA."""


def passed() -> Passed:
    """Nobody that we start takes it for his. Raises BadValue for a descriptor of another kind."""
    pid, count, names = (
        os.environ.pop(variable, "") for variable in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
    )
    if pid != str(os.getpid()):
        return Passed([], None)
    if not count.isdecimal():
        raise BadValue(
            f"LISTEN_FDS is {count!r}, and not a number",
            hint="it is systemd's to set; without sockets of its, unset it",
        )
    sockets, arena = [], None
    for index in range(int(count)):
        descriptor = _FIRST_DESCRIPTOR + index
        name = names.split(":")[index] if index < len(names.split(":")) else ""
        listening = _listening(descriptor)
        if listening is not None:
            sockets.append(listening)
        elif name == ARENA and _is_file(descriptor):
            arena = descriptor
        else:
            raise BadValue(
                f"descriptor {descriptor} ({name or 'without a name'}) of LISTEN_FDS is no stream"
                " socket that listens",
                hint="its .socket unit needs ListenStream= and Accept=no",
            )
    return Passed(sockets, arena)


def _is_file(descriptor: int) -> bool:
    try:
        return stat.S_ISREG(os.fstat(descriptor).st_mode)
    except OSError:
        return False


def _listening(descriptor: int) -> socket.socket | None:
    try:
        os.set_inheritable(descriptor, False)
        sock = socket.socket(fileno=descriptor)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError:  # closed, or no socket
        return None
    if listens and sock.type == socket.SOCK_STREAM and sock.family in _FAMILIES:
        return sock
    sock.detach()
    return None


class Store:
    """The descriptors that systemd keeps for us, by name, and passes to whom it starts after our
    death: as many as FileDescriptorStoreMax= says, and none where the unit does not say so."""

    def __init__(self) -> None:
        self._address = _address()
        self._failed = False

    def keep(self, name: str, descriptor: int) -> None:
        """One that cannot be taken now is not kept; the log says so once."""
        # FDPOLL=0: or it would be dropped as soon as it reports an error.
        self._send(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [descriptor])

    def drop(self, name: str) -> bool:
        """Whether it is gone."""
        return self._send(f"FDSTOREREMOVE=1\nFDNAME={name}", [])

    def _send(self, message: str, descriptors: list[int]) -> bool:
        if not self._address:
            return True
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
                sock.sendmsg(
                    [message.encode()],
                    rights if descriptors else [],
                    socket.MSG_DONTWAIT,
                    self._address,
                )
        except OSError as error:
            if not self._failed:
                _log.warning("should this process die, its pages do too: %s", error.strerror)
            self._failed = True
            return False
        return True


def _address() -> str:
    address = os.environ.get("NOTIFY_SOCKET", "")
    return "\0" + address[1:] if address.startswith("@") else address


@contextmanager
def restarted(has_pages: Callable[[], bool], *foreseen: type[BaseException]) -> Iterator[None]:
    """What is raised in it, and is not `foreseen`, ends this process by a signal while it has
    pages: only then does Restart=on-abnormal start another with them. A status says that it is
    over with them."""
    try:
        yield
    except foreseen:
        raise
    except BaseException:
        if not has_pages():
            raise
        try:
            traceback.print_exc()
        finally:
            os.kill(os.getpid(), signal.SIGKILL)  # not abort(): the core would be all the pages


class Manager:
    """Who set NOTIFY_SOCKET."""

    def __init__(self) -> None:
        self._address = _address()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.note = ""
        """What is told behind what the device holds."""
        self._unsent: dict[str, str] = {}
        self._heard = True

    def tell(self, **assignments: str) -> None:
        """READY="1", STATUS="...": with what it could not take before."""
        if not self._address:
            return
        self._unsent.update(assignments)
        message = "\n".join(f"{key}={value}" for key, value in self._unsent.items())
        try:
            self._socket.sendto(message.encode(), socket.MSG_DONTWAIT, self._address)
            self._heard = True
        except BlockingIOError:
            return
        except OSError as error:  # whoever waited is gone; those who are served are not
            if self._heard:
                _log.warning("nobody hears NOTIFY_SOCKET %s: %s", self._address, error.strerror)
            self._heard = False
        self._unsent.clear()

    async def keep_informed(self, zram: Zram) -> None:
        """Tell what the device holds, when that has changed, and the watchdog that our loop goes
        round; for ever."""
        if not self._address:
            return
        watchdog_s = _watchdog_s()
        period = _STATUS_S if watchdog_s is None else min(_STATUS_S, watchdog_s / 2)
        last = ""
        while True:
            await asyncio.sleep(period)
            news = {}
            if watchdog_s is not None:
                news["WATCHDOG"] = "1"
            status = _status(zram.statistics()) + self.note
            if status != last:
                news["STATUS"] = last = status
            if news or self._unsent:
                self.tell(**news)

    def close(self) -> None:
        self._socket.close()


def _watchdog_s() -> float | None:
    """Within how many seconds the watchdog wants to hear of us; None: there is none for us."""
    ours = str(os.getpid()), str(os.getppid())  # our supervisor is whom systemd has started
    if os.environ.get("WATCHDOG_PID", ours[0]) not in ours:
        return None
    interval = os.environ.get("WATCHDOG_USEC", "")
    return int(interval) / 1e6 if interval.isdecimal() and int(interval) > 0 else None


def _status(now: Statistics) -> str:
    if not now.disksize:
        return "without a disksize"
    stored = f"{sizes.human(now.orig_data_size)} of pages stored"
    taken = f"{stored} in {sizes.human(now.mem_used_total)} of RAM"
    if now.mem_reserved:
        return f"{taken} ({sizes.human(now.mem_reserved)} reserved)"
    return f"{taken} (limit {sizes.human(now.mem_limit)})" if now.mem_limit else taken

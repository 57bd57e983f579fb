"""A program that is to go on in the place of a running server's, while it is loading: the
supervisor's end of it (`Candidate`), and its own (`stand_by`).

1. The supervisor forks, and the child becomes the program. Its stderr is a pipe: should it fail,
   its last line is the reason. It has the claim's descriptor, and a look at the arena's header.
2. It loads all its code, and hardens itself. Where it does not understand what it is handed, or
   cannot be hardened for swap, it fails. Then it says that it is loaded, and its version.
3. It waits. The supervisor has the worker leave, and when that is gone, gives it its turn (`go`):
   all that is kept, and the server's stderr. From then on it is the worker.

Promise: until its turn has come it touches nothing of the device's, so it may fail, hang or be
killed, and the server is as it was. It dies with its supervisor.
"""

import fcntl
import math
import os
import signal
import socket
import time
from typing import Final

from zramd.service import hardening
from zramd.service.handover import Handover
from zramd.service.link import MESSAGE, OK, Link, die_with
from zramd.service.systemd import ARENA
from zramd.store import PAGE
from zramd.store.header import Header
from zramd.store.zcomp import Algorithm

LOAD_S: Final = 30.0
"""For all of move 2. It takes 0.4 s on an idle machine, 1 s hardened."""
LEAVE_S: Final = 10.0
"""For the worker to end, before it is killed. It takes 0.1 s under load, 2 s with a client that
does not read."""

READY_S: Final = 60.0
"""For it to be ready, from its turn on, and a second more for each GiB that is stored: 1 us a page,
and 2 s for the kernel."""

_STDERR: Final = "stderr"
_MOST_SAID: Final = 4096


class Candidate:
    """Nothing here waits, so its owner calls `look` whenever one of `sources` can be read, a child
    has ended, or the `deadline` has come."""

    def __init__(
        self,
        program: list[str],
        asker: socket.socket,
        claim: int,
        arena: int | None,
        told: set[int],
        deaths: list[float],
    ) -> None:
        """Move 1. `asker` is told what becomes of it; `told` and `deaths` are what a supervisor
        leaves, for it to try. Raises OSError."""
        self.program = program
        self.loaded = False
        self.version = ""
        self.deadline = time.monotonic() + LOAD_S
        self._asker = asker
        self._tail = b""
        self.socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._said, says = os.pipe()
        os.set_blocking(self._said, False)
        self._heard = {self.socket.fileno(), self._said}
        supervisor = os.getpid()
        try:
            self.process = os.fork()
        except OSError:
            self.socket.close()
            self._close()
            raise
        finally:
            if os.getpid() == supervisor:
                theirs.close()
                os.close(says)
        if self.process == 0:
            try:
                die_with(supervisor)
                # A number of its own: 2 is the pipe until its turn has come.
                stderr = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, 3)
                os.dup2(says, 2)
                shown = {_STDERR: stderr} if arena is None else {_STDERR: stderr, ARENA: arena}
                Handover(
                    *("candidate", claim, theirs.fileno(), shown), told=list(told), deaths=deaths
                ).execute(program)
            except BaseException as error:
                os.write(2, f"zramd: cannot run {program[:1]}: {error}\n".encode())
            finally:
                os._exit(1)

    @property
    def sources(self) -> set[int]:
        """Descriptors that will have something to say."""
        return self._heard

    def look(self) -> str | None:
        """Hear what it says. Why it has failed, if it has."""
        self._drain()
        if self.socket.fileno() in self._heard:
            try:
                message = self.socket.recv(MESSAGE, socket.MSG_DONTWAIT)
            except BlockingIOError:
                pass
            except OSError:
                self._heard.discard(self.socket.fileno())
            else:
                self._heard.discard(self.socket.fileno())  # it has nothing more to say
                verb, _, version = message.decode(errors="replace").partition("\0")
                if verb == "loaded":
                    self.loaded, self.version = True, version
                    self.deadline = time.monotonic() + LEAVE_S
                    self._tell(OK + b"%d" % self.process)
        ended, status = os.waitpid(self.process, os.WNOHANG)
        if ended:
            self.process = 0
            return self._last_words() or f"it {how(os.waitstatus_to_exitcode(status))}"
        if not self.loaded and time.monotonic() > self.deadline:
            return f"it has not loaded within {LOAD_S:.0f} s"
        return None

    def wait(self) -> bool:
        """Whether the deadline has come, of the worker's leave, or of our own readiness when it
        has its turn; once."""
        if not self.loaded or time.monotonic() <= self.deadline:
            return False
        self.deadline = math.inf
        return True

    def go(self, kept: dict[str, int]) -> None:
        """Move 3: it is the worker now, and `socket` the link to it. Raises OSError."""
        message = OK + "".join(f"\0{name}" for name in kept).encode()
        socket.send_fds(self.socket, [message], list(kept.values()))
        self._close()
        stored = os.fstat(kept[ARENA]).st_blocks * 512 if ARENA in kept else 0
        self.deadline = time.monotonic() + READY_S + stored / (1 << 30)

    def give_up(self, reason: str) -> int:
        """End it, and say why; the process to be reaped, 0 where that is done: its end may have to
        wait for what only a worker can serve."""
        if self.process:
            os.kill(self.process, signal.SIGKILL)
        if not self.loaded:
            self._tell(reason.encode())
        self.socket.close()
        self._close()
        return self.process

    def _close(self) -> None:
        """Have no more of it than `process` and `socket`."""
        os.close(self._said)
        self._asker.close()

    def _tell(self, answer: bytes) -> None:
        try:
            self._asker.send(answer, socket.MSG_DONTWAIT)
        except OSError:
            pass  # who asked has ended

    def _drain(self) -> None:
        while self._said in self._heard:
            try:
                said = os.read(self._said, _MOST_SAID)
            except BlockingIOError:
                return
            self._tail = (self._tail + said)[-_MOST_SAID:]
            if not said:
                self._heard.discard(self._said)

    def _last_words(self) -> str:
        """What it said last in the form of zramd.cli, or else last of all."""
        self._drain()
        lines = self._tail.decode(errors="replace").splitlines()
        told = [line.removeprefix("zramd: ") for line in lines if line.startswith("zramd: ")]
        return ["", *lines, *told][-1].strip()


def how(status: int) -> str:
    """In words, what an exit code tells; negative ones are signals."""
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by signal {-status} ({signal.strsignal(-status) or 'of no name'})"


def stand_by(handed: Handover, *, harden: bool) -> Link:
    """The candidate's own end, when its code is loaded: the link to its supervisor. Raises
    BadArena, BadValue for an arena that is not understood here."""
    missing = hardening.prepare() if harden else []
    arena = handed.descriptors.get(ARENA)
    if arena is not None:
        header = Header.unpack(os.pread(arena, PAGE, 0), os.fstat(arena).st_size)
        Algorithm.parse(header.algorithm)
        os.close(arena)  # what is kept then comes with our turn
    sock = socket.socket(fileno=handed.link)
    return Link(sock, {}, missing, True, stderr=handed.descriptors[_STDERR])

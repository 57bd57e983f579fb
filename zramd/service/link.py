"""A worker's end of what it has to do with its supervisor (`supervisor.py`, which has the other).

A question is one message: a verb and its words, and at most one descriptor. The worker waits for
the answer, so a worker that has ended has no question on its way. A candidate, a program that is to
go on in the place of a worker (`candidate.py`), has one question more, `take_turn`.

Assumes that the supervisor answers at once, but for `take_turn` and `upgrade`; neither keeps other
threads from asking.
"""

import array
import ctypes
import os
import signal
import socket
import threading
from typing import Final

from zramd import __version__
from zramd.errors import BadValue, DeviceBusy, ServerFailed

MESSAGE: Final = 64 << 10
"""Bytes. Names are addresses, of about 110 bytes at most."""
OK: Final = b"+"
_MOST_SAID: Final = 8 << 10
MOST_KEPT: Final = 253
"""Descriptors that one message can carry (SCM_MAX_FD)."""

TELL_TO_END: Final = (signal.SIGTERM, signal.SIGINT)

_PR_SET_PDEATHSIG: Final = 1
_libc = ctypes.CDLL(None, use_errno=True)


class Link:
    """Any thread may call."""

    def __init__(
        self,
        sock: socket.socket,
        kept: dict[str, int],
        missing: list[str],
        takes_over: bool,
        *,
        stderr: int | None = None,
    ) -> None:
        """`stderr`, of a candidate: where it is to write when its turn has come."""
        self._socket = sock
        self._lock = threading.Lock()  # held from a question to its answer
        self._stderr = stderr
        self._served = takes_over  # and not told to end
        self.kept = kept
        """What a predecessor has handed over: descriptors, the worker's own, by name."""
        self.takes_over = takes_over
        """Whether there was one."""
        self.missing = missing
        """What could not be had of the hardening that forks inherit."""

    @property
    def waits(self) -> bool:
        """Whether a predecessor serves until we take our turn, and serves on where we fail."""
        return self._stderr is not None

    @property
    def relied_on(self) -> bool:
        """Whether somebody may use what we serve, and has not told us to end: should we fail, the
        pages are another's to go on with."""
        return self._served and not self.waits

    def take_turn(self) -> None:
        """Say that we are loaded, and wait until the predecessor has gone; `kept` is ours then, and
        all that we say is said where it had said it. Raises ServerFailed."""
        if self._stderr is None:
            return
        try:
            with self._lock:
                self._socket.send("\0".join(["loaded", __version__]).encode())
                answer, descriptors = receive(self._socket, MOST_KEPT)
        except OSError as error:
            raise _silent(error) from error
        if not answer.startswith(OK):
            raise ServerFailed("the supervisor has no turn for us")
        names = answer.decode().split("\0")[1:]
        self.kept.update(zip(names, descriptors, strict=True))
        os.dup2(self._stderr, 2)
        os.close(self._stderr)
        self._stderr = None

    def keep(self, name: str, descriptor: int) -> None:
        """Hand `descriptor` over, in the place of what had that name. Returns when that is done.
        Raises ServerFailed."""
        self._ask(["keep", name], [descriptor])

    def drop(self, name: str) -> None:
        """Have no more of that name. Raises ServerFailed."""
        self._ask(["drop", name], [])

    def ready(self) -> None:
        """From now on our end is a death. Raises ServerFailed."""
        self._ask(["ready"], [])
        self._served = True

    def ending(self) -> None:
        """From now on it is none, whatever comes of it; and no other signal to end makes it worse:
        a file of the user's is good only when it is closed. Raises ServerFailed."""
        signal.pthread_sigmask(signal.SIG_BLOCK, TELL_TO_END)
        self._ask(["ending"], [])
        self._served = False

    def failing(self, why: str) -> None:
        """This is what our death, which comes next, is to be put down to. Raises ServerFailed."""
        self._ask(["failing", why[:_MOST_SAID]], [])

    def upgrade(self, program: list[str]) -> int:
        """Have `program` loaded, to go on in our place; its process. From then on it waits for our
        end. Raises DeviceBusy, BadValue, and ServerFailed where it cannot go on."""
        if len("\0".join(program).encode(errors="replace")) > _MOST_SAID:
            raise BadValue(
                f"the program {program[0][:80]!r} has more than {_MOST_SAID} bytes of arguments",
                hint="name one that takes fewer",
            )
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with ours:
            with theirs:
                refusal = self._answer(["upgrade", *program], [theirs.fileno()])
            if refusal != OK:
                why = refusal.decode(errors="replace")
                raise DeviceBusy(f"it cannot be upgraded now: {why}")
            answer = ours.recv(MESSAGE)  # nobody else waits for this one
        if not answer.startswith(OK):
            why = answer.decode(errors="replace") or "its supervisor has given it up"
            raise ServerFailed(
                f"what was to take over could not: {why}",
                hint=f"zramd {__version__} serves on, as before",
            )
        return int(answer.removeprefix(OK))

    def _ask(self, words: list[str], descriptors: list[int]) -> None:
        answer = self._answer(words, descriptors)
        if answer != OK:
            why = answer.decode(errors="replace")
            raise ServerFailed(f"the supervisor cannot {' '.join(words)}: {why}")

    def _answer(self, words: list[str], descriptors: list[int]) -> bytes:
        try:
            with self._lock:
                message = "\0".join(words).encode(errors="replace")
                socket.send_fds(self._socket, [message], descriptors)
                return self._socket.recv(MESSAGE)
        except OSError as error:
            raise _silent(error) from error


def _silent(error: OSError) -> ServerFailed:
    return ServerFailed(f"the supervisor does not answer: {error.strerror}")


def receive(sock: socket.socket, most: int) -> tuple[bytes, list[int]]:
    """A message, and up to `most` descriptors that came with it. Raises OSError."""
    # Not socket.recv_fds: that ignores its flags, and programs would inherit them.
    numbers = array.array("i")
    size = socket.CMSG_LEN(most * numbers.itemsize)
    message, ancillary, _flags, _from = sock.recvmsg(MESSAGE, size, socket.MSG_CMSG_CLOEXEC)
    for _level, _kind, data in ancillary:
        numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return message, list(numbers)


def die_with(supervisor: int) -> None:
    """Have the kernel kill this process, a fork of the supervisor, when that has ended; it stays so
    when another program is executed in either of them."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != supervisor:
        os._exit(1)  # it died before it could have told us

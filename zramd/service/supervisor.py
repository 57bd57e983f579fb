"""The process that `zramd serve` begins as. It keeps what must outlive its worker, the process that
does the I/O, and starts another when that dies; nothing else, so there is little to go wrong.

1. Harden, while there are no threads, and fork a worker. It finds all modules loaded: a later one,
   which may have to start when memory is short, reads no file for it.
2. Keep what the worker hands over (`Link.keep`): the arena, and the sockets on which it listens. An
   arena that is reserved is locked here too, or it could be swapped out while there is no worker.
3. The worker has died: fork another, which finds in `Link.kept` what its predecessor handed over;
   at once the first time, later after a pause.
4. It has died MOST_DEATHS times within DEATHS_S: no more. What listens is closed, so that nobody
   waits for an answer; the arena stays. SIGHUP begins again, SIGTERM gives up.

An end is a death when a worker has been ready, and this one did not say that it is about to end.
Any other end is ours too, with its status. SIGTERM and SIGINT are passed on, and told again to a
worker that comes after them; and SIGHUP, where it means that our terminal is gone.

While there is no worker, what swap may lie on is dead. So until one is ready again we say nothing
and touch no file: a page of NAME/log may have been swapped out, as those of a tmpfs can be.

Promises
1. The worker dies with us: two of them never use one arena, whoever takes it over from us.
2. The claim on the name is held as long as we live, and released by us alone.

Assumes that it is called before there are threads, and by the program's main thread.
"""

import ctypes
import errno
import gc
import logging
import mmap
import os
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import Final, NoReturn

from zramd.errors import ServerFailed
from zramd.service import hardening, systemd
from zramd.service.runtime import Claim
from zramd.store.arena import lock_in_memory

MOST_DEATHS: Final = 5
DEATHS_S: Final = 60.0
PAUSES_S: Final = (0.0, 0.2, 1.0, 5.0)
"""Before the first, second, ... worker that is started within DEATHS_S: what was wrong may pass."""

_ALIVE_S: Final = 10.0
"""How often the watchdog hears of us while there is no worker."""

ARENA: Final = "arena"
"""The name of the one thing that is kept when there will be no worker for a while."""

_PR_SET_PDEATHSIG: Final = 1
_MESSAGE: Final = 4096
_OK: Final = b"+"

_libc = ctypes.CDLL(None, use_errno=True)
_log = logging.getLogger(__name__)


class Link:
    """A worker's end of what it has to do with its supervisor. Any thread may call."""

    def __init__(
        self, sock: socket.socket, kept: dict[str, int], missing: list[str], takes_over: bool
    ) -> None:
        self._socket = sock
        self._lock = threading.Lock()  # held from a question to its answer
        self.kept = kept
        """What a predecessor has handed over: descriptors, the worker's own, by name."""
        self.takes_over = takes_over
        """Whether there was one."""
        self.missing = missing
        """What could not be had of the hardening that forks inherit."""

    def keep(self, name: str, descriptor: int, *, lock: bool = False) -> None:
        """Hand `descriptor` over, in the place of what had that name; `lock`: it is memory, to be
        kept there. Returns when that is done. Raises ServerFailed."""
        self._ask(["lock" if lock else "keep", name], [descriptor])

    def drop(self, name: str) -> None:
        """Have no more of that name. Raises ServerFailed."""
        self._ask(["drop", name], [])

    def ready(self) -> None:
        """From now on our end is a death. Raises ServerFailed."""
        self._ask(["ready"], [])

    def ending(self) -> None:
        """From now on it is none, whatever comes of it. Raises ServerFailed."""
        self._ask(["ending"], [])

    def _ask(self, words: list[str], descriptors: list[int]) -> None:
        try:
            with self._lock:
                socket.send_fds(self._socket, ["\0".join(words).encode()], descriptors)
                answer = self._socket.recv(_MESSAGE)
        except OSError as error:
            raise ServerFailed(f"the supervisor does not answer: {error.strerror}") from error
        if answer != _OK:
            raise ServerFailed(f"the supervisor cannot {' '.join(words)}: {answer.decode()}")


def supervise(held: Claim, *, harden: bool = False, log: Path | None = None) -> Link:
    """Fork a worker, and return in it; again in each that comes after it.

    In the process that calls, this ends with SystemExit, with the worker's status. `harden`: what
    it serves must not wait for memory. `log`: with the first worker that is ready it goes to the
    background, as that does by itself.
    """
    return _Supervisor(held, harden, log).run()


def go_to_background(log: Path) -> None:
    """Say all in this file from now on, and hold neither our starter's terminal nor a mount."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
    os.chdir("/")


class _Supervisor:
    def __init__(self, held: Claim, harden: bool, log: Path | None) -> None:
        self._held = held
        self._harden = harden
        self._log = log
        self._missing: list[str] = []
        self._kept: dict[str, int] = {}
        self._locked: dict[str, mmap.mmap] = {}
        self._worker = 0
        self._socket: socket.socket
        self._waker: int
        self._was_ready = False
        self._ending = False
        self._told: set[int] = set()
        self._to_say: list[str] = []
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        self._passed_on: set[int] = {signal.SIGTERM, signal.SIGINT}
        if os.isatty(0) or os.isatty(2):
            self._passed_on.add(signal.SIGHUP)

    def run(self) -> Link:
        if self._harden:
            self._missing = hardening.prepare()
        logging.raiseExceptions = False  # who reads our stderr may be gone, and we are not to end
        waker, wakened = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._waker = waker
        before = signal.set_wakeup_fd(wakened, warn_on_full_buffer=False)
        handlers = {
            number: signal.signal(number, lambda *_: None)
            for number in (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM, signal.SIGINT)
        }
        if self._harden:
            hardening.lock(heap_reserve=0)  # what cannot be had, the worker will miss too, and say
            hardening.share()
        gc.collect()
        gc.freeze()
        while True:
            try:
                link = self._fork()
            except OSError as error:
                if not self._was_ready:
                    raise ServerFailed(f"no worker can be started: {error.strerror}") from error
                how = f"could not be started ({error.strerror})"
            else:
                if link is not None:
                    signal.set_wakeup_fd(before)
                    for number, handler in handlers.items():
                        signal.signal(number, handler)
                    os.close(waker)
                    os.close(wakened)
                    return link
                status = self._attend()
                self._socket.close()
                if self._ending or not self._was_ready:
                    self._end(status)
                how = _how(status)
            self._deaths.append(time.monotonic())
            if self._in_a_loop():
                self._rest(how)
            else:
                self._to_say.append(f"the worker {how}: another has taken over its pages")
                self._pause()

    def _fork(self) -> Link | None:
        """Moves 1 and 3. None in the supervisor. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        supervisor = os.getpid()
        try:
            self._worker = os.fork()
        except OSError:
            ours.close()
            theirs.close()
            raise
        if self._worker:
            theirs.close()
            self._socket = ours
            return None
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != supervisor:
            os._exit(1)  # it died before it could have told us
        ours.close()
        for memory in self._locked.values():
            memory.close()  # and not MADV_DONTFORK: user-mode Linux leaves the child such pages
        self._held.disown()
        return Link(theirs, self._kept, self._missing, self._was_ready)

    def _attend(self) -> int:
        """Serve the worker until it has ended; its exit code, negative for a signal."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        poll.register(self._waker, select.POLLIN)
        while True:
            ready = dict(poll.poll())
            if self._socket.fileno() in ready and not self._answer():
                poll.unregister(self._socket)
            if self._waker in ready:
                for number in self._signals(0) & self._passed_on:
                    self._told.add(number)
                    os.kill(self._worker, number)
                ended, status = os.waitpid(self._worker, os.WNOHANG)
                if ended:
                    return os.waitstatus_to_exitcode(status)

    def _answer(self) -> bool:
        """Do what a message of the worker asks; False when it will ask no more."""
        try:
            message, descriptors, _flags, _from = socket.recv_fds(self._socket, _MESSAGE, 1)
        except ConnectionError:
            return False
        if not message:
            return False
        verb, _, name = message.decode().partition("\0")
        answer = _OK
        try:
            if verb == "ready":
                pass
            elif verb == "ending":
                self._ending = True
            else:
                self._drop(name)
                if verb != "drop":
                    self._keep(name, descriptors, lock=verb == "lock")
        except OSError as error:
            answer = str(error).encode()
        try:
            self._socket.send(answer)
        except OSError:
            pass  # it has died meanwhile
        if verb == "ready":
            self._begin()
        return True

    def _begin(self) -> None:
        """A worker is ready, and has been answered: it does not wait for the files that we touch,
        whose pages may be on swap that it serves."""
        if self._log is not None and not self._was_ready:
            go_to_background(self._log)
        self._was_ready = True
        self._held.serve_by(self._worker)
        self._say_it()
        for number in self._told:
            os.kill(self._worker, number)

    def _say_it(self) -> None:
        for line in self._to_say:
            _log.warning("%s", line)
        self._to_say.clear()

    def _keep(self, name: str, descriptors: list[int], *, lock: bool) -> None:
        if not descriptors:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        self._kept[name] = descriptors[0]
        if lock:
            try:
                self._locked[name] = _locked(descriptors[0])
            except OSError:
                self._drop(name)
                raise

    def _drop(self, name: str) -> None:
        if name in self._locked:
            self._locked.pop(name).close()
        if name in self._kept:
            os.close(self._kept.pop(name))

    def _in_a_loop(self) -> bool:
        deaths = self._deaths
        return len(deaths) == MOST_DEATHS and deaths[-1] - deaths[0] < DEATHS_S

    def _pause(self) -> None:
        """Or until we are told to end."""
        now = time.monotonic()
        recent = sum(now - at < DEATHS_S for at in self._deaths)
        until = now + PAUSES_S[min(recent, len(PAUSES_S)) - 1]
        while not self._told and (left := until - time.monotonic()) > 0:
            self._told |= self._signals(left) & self._passed_on

    def _signals(self, within_s: float) -> set[int]:
        """Those that have come, waited for no longer than that."""
        poll = select.poll()
        poll.register(self._waker, select.POLLIN)
        return set(os.read(self._waker, _MESSAGE)) if poll.poll(within_s * 1000) else set()

    def _rest(self, how: str) -> None:
        """Move 4. Returns when it is to begin again."""
        for name in [name for name in self._kept if name != ARENA]:
            self._drop(name)
        self._held.adopt()
        self._say_it()
        _log.error(
            "the worker %s, the last of %d within %d s: no other is started, its pages are kept;"
            " `kill -HUP %d` begins again, `kill %d` gives them up",
            *(how, MOST_DEATHS, DEATHS_S, os.getpid(), os.getpid()),
        )
        self._deaths.clear()
        manager = systemd.Manager()
        manager.tell(STATUS=f"its worker {how} again and again; the pages are kept")
        while not self._told:
            numbers = self._signals(_ALIVE_S)
            manager.tell(WATCHDOG="1")
            if signal.SIGHUP in numbers:
                manager.close()
                return
            self._told |= numbers & self._passed_on
        raise ServerFailed(f"the worker {how} again and again; its pages are given up")

    def _end(self, status: int) -> NoReturn:
        if status >= 0:
            raise SystemExit(status)
        if -status not in self._told:
            raise ServerFailed(f"the worker {_how(status)} before it was ready")
        self._held.release()
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
        raise SystemExit(128 - status)  # not reached: these end a process


def _locked(descriptor: int) -> mmap.mmap:
    """This memory, mapped and locked. Raises OSError."""
    memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
    lock_in_memory(memory)
    return memory


def _how(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    return f"was ended by signal {-status} ({signal.strsignal(-status) or 'of no name'})"

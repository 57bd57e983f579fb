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

An upgrade (`zramd upgrade`) changes the code of all this, and not the process:
5. The worker asks for a program to go on. It is started as a candidate (`candidate.py`), and while
   that loads nothing changes. It fails: the worker is told why, and serves on.
6. It has loaded: the worker leaves, and is killed where it does not. The candidate is the worker
   then. It dies before it is ready, or is killed as it is not in time: a death as any other, and a
   fork of the old code comes.
7. It is ready: we become that program too (`handover.py`), so that later workers are forks of it.
   Signals are blocked meanwhile, and come when it is there. That fails: we go on with our code.

An end is a death when a worker has been ready, or its server has taken over from one that died, and
it did not say that it is about to end. Any other end is ours too, with its status. SIGTERM and
SIGINT are passed on, and told again to a worker that comes after them; and SIGHUP, where it means
that our terminal is gone.

While there is no worker, what swap may lie on is dead. So until one is ready again we say nothing
and touch no file: a page of NAME/log may have been swapped out, as those of a tmpfs can be.

Promises
1. The worker dies with us: two of them never use one arena, whoever takes it over from us.
2. The claim on the name is held as long as we live, and released by us alone.
3. Nothing that a worker or a candidate says is the end of us. What else nobody foresaw ends us by a
   signal while we have an arena, so that systemd starts another server with it.

Assumes that it is called before there are threads, and by the program's main thread.
"""

import gc
import logging
import math
import os
import select
import signal
import socket
import time
from collections import deque
from pathlib import Path
from typing import Final, NoReturn

from zramd import __version__
from zramd.errors import ServerFailed
from zramd.service import hardening, systemd
from zramd.service.background import go_to_background
from zramd.service.candidate import Candidate, how
from zramd.service.handover import Handover
from zramd.service.kept import PASSED, Kept, one
from zramd.service.link import OK, Link, die_with, receive
from zramd.service.runtime import Claim
from zramd.service.systemd import ARENA
from zramd.store import PAGE
from zramd.store.header import Header

MOST_DEATHS: Final = 5
DEATHS_S: Final = 60.0
PAUSES_S: Final = (0.0, 0.2, 1.0, 5.0)
"""Before the first, second, ... worker that is started within DEATHS_S: what was wrong may pass."""

_NOTHING: Final = systemd.Passed([], None)

_ALIVE_S: Final = 10.0
"""How often the watchdog hears of us while there is no worker."""

_MOST_SIGNALS: Final = 4096
_HEARD: Final = (signal.SIGCHLD, signal.SIGHUP, signal.SIGTERM, signal.SIGINT)

_log = logging.getLogger(__name__)


def supervise(
    held: Claim,
    *,
    harden: bool = False,
    log: Path | None = None,
    passed: systemd.Passed = _NOTHING,
    handed: Handover | None = None,
) -> Link:
    """Fork a worker, and return in it; again in each that comes after it.

    In the process that calls, this ends with SystemExit, with the worker's status. `harden`: what
    it serves must not wait for memory. `log`: with the first worker that is ready it goes to the
    background, as that does by itself. `passed`: sockets for each worker to find as PASSED, and
    the arena of a server that has died, which is taken over. `handed`: what another program has
    left that was the supervisor in this process.
    """
    supervisor = _Supervisor(held, harden, log)
    for n, sock in enumerate(passed.sockets):
        supervisor.kept.keep(f"{PASSED} {n}", sock.detach())
    if passed.arena is not None:
        supervisor.adopt(passed.arena)
    handed_pages = handed is not None and ARENA in handed.descriptors
    foreseen = SystemExit, ServerFailed
    with systemd.restarted(lambda: handed_pages or supervisor.has_pages, *foreseen):
        return supervisor.run(handed)


def rehearse(held: Claim, handed: Handover, *, harden: bool, log: Path | None) -> None:
    """Take what a candidate is shown as `supervise` will take what it is handed: what cannot be
    understood fails now, while another serves."""
    _Supervisor(held, harden, log).learn(handed)


class _Supervisor:
    def __init__(self, held: Claim, harden: bool, log: Path | None) -> None:
        self._held = held
        self._harden = harden
        self._log = log
        self._missing: list[str] = []
        self.kept = Kept()
        self._worker = 0  # its process, where there is one
        self._socket: socket.socket
        self._waker: int
        self._candidate: Candidate | None = None
        self._has_turn = False  # the candidate, which is the worker then, and not ready yet
        self._unreaped: set[int] = set()
        self._why = ""  # the worker fails, in its own words
        self._was_ready = False
        self._adopted = False
        self._ending = False
        self._told: set[int] = set()
        self._to_say: list[str] = []
        self._deaths: deque[float] = deque(maxlen=MOST_DEATHS)
        self._passed_on: set[int] = {signal.SIGTERM, signal.SIGINT}
        if os.isatty(0) or os.isatty(2):
            self._passed_on.add(signal.SIGHUP)

    @property
    def has_pages(self) -> bool:
        return ARENA in self.kept.descriptors

    @property
    def _relied_on(self) -> bool:
        """Whether a worker that ends is to be followed by another."""
        return self._was_ready or self._adopted

    def adopt(self, arena: int) -> None:
        """Go on with this one, whose server has died with its worker. Raises BadArena."""
        # More behind it: one in a file, whose server was killed while it closed that.
        Header.unpack(os.pread(arena, PAGE, 0), os.fstat(arena).st_size, more=True)
        self._adopted = True
        self._keep_again(ARENA, arena)
        self._to_say.append("the server has died: another has taken over its pages")

    def run(self, handed: Handover | None) -> Link:
        if self._harden:
            self._missing = hardening.prepare()
        logging.raiseExceptions = False  # who reads our stderr may be gone, and we are not to end
        waker, wakened = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._waker = waker
        before = signal.set_wakeup_fd(wakened, warn_on_full_buffer=False)
        handlers = {number: signal.signal(number, lambda *_: None) for number in _HEARD}
        if handed is not None:
            self._resume(handed)
        if self._harden:
            hardening.lock(heap_reserve=0)  # what cannot be had, the worker will miss too, and say
            hardening.share()
        gc.collect()
        gc.freeze()
        while True:
            if not self._worker:
                try:
                    link = self._fork()
                except OSError as error:
                    if not self._relied_on:
                        raise ServerFailed(f"no worker can be started: {error.strerror}") from error
                    self._has_died(f"could not be started ({error.strerror})")
                    continue
                if link is not None:
                    signal.set_wakeup_fd(before)
                    for number, handler in handlers.items():
                        signal.signal(number, handler)
                    os.close(waker)
                    os.close(wakened)
                    return link
            status = self._attend()
            self._socket.close()
            self._worker = 0
            if self._ending or not self._relied_on:
                self._give_candidate_up("the server has ended")
                self._end(status)
            why, self._why = self._why, ""
            if not self._give_turn():
                self._has_died(f"{how(status)} ({why})" if why else how(status))

    def _has_died(self, how: str) -> None:
        """Returns when there is to be another."""
        if self._has_turn and self._candidate is not None:
            self._to_say.append(f"zramd {self._candidate.version} has not taken over")
        self._give_candidate_up(f"the worker {how}")
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
        die_with(supervisor)
        ours.close()
        self.kept.is_a_workers()
        self._held.disown()
        return Link(theirs, self.kept.descriptors, self._missing, self._relied_on)

    def _attend(self) -> int:
        """Serve the worker until it has ended; its exit code, negative for a signal."""
        asks = True
        while True:
            ended, status = os.waitpid(self._worker, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            self._look_at_candidate()
            ready = self._wait(asks)
            if self._socket.fileno() in ready:
                asks = self._answer()
            if self._waker in ready:
                for number in self._signals(0) & self._passed_on:
                    self._told.add(number)
                    os.kill(self._worker, number)
                self._reap()

    def _wait(self, asks: bool) -> set[int]:
        """Until something has come; the descriptors that it came by."""
        poll = select.poll()
        poll.register(self._waker, select.POLLIN)
        if asks:
            poll.register(self._socket, select.POLLIN)
        within_ms = None
        if self._candidate is not None:
            for descriptor in self._candidate.sources if not self._has_turn else ():
                poll.register(descriptor, select.POLLIN)
            left = self._candidate.deadline - time.monotonic()
            if left < math.inf:
                within_ms = max(left * 1000 + 1, 0)
        return {descriptor for descriptor, _ in poll.poll(within_ms)}

    def _answer(self) -> bool:
        """Do what a message of the worker asks; False when it will ask no more."""
        try:
            message, descriptors = receive(self._socket, 1)
        except ConnectionError:
            return False
        except OSError:
            return True  # no memory for it now
        if not message:
            return False
        verb, *words = message.decode(errors="replace").split("\0")
        answer = OK
        try:
            if verb == "ready":
                if not self._relied_on:  # nothing can lie on it yet, and who hears of it may ask
                    self._held.serve_by(self._worker)
            elif verb == "ending":
                self._ending = True
            elif verb == "failing":
                (self._why,) = words
            elif verb == "upgrade":
                self._begin_upgrade(words, descriptors)
            elif verb == "drop":
                self.kept.drop(words[0])
            elif verb == "keep":
                self._keep(words[0], one(descriptors))
            else:
                raise ValueError(f"zramd {__version__} knows no such question")
        except Exception as error:  # it fails, and not we
            answer = str(error).encode(errors="replace") or type(error).__name__.encode()
        try:
            self._socket.send(answer)
        except OSError:
            pass  # it has died meanwhile
        if verb == "ready":
            self._begin()
        return True

    def _keep(self, name: str, descriptor: int) -> None:
        self.kept.keep(name, descriptor)
        try:
            self.kept.lock(name)
        except OSError:
            self.kept.drop(name)
            raise

    def _begin(self) -> None:
        """A worker is ready, and has been answered: a later one does not wait for the files that we
        touch, whose pages may be on swap that it serves."""
        if self._has_turn:
            self._become()
        if self._log is not None and not self._was_ready:
            go_to_background(self._log)
        self._was_ready = True
        self._held.serve_by(self._worker)
        self._say_it()
        for number in self._told:
            os.kill(self._worker, number)

    # An upgrade

    def _begin_upgrade(self, program: list[str], descriptors: list[int]) -> None:
        """Move 5. Raises OSError, which says why not."""
        asker = socket.socket(fileno=one(descriptors))
        try:
            if self._candidate is not None:
                raise OSError("another upgrade is under way")
            if self._told or self._ending:
                raise OSError("it has been told to end")
            arena = self.kept.descriptors.get(ARENA)
            self._candidate = Candidate(
                *(program, asker, self._held.fileno(), arena), self._told, list(self._deaths)
            )
        except OSError:
            asker.close()
            raise

    def _look_at_candidate(self) -> None:
        candidate = self._candidate
        if candidate is None:
            return
        if self._has_turn:
            if candidate.wait():
                self._why = "it was not ready in time"
                os.kill(self._worker, signal.SIGKILL)
            return
        reason = candidate.look()
        if reason is None and (self._ending or (self._told and not candidate.loaded)):
            reason = "the server has been told to end"
        if reason is not None:
            if candidate.loaded:
                self._to_say.append(f"zramd {candidate.version} has not taken over: {reason}")
            self._give_candidate_up(reason)
        elif candidate.wait():
            os.kill(self._worker, signal.SIGKILL)

    def _give_candidate_up(self, reason: str) -> None:
        candidate, self._candidate = self._candidate, None
        if candidate is not None and not self._has_turn:
            self._unreaped.add(candidate.give_up(reason))
        self._has_turn = False

    def _reap(self) -> None:
        self._unreaped = {process for process in self._unreaped if process and _runs(process)}

    def _give_turn(self) -> bool:
        """Move 6. Whether there is a candidate that has been waiting for this, and lives."""
        candidate = self._candidate
        if candidate is None or self._has_turn:
            return False
        # It may have loaded, or failed, since we looked last.
        if candidate.look() is not None or not candidate.loaded:
            return False
        try:
            candidate.go(self.kept.descriptors)
        except OSError:
            return False
        self._worker, self._socket, self._has_turn = candidate.process, candidate.socket, True
        return True

    def _become(self) -> None:
        """Move 7. Returns where it fails."""
        candidate = self._candidate
        assert candidate is not None
        signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
        self._told |= self._signals(0) & self._passed_on
        self._say_it()
        try:
            Handover(
                *("supervisor", self._held.fileno(), self._socket.fileno()),
                self.kept.descriptors,
                worker=self._worker,
                told=list(self._told),
                deaths=list(self._deaths),
            ).execute(candidate.program)
        except (OSError, ValueError) as error:
            self._to_say.append(f"later workers are of zramd {__version__}, as before: {error}")
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
        self._give_candidate_up("")

    def _resume(self, handed: Handover) -> None:
        """Be what another program has been in this process until it has become ours."""
        for name, descriptor in handed.descriptors.items():
            self._keep_again(name, descriptor)
        self._worker, self._socket = handed.worker, socket.socket(fileno=handed.link)
        self.learn(handed)
        self._begin()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)

    def learn(self, handed: Handover) -> None:
        """All of it that is no descriptor."""
        self._was_ready = True
        self._told |= {int(signal.Signals(number)) for number in handed.told}
        self._deaths.extend(float(at) for at in handed.deaths)
        self._to_say.append(f"zramd {__version__} has taken over from zramd {handed.version}")

    def _keep_again(self, name: str, descriptor: int) -> None:
        """What another supervisor has kept, and has had stored."""
        self.kept.keep(name, descriptor, stored=True)
        try:
            self.kept.lock(name)
        except OSError as error:  # the worker has it locked, while there is one
            self._to_say.append(f"the {name} cannot be kept in memory here: {error.strerror}")

    def _say_it(self) -> None:
        for line in self._to_say:
            _log.warning("%s", line)
        self._to_say.clear()

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
        return set(os.read(self._waker, _MOST_SIGNALS)) if poll.poll(within_s * 1000) else set()

    def _rest(self, how: str) -> None:
        """Move 4. Returns when it is to begin again."""
        self.kept.drop_what_workers_make()
        self._held.serve_by(0)
        self._say_it()
        _log.error(
            "the worker %s, the last of %d within %d s: no other is started, its pages are kept;"
            " `zramd save %s FILE` saves them, `kill -HUP %d` begins again,"
            " and `kill %d` gives them up",
            *(how, MOST_DEATHS, DEATHS_S, self._held.paths.name, os.getpid(), os.getpid()),
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
            raise ServerFailed(f"the worker {how(status)} before it was ready")
        self._held.release()
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
        raise SystemExit(128 - status)  # not reached: these end a process


def _runs(child: int) -> bool:
    return os.waitpid(child, os.WNOHANG)[0] == 0

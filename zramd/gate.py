"""init_done and the drain: how I/O runs without a lock, and a reset still never meets it.

The kernel patch that zramd comes from ("zram: remove init_lock in zram_make_request", 2015) cleared
`init_done` and then kicked every CPU (kick_all_cpus_sync). A kick is a memory barrier: after it
everybody knows that the gate is closed. It is no drain: a request that was inside and not running
just then is missed. Here the kick stands where it is right, between closing the gate and waiting
for those inside, and the waiting makes the drain. Every thread that does I/O has a record here, as
every CPU has a run queue.

A request, in its thread:
  E1  Publish: the record says who is inside. From here on a drain waits for us.
  E2  Test `init_done`. False: leave again, refused. True: until L1 nothing that the gate guards can
      go away. E1 comes first: who tests and then publishes can be inside unseen.
  L1  The record says that nobody is inside. From here on we touch nothing that the gate guards.
  L2  Look, once, whether a resetter has posted a meeting point, and if so say there that we left.
Two stores and two loads on the thread's own record and a flag that hardly ever changes: no lock, no
counter that threads share. 0.13 to 0.15 us, 1 % of a 4 KiB write through the store with lz4, which
takes 15 us when it comes alone; `scripts/bench` measures the share.

The resetter, one at a time (the device's init_lock):
  R1  Close: `init_done` = False. Only a thread that does not know it yet can still get in.
  R2  Visit every record and post a meeting point there. A thread without a record makes one under
      the lock of their list, after us, and so knows R1.
  R3  Kick: when it returns, every thread has passed a memory barrier since R2. Who passes E2 now is
      refused, so nobody gets in any more; who passed it before is seen inside; who leaves from now
      on finds the meeting point, and who left without finding it is seen outside.
  R4  Meet, at every record that is seen inside, the end of that one request, whatever way it ends.
      A thread that comes back is refused and not waited for twice, so overlapping requests cannot
      starve a reset. Now nobody is inside and nobody can get in: the state may be freed.
  R5  Take the meeting points away. A thread that is still at L2 has its own hold on one.

Assumes
- that a thread's stores become visible in their order and its loads are done in theirs. A load may
  overtake an earlier store, which E1 and E2, L1 and L2 would not survive by themselves; the kick
  makes up for it, on the side that runs once a reset instead of once a request. So nothing here
  relies on the GIL: CPython without it loads and stores attributes with acquire and release.
- that a request begins and ends in one thread and does not enter twice. A thread that dies has left
  before, in `finally`, and takes its record with it. A signal handler that raises between `enter`
  and the `try` would leave its thread inside: threads that do I/O have none.
"""

import ctypes
import os
import sys
import threading
import weakref
from typing import Any, Final

from zramd.errors import NotInitialised, NotSupported

_SYS_MEMBARRIER: Final = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365}
_PRIVATE_EXPEDITED: Final = 1 << 3
_REGISTER_PRIVATE_EXPEDITED: Final = 1 << 4

SWITCH_S: Final = 0.0005
"""How long a thread may keep the GIL from others: while a drain goes on, and always in a server.
With CPython's 5 ms a drain beside 7 threads that compute ended up to 21 ms after the last request,
and the 99th percentile of reads beside a compaction was 2.5 ms higher; in a later run 1.4."""


class Record:
    """One thread's place in the gate."""

    __slots__ = ("__weakref__", "inside", "meeting")

    def __init__(self) -> None:
        self.inside: str | None = None
        """Who has a request inside, in a few words."""
        self.meeting: threading.Event | None = None


class Gate:
    """Closed at first. `enter` and `leave` bracket a request; `open`, `close` and `drain` are for
    whoever holds the device's init_lock. Raises NotSupported where nothing can order threads."""

    def __init__(self) -> None:
        self.init_done = False
        self._local: Any = threading.local()
        # Not a WeakSet: one that loses a member while another thread walks it may raise.
        self._records: list[weakref.ref[Record]] = []
        self._records_lock = threading.Lock()  # leaf lock; protects the list, not the records
        kick()  # what cannot work fails now, not in the first reset

    def enter(self, who: str) -> Record:
        """Begin a request. Raises NotInitialised, and is then not inside."""
        try:
            record: Record = self._local.record
        except AttributeError:
            record = self._new_record()
        record.inside = who
        if not self.init_done:
            self.leave(record)
            raise NotInitialised("the device is not initialised", hint="set its disksize first")
        return record

    def leave(self, record: Record) -> None:
        """End the request that `enter` began; call it in `finally`."""
        record.inside = None
        meeting = record.meeting
        if meeting is not None:
            meeting.set()

    def open(self) -> None:
        """Let requests in. What they will use has been published before."""
        self.init_done = True

    def close(self) -> None:
        """Refuse new requests. Those inside go on; `drain` waits for them."""
        self.init_done = False

    def drain(self) -> None:
        """Return when no request is inside. The gate is closed; the caller is not inside."""
        visited = [(record, threading.Event()) for record in self._living()]
        interval = sys.getswitchinterval()
        try:
            if interval > SWITCH_S:
                sys.setswitchinterval(SWITCH_S)
            for record, meeting in visited:
                record.meeting = meeting
            kick()
            for record, meeting in visited:
                if record.inside is not None:
                    meeting.wait()
        finally:
            for record, _ in visited:
                record.meeting = None
            if interval > SWITCH_S:
                sys.setswitchinterval(interval)

    def inside(self) -> list[str]:
        """Who is inside at this moment, in no order: whom a drain would wait for."""
        seen = [record.inside for record in self._living()]
        return [who for who in seen if who is not None]

    def _living(self) -> list[Record]:
        with self._records_lock:
            return [record for ref in self._records if (record := ref()) is not None]

    def _new_record(self) -> Record:
        record = Record()
        with self._records_lock:
            self._records = [ref for ref in self._records if ref() is not None]
            self._records.append(weakref.ref(record))
        # Last: a record that its thread uses and the resetter does not know would not be met.
        self._local.record = record
        return record


def kick() -> None:
    """Have every thread of this process pass a memory barrier before this returns: membarrier(2),
    what kick_all_cpus_sync() is to the kernel. 2 us. Raises NotSupported.

    A kernel without it (or a seccomp filter) leaves it to the GIL, whose every change of hands is a
    barrier.
    """
    if _membarrier(_PRIVATE_EXPEDITED):
        return
    # A process registers once; forks inherit that.
    if _membarrier(_REGISTER_PRIVATE_EXPEDITED) and _membarrier(_PRIVATE_EXPEDITED):
        return
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        raise NotSupported(
            "without the GIL a reset needs membarrier(2), and it cannot be had here",
            hint="run zramd with the GIL (PYTHON_GIL=1); it is there on Linux 4.14 and later, and"
            f" known to zramd on {', '.join(_SYS_MEMBARRIER)}",
        )


_syscall = ctypes.CDLL(None).syscall


def _membarrier(command: int) -> bool:
    # A Python of 32 bits has other numbers, whatever the kernel calls the machine.
    number = _SYS_MEMBARRIER.get(os.uname().machine) if sys.maxsize > 1 << 32 else None
    return number is not None and _syscall(number, command, 0, 0) == 0

"""init_done and the drain: how I/O runs without a lock, and a reset still never meets it.

The kernel patch that zramd comes from ("zram: remove init_lock in zram_make_request", 2015) cleared
`init_done` and then kicked every CPU. A kick is a memory barrier: it keeps new requests out, but a
request that was inside and not running just then is missed. This gate keeps the patch's shape, a
flag and a round of all, and makes the round a drain: every thread that does I/O has a record here,
as every CPU has a run queue, and the resetter waits at each record until its request has ended.

A request, in its thread:
1. Publish: `record.inside = True`.
2. Test `init_done`. False: leave again, refused. The order matters: a thread that tested first and
   published second could be inside unseen.
3. Work. The state that the gate guards cannot go away.
4. Leave: `record.inside = False`; then, if a resetter has posted a meeting point, say so there.
   Look at it once: a resetter that has seen step 4 begin takes its meeting point away again.

The resetter, one at a time (the device's init_lock):
1. `init_done = False`. Whoever publishes from now on is refused at its test, so the set of
   requests inside can only shrink.
2. Visit each record. Outside: past already, whatever it does next it will be refused.
3. Inside: post a meeting point, then look again. If the request left between the two looks it may
   not have seen the meeting point, but now it is seen to be outside, and is past.
4. Still inside: meet it at the end of that one request. A thread that leaves and comes back is
   refused and not waited for twice, so overlapping requests cannot starve a reset.
When the round is over nobody is inside and nobody can get in: the state may be freed.

Assumes that a thread's store to one attribute is visible to others before its next load of another
(sequential consistency, as with the GIL, and as free-threaded builds give by locking the object),
and that a request begins and ends in one thread and does not enter twice. A thread that dies has
left before, in `finally`, and takes its record with it. A signal handler that raises between
`enter` and the `try` would leave its thread inside: threads that do I/O have none.
"""

import threading
import weakref
from typing import Any

from zramd.errors import NotInitialised


class Record:
    """One thread's place in the gate."""

    __slots__ = ("__weakref__", "inside", "meeting", "thread")

    def __init__(self) -> None:
        self.inside = False
        self.meeting: threading.Event | None = None
        self.thread = threading.current_thread().name


class Gate:
    """Closed at first. `enter` and `leave` bracket a request; `open`, `close` and `drain` are for
    whoever holds the device's init_lock."""

    def __init__(self) -> None:
        self.init_done = False
        self._local: Any = threading.local()
        # Not a WeakSet: one that loses a member while another thread walks it may raise.
        self._records: list[weakref.ref[Record]] = []
        self._records_lock = threading.Lock()  # leaf lock; protects the list, not the records

    def enter(self) -> Record:
        """Begin a request. Raises NotInitialised, and is then not inside."""
        try:
            record: Record = self._local.record
        except AttributeError:
            record = self._new_record()
        record.inside = True
        if not self.init_done:
            self.leave(record)
            raise NotInitialised("the device is not initialised", hint="set its disksize first")
        return record

    def leave(self, record: Record) -> None:
        """End the request that `enter` began; call it in `finally`."""
        record.inside = False
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
        for record in self._living():
            if not record.inside:
                continue
            meeting = record.meeting = threading.Event()
            if record.inside:
                meeting.wait()
            record.meeting = None

    def inside(self) -> list[str]:
        """Names of the threads inside at this moment: whom a drain would wait for."""
        return [record.thread for record in self._living() if record.inside]

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

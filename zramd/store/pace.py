"""The pace of work in the background: in turns, and after each a rest, until the others have had
their fill of the CPU.

What it adds to the 99th percentile of others, with one CPU for the server and 16 requests of 4 KiB
in flight, in milliseconds:

                                  reads beside a save, a compaction    writes
    as it is                      0.6                  0.5             0.75   0.65
    0.1 or 0.5 ms of rest only    1.6                  1.3             1.85   1.6

There the kernel evens out who has had the CPU for how long. When others have had it for some
milliseconds, who comes back from a rest is let in at once, again and again: others get the rests,
and no more. So how long these are is what counts.
Without any rest, in a real-time class on one CPU, nobody was answered meanwhile.
"""

import threading
import time
from typing import Final

_TURN_S: Final = 0.00025
_REST_S: Final = 0.00005
"""With the kernel's timer slack 0.1 ms. A save by itself makes 1.25 GiB a second, with twice as
much 1.1."""
_LONGEST_REST_S: Final = 0.002
"""So work goes on where others want all of the CPU for good."""


class Hurry:
    """A context that threads are in while they wait for what is done in the background."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting = 0

    def __enter__(self) -> None:
        with self._lock:
            self._waiting += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._waiting -= 1

    def __bool__(self) -> bool:
        return self._waiting > 0


class Pace:
    """That of one thread's work. While somebody waits for it no rest is long."""

    def __init__(self, hurry: Hurry) -> None:
        self._hurry = hurry
        self._turn_ends = time.monotonic() + _TURN_S

    def keep(self) -> None:
        """Rest, if the turn is over; called with no lock held."""
        now = time.monotonic()
        if now < self._turn_ends:
            return
        until = now + _LONGEST_REST_S
        others = _others()
        busy = True
        while busy and now < until:
            began, before = now, others
            time.sleep(_REST_S)
            now, others = time.monotonic(), _others()
            busy = others - before > (now - began) / 2 and not self._hurry
        self._turn_ends = now + _TURN_S


def _others() -> float:
    """CPU seconds of this process's other threads. Where one of them is on another CPU the kernel
    may tell of it late; what it keeps us waiting for then is only the GIL."""
    return time.process_time() - time.thread_time()

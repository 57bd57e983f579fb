"""A few threads that the connections of a server share, in turns.

Promises: of the connections that have work to do, each gets a thread for one piece of it, then the
next one does; so one that asks for much waits for itself, and others for one piece of its work, and
not for all. The pieces of one connection begin in the order in which they were submitted.

Assumes that work raises nothing.
"""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

Work = Callable[[], None]


class Turns:
    """`threads` are of no use to others meanwhile, and not ended here."""

    def __init__(self, threads: ThreadPoolExecutor, count: int) -> None:
        self._threads = threads
        self._idle = count
        self._lock = threading.Lock()  # a leaf; protects the others
        self._waiting: dict[object, deque[Work]] = {}  # by connection, whose turn is next first

    def submit(self, connection: object, work: Work) -> None:
        with self._lock:
            self._waiting.setdefault(connection, deque()).append(work)
            if not self._idle:
                return
            self._idle -= 1
        self._threads.submit(self._take_turns)

    def _take_turns(self) -> None:
        """In a thread."""
        while (work := self._next()) is not None:
            work()

    def _next(self) -> Work | None:
        with self._lock:
            if not self._waiting:
                self._idle += 1
                return None
            connection = next(iter(self._waiting))
            waiting = self._waiting.pop(connection)
            work = waiting.popleft()
            if waiting:
                self._waiting[connection] = waiting  # behind all others
            return work

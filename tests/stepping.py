"""`zramd` as tests/unlimited.py has it, but that its workers kill themselves in the midst of the
store: python -m tests.stepping VERB ...

Before each store to the arena, and after it, is a point to be killed at (tests/store/watched.py),
and so is the moment before an object, or memory, is given back. Each belongs to one of the ordering
points 1 to 7 of zramd/store/arena.py, but for those at the header's figures, which are 0.

Nothing of this is in the product: what it calls is replaced here. A worker dies at some point,
drawn anew for each, of the kind whose turn it is, and adds a line to the file that DEATHS in the
environment names: the point's number, and who was at work. None dies while somebody has the file
locked.
"""

import fcntl
import os
import random
import signal
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from tests.store.watched import Watcher, watch
from tests.unlimited import main
from zramd.store import PAGE
from zramd.store.arena import Arena
from zramd.store.header import MAGIC
from zramd.store.pool import Pool

KINDS: Final = {"recovery": 6, **dict.fromkeys("23456", 12), "7": 3, "compaction": 12}
"""In turn: one number, or all that one does. And how many points of it a worker comes to at most:
no recovery has less. Who makes an arena dies at each of the points of number 1, one by one."""

_DEATHS: Final = Path(os.environ["DEATHS"])


class Countdown(Watcher):
    """The points of one arena, which is this worker's, until it dies at one."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._map_at, self._spans_at = arena.header.map_at, arena.header.spans_at
        self._is_new = not self._has_magic()
        self._here = threading.local()
        self._lock = threading.Lock()
        deaths = _DEATHS.read_text().splitlines()
        if self._is_new:
            self._kind, self._left = "1", 1 + sum(death.startswith("1 ") for death in deaths)
        else:
            self._kind, most = list(KINDS.items())[len(deaths) % len(KINDS)]
            self._left = random.randint(1, most)

    def _has_magic(self) -> bool:
        return self._arena.map[: len(MAGIC)] == MAGIC

    def store(self, at: int, content: bytes) -> None:
        if at < PAGE:
            self.reach(int(self._is_new))
        elif at < self._map_at:
            self.reach(4)
        elif at < self._spans_at:
            self.reach(2 if any(content) else 6)
        else:
            self.reach(3)

    def punch(self, at: int, size: int) -> None:
        self.reach(7 if at < self._map_at else 6)

    def stored(self) -> None:
        self.reach(self._here.number)
        if self._is_new:
            self._is_new = not self._has_magic()

    def reach(self, number: int) -> None:
        """May not return."""
        self._here.number = number
        who = _at_work()
        with self._lock:
            if self._left and self._kind in (str(number), who):
                self._left -= 1
                if not self._left:
                    _die(f"{number} {who}\n")


def _at_work() -> str:
    """Whose store it is."""
    frame = sys._getframe(2)
    while frame is not None:
        part = frame.f_globals["__name__"].removeprefix("zramd.store.")
        if part in ("compaction", "recovery"):
            return str(part)
        frame = frame.f_back
    return "request"


def _die(line: str) -> None:
    with _DEATHS.open("ab", buffering=0) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        file.write(line.encode())
        os.kill(os.getpid(), signal.SIGKILL)


def _replace() -> None:
    view, vacate, give = Arena._view, Arena.vacate, Pool.give

    def counted_view(arena: Any) -> None:
        view(arena)
        arena.countdown = Countdown(arena)
        watch(arena, arena.countdown)

    def counted_vacate(arena: Any, offset: int, size: int) -> None:
        arena.countdown.punch(offset, size)
        vacate(arena, offset, size)

    def counted_give(pool: Any, addresses: Iterable[int]) -> None:
        objects = list(addresses)
        if objects:
            pool._arena.countdown.reach(5)
        give(pool, objects)

    Arena._view, Arena.vacate, Pool.give = counted_view, counted_vacate, counted_give


if __name__ == "__main__":
    _replace()
    main()

"""What a supervisor keeps of its workers': descriptors, by name, and some of them in memory.

The arena is kept whatever comes, and so are the sockets that systemd has passed, as nobody could
get them again; what a worker has made beside these is its successor's, and goes where there will be
none for a while. systemd keeps the arena too, should this process die.
"""

import errno
import mmap
import os
import stat
from pathlib import Path
from typing import Final

from zramd.service.runtime import Paths
from zramd.service.systemd import ARENA, Store
from zramd.store.arena import lock_in_memory
from zramd.store.header import MAGIC

SETTINGS: Final = "settings"
"""The name of what the next init is to go by, where there is no arena to tell it."""
PASSED: Final = "passed"
"""Before a number, the name of a socket that systemd has passed."""


class Kept:
    def __init__(self) -> None:
        self.descriptors: dict[str, int] = {}
        self._locked: dict[str, mmap.mmap] = {}
        self._store = Store()

    def keep(self, name: str, descriptor: int, *, stored: bool = False) -> None:
        """In the place of what had that name. `stored`: systemd has it already, and would complain
        of another."""
        self.drop(name)
        self.descriptors[name] = descriptor
        if name == ARENA and not stored:
            self._store.keep(name, descriptor)

    def lock(self, name: str) -> None:
        """An arena that is reserved is to stay in memory; anything else may go where it likes.
        Raises OSError."""
        descriptor = self.descriptors[name]
        if name != ARENA or not is_reserved(descriptor):
            return
        memory = mmap.mmap(descriptor, os.fstat(descriptor).st_size)
        lock_in_memory(memory)
        self._locked[name] = memory

    def drop(self, name: str) -> None:
        if name in self._locked:
            self._locked.pop(name).close()
        if name in self.descriptors:
            descriptor = self.descriptors.pop(name)
            if name == ARENA and not self._store.drop(name) and os.fstat(descriptor).st_nlink == 0:
                # Who might be passed it some day must not take it for what the device holds.
                os.pwrite(descriptor, bytes(len(MAGIC)), 0)
            os.close(descriptor)

    def drop_what_workers_make(self) -> None:
        for name in list(self.descriptors):
            if name not in (ARENA, SETTINGS) and not name.startswith(f"{PASSED} "):
                self.drop(name)

    def is_a_workers(self) -> None:
        """In a fork: the locks are not inherited, and the maps are of no use."""
        for memory in self._locked.values():
            memory.close()  # and not MADV_DONTFORK: user-mode Linux leaves the child such pages


def arena_kept_for(paths: Paths) -> int | None:
    """A descriptor of the arena that the server of this device keeps while it has no worker, from
    another process; None where it runs no more, has none, or is not ours to look at."""
    found, holds_the_claim = None, False
    if not paths.rests():
        return None
    try:
        for entry in Path(f"/proc/{paths.server()}/fd").iterdir():
            holds_the_claim |= os.readlink(entry) == os.fspath(paths.lock)
            if found is None and stat.S_ISREG(entry.stat().st_mode):
                descriptor = os.open(entry, os.O_RDONLY | os.O_CLOEXEC)
                if os.pread(descriptor, len(MAGIC), 0) == MAGIC:
                    found = descriptor
                else:
                    os.close(descriptor)
    except OSError:
        pass
    if found is not None and not holds_the_claim:  # its process id is another's by now
        os.close(found)
        return None
    return found


def is_reserved(arena: int) -> bool:
    """Whether all of its memory has been taken, to be kept."""
    status = os.fstat(arena)
    return 0 < status.st_size <= status.st_blocks * 512


def one(descriptors: list[int]) -> int:
    """The one that came with a message. Raises OSError where we have no room for it."""
    if not descriptors:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return descriptors[0]

"""Hardening of the process that does a device's I/O: short of memory, it must not wait for memory.

A kernel without free memory writes pages to swap, that is to us, and what waits for memory waits
until we have answered. If answering needs memory in its turn, nothing ever goes on. So:

1. PR_SET_IO_FLUSHER: an allocation on our behalf never waits for pages to be written.
2. A real-time class: the kernel lets such tasks take from the reserve below the min watermark
   (vm.min_free_kbytes) that everybody else stops at (`gfp_to_alloc_flags`, mm/page_alloc.c), which
   answering over a socket needs a little of.
3. oom_score_adj -1000: who is killed for want of memory is never us.
4. All memory locked, and heap kept in store: what we have stays, and suffices.
5. No garbage collection: it would walk all of memory at any time.

1 to 3 are inherited by threads made later and by forks: `prepare` comes before there are threads.
4 is not inherited by a fork, so `lock` comes after the last one, and 5 (`settle`) when all that
lives long has been made.

Each returns what could not be had, a line each: fatal for swap, worth saying otherwise.
"""

import atexit
import ctypes
import gc
import logging
import logging.handlers
import os
import queue
import re
import signal
import stat
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

from zramd import heap
from zramd.errors import ServerFailed

_PR_SET_IO_FLUSHER: Final = 57
_MCL_CURRENT_FUTURE_ONFAULT: Final = 1 | 2 | 4
_MADV_POPULATE_READ: Final = 22
_MADV_POPULATE_WRITE: Final = 23

_THREAD_STACK: Final = 512 << 10
"""All of a stack is locked. lz4 dies with less than 272 KiB."""

_HEAP_RESERVE: Final = 4 << 20
"""What requests pass through: 64 in flight of the kernel's size, 64 KiB or less when it swaps."""

_PRIORITY: Final = 1
"""The lowest real-time priority: any will do for the reserve, and nobody else's is disturbed."""

_libc = ctypes.CDLL(None, use_errno=True)


def prepare() -> list[str]:
    """Moves 1 to 3."""
    missing = []
    if _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) != 0:
        missing.append(
            f"PR_SET_IO_FLUSHER: {_last_error()} (it takes CAP_SYS_RESOURCE, and Linux 5.6)"
        )
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(_PRIORITY))
    except OSError as error:
        missing.append(
            f"a real-time class: {error.strerror} (it takes CAP_SYS_NICE, or RLIMIT_RTPRIO)"
        )
    try:
        Path("/proc/self/oom_score_adj").write_text("-1000")
    except OSError as error:
        missing.append(f"oom_score_adj -1000: {error.strerror} (it takes CAP_SYS_RESOURCE)")
    threading.stack_size(_THREAD_STACK)
    return missing


def lock(heap_reserve: int = _HEAP_RESERVE) -> list[str]:
    """Move 4; 0 for a process that needs no more heap."""
    if heap_reserve:
        heap.keep(heap_reserve)
    _fault_in()
    # What is mapped later is locked as it is touched: a sparse arena is mapped larger than memory.
    if _libc.mlockall(_MCL_CURRENT_FUTURE_ONFAULT) != 0:
        return [f"mlockall: {_last_error()} (it takes CAP_IPC_LOCK, or RLIMIT_MEMLOCK unlimited)"]
    return []


def start_threads(executor: ThreadPoolExecutor, count: int) -> None:
    """Have all `count` threads of the executor now: one made later would need memory then.

    Raises ServerFailed.
    """
    together = threading.Barrier(count)
    try:
        started = [executor.submit(together.wait) for _ in range(count)]
    except RuntimeError as error:
        together.abort()  # or those that there are would wait for ever
        raise ServerFailed(f"no threads can be made: {error}", hint="raise its limit") from error
    for thread in started:
        thread.result()


def log_beside() -> None:
    """Have a thread of its own wait for where the log goes: whoever reads our stderr, or a file in
    a tmpfs, may be on our swap."""
    root = logging.getLogger()
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    writer = logging.handlers.QueueListener(lines, *root.handlers)
    root.handlers[:] = [logging.handlers.QueueHandler(lines)]
    # It is there at the end, too, and is not to take a signal that the main thread has blocked.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    writer.start()
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    atexit.register(writer.stop)


def settle() -> None:
    """Move 5; and what has come since `lock` is faulted in.

    From here on nothing waits for whoever reads our stderr, either: journald may be on our swap.
    """
    _fault_in()
    gc.collect()
    gc.freeze()
    gc.disable()
    mode = os.fstat(2).st_mode
    if stat.S_ISSOCK(mode) or stat.S_ISFIFO(mode):
        os.set_blocking(2, False)
        logging.raiseExceptions = False


def lacking(process: Path) -> list[str]:
    """What another process, /proc/PID, has not of moves 1 to 4.

    Raises OSError or ValueError where that cannot be told.
    """
    lacks = []
    sizes = dict(_SIZE.findall((process / "status").read_text()))
    if not {"VmSize", "VmLck"} <= sizes.keys():
        raise ValueError(f"{process}/status is not of the form that is known")
    # Both count whole mappings, touched or not, so after mlockall they differ by the kernel's own
    # (vdso, vvar: 32 KiB on x86-64), and after a mlock of the arena alone by all else. VmRSS is no
    # measure: it sinks to what is locked as the rest is swapped, and is inexact on many CPUs.
    if int(sizes["VmSize"]) - int(sizes["VmLck"]) > _UNLOCKABLE_KIB:
        lacks.append("locked memory")
    if (process / "oom_score_adj").read_text().strip() != "-1000":
        lacks.append("oom_score_adj -1000")
    threads = [
        (task / "stat").read_text().rpartition(")")[2].split()
        for task in (process / "task").iterdir()
    ]
    if any(len(thread) <= _POLICY for thread in threads):
        raise ValueError(f"{process}/task/*/stat are not of the form that is known")
    if not all(int(thread[_FLAGS]) & _PF_MEMALLOC_NOIO for thread in threads):
        lacks.append("PR_SET_IO_FLUSHER")
    if not all(int(thread[_POLICY]) in (os.SCHED_FIFO, os.SCHED_RR) for thread in threads):
        lacks.append("a real-time class")
    return lacks


_SIZE: Final = re.compile(r"^(VmSize|VmLck):\s+(\d+) kB", re.MULTILINE)
_UNLOCKABLE_KIB: Final = 1024
_PF_MEMALLOC_NOIO: Final = 0x00080000
"""In a task's flags: what PR_SET_IO_FLUSHER does to it."""
_FLAGS: Final = 6
_POLICY: Final = 38
"""Where these two stand in /proc/PID/stat, after the name."""


def _last_error() -> str:
    return os.strerror(ctypes.get_errno())


def share() -> None:
    """To be called, after `lock`, by who will fork children that go on with what it has. That is
    in memory, and a child has it copied only page by page, when one of them writes.

    Of 18 MiB 10 are never written. The first 400 requests copy one more, the next 2000 a quarter,
    and then there is no more to copy.
    """
    _shared[:] = [(start, stop) for start, stop, mode, _ in _mappings() if "w" in mode]


_shared: list[tuple[int, int]] = []
"""Addresses, ascending."""


def _mappings() -> list[tuple[int, int, str, str]]:
    """Start, end, mode and name of each mapping of ours."""
    found = _MAPPING.findall(Path("/proc/self/maps").read_text())
    return [(int(first, 16), int(last, 16), mode, name) for first, last, mode, name in found]


def _fault_in() -> None:
    """Have all of us in memory: code, data, heap, stacks; but for an arena, our only shared memory,
    which knows itself what of it is to be there, and for nbdkit's 192 MiB of zeros that it never
    touches."""
    for start, stop, mode, name in _mappings():
        unused = not name and stop - start > _LARGE
        if "r" not in mode or unused or mode.endswith("s") or name.startswith("[v"):
            continue
        advice = _MADV_POPULATE_WRITE if "w" in mode else _MADV_POPULATE_READ
        for first, last in _not_shared(start, stop):
            _libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


def _not_shared(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of an address range that `share` has not seen."""
    for first, last in _shared:
        if first < stop and last > start:
            if start < first:
                yield start, first
            start = last
    if start < stop:
        yield start, stop


_MAPPING: Final = re.compile(r"^(\w+)-(\w+) (\S+) \S+ \S+ \S+ *(.*)$", re.MULTILINE)
_LARGE: Final = 64 << 20
"""What nobody has as data, and more than a stack of ours."""

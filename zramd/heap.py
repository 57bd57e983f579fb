"""What malloc keeps of memory that is free, given back to the system.

A device's pages lie in its arena and go with it. What passes through on its way there does not:
requests, replies and compressed pages are objects on the C library's heap, and glibc keeps what is
freed of them, per thread, for later. After 269 MiB in requests of up to 32 MiB `zramd serve` kept
38 MiB after a reset, with the two functions here 2.5.

`keep` is for the opposite, a process that must not ask the system for memory while it works.

All do nothing where the C library has no such functions (musl).
"""

import ctypes
from typing import Final

_M_TRIM_THRESHOLD: Final = -1  # these three: malloc.h
_M_MMAP_THRESHOLD: Final = -3
_M_ARENA_MAX: Final = -8

_libc = ctypes.CDLL(None)


def use_one_arena() -> None:
    """Have all threads share one heap: of the others malloc_trim gives back what is free in their
    middle, but not their top. To be called before there are threads. They compress and decompress
    outside of malloc, so what it costs them drowned in the noise (docs/performance.md)."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Give back what is free, unless it is to be kept. 50 us, and 15 ms where that is 80 MiB."""
    if not _pins and hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(ctypes.c_size_t(0))


def keep(size: int) -> None:
    """Have `size` bytes of heap for buffers and as much for objects in memory, and never give it
    back by itself.

    Else buffers from 128 KiB on come from the system one by one, as glibc has it, and CPython
    returns each MiB of small objects that runs empty: 30 page faults in 1000 requests, and none so.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_MMAP_THRESHOLD, _NEVER)
        _libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
        _libc.malloc.restype = ctypes.c_void_p
        reserve = ctypes.c_void_p(_libc.malloc(ctypes.c_size_t(size)))
        ctypes.memset(reserve, 1, size)
        _libc.free(reserve)
    objects = [bytes(_SMALL) for _ in range(size // (_SMALL + 36))]
    _pins[:] = objects[:: _ARENA // 2 // (_SMALL + 36)]


_NEVER: Final = 1 << 30
_SMALL: Final = 460
_ARENA: Final = 1 << 20
_pins: list[bytes] = []
"""At least one object in each of pymalloc's arenas, which stays as long as it holds one."""

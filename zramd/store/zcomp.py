"""The compressors: lz4, lz4hc, zstd and deflate, each with levels.

An `Algorithm` is a name and a level, as a user types it: `lz4`, `zstd(level=3)`. `Comp` makes and
keeps its streams: one per thread, because zstd's contexts must not be shared; all of them release
the GIL while they work. A stream is a pair of functions,

    compress(page) -> bytes                 may come out longer than the page
    decompress(blob, size) -> bytes         raises one of FAILURES; `size` is what is expected:
                                            from a damaged blob, fewer or more bytes may come

Levels and defaults are those of the kernel's zram backends where it has them (backend_zstd.c,
backend_lz4.c: level is the acceleration; backend_lz4hc.c; backend_deflate.c).
"""

import re
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import lz4.block
import zstandard

from zramd.errors import BadValue
from zramd.store import PAGE

Buffer: TypeAlias = bytes | bytearray | memoryview
Stream: TypeAlias = tuple[Callable[[Buffer], bytes], Callable[[Buffer, int], bytes]]


# The arguments below go by position: by keyword each call costs 0.1 us more, of 6 for lz4.


def _lz4(level: int) -> Stream:
    compress = lz4.block.compress  # (source, mode, store_size, acceleration)
    if level == 1:
        return lambda page: compress(page, "default", False), lz4.block.decompress
    return lambda page: compress(page, "fast", False, level), lz4.block.decompress


def _lz4hc(level: int) -> Stream:
    def compress(page: Buffer) -> bytes:
        blob: bytes = lz4.block.compress(
            page, "high_compression", store_size=False, compression=level
        )
        return blob

    return compress, lz4.block.decompress


def _zstd(level: int) -> Stream:
    # Magic, size, checksum and dictionary id say nothing that a slot does not know: 4 to 11 bytes
    # saved on every page.
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level,
        source_size=PAGE,
        format=zstandard.FORMAT_ZSTD1_MAGICLESS,
        write_content_size=False,
        write_checksum=False,
        write_dict_id=False,
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    decompressor = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    return compressor.compress, decompressor.decompress


def _deflate(level: int) -> Stream:
    # A raw stream; a window of 2^12 bytes is all that a page can use.
    return (
        lambda page: zlib.compress(page, level, -12),
        lambda blob, size: zlib.decompress(blob, -12, size),
    )


@dataclass(frozen=True, slots=True)
class _Backend:
    make: Callable[[int], Stream]
    levels: range
    default: int
    at_once: tuple[tuple[int, int], ...]
    """(up to which level, pages): see `Comp.at_once`; none beyond these levels."""


# A page of text takes lz4 10 us, zstd up to level 3 20 to 50 us and up to level 9 150 us, deflate
# 80 to 130 us, lz4hc up to level 9 50 us; zstd(level=19) takes 0.9 ms. Of noise with two values it
# takes 2.7 ms, and lz4hc and deflate(level=9) 1 ms.
_BACKENDS: Final = {
    "lz4": _Backend(_lz4, range(1, 65538), 1, ((65537, 32),)),
    "lz4hc": _Backend(_lz4hc, range(1, 13), 9, ((9, 1),)),
    "zstd": _Backend(_zstd, range(-7, 23), 3, ((3, 8), (9, 1))),
    "deflate": _Backend(_deflate, range(1, 10), 6, ((9, 1),)),
}

NAMES: Final = tuple(_BACKENDS)

FAILURES: Final[tuple[type[Exception], ...]] = (
    ValueError,
    zlib.error,
    lz4.block.LZ4BlockError,
    zstandard.ZstdError,
    MemoryError,  # zstd takes the word of a damaged frame for how much to allocate
)
"""What a stream's `decompress` raises for a blob that is none of its own."""


_ALGORITHM: Final = re.compile(r"\s*([\w-]+)\s*(?:\(\s*level\s*=\s*(-?\d{1,9})\s*\))?\s*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A compressor and its level. Raises BadValue for one that does not exist."""

    name: str
    level: int | None = None
    """None is the compressor's default."""

    def __post_init__(self) -> None:
        backend = _BACKENDS.get(self.name)
        if backend is None:
            raise BadValue(
                f"there is no algorithm {self.name!r}",
                hint=f"choose one of {', '.join(NAMES)}, such as zstd or zstd(level=3)",
            )
        if self.level is not None and (self.level not in backend.levels or self.level == 0):
            raise BadValue(
                f"{self.name} has no level {self.level}",
                hint=f"its levels are {backend.levels.start} to {backend.levels.stop - 1},"
                f" the default is {backend.default}",
            )

    @classmethod
    def parse(cls, text: str) -> "Algorithm":
        """`NAME` or `NAME(level=N)`, as zram-generator spells it. Raises BadValue."""
        match = _ALGORITHM.fullmatch(text)
        if match is None:
            raise BadValue(
                f"{text!r} is not an algorithm",
                hint=f"write one of {', '.join(NAMES)}, or with a level: zstd(level=3)",
            )
        return cls(match[1], None if match[2] is None else int(match[2]))

    def __str__(self) -> str:
        return self.name if self.level is None else f"{self.name}(level={self.level})"


class Comp:
    """An algorithm's streams, one per thread that asks."""

    def __init__(self, algorithm: Algorithm) -> None:
        backend = _BACKENDS[algorithm.name]
        self.algorithm = algorithm
        self._make = backend.make
        self._level = backend.default if algorithm.level is None else algorithm.level
        self.at_once = PAGE * next((n for most, n in backend.at_once if self._level <= most), 0)
        """Bytes that are compressed in about 0.3 ms, if that is not made hard for it: on an event
        loop others wait meanwhile, and to leave them to a thread costs 0.1 ms."""
        self._local: Any = threading.local()
        self.stream()  # what cannot work fails now, at init, not in the first write

    def stream(self) -> Stream:
        """(compress, decompress) of the calling thread."""
        try:
            stream: Stream = self._local.stream
        except AttributeError:
            stream = self._local.stream = self._make(self._level)
        return stream

    def close(self) -> None:
        """Drop the streams of all threads. None is in use, and none will be asked for."""
        self._local = threading.local()

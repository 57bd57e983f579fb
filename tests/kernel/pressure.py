"""A program that needs more memory than there is: it fills, touches, rewrites and verifies all of
it, again and again. Run in a guest by under_pressure.py; imports nothing but the standard library.

    pressure.py MIB PASSES

The pages are real (files of the system), cut up and numbered so that no two are the same; each pass
verifies every page and rewrites every second one, in order or (odd passes) far from in order. Says
on stdout what it did; ends with status 1, naming the page, when one is wrong.
"""

import mmap
import struct
import sys
import time
from pathlib import Path

PAGE = 4096
_CORPUS_PAGES = 512
_FILES = ("/usr/lib/python3.11", "/usr/lib/python3/dist-packages", "/usr/share/perl5")
_ZEROS = PAGE * 3 // 8  # what programs allocate is seldom full; lz4 makes 2.98 of it, zstd 4.3
_JUMP = 1000003  # a prime, so all pages in another order; neighbours lie far apart
_STRIDE = 193  # coprime to the corpus: neighbours in memory are not neighbours in a file


def corpus() -> list[bytes]:
    """2 MiB of the system's files, each page ending in zeros."""
    pages: list[bytes] = []
    for directory in _FILES:
        for file in sorted(Path(directory).rglob("*.py")):
            content = file.read_bytes()
            for at in range(0, len(content) - PAGE, PAGE):
                pages.append(content[at : at + PAGE - _ZEROS] + bytes(_ZEROS))
                if len(pages) == _CORPUS_PAGES:
                    return pages
    raise SystemExit("there are not enough files to make data of")


class Memory:
    """`count` pages of anonymous memory, each with a number and a version."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._corpus = corpus()
        self._map = mmap.mmap(-1, count * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._versions = bytearray(count)

    def _expected(self, number: int) -> bytes:
        version = self._versions[number]
        body = self._corpus[(number * _STRIDE + version * 31) % _CORPUS_PAGES]
        return struct.pack("<QQ", number, version) + body[16:]

    def write(self, number: int) -> None:
        self._versions[number] += 1
        self._map[number * PAGE : (number + 1) * PAGE] = self._expected(number)

    def close(self) -> None:
        self._map.close()

    def verify(self, number: int) -> None:
        if self._map[number * PAGE : (number + 1) * PAGE] != self._expected(number):
            print(f"WRONG page {number}", flush=True)
            raise SystemExit(1)


def main() -> None:
    count, passes = int(sys.argv[1]) * 256, int(sys.argv[2])
    memory = Memory(count)
    began = time.monotonic()
    for number in range(count):
        memory.write(number)
    _say("filled", count, began)
    for turn in range(passes):
        began = time.monotonic()
        for number in range(count):
            if turn % 2:
                number = number * _JUMP % count
            memory.verify(number)
            if (number + turn) % 2:
                memory.write(number)
        _say(f"pass {turn}", count, began)
    for number in range(count):
        memory.verify(number)
    print("all right", flush=True)


def _say(what: str, pages: int, began: float) -> None:
    seconds = time.monotonic() - began
    print(f"{what}: {pages / 256 / seconds:.2f} MiB/s, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    main()

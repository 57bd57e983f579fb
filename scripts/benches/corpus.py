"""The data: this machine's own, in the mix below, in an order that is the same on every run.

| kind | share | what |
|---|---|---|
| memory | 40 % | private pages of programs that run; where those are few, a type checker's |
| executables | 25 % | programs and libraries |
| text | 15 % | sources, documents, configuration, logs |
| databases | 10 % | SQLite with this machine's files; locales, bytecode, package lists, caches |
| media | 10 % | what is compressed already: archives, packages, pictures, manual pages |

No program and no file gives more than a sixteenth of its kind (but for the type checker), so one
large one does not stand for all. What a machine lacks of one kind is made up by the others, and
what all of them lack by the beginning again; the shares as they are stand in the report. The kinds
alternate in blocks of 256 KiB, so that the beginning of the corpus is mixed as the whole.
"""

import itertools
import os
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import lz4.block

PAGE = 4096
ROOT = Path(__file__).resolve().parents[2]
BLOCK = 256 << 10
MIX = {"memory": 40, "executables": 25, "text": 15, "databases": 10, "media": 10}

_TEXT = (
    *(".py", ".h", ".c", ".hpp", ".pl", ".pm", ".sh", ".txt", ".md", ".rst", ".html", ".xml"),
    *(".json", ".conf", ".log", ".css", ".js", ".tcl", ".desktop", ".po", ".svg", ".yaml"),
)
_DATABASES = (".db", ".sqlite", ".mdb", ".cache", ".bin", ".dat", ".pyc", ".mo", ".list")
_MEDIA = (
    *(".deb", ".rpm", ".whl", ".gz", ".xz", ".bz2", ".zst", ".zip", ".jar"),
    *(".png", ".jpg", ".webp", ".ogg", ".mp3", ".mp4", ".woff2"),
)


def make_corpus(size: int) -> tuple[bytes, dict[str, float]]:
    """`size` bytes, a multiple of BLOCK, and the share of each kind in percent."""
    sources: dict[str, Callable[[int], Iterator[bytes]]] = {
        "memory": memory,
        "executables": executables,
        "text": lambda most: files(("/usr/lib", "/usr/share", "/etc", "/var/log"), _TEXT, most),
        "databases": databases,
        "media": lambda most: files(("/var/cache", "/usr/share", "/usr/lib"), _MEDIA, most),
    }
    found: dict[str, bytearray] = {kind: bytearray() for kind in MIX}
    rest = {kind: source(max(BLOCK, size * MIX[kind] // 1600)) for kind, source in sources.items()}
    wanted = {kind: size * share // 100 // BLOCK * BLOCK for kind, share in MIX.items()}
    wanted["executables"] += size - sum(wanted.values())
    for kind, amount in wanted.items():
        _take(found[kind], amount, rest[kind])
    for kind in ("executables", "text", "media", "databases", "memory"):
        lacking = size - sum(map(len, found.values()))
        _take(found[kind], len(found[kind]) + lacking, rest[kind])
    total = sum(map(len, found.values()))
    if not total:
        raise SystemExit("bench: there is nothing to read in /usr")
    shares = {kind: round(100 * len(data) / total, 1) for kind, data in found.items()}
    corpus = _mixed(found)
    return (corpus * (size // len(corpus) + 1))[:size], shares


def compressed_share(corpus: bytes) -> float:
    """What lz4 leaves of its pages, on average; of every 16th."""
    pages = [corpus[at : at + PAGE] for at in range(0, len(corpus), 16 * PAGE)]
    sizes = [min(PAGE, len(lz4.block.compress(page, store_size=False))) for page in pages]
    return sum(sizes) / (PAGE * len(pages))


def _take(found: bytearray, amount: int, pieces: Iterator[bytes]) -> None:
    while len(found) < amount:
        piece = next(pieces, None)
        if piece is None:
            break
        found += piece[: amount - len(found)]
    del found[len(found) // BLOCK * BLOCK :]


def _mixed(found: dict[str, bytearray]) -> bytes:
    """Blocks of all kinds, each kind's spread evenly."""
    blocks = []
    for kind, data in found.items():
        count = len(data) // BLOCK
        blocks += [((n + 0.5) / count, kind, n) for n in range(count)]
    return b"".join(
        memoryview(found[kind])[n * BLOCK : (n + 1) * BLOCK] for _, kind, n in sorted(blocks)
    )


# Files


def walk(folders: tuple[str, ...]) -> Iterator[tuple[Path, os.stat_result]]:
    """Regular files, each by one name, in order."""
    for folder in folders:
        for place, below, names in os.walk(folder):
            below.sort()
            for name in sorted(names):
                path = Path(place, name)
                try:
                    status = path.lstat()
                except OSError:
                    continue
                if stat.S_ISREG(status.st_mode):
                    yield path, status


def files(folders: tuple[str, ...], endings: tuple[str, ...], most: int) -> Iterator[bytes]:
    for path, status in walk(folders):
        if status.st_size and path.name.endswith(endings):
            yield _read(path, most)


def executables(most: int) -> Iterator[bytes]:
    for path, status in walk(("/usr/bin", "/usr/lib")):
        if status.st_size >= PAGE and _read(path, 4) == b"\x7fELF":
            yield _read(path, most)


def _read(path: Path, most: int) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError:
        return b""


def databases(most: int) -> Iterator[bytes]:
    """A quarter of the share is SQLite, as far as there are files to list."""
    yield _listing(4 * most)
    places = ("/var/lib", "/usr/lib/locale", "/usr/lib/udev", "/usr/lib/python3", "/usr/share")
    yield from files((*places, "/var/cache", "/usr/lib"), (*_DATABASES, "locale-archive"), most)


def _listing(most: int) -> bytes:
    """A database of this machine's files, with an index, of at most so many bytes."""
    rows = (
        (str(path.parent), path.name, status.st_size, status.st_mtime, status.st_mode)
        for path, status in walk(("/usr", "/etc"))
    )
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE files (folder, name, size, modified, mode)")
        database.execute("CREATE INDEX by_name ON files (name, size)")
        insert = "INSERT INTO files VALUES (?, ?, ?, ?, ?)"
        database.executemany(insert, itertools.islice(rows, most // 250))
        return database.serialize()[:most]


# Memory


def memory(most: int) -> Iterator[bytes]:
    """Resident private writable memory of what runs, without our own; then a type checker's."""
    for process in sorted(int(path.name) for path in Path("/proc").glob("[0-9]*")):
        if process != os.getpid():
            yield from _up_to(most, pages_of(process))
    with type_checker() as process:
        yield from pages_of(process)


def _up_to(most: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
    for piece in pieces:
        yield piece
        most -= len(piece)
        if most <= 0:
            return


@contextmanager
def type_checker() -> Iterator[int]:
    """A program with a few hundred MiB of real heap, idle while its memory is read."""
    how = ["--no-incremental", "--cache-dir=/dev/null", "zramd"]
    check = f"from mypy import api; api.run({how})"
    script = f"import sys; {check}; print(); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process:
        process.stdout.readline()
        yield process.pid
        process.stdin.close()


def pages_of(process: int) -> Iterator[bytes]:
    place = Path(f"/proc/{process}")
    try:
        regions = (place / "maps").read_text().splitlines()
        with (
            (place / "mem").open("rb", buffering=0) as mem,
            (place / "pagemap").open("rb", buffering=0) as pagemap,
        ):
            for region in regions:
                bounds, permissions = region.split()[:2]
                if permissions == "rw-p":
                    start, stop = (int(bound, 16) for bound in bounds.split("-"))
                    yield from resident(mem, pagemap, start, stop)
    except (OSError, ValueError):
        return  # it ended, or is not ours to read


def resident(mem: Any, pagemap: Any, start: int, stop: int) -> Iterator[bytes]:
    """Pages that are present; reading the others would make up zeros."""
    for at in range(start, stop, 64 * PAGE):
        count = min(64, (stop - at) // PAGE)
        pagemap.seek(at // PAGE * 8)
        present = pagemap.read(count * 8)[7::8]
        for page, top in enumerate(present):
            if top & 0x80:
                mem.seek(at + page * PAGE)
                yield mem.read(PAGE)

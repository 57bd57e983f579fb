"""Ratios of zramd to bare codecs and to nbdkit's memory plugin, on real data, on this machine.

Shared machines are noisy, so nothing is quoted alone: what is compared runs alternately, round by
round, each round gives one ratio, and the table shows their median, minimum and maximum.

The corpus is half executables and libraries, and half the private memory of running programs, read
from /proc: of a type checker that has just checked zramd, and of whatever else runs that we may
read. What is missing of the second half is made up by the first, and the shares are told. The
clients' data is the corpus too: devices are filled with it before they are read, and fio writes
buffers that compress as well as it does.

fio's client runs on the last CPU and the server under test on the first, where there are two.

Some rows are no ratios of zramd to another: the gate's share of a write is that of a write with
the gate to one without, and what recoverability costs is one with the store as it is to one that
publishes as it likes; a drain's lateness is in milliseconds, a recovery in GiB of stored pages a
second, a pause in seconds, an idle server's memory in MiB, one figure each time.
"""

import argparse
import json
import mmap
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import lz4.block

from tests.nbd.hostile import memory_per_idle_connection
from zramd.device import Zram
from zramd.errors import DeviceBusy, NotInitialised
from zramd.gate import Gate, Record
from zramd.nbd.client import negotiate
from zramd.nbd.wire import (
    CLIENT_FLAGS,
    NBD_CMD_READ,
    NBD_CMD_WRITE,
    NBD_OPT_STRUCTURED_REPLY,
    OPTION_REPLY,
    REPLY_DATA,
    SIMPLE_REPLY,
    STRUCTURED_REPLY,
    pack_option,
    pack_request,
)
from zramd.opener import Opener
from zramd.store import PAGE
from zramd.store.arena import Arena
from zramd.store.pages import Pages
from zramd.store.recovery import recover
from zramd.store.zcomp import Algorithm, Comp

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
REQUEST = 128 << 10  # what the kernel sends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer, shorter rounds (a minute)")
    parser.add_argument("--json", type=Path, help="write all rounds to this file, too")
    options = parser.parse_args()
    rounds, seconds, mib = (3, 2, 128) if options.quick else (9, 4, 512)

    corpus, shares = make_corpus(mib * MIB)
    print(f"corpus: {len(corpus) // MIB} MiB: {shares}")
    results = {}
    for measure in (
        *(measure_store, measure_overhead, measure_reset, measure_recovery),
        *(measure_saving, measure_idle, measure_connections, measure_servers),
    ):
        for name, target, ratios in measure(corpus, rounds, seconds):
            results[name] = {"target": target, "ratios": ratios}
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def table(results: dict[str, Any]) -> str:
    lines = ["| measure | target | median | min | max |", "|---|---|---|---|---|"]
    for name, result in results.items():
        ratios = result["ratios"]
        figures = (statistics.median(ratios), min(ratios), max(ratios))
        cells = [name, result["target"], *(f"{figure:.3f}" for figure in figures)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# The corpus


def make_corpus(size: int) -> tuple[bytes, str]:
    """`size` bytes of this machine's real data, and what it consists of."""
    with type_checker():
        memory = take(size // 2, memory_of_programs())
    files = take(size - len(memory), executables())
    corpus = memory + files
    share = 100 * len(memory) // len(corpus)
    return corpus, f"{share} % memory of running programs, {100 - share} % executables"


@contextmanager
def type_checker() -> Iterator[None]:
    """A program with a few hundred MiB of real heap, idle while its memory is read."""
    check = "from mypy import api; api.run(['--no-incremental', 'zramd'])"
    script = f"import sys; {check}; print(); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process:
        process.stdout.readline()
        yield
        process.stdin.close()


def take(size: int, pieces: Iterator[bytes]) -> bytes:
    found = bytearray()
    for piece in pieces:
        found += piece[: len(piece) // PAGE * PAGE]
        if len(found) >= size:
            break
    return bytes(found[:size])


def executables() -> Iterator[bytes]:
    for folder in ("/usr/bin", "/usr/lib"):
        for path in sorted(Path(folder).rglob("*")):
            if path.is_symlink() or not path.is_file() or path.stat().st_size > 64 * MIB:
                continue
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield b"\x7fELF" + file.read()


def memory_of_programs() -> Iterator[bytes]:
    """Resident private writable memory, without our own."""
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        if int(process.name) == os.getpid():
            continue
        try:
            regions = (process / "maps").read_text().splitlines()
            with (
                (process / "mem").open("rb", buffering=0) as mem,
                (process / "pagemap").open("rb", buffering=0) as pagemap,
            ):
                for region in regions:
                    bounds, permissions = region.split()[:2]
                    if permissions != "rw-p":
                        continue
                    start, stop = (int(bound, 16) for bound in bounds.split("-"))
                    yield from resident(mem, pagemap, start, stop)
        except (OSError, ValueError):
            continue  # it ended, or is not ours to read


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


# The store alone


def measure_store(
    corpus: bytes, rounds: int, _seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    part = corpus[: min(len(corpus), 128 * MIB)]
    requests = [(at, part[at : at + REQUEST]) for at in range(0, len(part), REQUEST)]
    pages = [part[at : at + PAGE] for at in range(0, len(part), PAGE)]
    compress, decompress = lz4.block.compress, lz4.block.decompress
    writes, reads = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        blobs = [compress(page, store_size=False) for page in pages]
        bare_write = time.perf_counter() - started
        started = time.perf_counter()
        for blob in blobs:
            decompress(blob, uncompressed_size=PAGE)
        bare_read = time.perf_counter() - started

        store = Pages(Arena(len(part), "lz4"), Comp(Algorithm("lz4")))
        started = time.perf_counter()
        for at, data in requests:
            store.write(at, data)
        writes.append(bare_write / (time.perf_counter() - started))
        started = time.perf_counter()
        for at, data in requests:
            store.read(at, len(data))
        reads.append(bare_read / (time.perf_counter() - started))
        store.close()
    yield "store, lz4, 128 KiB writes / bare lz4 compress loop", ">= 0.65", writes
    yield "store, lz4, 128 KiB reads / bare lz4 decompress loop", ">= 0.50", reads


def measure_overhead(
    corpus: bytes, _rounds: int, _seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    for name in ("lz4", "zstd"):
        store = Pages(Arena(len(corpus), name), Comp(Algorithm(name)))
        store.write(0, corpus)
        overhead = store.arena.used / store.counters.compressed_bytes
        ratio = store.counters.pages * PAGE / store.arena.used
        store.close()
        yield f"mem_used_total / compr_data_size, {name}", "<= 1.04", [overhead]
        yield f"data / mem_used_total, {name}", "", [ratio]


# The gate and the reset

GIB = 1 << 30


def measure_reset(
    corpus: bytes, rounds: int, _seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    part = corpus[: 32 * MIB]
    shares = [gate_share(part) for _ in range(rounds)]
    yield "store, lz4, 4 KiB writes, with the gate / without", "<= 1.05", shares

    what = "forced reset under load, {}: ms from the last request's end to the drain's"
    for load, spins in (("6 threads", 0), ("6 threads and one that spins on EIO", 1)):
        yield what.format(load), "<= 10 ms", lateness(corpus[: 64 * MIB], 5 * rounds, spins)

    stored = min(2 * len(corpus), GIB)
    yield (
        f"reset of 8 GiB with {stored // MIB} MiB stored / munmap and close of as much",
        "<= 2.0",
        [full_reset(stored) for _ in range(rounds // 3 + 1)],
    )
    yield (
        "reset of an empty 30 GiB device / of an empty 1 GiB device",
        "<= 2.0",
        [empty_reset(30 * GIB, GIB) for _ in range(rounds)],
    )


def gate_share(part: bytes) -> float:
    """1 + a pass through the gate / a write of one page.

    The pass is timed alone: it is about 1 % of the write, and the difference of two times of
    writes swings by more than that.
    """
    gate = Gate()
    gate.open()
    passes = range(100_000)
    started = time.perf_counter()
    for _ in passes:
        pass
    empty = time.perf_counter() - started
    started = time.perf_counter()
    for _ in passes:
        record = gate.enter("bench")
        try:
            pass
        finally:
            gate.leave(record)
    one_pass = (time.perf_counter() - started - empty) / len(passes)

    pages = [(at, part[at : at + PAGE]) for at in range(0, len(part), PAGE)]
    store = Pages(Arena(len(part), "lz4"), Comp(Algorithm("lz4")))
    store.write(0, part)  # fresh memory's page faults would make the share look smaller
    started = time.perf_counter()
    for at, page in pages:
        store.write(at, page)
    one_write = (time.perf_counter() - started) / len(pages)
    store.close()
    return 1 + one_pass / one_write


class Stamps:
    """Notes when admitted requests end and when a drain begins and ends, of one device's gate."""

    def __init__(self, gate: Gate) -> None:
        self.last_end = self.begun = self.ended = 0.0
        self._inside: set[Record] = set()
        self._enter, self._leave, self._drain = gate.enter, gate.leave, gate.drain
        wrapped: Any = gate
        wrapped.enter, wrapped.leave, wrapped.drain = self.enter, self.leave, self.drain

    def enter(self, who: str) -> Record:
        record = self._enter(who)
        self._inside.add(record)
        return record

    def leave(self, record: Record) -> None:
        if record in self._inside:  # one that is refused leaves, too
            self._inside.remove(record)
            self.last_end = time.perf_counter()
        self._leave(record)

    def drain(self) -> None:
        self.begun = time.perf_counter()
        self._drain()
        self.ended = time.perf_counter()

    def late(self) -> float:
        """Milliseconds for which the drain went on with nobody inside."""
        return 1000 * (self.ended - max(self.begun, self.last_end))


def lateness(data: bytes, resets: int, spins: int) -> list[float]:
    """Per forced reset: the milliseconds its drain takes beyond the last request's end.

    Four threads read and write 4 KiB and two write 128 KiB. What is refused opens anew; each of
    `spins` more threads goes on and on asking a closed opener instead, as a server's loop does
    that answers EIO.
    """
    zram = Zram("bench")
    stamps = Stamps(zram._gate)
    done = threading.Event()

    def small(opener: Opener, at: int) -> None:
        opener.write(at, data[at : at + PAGE])
        opener.read(at, PAGE)

    def large(opener: Opener, at: int) -> None:
        at = at // REQUEST * REQUEST
        opener.write(at, data[at : at + REQUEST])

    def work(ask: Callable[[Opener, int], None], at: int) -> None:
        while not done.is_set():
            try:
                opener = zram.open("bench")
            except (NotInitialised, DeviceBusy):
                time.sleep(0.001)
                continue
            with suppress(NotInitialised):
                while not done.is_set():
                    at = (at + 37 * PAGE) % len(data)
                    ask(opener, at)
            opener.close()

    def spin(opener: Opener) -> None:
        while not done.is_set():
            with suppress(NotInitialised):
                opener.read(0, PAGE)

    zram.init(len(data))
    closed = zram.open("bench")
    zram.reset(force=True)
    threads = [threading.Thread(target=work, args=(small, n * 7 * MIB)) for n in range(4)]
    threads += [threading.Thread(target=work, args=(large, n * 11 * MIB)) for n in range(2)]
    threads += [threading.Thread(target=spin, args=(closed,)) for _ in range(spins)]
    for thread in threads:
        thread.start()
    late = []
    try:
        for _ in range(resets):
            zram.init(len(data))
            time.sleep(0.05)
            zram.reset(force=True)
            late.append(stamps.late())
    finally:
        done.set()
        for thread in threads:
            thread.join()
        zram.close()
    return late


def full_reset(stored: int) -> float:
    """The reset of a device of 8 GiB that stores so many bytes / unmapping and closing a memfd of
    the same size, with as many bytes touched."""
    noise = os.urandom(MIB)
    zram = Zram("bench")
    zram.init(8 * GIB)
    opener = zram.open("bench")
    for at in range(0, stored, MIB):
        opener.write(at, noise)
    meta = zram._meta
    assert meta is not None
    size, used = meta.arena.size, meta.arena.used
    started = time.perf_counter()
    zram.reset(force=True)
    ours = time.perf_counter() - started

    fd = os.memfd_create("bench")
    os.ftruncate(fd, size)
    bare = mmap.mmap(fd, size)
    bare.madvise(mmap.MADV_NOHUGEPAGE)
    for at in range(0, used - MIB, MIB):
        bare[at : at + MIB] = noise
    started = time.perf_counter()
    bare.close()  # unmaps
    os.close(fd)  # and this frees
    return ours / (time.perf_counter() - started)


def empty_reset(one: int, other: int) -> float:
    """The time of a reset of an empty device of one size / of another; medians of 20 in turn."""
    zram = Zram("bench")

    def one_reset(disksize: int) -> float:
        zram.init(disksize)
        started = time.perf_counter()
        zram.reset()
        return time.perf_counter() - started

    times = [(one_reset(one), one_reset(other)) for _ in range(20)]
    ones, others = zip(*times, strict=True)
    return statistics.median(ones) / statistics.median(others)


# Recovery


class Careless(Pages):
    """A store that cannot be recovered: it publishes many words at once."""

    def _store_locked(self, start: int, olds: list[int], news: list[int]) -> None:
        self.arena.table[start : start + len(news)] = memoryview(array("Q", news))


def measure_recovery(
    corpus: bytes, rounds: int, _seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    for size, name in ((PAGE, "4 KiB"), (REQUEST, "128 KiB")):
        yield (
            f"a write of {name}, recoverable / not",
            "<= 1.05",
            [
                write_time(Pages, corpus, size) / write_time(Careless, corpus, size)
                for _ in range(rounds)
            ],
        )
    stored = 1 << 30
    arena = Arena(stored, "lz4")
    pages = Pages(arena, Comp(Algorithm("lz4")))
    for at in range(0, stored, MIB):
        from_ = at % (len(corpus) - MIB)
        pages.write(at, corpus[from_ : from_ + MIB])

    def speed() -> float:
        adopted = Arena.adopt(arena.fd)
        started = time.perf_counter()
        recovered, _ = recover(adopted, pages.comp)
        seconds = time.perf_counter() - started
        recovered.pool.close()
        adopted.close()
        return stored / (1 << 30) / seconds

    yield "recovery of 1 GiB stored, GiB a second", ">= 2", [speed() for _ in range(rounds)]
    pages.close()
    yield (
        "seconds from kill -9 until the next worker answers, 1 GiB stored",
        "<= 1",
        pauses(corpus, rounds),
    )


def measure_saving(
    corpus: bytes, rounds: int, seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    stored = 1 << 30
    pages = Pages(Arena(stored, "lz4"), Comp(Algorithm("lz4")))
    for at in range(0, stored, MIB):
        from_ = at % (len(corpus) - MIB)
        pages.write(at, corpus[from_ : from_ + MIB])

    def save() -> float:
        """Seconds that it takes; onto a tmpfs, which a memfd lies on."""
        file = os.memfd_create("snapshot")
        started = time.perf_counter()
        pages.save(file)
        took = time.perf_counter() - started
        os.close(file)
        return took

    yield (
        "a save to tmpfs, GiB of compressed data a second",
        ">= 1",
        [pages.counters.compressed_bytes / (1 << 30) / save() for _ in range(rounds)],
    )

    def written(beside: Callable[[], object]) -> float:
        """MiB a second that a thread writes meanwhile."""
        ended = threading.Event()
        amount = 0

        def write() -> None:
            nonlocal amount
            while not ended.is_set():
                at = amount % (min(stored, len(corpus)) - REQUEST)
                pages.write(at // PAGE * PAGE, corpus[at : at + REQUEST])
                amount += REQUEST

        thread = threading.Thread(target=write)
        started = time.perf_counter()
        thread.start()
        while time.perf_counter() < started + seconds:
            beside()
        ended.set()
        thread.join()
        return amount / MIB / (time.perf_counter() - started)

    yield (
        "writes of 128 KiB by a thread, during saves / alone",
        ">= 0.5",
        [written(save) / written(lambda: time.sleep(0.1)) for _ in range(rounds)],
    )
    pages.close()


def write_time(store: type[Pages], corpus: bytes, size: int) -> float:
    """Seconds of overwriting 32 MiB in pieces of `size`."""
    arena = Arena(64 * MIB, "lz4")
    pages = store(arena, Comp(Algorithm("lz4")))
    view = memoryview(corpus)[: 32 * MIB]
    try:
        for at in range(0, len(view), MIB):
            pages.write(at, view[at : at + MIB])
        started = time.perf_counter()
        for at in range(0, len(view), size):
            pages.write(at, view[at : at + size])
        return time.perf_counter() - started
    finally:
        pages.close()


def pauses(corpus: bytes, rounds: int) -> list[float]:
    """A client asks, the worker is killed, and it connects and asks again."""
    found = []
    size = 1 << 30
    tireless = (
        "from zramd.service import supervisor as s; s.PAUSES_S = (0.0,); s.MOST_DEATHS = 1 << 20;"
        " from zramd.cli import main; main()"
    )
    with tempfile.TemporaryDirectory(prefix="zramd-bench.") as name:
        folder = Path(name, "killed")
        lock = folder / "bench" / "lock"
        command = [sys.executable, "-c", tireless, *serve(folder, size)[3:]]
        with server(folder, command):
            path = folder / "bench" / "nbd.sock"
            with connected(path) as sock:
                for at in range(0, size, MIB):
                    from_ = at % (len(corpus) - MIB)
                    ask(sock, NBD_CMD_WRITE, at, MIB, corpus[from_ : from_ + MIB])
            for _ in range(rounds):
                workers = lock.read_text().split()
                os.kill(int(workers[1]), signal.SIGKILL)
                started = time.perf_counter()
                with connected(path) as sock:
                    ask(sock, NBD_CMD_READ, 0, PAGE)
                found.append(time.perf_counter() - started)
                while lock.read_text().split() == workers:  # it says so a moment later
                    time.sleep(0.01)
    return found


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        negotiate(sock, "")
        yield sock


def ask(sock: socket.socket, command: int, offset: int, length: int, data: bytes = b"") -> None:
    sock.sendall(pack_request(command, bytes(8), offset, length) + data)
    reply = sock.recv(SIMPLE_REPLY.size, socket.MSG_WAITALL)
    assert SIMPLE_REPLY.unpack(reply)[1] == 0
    if command == NBD_CMD_READ:
        sock.recv(length, socket.MSG_WAITALL)


# Servers


def measure_idle(
    _corpus: bytes, rounds: int, _seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    """A server that is hardened for a mount, and so locked, but reserves nothing."""

    def resident() -> float:
        with tempfile.TemporaryDirectory(prefix="zramd-bench.") as name:
            folder = Path(name, "idle")
            with server(folder, [*serve(folder, 1 << 30), "--for", "mount"]):
                processes = (folder / "bench" / "lock").read_text().split()
                time.sleep(1)  # the socket is there before all is faulted in
                supervisor, worker = (
                    Path(f"/proc/{process}/smaps_rollup").read_text() for process in processes
                )
        return (field(worker, "Rss") + field(supervisor, "Private_Dirty")) / 1024

    def field(status: str, name: str) -> int:
        return int(status.split(f"{name}:")[1].split()[0])

    what = "MiB resident of an idle `zramd serve`, its supervisor too, hardened, empty 1 GiB device"
    yield what, "<= 60", [resident() for _ in range(rounds)]


IDLE, BUSY = 200, 8


def measure_connections(
    corpus: bytes, rounds: int, seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    """The client of the first row is a bare socket, so that it is the server that is compared."""
    part = corpus[: 64 * MIB]
    with tempfile.TemporaryDirectory(prefix="zramd-bench.") as name:
        folder = Path(name)
        with server(folder / "memory", serve(folder, len(part))):
            path = folder / "memory" / "bench" / "nbd.sock"
            time.sleep(1)  # as above
            worker = int((path.parent / "lock").read_text().split()[1])
            kib = memory_per_idle_connection(worker, path) / 1024
            yield "KiB resident of each of 400 idle connections", "<= 128", [kib]
        with server(folder / "ours", serve(folder, len(part))) as ours:
            path = folder / "ours" / "bench" / "nbd.sock"
            with connected(path) as sock:
                for at in range(0, len(part), MIB):
                    ask(sock, NBD_CMD_WRITE, at, MIB, part[at : at + MIB])
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

            # A structured reply of zeros has no data, and another length.
            pages = [at for at in range(0, len(part), PAGE) if any(part[at : at + PAGE])]

            def reads(*, structured: bool) -> float:
                return reads_a_second(path, pages, seconds, structured=structured)

            yield (
                "4 KiB random reads, 32 in flight: structured replies / simple",
                ">= 0.90",
                [reads(structured=True) / reads(structured=False) for _ in range(rounds)],
            )

            def busy(idle: int) -> float:
                with ExitStack() as idlers:
                    for _ in range(idle):
                        sock = idlers.enter_context(connected(path))
                        ask(sock, NBD_CMD_READ, 0, PAGE)
                    return fio(ours, "randread", len(part), seconds, 50, jobs=BUSY)

            yield (
                f"4 KiB random reads by {BUSY} connections, with {IDLE} idle ones / alone",
                ">= 0.90",
                [busy(IDLE) / busy(0) for _ in range(rounds)],
            )
            os.sched_setaffinity(0, range(os.cpu_count() or 1))


def reads_a_second(path: Path, pages: list[int], seconds: int, *, structured: bool) -> float:
    """Of 4 KiB, at random, two times 16 at once."""
    choice = random.Random(1).choice
    batches = [
        b"".join(pack_request(NBD_CMD_READ, bytes(8), choice(pages), PAGE) for _ in range(16))
        for _ in range(256)
    ]
    head = STRUCTURED_REPLY.size + REPLY_DATA.size if structured else SIMPLE_REPLY.size
    replies = bytearray(16 * (head + PAGE))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        negotiate(Asking(sock) if structured else sock, "")  # type: ignore[arg-type]
        done = 0
        ends = time.perf_counter() + seconds
        started = time.perf_counter()
        sock.sendall(batches[0])
        while time.perf_counter() < ends:
            sock.sendall(batches[done % len(batches)])
            sock.recv_into(replies, len(replies), socket.MSG_WAITALL)
            done += 1
        return 16 * done / (time.perf_counter() - started)


class Asking:
    """A socket on which structured replies are asked for before anything else is."""

    def __init__(self, sock: socket.socket) -> None:
        self.family = sock.family
        self.recv = sock.recv
        self._sock = sock

    def sendall(self, data: bytes) -> None:
        """The client's flags come first, alone."""
        self._sock.sendall(data)
        if len(data) == CLIENT_FLAGS.size:
            self._sock.sendall(pack_option(NBD_OPT_STRUCTURED_REPLY))
            self._sock.recv(OPTION_REPLY.size, socket.MSG_WAITALL)


def measure_servers(
    corpus: bytes, rounds: int, seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    size = len(corpus)
    ratio = sum(len(lz4.block.compress(corpus[at : at + PAGE])) for at in range(0, size, PAGE * 64))
    percent = max(0, 100 - round(100 * ratio / (size / 64)))
    with tempfile.TemporaryDirectory(prefix="zramd-bench.") as name:
        folder = Path(name)
        image = folder / "corpus"
        image.write_bytes(corpus)
        memory = [nbdkit(), "memory", str(size)]
        plugin = [nbdkit(), "-t", "1", "python", str(ROOT / "nbd_plugin.py")]
        device = ["name=bench", f"disksize={size}"]
        with (
            server(folder / "ours", serve(folder, size)) as ours,
            server(folder / "mem", memory) as mem,
            server(folder / "zstd", [*memory, "allocator=zstd"]) as zstd,
            server(folder / "plug", plugin + device) as plug,
        ):
            for uri in (ours, mem, zstd, plug):
                subprocess.run(["nbdcopy", str(image), uri], check=True)

            def iops(uri: str, mode: str) -> float:
                return fio(uri, mode, size, seconds, percent)

            def compare(mode: str, one: str, other: str) -> list[float]:
                return [iops(one, mode) / iops(other, mode) for _ in range(rounds)]

            what = "4 KiB random {}, 16 in flight: {}"
            yield (
                what.format("writes", "zramd serve / nbdkit memory allocator=zstd"),
                ">= 4.0",
                compare("randwrite", ours, zstd),
            )
            yield (
                what.format("reads", "zramd serve / nbdkit memory (no compression)"),
                ">= 0.90",
                compare("randread", ours, mem),
            )
            for mode in ("randwrite", "randread"):
                yield (
                    what.format(mode.removeprefix("rand") + "s", "nbd_plugin.py / zramd serve"),
                    "",
                    compare(mode, plug, ours),
                )


def nbdkit() -> str:
    return shutil.which("nbdkit") or sys.exit("bench: nbdkit is not installed")


def serve(folder: Path, size: int) -> list[str]:
    return [sys.executable, "-m", "zramd.cli", "serve", "bench", "--disksize", str(size)]


@contextmanager
def server(folder: Path, command: list[str]) -> Iterator[str]:
    """Run one server pinned to the first CPU; gives its URI."""
    folder.mkdir()
    path = folder / "bench" / "nbd.sock"
    environment = os.environ | {"ZRAMD_RUNTIME_DIR": str(folder), "VIRTUAL_ENV": sys.prefix}
    if Path(command[0]).name == "nbdkit":
        path = folder / "socket"
        command = [command[0], "-f", "-U", str(path), *command[1:]]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command],
        env=environment,
        stderr=log,
    )
    try:
        wait_until(path.exists, process)
        yield f"nbd+unix:///?socket={path}"
    finally:
        process.terminate()
        process.wait()
        log.close()


def wait_until(ready: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 30
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"bench: {process.args!r} did not start")
        time.sleep(0.05)


def fio(uri: str, mode: str, size: int, seconds: int, percent: int, jobs: int = 1) -> float:
    """IOPS of one run; `jobs` connections."""
    command = (
        f"taskset -c {max(os.sched_getaffinity(0))} fio --name=bench --ioengine=nbd --uri={uri}"
        f" --rw={mode} --bs=4k --iodepth=16 --size={size} --norandommap"
        f" --time_based --runtime={seconds} --output-format=json"
        f" --buffer_compress_percentage={percent} --refill_buffers"
        f" --numjobs={jobs} --group_reporting"
    )
    done = subprocess.run(command.split(), check=True, capture_output=True, text=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job[mode.removeprefix("rand")]["iops"])


if __name__ == "__main__":
    main()

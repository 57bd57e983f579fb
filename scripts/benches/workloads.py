"""What is done with each peer, and what is read off: one run of a workload gives named figures.

Bulk copies the corpus, into a peer that has just been started, or out of one: nbdcopy for a server,
dd with direct I/O for a block device. Random 4 KiB requests are fio's, through its nbd engine or
libaio; `depth` is how many are in flight on each connection, and on a block device each job is
counted as a connection. fio makes up what it writes, so that it compresses as well as the corpus
does, page by page; but half of such a page is noise and half zeros, which costs a compressor less
than real data. What it reads is the corpus.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from scripts.benches import machine
from scripts.benches.machine import Failed, client
from scripts.benches.peers import Holds, Peer, Serve, Server, Still, connected
from scripts.benches.served import ask
from zramd.nbd.wire import NBD_CMD_TRIM

MIB = 1 << 20
GIB = 1 << 30
PAGE = 4096

Figures = dict[str, float]

RATE, SERVER_CPU, CLIENT_CPU = "MiB/s", "server CPU s/GiB", "client CPU s/GiB"
IOPS = "IOPS"
SERVER_REQUEST, CLIENT_REQUEST = "server CPU µs/request", "client CPU µs/request"
P50, P99, P999 = "p50 µs", "p99 µs", "p99.9 µs"
RAM, EMPTY, PER_BYTE = "RAM MiB", "RAM empty MiB", "RAM grown/stored"
COMPRESSED, SECONDS = "compressed MiB", "s"


@dataclass(frozen=True)
class Scale:
    """How much is done."""

    seconds: float
    """Of each fio job."""
    percent: int
    """What compression takes off a page of the corpus."""


class Workload(Protocol):
    @property
    def measure(self) -> str:
        """What the report calls it."""

    needs: Holds

    def fits(self, peer: Peer) -> bool:
        """Whether it can be done with this peer."""

    def run(self, peer: Peer, scale: Scale) -> Figures:
        """Do it once, with a peer that is ready for it."""


def size_name(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size >> 10} KiB"


def connections_name(connections: int) -> str:
    return "1 connection" if connections == 1 else f"{connections} connections"


# Bulk


@dataclass(frozen=True)
class Bulk:
    way: str
    """`in` or `out`."""
    request: int
    connections: int

    @property
    def measure(self) -> str:
        how = f"{size_name(self.request)}, {connections_name(self.connections)}"
        return f"bulk {self.way}, {how}"

    @property
    def needs(self) -> Holds:
        return Holds.NOTHING if self.way == "in" else Holds.CORPUS

    def fits(self, peer: Peer) -> bool:
        return self.connections == 1 or isinstance(peer, Server)

    def run(self, peer: Peer, scale: Scale) -> Figures:
        copying = peer.filling if self.way == "in" else peer.emptying
        seconds, ours, theirs, _ = _measured(peer, copying(self.request, self.connections))
        if self.way == "in":
            peer.holds = Holds.CORPUS
        gib = peer.size / GIB
        return {RATE: peer.size / MIB / seconds, SERVER_CPU: ours / gib, CLIENT_CPU: theirs / gib}


@dataclass(frozen=True)
class Weight:
    """The RAM of a whole server before and after it was filled."""

    measure: str = "RAM of the whole server, filled with the corpus"
    needs: Holds = Holds.NOTHING

    def fits(self, peer: Peer) -> bool:
        return True

    def run(self, peer: Peer, scale: Scale) -> Figures:
        empty = peer.ram()
        peer.ready(Holds.CORPUS)
        time.sleep(0.3)  # servers give buffers back a moment later
        filled = peer.ram()
        compressed = peer.compressed()
        # Who takes all of it at the start, as `nbdkit memory allocator=malloc` may, does not grow.
        grown = filled - empty if empty < peer.size else filled
        figures = {RAM: filled / MIB, EMPTY: empty / MIB, PER_BYTE: grown / peer.size}
        return figures | ({} if compressed is None else {COMPRESSED: compressed / MIB})


def _measured(
    peer: Peer, command: list[str], seconds: float = 120
) -> tuple[float, float, float, str]:
    """Run a client; seconds, the server's CPU seconds, the client's, and what it printed."""
    before = peer.cpu_seconds()
    started = time.perf_counter()
    said, theirs = client(command, seconds)
    took = time.perf_counter() - started
    return took, peer.cpu_seconds() - before, theirs, said


# 4 KiB


@dataclass(frozen=True)
class Random:
    way: str
    """`read` or `write`."""
    depth: int
    connections: int

    @property
    def measure(self) -> str:
        how = f"{self.depth} in flight, {connections_name(self.connections)}"
        return f"4 KiB random {self.way}, {how}"

    @property
    def needs(self) -> Holds:
        return Holds.CORPUS if self.way == "read" else Holds.ANYTHING

    def fits(self, peer: Peer) -> bool:
        return True

    def run(self, peer: Peer, scale: Scale) -> Figures:
        command = fio(_target(peer), peer.size, self.way, self.depth, self.connections, scale)
        _, ours, theirs, said = _measured(peer, command, scale.seconds + 60)
        if self.way == "write":
            peer.holds = Holds.ANYTHING
        figures, requests = parsed(said, self.way)
        each = 1e6 / max(1, requests)
        return figures | {SERVER_REQUEST: each * ours, CLIENT_REQUEST: each * theirs}


def _target(peer: Peer) -> list[str]:
    if peer.node:
        return ["--ioengine=libaio", "--direct=1", f"--filename={peer.node}"]
    return over_nbd(peer.uri)


def over_nbd(uri: str) -> list[str]:
    return ["--ioengine=nbd", f"--uri={uri}"]


def fio(
    target: list[str], size: int, way: str, depth: int, connections: int, scale: Scale
) -> list[str]:
    """The command; `parsed` reads what it prints."""
    return [
        *("fio", "--name=bench", *target, f"--rw=rand{way}", "--bs=4k", f"--iodepth={depth}"),
        *(f"--numjobs={connections}", "--group_reporting", f"--size={size}"),
        *("--norandommap", "--time_based", f"--runtime={round(1000 * scale.seconds)}ms"),
        *(f"--buffer_compress_percentage={scale.percent}", "--buffer_compress_chunk=4096"),
        *("--refill_buffers", "--percentile_list=50:99:99.9", "--output-format=json"),
    ]


def parsed(said: str, way: str) -> tuple[Figures, int]:
    """Of fio's JSON, before which it may talk; and the number of requests."""
    job: dict[str, Any] = json.loads(said[said.index("{") :])["jobs"][0]
    if job["error"]:
        raise Failed(f"fio: error {job['error']}")
    done = job[way]
    latency = done["clat_ns"]["percentile"]
    figures = {
        name: latency[key] / 1000
        for name, key in ((P50, "50.000000"), (P99, "99.000000"), (P999, "99.900000"))
    }
    return {IOPS: float(done["iops"])} | figures, int(done["total_ios"])


# Latency beside other work


@dataclass(frozen=True)
class Mixed:
    """Random requests while `beside` does something else in a thread, until they have ended."""

    what: str
    way: str
    """`read` or `write`."""
    depth: int
    beside: Callable[[Serve, threading.Event], None]
    needs: Holds = Holds.CORPUS
    seconds: float = 2
    """How long, in those of other jobs."""

    @property
    def measure(self) -> str:
        return f"4 KiB random {self.way}, {self.depth} in flight, {self.what}"

    def fits(self, peer: Peer) -> bool:
        return peer.name == "zramd serve lz4"

    def run(self, peer: Peer, scale: Scale) -> Figures:
        assert isinstance(peer, Serve)
        seconds = self.seconds * scale.seconds
        its = Scale(seconds, scale.percent)
        command = fio(_target(peer), peer.size, self.way, self.depth, 1, its)
        with _meanwhile(partial(self.beside, peer)):
            said, _ = client(command, seconds + 60)
        if self.way == "write":
            peer.holds = Holds.ANYTHING
        return parsed(said, self.way)[0]


@dataclass(frozen=True)
class Sparse(Mixed):
    """The same with a server of its own that holds every other page of the corpus, and for no
    longer than a compaction takes, or the requests after it would be judged as well."""

    needs: Holds = Holds.ANYTHING
    seconds: float = 0.25

    def run(self, peer: Peer, scale: Scale) -> Figures:
        sparse = Still(peer.place.parent, peer.image, "lz4", quick=False)
        try:
            sparse.ready(Holds.CORPUS)
            _make_sparse(sparse)
            return super().run(sparse, scale)
        finally:
            sparse.stop()


@contextmanager
def _meanwhile(work: Callable[[threading.Event], None]) -> Iterator[None]:
    """Do this in a thread, where clients run; what it raises is raised here."""
    done = threading.Event()
    raised: list[BaseException] = []

    def run() -> None:
        try:
            os.sched_setaffinity(0, machine.CLIENTS)
            work(done)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    if raised:
        raise raised[0]


def zramd(peer: Peer, *arguments: str, **environment: str) -> None:
    """Run a verb where clients run, and out of fio's way."""
    done = subprocess.run(
        machine.pinned(machine.CLIENTS, [*ZRAMD, *arguments], nice=True),
        env=peer.environment | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if done.returncode:
        raise Failed((done.stderr.strip() or f"zramd {arguments[0]} failed").splitlines()[-1])


ZRAMD = (sys.executable, "-c", "from zramd.cli import main; main()")
"""What the command `zramd` does, of this checkout."""


def nothing(peer: Serve, done: threading.Event) -> None:
    pass


def lists(peer: Serve, done: threading.Event) -> None:
    _repeat(done, lambda: zramd(peer, "list"))


def lists_elsewhere(peer: Serve, done: threading.Event) -> None:
    """What `lists` takes of the client's CPU, without asking the server."""
    nowhere = peer.place / "nowhere"
    nowhere.mkdir(exist_ok=True)
    _repeat(done, lambda: zramd(peer, "list", ZRAMD_RUNTIME_DIR=str(nowhere)))


def saves(peer: Serve, done: threading.Event) -> None:
    """By one client that stays: commands would take the client's CPU, milliseconds of each."""
    with peer.control() as control:

        def save() -> None:
            with tempfile.TemporaryFile(dir=peer.place) as file:
                control.save(file.fileno())

        _repeat(done, save)


def _repeat(done: threading.Event, work: Callable[[], None]) -> None:
    while not done.wait(0.02):
        work()


def compaction(peer: Serve, done: threading.Event) -> None:
    """One, as soon as fio has connected."""
    with peer.control() as control:
        before = control.statistics().pages_compacted
        while not control.statistics().openers and not done.wait(0.001):
            pass
        control.set("compact", "1")
        if control.statistics().pages_compacted == before:
            raise Failed("nothing was compacted")


def _make_sparse(peer: Serve) -> None:
    """Discard every other page."""
    with connected(peer.listening) as sock:
        for at in range(0, peer.size, 2 * PAGE):
            ask(sock, NBD_CMD_TRIM, at, PAGE)


# The command


@dataclass(frozen=True)
class Command:
    """How long a command takes while one device is served; the median of some."""

    measure: str
    arguments: tuple[str, ...]
    needs: Holds = Holds.CORPUS

    def fits(self, peer: Peer) -> bool:
        return peer.name == "zramd serve lz4"

    def run(self, peer: Peer, scale: Scale) -> Figures:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            subprocess.run(
                machine.pinned(machine.CLIENTS, self.arguments),
                env=peer.environment,
                stdout=subprocess.DEVNULL,
                check=True,
            )
            times.append(time.perf_counter() - started)
        return {SECONDS: statistics.median(times)}


# All of them

LIST = Command("time of `zramd list` with one device", (*ZRAMD, "list"))
PASS = Command("time of `python -c pass`", (sys.executable, "-c", "pass"))


def mixed(way: str, depth: int) -> list[Mixed]:
    """Reads are of the corpus; writes can do with any pages."""
    needs = Holds.CORPUS if way == "read" else Holds.ANYTHING
    return [
        Mixed("alone", way, depth, nothing, needs),
        Mixed("during snapshots", way, depth, saves, needs),
        Mixed("with `zramd list` asking elsewhere", way, depth, lists_elsewhere, needs),
        Mixed("with `zramd list` asking it", way, depth, lists, needs),
        Sparse("sparse", way, depth, nothing),
        Sparse("during a compaction", way, depth, compaction),
    ]


def plan(quick: bool) -> list[tuple[list[Workload], int]]:
    """What is done, in order: workloads that alternate, and how many times the rounds they get."""
    small, large = 128 << 10, MIB
    bulks = [(small, 1), (large, 4)] if quick else [(s, c) for s in (small, large) for c in (1, 4)]
    jobs = [(1, 1), (16, 1), (64, 4)] if quick else [(d, c) for c in (1, 4) for d in (1, 16, 64)]
    groups: list[tuple[list[Workload], int]] = [([Weight()], 1)]
    groups += [([Bulk("in", *how)], 1) for how in bulks]
    groups += [([Bulk("out", *how)], 1) for how in bulks]
    for way in ("read", "write"):
        groups += [([Random(way, *how)], 1) for how in jobs]
    groups.append(([LIST, PASS], 2))
    for way in ("read", "write"):
        groups += [(list(mixed(way, depth)), 2) for depth in ((16,) if quick else (1, 16))]
    return groups

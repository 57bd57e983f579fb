"""Rows of `zramd serve` by itself: what an idle one takes, and how long a killed one is missed."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.benches.peers import connected
from zramd.nbd.wire import NBD_CMD_READ, NBD_CMD_WRITE, SIMPLE_REPLY, pack_request
from zramd.store import PAGE

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20


def measure_pauses(
    corpus: bytes, rounds: int, _seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    yield (
        "seconds from kill -9 until the next worker answers, 1 GiB stored",
        "<= 1",
        pauses(corpus, rounds),
    )


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


def ask(sock: socket.socket, command: int, offset: int, length: int, data: bytes = b"") -> None:
    sock.sendall(pack_request(command, bytes(8), offset, length) + data)
    reply = sock.recv(SIMPLE_REPLY.size, socket.MSG_WAITALL)
    assert SIMPLE_REPLY.unpack(reply)[1] == 0
    if command == NBD_CMD_READ:
        sock.recv(length, socket.MSG_WAITALL)


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


def serve(folder: Path, size: int) -> list[str]:
    return [sys.executable, "-m", "zramd.cli", "serve", "bench", "--disksize", str(size)]


@contextmanager
def server(folder: Path, command: list[str]) -> Iterator[str]:
    """Run one, pinned to the first CPU; gives its URI."""
    folder.mkdir()
    path = folder / "bench" / "nbd.sock"
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command],
        env=os.environ | {"ZRAMD_RUNTIME_DIR": str(folder)},
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

"""Rows of zramd as a server, each by itself or with one other: what an idle one takes, how long a
killed worker is missed, and 4 KiB requests with 16 in flight in pairs that run alternately.

fio's client runs on the last CPU and the server under test on the first, where there are two.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import lz4.block

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

"""Rows of connections: what an idle one costs in memory and to others, and structured replies
beside simple ones."""

import os
import random
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from scripts.benches.machine import client
from scripts.benches.peers import connected
from scripts.benches.served import ask, serve, server
from scripts.benches.workloads import IOPS, Scale, fio, over_nbd, parsed
from tests.nbd.hostile import memory_per_idle_connection
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
from zramd.store import PAGE

MIB = 1 << 20
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
                    command = fio(over_nbd(ours), len(part), "read", 16, BUSY, Scale(seconds, 0))
                    said, _ = client(command, seconds + 60)
                    return parsed(said, "read")[0][IOPS]

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

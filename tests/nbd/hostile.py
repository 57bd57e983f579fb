"""What a server process has and does, seen from outside; and clients that do it no good."""

import os
import socket
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from tests.nbd.harness import RawClient, request
from zramd.nbd import wire
from zramd.nbd.address import UnixAddress

KIB, MIB = 1 << 10, 1 << 20
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Held:
    """What a process has at one moment."""

    resident: int
    descriptors: int
    threads: int
    cpu_s: float

    @classmethod
    def by(cls, process: int) -> "Held":
        place = Path("/proc", str(process))
        status = (place / "status").read_text()
        times = (place / "stat").read_text().rpartition(")")[2].split()[11:13]
        return cls(
            int(status.split("VmRSS:")[1].split()[0]) * KIB,
            len(os.listdir(place / "fd")),
            int(status.split("Threads:")[1].split()[0]),
            sum(map(int, times)) / _TICKS,
        )


def cpu_share(process: int, seconds: float) -> float:
    """Of one CPU, that it uses while so many seconds pass."""
    before, began = Held.by(process).cpu_s, time.monotonic()
    time.sleep(seconds)
    return (Held.by(process).cpu_s - before) / (time.monotonic() - began)


def memory_per_idle_connection(process: int, path: Path, count: int = 400) -> float:
    """Resident bytes that the server `process` takes for each of so many connections that have done
    100 reads and writes of 4 KiB each and now wait."""
    page = bytes(range(256)) * 16

    def used() -> RawClient:
        client = RawClient(UnixAddress(path))
        ask = request(wire.NBD_CMD_WRITE, 0, 4096) + page + request(wire.NBD_CMD_READ, 0, 4096)
        for _ in range(100):
            client.send(ask)
            client.receive(16 + 16 + 4096)
        return client

    clients = [used()]  # what the first costs is the server's
    try:
        before = Held.by(process).resident
        clients += [used() for _ in range(count)]
        return (Held.by(process).resident - before) / count
    finally:
        for client in clients:
            client.sock.close()


def half_open(path: Path, sent: bytes = b"") -> socket.socket:
    """A connection that has said so much and no more."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(30)
    sock.connect(str(path))
    sock.sendall(sent)
    return sock


def reset(sock: socket.socket) -> None:
    """Closed without a word: a RST over TCP, and what has not been read is lost."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()

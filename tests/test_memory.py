"""Memory really comes back: after a forced reset a process is as large as it was before init.

Within 8 MiB, for hundreds of MiB stored; while those who held the device open hold on to all they
have: openers, and threads with compressor streams of their own. Nothing of the arena is left, no
mapping and no descriptor. This holds for a process that uses a device itself, with requests up to
the kernel's 128 KiB, and for `zramd serve` and nbdkit with our plugin, with requests up to 32 MiB;
the servers are given a little time, in which their connections end.

What is not promised is the state before the first use of all: imports and warm caches stay.
"""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import places
from tests.conftest import require
from tests.kernel.servers import ROOT, SERVERS, served
from tests.nbd.harness import RawClient
from tests.store.contents import noise, text
from zramd import attributes
from zramd.control.client import Control
from zramd.device import Zram
from zramd.nbd.address import UnixAddress
from zramd.nbd.transmission import MAX_PAYLOAD
from zramd.service.runtime import Paths
from zramd.store import PAGE

SLACK = 8 << 20
"""What may stay: freed memory that the allocator keeps, a thread's first use of its stack."""

MIB = 1 << 20
DEADLINE_S = 10
"""Seconds within which the connections of a reset device must have ended, and their memory gone."""


def of_process(pid: int | str) -> tuple[int, list[str]]:
    """Its resident bytes, and what it has of arenas."""
    process = Path("/proc", str(pid))
    status = (process / "status").read_text()
    resident = int(status.split("VmRSS:")[1].split()[0]) * 1024
    arenas = [line for line in (process / "maps").read_text().splitlines() if "zramd-arena" in line]
    for descriptor in (process / "fd").iterdir():
        try:
            target = os.readlink(descriptor)
        except FileNotFoundError:
            continue  # closed meanwhile
        if "zramd-arena" in target:
            arenas.append(f"{descriptor.name} -> {target}")
    return resident, arenas


def mixture() -> memoryview:
    """32 MiB, 2 MiB again and again: half incompressible, a quarter text, a quarter zeros."""
    part = noise(1, MIB) + b"".join(map(text, range(128))) + bytes(MIB // 2)
    return memoryview(part * (MAX_PAYLOAD // len(part)))


def write_all(
    write: Callable[[int, memoryview], None], data: memoryview, start: int, length: int, size: int
) -> None:
    """Write the data again and again over a range, in requests of `size` bytes."""
    for at in range(0, length, size):
        write(start + at, data[at % len(data) :][:size])


# A process that uses a device itself


def use_and_reset(algorithm: str, share: int) -> dict[str, int | list[str]]:
    """Fill a device from four threads, each its share, and reset it; what is left while the threads
    still stand."""
    disksize, data = 8 << 30, mixture()
    zram = Zram("zram0")
    filled, over = threading.Barrier(5), threading.Barrier(5)
    sizes = (PAGE, 32 << 10, 128 << 10, 128 << 10)

    def user(number: int) -> None:
        size = sizes[number]
        write_all(opener.write, data, number * share, share, size)
        assert opener.read(number * share, size) == data[:size]
        filled.wait()
        over.wait()

    attributes.set(zram, "comp_algorithm", algorithm)
    zram.init(disksize)
    opener = zram.open("warm-up")
    write_all(opener.write, data, 0, 4 * MIB, 128 << 10)
    opener.read(0, 4 * MIB)
    zram.reset(force=True)

    before, _ = of_process("self")
    attributes.set(zram, "comp_algorithm", algorithm)
    zram.init(disksize)
    opener = zram.open("test")
    threads = [threading.Thread(target=user, args=(number,)) for number in range(len(sizes))]
    for thread in threads:
        thread.start()
    filled.wait()
    stored = zram.statistics().mem_used_total
    full, _ = of_process("self")
    zram.reset(force=True)
    after, arenas = of_process("self")
    over.wait()
    for thread in threads:
        thread.join()
    return {"stored": stored, "grew": full - before, "left": after - before, "arenas": arenas}


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("algorithm", "share"), [("lz4", 224 * MIB), ("zstd", 224 * MIB), ("deflate", 64 * MIB)]
)
def test_a_reset_gives_the_memory_back_while_openers_and_threads_stay(algorithm, share):
    require.program("setpriv")
    script = (
        "import json; from tests import test_memory;"
        f" print(json.dumps(test_memory.use_and_reset({algorithm!r}, {share})))"
    )
    done = subprocess.run(
        ["setpriv", "--pdeathsig", "KILL", sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["arenas"] == []
    assert found["stored"] > 2 * share
    assert found["grew"] > 2 * share, "it does not measure the device's memory"
    assert found["left"] <= SLACK, found


# Servers


@pytest.fixture
def runtime(monkeypatch):
    require.program("setpriv")
    with places.place(places.RUNTIME) as directory:
        monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(directory))
        yield directory


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", SERVERS)
def test_a_reset_server_gives_the_memory_back_when_its_connections_have_ended(kind, runtime):
    if kind == "nbdkit":
        require.program("nbdkit")
    share, data = 112 * MIB, mixture()
    paths = Paths("zram0")
    address = UnixAddress(paths.nbd_socket)
    with served(kind, "zram0", "1G"), Control(paths.control_socket) as control:
        with RawClient(address) as client:
            write_all(client.write, data, 0, 4 * MIB, 128 << 10)
            client.read(0, 4 * MIB)
            control.reset(force=True)
            assert client.ended()
        before, _ = of_process(paths.worker())

        control.set("disksize", "8G")
        clients = [RawClient(address) for _ in range(4)]

        def use(number: int) -> None:
            client, size = clients[number], (32 << 10, 128 << 10, MIB, MAX_PAYLOAD)[number]
            write_all(client.write, data, number * share, share // size * size, size)
            assert client.read(number * share, size) == data[:size]

        with ThreadPoolExecutor() as users:
            list(users.map(use, range(len(clients))))
        stored = control.statistics().mem_used_total
        full, _ = of_process(paths.worker())
        control.reset(force=True)
        reset, arenas = of_process(paths.worker())
        assert arenas == []
        assert stored > 2 * share
        assert full - reset > 2 * share, "a reset that has returned has freed the device's memory"
        assert all(client.ended() for client in clients)
        for client in clients:
            client.sock.close()

        deadline = time.monotonic() + DEADLINE_S
        while (left := of_process(paths.worker())[0] - before) > SLACK:
            assert time.monotonic() < deadline, f"{left / MIB} MiB are left"
            time.sleep(0.1)

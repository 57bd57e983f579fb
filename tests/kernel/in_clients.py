"""What test_nbd_kernel.py has run inside a guest: other tools than ours attach the kernel's nbd,
with four connections, and what they leave is seen by a client without a kernel.

The server is the one named by ZRAMD_TEST_SERVER. To save time the last checks share one device,
empty at the beginning of each, which is there to the end. The guest has one CPU and so one queue,
whose requests all take the first connection, as long as there is one: the others' turn comes in a
check of its own.
"""

import errno
import hashlib
import json
import mmap
import os
import random
import re
import select
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kernel import servers
from tests.kernel.in_guest import (
    MIB,
    SERVER,
    directory,  # noqa: F401 - a fixture
    forget_cached,
    inflight,
    kernels_log,
    nothing_is_left,
    queue,
)
from tests.kernel.servers import zramd
from zramd.nbd.address import UnixAddress
from zramd.service.runtime import Paths

PAGE = 4096
GIB = 1 << 30
SIZE = 24 * MIB
NODE = "/dev/nbd0"
SOCKET = Paths("g0").nbd_socket
URI = UnixAddress(SOCKET).uri()
CONNECTIONS = 4
COMPLAINTS = re.compile(r"error|fail|stuck|timed out|unexpected|wrong|dead|BUG|WARNING", re.I)
NOISE = random.Random(1).randbytes(PAGE)


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@contextmanager
def nbd_client(disksize: int, *options: str, via: Path = SOCKET) -> Iterator[str]:
    """A device's node that nbd-client has attached; detached at the end."""
    with servers.served(SERVER, "g0", str(disksize)):
        many = ("-C", str(CONNECTIONS))
        run("nbd-client", "-unix", str(via), NODE, "-N", "g0", *many, *options)
        try:
            yield NODE
        finally:
            run("nbd-client", "-d", NODE)
        assert queue(NODE, "size") == 0
    assert nothing_is_left()


@pytest.fixture(scope="module")
def attached() -> Iterator[str]:
    with no_complaints(), nbd_client(SIZE, "-b", "4096") as node:
        yield node


@pytest.fixture
def node(attached: str) -> Iterator[str]:
    """The shared one, with nothing on it."""
    with no_complaints():
        yield attached
        run("blkdiscard", attached)
        assert stored() == {3: SIZE}


@contextmanager
def no_complaints() -> Iterator[None]:
    run("dmesg", "-C")
    yield
    assert [line for line in kernels_log().splitlines() if COMPLAINTS.search(line)] == []


def of_another_client() -> str:
    """The digest of the device, that nbdcopy reads over four connections of its own."""
    with subprocess.Popen(
        ["nbdcopy", f"--connections={CONNECTIONS}", URI, "-"], stdout=subprocess.PIPE
    ) as copy:
        assert copy.stdout is not None
        digest = hashlib.file_digest(copy.stdout, "sha256").hexdigest()
    assert copy.returncode == 0
    return digest


def of_the_node(node: str) -> str:
    """The digest of the device, that the kernel reads."""
    forget_cached()
    with open(node, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stored() -> dict[int, int]:
    """base:allocation's types and the bytes of each: 0 data, 2 zeros, 3 holes."""
    totals = json.loads(run("nbdinfo", "--map", "--totals", "--json", URI))
    return {entry["type"]: entry["size"] for entry in totals}


def fio(where: Path, *options: str) -> None:
    said = run(
        *("fio", "--name=verify", f"--directory={where}", "--rw=randrw", "--ioengine=libaio"),
        *("--direct=1", "--bsrange=4k-64k", "--iodepth=8", "--numjobs=4", "--thread"),
        *("--size=2M", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
        *("--group_reporting", *options),
    )
    assert "err= 0" in said


def test_blocks_of_512_bytes_are_served_too() -> None:
    with no_complaints(), nbd_client(SIZE) as node:
        assert queue(node, "queue/logical_block_size") == 512
        with open(node, "r+b", buffering=0) as file:
            file.seek(512 * 3)
            file.write(b"x" * 512)
        run("sync", node)
        run("qemu-io", "-f", "raw", "-c", "read -P 0x78 1536 512", "-c", "read -P 0 2k 2k", URI)
        run("blkdiscard", "-o", "1024", "-l", "512", node)  # part of a page: nothing is freed
        run("qemu-io", "-f", "raw", "-c", "read -P 0x78 1536 512", URI)


def test_discards_of_4_gib_take_what_they_name_and_no_more() -> None:
    """The block layer's longest discard is a page short of 4 GiB: so each becomes two requests."""
    size = 16 * GIB
    pages = [0, 4 * GIB - PAGE, 4 * GIB, 8 * GIB - PAGE, 8 * GIB, 12 * GIB + PAGE, size - PAGE]
    with no_complaints(), nbd_client(size, "-b", "4096") as node:

        def there() -> list[int]:
            forget_cached()
            with open(node, "rb", buffering=0) as file:
                return [at for at in pages if file.seek(at) == at and file.read(PAGE) == NOISE]

        with open(node, "wb", buffering=0) as file:
            for at in pages:
                file.seek(at)
                file.write(NOISE)
        run("sync", node)
        assert there() == pages
        assert stored() == {0: len(pages) * PAGE, 3: size - len(pages) * PAGE}
        run("blkdiscard", "-o", str(4 * GIB), "-l", str(4 * GIB), node)
        assert there() == [0, 4 * GIB - PAGE, 8 * GIB, 12 * GIB + PAGE, size - PAGE]
        run("blkdiscard", "-o", str(8 * GIB + PAGE), "-l", str(4 * GIB + PAGE), node)
        assert there() == [0, 4 * GIB - PAGE, 8 * GIB, size - PAGE]
        assert stored() == {0: 4 * PAGE, 3: size - 4 * PAGE}
        began = time.monotonic()
        run("blkdiscard", node)
        assert time.monotonic() - began < 5  # it costs what is stored
        assert there() == []
        assert stored() == {3: size}


class Relay:
    """Between a client and the server's socket; single connections can be cut."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.carried: dict[socket.socket, int] = {}
        """Bytes that came from each client."""
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self, client: socket.socket) -> None:
        client.shutdown(socket.SHUT_RDWR)  # and whoever carries for it closes it

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.socket(socket.AF_UNIX)
            server.connect(str(SOCKET))
            self.carried[client] = 0
            threading.Thread(target=self._carry, args=(client, server), daemon=True).start()

    def _carry(self, client: socket.socket, server: socket.socket) -> None:
        other = {client: server, server: client}
        try:
            while True:
                for end in select.select(list(other), [], [])[0]:
                    data = end.recv(1 << 18)
                    if not data:
                        return
                    other[end].sendall(data)
                    if end is client:
                        self.carried[client] += len(data)
        except OSError:
            pass  # cut
        finally:
            client.close()
            server.close()


def told_of_cuts() -> int:
    return kernels_log().count("Receive control failed")


def test_each_connection_sees_what_the_others_wrote_and_discarded(tmp_path: Path) -> None:
    """One after the other is cut; the kernel goes on over the next."""
    relay = Relay(tmp_path / "relay")
    with nbd_client(SIZE, "-b", "4096", via=relay.path) as node:
        run("dmesg", "-C")
        used: list[socket.socket] = []
        content = bytearray(16 * PAGE)
        for n in range(CONNECTIONS):
            carried = dict(relay.carried)
            with open(node, "r+b", buffering=0) as file:
                forget_cached()
                assert file.read(len(content)) == content
                at = n * 3 * PAGE
                content[at : at + 3 * PAGE] = bytes([n + 1]) * 3 * PAGE
                file.seek(at)
                file.write(content[at : at + 3 * PAGE])
            run("sync", node)
            run("blkdiscard", "-o", str(at), "-l", "4096", node)
            content[at : at + PAGE] = bytes(PAGE)
            (now,) = [end for end, count in relay.carried.items() if count != carried[end]]
            used.append(now)
            if n < CONNECTIONS - 1:
                relay.cut(now)
                servers.wait_for(lambda n=n: told_of_cuts() > n, "the kernel to see it")
        assert len(set(used)) == CONNECTIONS
        assert stored() == {0: 8 * PAGE, 3: SIZE - 8 * PAGE}
        assert of_another_client() == of_the_node(node)


@pytest.mark.parametrize(
    ("connections", "options", "ends"),
    [
        (1, [], "at the detach"),
        (2, [], "at a time-out"),
        (1, ["-t", "3"], "at a time-out"),
        (1, ["-nonetlink"], "at once"),
        (2, ["-nonetlink"], "at once"),
    ],
)
def test_what_waits_for_a_process_that_dies_fails_sooner_or_later(
    connections: int, options: list[str], ends: str
) -> None:
    """As docs/crash.md says. Of whichever server: nobody gives the kernel another connection."""
    with servers.served(SERVER, "g0", str(SIZE)):
        options = ["-N", "g0", "-b", "4096", "-C", str(connections), *options]
        run("nbd-client", "-unix", str(SOCKET), NODE, *options)
        disk = os.open(NODE, os.O_RDONLY | os.O_DIRECT)
        timeout = Path("/sys/block/nbd0/queue/io_timeout")
        try:
            assert timeout.read_text() == ("3000\n" if "-t" in options else "30000\n")
            if ends != "at once":
                timeout.write_text("3000")
            waiting, later = reads_around_a_death(disk, Paths("g0").worker(), connections)
            assert later.result(10) in (errno.EIO, "nothing")  # the latter has no size any more
            assert len(wait(waiting, 10).done) == (0 if ends == "at the detach" else 2)
            assert ("timed out, retrying" in kernels_log()) == (ends == "at a time-out")
        finally:
            run("nbd-client", "-d", NODE)
            os.close(disk)
            timeout.write_text("30000")  # a node keeps it
        assert [read.result(10) for read in waiting] == [errno.EIO] * 2
        assert queue(NODE, "size") == 0
    assert nothing_is_left()


def reads_around_a_death(
    disk: int, io: int, connections: int
) -> tuple[list[Future[object]], Future[object]]:
    """What reads give that the process which does the I/O has not answered, and a later one."""

    def read(page: int) -> object:
        try:
            count = os.preadv(disk, [mmap.mmap(-1, PAGE)], page * PAGE)
        except OSError as error:
            return error.errno
        return "data" if count else "nothing"

    run("dmesg", "-C")
    pool = ThreadPoolExecutor(3)
    os.kill(io, signal.SIGSTOP)
    waiting = [pool.submit(read, page) for page in (100, 200)]
    servers.wait_for(lambda: inflight(NODE) == ["2", "0"], "both to be under way")
    os.kill(io, signal.SIGKILL)
    servers.wait_for(lambda: told_of_cuts() == connections, "the kernel to see it")
    return waiting, pool.submit(read, 300)


def test_qemu_nbd_attaches_ours_to_the_kernel(directory: Path) -> None:  # noqa: F811
    """It is our client, and the kernel's server."""
    Path("/run/lock").mkdir(exist_ok=True)  # /var/lock, where it has a socket
    with servers.served(SERVER, "g0", str(SIZE)), no_complaints():
        run("qemu-nbd", "-c", NODE, "-f", "raw", "--discard=unmap", URI)
        try:
            servers.wait_for(lambda: queue(NODE, "size") > 0, "qemu-nbd to attach")
            run("mkfs.ext4", "-q", NODE)
            run("mount", NODE, str(directory))
            fio(directory)
            run("umount", str(directory))
            run("e2fsck", "-f", "-n", NODE)
            assert of_another_client() == of_the_node(NODE)
            run("blkdiscard", NODE)
            assert servers.stored_data_size("g0") == 0
        finally:
            run("qemu-nbd", "-d", NODE)
        servers.wait_for(lambda: queue(NODE, "size") == 0, "qemu-nbd to detach")
    assert nothing_is_left()


def test_it_has_four_connections_and_flush_fua_and_discard(node: str) -> None:
    assert zramd("list", "-n", "--raw", "-o", "CLIENTS").stdout == f"{CONNECTIONS}\n"
    assert Path("/sys/block/nbd0/queue/write_cache").read_text() == "write back\n"
    assert queue(node, "queue/fua") == 1
    assert queue(node, "queue/discard_max_bytes") >= GIB
    assert queue(node, "queue/rotational") == 0
    assert queue(node, "ro") == 0


def test_fio_verifies_on_a_file_system_and_another_client_sees_it(
    node: str,
    directory: Path,  # noqa: F811
) -> None:
    run("mkfs.ext4", "-q", node)
    run("mount", "-o", "discard", node, str(directory))
    fio(directory, "--fsync=64")
    (directory / "kept").write_bytes(NOISE * 256)
    (directory / "removed").write_bytes(NOISE * 512)
    run("sync", "-f", str(directory))
    (directory / "removed").unlink()
    run("fstrim", str(directory))
    run("umount", str(directory))
    run("e2fsck", "-f", "-n", node)
    assert of_another_client() == of_the_node(node)
    run("mount", node, str(directory))
    try:
        assert (directory / "kept").read_bytes() == NOISE * 256
    finally:
        run("umount", str(directory))


def test_a_discard_of_the_whole_device_leaves_nothing(node: str) -> None:
    with open(node, "wb", buffering=0) as file:
        file.write(NOISE * 1024)
        file.seek(-4 * MIB, 2)
        file.write(NOISE * 1024)
    run("sync", node)
    assert stored() == {0: 8 * MIB, 3: SIZE - 8 * MIB}
    run("blkdiscard", node)
    assert stored() == {3: SIZE}
    assert servers.stored_data_size("g0") == 0
    assert of_the_node(node) == hashlib.sha256(bytes(SIZE)).hexdigest()


def test_zeroes_are_zeros_whatever_the_kernel_sends_for_them(node: str) -> None:
    """From 6.12 on it sends WRITE_ZEROES, and before that writes of zeros."""
    with open(node, "wb", buffering=0) as file:
        file.write(NOISE * 1024)
    run("sync", node)
    run("blkdiscard", "-z", "-o", str(MIB), "-l", str(2 * MIB), node)
    forget_cached()
    with open(node, "rb", buffering=0) as file:
        assert file.read(4 * MIB) == NOISE * 256 + bytes(2 * MIB) + NOISE * 256
    assert stored()[0] == 2 * MIB
    assert servers.stored_data_size("g0") == 2 * MIB
    assert of_another_client() == of_the_node(node)


def test_what_is_synced_is_seen_by_another_client_at_once(node: str) -> None:
    with open(node, "r+b", buffering=0) as file:
        for n in range(1, 5):
            file.seek(n * 3 * PAGE)
            file.write(bytes([n]) * PAGE)
            run("sync", "-d", node)
            run("qemu-io", "-f", "raw", "-c", f"read -P {n} {n * 3 * PAGE} 4k", URI)

"""Clients that are slow, silent, greedy, rude or dead, against `zramd serve`.

Whatever they do, the server neither ends nor leaks nor spins, another client gets its data
meanwhile, and when they are gone nothing of them is left: no opener, no descriptor, no thread, and
no memory but what the allocator keeps.

Nothing here asserts how long something takes: only that it comes at all, and what share of a CPU a
server takes that has nothing to do.
"""

import random
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager

import pytest

from tests import places
from tests.conftest import require
from tests.fuzz.mutate import go, option
from tests.kernel.servers import ROOT, served
from tests.nbd.harness import (
    DEADLINE_S,
    RawClient,
    RunningServer,
    contexts,
    request,
    wait_for,
)
from tests.nbd.hostile import (
    KIB,
    MIB,
    Held,
    cpu_share,
    half_open,
    memory_per_idle_connection,
    reset,
)
from tests.verifying import REGION, Client, worker_after
from zramd.control.client import Control
from zramd.device import Zram
from zramd.nbd import connection
from zramd.nbd.address import TcpAddress, UnixAddress
from zramd.nbd.wire import (
    NBD_CMD_BLOCK_STATUS,
    NBD_CMD_DISC,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_OPT_EXTENDED_HEADERS,
    NBD_OPT_GO,
    NBD_OPT_LIST,
    NBD_OPT_SET_META_CONTEXT,
    NBD_OPT_STRUCTURED_REPLY,
)
from zramd.service.runtime import Paths
from zramd.store import PAGE

NAME = "zram0"
SIZE = 64 * MIB
IDLE_SHARE = 0.1
"""Of a CPU. A server that spins takes all that it gets of one, and on a machine with eight others
that was a quarter; one with nothing to do takes next to nothing."""
SLACK = 8 * MIB
"""What the allocator may keep of much more."""
HELLO = b"\0\0\0\3" + option(NBD_OPT_GO, go(NAME.encode()))


class Served:
    """A server process that all tests of this module use."""

    def __init__(self) -> None:
        self.paths = Paths(NAME)
        self.address = UnixAddress(self.paths.nbd_socket)
        self.worker = worker_after(self.paths, 0)

    def held(self) -> Held:
        return Held.by(self.worker)

    def openers(self) -> int:
        with Control(self.paths.control_socket) as control:
            return len(control.statistics().openers)


@contextmanager
def a_server(disksize: str, **environment: str):
    require.program("setpriv")
    with places.place(places.RUNTIME) as runtime, pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZRAMD_RUNTIME_DIR", str(runtime))
        for name, value in environment.items():
            patch.setenv(name, value)
        with served("zramd", NAME, disksize, module="tests.unlimited"):
            server = Served()
            with RawClient(server.address) as client:  # the threads there will be
                client.write(0, bytes(MIB) + b"x" * MIB)
                client.read(0, 2 * MIB)
                assert client.error(request(NBD_CMD_TRIM, 0, 2 * MIB)) == 0
            wait_for(lambda: server.openers() == 0)
            yield server


@pytest.fixture(scope="module")
def process():
    with a_server("64M", HANDSHAKE_S="2") as server:
        yield server


@pytest.fixture
def server(process):
    """Asks in the end that nothing is left, and that the process is the same."""
    before = process.held()
    yield process
    assert process.paths.worker() == process.worker, "the worker has died"
    wait_for(lambda: process.openers() == 0)
    wait_for(lambda: process.held().descriptors <= before.descriptors)
    now = process.held()
    assert now.threads <= before.threads + 2  # of the pool, which begins them when needed
    wait_for(lambda: process.held().resident <= before.resident + SLACK)
    assert cpu_share(process.worker, 0.5) < IDLE_SHARE


@contextmanager
def another(server: Served):
    """A client that works meanwhile, and is answered rightly, again and again."""
    ended = threading.Event()
    client = Client(server.paths.nbd_socket, 3 * REGION, ended)
    with RawClient(server.address) as first:
        assert first.error(request(NBD_CMD_TRIM, 3 * REGION * PAGE, REGION * PAGE)) == 0
    client.start()
    try:
        yield client
        before = client.answered
        wait_for(lambda: client.answered > before + 50 or client.fault)
    finally:
        ended.set()
        client.join(DEADLINE_S)
    assert client.fault is None
    assert client.lost == 0


# Slow ones


def test_a_handshake_in_single_bytes_ends_by_its_time_and_holds_nobody_up(server):
    with another(server):
        clients = [half_open(server.paths.nbd_socket) for _ in range(20)]
        ended = 0
        drip = b"\0\0\0\3" + option(NBD_OPT_LIST) * 30
        for byte in drip:
            for sock in clients:
                try:
                    sock.sendall(bytes([byte]))
                except OSError:
                    ended += 1
            if ended >= len(clients):
                break
            threading.Event().wait(0.05)
        for sock in clients:
            while ended < len(clients) and sock.recv(4096):
                pass
            sock.close()


def test_clients_that_say_nothing_or_little_cost_nothing(server):
    clients = [RawClient(server.address) for _ in range(50)]
    for number, client in enumerate(clients):
        client.send(request(NBD_CMD_WRITE, 0, 100 * KIB)[: number % 28])
    assert cpu_share(server.worker, 1) < IDLE_SHARE
    write = request(NBD_CMD_WRITE, 8 * PAGE, 3) + b"abc"
    with another(server), RawClient(server.address) as client:
        for byte in write:
            client.send(bytes([byte]))
            threading.Event().wait(0.01)
        assert client.reply() == (1, 0)
        assert client.read(8 * PAGE, 3) == b"abc"
    for client in clients:
        client.sock.close()


def conversation() -> bytes:
    """Everything but bulk, and the messages' lengths are all different."""
    return (
        *(b"\0\0\0\3", option(NBD_OPT_LIST), option(99, b"abc")),
        option(NBD_OPT_GO, go(NAME.encode(), (1, 3))),
        request(NBD_CMD_WRITE, 48 * MIB, 5000) + b"w" * 5000,
        request(NBD_CMD_READ, 48 * MIB, 300 * KIB),
        request(NBD_CMD_FLUSH),
        request(NBD_CMD_TRIM, 48 * MIB, 8 * MIB),
        request(NBD_CMD_DISC),
    )


def cuts() -> list[bytes]:
    """The conversation up to some places: all ends of messages, and a few in each."""
    messages = conversation()
    found = []
    for number, message in enumerate(messages):
        begun = b"".join(messages[:number])
        found += [begun + message[:at] for at in {0, 1, 8, 16, 27, len(message) // 2}]
    return [*found, b"".join(messages)]


def hear_the_export(sock: socket.socket, said: bytes) -> None:
    """Waits until the device is open, where `said` is enough for that."""
    if len(said) >= len(b"".join(conversation()[:4])):
        heard = b""
        while b"\0\0\0\7\0\0\0\1\0\0\0\0" not in heard:
            heard += sock.recv(16)


def test_half_closed_anywhere(server):
    with another(server):
        for said in cuts():
            sock = half_open(server.paths.nbd_socket, said)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1 << 16):
                pass
            sock.close()


def test_reset_anywhere(server):
    with another(server):
        for said in cuts():
            reset(half_open(server.paths.nbd_socket, said))
        for said in cuts():
            sock = half_open(server.paths.nbd_socket, said)
            hear_the_export(sock, said)
            reset(sock)


def test_reset_anywhere_over_tcp():
    zram = Zram(NAME)
    zram.init(SIZE)
    running = RunningServer(zram)
    try:
        address = running.listen(TcpAddress("127.0.0.1", 0))
        for said in cuts():
            sock = socket.create_connection((address.host, address.port), DEADLINE_S)
            sock.sendall(said)
            hear_the_export(sock, said)
            reset(sock)
        wait_for(lambda: not running.server.live)
        assert zram.statistics().openers == ()
        with RawClient(address) as client:
            assert client.read(0, PAGE) == bytes(PAGE)
    finally:
        running.close()
        zram.close()


# Greedy ones


def test_what_waits_for_clients_that_do_not_read_is_bounded(server):
    """Of 3 GiB that each of three asks for, no more than may be in flight, and one request."""
    most = connection._IN_FLIGHT_BYTES + 32 * MIB + 2 * connection._BATCH
    with RawClient(server.address) as client:
        client.write(16 * MIB, random.Random(1).randbytes(MIB) * 32)
    before = server.held().resident
    clients = [RawClient(server.address) for _ in range(3)]
    with another(server) as working:
        for client in clients:
            # In one piece: a socket holds 78 pieces, however small, of what is not read.
            client.send(request(NBD_CMD_READ, 16 * MIB, 32 * MIB) * 100)
        answered = working.answered
        wait_for(lambda: working.answered > answered + 300 or working.fault)
        wait_for(lambda: cpu_share(server.worker, 0.2) < 1)  # it has read what it will
        assert server.held().resident - before < len(clients) * most + SLACK
        assert cpu_share(server.worker, 0.5) < 1.9
    for client in clients:
        client.sock.close()
    with RawClient(server.address) as client:
        assert client.error(request(NBD_CMD_TRIM, 16 * MIB, 32 * MIB)) == 0


def test_what_is_announced_and_does_not_come_takes_no_memory(server):
    """Nor the time to fill it: 28 bytes stopped all others for 20 ms, when that was done."""
    before = server.held().resident
    announced = request(NBD_CMD_WRITE, 0, 32 * MIB)
    clients = [half_open(server.paths.nbd_socket, HELLO + announced) for _ in range(40)]
    with another(server):
        wait_for(lambda: server.openers() >= len(clients))
        wait_for(lambda: cpu_share(server.worker, 0.2) < 1)
        assert server.held().resident - before < SLACK
    for sock in clients:
        sock.close()


def test_replies_to_tiny_requests_are_bounded_too(server):
    """A client that floods with requests of no length and reads nothing is not read from."""
    before = server.held().resident
    with RawClient(server.address) as client, another(server):
        client.sock.settimeout(0.5)
        flushes = request(NBD_CMD_FLUSH) * 4096
        sent = 0
        try:
            while sent < 64 * MIB:
                sent += client.sock.send(flushes)
        except TimeoutError:
            pass
        assert sent < 64 * MIB, "it takes whatever comes"
        assert server.held().resident - before < 2 * connection._BATCH + SLACK
        assert cpu_share(server.worker, 0.5) < 1.9


def test_ranges_of_terabytes_cost_what_is_stored():
    size = 4 << 40
    with a_server("4T") as server, another(server):
        for at in range(0, size, size // 16):
            with RawClient(server.address) as client:
                client.write(at + 12345, b"stored here and there")

        def cost(length: int) -> float:
            """CPU seconds of 200 trims and 200 block status; the trims free nothing."""
            sock = half_open(
                server.paths.nbd_socket, b"\0\0\0\3" + option(NBD_OPT_EXTENDED_HEADERS)
            )
            client = RawClient.__new__(RawClient)
            client.sock = sock
            chosen = option(NBD_OPT_SET_META_CONTEXT, contexts(NAME, "base:allocation"))
            client.send(chosen + option(NBD_OPT_GO, go(NAME.encode())))
            client.receive(18 + 20 + 20 + 19 + 20 + 32 + 34 + 20)
            before = server.held().cpu_s
            for number in range(400):
                command = (NBD_CMD_TRIM, NBD_CMD_BLOCK_STATUS)[number % 2]
                client.send(extended(command, PAGE if command == NBD_CMD_TRIM else 0, length))
                head = client.receive(32)
                payload = client.receive(int.from_bytes(head[24:], "big"))
                assert head[6:8] == (b"\0\0" if command == NBD_CMD_TRIM else b"\0\6"), payload
            sock.close()
            return server.held().cpu_s - before

        # A first trim frees what was stored.
        cost(size - PAGE)
        assert cost(size - PAGE) < 10 * cost(SIZE) + 1


def extended(command: int, offset: int, length: int) -> bytes:
    head = 0x21E41C71, 0, command, 1, offset, length
    return b"".join(n.to_bytes(s, "big") for n, s in zip(head, (4, 2, 2, 8, 8, 8), strict=True))


# Many


def test_500_at_once_and_then_none(server):
    with another(server):
        clients = [half_open(server.paths.nbd_socket, HELLO) for _ in range(250)]
        clients += [half_open(server.paths.nbd_socket, HELLO[: n % 40]) for n in range(250)]
        wait_for(lambda: server.openers() >= 250)
        assert server.held().descriptors >= 400
        for sock in clients:
            sock.close()


def test_an_idle_connection_takes_little_memory(server):
    taken = memory_per_idle_connection(server.worker, server.paths.nbd_socket)
    print(f"{taken / KIB:.1f} KiB")
    assert taken <= 128 * KIB


# Dead ones

_WRITER = """
import os, socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.argv[1])
sock.sendall(bytes.fromhex(sys.argv[2]))
at = int(sys.argv[3])
print(flush=True)
while True:
    for length in (100, 4096, 200000):
        head = bytes.fromhex("2560951300000001") + os.urandom(8)
        sock.sendall(head + at.to_bytes(8, "big") + length.to_bytes(4, "big") + os.urandom(length))
        head = bytes.fromhex("2560951300000000") + os.urandom(8)
        sock.sendall(head + at.to_bytes(8, "big") + length.to_bytes(4, "big"))
        if os.urandom(1)[0] < 200:
            sock.recv(1 << 20)
"""


def test_clients_that_are_killed_while_they_write(server):
    rng = random.Random(1)
    place = 4 * REGION * PAGE
    with another(server):
        running: list[subprocess.Popen[bytes]] = []
        try:
            for number in range(24):
                arguments = (str(server.paths.nbd_socket), HELLO.hex(), str(place + number * MIB))
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-S", "-E", "-c", _WRITER, *arguments],
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        cwd=ROOT,
                    )
                )
                running[-1].stdout.readline()
                if len(running) > 3:
                    victim = running.pop(rng.randrange(len(running)))
                    victim.kill()
                    victim.communicate()
        finally:
            for client in running:
                client.kill()
                client.communicate()
    with RawClient(server.address) as client:
        assert client.error(request(NBD_CMD_TRIM, place, 25 * MIB)) == 0


def test_structured_clients_too(server):
    """A hostile client may well negotiate first."""
    said = b"\0\0\0\3" + option(NBD_OPT_STRUCTURED_REPLY) + option(NBD_OPT_GO, go(NAME.encode()))
    with another(server):
        for _ in range(20):
            sock = half_open(server.paths.nbd_socket, said)
            sock.sendall(request(NBD_CMD_READ, 0, 4 * MIB) * 40)
            reset(sock)

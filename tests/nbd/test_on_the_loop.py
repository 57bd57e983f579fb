"""What a connection does on the event loop itself, for how long, and what it leaves to threads.

How that feels to others is in test_shares.py; here is what decides it, and nothing depends on time.
"""

import random
import socket
from contextlib import contextmanager

import pytest

from tests.nbd.harness import RawClient, RunningServer, request, wait_for
from zramd import attributes
from zramd.device import Zram
from zramd.nbd import connection
from zramd.nbd.address import TcpAddress, UnixAddress
from zramd.nbd.connection import Connection
from zramd.nbd.wire import NBD_CMD_READ, NBD_CMD_WRITE, NBD_CMD_WRITE_ZEROES
from zramd.store import PAGE

KIB, MIB = 1 << 10, 1 << 20
SIZE = 16 * MIB


@contextmanager
def running(algorithm: str):
    zram = Zram("zram0")
    attributes.set(zram, "comp_algorithm", algorithm)
    zram.init(SIZE)
    server = RunningServer(zram)
    try:
        yield server
    finally:
        server.close()
        zram.close()


@pytest.fixture
def work(monkeypatch):
    """How often a turn was cut, and a request left to a thread."""
    work = {"cut": 0, "threads": 0}

    def counted(name, what):
        call = getattr(Connection, name)

        def counts(self, *arguments):
            work[what] += 1
            if what == "cut" and work.get("others"):
                self._server.content += 1  # somebody else had a turn, and asked for no more
            return call(self, *arguments)

        monkeypatch.setattr(Connection, name, counts)

    counted("_take_turn", "cut")
    counted("_submit", "threads")
    return work


@pytest.fixture
def no_time(monkeypatch):
    """Long turns end by their bytes alone, short ones with each request."""
    monkeypatch.setattr(connection, "_BATCH", 64 * KIB)
    monkeypatch.setattr(connection, "_TURN_SECONDS", 3600)
    monkeypatch.setattr(connection, "_SHORT_TURN_SECONDS", -1)


@pytest.mark.parametrize("others", [False, True])
def test_turns_are_short_where_others_are_content_with_less(tmp_path, work, no_time, others):
    work["others"] = others
    with running("lz4") as server, RawClient(server.listen(UnixAddress(tmp_path / "s"))) as client:
        client.send(64 * request(NBD_CMD_READ, 0, PAGE))
        client.receive(64 * (16 + PAGE))
    if others:
        assert work["cut"] > 40
    else:
        assert 0 < work["cut"] <= 64 * PAGE // (64 * KIB)


def test_who_asks_for_less_than_a_turn_is_content_and_who_is_cut_is_not(tmp_path, no_time):
    with running("lz4") as server, RawClient(server.listen(UnixAddress(tmp_path / "s"))) as client:
        for _ in range(5):
            client.read(0, PAGE)
        content = server.server.content
        assert content >= 5
        for _ in range(5):
            client.send(64 * request(NBD_CMD_READ, 0, PAGE))
            client.receive(64 * (16 + PAGE))
        assert server.server.content == content


@pytest.mark.parametrize("others", [False, True])
def test_long_writes_of_a_short_turn_are_left_to_threads(tmp_path, work, no_time, others):
    work["others"] = others
    data = [random.Random(n).randbytes(20 * KIB) for n in range(32)]
    with running("lz4") as server, RawClient(server.listen(UnixAddress(tmp_path / "s"))) as client:
        client.send(
            b"".join(
                request(NBD_CMD_WRITE, n * 20 * KIB, 20 * KIB) + each for n, each in enumerate(data)
            )
        )
        for _ in data:
            assert client.reply() == (1, 0)
        assert (work["threads"] > 0) is others
        assert client.read(0, 640 * KIB) == b"".join(data)


@pytest.mark.parametrize(
    ("algorithm", "at_once"),
    [
        ("lz4", 128),
        ("zstd", 32),
        ("zstd(level=4)", 4),
        ("zstd(level=19)", 0),
        ("lz4hc", 4),
        ("lz4hc(level=12)", 0),
        ("deflate", 4),
    ],
)
def test_what_a_compressor_takes_long_for_is_left_to_threads(tmp_path, work, algorithm, at_once):
    with running(algorithm) as server:
        address = server.listen(UnixAddress(tmp_path / "s"))
        for length in (1, PAGE, PAGE + 1, 32 * KIB, 32 * KIB + 1, 128 * KIB, 128 * KIB + 1):
            with RawClient(address) as client:  # whose turns were not cut before
                work["threads"] = 0
                client.write(MIB, bytes(length))
                assert (work["threads"] == 1) is (length > at_once * KIB), length
                work["threads"] = 0
                assert client.read(MIB, length) == bytes(length)
                assert (work["threads"] == 1) is (length > 128 * KIB), length
        with RawClient(address) as client:
            work["threads"] = 0
            assert client.error(request(NBD_CMD_WRITE_ZEROES, 1, 64 * KIB)) == 0
            assert (work["threads"] == 1) is (at_once == 0)


def test_what_is_left_to_threads_is_not_overwritten_meanwhile(tmp_path):
    """The buffer in which it came is all connections'."""
    pages = [random.Random(n).randbytes(PAGE // 2) * 2 for n in range(200)]
    with running("zstd(level=19)") as server:
        address = server.listen(UnixAddress(tmp_path / "s"))
        with RawClient(address) as client, RawClient(address) as other:
            for n, page in enumerate(pages):
                client.send(request(NBD_CMD_WRITE, n * PAGE, PAGE) + page)
                other.write(SIZE - PAGE, page[::-1])
            for _ in pages:
                assert client.reply() == (1, 0)
            assert client.read(0, len(pages) * PAGE) == b"".join(pages)


@pytest.mark.parametrize("serving", [False, True])
def test_tcp_sends_at_once_and_notices_a_peer_that_has_vanished(serving):
    with running("lz4") as server:
        address = server.listen(TcpAddress("127.0.0.1", 0))
        with RawClient(address, "" if serving else None):
            wait_for(lambda: [c.serving for c in server.server.live] == [serving])
            (served,) = server.server.live
            sock = served._transport.get_extra_info("socket")
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)

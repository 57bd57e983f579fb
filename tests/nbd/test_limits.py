"""How many clients may be connected, and what becomes of those beyond; read-only; vsock."""

import errno
import logging
import resource
import socket
from pathlib import Path

import pytest

from tests.nbd.harness import RawClient, RunningServer, request, wait_for
from zramd.device import Zram
from zramd.errors import BadValue, ServerExists
from zramd.nbd import connection, server
from zramd.nbd.address import TcpAddress, UnixAddress, VsockAddress, address_of
from zramd.nbd.server import most_connections
from zramd.nbd.wire import (
    NBD_CMD_FLUSH,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
    NBD_CMD_WRITE_ZEROES,
    NBD_FLAG_READ_ONLY,
)

MIB = 1 << 20


@pytest.fixture
def zram():
    zram = Zram("zram0")
    zram.init(MIB)
    yield zram
    zram.close()


@pytest.fixture
def start(zram, tmp_path):
    started = []

    def start(**options):
        started.append(RunningServer(zram, **options))
        return started[-1], started[-1].listen(UnixAddress(tmp_path / "nbd.sock"))

    yield start
    for running in started:
        running.close()
    assert zram.statistics().openers == ()


def is_turned_away(address):
    with RawClient(address, None) as client:
        return client.ended()


def test_who_comes_beyond_the_limit_is_closed_at_once_and_the_others_live(start):
    running, address = start(max_connections=3)
    clients = [RawClient(address) for _ in range(3)]
    for _ in range(20):
        assert is_turned_away(address)
    assert running.server.connections == 3
    for client in clients:
        client.write(0, b"served")
    clients.pop().sock.close()
    wait_for(lambda: running.server.connections == 2)
    clients.append(RawClient(address))
    assert is_turned_away(address)
    for client in clients:
        client.sock.close()


def test_a_burst_is_logged_once(start, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "zramd.nbd.server")
    _, address = start(max_connections=1)
    with RawClient(address):
        for _ in range(20):
            assert is_turned_away(address)
        (said,) = caplog.messages
        assert said == "1 connections to zram0, the most there may be: who comes now is turned away"
        monkeypatch.setattr(server, "_BURST_SECONDS", 0.0)
        assert is_turned_away(address)
        assert len(caplog.messages) == 2


def test_the_limit_is_that_of_all_addresses_together(start):
    running, address = start(max_connections=2)
    tcp = running.listen(TcpAddress("127.0.0.1", 0))
    with RawClient(address), RawClient(tcp):
        assert is_turned_away(address)
        assert is_turned_away(tcp)


def test_others_do_not_take_the_places_of_the_devices_own_socket(start, tmp_path):
    running, address = start(max_connections=2)
    running.do(running.server.listen(own := UnixAddress(tmp_path / "own.sock"), private=True))
    others = [RawClient(address) for _ in range(2)]
    assert is_turned_away(address)
    ours = [RawClient(own) for _ in range(server._PRIVATE_CONNECTIONS)]
    assert is_turned_away(own)
    for client in (*others, *ours):
        client.sock.close()


def test_a_burst_of_clients_that_are_dropped_is_logged_once(start, caplog):
    caplog.set_level(logging.INFO, "zramd.nbd.server")
    _, address = start()
    for _ in range(20):
        with RawClient(address) as client:
            client.send(b"no request" * 3)
            assert client.ended()
    assert [record.getMessage().split(": ")[0][:8] for record in caplog.records] == ["dropping"]


def test_a_handshake_that_does_not_go_on_holds_its_place_no_longer_than_it_may(start, monkeypatch):
    monkeypatch.setattr(connection, "_HANDSHAKE_SECONDS", 0.3)
    _, address = start(max_connections=2)
    with RawClient(address, None) as idle, RawClient(address, None) as slow:
        idle.receive(18)
        slow.send(b"\0\0")
        assert is_turned_away(address)
        assert idle.ended()
        slow.receive(18)
        assert slow.ended()
        with RawClient(address) as client:
            client.write(0, b"served")


def test_many_that_come_at_once_get_their_places_and_no_more_than_these(start):
    running, address = start(max_connections=100)
    clients = [RawClient(address, None) for _ in range(300)]
    wait_for(lambda: running.server.connections == 100)
    served = [client for client in clients if client.sock.recv(8)]
    assert len(served) == 100
    for client in clients:
        client.sock.close()


def test_the_default_fits_the_limit_of_descriptors(monkeypatch):
    for soft, expected in ((1024, 768), (1 << 20, 1024), (500, 244), (256, 16), (64, 16)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, soft=soft: (soft, 1 << 20))
        assert most_connections(None) == expected


def test_a_limit_that_needs_more_descriptors_gets_them_or_is_refused(monkeypatch):
    limits = [1024, 4096]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.__setitem__(slice(2), new))
    assert most_connections(100) == 100
    assert limits == [1024, 4096]
    assert most_connections(2000) == 2000
    assert limits == [2256, 4096]

    def refuse(_which, new):
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "setrlimit", refuse)
    with pytest.raises(BadValue, match="100000 connections take 100256 descriptors") as caught:
        most_connections(100000)
    assert "ulimit" in caught.value.hint


def test_a_read_only_server_takes_no_writes(start, zram):
    opener = zram.open("test")
    opener.write(0, b"kept")
    opener.close()
    _, address = start(read_only=True)
    with RawClient(address) as client:
        assert client.info.flags & NBD_FLAG_READ_ONLY
        assert client.error(request(NBD_CMD_WRITE, 0, 4) + b"lost") == errno.EPERM
        assert client.error(request(NBD_CMD_TRIM, 0, 4096)) == errno.EPERM
        assert client.error(request(NBD_CMD_WRITE_ZEROES, 0, 4096)) == errno.EPERM
        assert client.error(request(NBD_CMD_FLUSH)) == 0
        assert client.read(0, 4) == b"kept"


# vsock: a connection takes a guest, tests/kernel/test_vsock.py


@pytest.fixture
def vsock():
    try:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
            probe.bind((socket.VMADDR_CID_ANY, 0))
    except OSError as error:
        pytest.skip(f"this kernel has no vsock: {error.strerror}")
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as probe:
        probe.bind((socket.VMADDR_CID_ANY, socket.VMADDR_PORT_ANY))
        return VsockAddress(socket.VMADDR_CID_ANY, probe.getsockname()[1])


def test_a_server_listens_on_vsock_and_on_such_a_socket_that_it_is_passed(start, vsock):
    running, _ = start()
    assert running.listen(vsock) == vsock
    with pytest.raises(ServerExists, match=f"listens on {vsock} already"):
        running.listen(vsock)
    passed = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    passed.bind((vsock.cid, vsock.port + 1))
    passed.listen()
    running.do(running.server.adopt(passed))
    assert running.server.addresses[-1] == VsockAddress(vsock.cid, vsock.port + 1)


def test_a_cid_that_is_not_ours_is_refused_by_name(start, vsock):
    running, _ = start()
    with pytest.raises(BadValue, match=r"cannot listen on vsock:77777:1"):
        running.listen(VsockAddress(77777, 1))


@pytest.mark.parametrize(
    "address", [UnixAddress(Path("/no/such/place/s")), TcpAddress("192.0.2.1", 10809)]
)
def test_where_it_cannot_listen_it_says_why_and_what_to_do(start, address):
    running, _ = start()
    with pytest.raises(BadValue) as caught:
        running.listen(address)
    said = caught.value.line()
    assert said.startswith(f"cannot listen on {address}: ")
    assert "; name an address of this machine" in said


def test_a_guest_is_named():
    assert str(address_of(socket.AF_VSOCK, (3, 1023))) == "vsock:3:1023"

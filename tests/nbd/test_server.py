"""A real server over a real device, spoken to over raw sockets."""

import os
import random
import socket
import stat
import threading
from pathlib import Path

import pytest

from tests.nbd.harness import DEADLINE_S, RawClient, RunningServer, request, wait_for
from zramd import attributes
from zramd.device import Zram
from zramd.errors import BadValue, DeviceBusy, ServerExists
from zramd.nbd import connection, transmission, wire
from zramd.nbd import server as server_module
from zramd.nbd.address import TcpAddress, UnixAddress
from zramd.nbd.transmission import INLINE
from zramd.nbd.wire import (
    NBD_CMD_DISC,
    NBD_CMD_FLUSH,
    NBD_CMD_READ,
    NBD_CMD_TRIM,
    NBD_CMD_WRITE,
)
from zramd.opener import Opener

MIB = 1 << 20
SIZE = 64 * MIB
LONG = INLINE + 4096
EIO, EINVAL, ENOSPC, ESHUTDOWN = 5, 22, 28, 108


@pytest.fixture
def zram():
    zram = Zram("zram0")
    zram.init(SIZE)
    yield zram
    zram.close()


@pytest.fixture
def running(zram):
    running = RunningServer(zram)
    yield running
    running.close()
    assert zram.statistics().openers == ()


@pytest.fixture
def address(running, tmp_path):
    return running.listen(UnixAddress(tmp_path / "nbd.sock"))


@pytest.fixture
def held(monkeypatch):
    """Reads and trims longer than INLINE wait for the event; `.inside` counts those that did."""
    gate = threading.Event()
    gate.inside = 0
    lock = threading.Lock()

    def hold(call):
        def waits(self, offset, length):
            if length > INLINE:
                with lock:
                    gate.inside += 1
                gate.wait()
            return call(self, offset, length)

        return waits

    monkeypatch.setattr(Opener, "parts", hold(Opener.parts))
    monkeypatch.setattr(Opener, "discard", hold(Opener.discard))
    yield gate
    gate.set()


def noise(size, seed=1):
    return random.Random(seed).randbytes(size)


def openers(zram):
    return zram.statistics().openers


# Serving


@pytest.mark.parametrize("export", ["", "zram0"])
def test_the_device_is_served_under_its_name_and_under_none(address, export):
    with RawClient(address, export) as client:
        assert client.info.size == SIZE
        assert client.info.flags == transmission.FLAGS
        assert client.info.minimum_block == 1
        assert client.info.preferred_block == 4096
        assert client.info.maximum_payload == 32 * MIB


def test_another_name_is_refused_by_name(address):
    with pytest.raises(BadValue, match=r"zram1.*zram0"):
        RawClient(address, "zram1")


def test_a_device_without_disksize_is_refused_until_it_has_one(tmp_path):
    zram = Zram("zram0")
    running = RunningServer(zram)
    try:
        address = running.listen(UnixAddress(tmp_path / "nbd.sock"))
        with pytest.raises(BadValue, match="no disksize"):
            RawClient(address)
        zram.init(MIB)
        with RawClient(address) as client:
            assert client.info.size == MIB
    finally:
        running.close()
        zram.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_tcp_is_served_too(running, host):
    address = running.listen(TcpAddress(host, 0))
    assert address.port != 0
    with RawClient(address) as client:
        client.write(1, b"over tcp")
        assert client.read(0, 10) == b"\0over tcp\0"


def test_the_device_names_its_clients(running, address, zram):
    with RawClient(address):
        (who,) = openers(zram)
        assert f"pid {os.getpid()}" in who
    tcp = running.listen(TcpAddress("127.0.0.1", 0))
    with RawClient(tcp) as client:
        wait_for(lambda: len(openers(zram)) == 1)
        assert f"127.0.0.1:{client.sock.getsockname()[1]}" in openers(zram)[0]


def test_a_client_cannot_name_itself_what_a_terminal_obeys(address, zram):
    comm = Path("/proc/self/comm")
    before = comm.read_text()
    comm.write_text("\x1b[2J\nzramd: ok")
    try:
        with RawClient(address):
            (name,) = zram.statistics().openers
    finally:
        comm.write_text(before)
    assert "?[2J?zramd: ok (pid" in name


def test_a_pipeline_in_one_piece_is_answered_in_order(address):
    pages = [noise(4096, seed) for seed in range(100)]
    with RawClient(address) as client:
        stream = b""
        for n, page in enumerate(pages):
            stream += request(NBD_CMD_WRITE, n * 4096, 4096, cookie=2 * n) + page
            stream += request(NBD_CMD_READ, n * 4096, 4096, cookie=2 * n + 1)
        sender = threading.Thread(target=client.send, args=(stream,))
        sender.start()
        for n, page in enumerate(pages):
            assert client.reply() == (2 * n, 0)
            assert client.reply() == (2 * n + 1, 0)
            assert client.receive(4096) == page
        sender.join()


@pytest.mark.parametrize("length", [16, 4096])  # in the same piece as the handshake, and not
def test_what_is_sent_ahead_of_the_handshakes_end_is_answered(address, length):
    with RawClient(address, None) as client:
        client.send(
            wire.CLIENT_FLAGS.pack(3)
            + wire.pack_option(wire.NBD_OPT_EXPORT_NAME, b"zram0")
            + request(NBD_CMD_WRITE, 0, length)
            + b"z" * length
            + request(NBD_CMD_READ, 0, length, cookie=2)
        )
        client.receive(18 + 10)
        assert client.reply() == (1, 0)
        assert client.reply() == (2, 0)
        assert client.receive(length) == b"z" * length


@pytest.mark.parametrize("length", [1, 4095, INLINE, INLINE + 1, MIB + 3, 32 * MIB])
def test_any_length_up_to_the_limit_is_written_and_read_back(address, length):
    data = noise(length)
    with RawClient(address) as client:
        client.write(7, data)
        assert client.read(7, length) == data
        assert client.read(0, 7) == bytes(7)


def test_long_and_short_requests_mix(address):
    with RawClient(address) as client:
        contents = {n: noise(LONG if n % 3 == 0 else 512, n) for n in range(60)}
        stream = b"".join(
            request(NBD_CMD_WRITE, n * MIB, len(data), cookie=n) + data
            for n, data in contents.items()
        )
        client.send(stream)
        assert sorted(client.reply() for _ in contents) == [(n, 0) for n in contents]
        for n, data in contents.items():
            client.send(request(NBD_CMD_READ, n * MIB, len(data), cookie=n))
        for _ in contents:
            n, error = client.reply()
            assert error == 0
            assert client.receive(len(contents[n])) == contents[n]


def test_a_short_request_overtakes_long_ones(address, held):
    with RawClient(address) as client:
        client.send(request(NBD_CMD_READ, 0, LONG, cookie=1) + request(NBD_CMD_FLUSH, cookie=2))
        assert client.reply() == (2, 0)
        held.set()
        assert client.reply() == (1, 0)
        assert client.receive(LONG) == bytes(LONG)


def test_a_full_store_refuses_the_write_and_the_connection_lives(address, zram):
    with RawClient(address) as client:
        client.write(0, b"a" * 4096)
        attributes.set(zram, "mem_limit", "1M")
        stream = b"".join(request(NBD_CMD_WRITE, n * MIB, MIB) + noise(MIB, n) for n in range(1, 4))
        client.send(stream)
        assert {client.reply()[1] for _ in range(3)} <= {0, ENOSPC}
        assert client.error(request(NBD_CMD_WRITE, 9 * MIB, MIB) + noise(MIB)) == ENOSPC
        assert client.read(0, 4096) == b"a" * 4096


def test_a_write_that_waits_for_a_compaction_makes_nobody_else_wait(address, zram):
    attributes.set(zram, "mem_limit", "2M")
    with RawClient(address) as writer, RawClient(address) as other:
        number = 0
        while writer.error(request(NBD_CMD_WRITE, number * 4096, 4096) + noise(4096, number)) == 0:
            number += 1
        pages = zram._meta
        with pages._compaction:  # somebody compacts just now
            writer.send(request(NBD_CMD_WRITE, number * 4096 + 1, 2, cookie=7) + b"ab")
            assert other.read(0, 4096) == noise(4096, 0)
            writer.send(request(NBD_CMD_READ, 4096, 4096, cookie=8))
            assert writer.reply() == (8, 0)
            assert writer.receive(4096) == noise(4096, 1)
            other.error(request(NBD_CMD_TRIM, 0, 1 << 20))
        assert writer.reply() == (7, 0)
        assert writer.read(number * 4096, 4) == b"\0ab\0"


def test_out_of_range_is_counted_by_the_device(address, zram):
    with RawClient(address) as client:
        assert client.error(request(NBD_CMD_TRIM, SIZE, 4096)) == 22
        assert client.error(request(NBD_CMD_WRITE, SIZE, 4096) + bytes(4096)) == ENOSPC
    assert zram.statistics().invalid_io == 2


def test_many_connections_at_once(running, address, zram):
    clients = [RawClient(address) for _ in range(60)]
    assert running.server.connections == 60
    for n, client in enumerate(clients):
        client.send(request(NBD_CMD_WRITE, n * 4096, 4096) + noise(4096, n))
    for client in clients:
        assert client.reply() == (1, 0)
    for n, client in enumerate(reversed(clients)):
        assert client.read((59 - n) * 4096, 4096) == noise(4096, 59 - n)
        client.read((n % 60) * 4096, 1)
    for client in clients:
        client.sock.close()
    wait_for(lambda: running.server.connections == 0)
    assert openers(zram) == ()


def test_threads_of_clients_see_their_own_data(address):
    failures = []

    def work(n):
        try:
            with RawClient(address) as client:
                for round_ in range(20):
                    data = noise(LONG if round_ % 5 == 0 else 4096, n * 1000 + round_)
                    client.write(n * MIB, data)
                    assert client.read(n * MIB, len(data)) == data
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Bounds


@pytest.mark.parametrize("length", [65536, LONG])
def test_a_peer_that_does_not_read_is_not_read_from_and_loses_nothing(running, address, length):
    count = 1000
    with RawClient(address) as client, RawClient(address) as other:
        client.write(0, noise(length))
        stream = b"".join(request(NBD_CMD_READ, 0, length, cookie=n) for n in range(count))
        client.send(stream)
        wait_for(lambda: any(not c._reading for c in running.server.live))
        other.write(MIB, b"meanwhile")
        waiting = running.ask(
            lambda: max(c._transport.get_write_buffer_size() for c in running.server.live)
        )
        assert waiting < connection._BATCH + connection._IN_FLIGHT * (length + 16) + 2 * MIB
        seen = set()
        for _ in range(count):
            cookie, error = client.reply()
            assert error == 0
            assert client.receive(length) == noise(length)
            seen.add(cookie)
        assert seen == set(range(count))


def test_a_client_has_one_turn_scheduled_whatever_ends_meanwhile(address, monkeypatch):
    monkeypatch.setattr(connection, "_TURN_SECONDS", 0)  # each request ends its turn
    due = []
    take = connection.Connection._take_turn
    monkeypatch.setattr(
        connection.Connection, "_take_turn", lambda self: due.append(self._turn_due) or take(self)
    )
    # Those that go to a thread come back while another turn is due.
    burst = request(NBD_CMD_TRIM, 0, LONG) + 5 * request(NBD_CMD_READ, 0, 512)
    with RawClient(address) as client:
        for _ in range(50):
            client.send(4 * burst)
            client.receive(4 * (6 * 16 + 5 * 512))
    assert len(due) > 100
    assert all(due)


@pytest.mark.parametrize("command", [NBD_CMD_READ, NBD_CMD_TRIM])  # long replies, and short
def test_what_is_in_flight_is_bounded_in_number(running, address, held, command):
    count = connection._IN_FLIGHT + 40
    with RawClient(address) as client:
        client.send(
            b"".join(request(command, 0, LONG, cookie=n) for n in range(count))
            + request(NBD_CMD_FLUSH, cookie=count)
        )
        (served,) = running.server.live
        wait_for(lambda: not served._reading)
        assert running.ask(lambda: served._in_flight) == connection._IN_FLIGHT
        held.set()
        cookies = set()
        for _ in range(count + 1):
            cookie, error = client.reply()
            assert error == 0
            if command == NBD_CMD_READ and cookie != count:
                client.receive(LONG)
            cookies.add(cookie)
        assert cookies == set(range(count + 1))
        assert running.ask(lambda: (served._in_flight, served._in_flight_bytes)) == (0, 0)


def test_what_is_in_flight_is_bounded_in_bytes(running, address, held):
    with RawClient(address) as client:
        client.send(b"".join(request(NBD_CMD_READ, 0, 32 * MIB, cookie=n) for n in range(5)))
        (served,) = running.server.live
        wait_for(lambda: not served._reading)
        assert running.ask(lambda: served._in_flight_bytes) == connection._IN_FLIGHT_BYTES
        held.set()
        for _ in range(5):
            assert client.reply()[1] == 0
            client.receive(32 * MIB)


# Ends


def test_disc_ends_after_all_that_came_before_it_was_answered(address, zram, held):
    with RawClient(address) as client:
        client.send(
            request(NBD_CMD_READ, 0, LONG, cookie=1)
            + request(NBD_CMD_FLUSH, cookie=2)
            + request(NBD_CMD_DISC, cookie=3)
        )
        assert client.reply() == (2, 0)
        assert len(openers(zram)) == 1
        held.set()
        assert client.reply() == (1, 0)
        client.receive(LONG)
        assert client.ended()
        assert openers(zram) == ()


def test_nothing_is_read_after_disc_while_replies_are_outstanding(running, address, held):
    with RawClient(address) as client:
        client.send(request(NBD_CMD_READ, 0, LONG) + request(NBD_CMD_DISC))
        (served,) = running.server.live
        wait_for(lambda: served._ending)
        assert not running.ask(lambda: served._transport.is_reading())
        held.set()
        assert client.reply() == (1, 0)
        assert client.receive(LONG) == bytes(LONG)
        assert client.ended()


@pytest.mark.parametrize("sent", [0, 1, 100, INLINE])
def test_a_write_whose_payload_never_ends_is_not_done(running, address, zram, sent):
    client = RawClient(address)
    client.send(request(NBD_CMD_WRITE, 0, LONG) + b"x" * sent)
    client.sock.close()
    wait_for(lambda: running.server.connections == 0)
    assert zram.statistics().orig_data_size == 0
    assert openers(zram) == ()


def test_a_client_that_vanishes_leaves_its_requests_to_end_first(running, address, zram, held):
    client = RawClient(address)
    client.send(request(NBD_CMD_READ, 0, LONG))
    wait_for(lambda: held.inside == 1)
    client.sock.close()
    (served,) = running.server.live
    wait_for(lambda: served._ending)
    assert len(openers(zram)) == 1
    with pytest.raises(DeviceBusy):
        zram.reset()
    held.set()
    wait_for(lambda: running.server.connections == 0)
    assert openers(zram) == ()


def test_any_junk_leaves_the_server_serving(running, address, zram):
    dice = random.Random(42)
    starts = [
        b"",
        wire.CLIENT_FLAGS.pack(3),
        wire.CLIENT_FLAGS.pack(3) + b"IHAVEOPT",
        wire.CLIENT_FLAGS.pack(3) + wire.pack_option(wire.NBD_OPT_GO, wire.pack_go("")),
    ]
    for _ in range(200):
        with RawClient(address, None) as client:
            junk = dice.randbytes(dice.randrange(200))
            if dice.random() < 0.5:
                junk = request(dice.randrange(9), 0, dice.randrange(99), flags=dice.randrange(40))
            try:
                client.send(dice.choice(starts) + junk)
            except BrokenPipeError:
                pass
    wait_for(lambda: running.server.connections == 0)
    assert openers(zram) == ()
    with RawClient(address) as client:
        client.write(0, b"alive")


def test_a_handshake_has_a_time_limit(running, address, monkeypatch):
    monkeypatch.setattr(connection, "_HANDSHAKE_SECONDS", 0.01)
    with RawClient(address, None) as client:
        client.receive(18)
        assert client.ended()


def test_the_time_limit_ends_with_the_handshake(running, address):
    with RawClient(address):
        (served,) = running.server.live
        assert running.ask(lambda: served._timer) is None


def test_a_peer_that_reads_nothing_after_the_end_is_given_up(running, address, zram, monkeypatch):
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.01)
    with RawClient(address) as client:
        client.send(
            b"".join(request(NBD_CMD_READ, 0, INLINE, cookie=n) for n in range(10))
            + request(NBD_CMD_DISC)
        )
        wait_for(lambda: running.server.connections == 0)
        assert openers(zram) == ()


# Reset


def test_a_reset_is_refused_while_a_client_is_connected(address, zram):
    with RawClient(address) as client:
        with pytest.raises(DeviceBusy, match="nbd connection from"):
            zram.reset()
        client.write(0, b"still here")
        client.send(request(NBD_CMD_DISC))
        assert client.ended()
        zram.reset()


def test_a_forced_reset_ends_the_connections_after_what_was_admitted(address, zram, held):
    with RawClient(address) as busy, RawClient(address) as idle, RawClient(address, None) as new:
        busy.send(request(NBD_CMD_READ, 0, LONG))
        wait_for(lambda: held.inside == 1)
        zram.reset(force=True)  # the held read is outside the device: it meets a reset one
        assert idle.ended()
        zram.init(MIB)
        held.set()
        assert busy.reply() == (1, EIO)
        assert busy.ended()
        # One that had not opened the device yet is none of the reset's business.
        new.send(wire.CLIENT_FLAGS.pack(3) + wire.pack_option(wire.NBD_OPT_EXPORT_NAME))
        new.receive(28)
        new.write(0, b"new")
        assert openers(zram) == openers(zram)[:1]


class LikeTheKernel:
    """A client that keeps so many requests under way as nbd.ko does: with an answer it sends at
    once, and when a send fails it shuts its socket down and reads what has arrived by then."""

    def __init__(self, address, under_way, payload):
        self.client = RawClient(address)
        self.sent, self.answers = 0, []
        self._payload = payload
        self._sending = True
        for _ in range(under_way):
            self.send()

    def send(self):
        size = len(self._payload)
        try:
            self.client.send(request(NBD_CMD_WRITE, 0, size, cookie=self.sent) + self._payload)
            self.sent += 1
        except (BrokenPipeError, ConnectionResetError):
            self._sending = False
            try:
                self.client.sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def run(self, stop_after_errors):
        errors = 0
        try:
            while True:
                self.answers.append(self.client.reply())
                errors += self.answers[-1][1] != 0
                if self._sending and errors <= stop_after_errors:
                    self.send()
        except (EOFError, ConnectionResetError):
            pass


@pytest.mark.parametrize("stop_after_errors", [0, 1 << 30], ids=["it stops", "it goes on"])
@pytest.mark.parametrize("size", [512, 4096, INLINE])
def test_a_forced_reset_leaves_no_request_of_a_kernel_unanswered(
    running, address, zram, size, stop_after_errors
):
    for _ in range(5):
        kernel = LikeTheKernel(address, 16, bytes(size))
        thread = threading.Thread(target=kernel.run, args=(stop_after_errors,))
        thread.start()
        wait_for(lambda kernel=kernel: len(kernel.answers) > 50)
        zram.reset(force=True)
        thread.join(DEADLINE_S)
        assert not thread.is_alive()
        assert sorted(cookie for cookie, _ in kernel.answers) == list(range(kernel.sent))
        assert {error for _, error in kernel.answers} <= {0, EIO}
        kernel.client.sock.close()
        zram.init(SIZE)


def test_a_peer_that_sends_without_end_is_cut_all_the_same(running, address, zram, monkeypatch):
    monkeypatch.setattr(connection, "QUIET_SECONDS", 3600)
    with RawClient(address) as client:
        (served,) = running.server.live
        zram.reset(force=True)
        wait_for(lambda: served._refusal)
        stream = [request(NBD_CMD_READ, 0, 512, cookie=n) for n in range(connection._MOST_GATHERED)]
        client.send(b"".join(stream[:-1]))
        wait_for(lambda: len(served._gathered) == len(stream) - 1)
        running.ask(served._end_when_quiet)
        assert not served._cut
        beyond = [request(NBD_CMD_READ, 0, 512, cookie=len(stream) + n) for n in range(50)]
        client.send(stream[-1] + b"".join(beyond))
        wait_for(lambda: len(served._gathered) == len(stream))
        running.ask(served._end_when_quiet)
        expected = [(n, EIO) for n in range(len(stream) + len(beyond))]
        assert [client.reply() for _ in expected] == expected
        assert client.ended()


def test_a_peer_that_is_never_quiet_is_cut_when_its_time_is_over(
    running, address, zram, monkeypatch
):
    monkeypatch.setattr(connection, "QUIET_SECONDS", 3600)
    with RawClient(address) as client:
        (served,) = running.server.live
        zram.reset(force=True)
        wait_for(lambda: served._refusal)
        client.send(request(NBD_CMD_READ, 0, 512))
        wait_for(lambda: served._gathered)
        served._deadline = 0.0
        running.ask(served._end_when_quiet)
        assert client.reply() == (1, EIO)
        assert client.ended()


def test_a_reset_spares_the_connections_of_the_next_generation(running, address, zram):
    zram.reset(force=True)
    zram.init(MIB)
    with RawClient(address) as client:
        running.ask(running.server._end_old_generation)
        client.write(0, b"spared")
        assert client.read(0, 6) == b"spared"


# Listening


def test_the_socket_is_private_and_goes_with_the_server(zram, tmp_path):
    path = tmp_path / "nbd.sock"
    running = RunningServer(zram)
    running.listen(UnixAddress(path))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    running.close()
    assert not path.exists()
    assert zram.on_reset == []


def test_a_stale_socket_is_replaced(running, tmp_path):
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    address = running.listen(UnixAddress(path))
    with RawClient(address) as client:
        assert client.info.size == SIZE


def test_a_live_socket_is_refused_by_name_and_lives_on(running, address):
    with pytest.raises(ServerExists, match=str(address.path)):
        running.listen(address)
    with RawClient(address) as client:
        assert client.read(0, 1) == b"\0"


def test_a_socket_whose_backlog_is_full_is_live(running, tmp_path):
    path = tmp_path / "nbd.sock"
    with socket.socket(socket.AF_UNIX) as live, socket.socket(socket.AF_UNIX) as waiting:
        live.bind(str(path))
        live.listen(0)
        waiting.connect(str(path))
        with pytest.raises(ServerExists):
            running.listen(UnixAddress(path))


@pytest.mark.parametrize("kind", ["file", "directory", "symlink"])
def test_what_is_no_socket_is_refused_by_name_and_untouched(running, tmp_path, kind):
    path = tmp_path / "precious"
    if kind == "file":
        path.write_text("data")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("elsewhere")
    before = path.lstat()
    with pytest.raises(BadValue, match=str(path)):
        running.listen(UnixAddress(path))
    assert path.lstat() == before


def test_a_path_in_no_directory_is_refused_by_name(running, tmp_path):
    path = tmp_path / "missing" / "nbd.sock"
    with pytest.raises(BadValue, match=str(path)):
        running.listen(UnixAddress(path))


def test_a_socket_that_replaced_ours_stays(zram, tmp_path):
    path = tmp_path / "nbd.sock"
    running = RunningServer(zram)
    running.listen(UnixAddress(path))
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        running.close()
        assert path.exists()


def test_a_tcp_port_in_use_is_refused_by_name(running):
    address = running.listen(TcpAddress("127.0.0.1", 0))
    with pytest.raises(ServerExists, match=str(address)):
        running.listen(address)


def test_an_unknown_host_is_a_bad_value_that_names_it(running):
    with pytest.raises(BadValue, match=r"nowhere\.invalid"):
        running.listen(TcpAddress("nowhere.invalid", 10809))


# Closing


def test_close_answers_what_is_in_flight_and_refuses_the_rest(zram, tmp_path, held):
    running = RunningServer(zram)
    address = running.listen(UnixAddress(tmp_path / "nbd.sock"))
    in_flight, more = connection._IN_FLIGHT, 7
    with RawClient(address) as client, RawClient(address, None) as haggling:
        haggling.receive(18)
        client.send(
            b"".join(request(NBD_CMD_READ, 0, LONG, cookie=n) for n in range(in_flight + more))
        )
        (served,) = (c for c in running.server.live if c.serving)
        wait_for(lambda: not served._reading)
        closing = running.begin(running.server.close())
        wait_for(lambda: served._refusal)
        haggling.send(wire.CLIENT_FLAGS.pack(3) + wire.pack_option(wire.NBD_OPT_LIST))
        reply = wire.OPTION_REPLY.unpack(haggling.receive(20))[2]
        assert reply == wire.NBD_REP_ERR_SHUTDOWN
        held.set()
        answered = {}
        for _ in range(in_flight + more):
            cookie, error = client.reply()
            answered[cookie] = error
            if not error:
                client.receive(LONG)
        assert [answered[n] for n in range(in_flight)] == [0] * in_flight
        assert [answered[in_flight + n] for n in range(more)] == [ESHUTDOWN] * more
        assert client.ended()
        closing.result(30)
        assert running.server.connections == 0
        assert openers(zram) == ()
    running.close()


def test_a_leave_answers_what_was_sent_as_it_should_be_and_leaves_the_socket(zram, tmp_path, held):
    running = RunningServer(zram)
    address = running.listen(UnixAddress(tmp_path / "nbd.sock"))
    content = noise(4096)
    with RawClient(address) as client:
        client.send(request(NBD_CMD_READ, 0, LONG, cookie=1))
        wait_for(lambda: held.inside)
        (served,) = running.server.live
        closing = running.begin(running.server.close(leave=True))
        wait_for(lambda: served._gathers)
        client.send(request(NBD_CMD_WRITE, 8192, 4096, cookie=2) + content)
        client.send(request(NBD_CMD_READ, 8192, 4096, cookie=3))
        client.send(request(NBD_CMD_READ, 1 << 40, 512, cookie=4))
        client.send(request(NBD_CMD_WRITE, 0, LONG, cookie=5) + bytes(LONG))
        wait_for(lambda: len(served._gathered) == 4)
        held.set()
        read = {}
        for _ in range(5):
            cookie, error = client.reply()
            assert error == (EINVAL if cookie == 4 else 0), cookie
            if cookie in (1, 3):
                read[cookie] = client.receive(LONG if cookie == 1 else 4096)
        assert read[3] == content
        assert client.ended()
        closing.result(30)
    assert openers(zram) == ()
    assert address.path.exists()
    running.close()


@pytest.mark.parametrize("size", [512, 4096, INLINE])
def test_a_leave_leaves_no_request_of_a_kernel_unanswered_or_failed(zram, tmp_path, size):
    running = RunningServer(zram)
    address = running.listen(UnixAddress(tmp_path / "nbd.sock"))
    kernel = LikeTheKernel(address, 16, bytes(size))
    thread = threading.Thread(target=kernel.run, args=(0,))
    thread.start()
    wait_for(lambda: len(kernel.answers) > 50)
    running.do(running.server.close(leave=True))
    thread.join(DEADLINE_S)
    assert sorted(kernel.answers) == [(n, 0) for n in range(kernel.sent)]
    kernel.client.sock.close()
    running.close()


def test_who_leaves_has_no_more_answers_in_memory_than_a_kernel_asks_for(
    zram, tmp_path, monkeypatch
):
    monkeypatch.setattr(connection, "QUIET_SECONDS", 3600)
    monkeypatch.setattr(connection, "_MOST_GATHERED_BYTES", 8192)
    running = RunningServer(zram)
    address = running.listen(UnixAddress(tmp_path / "nbd.sock"))
    with RawClient(address) as client:
        (served,) = running.server.live
        closing = running.begin(running.server.close(leave=True))
        wait_for(lambda: served._gathers)
        client.send(request(NBD_CMD_READ, 0, 8192))
        wait_for(lambda: served._gathered)
        running.ask(served._end_when_quiet)
        assert client.reply() == (1, 0)
        assert client.receive(8192) == bytes(8192)
        assert client.ended()
        closing.result(30)
    running.close()


def test_who_leaves_keeps_back_few_of_a_strangers_answers(zram, tmp_path, monkeypatch):
    monkeypatch.setattr(connection, "_MOST_GATHERED_BYTES", 1 << 20)
    most = []
    gather = connection.Connection._gather_answer

    def gather_answer(self, request):
        gather(self, request)
        most.append(self._gathered_bytes)

    monkeypatch.setattr(connection.Connection, "_gather_answer", gather_answer)
    running = RunningServer(zram)
    address = running.listen(UnixAddress(tmp_path / "nbd.sock"))
    with RawClient(address) as client:
        (served,) = running.server.live
        many = 2000 * request(NBD_CMD_READ, 0, INLINE)
        running.ask(lambda: (client.send(many), served.end(None)))  # so they are seen at once
        while client.sock.recv(1 << 20):
            pass
    running.close()
    assert max(most) < (1 << 20) + 2 * INLINE


@pytest.mark.parametrize("reads", [True, False])
def test_who_leaves_begins_no_more_than_there_is_room_for(zram, tmp_path, held, monkeypatch, reads):
    monkeypatch.setattr(connection, "_IN_FLIGHT", 4)
    monkeypatch.setattr(connection, "LEAVE_SECONDS", 20 if reads else 0.5)
    monkeypatch.setattr(server_module, "LEAVE_SECONDS", 20 if reads else 0.5)
    running = RunningServer(zram)
    address = running.listen(UnixAddress(tmp_path / "nbd.sock"))
    begun: list[int] = []
    submit = connection.Connection._submit

    def count(self, opener, request):
        submit(self, opener, request)
        begun.append(self._in_flight)

    monkeypatch.setattr(connection.Connection, "_submit", count)
    n = 100
    with RawClient(address) as client:
        (served,) = running.server.live
        closing = running.begin(running.server.close(leave=True))
        wait_for(lambda: served._gathers)
        client.send(b"".join(request(NBD_CMD_READ, 0, LONG, cookie=i) for i in range(n)))
        wait_for(lambda: held.inside)
        held.set()
        if reads:
            answered = []
            for _ in range(n):
                answered.append(client.reply()[0])
                client.receive(LONG)
            assert sorted(answered) == list(range(n))
            assert client.ended()
        closing.result(30)
    assert max(begun) <= 4
    assert reads or len(begun) < n
    assert openers(zram) == ()
    running.close()


def test_close_does_not_wait_for_ever_for_a_peer_that_does_not_read(zram, tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "LINGER_SECONDS", 0.01)
    running = RunningServer(zram)
    address = running.listen(UnixAddress(tmp_path / "nbd.sock"))
    with RawClient(address) as client:
        client.send(b"".join(request(NBD_CMD_READ, 0, INLINE, cookie=n) for n in range(100)))
        wait_for(lambda: any(not c._reading for c in running.server.live))
        running.close()
    assert openers(zram) == ()
    assert not [t for t in threading.enumerate() if t.name.startswith("nbd")]

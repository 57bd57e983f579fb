"""`zramd serve` and the verbs that ask a server: get, set, reset."""

import contextlib
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.cli.conftest import DEADLINE_S, wait_for
from tests.conftest import require


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_and_it_leaves_nothing(zramd, number):
    server = zramd.serve("zram0")
    assert zramd.left() == ["zram0", "zram0/control", "zram0/lock", "zram0/nbd.sock"]
    for made in ("control", "lock", "nbd.sock"):
        assert stat.S_IMODE((zramd.runtime / "zram0" / made).stat().st_mode) == 0o600
    server.send_signal(number)
    assert server.wait(DEADLINE_S) == 0
    assert zramd.left() == []


def test_a_signal_ends_the_server_though_a_client_is_connected(zramd):
    server = zramd.serve("zram0")
    with zramd.connect("zram0") as client:
        server.terminate()
        assert client.recv(1) == b""
        assert server.wait(DEADLINE_S) == 0
    assert zramd.left() == []


def test_told_to_end_a_server_that_carries_a_mount_serves_on_until_that_is_over(zramd):
    server = zramd.serve("zram0", "--disksize=16M", "--for=mount")
    with zramd.connect("zram0") as client, zramd.connect("zram0"):
        for _ in range(2):
            server.terminate()
        assert "in use: serving on" in server.stderr.readline()
        assert zramd.ok("get", "zram0", "disksize") == f"{16 << 20}\n"
        flush = b"\x25\x60\x95\x13" + b"\0\0\0\3" + bytes(20)
        client.sendall(flush)
        assert client.recv(16, socket.MSG_WAITALL) == b"\x67\x44\x66\x98" + bytes(12)
        assert server.poll() is None
    assert server.wait(DEADLINE_S) == 0
    assert zramd.left() == []


def test_told_to_end_a_server_that_nobody_uses_ends_whatever_it_carries(zramd):
    server = zramd.serve("zram0", "--disksize=16M", "--for=mount")
    server.terminate()
    assert server.wait(DEADLINE_S) == 0


def test_an_interrupt_ends_a_server_that_is_in_use_too(zramd):
    server = zramd.serve("zram0", "--disksize=16M", "--for=mount")
    with zramd.connect("zram0"):
        server.send_signal(signal.SIGINT)
        assert server.wait(DEADLINE_S) == 0
    assert zramd.left() == []


def test_readiness_says_what_is_served_where(zramd):
    server = zramd.start(
        *("serve", "zram0", "--disksize=1G", "--algorithm=zstd(level=2)"),
        *("--listen", f"unix:{zramd.runtime}/more.sock"),
    )
    line = server.stderr.readline()
    assert line == (
        f"zramd: zram0 (1G, zstd(level=2)) is served on {zramd.runtime}/zram0/nbd.sock,"
        f" unix:{zramd.runtime}/more.sock\n"
    )
    server.terminate()
    server.wait(DEADLINE_S)
    assert zramd.left() == []


@contextlib.contextmanager
def told_to(zramd) -> Iterator[Callable[[str], str]]:
    """A manager that NOTIFY_SOCKET names; how to wait for what it is told with such a beginning."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{zramd.runtime}/notify")
        manager.settimeout(DEADLINE_S)
        zramd.environment["NOTIFY_SOCKET"] = f"{zramd.runtime}/notify"

        def wait(beginning: str) -> str:
            while True:
                message = manager.recv(4096).decode()
                if message.startswith("FDSTORE"):
                    continue  # the arena's business, of which tests/service/test_store.py tells
                if any(line.startswith(beginning) for line in message.splitlines()):
                    return message

        yield wait
    os.unlink(f"{zramd.runtime}/notify")


def test_readiness_is_told_to_systemd_once_the_sockets_listen(zramd):
    with told_to(zramd) as wait:
        server = zramd.start("serve", "zram0", "--disksize=16M")
        assert wait("").startswith("READY=1\nSTATUS=zram0 ")
        del zramd.environment["NOTIFY_SOCKET"]
        assert zramd.ok("get", "zram0", "initstate") == "1\n"
        server.terminate()
        assert wait("STOPPING") == "STOPPING=1"
        server.wait(DEADLINE_S)


def test_systemd_is_told_what_is_stored_when_that_changes_and_that_the_loop_goes_round(zramd):
    with told_to(zramd) as wait:
        zramd.environment["WATCHDOG_USEC"] = "400000"
        zramd.serve("zram0", "--disksize=16M", "--mem-limit=1M")
        assert "WATCHDOG=1\nSTATUS=0B of pages stored in " in wait("STATUS=0B")
        zramd.ok("set", "zram0", "mem_limit", "2M")
        assert wait("STATUS=").endswith(" of RAM (limit 2M)")
        assert wait("") == "WATCHDOG=1"
        wait("WATCHDOG=1")
        zramd.ok("reset", "zram0")
        assert "STATUS=without a disksize" in wait("STATUS=")


def test_a_disksize_that_is_no_multiple_of_a_page_is_rounded_up_and_said(zramd):
    server = zramd.start("serve", "zram0", "--disksize=10000")
    assert "10000" in (line := server.stderr.readline())
    assert "12288" in line
    assert " is served on " in server.stderr.readline()
    assert zramd.ok("get", "zram0", "disksize") == "12288\n"


def test_the_options_reach_the_device(zramd):
    zramd.serve("zram0", "-s", "1.5M", "-a", "zstd(level=5)", "--mem-limit", "1M")
    assert zramd.ok("get", "zram0", "disksize") == "1572864\n"
    assert zramd.ok("get", "zram0", "mem_limit") == "1048576\n"
    assert "[zstd]" in zramd.ok("get", "zram0", "comp_algorithm")
    assert zramd.devices()["zram0"]["algorithm"] == "zstd(level=5)"


def test_a_second_server_of_the_name_is_refused_and_the_first_goes_on(zramd):
    server = zramd.serve("zram0")
    said = zramd.fails(21, "serve", "zram0", "--disksize=1M")
    assert f"zram0 is running already (process {server.pid})" in said
    assert "zramd down zram0" in said
    assert zramd.ok("get", "zram0", "disksize") == "16777216\n"


def test_of_many_servers_started_at_once_one_serves(zramd):
    servers = [zramd.start("serve", "zram0", "--disksize=1M") for _ in range(6)]
    wait_for(lambda: sum(s.poll() is None for s in servers) == 1)
    wait_for(lambda: zramd.run("get", "zram0", "initstate").stdout == "1\n")
    assert sorted(s.poll() for s in servers if s.poll() is not None) == [21] * 5


def test_what_a_killed_server_left_is_replaced(zramd):
    zramd.serve("zram0")
    zramd.kill("zram0")
    assert zramd.left() == ["zram0", "zram0/control", "zram0/lock", "zram0/nbd.sock"]
    zramd.serve("zram0", "--disksize=1M")
    assert zramd.ok("get", "zram0", "disksize") == "1048576\n"


def test_a_socket_to_listen_on_that_is_taken_fails_the_start_and_nothing_is_left(zramd):
    with socket.socket(socket.AF_UNIX) as live:
        live.bind(f"{zramd.runtime}/taken")
        live.listen()
        said = zramd.fails(
            21, "serve", "zram0", "--disksize=1M", "--listen", f"unix:{zramd.runtime}/taken"
        )
        assert f"{zramd.runtime}/taken" in said
        assert zramd.left() == ["taken"]


def test_a_file_where_a_socket_should_be_stays(zramd):
    (zramd.runtime / "precious").write_text("data")
    said = zramd.fails(
        2, "serve", "zram0", "--disksize=1M", "--listen", f"unix:{zramd.runtime}/precious"
    )
    assert "precious" in said
    assert (zramd.runtime / "precious").read_text() == "data"
    assert zramd.left() == ["precious"]


def test_it_listens_on_tcp_too(zramd):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    zramd.serve("zram0", "--disksize=1M", "--listen", f"tcp:127.0.0.1:{port}")
    with socket.create_connection(("127.0.0.1", port), DEADLINE_S) as client:
        assert client.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"


def test_a_server_in_another_runtime_directory_is_not_seen(zramd, tmp_path, monkeypatch):
    zramd.serve("zram0")
    monkeypatch.setitem(zramd.environment, "ZRAMD_RUNTIME_DIR", str(tmp_path))
    assert "no server runs for zram0" in zramd.fails(20, "get", "zram0", "disksize")
    monkeypatch.undo()
    assert zramd.ok("get", "zram0", "initstate") == "1\n"


def test_set_and_get_speak_zram_s_formats(zramd):
    zramd.serve("zram0")
    assert zramd.ok("set", "zram0", "mem_limit", "2M") == ""
    assert zramd.ok("get", "zram0", "mem_limit") == "2097152\n"
    assert len(zramd.ok("get", "zram0", "mm_stat").split()) == 9
    assert len(zramd.ok("get", "zram0", "io_stat").split()) == 4


def test_a_reset_device_is_made_usable_again_through_its_attributes(zramd):
    zramd.serve("zram0")
    assert zramd.ok("reset", "zram0") == ""
    assert zramd.ok("get", "zram0", "initstate") == "0\n"
    zramd.ok("set", "zram0", "comp_algorithm", "zstd")
    zramd.ok("set", "zram0", "disksize", "2M")
    with zramd.connect("zram0"):
        assert zramd.devices()["zram0"]["clients"] == 1


def test_a_reset_in_use_is_refused_naming_the_client_unless_forced(zramd):
    zramd.serve("zram0")
    with zramd.connect("zram0") as client:
        said = zramd.fails(30, "reset", "zram0")
        assert "connection" in said
        assert "--force" in said
        assert zramd.ok("get", "zram0", "initstate") == "1\n"
        zramd.ok("reset", "--force", "zram0")
        assert client.recv(1) == b""
    assert zramd.ok("get", "zram0", "initstate") == "0\n"


def test_the_command_says_its_version(zramd):
    assert zramd.ok("--version").startswith("zramd ")


def test_a_notify_socket_that_is_gone_does_not_end_the_server(zramd, tmp_path):
    zramd.environment["NOTIFY_SOCKET"] = str(tmp_path / "gone")
    zramd.serve("zram0")
    assert zramd.ok("get", "zram0", "initstate") == "1\n"


def test_an_address_in_the_devices_own_directory_is_refused(zramd):
    place = zramd.runtime / "zram0" / "control"
    said = zramd.fails(2, "serve", "zram0", "--disksize=1M", f"--listen=unix:{place}")
    assert "own directory" in said
    assert zramd.left() == []


_PASS = """
import fcntl, os, sys
high = [fcntl.fcntl(int(fd), fcntl.F_DUPFD, 100) for fd in sys.argv[1].split(",")]
for n, fd in enumerate(high):
    os.dup2(fd, 3 + n)
os.environ.update(LISTEN_FDS=str(len(high)), LISTEN_PID=sys.argv[2] or str(os.getpid()))
os.execv(sys.argv[3], sys.argv[3:])
"""


def start_with(zramd, files, *arguments: str, pid: str = "") -> subprocess.Popen[str]:
    """`zramd serve` started as systemd does it, with these sockets as its descriptors from 3 on."""
    descriptors = [file.fileno() for file in files]
    return subprocess.Popen(
        [
            *(sys.executable, "-c", _PASS, ",".join(map(str, descriptors)), pid),
            *zramd.argv("serve", "zram0", *arguments),
        ],
        env=zramd.environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        pass_fds=descriptors,
    )


@pytest.fixture
def listening(zramd):
    """A Unix and a TCP socket that listen, as a .socket unit has them."""
    with socket.socket(socket.AF_UNIX) as unix, socket.socket() as tcp:
        unix.bind(f"{zramd.runtime}/passed")
        tcp.bind(("127.0.0.1", 0))
        for sock in (unix, tcp):
            sock.listen()
        yield unix, tcp
    os.unlink(f"{zramd.runtime}/passed")


def test_sockets_that_systemd_passes_are_served_too_and_stay_when_the_server_ends(zramd, listening):
    port = listening[1].getsockname()[1]
    server = start_with(zramd, listening, "--disksize=16M")
    with server:
        line = server.stderr.readline()
        assert line == (
            f"zramd: zram0 (16M, lz4) is served on {zramd.runtime}/zram0/nbd.sock,"
            f" unix:{zramd.runtime}/passed, tcp:127.0.0.1:{port}\n"
        )
        with zramd.connect("zram0"):
            pass
        for sock in listening:
            with socket.socket(sock.family) as client:
                client.settimeout(DEADLINE_S)
                client.connect(sock.getsockname())
                assert client.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
        server.terminate()
        assert server.wait(DEADLINE_S) == 0
    assert zramd.left() == ["passed"]


def test_sockets_meant_for_another_process_are_left_alone(zramd, listening):
    server = start_with(zramd, listening, "--disksize=16M", pid="1")
    with server:
        assert server.stderr.readline().endswith("/zram0/nbd.sock\n")
        server.terminate()


def test_a_descriptor_that_is_no_listening_stream_socket_is_refused(zramd, listening):
    zramd.environment["LISTEN_FDNAMES"] = "nbd:other"
    with (
        socket.socket(socket.AF_UNIX) as deaf,
        socket.socket(type=socket.SOCK_DGRAM) as datagrams,
        open(os.devnull) as file,
    ):
        for wrong in (deaf, datagrams, file):
            with start_with(zramd, (listening[0], wrong), "--disksize=1M") as server:
                assert server.stderr.read() == (
                    "zramd: descriptor 4 (other) of LISTEN_FDS is no stream socket that listens;"
                    " its .socket unit needs ListenStream= and Accept=no\n"
                )
                assert server.wait(DEADLINE_S) == 2
    assert zramd.left() == ["passed"]


def test_a_passed_socket_in_the_devices_own_directory_is_refused(zramd):
    place = zramd.runtime / "zram0"
    place.mkdir()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(f"{place}/passed")
        sock.listen()
        with start_with(zramd, [sock], "--disksize=1M") as server:
            assert "lies in the device's own directory" in server.stderr.read()
            assert server.wait(DEADLINE_S) == 2


def test_swap_is_not_served_on_a_tcp_socket_that_systemd_passes(zramd, listening):
    server = start_with(
        *(zramd, listening, "--disksize=1M"),
        *("--for=swap", "--allow-deadlock", "--no-prealloc"),
    )
    with server:
        assert "over TCP it can deadlock" in server.stderr.read()
        assert server.wait(DEADLINE_S) == 2


def test_systemd_socket_activate_starts_it(zramd):
    program = require.program("systemd-socket-activate")
    path = f"{zramd.runtime}/activated"
    activator = subprocess.Popen(
        [program, f"--listen={path}", *zramd.argv("serve", "zram0", "--disksize=16M")],
        env=zramd.environment,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    with activator:
        wait_for(lambda: os.path.exists(path))
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(DEADLINE_S)
            client.connect(path)
            assert client.recv(8, socket.MSG_WAITALL) == b"NBDMAGIC"
        activator.terminate()
    assert activator.returncode == 0
    assert zramd.left() == ["activated"]


def test_a_passed_socket_that_others_can_reach_needs_tls_or_a_word_as_any_other(zramd):
    with socket.create_server(("0.0.0.0", 0)) as sock:
        with start_with(zramd, [sock], "--disksize=1M") as server:
            port = sock.getsockname()[1]
            assert f"whoever reaches tcp:0.0.0.0:{port} could" in server.stderr.read()
            assert server.wait(DEADLINE_S) == 2
        with start_with(zramd, [sock], "--disksize=1M", "--allow-plain-tcp") as server:
            assert f"tcp:0.0.0.0:{port}" in server.stderr.readline()
            server.terminate()
            assert server.wait(DEADLINE_S) == 0
    assert zramd.left() == []

"""`zramd serve` and the verbs that ask a server: get, set, reset."""

import os
import signal
import socket
import stat

import pytest

from tests.cli.conftest import DEADLINE_S, wait_for


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


def test_readiness_is_told_to_systemd_once_the_sockets_listen(zramd):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{zramd.runtime}/notify")
        manager.settimeout(DEADLINE_S)
        zramd.environment["NOTIFY_SOCKET"] = f"{zramd.runtime}/notify"
        server = zramd.start("serve", "zram0", "--disksize=16M")
        assert manager.recv(4096).startswith(b"READY=1\nSTATUS=zram0 ")
        del zramd.environment["NOTIFY_SOCKET"]
        assert zramd.ok("get", "zram0", "initstate") == "1\n"
        server.terminate()
        assert manager.recv(4096) == b"STOPPING=1"
        server.wait(DEADLINE_S)
    os.unlink(f"{zramd.runtime}/notify")


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

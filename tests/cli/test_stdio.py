"""`zramd serve --stdio`: the client is who started it, and nothing but NBD is said to him."""

import os
import pty
import signal
import socket
import subprocess
import sys

import pytest

from tests.cli.conftest import DEADLINE_S, alive, wait_for
from tests.nbd.harness import RawClient, request
from zramd.nbd import wire
from zramd.nbd.client import negotiate
from zramd.nbd.wire import NBD_CMD_DISC, NBD_CMD_READ, NBD_CMD_WRITE

MIB = 1 << 20


class _Client(RawClient):
    def __init__(self, sock):
        self.sock = sock
        sock.settimeout(DEADLINE_S)
        self.info = negotiate(sock, "")


@pytest.fixture
def start(zramd):
    """Starts it with the arguments of subprocess.Popen."""
    started = []

    def start(*arguments, **streams):
        command = zramd.argv("serve", "zram0", *(arguments or ("--disksize=16M",)), "--stdio")
        started.append(subprocess.Popen(command, env=zramd.environment, **streams))
        return started[-1]

    yield start
    for server in started:
        server.kill()
        server.communicate()


def over_a_socket(start, *arguments, **more):
    ours, theirs = socket.socketpair()
    with theirs:
        server = start(*arguments, stdin=theirs, stdout=theirs, **more)
    return server, ours


def conversation(*requests):
    go = wire.pack_option(wire.NBD_OPT_GO, wire.pack_go("", ()))
    return wire.CLIENT_FLAGS.pack(3) + go + b"".join(requests)


@pytest.mark.parametrize("end", ["disc", "close"])
def test_one_client_on_a_socket_is_served_and_the_server_ends_with_it(zramd, start, end):
    server, sock = over_a_socket(start, stderr=subprocess.PIPE)
    with _Client(sock) as client:
        assert client.info.size == 16 * MIB
        client.write(5, b"over stdin" * 100_000)
        assert client.read(5, 1_000_000) == b"over stdin" * 100_000
        assert zramd.devices()["zram0"]["clients"] == 1  # and all else is as ever
        with zramd.connect("zram0"):
            pass
        if end == "disc":
            client.send(request(NBD_CMD_DISC))
            assert client.ended()
    assert server.wait(DEADLINE_S) == 0
    said = server.stderr.read().decode()
    assert said.startswith("zramd: zram0 (16M, lz4) is served on ")
    assert said.count("\n") == 1
    assert zramd.left() == []


def test_one_client_on_two_pipes_gets_all_that_it_has_asked_for(start, zramd):
    """And then the end of file; though it has closed its own end long before."""
    pages = 2000
    asked = conversation(
        request(NBD_CMD_WRITE, 0, 4096) + b"p" * 4096,
        *(request(NBD_CMD_READ, 0, 4096, cookie=n) for n in range(pages)),
    )
    server = start(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, said = server.communicate(asked, DEADLINE_S)
    assert server.returncode == 0
    assert out.startswith(wire.pack_greeting())
    replies = out[-pages * (16 + 4096) :]
    for n in range(pages):
        reply = replies[n * 4112 : (n + 1) * 4112]
        assert reply[:4] == wire.NBD_SIMPLE_REPLY_MAGIC.to_bytes(4, "big")
        assert reply[16:] == b"p" * 4096
    assert said.startswith(b"zramd: zram0 (16M, lz4) is served on ")
    assert zramd.left() == []


def test_a_conversation_from_a_file_is_answered_into_a_file(start, tmp_path):
    (tmp_path / "in").write_bytes(conversation(request(NBD_CMD_DISC)))
    with open(tmp_path / "in", "rb") as stdin, open(tmp_path / "out", "wb") as stdout:
        assert start(stdin=stdin, stdout=stdout).wait(DEADLINE_S) == 0
    assert (tmp_path / "out").read_bytes().startswith(wire.pack_greeting())


def test_a_file_may_say_what_the_device_is(start, tmp_path):
    (tmp_path / "zram0.toml").write_text('disksize = "1M"\n')
    _, sock = over_a_socket(start, f"--config={tmp_path}/zram0.toml")
    with _Client(sock) as client:
        assert client.info.size == MIB


@pytest.mark.parametrize("kind", ["socket", "pipe"])
def test_where_stderr_is_the_client_too_nothing_is_said_there(start, kind, zramd):
    """As inetd has it."""
    asked = conversation(request(NBD_CMD_READ, 0, 16, cookie=7))
    if kind == "socket":
        ours, theirs = socket.socketpair()
        with theirs:
            server = start(stdin=theirs, stdout=theirs, stderr=theirs)
        ours.settimeout(DEADLINE_S)
        ours.sendall(asked)
        ours.shutdown(socket.SHUT_WR)
        out = b""
        while piece := ours.recv(65536):
            out += piece
        ours.close()
    else:
        server = start(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        out, _ = server.communicate(asked, DEADLINE_S)
    assert server.wait(DEADLINE_S) == 0
    assert out.startswith(wire.pack_greeting())
    assert out.endswith(b"\0" * 7 + b"\7" + bytes(16))
    assert b"zramd:" not in out


def test_an_error_is_not_said_to_the_client_either(start):
    server, sock = over_a_socket(
        start, "--disksize=16M", "--arena=/no/such/x", stderr=subprocess.STDOUT
    )
    with sock:
        sock.settimeout(DEADLINE_S)
        assert sock.recv(1) == b""
    assert server.wait(DEADLINE_S) != 0


def test_a_client_that_reads_nothing_and_goes_ends_it(start, zramd):
    server = start(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    reads = (request(NBD_CMD_READ, 0, 8 * MIB, cookie=n) for n in range(20))
    server.stdin.write(conversation(*reads))
    server.stdin.flush()
    server.stdout.close()
    assert server.wait(DEADLINE_S) == 0
    assert zramd.left() == []


def test_a_terminal_or_what_is_no_stream_is_refused(start, zramd):
    ours, terminal = pty.openpty()
    server = start(stdin=terminal, stdout=terminal, stderr=subprocess.PIPE)
    assert b"a terminal does not speak NBD" in server.communicate(timeout=DEADLINE_S)[1]
    assert server.returncode == 2
    os.close(ours)
    os.close(terminal)
    datagrams = socket.socketpair(type=socket.SOCK_DGRAM)
    server = start(stdin=datagrams[0], stdout=datagrams[0], stderr=subprocess.PIPE)
    assert b"--stdio serves on a connected stream" in server.communicate(timeout=DEADLINE_S)[1]
    assert server.returncode == 2
    for sock in datagrams:
        sock.close()
    closing = "import os, sys; os.close(0); os.execv(sys.argv[1], sys.argv[1:])"
    server = subprocess.Popen(
        [sys.executable, "-c", closing, *zramd.argv("serve", "zram0", "-s1M", "--stdio")],
        env=zramd.environment,
        stderr=subprocess.PIPE,
    )
    assert b"stdin or stdout is closed" in server.communicate(timeout=DEADLINE_S)[1]
    assert zramd.left() == []


def test_a_client_over_tcp_is_held_to_what_is_asked_of_tcp(start, zramd):
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ours = socket.create_connection(listening.getsockname())
        theirs, _ = listening.accept()
    with ours, theirs:
        server = start(
            *("--disksize=16M", "--for=swap", "--allow-deadlock"),
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
        )
        assert b"over TCP it can deadlock" in server.communicate(timeout=DEADLINE_S)[1]
    assert server.returncode == 2
    assert zramd.left() == []


def test_a_server_whose_worker_dies_ends_as_its_client_has_lost_it(zramd, start):
    server, sock = over_a_socket(start, stderr=subprocess.PIPE)
    with _Client(sock) as client:
        client.write(0, b"lost")
        wait_for(lambda: zramd.worker("zram0") != server.pid)
        os.kill(zramd.worker("zram0"), signal.SIGKILL)
        assert client.ended()
    assert server.wait(DEADLINE_S) == 0
    assert b"the client on stdin has lost its server" in server.stderr.read()
    assert zramd.left() == []


def test_it_cannot_be_upgraded_and_serves_on(zramd, start):
    server, sock = over_a_socket(start, stderr=subprocess.PIPE)
    with _Client(sock) as client:
        client.write(0, b"kept")
        said = zramd.run("upgrade", "zram0").stderr
        assert "stdin and stdout" in said
        assert client.read(0, 4) == b"kept"
    assert server.wait(DEADLINE_S) == 0
    assert not alive(server.pid)

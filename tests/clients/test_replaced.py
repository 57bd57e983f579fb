"""Clients that see no error while the worker that serves them is killed, and replaced: qemu with
reconnect-delay, and whoever is behind nbdkit's retry filter."""

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.clients.serving import DEADLINE_S, Served, served, uri_of
from tests.conftest import require
from tests.kernel.servers import wait_for


@pytest.fixture
def server() -> Iterator[Served]:
    with served("zramd") as server:
        yield server


def worker(server: Served) -> int:
    """Who does the I/O, when it is written down."""
    lock = server.path.with_name("lock")
    wait_for(lambda: len(lock.read_text().split()) == 2, "a worker")
    return int(lock.read_text().split()[1])


class QemuIo:
    """One that is asked line by line."""

    def __init__(self, *image: str) -> None:
        self.process = subprocess.Popen(
            [require.program("qemu-io"), *image],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def __enter__(self) -> "QemuIo":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.communicate()

    def ask(self, line: str) -> None:
        self.process.stdin.write(f"{line}\n")
        self.process.stdin.flush()

    def must_do_it(self) -> None:
        said = self.process.stdout.readline()
        assert re.search("(wrote|read) [0-9]+/", said), said
        self.process.stdout.readline()  # how fast that was

    def end(self) -> None:
        said, _ = self.process.communicate("read -P 1 0 512k\n", DEADLINE_S)
        assert "read 524288/" in said, said
        assert self.process.returncode == 0


def works_on(server: Served, *image: str) -> None:
    """Though the worker is killed: between two requests, and twice while one is under way."""
    with QemuIo(*image) as client:
        client.ask("write -P 1 0 256k")
        client.must_do_it()
        kill(server)
        client.ask("write -P 1 256k 128k")
        client.must_do_it()
        for line in ("write -P 1 384k 128k", "read -P 1 0 512k"):
            os.kill(worker(server), signal.SIGSTOP)
            client.ask(line)
            time.sleep(0.2)  # it has been sent, or will be sent to who is dead
            kill(server)
            client.must_do_it()
        client.end()


def kill(server: Served) -> None:
    """Returns when another has taken over."""
    before = worker(server)
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: worker(server) != before, "another worker")


def test_qemu_with_reconnect_delay(server):
    where = f"driver=nbd,server.type=unix,server.path={server.path},export=zram0"
    works_on(server, "--image-opts", f"{where},reconnect-delay=30")


def test_who_cannot_reconnect_behind_nbdkits_retry_filter(server, tmp_path):
    path = tmp_path / "sock"
    command = [require.program("nbdkit"), "-f", "-U", str(path), "--filter=retry"]
    proxy = subprocess.Popen([*command, "nbd", f"uri={server.uri}", "retry-delay=1"])
    try:
        wait_for(lambda: path.is_socket() or proxy.poll() is not None, "nbdkit")
        works_on(server, "-f", "raw", uri_of(path))
    finally:
        proxy.terminate()
        assert proxy.wait(DEADLINE_S) == 0

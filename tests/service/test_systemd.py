"""What a service manager is told, and that nobody ever waits for it."""

import asyncio
import logging
import os
import socket
import time

import pytest

from zramd import attributes
from zramd.device import Zram
from zramd.service.systemd import Manager, passed

MIB = 1 << 20


@pytest.fixture(params=["path", "abstract"])
def heard(request, tmp_path, monkeypatch):
    """The socket that NOTIFY_SOCKET names."""
    name = str(tmp_path / "notify")
    address = name if request.param == "path" else "\0" + name
    monkeypatch.setenv("NOTIFY_SOCKET", address.replace("\0", "@"))
    for variable in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(variable, raising=False)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(address)
        sock.setblocking(False)
        yield sock


@pytest.fixture
def manager(heard):
    manager = Manager()
    yield manager
    manager.close()


@pytest.fixture
def zram():
    zram = Zram("zram0")
    zram.init(16 * MIB)
    yield zram
    zram.close()


def messages(heard: socket.socket) -> list[str]:
    found = []
    while True:
        try:
            found.append(heard.recv(4096).decode())
        except BlockingIOError:
            return found


def fill(heard: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        try:
            while True:
                sock.sendto(b"noise", heard.getsockname())
        except BlockingIOError:
            pass


def keep_informed(manager: Manager, zram: Zram, seconds: float, meanwhile=None) -> None:
    async def for_a_while() -> None:
        task = asyncio.create_task(manager.keep_informed(zram))
        await asyncio.sleep(seconds)
        if meanwhile is not None:
            meanwhile()
            await asyncio.sleep(seconds)
        task.cancel()

    asyncio.run(for_a_while())


def test_what_it_cannot_take_now_is_told_the_next_time_and_nobody_waits(manager, heard):
    fill(heard)
    started = time.monotonic()
    manager.tell(READY="1", STATUS="first")
    manager.tell(STATUS="second")
    assert time.monotonic() - started < 1
    assert set(messages(heard)) == {"noise"}
    manager.tell(WATCHDOG="1")
    assert messages(heard) == ["READY=1\nSTATUS=second\nWATCHDOG=1"]
    manager.tell(WATCHDOG="1")
    assert messages(heard) == ["WATCHDOG=1"]


def test_a_readiness_that_it_could_not_take_is_told_with_the_next_report(
    manager, heard, zram, monkeypatch
):
    monkeypatch.setattr("zramd.service.systemd._STATUS_S", 0.01)
    keep_informed(manager, zram, 0.1)
    messages(heard)
    fill(heard)
    manager.tell(READY="1")
    messages(heard)
    keep_informed(manager, zram, 0.1)
    assert "READY=1" in "\n".join(messages(heard))


def test_one_descriptor_is_all_that_telling_takes(manager, heard):
    before = os.listdir("/proc/self/fd")
    for _ in range(5):
        manager.tell(STATUS="so")
    assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_manager_that_is_gone_is_mentioned_once_until_it_is_back(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    manager = Manager()
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            manager.tell(WATCHDOG="1")
        assert len(caplog.records) == 1
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.bind(str(tmp_path / "notify"))
            manager.tell(WATCHDOG="1")
            assert sock.recv(100) == b"WATCHDOG=1"
        manager.tell(WATCHDOG="1")
    assert len(caplog.records) == 2
    manager.close()


def test_the_status_says_what_is_stored_in_how_much_ram_and_only_when_that_changes(
    manager, heard, zram, monkeypatch
):
    monkeypatch.setattr("zramd.service.systemd._STATUS_S", 0.01)
    attributes.set(zram, "mem_limit", "1M")

    def write() -> None:
        opener = zram.open("a client")
        opener.write(0, os.urandom(4096) * 20)
        opener.close()

    keep_informed(manager, zram, 0.2, write)
    first, second = messages(heard)
    assert first.startswith("STATUS=0B of pages stored in ")
    used = zram.statistics().mem_used_total // 1024
    assert second == f"STATUS=80K of pages stored in {used}K of RAM (limit 1M)"


def test_the_watchdog_is_told_at_half_its_time_and_not_while_the_loop_is_stuck(
    manager, heard, zram, monkeypatch
):
    monkeypatch.setenv("WATCHDOG_USEC", "400000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))

    def stuck() -> None:
        messages(heard)
        time.sleep(1)
        assert messages(heard) == []

    keep_informed(manager, zram, 0.7, stuck)
    assert "WATCHDOG=1" in messages(heard)


@pytest.mark.parametrize(
    ("variable", "value"), [("WATCHDOG_PID", "1"), ("WATCHDOG_USEC", "0"), ("WATCHDOG_USEC", "x")]
)
def test_a_watchdog_that_is_not_ours_is_told_nothing(
    manager, heard, zram, monkeypatch, variable, value
):
    monkeypatch.setattr("zramd.service.systemd._STATUS_S", 0.05)
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.setenv(variable, value)
    keep_informed(manager, zram, 0.2)
    assert "WATCHDOG=1" not in "\n".join(messages(heard))


def test_without_a_manager_nothing_is_told_and_the_reports_end(zram, monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    manager = Manager()
    manager.tell(READY="1")
    asyncio.run(asyncio.wait_for(manager.keep_informed(zram), 10))
    manager.close()


def test_the_variables_are_gone_once_the_sockets_are_taken(monkeypatch):
    monkeypatch.setenv("LISTEN_PID", "1")
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", "nbd")
    assert passed() == ([], None)
    assert not any(variable.startswith("LISTEN_") for variable in os.environ)

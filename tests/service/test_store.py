"""A server that dies, supervisor and all, is followed by one that is passed its arena, as systemd
does it (FileDescriptorStoreMax=)."""

import array
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

import pytest

from tests.nbd.harness import wait_for
from tests.service.server import Server, check, instead, lives, write
from zramd.cli import upgrade
from zramd.errors import BadArena, BadValue
from zramd.service import kept
from zramd.service.kept import ARENA, Kept

MIB = 1 << 20


class Manager:
    """What systemd is to one unit: it keeps what it is sent, by name."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(path)
        self.stored: dict[str, int] = {}
        self.times = 0
        """How often it was asked to keep something."""

    def hear(self) -> dict[str, int]:
        """What it keeps, when all that was sent by now has been heard."""
        while True:
            try:
                message, ancillary, _flags, _from = self.socket.recvmsg(
                    4096, socket.CMSG_LEN(16), socket.MSG_DONTWAIT | socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return self.stored
            told = dict(line.split("=", 1) for line in message.decode().splitlines())
            numbers = array.array("i", b"".join(data for _, _, data in ancillary))
            if "FDSTOREREMOVE" in told:
                os.close(self.stored.pop(told["FDNAME"]))
            if "FDSTORE" in told:
                assert told["FDPOLL"] == "0"
                self.times += 1
                if told["FDNAME"] in self.stored:
                    os.close(self.stored.pop(told["FDNAME"]))
                (self.stored[told["FDNAME"]],) = numbers

    def close(self) -> None:
        for descriptor in self.hear().values():
            os.close(descriptor)
        self.socket.close()


@pytest.fixture
def manager(tmp_path, monkeypatch) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    yield manager
    manager.close()


_PASS = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.argv[3], sys.argv[3:])
"""


def followed(
    start, descriptor: int, *arguments: str, name: str = ARENA, code: str | None = None
) -> Server:
    """Another server, that is passed this. `code` is run for zramd's."""
    starter = (sys.executable, "-c", _PASS, str(descriptor), name)
    if code is not None:
        starter += tuple(instead(code))
    return start(*arguments, starter=starter, pass_fds=[descriptor])


def die(server: Server) -> None:
    worker = server.worker
    server.process.kill()
    server.process.wait()
    wait_for(lambda: not lives(worker))


@pytest.mark.parametrize(
    "more", [[], ["--mem-limit=16M", "--prealloc"], ["--for=mount"]], ids=["", "reserved", "mount"]
)
def test_who_is_passed_the_arena_of_a_server_that_died_has_its_pages(start, manager, more):
    server = start("--disksize=64M", *more)
    write(server)
    for _ in range(2):
        with server.control() as control:
            before = control.statistics()
        die(server)
        server = followed(start, manager.hear()[ARENA], "--disksize=1M")
        wait_for(lambda s=server: s.said("the server has died: another has taken over its pages"))
        check(server)
        with server.control() as control:
            after = control.statistics()
        assert (after.disksize, after.mem_limit) == (64 * MIB, before.mem_limit)
        assert after.mem_reserved == before.mem_reserved
        server.kill_worker()  # and so has who follows in the same server
        check(server)
    assert server.end(signal.SIGINT) == 0
    assert manager.hear() == {}


def test_an_arena_that_is_gone_is_not_kept_and_a_new_one_is(start, manager):
    server = start()
    first = os.fstat(manager.hear()[ARENA]).st_ino
    with server.control() as control:
        control.reset()
        assert manager.hear() == {}
        control.set("disksize", "64M")
    assert os.fstat(manager.hear()[ARENA]).st_ino != first
    write(server)
    die(server)
    server = followed(start, manager.hear()[ARENA])
    check(server)
    assert server.end() == 0
    assert manager.hear() == {}


def test_an_upgrade_stores_what_it_had_stored(start, manager):
    server = start()
    write(server)
    manager.hear()
    upgrade.command.callback("s0")
    die(server)
    check(followed(start, manager.hear()[ARENA]))
    manager.hear()
    assert manager.times == 1  # or the journal has an error for each


def test_one_that_was_killed_while_it_closed_its_file_is_followed_too(start, manager, tmp_path):
    file = tmp_path / "arena"
    server = start("--disksize=64M", f"--arena={file}")
    write(server)
    die(server)
    with file.open("ab") as behind:
        behind.write(bytes(5000))
    check(followed(start, manager.hear()[ARENA], "--disksize=64M", f"--arena={file}"))


def test_who_is_passed_an_arena_tries_more_than_once(start, manager, tmp_path):
    server = start()
    write(server)
    arena = manager.hear()[ARENA]
    die(server)
    mark = tmp_path / "mark"
    code = f"""import os, signal
from zramd.cli import main
from zramd.service import worker
take_over = worker._take_over
def die_once(*arguments):
    if not os.path.exists({str(mark)!r}):
        open({str(mark)!r}, "x")
        os.kill(os.getpid(), signal.SIGKILL)
    take_over(*arguments)
worker._take_over = die_once
main()"""
    server = followed(start, arena, code=code)
    check(server)
    assert mark.exists()
    assert server.end() == 0


def test_who_is_passed_an_arena_keeps_it_though_the_configuration_is_bad(start, manager, tmp_path):
    file = tmp_path / "s0.toml"
    file.write_text('disksize = "64M"\n')
    server = start("--config", str(file))
    write(server)
    arena = manager.hear()[ARENA]
    die(server)
    file.write_text("nonsense")
    thread = threading.Thread(
        target=lambda: (
            wait_for(lambda: server.said("its pages are kept")),
            file.write_text('disksize = "64M"\n'),
            os.kill(server.paths.server(), signal.SIGHUP),
        )
    )
    thread.start()
    server = followed(start, arena, "--config", str(file))
    thread.join()
    check(server)


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("other", BadValue.exit_code, "descriptor 3 (other) of LISTEN_FDS is no stream socket"),
        (ARENA, BadArena.exit_code, "this is no arena of zramd"),
    ],
)
def test_what_is_no_arena_is_refused(start, tmp_path, name, status, said):
    with open(tmp_path / "file", "w+b") as file:
        server = followed(start, file.fileno(), name=name)
        assert server.process.wait(30) == status
    assert server.said(said)
    assert not server.paths.dir.exists()


def test_nobody_waits_for_a_manager_that_hears_nothing(manager, caplog):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as noise:
        noise.setblocking(False)
        try:
            while True:
                noise.sendto(b"NOISE=1", manager.socket.getsockname())
        except BlockingIOError:
            pass
    arenas = [os.memfd_create("arena") for _ in range(2)]
    for arena in arenas:
        os.write(arena, kept.MAGIC)
    watched = [os.dup(arena) for arena in arenas]
    keeping = Kept()
    for arena in arenas:
        keeping.keep(ARENA, arena)
    assert [record.message for record in caplog.records] == [
        "should this process die, its pages do too: Resource temporarily unavailable"
    ]
    # It may have the first one still, which must not be taken for the device's any more.
    assert os.pread(watched[0], 8, 0) == bytes(8)
    assert os.pread(watched[1], 8, 0) == kept.MAGIC
    keeping.drop(ARENA)
    for descriptor in watched:
        os.close(descriptor)

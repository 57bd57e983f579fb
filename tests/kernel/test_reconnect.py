"""What a reconnect decides before it asks the kernel; the rest is in in_guest.py."""

import errno
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from zramd.errors import AttachFailed, NeedsRoot, NoServer
from zramd.kernel import attach, loop, nbd, netlink, tools

SIZE = 1 << 20
NODE = "/dev/nbd7"


class Kernel:
    """Has zram0 attached as NODE, over the socket `ours`; `taken` are those that it gets after."""

    def __init__(self, place: Path, patch: pytest.MonkeyPatch) -> None:
        self.directory = place / "zram0"
        self.directory.mkdir()
        self.ours, self.peer = socket.socketpair()
        self.taken: list[tuple[int, str]] = []
        self.sees_the_end = True
        self.offers = SIZE
        self.peers = [self.peer]
        self._kept: list[socket.socket] = []
        self.queue = place / "block/nbd7"
        (self.queue / "queue").mkdir(parents=True)
        self.identifier = f"zramd:{self.directory}#{os.fstat(self.ours.fileno()).st_ino}"
        (self.queue / "backend").write_text(self.identifier + "\n")
        (self.queue / "size").write_text(f"{SIZE // 512}\n")
        patch.setenv("ZRAMD_RUNTIME_DIR", str(place))
        patch.setattr(nbd, "SYS_BLOCK", place / "block")
        patch.setattr(loop, "SYS_BLOCK", place / "block")
        patch.setattr(os, "geteuid", lambda: 0)
        patch.setattr(nbd, "_connect", self._connect)
        patch.setattr(
            nbd, "negotiate", lambda _socket, _export: SimpleNamespace(size=self.offers, flags=0)
        )
        patch.setattr(netlink, "nbd_reconfigure", self._reconfigure)

    def _connect(self, _server: Path) -> socket.socket:
        client, server = socket.socketpair()
        self.peers.append(server)
        return client

    def _reconfigure(self, index: int, connection: socket.socket, identifier: str) -> None:
        if self.sees_the_end:
            self._kept.append(connection.dup())
            self.taken.append((index, identifier))
        self.sees_the_end = True

    def kill_server(self) -> None:
        for peer in self.peers:
            peer.close()

    def end(self) -> None:
        self.kill_server()
        self.ours.close()
        for kept in self._kept:
            kept.close()


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    kernel = Kernel(tmp_path, monkeypatch)
    yield kernel
    kernel.end()


def reconnect() -> attach.Attachment | None:
    return attach.reconnect("zram0", Path("nbd.sock"))


def test_a_dead_connection_gets_a_successor_again_and_again(kernel: Kernel) -> None:
    for n in range(1, 4):
        kernel.kill_server()
        assert not nbd.alive(NODE)
        assert reconnect() == attach.Attachment("zram0", NODE, "nbd")
        assert kernel.taken == [(7, kernel.identifier)] * n
        assert nbd.alive(NODE)
    file = kernel.directory / "nbd.inode"
    assert file.stat().st_mode & 0o777 == 0o600
    assert list(kernel.directory.iterdir()) == [file]


def test_what_lives_or_is_not_attached_is_left_alone(kernel: Kernel) -> None:
    assert reconnect() is None
    assert attach.reconnect("zram1", Path("nbd.sock")) is None
    (kernel.queue / "backend").unlink()
    kernel.kill_server()
    assert reconnect() is None
    assert kernel.taken == []


def test_what_is_attached_through_loop_is_left_alone(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    (kernel.queue / "backend").unlink()
    monkeypatch.setattr(loop, "find", lambda _directory: "/dev/loop0")
    assert reconnect() is None


def test_it_needs_root_only_where_there_is_something_to_do(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert reconnect() is None
    kernel.kill_server()
    with pytest.raises(NeedsRoot):
        reconnect()


def test_a_kernel_that_has_not_seen_the_end_yet_is_asked_again(kernel: Kernel) -> None:
    kernel.kill_server()
    kernel.sees_the_end = False
    assert reconnect() is not None
    assert kernel.taken == [(7, kernel.identifier)]
    assert nbd.alive(NODE)


def test_one_that_never_takes_it_is_given_up(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd, "_TAKEN_S", 0.0)
    kernel.kill_server()
    kernel.sees_the_end = False
    with pytest.raises(AttachFailed, match=f"has not taken a new connection for {NODE}"):
        reconnect()
    assert not nbd.alive(NODE)


def test_another_size_is_refused_before_the_kernel_is_asked(kernel: Kernel) -> None:
    kernel.kill_server()
    kernel.offers = 2 * SIZE
    with pytest.raises(AttachFailed, match=f"offers {2 * SIZE} bytes, and {NODE} has {SIZE}"):
        reconnect()
    assert kernel.taken == []


def test_a_node_that_was_cut_is_named_with_what_clears_it(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_arguments: object) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(netlink, "nbd_reconfigure", refuse)
    kernel.kill_server()
    with pytest.raises(AttachFailed) as failed:
        reconnect()
    assert failed.value.hint == "`zramd down zram0` clears it"


def test_without_a_server_or_its_directory_it_is_no_server(kernel: Kernel) -> None:
    kernel.kill_server()
    kernel.directory.rmdir()
    with pytest.raises(NoServer):
        reconnect()


def test_a_kill_before_the_kernel_has_it_leaves_what_is_dead_dead(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_arguments: object) -> None:
        raise KeyboardInterrupt

    kernel.kill_server()
    with monkeypatch.context() as patch:
        patch.setattr(netlink, "nbd_reconfigure", die)
        with pytest.raises(KeyboardInterrupt):
            reconnect()
    assert not nbd.alive(NODE)
    assert reconnect() is not None
    assert nbd.alive(NODE)


@pytest.mark.parametrize("content", ["", "x", "1 2", "{other} {alive}", "{first} {alive} 3"])
def test_a_file_that_is_not_of_this_attachment_is_not_believed(
    kernel: Kernel, content: str
) -> None:
    first = os.fstat(kernel.ours.fileno()).st_ino
    a, b = socket.socketpair()
    with a, b:
        alive = os.fstat(a.fileno()).st_ino
        (kernel.directory / "nbd.inode").write_text(
            content.format(first=first, other=first + 1, alive=alive)
        )
        assert nbd.alive(NODE)
        kernel.kill_server()
        assert not nbd.alive(NODE)


def test_a_user_who_plants_a_link_has_nothing_written_through_it(
    kernel: Kernel, tmp_path: Path
) -> None:
    """Root reconnects in a directory that may be a user's."""
    precious = tmp_path / "precious"
    precious.write_text("kept")
    (kernel.directory / "nbd.inode").symlink_to(precious)
    (kernel.directory / "nbd.new").symlink_to(precious)
    kernel.kill_server()
    assert reconnect() is not None
    assert precious.read_text() == "kept"
    assert nbd.alive(NODE)


def test_an_attach_takes_an_old_file_away(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    old = kernel.directory / "nbd.inode"
    old.write_text("1 2\n")
    monkeypatch.setattr(netlink, "nbd_connect", lambda *_: 7)
    monkeypatch.setattr(tools, "wait_until", lambda _fact: True)
    assert nbd.attach(kernel.directory, Path("nbd.sock"), "", None) == NODE
    assert not old.exists()


def test_a_dead_connection_is_cut_for_who_has_not_its_pages_and_no_other(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cut: list[int] = []
    monkeypatch.setattr(netlink, "nbd_disconnect", cut.append)
    assert attach.cut_if_dead("zram0") is None
    kernel.kill_server()
    assert attach.cut_if_dead("zram1") is None
    assert cut == []
    assert attach.cut_if_dead("zram0") == attach.Attachment("zram0", NODE, "nbd")
    assert cut == [7]


def test_the_connections_of_other_programs_are_known_by_their_process(kernel: Kernel) -> None:
    (kernel.queue / "pid").write_text("12\n")
    other = kernel.queue.parent / "nbd8"
    other.mkdir()
    (other / "pid").write_text("34\n")
    assert attach.others() == {34: "/dev/nbd8"}


def test_who_may_connect_is_root_with_its_capability() -> None:
    status = Path("/proc/self/status").read_text()
    capable = int(status.partition("CapEff:")[2].split()[0], 16) >> 21 & 1
    assert attach.may_connect(os.getpid()) == (os.geteuid() == 0 and bool(capable))
    assert attach.may_connect(1 << 30)

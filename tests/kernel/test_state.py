"""What is read from /proc, and the errors that need no kernel to happen."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.conftest import require
from tests.kernel.servers import ROOT
from zramd.cli import attach as verb
from zramd.errors import AttachFailed, BadValue, NeedsRoot, ToolMissing
from zramd.kernel import attach, loop, nbd, netlink, state, tools, use
from zramd.kernel.state import Swap, User

MOUNTINFO = r"""22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime shared:1 - ext4 /dev/root rw,discard
40 27 43:0 / /mnt/a\040place rw,relatime shared:2 master:3 - ext4 /dev/nbd0 rw
41 27 0:42 / /srv rw,relatime - btrfs /dev/nbd0 rw
42 27 0:39 / /run/zramd/zram0/loop rw,nosuid - fuse /dev/fuse rw,user_id=0
43 27 43:0 /sub /bind rw,relatime - ext4 /dev/disk/by-label/x rw
"""
SWAPS = """Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority
/dev/nbd0                               partition\t524284\t\t0\t\t5
/dev/nbd1                               partition\t524284\t\t0\t\t5
"""


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text(MOUNTINFO)
    (tmp_path / "swaps").write_text(SWAPS)
    monkeypatch.setattr(state, "PROC", tmp_path)
    monkeypatch.setattr(state, "SYS_BLOCK", tmp_path / "block")
    monkeypatch.setattr(state, "_number", {"/dev/nbd0": os.makedev(43, 0)}.get)
    return tmp_path


def test_users_are_found_by_name_by_number_and_in_their_order(proc: Path) -> None:
    (proc / "block/nbd0/holders/dm-3").mkdir(parents=True)
    assert state.users("/dev/nbd0") == [
        User("swap", "[SWAP]"),
        User("mount", "/mnt/a place"),
        User("mount", "/srv"),
        User("mount", "/bind"),
        User("holder", "dm-3"),
    ]
    assert state.users("/dev/nbd1") == [User("swap", "[SWAP]")]
    assert state.users("/dev/nbd2") == []


def test_swap_is_read_in_one_place(proc: Path) -> None:
    (proc / "swaps").write_text(SWAPS + "/a\\040place/swap file\t8 4 -2\n")
    assert state.swaps()[1:] == [
        Swap("/dev/nbd1", 524284 << 10, 0, 5),
        Swap("/a place/swap", 8192, 4096, -2),
    ]
    assert use.swap_priority("/dev/nbd1") == 5
    assert use.swap_priority("/a place/swap") == -2
    assert use.swap_priority("/dev/nbd2") is None


def test_only_the_exact_mount_point_is_a_mount(proc: Path) -> None:
    assert state.is_mount(Path("/run/zramd/zram0/loop"))
    assert not state.is_mount(Path("/run/zramd/zram0"))


def test_a_sockets_peer_lives_until_it_is_closed_or_shut_down() -> None:
    ours, peer = socket.socketpair()
    inode = os.fstat(ours.fileno()).st_ino
    with ours:
        assert netlink.unix_peer_lives(inode)
        peer.close()
        assert not netlink.unix_peer_lives(inode)
    assert not netlink.unix_peer_lives(inode)


def test_a_failing_program_is_one_line_with_what_it_said() -> None:
    script = "echo >&2 first; echo >&2; echo >&2 second; exit 4"
    with pytest.raises(AttachFailed) as failed:
        tools.run("sh", "-c", script, error=AttachFailed)
    assert failed.value.message.endswith("failed: first; second")


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find", lambda _program: None)
    with pytest.raises(ToolMissing) as missing:
        tools.run("mkfs.xfs", error=AttachFailed)
    assert "xfsprogs" in (missing.value.hint or "")


def test_values_that_make_no_sense_are_refused_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(BadValue, match="32768"):
        use.swapon("/dev/nonesuch", 32768)
    with pytest.raises(BadValue, match="ext4/"):
        use.mount("/dev/nonesuch", tmp_path, "ext4/../sh")
    with pytest.raises(BadValue, match="is not a directory"):
        use.mount("/dev/nonesuch", tmp_path / "none")
    with pytest.raises(BadValue, match="carrier"):
        attach.attach("zram0", tmp_path / "nbd.sock", via="carrier pigeon")


def test_who_is_not_root_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(tmp_path))
    for asked in (
        lambda: attach.attach("zram0", tmp_path / "nbd.sock"),
        lambda: use.swapon("/dev/nonesuch"),
        lambda: use.mount("/dev/nonesuch", tmp_path),
    ):
        with pytest.raises(NeedsRoot):
            asked()


def test_that_min_free_kbytes_stays_raised_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "min_free_kbytes").write_text("512\n")
    monkeypatch.setattr(use, "_MIN_FREE", tmp_path / "min_free_kbytes")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    said = use.prepare_for_swap("zram0", "nbd")
    assert said == "vm.min_free_kbytes is 8192 now, and was 512; it stays so until reboot"
    assert (tmp_path / "min_free_kbytes").read_text() == "8192"
    assert use.prepare_for_swap("zram0", "nbd") is None


class Failing:
    """Stands for the functions of an attach: what it begins fails, and so does its undoing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.patch = monkeypatch

    def fail(self, module: object, function: str, error: Exception) -> None:
        def failing(*_arguments: object, **_more: object) -> None:
            raise error

        self.patch.setattr(module, function, failing)


def _loop(failing: Failing, directory: Path) -> None:
    failing.fail(loop, "_start_nbdfuse", AttachFailed("the first", hint="do this"))
    failing.fail(loop, "clear", AttachFailed("the second"))
    loop.attach(directory, directory / "nbd.sock", "", None)


def _nbd(failing: Failing, directory: Path) -> None:
    failing.patch.setattr(nbd, "_connect", lambda _server: socket.socket())
    failing.patch.setattr(nbd, "negotiate", lambda *_: SimpleNamespace(size=4096, flags=0))
    failing.patch.setattr(netlink, "nbd_connect", lambda *_: 0)
    failing.fail(tools, "wait_until", AttachFailed("the first", hint="do this"))
    failing.fail(netlink, "nbd_disconnect", OSError("the second"))
    nbd.attach(directory, directory / "nbd.sock", "", None)


def _verb(failing: Failing, directory: Path) -> None:
    (directory / "zram0.toml").write_text('disksize = "1M"\nuse = "swap"\n')
    made = attach.Attachment("zram0", "/dev/nbd0", "nbd")
    failing.patch.setattr(attach, "attached", lambda _name: None)
    failing.patch.setattr(attach, "attach", lambda *_: made)
    failing.fail(use, "prepare_for_swap", AttachFailed("the first", hint="do this"))
    failing.fail(attach, "detach", AttachFailed("the second"))
    arguments = ["zram0", "--config", str(directory / "zram0.toml")]
    verb.command.main(arguments, standalone_mode=False)


@pytest.mark.parametrize("way", [_loop, _nbd, _verb])
def test_an_attach_that_fails_is_told_first_and_then_that_it_could_not_be_undone(
    way: Callable[[Failing, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(tmp_path))
    with pytest.raises(AttachFailed) as failed:
        way(Failing(monkeypatch), tmp_path)
    assert failed.value.line() == "the first; and what was done stays: the second; do this"


def test_detaching_what_is_not_attached_needs_no_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(tmp_path))
    attach.detach("zram0")
    (tmp_path / "zram0").mkdir()
    attach.detach("zram0")


def test_the_holders_of_a_directory_are_named(tmp_path: Path) -> None:
    require.path("/proc/self/fd")
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, cwd=ROOT)
    try:
        holder = f"(pid {process.pid})"
        assert any(found.endswith(holder) for found in state.processes_in(str(ROOT)))
        assert not any(found.endswith(holder) for found in state.processes_in(str(tmp_path)))
    finally:
        process.communicate(b"\n")

"""save, restore and arena files as a user has them: real servers, real kills."""

import contextlib
import os
import pty
import random
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.cli.conftest import DEADLINE_S, Zramd, alive, wait_for
from tests.nbd.harness import RawClient
from tests.store.contents import noise, tagged, text
from zramd.cli.save import _replacing
from zramd.errors import BadArena, BadValue, DeviceBusy, SaveFailed, ServerFailed
from zramd.nbd.address import UnixAddress
from zramd.store import PAGE
from zramd.store.header import MAGIC

CONTENT = noise(1) + text(1) + bytes(PAGE) + noise(2)


def client(zramd, name: str = "zram0") -> RawClient:
    return RawClient(UnixAddress(zramd.runtime / name / "nbd.sock"))


def read(zramd, name: str = "zram0", length: int = len(CONTENT)) -> bytes:
    with client(zramd, name) as one:
        return one.read(0, length)


def write(zramd, content: bytes = CONTENT, name: str = "zram0") -> None:
    with client(zramd, name) as one:
        one.write(0, content)


@pytest.fixture
def served(zramd) -> Zramd:
    """With CONTENT on zram0, 16 MiB."""
    zramd.serve("zram0")
    write(zramd)
    return zramd


def restored(zramd, file: Path) -> bytes:
    """What a new device has of it, which is gone then."""
    zramd.ok("restore", "other", str(file))
    content = read(zramd, "other")
    zramd.ok("down", "other")
    return content


# Save


def test_a_device_is_saved_and_restored_by_its_name(served, tmp_path):
    file = tmp_path / "snapshot"
    done = served.run("save", "zram0", str(file))
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr.startswith(f"zramd: zram0 is saved in {file}, ")
    assert file.stat().st_mode & 0o777 == 0o600
    assert restored(served, file) == CONTENT
    assert os.listdir(tmp_path) == ["snapshot"]


def test_a_snapshot_replaces_one_that_is_there(served, tmp_path):
    file = tmp_path / "snapshot"
    served.ok("save", "zram0", str(file))
    write(served, text(7))
    served.ok("save", "zram0", str(file))
    assert restored(served, file) == text(7) + CONTENT[PAGE:]
    assert os.listdir(tmp_path) == ["snapshot"]


def test_a_symbolic_link_stays_and_what_it_points_to_is_replaced(served, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "snapshot", tmp_path / "link"
    link.symlink_to("elsewhere/snapshot")
    for _ in range(2):  # it points to nothing at first
        served.ok("save", "zram0", str(link))
        assert link.is_symlink()
        assert target.is_file()
    assert restored(served, link) == CONTENT


def test_a_path_may_be_relative(served, tmp_path):
    done = served.run("save", "zram0", "snapshot", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = served.run("restore", "other", "snapshot", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert read(served, "other") == CONTENT


def test_where_no_file_can_be_it_is_said_in_one_line(served, tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"somebody's")
    for path in (tmp_path / "none" / "snapshot", file / "snapshot"):
        assert str(path) in served.fails(SaveFailed.exit_code, "save", "zram0", str(path))
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path in (tmp_path, fifo, Path("/dev/null")):
        assert f"{path} is no file" in served.fails(BadValue.exit_code, "save", "zram0", str(path))
    assert file.read_bytes() == b"somebody's"
    assert stat.S_ISFIFO(fifo.stat().st_mode)
    assert sorted(os.listdir(tmp_path)) == ["fifo", "file"]


def begun(zramd, folder: Path):
    """A save of zram0 that cannot go on: its server is stopped. It has its file open."""
    os.kill(zramd.worker("zram0"), signal.SIGSTOP)
    saving = zramd.start("save", "zram0", str(folder / "snapshot"))

    def has_file() -> bool:
        for descriptor in Path(f"/proc/{saving.pid}/fd").iterdir():
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(descriptor).startswith(f"{folder}/"):
                    return True
        return False

    wait_for(has_file)
    return saving


def test_a_save_that_is_killed_leaves_what_there_was(served, tmp_path):
    (tmp_path / "snapshot").write_bytes(b"a good one")
    saving = begun(served, tmp_path)
    saving.kill()
    saving.wait(DEADLINE_S)
    os.kill(served.worker("zram0"), signal.SIGCONT)
    assert os.listdir(tmp_path) == ["snapshot"]
    assert (tmp_path / "snapshot").read_bytes() == b"a good one"
    assert read(served) == CONTENT


def test_a_server_that_is_killed_while_it_saves_leaves_what_there_was(served, tmp_path):
    (tmp_path / "snapshot").write_bytes(b"a good one")
    saving = begun(served, tmp_path)
    served.kill("zram0")
    _, said = saving.communicate(timeout=DEADLINE_S)
    assert saving.returncode == ServerFailed.exit_code, said
    assert os.listdir(tmp_path) == ["snapshot"]
    assert (tmp_path / "snapshot").read_bytes() == b"a good one"


@pytest.fixture(params=[False, True], ids=["unnamed", "named"])
def a_file_system(request, tmp_path, monkeypatch) -> Path:
    """Where a file without a name can be made, and where it cannot."""
    if request.param:
        monkeypatch.setattr(os, "O_TMPFILE", os.O_DIRECTORY)
    return tmp_path


def test_what_fails_midway_replaces_nothing_and_leaves_nothing(a_file_system):
    (a_file_system / "snapshot").write_bytes(b"a good one")

    def fail() -> None:
        with _replacing(a_file_system / "snapshot") as file:
            os.write(file, b"half of one")
            raise SaveFailed("no more")

    with pytest.raises(SaveFailed, match="no more"):
        fail()
    assert os.listdir(a_file_system) == ["snapshot"]
    assert (a_file_system / "snapshot").read_bytes() == b"a good one"


SLOW = """from zramd.cli import main
from zramd.store import pace
pace._TURN_S = 0.0
pace._REST_S = 0.4
main()"""


def test_a_terminal_shows_how_far_a_save_is(zramd, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(zramd, "argv", lambda *arguments: [sys.executable, "-c", SLOW, *arguments])
        zramd.serve("zram0")
    write(zramd, b"".join(map(noise, range(600))))
    terminal, theirs = pty.openpty()
    command = zramd.argv("save", "zram0", str(tmp_path / "snapshot"))
    with (
        open(terminal, "rb", buffering=0) as shown,
        subprocess.Popen(command, env=zramd.environment, stdout=theirs, stderr=theirs) as saving,
    ):
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # nobody has it open any more
            while piece := shown.read(1000):
                said += piece
        assert saving.wait(DEADLINE_S) == 0
    bar, last, _ = said.decode().split("\r\n")
    assert "zramd: saving zram0  [" in bar
    shares = [int(share) for share in re.findall("([0-9]+)%", bar)]
    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0, 100)
    assert len(shares) > 2
    assert {share // 10 for share in shares} <= {0, 2, 4, 6, 8, 10}  # half a MiB at a time
    assert last.startswith(f"zramd: zram0 is saved in {tmp_path}/snapshot, 2.4M")


# Restore


def test_a_device_with_pages_is_not_restored_and_one_that_was_reset_is(served, tmp_path):
    file = str(tmp_path / "snapshot")
    served.ok("save", "zram0", file)
    write(served, text(7))
    served.fails(DeviceBusy.exit_code, "restore", "zram0", file)
    assert read(served) == text(7) + CONTENT[PAGE:]
    served.ok("reset", "zram0")
    served.ok("restore", "zram0", file)
    assert read(served) == CONTENT


@pytest.mark.parametrize(
    ("kind", "has_server"),
    [
        *((kind, False) for kind in ("damaged", "empty", "foreign", "folder", "fifo")),
        ("damaged", True),
        ("cut off", True),
    ],
)
def test_what_is_no_snapshot_is_refused_by_name(served, tmp_path, kind, has_server):
    file = tmp_path / "snapshot"
    served.ok("save", "zram0", str(file))
    sound = file.read_bytes()
    file.unlink()
    if kind == "folder":
        file.mkdir()
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.write_bytes(
            {
                "damaged": sound[:9000] + bytes([sound[9000] ^ 1]) + sound[9001:],
                "cut off": sound[:-1],
                "empty": b"",
                "foreign": text(1),
            }[kind]
        )
    if has_server:
        served.ok("reset", "zram0")
    name = "zram0" if has_server else "other"
    line = served.fails(BadArena.exit_code, "restore", name, str(file))
    assert str(file) in line
    if has_server:
        assert served.devices()["zram0"]["disksize"] == 0
    else:
        assert not (served.runtime / "other").exists()


def test_a_file_that_is_not_there_is_said(zramd, tmp_path):
    line = zramd.fails(BadValue.exit_code, "restore", "zram0", str(tmp_path / "none"))
    assert "none cannot be read: No such file" in line


def test_clients_go_on_while_their_device_is_saved_and_another_restored(served, tmp_path):
    """And in the end all of them have what they wrote."""
    stop, written, failed = threading.Event(), {}, []

    def work() -> None:
        numbers = random.Random(1)
        try:
            with client(served) as one:
                number = 0
                while not stop.is_set():
                    number += 1
                    slot = numbers.randrange(100, 2000)
                    one.write(slot * PAGE, tagged(slot, 0, number))
                    written[slot] = number
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        for n in range(3):
            served.ok("save", "zram0", str(tmp_path / f"{n}"))
        assert restored(served, tmp_path / "2") == CONTENT
    finally:
        stop.set()
        thread.join()
    assert failed == []
    assert written
    with client(served) as one:
        for slot, number in written.items():
            assert one.read(slot * PAGE, PAGE) == tagged(slot, 0, number)


# Arena files


def ended(zramd, server) -> None:
    zramd.ok("down", "zram0")
    assert server.wait(DEADLINE_S) == 0


def test_a_device_in_a_file_outlives_down_and_the_death_of_its_server(zramd, tmp_path):
    arena = tmp_path / "arena"
    server = zramd.serve("zram0", f"--arena={arena}", "--disksize=16M", "--algorithm=zstd")
    write(zramd)
    ended(zramd, server)
    server = zramd.serve("zram0", f"--arena={arena}")
    assert read(zramd) == CONTENT
    assert zramd.devices()["zram0"]["algorithm"] == "zstd"
    write(zramd, text(7))
    zramd.kill("zram0")
    server = zramd.serve("zram0", f"--arena={arena}")
    assert read(zramd) == text(7) + CONTENT[PAGE:]
    worker = zramd.worker("zram0")
    os.kill(worker, signal.SIGKILL)
    wait_for(lambda: not alive(worker) and zramd.worker("zram0") != worker)
    assert read(zramd) == text(7) + CONTENT[PAGE:]
    zramd.ok("reset", "zram0")
    assert not arena.exists()
    zramd.ok("set", "zram0", "disksize", "1M")
    assert arena.exists()
    ended(zramd, server)
    assert arena.exists()


def test_a_file_that_another_server_has_is_refused(zramd, tmp_path):
    arena = tmp_path / "arena"
    zramd.serve("zram0", f"--arena={arena}", "--disksize=16M")
    write(zramd)
    line = zramd.fails(DeviceBusy.exit_code, "serve", "other", f"--arena={arena}")
    assert f"{arena} is in use by another server" in line
    assert read(zramd) == CONTENT


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("--disksize=32M", "has a device of 16M, not 32M"),
        ("--algorithm=zstd", "has a device with lz4, not zstd"),
        ("--prealloc", "has a device without preallocated memory"),
        ("--for=swap", "swap is not kept in"),
    ],
)
def test_options_that_disagree_with_the_file_are_refused_and_it_is_as_it_was(
    zramd, tmp_path, option, said
):
    arena = tmp_path / "arena"
    server = zramd.serve("zram0", f"--arena={arena}", "--disksize=16M")
    write(zramd)
    ended(zramd, server)
    assert said in zramd.fails(BadValue.exit_code, "serve", "zram0", f"--arena={arena}", option)
    zramd.serve("zram0", f"--arena={arena}", "--disksize=16M", "--algorithm=lz4")
    assert read(zramd) == CONTENT


def test_an_arena_file_that_is_damaged_is_refused_by_name(zramd, tmp_path):
    arena = tmp_path / "arena"
    arena.write_bytes(noise(1))
    line = zramd.fails(BadArena.exit_code, "serve", "zram0", f"--arena={arena}")
    assert str(arena) in line
    assert arena.read_bytes() == noise(1)


def test_a_snapshot_can_be_restored_into_a_file(served, tmp_path):
    snapshot, arena = tmp_path / "snapshot", tmp_path / "arena"
    served.ok("save", "zram0", str(snapshot))
    server = served.serve("other", f"--restore={snapshot}", f"--arena={arena}")
    assert read(served, "other") == CONTENT
    served.ok("down", "other")
    assert server.wait(DEADLINE_S) == 0
    served.serve("other", f"--arena={arena}")
    assert read(served, "other") == CONTENT


def test_a_configuration_can_name_the_file(zramd, tmp_path):
    arena, file = tmp_path / "arena", tmp_path / "zram0.toml"
    file.write_text(f'disksize = "16M"\narena = "{arena}"\n')
    zramd.ok("check-config", str(file))
    server = zramd.serve("zram0", f"--config={file}")
    write(zramd)
    ended(zramd, server)
    zramd.serve("zram0", f"--config={file}")
    assert read(zramd) == CONTENT
    file.write_text(f'disksize = "16M"\nuse = "swap"\narena = "{arena}"\n')
    done = zramd.run("check-config", str(file))
    assert done.returncode != 0
    assert "swap is not kept in" in done.stdout + done.stderr


def test_no_arena_is_replaced_by_a_snapshot(served, tmp_path):
    arena = tmp_path / "arena"
    arena.write_bytes(MAGIC + bytes(4096))
    line = served.fails(BadValue.exit_code, "save", "zram0", str(arena))
    assert f"{arena} is the arena of a device" in line
    assert arena.read_bytes() == MAGIC + bytes(4096)

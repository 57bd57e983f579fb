"""The runtime directory: where it is, what may be in it, and who may claim a name."""

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from zramd.errors import BadValue, ServerExists, ServerFailed
from zramd.service import runtime
from zramd.service.runtime import Paths, claim, names, runtime_dir


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path / "run"


def test_the_environment_says_where_the_runtime_directory_is(monkeypatch):
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", "/somewhere")
    assert runtime_dir() == Path("/somewhere")


def test_a_relative_runtime_directory_becomes_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", "run")
    assert runtime_dir() == tmp_path / "run"


def test_root_has_run_zramd(monkeypatch):
    monkeypatch.delenv("ZRAMD_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert runtime_dir() == Path("/run/zramd")


def test_others_have_a_directory_in_their_session_s(monkeypatch):
    monkeypatch.delenv("ZRAMD_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/run/user/1000")
    assert runtime_dir() == Path("/run/user/1000/zramd")


def test_without_any_the_error_says_what_to_set(monkeypatch):
    monkeypatch.delenv("ZRAMD_RUNTIME_DIR", raising=False)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BadValue, match="ZRAMD_RUNTIME_DIR") as caught:
        runtime_dir()
    assert "ZRAMD_RUNTIME_DIR" in caught.value.hint


@pytest.mark.parametrize("name", ["zram0", "a", "0", "A.b-c_d", "x" * 32])
def test_names_that_are_allowed(name):
    assert runtime.check_name(name) == name


@pytest.mark.parametrize(
    "name", ["", ".", "..", ".a", "-a", "_a", "a/b", "a b", "a\n", "ä", "x" * 33, "a\0", "٣"]
)
def test_names_that_are_not_and_the_error_says_what_is(name):
    with pytest.raises(BadValue) as caught:
        runtime.check_name(name)
    assert repr(name) in caught.value.message
    assert "32" in caught.value.hint


def test_a_socket_path_that_the_kernel_would_not_take_is_refused_early(monkeypatch):
    fits = "/" + "d" * (107 - len("/" + "/zram0/nbd.sock"))
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", fits)
    assert len(str(Paths("zram0").nbd_socket)) == 107
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", fits + "d")
    with pytest.raises(BadValue, match="107"):
        Paths("zram0")


def test_a_claim_makes_the_directory_for_us_alone(home):
    with claim("zram0") as held:
        assert stat.S_IMODE(home.stat().st_mode) == 0o700
        assert stat.S_IMODE(held.paths.dir.stat().st_mode) == 0o700
        assert stat.S_IMODE(held.paths.lock.stat().st_mode) == 0o600
        assert held.paths.lock.read_text() == f"{os.getpid()}\n"


def test_a_released_claim_leaves_nothing_of_the_device(home):
    held = claim("zram0")
    held.paths.control_socket.touch()
    held.paths.log.touch()
    held.release()
    held.release()
    assert list(home.iterdir()) == []


def test_a_held_claim_is_refused_naming_the_process(home):
    with claim("zram0"):
        with pytest.raises(ServerExists, match=rf"zram0.*process {os.getpid()}\)") as caught:
            claim("zram0")
        assert "zramd down zram0" in caught.value.hint
        assert names() == ["zram0"]


def test_a_claim_passes_to_the_child_of_a_fork_and_outlives_the_parent(home):
    code = """
import os, sys, time
from zramd.service.runtime import claim
held = claim("zram0")
if os.fork():
    os._exit(0)
held.adopt()
print(os.getpid(), flush=True)
sys.stdin.read()
held.release()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as daemon:
        child = int(daemon.stdout.readline())
        assert daemon.wait() == 0
        assert child != daemon.pid
        with pytest.raises(ServerExists, match=rf"process {child}\)"):
            claim("zram0")
        daemon.stdin.close()
        claim("zram0", wait_s=30).release()


def test_a_claim_that_is_waited_for_is_had_when_it_is_released(home):
    first = claim("zram0")
    timer = threading.Timer(0.05, first.release)
    timer.start()
    with claim("zram0", wait_s=30):
        timer.join()
        assert names() == ["zram0"]


_CLAIM_AND_HANG = """
import sys, time
from zramd.service.runtime import claim
held = claim("zram0")
held.paths.nbd_socket.touch()
print("claimed", flush=True)
time.sleep(600)
"""


def test_the_leftovers_of_a_killed_process_do_not_stand_in_the_way(home):
    with subprocess.Popen([sys.executable, "-c", _CLAIM_AND_HANG], stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"claimed\n"
        with pytest.raises(ServerExists):
            claim("zram0")
        other.send_signal(signal.SIGKILL)
    assert names() == ["zram0"]
    claim("zram0").release()
    assert names() == []


_CLAIM_MANY = """
import os, sys
from pathlib import Path
from zramd.errors import ServerExists
from zramd.service.runtime import claim
inside = Path(sys.argv[1])
claimed = 0
while claimed < 20:
    try:
        held = claim("zram0")
    except ServerExists:
        continue
    os.close(os.open(inside, os.O_CREAT | os.O_EXCL))  # fails if another is inside too
    claimed += 1
    mine = [held.paths.dir / f"file{number}" for number in range(20)]
    for file in mine:
        file.touch()
    inside.unlink()
    assert all(file.exists() for file in mine)  # nobody else removes what is ours
    held.release()
"""


def test_never_two_claims_at_once_however_fast_directories_come_and_go(home, tmp_path):
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", _CLAIM_MANY, str(tmp_path / "inside")],
            stderr=subprocess.PIPE,
        )
        for _ in range(4)
    ]
    said = [racer.communicate()[1] for racer in racers]
    assert [(racer.returncode, what) for racer, what in zip(racers, said, strict=True)] == [
        (0, b"")
    ] * 4
    assert names() == []


def test_a_runtime_directory_that_cannot_be_made_is_told_in_one_line(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(tmp_path / "file"))
    with pytest.raises(ServerFailed, match=r"file.*Not a directory") as caught:
        claim("zram0")
    assert "ZRAMD_RUNTIME_DIR" in caught.value.hint


def test_names_are_sorted_as_people_count_and_strangers_are_left_out(home):
    for name in ("zram10", "zram2", "a", ".hidden", "b b"):
        (home / name).mkdir(parents=True)
    (home / "file").touch()
    assert names() == ["a", "zram2", "zram10"]


def test_without_a_runtime_directory_there_are_no_devices(home):
    assert names() == []


def test_a_directory_that_never_stays_ends_in_an_error_and_not_in_a_loop(home):
    home.mkdir()
    (home / "zram0").symlink_to(home / "nowhere")
    with pytest.raises(ServerFailed, match="zram0"):
        claim("zram0")

"""`zramd up` and `zramd down`, `attach` and `detach`, against this machine's kernel.

Through the loop way, which a machine without nbd.ko has too; tests/kernel runs nbd in a kernel of
its own. Swap is left to that one as well: this machine's memory is not ours to swap.
"""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import alive, wait_for
from tests.conftest import require
from zramd.cli import main
from zramd.cli.down import stop
from zramd.control.client import Control
from zramd.control.server import ControlThread
from zramd.device import Zram
from zramd.kernel import tools
from zramd.service.runtime import claim

VIA = ("--disksize=64M", "--via=loop")


@pytest.fixture
def kernel():
    require.root()
    require.path("/dev/fuse")
    require.path("/dev/loop-control")
    for program in ("nbdfuse", "losetup", "mkfs.ext4"):
        require.program(program)


@pytest.fixture
def mountpoint(tmp_path):
    directory = tmp_path / "mnt"
    directory.mkdir()
    yield directory
    while os.path.ismount(directory):
        subprocess.run(["umount", "--lazy", directory], check=True)


class Log:
    """Programs that write down how they are called, and then do it; swapon does not."""

    PROGRAMS = ("nbdfuse", "losetup", "mkfs.ext4", "mkswap", "mount", "umount", "swapon")

    def __init__(self, zramd, directory: Path) -> None:
        self._directory = directory
        self._file = directory / "log"
        for program in self.PROGRAMS:
            self._make(program, "" if program == "swapon" else f'exec {tools.find(program)} "$@"')
        zramd.environment["PATH"] = f"{directory}:{os.environ['PATH']}"

    def __call__(self) -> list[list[str]]:
        """The calls since the last time."""
        calls = self._file.read_text().splitlines() if self._file.exists() else []
        self._file.unlink(missing_ok=True)
        return [call.split() for call in calls]

    def fails(self, program: str) -> None:
        self._make(program, "exit 1")

    def _make(self, program: str, action: str) -> None:
        script = self._directory / program
        script.write_text(f'#!/bin/sh\necho {program} "$@" >>{self._file}\n{action}\n')
        script.chmod(0o700)


@pytest.fixture
def logged(zramd, tmp_path):
    (tmp_path / "programs").mkdir()
    return Log(zramd, tmp_path / "programs")


def server_of(zramd, name: str) -> int:
    return int((zramd.runtime / name / "lock").read_text().split()[0])


def nothing_stands(zramd) -> None:
    """No file, mount or loop device of ours."""
    assert zramd.left() == []
    assert str(zramd.runtime) not in Path("/proc/self/mountinfo").read_text()
    backing = [p.read_text() for p in Path("/sys/block").glob("loop*/loop/backing_file")]
    assert str(zramd.runtime) not in "".join(backing)


def test_up_prints_the_node_and_nothing_else_and_says_which_way_it_took(zramd, kernel):
    done = zramd.run("up", "zram0", *VIA)
    assert done.returncode == 0, done.stderr
    assert done.stdout == zramd.devices()["zram0"]["device"] + "\n"
    assert Path(done.stdout.strip()).is_block_device()
    assert "zram0 (64M, lz4) is served on " in done.stderr
    assert "zram0 is attached through loop" in done.stderr


def test_down_undoes_up_and_leaves_nothing(zramd, kernel):
    zramd.ok("up", "zram0", *VIA)
    server = server_of(zramd, "zram0")
    assert zramd.ok("down", "zram0") == ""
    wait_for(lambda: not alive(server))
    nothing_stands(zramd)
    assert "zram0" in zramd.fails(20, "down", "zram0")


def test_up_mounts_and_list_says_where_and_down_unmounts(zramd, kernel, mountpoint):
    node = zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint)).strip()
    (mountpoint / "file").write_bytes(os.urandom(100_000))
    subprocess.run(["sync", "-f", mountpoint], check=True)
    told = zramd.devices()["zram0"]
    assert (told["device"], told["mountpoint"]) == (node, str(mountpoint))
    assert told["clients"] >= 1
    assert told["data"] > 100_000
    zramd.ok("down", "zram0")
    assert not os.path.ismount(mountpoint)
    nothing_stands(zramd)


def test_up_goes_up_step_by_step_and_down_takes_the_same_steps_back(
    zramd, kernel, mountpoint, logged
):
    node = zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint)).strip()
    went_up = logged()
    zramd.ok("down", "zram0")
    place = zramd.runtime / "zram0" / "loop"
    assert [(words[0], words[-1]) for words in went_up] == [
        ("nbdfuse", f"nbd+unix:///zram0?socket={zramd.runtime}/zram0/nbd.sock"),
        ("losetup", f"{place}/disk"),
        ("mkfs.ext4", node),
        ("mount", str(mountpoint)),
    ]
    assert logged() == [
        ["umount", str(mountpoint)],
        ["losetup", "--detach", node],
        ["umount", str(place)],
    ]


def test_what_is_deleted_on_the_mount_is_freed(zramd, kernel, mountpoint):
    node = zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint)).strip()
    [line] = [m for m in Path("/proc/self/mountinfo").read_text().splitlines() if f" {node} " in m]
    assert "discard" in line.split()[-1].split(",")
    (mountpoint / "file").write_bytes(os.urandom(8 << 20))
    subprocess.run(["sync", "-f", mountpoint], check=True)
    full = zramd.devices()["zram0"]["data"]
    assert full > 8 << 20
    (mountpoint / "file").unlink()
    subprocess.run(["sync", "-f", mountpoint], check=True)
    wait_for(lambda: zramd.devices()["zram0"]["data"] < full - (7 << 20))


@pytest.mark.parametrize(
    ("asked", "priority"), [((), "100"), (("--priority", "5"), "5"), (("--priority", "-1"), "-1")]
)
def test_swap_is_turned_on_last_with_discard_and_a_priority(zramd, kernel, logged, asked, priority):
    require.program("mkswap")
    done = zramd.run("up", "zram0", *VIA, "--swap", *asked, "--allow-deadlock")
    assert done.returncode == 0, done.stderr
    node = done.stdout.strip()
    assert logged()[-2:] == [
        ["mkswap", node],
        ["swapon", "--discard", "--priority", priority, node],
    ]
    assert f"{node} is swap space" in done.stderr


def test_swap_that_cannot_be_turned_on_leaves_nothing(zramd, kernel, logged):
    require.program("mkswap")
    logged.fails("swapon")
    done = zramd.run("up", "zram0", *VIA, "--swap", "--allow-deadlock")
    assert done.returncode == 43
    assert "`swapon --discard --priority 100" in done.stderr
    assert done.stdout == ""
    nothing_stands(zramd)


def test_another_use_of_a_mounted_device_is_refused_and_all_stays(
    zramd, kernel, mountpoint, tmp_path
):
    (tmp_path / "elsewhere").mkdir()
    node = zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint)).strip()
    before = zramd.devices()
    for other in (("--swap", "--allow-deadlock"), ("--mount", str(tmp_path / "elsewhere"))):
        done = zramd.run("up", "zram0", *VIA, *other)
        assert (done.returncode, done.stdout) == (43, "")
        assert f"{node} is in use already: mounted on {mountpoint}" in done.stderr
    assert zramd.devices() == before
    zramd.ok("down", "zram0")


def test_up_without_a_use_leaves_the_one_that_there_is(zramd, kernel, mountpoint):
    node = zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint))
    assert zramd.ok("up", "zram0", *VIA) == node
    assert os.path.ismount(mountpoint)
    zramd.ok("down", "zram0")


def test_down_of_a_device_that_another_program_holds_changes_nothing(zramd, kernel):
    node = zramd.ok("up", "zram0", *VIA).strip()
    before = zramd.devices()
    holder = os.open(node, os.O_RDONLY | os.O_EXCL)
    try:
        assert f"{node} is in use" in zramd.fails(30, "down", "zram0")
    finally:
        os.close(holder)
    assert zramd.devices() == before
    zramd.ok("down", "zram0")
    nothing_stands(zramd)


def test_swap_is_not_turned_on_over_a_server_that_is_not_hardened_for_it(zramd, kernel, logged):
    zramd.serve("zram0", "--disksize=64M")
    line = zramd.fails(23, "up", "zram0", "--disksize=64M", "--swap")
    for what in ("locked memory", "oom_score_adj", "real-time", "preallocated", "zramd down zram0"):
        assert what in line
    assert logged() == []


def test_swap_through_loop_could_deadlock_and_is_refused_before_anything_is_made(zramd, kernel):
    line = zramd.fails(23, "up", "zram0", *VIA, "--swap")
    assert "FUSE" in line
    assert "--allow-deadlock" in line
    nothing_stands(zramd)


def test_a_server_with_another_mem_limit_is_not_taken_for_the_one_asked_for(zramd, kernel):
    zramd.serve("zram0", "--disksize=64M", "--mem-limit=20M")
    line = zramd.fails(30, "up", "zram0", *VIA, "--mem-limit=10M")
    assert "a mem_limit of 20M" in line


def test_no_mem_limit_and_a_reserve_is_the_default_one_the_second_time_too(zramd, kernel):
    up = ("up", "zram0", "--disksize=10000001", "--via=loop", "--mem-limit=0", "--prealloc")
    node = zramd.ok(*up)
    assert zramd.ok(*up) == node
    zramd.ok("set", "zram0", "mem_limit", "3M")
    assert "a mem_limit of 3M" in zramd.fails(30, *up)
    zramd.ok("down", "zram0")


def test_swap_that_is_on_keeps_its_priority_unless_another_is_asked_for(zramd, kernel):
    require.program("mkswap")
    up = ("up", "zram0", *VIA, "--swap", "--allow-deadlock")
    node = zramd.run(*up, "--priority=7").stdout
    assert node
    for again in (up, (*up, "--priority=7")):
        done = zramd.run(*again)
        assert (done.returncode, done.stdout) == (0, node)
    done = zramd.run(*up, "--priority=8")
    assert done.returncode == 43
    assert "with priority 7" in done.stderr
    assert node.strip() in Path("/proc/swaps").read_text()
    zramd.ok("down", "zram0")


def test_another_file_system_than_the_mounted_one_is_refused(zramd, kernel, mountpoint):
    zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint))
    done = zramd.run("up", "zram0", *VIA, "--mount", str(mountpoint), "--fs", "xfs")
    assert done.returncode == 43


def test_the_same_up_twice_changes_nothing(zramd, kernel, mountpoint):
    up = ("up", "zram0", *VIA, "--mount", str(mountpoint))
    node = zramd.ok(*up)
    (mountpoint / "file").write_text("kept")
    server = server_of(zramd, "zram0")
    done = zramd.run(*up)
    assert (done.returncode, done.stdout) == (0, node)
    assert "served already" in done.stderr
    assert (mountpoint / "file").read_text() == "kept"
    assert server_of(zramd, "zram0") == server


def test_up_takes_a_served_device_on_from_where_it_stands(zramd, kernel):
    server = zramd.serve("zram0", "--disksize=64M")
    zramd.ok("up", "zram0", *VIA)
    assert server_of(zramd, "zram0") == server.pid


def test_what_cannot_be_unmounted_stays_up_altogether(zramd, kernel, mountpoint):
    zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint))
    before = zramd.devices()["zram0"]
    with (mountpoint / "file").open("w") as busy:
        said = zramd.fails(43, "down", "zram0")
        assert f"pid {os.getpid()}" in said
        busy.write("still there")
    after = zramd.devices()["zram0"]
    for what in ("state", "device", "mountpoint", "disksize", "clients"):
        assert after[what] == before[what]
    zramd.ok("down", "zram0")


def test_a_mount_point_that_is_not_there_is_told_before_anything_is_done(zramd, kernel, tmp_path):
    said = zramd.fails(2, "up", "zram0", *VIA, "--mount", str(tmp_path / "nowhere"))
    assert "nowhere is not a directory" in said
    nothing_stands(zramd)


def test_a_step_that_fails_undoes_those_before_it(zramd, kernel, mountpoint):
    said = zramd.run("up", "zram0", *VIA, "--mount", str(mountpoint), "--fs", "nosuch")
    assert said.returncode == 41
    assert "mkfs.nosuch is not installed" in said.stderr
    assert said.stdout == ""
    nothing_stands(zramd)


def test_a_step_that_fails_leaves_what_was_up_before(zramd, kernel, mountpoint):
    zramd.ok("up", "zram0", *VIA)
    before = zramd.devices()
    failed = zramd.run("up", "zram0", *VIA, "--mount", str(mountpoint), "--fs", "nosuch")
    assert failed.returncode == 41
    assert zramd.devices() == before


def test_a_step_that_fails_undoes_what_took_the_place_of_a_dead_attachment(
    zramd, kernel, mountpoint
):
    zramd.ok("up", "zram0", *VIA)
    zramd.kill("zram0")
    failed = zramd.run("up", "zram0", *VIA, "--mount", str(mountpoint), "--fs", "nosuch")
    assert failed.returncode == 41
    nothing_stands(zramd)


def test_up_knows_its_algorithm_however_it_is_spelled(zramd, kernel):
    zramd.ok("up", "zram0", *VIA, "--algorithm", "zstd(level=3)")
    zramd.ok("up", "zram0", *VIA, "--algorithm", "zstd( level = 3 )")
    zramd.fails(30, "up", "zram0", *VIA, "--algorithm", "zstd(level=4)")
    zramd.fails(2, "up", "zram0", *VIA, "--algorithm", "zstf")


def test_a_reset_of_an_attached_device_names_the_node(zramd, kernel):
    node = zramd.ok("up", "zram0", *VIA).strip()
    said = zramd.fails(30, "reset", "zram0")
    assert node in said
    assert "zramd detach zram0" in said


def test_without_nbd_a_forced_nbd_is_told_and_nothing_is_left(zramd, kernel):
    if Path("/sys/module/nbd").exists():
        pytest.skip("this kernel has nbd")
    done = zramd.run("up", "zram0", "--disksize=64M", "--via=nbd")
    assert done.returncode == 41
    assert "nbd" in done.stderr
    nothing_stands(zramd)


def test_a_server_that_fails_in_the_background_is_heard_as_if_in_the_foreground(zramd):
    in_front = zramd.fails(2, "serve", "zram0", "--disksize=1M", "--listen=unix:/no/such/dir/s")
    behind = zramd.fails(2, "up", "zram0", "--disksize=1M", "--listen=unix:/no/such/dir/s")
    assert behind == in_front
    assert zramd.left() == []


def test_the_server_in_the_background_outlives_up_and_has_a_session_and_a_log(zramd, kernel):
    zramd.ok("up", "zram0", *VIA)
    server = server_of(zramd, "zram0")
    assert os.getsid(server) == server
    assert os.readlink(f"/proc/{server}/cwd") == "/"
    assert os.readlink(f"/proc/{server}/fd/0") == "/dev/null"
    log = str(zramd.runtime / "zram0" / "log")
    assert [os.readlink(f"/proc/{server}/fd/{n}") for n in (1, 2)] == [log, log]
    assert "zram0 (64M, lz4) is served on " in Path(log).read_text()


def test_a_relative_socket_is_where_up_was_called_though_the_server_goes_elsewhere(
    zramd, kernel, tmp_path
):
    done = zramd.run("up", "zram0", *VIA, "--listen=unix:mine.sock", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine.sock").is_socket()
    zramd.ok("down", "zram0")
    assert not (tmp_path / "mine.sock").exists()


def test_modules_that_lie_in_wait_where_up_is_called_are_not_loaded(zramd, kernel, tmp_path):
    (tmp_path / "asyncio.py").write_text("raise SystemExit('taken over')")
    command = zramd.argv("up", "zram0", *VIA)
    command.insert(1, "-P")
    done = subprocess.run(
        command, env=zramd.environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_attach_prints_the_node_and_a_second_one_prints_it_again(zramd, kernel):
    zramd.serve("zram0", "--disksize=64M")
    done = zramd.run("attach", "zram0", "--via=loop")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "zramd: zram0 is attached through loop\n"
    assert Path(done.stdout.removesuffix("\n")).is_block_device()
    assert zramd.ok("attach", "zram0") == done.stdout


def test_attach_makes_ready_what_the_file_says_and_up_does_all_of_it(
    zramd, kernel, mountpoint, tmp_path
):
    zramd.environment["ZRAMD_CONFIG_DIR"] = str(tmp_path)
    file = tmp_path / "zram0.toml"
    file.write_text(f'disksize = "64M"\nuse = "mount"\nmount_point = "{mountpoint}"\n')
    zramd.serve("zram0", "--config", str(file))
    done = zramd.run("attach", "zram0", "--via=loop", "--config", str(file))
    assert done.returncode == 0, done.stderr
    assert f"{done.stdout.strip()} is ready: it holds ext4" in done.stderr
    assert not os.path.ismount(mountpoint)
    assert zramd.ok("up", "zram0", "--via=loop") == done.stdout
    assert os.path.ismount(mountpoint)
    zramd.ok("down", "zram0")
    assert zramd.ok("up", "zram0", "--via=loop")
    assert zramd.devices()["zram0"]["mountpoint"] == str(mountpoint)
    zramd.ok("down", "zram0")
    nothing_stands(zramd)


def test_detach_takes_the_node_away_and_the_pages_stay(zramd, kernel, mountpoint):
    zramd.serve("zram0", "--disksize=64M")
    zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint))
    (mountpoint / "file").write_text("kept")
    assert "in use" in zramd.fails(30, "detach", "zram0")
    subprocess.run(["umount", mountpoint], check=True)
    assert zramd.ok("detach", "zram0") == ""
    assert zramd.devices()["zram0"]["device"] is None
    zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint))
    assert (mountpoint / "file").read_text() == "kept"
    zramd.ok("down", "zram0")


def test_a_reset_is_refused_while_attached(zramd, kernel):
    zramd.ok("up", "zram0", *VIA)
    zramd.fails(30, "reset", "zram0")
    zramd.ok("detach", "zram0")
    wait_for(lambda: zramd.devices()["zram0"]["clients"] == 0)
    zramd.ok("reset", "zram0")


def test_down_with_another_client_connected_names_it_and_drops_nothing(zramd):
    zramd.serve("zram0")
    with zramd.connect("zram0"):
        said = zramd.fails(30, "down", "zram0")
        assert "connection" in said
        assert "zramd reset zram0 --force" in said
        assert zramd.devices()["zram0"]["state"] == "serving"
    wait_for(lambda: zramd.devices()["zram0"]["clients"] == 0)
    zramd.ok("down", "zram0")
    assert zramd.left() == []


def test_stopping_waits_for_a_client_that_is_about_to_leave(zramd, monkeypatch):
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(zramd.runtime))
    zram = Zram("zram0")
    zram.init(1 << 20)
    leaving = zram.open("the kernel, detached a moment ago")
    held = claim("zram0")
    control = ControlThread(zram, held.paths.control_socket, held.release)
    control.start()
    close = zram.close

    def close_and_leave(*, force=False):
        try:
            close(force=force)
        finally:
            leaving.close()

    monkeypatch.setattr(zram, "close", close_and_leave)
    stop("zram0", leave_s=60)
    control.close()
    assert zramd.left() == []


def test_down_clears_a_server_that_was_killed(zramd):
    zramd.serve("zram0")
    zramd.kill("zram0")
    zramd.ok("down", "zram0")
    assert zramd.left() == []


def test_down_clears_a_mounted_device_whose_server_was_killed(zramd, kernel, mountpoint):
    zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint))
    zramd.kill("zram0")
    assert zramd.devices()["zram0"]["state"] == "dead"
    zramd.ok("down", "zram0")
    assert not os.path.ismount(mountpoint)
    nothing_stands(zramd)


def test_down_clears_a_mounted_device_whose_nbdfuse_was_killed(zramd, kernel, mountpoint):
    zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint))
    socket = str(zramd.runtime / "zram0" / "nbd.sock")
    [nbdfuse] = [
        int(process.name)
        for process in Path("/proc").glob("[0-9]*")
        if (process / "comm").read_text() == "nbdfuse\n"
        and socket in (process / "cmdline").read_text()
    ]
    os.kill(nbdfuse, signal.SIGKILL)
    wait_for(lambda: not alive(nbdfuse))
    zramd.ok("down", "zram0")
    assert not os.path.ismount(mountpoint)
    nothing_stands(zramd)


def test_down_clears_a_mounted_device_whose_server_was_told_to_end(zramd, kernel, mountpoint):
    zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint))
    server = server_of(zramd, "zram0")
    os.kill(server, signal.SIGINT)
    wait_for(lambda: not alive(server))
    assert zramd.devices()["zram0"]["state"] == "dead"
    zramd.ok("down", "zram0")
    nothing_stands(zramd)


def test_a_mount_outlives_its_servers_being_told_to_end_and_down_ends_both(
    zramd, kernel, mountpoint
):
    zramd.ok("up", "zram0", *VIA, "--mount", str(mountpoint))
    content = os.urandom(1 << 20)
    (mountpoint / "file").write_bytes(content)
    server = server_of(zramd, "zram0")
    os.kill(server, signal.SIGTERM)
    subprocess.run(["sync", "-f", mountpoint], check=True)
    assert zramd.devices()["zram0"]["state"] == "serving"
    assert (mountpoint / "file").read_bytes() == content
    zramd.ok("down", "zram0")
    wait_for(lambda: not alive(server))
    nothing_stands(zramd)


def test_down_leaves_a_server_that_does_not_answer_as_it_is(zramd, monkeypatch, capsys):
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(zramd.runtime))
    monkeypatch.setattr("zramd.control.client.ANSWER_S", 0.05)
    zramd.serve("zram0")
    worker = zramd.worker("zram0")
    os.kill(worker, signal.SIGSTOP)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["down", "zram0"])
        assert ended.value.code == 22
        assert "does not answer" in capsys.readouterr().err
    finally:
        os.kill(worker, signal.SIGCONT)
    assert zramd.devices()["zram0"]["state"] == "serving"


def test_down_takes_a_server_that_ends_while_it_is_asked_for_ended(zramd, monkeypatch):
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(zramd.runtime))
    zramd.serve("zram0")
    server = server_of(zramd, "zram0")
    stop = Control.stop

    def stop_too_late(control: Control) -> None:
        os.kill(server, signal.SIGTERM)
        wait_for(lambda: not alive(server))
        stop(control)

    monkeypatch.setattr(Control, "stop", stop_too_late)
    with pytest.raises(SystemExit) as ended:
        main(["down", "zram0"])
    assert ended.value.code == 0
    assert zramd.left() == []


def test_up_after_a_kill_starts_anew(zramd, kernel):
    zramd.ok("up", "zram0", *VIA)
    zramd.kill("zram0")
    zramd.ok("up", "zram0", *VIA)
    assert zramd.devices()["zram0"]["state"] == "serving"
    zramd.ok("down", "zram0")
    nothing_stands(zramd)


@pytest.mark.parametrize("sign", ["lock", "control", "log", "loop"])
def test_up_that_is_interrupted_leaves_all_or_nothing(zramd, kernel, sign):
    up = zramd.start(
        *("up", "zram0", *VIA),
        stdout=subprocess.DEVNULL,
        # A shell's background job, as CI may be, starts with SIGINT ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(lambda: (zramd.runtime / "zram0" / sign).exists())
    up.send_signal(signal.SIGINT)
    if up.wait(60) in (0, -signal.SIGINT):  # by the signal: it met the interpreter's own end
        assert zramd.devices()["zram0"]["device"]
    else:
        assert up.returncode == 130
        nothing_stands(zramd)


@pytest.mark.parametrize("sign", ["lock", "control", "log", "loop"])
def test_down_clears_an_up_that_was_killed(zramd, kernel, sign):
    up = zramd.start("up", "zram0", *VIA, stdout=subprocess.DEVNULL)
    wait_for(lambda: (zramd.runtime / "zram0" / sign).exists())
    up.kill()
    up.wait(60)
    # The server that it had started comes to its readiness by itself, or ends for want of a reader.
    wait_for(lambda: zramd.run("down", "zram0").returncode == 0 or zramd.left() == [])
    nothing_stands(zramd)

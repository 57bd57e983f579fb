"""What test_systemd.py has run in a guest that systemd has booted with our units enabled.

By pytest: the checks, in this order, each leaving all as it found it. As a program (`hold`): a
process whose memory is on the swap when the guest is shut down.
"""

import mmap
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kernel.loads import end, goes_on, start_toucher, start_verifier
from tests.kernel.servers import wait_for
from zramd.kernel import state
from zramd.nbd.client import negotiate
from zramd.service.systemd import Manager

MIB = 1 << 20
SWAP = ("dev-nbd0.swap", "zramd-attach@swap0.service", "zramd@swap0.service")
FILES = ("srv-files.mount", "zramd-attach@files.service", "zramd@files.service")
MADV_PAGEOUT = 21
UPGRADES = int(os.environ.get("ZRAMD_TEST_UPGRADES", "30"))
"""Of the two together."""


def systemctl(*arguments: str, status: int | None = 0) -> str:
    """What it said; asserts its exit status unless `status` is None."""
    done = subprocess.run(
        ["systemctl", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert status in (None, done.returncode), f"{arguments}: {done.returncode}\n{done.stdout}"
    return done.stdout


def states(units: tuple[str, ...]) -> list[str]:
    return systemctl("is-active", *units, status=None).split()


def mend(units: tuple[str, ...]) -> None:
    """What an administrator does about a stop that was refused."""
    systemctl("start", units[1])
    systemctl("reset-failed")  # or the next stop, well as it goes, counts as failed too


def main_pid(unit: str) -> int:
    return int(systemctl("show", "-P", "MainPID", unit))


def worker(name: str) -> int:
    """The process of a server that does the I/O; 0 where it will have none."""
    return int(Path(f"/run/zramd/{name}/lock").read_text().split()[-1])


class Swapped:
    """Memory that is on the swap, and nowhere else."""

    def __init__(self, size: int) -> None:
        self._content = random.Random(size).randbytes(size)
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._memory.write(self._content)
        deadline = time.monotonic() + 30
        while not self._is_out():
            assert time.monotonic() < deadline, f"not on the swap only: {self._where()}"
            time.sleep(0.02)

    def _is_out(self) -> bool:
        self._memory.madvise(MADV_PAGEOUT)
        swapped, cached = self._where()
        if swapped >= len(self._memory) >> 10 and cached < 64:
            return True
        _ = self._memory[::4096]  # what is read back from the swap cache is forgotten next time
        return False

    def _where(self) -> tuple[int, int]:
        """Our KiB on the swap, and everybody's KiB that are in memory besides."""
        ours = re.findall(r"^Swap: +(\d+)", Path("/proc/self/smaps").read_text(), re.MULTILINE)
        all_that = re.findall(
            r"^SwapCached: +(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE
        )
        return sum(map(int, ours)), int(all_that[0])

    def comes_back(self) -> bool:
        """Whether it is as it was; it is given up then."""
        with self._memory:
            return self._memory[:] == self._content


@pytest.fixture(autouse=True)
def _leaves_all_as_it_was() -> Iterator[None]:
    yield
    assert states(SWAP + FILES) == ["active"] * 6
    assert swaps() == {"/dev/nbd0": 100}


def swaps() -> dict[str, int]:
    """The swap devices, with their priorities."""
    lines = Path("/proc/swaps").read_text().splitlines()[1:]
    return {line.split()[0]: int(line.split()[-1]) for line in lines}


def test_boot_brought_everything_up_and_no_unit_failed() -> None:
    assert systemctl("is-system-running", "--wait") == "running\n"
    assert os.path.ismount("/srv/files")


@pytest.mark.parametrize("name", ["swap0", "files"])
def test_a_server_runs_hardened_and_without_rights_that_it_does_not_need(name: str) -> None:
    for server in Path("/proc", str(main_pid(f"zramd@{name}"))), Path("/proc", str(worker(name))):
        is_hardened(server)


def is_hardened(server: Path) -> None:
    status = dict(line.split(":\t", 1) for line in (server / "status").read_text().splitlines())
    cap_sys_admin, cap_sys_resource = 21, 24
    assert int(status["CapEff"], 16) == 1 << cap_sys_resource | 1 << cap_sys_admin
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert int(status["VmLck"].split()[0]) > 0
    assert (server / "oom_score_adj").read_text() == "-1000\n"
    assert os.sched_getscheduler(int(server.name)) == os.SCHED_FIFO


def test_status_shows_what_the_device_holds() -> None:
    Path("/srv/files/data").write_bytes(random.Random(1).randbytes(4 * MIB))
    os.sync()
    wait_for(
        lambda: (
            re.search(r'Status: "[\d.]+M of pages stored in', systemctl("status", FILES[2]))
            is not None
        ),
        "the figures",
        20,
    )


def test_a_server_refuses_to_be_stopped_and_nothing_is_touched() -> None:
    memory = Swapped(8 * MIB)
    before = main_pid(SWAP[2])
    for verb in ("stop", "restart"):
        assert "Operation refused" in systemctl(verb, SWAP[2], status=None)
        assert states(SWAP) == ["active"] * 3
    assert main_pid(SWAP[2]) == before
    assert memory.comes_back()
    assert Swapped(8 * MIB).comes_back()


@pytest.mark.parametrize("name", ["swap0", "files"])
def test_a_worker_that_dies_is_replaced_and_nobody_notices(name: str) -> None:
    unit, memory = f"zramd@{name}", Swapped(8 * MIB)
    content = random.Random(2).randbytes(4 * MIB)
    Path("/srv/files/kept").write_bytes(content)
    os.sync()
    main, before = main_pid(unit), worker(name)
    os.kill(before, signal.SIGKILL)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    assert Path("/srv/files/kept").read_bytes() == content
    assert memory.comes_back()
    Path("/srv/files/kept").unlink()
    os.sync()
    assert (main_pid(unit), worker(name) != before) == (main, True)
    told = subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
    assert "I/O error" not in told


@pytest.fixture
def start_loads() -> Iterator[Callable[[], list[subprocess.Popen[str]]]]:
    """To have swap and the file system in use without a pause."""
    loads: list[subprocess.Popen[str]] = []
    directory = Path("/srv/files/load")

    def start() -> list[subprocess.Popen[str]]:
        directory.mkdir()
        loads.append(start_toucher())
        loads.append(start_verifier(directory))
        return loads

    yield start
    for load in loads:
        load.kill()
        load.wait()
    shutil.rmtree(directory, ignore_errors=True)


@pytest.mark.timeout(60 + 15 * UPGRADES)
@pytest.mark.parametrize("name", ["swap0", "files"])
def test_an_upgrade_under_load_changes_the_process_and_nobody_notices(
    name: str, start_loads: Callable[[], list[subprocess.Popen[str]]]
) -> None:
    unit, memory = f"zramd@{name}", Swapped(8 * MIB)
    content = random.Random(2).randbytes(4 * MIB)
    Path("/srv/files/kept").write_bytes(content)
    os.sync()
    of_units = "show", "-p", "Id,ActiveState,InvocationID,MainPID,NRestarts", *SWAP, *FILES
    all_units = systemctl(*of_units)
    main = main_pid(unit)
    loads = start_loads()  # not before: what it leaves in the swap cache, `Swapped` would wait for
    for _ in range(UPGRADES // 2):
        goes_on("/dev/nbd0", 20)
        goes_on("/dev/nbd1", 100)
        before = worker(name)
        subprocess.run(["zramd", "upgrade", name], check=True)
        for load in loads:
            assert load.poll() is None, load.communicate()[0]
        assert swaps() == {"/dev/nbd0": 100}
        assert os.path.ismount("/srv/files")
        assert worker(name) != before
        is_hardened(Path("/proc", str(worker(name))))
        is_hardened(Path("/proc", str(main)))
    goes_on("/dev/nbd0", 20)
    goes_on("/dev/nbd1", 100)
    for load in loads:
        end(load)
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    assert Path("/srv/files/kept").read_bytes() == content
    assert memory.comes_back()
    os.kill(worker(name), signal.SIGKILL)
    assert Swapped(8 * MIB).comes_back()
    assert systemctl(*of_units) == all_units
    Path("/srv/files/kept").unlink()
    systemctl("stop", FILES[0])
    subprocess.run(["fsck.ext4", "-fn", "/dev/nbd1"], check=True)
    systemctl("start", FILES[0])
    told = subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
    assert re.findall(r".*(?:I/O error|EXT4-fs error|error on swap-device).*", told) == []


@pytest.fixture
def swapoff_fails() -> Iterator[None]:
    """There is not enough memory, by the kernel's strict account, for what is on the swap."""
    committed = re.search(r"Committed_AS: +(\d+)", Path("/proc/meminfo").read_text())
    assert committed is not None
    # The limit is this and all swap, 256 MiB: half of that is free then, and all of it needed.
    Path("/proc/sys/vm/overcommit_kbytes").write_text(str(max(int(committed[1]) - (128 << 10), 1)))
    Path("/proc/sys/vm/overcommit_memory").write_text("2")
    yield
    Path("/proc/sys/vm/overcommit_memory").write_text("0")


@pytest.mark.usefixtures("swapoff_fails")
def test_where_swap_cannot_be_turned_off_all_stays() -> None:
    memory = Swapped(8 * MIB)
    assert "Job failed" in systemctl("stop", SWAP[0], status=1)
    assert states(SWAP) == ["active"] * 3
    # A unit whose ExecStop= refuses counts as stopped, whatever it did.
    systemctl("stop", SWAP[1], status=None)
    assert states(SWAP) == ["active", "failed", "active"]
    assert Path("/sys/block/nbd0/backend").exists()
    assert memory.comes_back()
    mend(SWAP)


def test_where_a_file_system_is_busy_all_stays() -> None:
    Path("/srv/files/kept").write_text("kept")
    holder = subprocess.Popen(["sleep", "1000"], cwd="/srv/files")
    try:
        systemctl("stop", FILES[0], status=1)
        assert states(FILES) == ["active"] * 3
        systemctl("stop", FILES[1], status=None)
        assert states(FILES) == ["active", "failed", "active"]
        assert Path("/srv/files/kept").read_text() == "kept"
    finally:
        holder.kill()
        holder.wait()
    mend(FILES)


@pytest.mark.parametrize("units", [SWAP, FILES])
def test_stopping_the_node_stops_its_use_first_and_the_server_keeps_the_pages(
    units: tuple[str, ...],
) -> None:
    Path("/srv/files/kept").write_text("kept")
    memory = Swapped(8 * MIB)
    systemctl("stop", units[1])
    assert states(units) == ["inactive", "inactive", "active"]
    assert memory.comes_back()
    systemctl("start", units[0])
    assert states(units) == ["active"] * 3
    assert Path("/srv/files/kept").read_text() == "kept"


def test_a_server_that_is_told_to_end_while_in_use_serves_on_and_ends_when_that_ends() -> None:
    memory = Swapped(8 * MIB)
    server = main_pid(SWAP[2])
    os.kill(server, signal.SIGTERM)
    time.sleep(2)
    assert states(SWAP) == ["active"] * 3
    assert memory.comes_back()
    assert Swapped(8 * MIB).comes_back()
    systemctl("stop", SWAP[1])
    wait_for(lambda: states(SWAP) == ["inactive"] * 3, "its end")
    systemctl("start", SWAP[0])
    assert main_pid(SWAP[2]) != server


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGABRT, None], ids=["KILL", "ABRT", "all"])
@pytest.mark.parametrize("units", [SWAP, FILES], ids=["swap", "files"])
def test_a_server_that_dies_is_followed_by_one_with_its_pages(
    units: tuple[str, ...], how: signal.Signals | None
) -> None:
    server, memory = main_pid(units[2]), Swapped(8 * MIB)
    content = random.Random(3).randbytes(4 * MIB)
    Path("/srv/files/kept").write_bytes(content)
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")
    if how is None:
        systemctl("kill", "-s", "KILL", units[2])
    else:
        os.kill(server, how)
    wait_for(lambda: main_pid(units[2]) not in (0, server), "another server")
    assert memory.comes_back()
    assert Swapped(8 * MIB).comes_back()
    assert Path("/srv/files/kept").read_bytes() == content
    Path("/srv/files/kept").unlink()
    os.sync()
    wait_for(lambda: states(units) == ["active"] * 3, "all to be active")
    told = subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
    assert "I/O error" not in told
    systemctl("reset-failed")  # what has been counted for StartLimitBurst=


def test_a_request_that_waits_for_a_server_that_hangs_is_answered_by_the_next() -> None:
    server = main_pid(FILES[2])
    os.kill(worker("files"), signal.SIGSTOP)
    read = ["dd", "if=/dev/nbd1", "of=/dev/null", "bs=4096", "count=1", "iflag=direct"]
    waiting = subprocess.Popen(read)
    inflight = Path("/sys/block/nbd1/inflight")
    wait_for(lambda: inflight.read_text().split() != ["0", "0"], "a request under way")
    os.kill(server, signal.SIGKILL)
    assert waiting.wait() == 0
    wait_for(lambda: states(FILES) == ["active"] * 3, "all to be active")
    assert os.path.ismount("/srv/files")


def test_what_a_server_leaves_that_ends_for_good_is_cleared_and_can_be_started_again() -> None:
    server = main_pid(FILES[2])
    systemctl("reset-failed")
    for _ in range(5):  # MOST_DEATHS: then no other is started, and the pages can be given up
        before = worker("files")
        assert before > 0
        os.kill(before, signal.SIGKILL)
        wait_for(lambda before=before: worker("files") != before, "another worker, or none")
    assert worker("files") == 0
    os.kill(server, signal.SIGTERM)
    wait_for(lambda: states(FILES) == ["inactive", "inactive", "failed"], "the end of all")
    assert not Path("/sys/block/nbd1/backend").exists()
    assert not os.path.ismount("/srv/files")
    systemctl("reset-failed")
    systemctl("start", FILES[0])
    assert list(Path("/srv/files").iterdir()) == [Path("/srv/files/lost+found")]


def test_down_ends_what_systemd_will_not_stop() -> None:
    subprocess.run(["zramd", "down", "files"], check=True)
    wait_for(lambda: states(FILES) == ["inactive"] * 3, "all to be seen as stopped")
    systemctl("start", FILES[0])


def test_a_connection_to_its_socket_starts_a_server() -> None:
    systemctl("start", "zramd@vm.socket")
    assert states(("zramd@vm.service",)) == ["inactive"]
    with socket.socket(socket.AF_UNIX) as client:
        client.connect("/run/zramd-vm.sock")
        assert negotiate(client, "vm").size == 16 * MIB
        assert states(("zramd@vm.service",)) == ["active"]
    systemctl("stop", "zramd@vm.socket")
    subprocess.run(["zramd", "down", "vm"], check=True)
    wait_for(lambda: states(("zramd@vm.service",)) == ["inactive"], "its end")


def test_after_all_that_no_unit_is_failed() -> None:
    assert systemctl("--failed", "--plain", "--no-legend") == ""
    assert state.users("/dev/nbd1") == [state.User("mount", "/srv/files")]


def hold() -> None:
    """Have 32 MiB on the swap until the shutdown ends what no unit's stop has ended."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    memory = Swapped(32 * MIB)
    Manager().tell(READY="1")
    signal.sigwait([signal.SIGTERM])
    swap = "on" if swaps() else "off"
    Path("/dev/console").write_text(
        f"holder: the swap is {swap}, the memory {'right' if memory.comes_back() else 'WRONG'}\n"
    )


if __name__ == "__main__" and sys.argv[1:] == ["hold"]:
    hold()

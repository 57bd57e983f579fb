"""What test_nbd_kernel.py has run by pytest inside the guest: a real nbd.ko, and our server.

The server is the one named by ZRAMD_TEST_SERVER. Every check has a server and a device of its own.
"""

import faulthandler
import hashlib
import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernel import killing, servers
from tests.kernel.killing import killed_at_each_line
from tests.kernel.servers import zramd
from tests.kernel.trees import contents, copy_tree
from zramd.control.client import Control
from zramd.errors import AttachFailed, DeviceBusy, NoServer, ToolMissing, UseFailed
from zramd.kernel import attach, nbd, state, use
from zramd.service import hardening
from zramd.service.runtime import Paths

SERVER = os.environ["ZRAMD_TEST_SERVER"]
MIB = 1 << 20
MADV_PAGEOUT = 21
NBD_KO = next(Path("/usr/lib/uml/modules").glob(f"{os.uname().release}/**/nbd.ko"))


@dataclass
class Device:
    name: str
    server: subprocess.Popen[bytes]

    def attach(self) -> str:
        return zramd("attach", self.name).stdout.strip()


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    with servers.served(SERVER, "g0") as server:
        yield Device("g0", server)
    assert nothing_is_left()


@pytest.fixture
def directory() -> Path:
    # With a space: mountinfo escapes it.
    return Path(tempfile.mkdtemp(prefix="a place ", dir="/run/mnt"))


def nothing_is_left() -> bool:
    return (
        not list(Path("/sys/block").glob("nbd*/backend"))
        and "/dev/nbd" not in Path("/proc/self/mountinfo").read_text()
        and "/dev/nbd" not in Path("/proc/swaps").read_text()
        and not Path(os.environ["ZRAMD_RUNTIME_DIR"], "g0").exists()
    )


def inflight(node: str) -> list[str]:
    """Reads and writes under way at the node."""
    return Path("/sys/block", Path(node).name, "inflight").read_text().split()


def hung() -> list[str]:
    """The processes, the kernel's own among them, that nothing can wake but what they wait for."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (process / "stat").read_text().rpartition(")")
        except OSError:
            continue  # it ended meanwhile
        if rest.split()[0] == "D":
            found.append(f"{name})")
    return found


def force_reset(node: str, name: str) -> None:
    """`zramd reset --force`, after which all that the node has taken must end."""
    zramd("reset", name, "--force")
    servers.wait_for(lambda: inflight(node) == ["0", "0"], "the requests to end", 20)


def down_clears_all_and_up_works(name: str, directory: Path) -> None:
    """The end of the checks that break a device: nothing of it is in the way of the next."""
    servers.wait_for(lambda: not hung(), "processes to wake up", 20)
    zramd("down", name)
    assert nothing_is_left()
    node = zramd("up", name, "--disksize", "64M", "--mount", str(directory)).stdout.strip()
    content = os.urandom(MIB)
    (directory / "file").write_bytes(content)
    os.sync()
    forget_cached()
    assert (directory / "file").read_bytes() == content
    assert node == "/dev/nbd0"
    zramd("down", name)
    assert nothing_is_left()


def forget_cached() -> None:
    """From here on what is read is read from the device."""
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def swapped_kib() -> int:
    """KiB on the only swap device."""
    return int(Path("/proc/swaps").read_text().splitlines()[1].split()[3])


def swapped_out(seed: int) -> mmap.mmap:
    """8 MiB of a process's memory that are on the swap device, and nowhere else."""
    memory = mmap.mmap(-1, 8 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(random.Random(seed).randbytes(8 * MIB))
    page_out(memory)
    return memory


def page_out(memory: mmap.mmap) -> None:
    """Until it is written, and forgotten."""

    def forgotten() -> bool:
        memory.madvise(MADV_PAGEOUT)
        cached = re.search(r"^SwapCached: +(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
        assert cached is not None
        if swapped_kib() >= len(memory) // 1024 and int(cached[1]) < 64:
            return True
        _ = memory[::4096]  # what is read back from the swap cache is forgotten the next time
        return False

    servers.wait_for(forgotten, "the memory to be on the swap device only", 20)


def queue(node: str, attribute: str) -> int:
    return int(Path("/sys/block", Path(node).name, attribute).read_text())


def test_attach_prints_the_node_and_says_the_way_on_stderr(device: Device) -> None:
    done = zramd("attach", device.name)
    assert done.stdout == "/dev/nbd0\n"
    assert "nbd" in done.stderr
    assert queue("/dev/nbd0", "size") * 512 == 512 * MIB
    assert queue("/dev/nbd0", "queue/logical_block_size") == 4096
    assert queue("/dev/nbd0", "queue/discard_max_bytes") > 0
    assert queue("/dev/nbd0", "queue/fua") == 1


def test_a_second_attach_gets_the_first_ones_node(device: Device) -> None:
    assert device.attach() == device.attach() == "/dev/nbd0"


def test_attaches_at_the_same_time_give_one_node(device: Device) -> None:
    with ThreadPoolExecutor(4) as pool:
        nodes = list(pool.map(lambda _: device.attach(), range(4)))
    assert nodes == ["/dev/nbd0"] * 4
    assert len(list(Path("/sys/block").glob("nbd*/backend"))) == 1


@pytest.mark.parametrize("node", ["/dev/nbd3", "/dev/nbd200"])  # there are 16 to begin with
def test_attach_takes_the_node_that_is_asked_for_and_detach_frees_it(
    device: Device, node: str
) -> None:
    assert zramd("attach", device.name, "--node", node).stdout == f"{node}\n"
    assert queue(node, "size") * 512 == 512 * MIB
    assert state.answers(node)
    assert zramd("attach", device.name, "--node", node).stdout == f"{node}\n"
    assert device.attach() == node
    zramd("detach", device.name)
    assert queue(node, "size") == 0


def test_a_node_that_another_device_of_ours_has_is_refused_naming_it(device: Device) -> None:
    zramd("attach", device.name, "--node", "/dev/nbd3")
    with servers.served(SERVER, "g1", "64M"):
        refused = zramd("attach", "g1", "--node", "/dev/nbd3", status=DeviceBusy.exit_code)
        assert f"/dev/nbd3 is taken by the zramd device of {Paths('g0').dir}" in refused.stderr
        assert "zramd detach g0" in refused.stderr
        assert refused.stderr.count("\n") == 1
        assert attach.attached("g1") is None
    assert queue("/dev/nbd3", "size") * 512 == 512 * MIB


def test_a_node_that_nbd_client_has_is_refused_naming_its_process(device: Device) -> None:
    server = str(Paths(device.name).nbd_socket)
    subprocess.run(
        ["nbd-client", "-unix", server, "/dev/nbd3", "-N", device.name, "-b", "4096"], check=True
    )
    try:
        holder = Path("/sys/block/nbd3/pid").read_text().strip()
        refused = zramd("attach", "g0", "--node", "/dev/nbd3", status=DeviceBusy.exit_code)
        assert f"/dev/nbd3 is taken by process {holder}; nbd-client -d /dev/nbd3" in refused.stderr
        assert device.attach() == "/dev/nbd0"
    finally:
        subprocess.run(["nbd-client", "-d", "/dev/nbd3"], check=True)


def test_another_node_than_the_one_it_has_is_refused(device: Device) -> None:
    assert device.attach() == "/dev/nbd0"
    refused = zramd("attach", device.name, "--node", "/dev/nbd3", status=DeviceBusy.exit_code)
    assert "g0 is attached as /dev/nbd0 through nbd already; zramd detach g0" in refused.stderr
    assert queue("/dev/nbd0", "size") * 512 == 512 * MIB


@pytest.fixture
def config_file(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The configuration of g0, where `zramd up g0` looks for it."""
    with tempfile.TemporaryDirectory() as place:
        monkeypatch.setenv("ZRAMD_CONFIG_DIR", place)
        yield Path(place, "g0.toml")


def test_attach_as_the_file_says_makes_swap_space_at_its_node_and_does_not_swap_on_it(
    device: Device, config_file: Path
) -> None:
    config_file.write_text('disksize = "512M"\nnode = "/dev/nbd3"\nuse = "swap"\n')
    command = ("attach", device.name, "--config", str(config_file))
    assert zramd(*command).stdout == "/dev/nbd3\n"
    assert state.users("/dev/nbd3") == []
    subprocess.run(["swapon", "--discard", "/dev/nbd3"], check=True)
    written = zramd("get", device.name, "mm_stat").stdout
    assert zramd(*command).stdout == "/dev/nbd3\n"
    assert zramd("get", device.name, "mm_stat").stdout == written
    use.release("/dev/nbd3")


def test_attach_as_the_file_says_makes_the_file_system_once_and_does_not_mount_it(
    device: Device, config_file: Path, directory: Path
) -> None:
    config_file.write_text(
        f'disksize = "512M"\nuse = "mount"\nmount_point = "{directory}"\nfs_type = "xfs"\n'
    )
    command = ("attach", device.name, "--config", str(config_file))
    node = zramd(*command).stdout.strip()
    assert state.users(node) == []
    subprocess.run(["mount", "-t", "xfs", node, directory], check=True)
    (directory / "file").write_text("kept")
    assert zramd(*command).stdout.strip() == node
    use.release(node)
    zramd("detach", device.name)
    subprocess.run(["mount", "-t", "xfs", zramd(*command).stdout.strip(), directory], check=True)
    assert (directory / "file").read_text() == "kept"
    use.release(node)


def test_attach_as_the_file_says_refuses_what_is_on_the_device_and_detaches_it_again(
    device: Device, config_file: Path
) -> None:
    node = device.attach()
    use.format(node, "ext4")
    zramd("detach", device.name)
    config_file.write_text('disksize = "512M"\nuse = "swap"\n')
    command = ("attach", device.name, "--config", str(config_file))
    refused = zramd(*command, status=UseFailed.exit_code)
    assert f"{node} holds ext4 already, and it stays" in refused.stderr
    assert refused.stdout == ""
    assert attach.attached(device.name) is None
    device.attach()
    zramd(*command, status=UseFailed.exit_code)
    assert attach.attached(device.name) is not None  # it was before


def test_up_without_a_disksize_does_all_that_the_file_says(config_file: Path) -> None:
    config_file.write_text(
        'disksize = "64M"\ncomp_algorithm = "zstd"\nnode = "/dev/nbd3"\nuse = "swap"\n'
        "swap_priority = 7\nallow_deadlock = true\n"
    )
    assert zramd("up", "g0").stdout == "/dev/nbd3\n"
    assert zramd("up", "g0").stdout == "/dev/nbd3\n"
    assert "[zstd]" in zramd("get", "g0", "comp_algorithm").stdout
    [swap] = Path("/proc/swaps").read_text().splitlines()[1:]
    assert swap.split()[0] == "/dev/nbd3"
    assert swap.split()[4] == "7"
    zramd("down", "g0")
    assert nothing_is_left()


def test_detach_frees_the_node_and_may_be_repeated(device: Device) -> None:
    device.attach()
    zramd("detach", device.name)
    assert queue("/dev/nbd0", "size") == 0
    assert attach.attached(device.name) is None
    zramd("detach", device.name)


@pytest.mark.parametrize("fstype", ["ext4", "xfs", "btrfs"])
def test_a_tree_survives_a_remount_and_a_trim_frees_it(
    device: Device, directory: Path, fstype: str
) -> None:
    node = device.attach()
    use.mount(node, directory, fstype)
    empty = servers.stored_data_size(device.name)
    size = copy_tree(directory / "tree")
    os.sync()
    copied = contents(directory / "tree")
    full = servers.stored_data_size(device.name)
    assert full - empty > size * 0.8
    use.release(node)
    use.mount(node, directory, fstype)
    assert contents(directory / "tree") == copied
    shutil.rmtree(directory / "tree")
    os.sync()
    subprocess.run(["fstrim", directory], check=True)
    assert servers.stored_data_size(device.name) < full - size * 0.8
    use.release(node)


def test_pages_come_back_from_swap(device: Device) -> None:
    node = device.attach()
    use.swapon(node, 7)
    assert Path("/proc/swaps").read_text().splitlines()[1].split()[4] == "7"
    memory = mmap.mmap(-1, 24 * MIB)
    memory.write(random.Random(1).randbytes(8 * MIB))
    memory.write(Path(sys.executable).read_bytes()[: 16 * MIB])
    digest = hashlib.sha256(memory).digest()
    memory.madvise(MADV_PAGEOUT)
    assert swapped_kib() > 8 * 1024
    assert hashlib.sha256(memory).digest() == digest
    memory.madvise(MADV_PAGEOUT)
    use.release(node)
    assert hashlib.sha256(memory).digest() == digest
    memory.close()


def test_reset_is_refused_while_attached_and_the_pages_stay(device: Device) -> None:
    node = device.attach()
    page = os.urandom(4096)
    with open(node, "r+b") as disk:
        disk.write(page)
    refused = zramd("reset", device.name, status=DeviceBusy.exit_code)
    assert refused.stderr.count("\n") == 1
    with open(node, "rb") as disk:
        assert disk.read(4096) == page
    zramd("detach", device.name)
    servers.wait_for(
        lambda: zramd("reset", device.name, status=None).returncode == 0, "a reset once detached"
    )


def reset_is_refused(name: str) -> None:
    """By the command, by the attribute, and by the server itself; all three leave it as it was."""
    before = zramd("get", name, "disksize").stdout
    for command in (["reset", name], ["set", name, "reset", "1"]):
        refused = zramd(*command, status=DeviceBusy.exit_code)
        assert refused.stderr.count("\n") == 1
    with Control(Paths(name).control_socket) as control:
        with pytest.raises(DeviceBusy):
            control.reset()
        assert control.statistics().openers
    assert zramd("get", name, "disksize").stdout == before


def test_reset_is_refused_while_mounted_and_the_files_stay(device: Device, directory: Path) -> None:
    node = device.attach()
    use.mount(node, directory)
    content = os.urandom(2 * MIB)
    (directory / "before").write_bytes(content)
    os.sync()
    reset_is_refused(device.name)
    (directory / "after").write_bytes(content)
    os.sync()
    forget_cached()
    assert (directory / "before").read_bytes() == content
    assert (directory / "after").read_bytes() == content
    assert device.attach() == node
    use.release(node)


def test_reset_is_refused_while_swapped_on_and_the_pages_stay(device: Device) -> None:
    node = device.attach()
    use.swapon(node)
    memory = swapped_out(2)
    expected = random.Random(2).randbytes(8 * MIB)
    reset_is_refused(device.name)
    assert memory[:] == expected
    page_out(memory)
    use.release(node)
    assert memory[:] == expected
    memory.close()


def test_a_server_for_swap_is_hardened_in_all_its_threads_and_up_swaps_on_it() -> None:
    with servers.served(SERVER, "g1", "64M", use="swap"):
        process = Path("/proc", str(Paths("g1").worker()))
        assert hardening.lacking(process) == []
        min_free = Path("/proc/sys/vm/min_free_kbytes")
        min_free.write_text("512")
        done = zramd("up", "g1", "--disksize", "64M", "--swap")
        assert "vm.min_free_kbytes is 8192 now, and was 512" in done.stderr
        assert min_free.read_text() == "8192\n"
        node = done.stdout.strip()
        assert zramd("up", "g1", "--disksize", "64M", "--swap").stdout.strip() == node
        assert hardening.lacking(process) == []
        told = json.loads(zramd("doctor", "g1", "--json", status=None).stdout)["checks"]
        ours = {check["check"]: check["status"] for check in told if check["device"] == "g1"}
        assert ours["hardened"] == ours["preallocated"] == ours["swap-way"] == "ok"
        memory = swapped_out(5)
        with open("/proc/sys/vm/drop_caches", "w") as drop:
            drop.write("3")
        assert memory[:] == random.Random(5).randbytes(8 * MIB)
        memory.close()
        zramd("down", "g1")
    assert nothing_is_left()


def start_fio(node: str, *options: str, depth: int = 16) -> subprocess.Popen[str]:
    """fio with `depth` requests at a time on the node; returns when it is well under way."""
    statistics = Path("/sys/block", Path(node).name, "stat")

    def done() -> tuple[int, int]:
        """Reads and writes, those of all that used the node before included."""
        reads, _, _, _, writes, *_ = map(int, statistics.read_text().split())
        return reads, writes

    before = done()
    fio = subprocess.Popen(
        [
            *("fio", "--name=load", f"--filename={node}", "--rw=randrw", "--bs=4k", "--size=64M"),
            *("--ioengine=libaio", "--direct=1", f"--iodepth={depth}", "--thread"),
            *("--time_based", "--runtime=1000", *options),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )

    def under_way() -> bool:
        return all(now - then > 300 for then, now in zip(before, done(), strict=True))

    servers.wait_for(lambda: fio.poll() is not None or under_way(), "fio to get going")
    assert fio.poll() is None, fio.communicate()[0]
    return fio


def test_a_forced_reset_under_load_gives_errors_not_hangs(device: Device, directory: Path) -> None:
    for _ in range(2):  # where the reset meets the requests is left to chance
        node = device.attach()
        fio = start_fio(node)
        force_reset(node, device.name)
        status, said = servers.end_of(fio)
        assert status != 0
        # Who begins a write when the node has been cut off finds that it has no size any more.
        assert "Input/output error" in said or "No space left on device" in said
        zramd("set", device.name, "disksize", "512M")
    zramd("reset", device.name, "--force")
    down_clears_all_and_up_works(device.name, directory)


def test_a_forced_reset_under_load_that_ignores_errors_lets_it_come_to_its_end(
    device: Device, directory: Path
) -> None:
    node = device.attach()
    # As many as nbd takes at once: for each that fails another comes while the rest still wait.
    fio = start_fio(node, "--continue_on_error=all", depth=128)
    zramd("reset", device.name, "--force")
    time.sleep(3)
    fio.send_signal(signal.SIGINT)  # it ends when all that it has asked for is answered
    _status, said = servers.end_of(fio)
    # The first may be of what was on its way, or of who finds that the node has no size any more.
    errors = re.search(r"errors +: total=(\d+), first_error=(?:5|28)/", said)
    assert errors is not None, said
    assert int(errors[1]) > 100
    servers.wait_for(lambda: inflight(node) == ["0", "0"], "the requests to end", 20)
    down_clears_all_and_up_works(device.name, directory)


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_a_forced_reset_under_a_mount_gives_its_writers_errors_not_hangs(
    device: Device, directory: Path, fstype: str
) -> None:
    node = device.attach()
    use.mount(node, directory, fstype)
    writers = []
    for n in range(3):
        place = directory / str(n)
        place.mkdir()
        writers.append(servers.start_writer(place))
    servers.wait_for(lambda: all((directory / f"{n}/3").exists() for n in range(3)), "the writers")
    force_reset(node, device.name)
    for writer in writers:
        status, said = servers.end_of(writer)
        assert status == 1
        assert servers.FAILED_WRITE.search(said), said
    down_clears_all_and_up_works(device.name, directory)


def test_down_clears_swap_whose_device_was_reset(device: Device, directory: Path) -> None:
    node = device.attach()
    use.swapon(node)
    swapped_out(3).close()  # nobody needs these pages any more
    force_reset(node, device.name)
    down_clears_all_and_up_works(device.name, directory)


def test_a_process_whose_pages_were_reset_gets_a_signal_and_down_clears_all(
    device: Device, directory: Path
) -> None:
    node = device.attach()
    use.swapon(node)
    memory = swapped_out(4)
    force_reset(node, device.name)
    owner = os.fork()
    if owner == 0:
        faulthandler.disable()  # pytest's would write into the results
        hashlib.sha256(memory)
        os._exit(0)
    assert os.WTERMSIG(os.waitpid(owner, 0)[1]) == signal.SIGBUS
    down_clears_all_and_up_works(device.name, directory)
    memory.close()


def test_a_reset_device_gets_another_size_and_its_old_node_never_sees_it(device: Device) -> None:
    node = device.attach()
    page = os.urandom(4096)
    write_page(node, page)
    zramd("reset", device.name, "--force")
    zramd("set", device.name, "disksize", "128M")
    # The kernel has let the connection go, and with it the node's size.
    with pytest.raises(OSError, match=r"Errno (5|28)"):
        write_page(node, page)
    assert not state.answers(node)
    node = device.attach()
    assert queue(node, "size") * 512 == 128 * MIB
    with open(node, "rb") as disk:
        assert disk.read(4096) == bytes(4096)
    write_page(node, page)
    zramd("detach", device.name)


def test_after_a_reset_an_old_connection_beside_the_new_one_never_sees_it(device: Device) -> None:
    """nbd-client's, which `attach` does not know and so does not replace."""
    server = str(Paths(device.name).nbd_socket)
    subprocess.run(
        ["nbd-client", "-unix", server, "/dev/nbd0", "-N", device.name, "-b", "4096"], check=True
    )
    try:
        zramd("reset", device.name, "--force")
        zramd("set", device.name, "disksize", "128M")
        node = device.attach()
        assert node == "/dev/nbd1"
        assert queue(node, "size") * 512 == 128 * MIB
        assert state.answers(node)
        assert not state.answers("/dev/nbd0")
        zramd("detach", device.name)
    finally:
        subprocess.run(["nbd-client", "-d", "/dev/nbd0"], check=True)
    assert queue("/dev/nbd0", "size") == 0


def write_page(node: str, page: bytes) -> None:
    with open(node, "r+b") as disk:
        disk.write(page)
        disk.flush()
        os.fsync(disk.fileno())


def test_what_is_in_use_is_not_detached(device: Device, directory: Path) -> None:
    node = device.attach()
    use.mount(node, directory)
    assert f"mounted on {directory}" in zramd("detach", "g0", status=DeviceBusy.exit_code).stderr
    use.release(node)
    use_it = open(node, "rb")  # noqa: SIM115 - closed below, after what it is for
    descriptor = os.open(node, os.O_RDONLY | os.O_EXCL)
    zramd("detach", "g0", status=DeviceBusy.exit_code)
    os.close(descriptor)
    use_it.close()
    zramd("detach", "g0")


def test_a_busy_file_system_stays_and_its_holder_is_named(device: Device, directory: Path) -> None:
    node = device.attach()
    use.mount(node, directory)
    (directory / "file").write_text("kept")
    holder = subprocess.Popen(["sleep", "1000"], cwd=directory)
    try:
        refused = zramd("down", device.name, status=UseFailed.exit_code)
        assert f"sleep (pid {holder.pid})" in refused.stderr
        assert (directory / "file").read_text() == "kept"
        assert attach.attached(device.name) is not None
    finally:
        holder.kill()
        holder.wait()
    zramd("down", device.name)
    assert nothing_is_left()


def test_what_a_node_holds_is_not_overwritten(device: Device, directory: Path) -> None:
    node = device.attach()
    use.mount(node, directory, "ext4")
    (directory / "file").write_text("kept")
    use.release(node)
    with pytest.raises(UseFailed, match="holds ext4"):
        use.swapon(node)
    with pytest.raises(UseFailed, match="holds ext4"):
        use.mount(node, directory, "btrfs")
    use.mount(node, directory, "ext4")
    assert (directory / "file").read_text() == "kept"
    use.release(node)


def test_detach_clears_what_a_killed_server_left(device: Device) -> None:
    device.attach()
    servers.kill(device.server)
    zramd("detach", device.name)
    assert attach.attached(device.name) is None


def test_detach_ends_a_request_that_a_killed_server_left_hanging(device: Device) -> None:
    node = device.attach()
    os.kill(Paths(device.name).worker(), signal.SIGSTOP)
    reader = subprocess.Popen(["dd", f"if={node}", "of=/dev/null", "iflag=direct", "count=1"])
    servers.wait_for(lambda: inflight(node) != ["0", "0"], "a request under way")
    servers.kill(device.server)
    zramd("detach", device.name)
    assert reader.wait() != 0


@pytest.mark.parametrize("fstype", ["ext4", "xfs", "btrfs"])
def test_down_clears_a_mount_whose_server_was_killed(
    device: Device, directory: Path, fstype: str
) -> None:
    node = device.attach()
    use.mount(node, directory, fstype)
    (directory / "dirty").write_bytes(os.urandom(8 * MIB))
    os.kill(Paths(device.name).worker(), signal.SIGSTOP)
    syncing = subprocess.Popen(["sync", "-f", directory])
    servers.wait_for(lambda: inflight(node) != ["0", "0"], "a write under way")
    servers.kill(device.server)
    servers.wait_for(lambda: _down_succeeds(device.name), "down")
    syncing.wait()
    assert nothing_is_left()


def _down_succeeds(name: str) -> bool:
    """`down` is refused as long as the sync that the server's death fails is on its way out."""
    done = zramd("down", name, status=None)
    assert done.returncode in (0, UseFailed.exit_code), done.stderr
    return done.returncode == 0


def test_down_clears_swap_whose_server_was_killed(device: Device) -> None:
    use.swapon(device.attach())
    servers.kill(device.server)
    zramd("down", device.name)
    assert nothing_is_left()


def test_attach_replaces_a_node_whose_server_was_killed(device: Device) -> None:
    device.attach()
    servers.kill(device.server)
    device.server = again = servers.start(SERVER, device.name, "256M")
    try:
        assert queue(device.attach(), "size") * 512 == 256 * MIB
        zramd("down", device.name)
    finally:
        servers.kill(again)


def test_attach_leaves_a_dead_node_in_use_alone(device: Device, directory: Path) -> None:
    node = device.attach()
    use.mount(node, directory)
    servers.kill(device.server)
    device.server = again = servers.start(SERVER, device.name, "256M")
    try:
        refused = zramd("attach", device.name, status=DeviceBusy.exit_code)
        assert f"mounted on {directory}" in refused.stderr
        zramd("down", device.name)
    finally:
        servers.kill(again)


def test_an_attach_killed_anywhere_leaves_nothing_that_detach_cannot_clear(
    device: Device,
) -> None:
    killed = []
    for line in killed_at_each_line(
        lambda: attach.attach(device.name, Paths(device.name).nbd_socket, via="nbd")
    ):
        killed.append(line)
        attach.detach(device.name)
        assert not list(Path("/sys/block").glob("nbd*/backend")), f"killed at {line}"
    assert len(killed) > 15


def test_attach_without_a_server_says_so(device: Device) -> None:
    Paths("g1").dir.mkdir()
    refused = zramd("attach", "g1", status=NoServer.exit_code)
    assert refused.stderr.count("\n") == 1
    Paths("g1").dir.rmdir()


def test_attach_on_a_kernel_without_nbd_says_what_is_missing(device: Device) -> None:
    subprocess.run(["rmmod", "nbd"], check=True)
    try:
        refused = zramd("attach", device.name, status=ToolMissing.exit_code)
        assert "nbd" in refused.stderr
        assert "fuse" in refused.stderr
        assert refused.stderr.count("\n") == 1
        only = zramd("attach", device.name, "--via", "nbd", status=ToolMissing.exit_code)
        assert "modprobe nbd" in only.stderr
        assert attach.attached(device.name) is None
    finally:
        subprocess.run(["insmod", NBD_KO], check=True)


def test_a_kernel_that_keeps_no_backend_name_is_refused_and_let_go(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd, "find", lambda _directory: None)
    with pytest.raises(AttachFailed, match="does not keep the name"):
        attach.attach(device.name, Paths(device.name).nbd_socket)
    assert queue("/dev/nbd0", "size") == 0


def test_nbd_client_attaches_too_and_does_not_disturb_us(device: Device, directory: Path) -> None:
    server = str(Paths(device.name).nbd_socket)
    subprocess.run(
        ["nbd-client", "-unix", server, "/dev/nbd0", "-N", device.name, "-b", "4096"], check=True
    )
    assert queue("/dev/nbd0", "size") * 512 == 512 * MIB
    subprocess.run(["mkfs.ext4", "-q", "/dev/nbd0"], check=True)
    subprocess.run(["mount", "/dev/nbd0", directory], check=True)
    (directory / "file").write_text("ours")
    subprocess.run(["umount", directory], check=True)
    node = device.attach()
    assert node == "/dev/nbd1"
    use.mount(node, directory, "ext4")
    assert (directory / "file").read_text() == "ours"
    use.release(node)
    zramd("detach", device.name)
    assert queue("/dev/nbd0", "size") * 512 == 512 * MIB
    subprocess.run(["nbd-client", "-d", "/dev/nbd0"], check=True)
    assert queue("/dev/nbd0", "size") == 0


def test_up_and_down_with_a_file_system(directory: Path) -> None:
    command = ["up", "g0", "--disksize", "512M", "--mount", str(directory), "--fs", "xfs"]
    assert zramd(*command).stdout == "/dev/nbd0\n"
    (directory / "file").write_text("here")
    assert zramd(*command).stdout == "/dev/nbd0\n"
    assert (directory / "file").read_text() == "here"
    zramd("down", "g0")
    assert nothing_is_left()


def test_up_and_down_with_swap() -> None:
    zramd("up", "g0", "--disksize", "64M", "--swap", "--priority", "5")
    assert "/dev/nbd0" in Path("/proc/swaps").read_text()
    zramd("down", "g0")
    assert nothing_is_left()


class Replaceable:
    """The device g0 of 64 MiB, attached; its server can be killed, and another put in its place."""

    def __init__(self) -> None:
        self.name = "g0"
        self.socket = Paths(self.name).nbd_socket
        self.socket.parent.mkdir(mode=0o700, parents=True)
        descriptor, self.pages = tempfile.mkstemp()
        os.truncate(descriptor, 64 * MIB)
        os.close(descriptor)
        self.server = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self.socket.unlink(missing_ok=True)
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.kernel.page_server", str(self.socket), self.pages]
        )
        servers.wait_for(self.socket.exists, "the server")
        return server

    def attach(self) -> str:
        return attach.attach(self.name, self.socket).node

    def kill(self, node: str, *, holding: bool = False) -> None:
        """Kill the server; `holding` requests that it has not answered."""
        if holding:
            self.server.send_signal(signal.SIGSTOP)
            servers.wait_for(lambda: inflight(node) != ["0", "0"], "requests under way")
        servers.kill(self.server)
        assert not nbd.alive(node)

    def replace(self, node: str) -> None:
        self.server = self.start()
        assert attach.reconnect(self.name, self.socket) == attach.Attachment("g0", node, "nbd")
        assert nbd.alive(node)
        assert attach.reconnect(self.name, self.socket) is None


@pytest.fixture
def replaceable() -> Iterator[Replaceable]:
    device = Replaceable()
    try:
        yield device
    finally:
        done = zramd("down", device.name, status=None)
        servers.kill(device.server)
        if done.returncode != 0:
            zramd("down", device.name, status=None)
        os.unlink(device.pages)
    assert nothing_is_left()


def start_reader(node: str) -> subprocess.Popen[str]:
    """A process that reads a page of the node, past the cache."""
    return subprocess.Popen(
        ["dd", f"if={node}", "of=/dev/null", "iflag=direct", "bs=4096", "count=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kernels_log() -> str:
    return subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout


def test_a_mount_goes_on_with_the_successor_of_a_killed_server(
    replaceable: Replaceable, directory: Path
) -> None:
    node = replaceable.attach()
    use.mount(node, directory, "ext4")
    content = os.urandom(8 * MIB)
    (directory / "before").write_bytes(content)
    os.sync()
    subprocess.run(["dmesg", "-C"], check=True)
    writer = servers.start_writer(directory)
    for _ in range(2):
        servers.wait_for((directory / "3").exists, "the writer to get going")
        reader = start_reader(node)
        replaceable.kill(node, holding=True)
        waiting = start_reader(node)
        replaceable.replace(node)
        for process in (reader, waiting):
            status, said = servers.end_of(process)
            assert status == 0, said
        written = (directory / "3").stat().st_mtime_ns
        servers.wait_for(
            lambda then=written: (directory / "3").stat().st_mtime_ns != then,
            "the writer to go on",
        )
        assert writer.poll() is None, writer.communicate()[0]
    writer.kill()
    writer.wait()
    forget_cached()
    assert (directory / "before").read_bytes() == content
    assert not re.search("I/O error|EXT4-fs", kernels_log()), kernels_log()
    use.release(node)
    subprocess.run(["e2fsck", "-f", "-n", node], check=True)
    zramd("detach", replaceable.name)
    assert queue(node, "queue/io_timeout") == 30_000


def test_swap_goes_on_with_the_successor_of_a_killed_server(replaceable: Replaceable) -> None:
    node = replaceable.attach()
    use.swapon(node)
    expected = random.Random(6).randbytes(8 * MIB)
    memory = swapped_out(6)
    for _ in range(2):
        replaceable.server.send_signal(signal.SIGSTOP)
        owner = os.fork()
        if owner == 0:
            faulthandler.disable()  # pytest's would write into the results
            os._exit(memory[:] != expected)
        replaceable.kill(node, holding=True)
        replaceable.replace(node)
        assert os.waitpid(owner, 0)[1] == 0
        assert memory[:] == expected
        page_out(memory)
    use.release(node)
    assert memory[:] == expected
    memory.close()


def test_a_slow_server_keeps_its_connection(replaceable: Replaceable) -> None:
    node = replaceable.attach()
    assert state.answers(node)
    replaceable.server.send_signal(signal.SIGSTOP)
    reader = start_reader(node)
    servers.wait_for(lambda: inflight(node) != ["0", "0"], "a request under way")
    servers.wait_for(lambda: kernels_log().count("stuck request") > 2, "the kernel to look thrice")
    assert nbd.alive(node)
    assert attach.reconnect(replaceable.name, replaceable.socket) is None
    replaceable.server.send_signal(signal.SIGCONT)
    status, said = servers.end_of(reader)
    assert status == 0, said


@pytest.mark.parametrize("replaced", [False, True])
def test_without_a_successor_detach_ends_what_waits_for_one(
    replaceable: Replaceable, replaced: bool
) -> None:
    node = replaceable.attach()
    assert state.answers(node)
    if replaced:
        replaceable.kill(node)
        replaceable.replace(node)
    replaceable.server.send_signal(signal.SIGSTOP)
    lost = start_reader(node)
    replaceable.kill(node, holding=True)
    waiting = start_reader(node)
    # What waits in nbd for a new connection is not counted as in flight.
    servers.wait_for(lambda: sum(name.endswith("(dd)") for name in hung()) == 2, "both to wait", 20)
    zramd("detach", replaceable.name)
    for process in (lost, waiting):
        status, said = servers.end_of(process, 5)
        assert status == 1
        assert "Input/output error" in said
    assert attach.attached(replaceable.name) is None


@pytest.mark.parametrize("replaced", [False, True])
def test_without_a_successor_down_ends_writers_and_the_mount(
    replaceable: Replaceable, directory: Path, replaced: bool
) -> None:
    node = replaceable.attach()
    use.mount(node, directory, "ext4")
    if replaced:
        replaceable.kill(node)
        replaceable.replace(node)
    writer = servers.start_writer(directory)
    servers.wait_for((directory / "3").exists, "the writer to get going")
    replaceable.kill(node, holding=True)
    servers.wait_for(lambda: _down_succeeds(replaceable.name), "down", 20)
    status, said = servers.end_of(writer)
    assert status == 1
    assert servers.FAILED_WRITE.search(said), said
    assert nothing_is_left()


def test_a_node_in_use_that_was_cut_does_not_come_back(
    replaceable: Replaceable, directory: Path
) -> None:
    """As after a forced reset: the device may have other pages by then."""
    node = replaceable.attach()
    use.mount(node, directory, "ext4")
    replaceable.kill(node)
    nbd.cut(node)
    replaceable.server = replaceable.start()
    with pytest.raises(AttachFailed, match=f"{node} has been disconnected"):
        attach.reconnect(replaceable.name, replaceable.socket)
    assert not nbd.alive(node)
    zramd("down", replaceable.name)


def test_a_reconnect_killed_anywhere_leaves_what_the_next_one_makes_good(
    replaceable: Replaceable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(killing, "_STEPS", ("reconnect", "_write_successor"))
    node = replaceable.attach()
    assert state.answers(node)

    def end_connection() -> None:
        replaceable.server.send_signal(signal.SIGHUP)
        servers.wait_for(lambda: not nbd.alive(node), "the connection to end")

    end_connection()
    killed = []
    for line in killed_at_each_line(lambda: attach.reconnect(replaceable.name, replaceable.socket)):
        killed.append(line)
        if nbd.alive(node):  # killed after its work was done
            assert attach.reconnect(replaceable.name, replaceable.socket) is None
        else:
            assert attach.reconnect(replaceable.name, replaceable.socket) is not None
        assert state.answers(node), f"killed at {line}"
        end_connection()
    assert len(killed) > 15
    assert nbd.alive(node)

"""What test_nbd_kernel.py has run by pytest inside the guest: a real nbd.ko, and our server.

The server is the one named by ZRAMD_TEST_SERVER. Every check has a server and a device of its own.
"""

import hashlib
import mmap
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.kernel import servers
from tests.kernel.killing import killed_at_each_line
from tests.kernel.servers import zramd
from tests.kernel.trees import contents, copy_tree
from zramd.errors import AttachFailed, DeviceBusy, NoServer, ToolMissing, UseFailed
from zramd.kernel import attach, nbd, use
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
    empty = servers.orig_data_size(device.name)
    size = copy_tree(directory / "tree")
    os.sync()
    copied = contents(directory / "tree")
    full = servers.orig_data_size(device.name)
    assert full - empty > size * 0.8
    use.release(node)
    use.mount(node, directory, fstype)
    assert contents(directory / "tree") == copied
    shutil.rmtree(directory / "tree")
    os.sync()
    subprocess.run(["fstrim", directory], check=True)
    assert servers.orig_data_size(device.name) < full - size * 0.8
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
    used = int(Path("/proc/swaps").read_text().splitlines()[1].split()[3])
    assert used > 8 * 1024
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
    device.server.send_signal(signal.SIGSTOP)
    reader = subprocess.Popen(["dd", f"if={node}", "of=/dev/null", "iflag=direct", "count=1"])
    inflight = Path("/sys/block", Path(node).name, "inflight")
    servers.wait_for(lambda: inflight.read_text().split() != ["0", "0"], "a request under way")
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
    device.server.send_signal(signal.SIGSTOP)
    syncing = subprocess.Popen(["sync", "-f", directory])
    inflight = Path("/sys/block", Path(node).name, "inflight")
    servers.wait_for(lambda: inflight.read_text().split() != ["0", "0"], "a write under way")
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

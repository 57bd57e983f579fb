"""The way through nbdfuse and a loop device, on the machine that runs the tests.

Every test's device has a runtime directory of its own under one prefix. What a killed test run
left there is cleared at the start, with `zramd down`: that is one of the promises tested here.
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import places
from tests.conftest import require
from tests.kernel import servers
from tests.kernel.killing import killed_at_each_line
from tests.kernel.servers import SERVERS, zramd
from tests.kernel.trees import contents, copy_tree
from zramd.errors import DeviceBusy, NoServer, UseFailed
from zramd.kernel import attach, state, use
from zramd.service.runtime import Paths

MIB = 1 << 20


@dataclass
class Device:
    name: str
    kind: str
    server: subprocess.Popen[bytes]

    def attach(self) -> str:
        return zramd("attach", self.name, "--via", "loop").stdout.strip()

    def nbdfuses(self) -> list[int]:
        """The processes of nbdfuse that serve this device."""
        wanted = os.fsencode(Paths(self.name).dir / "loop/disk")
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                arguments = (process / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if arguments[0].endswith(b"nbdfuse") and wanted in arguments:
                found.append(int(process.name))
        return found

    def kill_nbdfuse(self) -> None:
        (pid,) = self.nbdfuses()
        os.kill(pid, 9)
        servers.wait_for(lambda: not self.nbdfuses(), "nbdfuse to end")

    def traces(self) -> list[str]:
        """What is left of it in the kernel and among the processes."""
        place = str(Paths(self.name).dir.parent)
        mounts = Path("/proc/self/mountinfo").read_text().splitlines()
        loops = [p.read_text() for p in Path("/sys/block").glob("loop*/loop/backing_file")]
        found = [line for line in mounts + loops if place in line]
        servers.wait_for(lambda: not self.nbdfuses(), "nbdfuse to end with its mount")
        return found + [str(path) for path in Paths(self.name).dir.glob("loop")]


@pytest.fixture(scope="module", autouse=True)
def _prepared() -> None:
    require.root()
    for path in ("/dev/fuse", "/dev/loop-control"):
        require.path(path)
    for program in ("nbdfuse", "losetup", "mkfs.ext4", "fstrim", "nbdkit"):
        require.program(program)


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for this test's device (run) and its mount (mnt)."""
    with places.place(places.RUNTIME) as path:
        (path / "run").mkdir()
        (path / "mnt").mkdir()
        monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(path / "run"))
        yield path
        assert list((path / "run").iterdir()) == []


@pytest.fixture(params=SERVERS)
def device(request: pytest.FixtureRequest, place: Path) -> Iterator[Device]:
    with servers.served(request.param, "l0", "256M") as server:
        device = Device("l0", request.param, server)
        yield device
    assert device.traces() == []


@pytest.fixture
def directory(place: Path) -> Path:
    return place / "mnt"


def test_attach_prints_the_node_and_says_the_way_on_stderr(device: Device) -> None:
    done = zramd("attach", device.name, "--via", "loop")
    node = done.stdout.strip()
    assert done.stdout == f"{node}\n"
    assert "loop" in done.stderr
    block = Path("/sys/block", Path(node).name)
    assert int((block / "size").read_text()) * 512 == 256 * MIB
    assert int((block / "queue/logical_block_size").read_text()) == 4096
    assert (block / "loop/dio").read_text() == "1\n"


def test_a_second_attach_gets_the_first_ones_node(device: Device) -> None:
    assert device.attach() == device.attach()


def test_attaches_at_the_same_time_give_one_node(device: Device) -> None:
    with ThreadPoolExecutor(4) as pool:
        nodes = set(pool.map(lambda _: device.attach(), range(4)))
    assert len(nodes) == 1
    assert len(device.nbdfuses()) == 1


def test_detach_leaves_nothing_and_may_be_repeated(device: Device) -> None:
    device.attach()
    zramd("detach", device.name)
    assert device.traces() == []
    zramd("detach", device.name)


def test_a_tree_survives_a_remount_and_a_trim_frees_it(device: Device, directory: Path) -> None:
    node = device.attach()
    use.mount(node, directory)
    empty = servers.stored_data_size(device.name)
    size = copy_tree(directory / "tree")
    os.sync()
    copied = contents(directory / "tree")
    full = servers.stored_data_size(device.name)
    assert full - empty > size * 0.8
    use.release(node)
    zramd("detach", device.name)
    node = device.attach()
    use.mount(node, directory)
    assert contents(directory / "tree") == copied
    shutil.rmtree(directory / "tree")
    os.sync()
    subprocess.run(["fstrim", directory], check=True)
    assert servers.stored_data_size(device.name) < full - size * 0.8
    use.release(node)


def test_reset_is_refused_while_attached(device: Device) -> None:
    device.attach()
    zramd("reset", device.name, status=DeviceBusy.exit_code)


def test_a_forced_reset_under_load_gives_errors_not_hangs(device: Device, directory: Path) -> None:
    node = device.attach()
    started = _reads(node)
    readers = [
        subprocess.Popen(
            ["sh", "-c", f"while dd if={node} of=/dev/null bs={size} iflag=direct; do :; done"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for size in ("4k", "64k", "1M")
    ]
    servers.wait_for(lambda: _reads(node) > started + 500, "the readers")
    zramd("reset", device.name, "--force")
    for reader in readers:
        _status, said = servers.end_of(reader)
        assert "Input/output error" in said
    _down_clears_all_and_up_works(device, directory)


def test_a_forced_reset_under_a_mount_gives_its_writer_errors_not_hangs(
    device: Device, directory: Path
) -> None:
    use.mount(device.attach(), directory)
    writer = servers.start_writer(directory)
    servers.wait_for(lambda: (directory / "3").exists(), "the writer")
    zramd("reset", device.name, "--force")
    status, said = servers.end_of(writer)
    assert status == 1
    assert servers.FAILED_WRITE.search(said), said
    _down_clears_all_and_up_works(device, directory)


def test_a_reset_device_gets_another_size_and_its_old_node_never_sees_it(device: Device) -> None:
    node = device.attach()
    page = os.urandom(4096)
    _write(node, page)
    zramd("reset", device.name, "--force")
    zramd("set", device.name, "disksize", "128M")
    with pytest.raises(OSError, match="Errno 5"):
        _write(node, page)
    assert not state.answers(node)
    node = device.attach()
    assert int(Path("/sys/block", Path(node).name, "size").read_text()) * 512 == 128 * MIB
    with open(node, "rb") as disk:
        assert disk.read(4096) == bytes(4096)
    _write(node, page)


def test_what_is_in_use_is_not_detached(device: Device, directory: Path) -> None:
    node = device.attach()
    use.mount(node, directory)
    assert f"mounted on {directory}" in zramd("detach", "l0", status=DeviceBusy.exit_code).stderr
    (directory / "file").write_text("kept")
    with open(directory / "file"):
        refused = zramd("down", device.name, status=UseFailed.exit_code)
        assert f"(pid {os.getpid()})" in refused.stderr
        assert (directory / "file").read_text() == "kept"
    zramd("down", device.name)
    assert device.traces() == []


@pytest.mark.parametrize("dead", ["nbdfuse", "server", "both"])
def test_detach_clears_what_was_killed(device: Device, dead: str) -> None:
    device.attach()
    _kill(device, dead)
    zramd("detach", device.name)
    assert device.traces() == []


@pytest.mark.parametrize("dead", ["nbdfuse", "server", "both"])
def test_down_clears_a_mount_under_which_something_was_killed(
    device: Device, directory: Path, dead: str
) -> None:
    use.mount(device.attach(), directory)
    (directory / "dirty").write_bytes(os.urandom(8 * MIB))
    _kill(device, dead)
    zramd("down", device.name)
    assert device.traces() == []


@pytest.mark.parametrize("dead", ["nbdfuse", "both"])
def test_attach_replaces_what_was_killed(device: Device, dead: str) -> None:
    page = os.urandom(4096)
    _write(device.attach(), page)
    _kill(device, dead)
    if dead == "both":
        device.server = servers.start(device.kind, device.name, "256M")
    try:
        node = device.attach()
        _write(node, page)
        zramd("down", device.name)
    finally:
        servers.kill(device.server)


def test_an_attach_killed_anywhere_leaves_nothing_that_detach_cannot_clear(
    device: Device,
) -> None:
    killed = []
    for line in killed_at_each_line(
        lambda: attach.attach(device.name, Paths(device.name).nbd_socket, via="loop")
    ):
        killed.append(line)
        attach.detach(device.name)
        assert device.traces() == [], f"killed at {line}"
    assert len(killed) > 15


def test_attach_without_a_server_leaves_nothing(place: Path) -> None:
    Paths("l0").dir.mkdir()
    refused = zramd("attach", "l0", "--via", "loop", status=NoServer.exit_code)
    assert refused.stderr.count("\n") == 1
    assert list(Paths("l0").dir.iterdir()) == []
    Paths("l0").dir.rmdir()


def test_up_and_down(place: Path, directory: Path) -> None:
    command = ["up", "l0", "--disksize", "64M", "--mount", str(directory), "--via", "loop"]
    node = zramd(*command).stdout
    (directory / "file").write_text("here")
    assert zramd(*command).stdout == node
    assert (directory / "file").read_text() == "here"
    zramd("down", "l0")
    assert str(directory) not in Path("/proc/self/mountinfo").read_text()


def _down_clears_all_and_up_works(device: Device, directory: Path) -> None:
    """The end of the checks that break a device: nothing of it is in the way of the next."""
    zramd("down", device.name)
    assert device.traces() == []
    command = ["up", device.name, "--disksize", "64M", "--mount", str(directory), "--via", "loop"]
    zramd(*command)
    (directory / "file").write_text("here")
    os.sync()
    assert (directory / "file").read_text() == "here"
    zramd("down", device.name)
    assert device.traces() == []


def _kill(device: Device, dead: str) -> None:
    if dead != "server":
        device.kill_nbdfuse()
    if dead != "nbdfuse":
        servers.kill(device.server)


def _reads(node: str) -> int:
    """Read requests that the node has completed."""
    return int(Path("/sys/block", Path(node).name, "stat").read_text().split()[0])


def _write(node: str, page: bytes) -> None:
    with open(node, "r+b") as disk:
        disk.write(page)
        disk.flush()
        os.fsync(disk.fileno())

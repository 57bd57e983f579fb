"""What test_nbd_kernel.py has run inside a guest: a server whose worker is killed again and again,
or that is upgraded, below a mount, and below swap. Nobody who uses them notices anything but that
it takes a while.
"""

import os
import random
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator

import pytest

from tests.kernel import servers
from tests.kernel.in_guest import (
    MADV_PAGEOUT,
    MIB,
    directory,  # noqa: F401 - a fixture
    forget_cached,
    nothing_is_left,
    swapped_out,
)
from tests.kernel.loads import end, goes_on, start_toucher
from tests.kernel.servers import wait_for, zramd
from zramd.control.client import Control
from zramd.errors import ServerFailed
from zramd.service.runtime import Paths

KILLS = int(os.environ.get("ZRAMD_TEST_KILLS", "20"))
_LIMIT_S = 60
PATHS = Paths("g0")


@pytest.fixture
def start() -> Iterator[None]:
    """Start it as it is used; its end is `zramd down`."""
    running: list[subprocess.Popen[bytes]] = []

    def start(use: str, disksize: str) -> None:
        running.append(
            servers.start(
                *("zramd", "g0", disksize), use=use, mem_limit="64M", module="tests.unlimited"
            )
        )

    yield start  # type: ignore[misc]
    zramd("down", "g0")
    running[0].wait(_LIMIT_S)
    assert nothing_is_left()


def kill_worker() -> None:
    """Returns when its successor answers."""
    before = PATHS.worker()
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: PATHS.worker() not in (0, before) and _answers(), "another worker", _LIMIT_S)


def upgrade() -> None:
    """Returns when this code, in another process, serves."""
    before, server = PATHS.worker(), PATHS.server()
    zramd("upgrade", "g0")
    assert PATHS.worker() not in (0, before)
    assert PATHS.server() == server


def _answers() -> bool:
    try:
        with Control(PATHS.control_socket) as control:
            control.statistics()
    except ServerFailed:
        return False
    return True


def kernel_complains() -> list[str]:
    told = subprocess.run(["dmesg"], check=True, capture_output=True, text=True).stdout
    return re.findall(r".*(?:I/O error|EXT4-fs error|-error on swap-device).*", told)


CHANGES = pytest.mark.parametrize(
    ("change", "times"), [(kill_worker, KILLS), (upgrade, KILLS // 2)]
)


@CHANGES
def test_a_mount_outlives_its_workers(
    start,
    directory,  # noqa: F811 - the fixture
    change: Callable[[], None],
    times: int,
):
    start("mount", "256M")
    up = "up", "g0", "--disksize=256M", "--mem-limit=64M"
    node = zramd(*up, "--mount", str(directory)).stdout.strip()
    fio = subprocess.Popen(
        [
            *("nice", "-n", "19"),  # or an upgrade is long in coming, on one CPU
            *("fio", "--name=v", f"--directory={directory}", "--rw=randrw", "--bs=4k"),
            *("--size=24M", "--ioengine=libaio", "--direct=1", "--iodepth=16", "--thread"),
            *("--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256"),
            *("--buffer_compress_percentage=60", "--loops=1000", "--time_based", "--runtime=1000"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    numbers = random.Random(3)
    for _ in range(times):
        goes_on(node, 200)
        time.sleep(numbers.uniform(0, 0.5))
        assert fio.poll() is None, fio.communicate()[0]
        change()
    goes_on(node, 200)
    fio.send_signal(signal.SIGINT)
    status, said = servers.end_of(fio, _LIMIT_S)
    assert "verify" not in said.lower() or "verify:" not in said, said
    assert not re.search(r"err= *[1-9]|Input/output error|bad (magic|verify)", said), said
    assert status in (0, 128), said  # fio's own, when it is interrupted
    assert kernel_complains() == []
    content = random.Random(1).randbytes(MIB)
    (directory / "file").write_bytes(content)
    os.sync()
    forget_cached()
    assert (directory / "file").read_bytes() == content
    subprocess.run(["umount", directory], check=True)
    checked = subprocess.run(
        ["fsck.ext4", "-fn", node], check=False, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stdout


@CHANGES
def test_swap_outlives_its_workers(start, change: Callable[[], None], times: int):
    start("swap", "128M")
    node = zramd("up", "g0", "--disksize=128M", "--mem-limit=64M", "--swap").stdout.strip()
    memories = [swapped_out(seed) for seed in range(3)]
    toucher = start_toucher()
    numbers = random.Random(4)
    for kill in range(times):
        goes_on(node, 20)
        time.sleep(numbers.uniform(0, 0.5))
        assert toucher.poll() is None, toucher.communicate()[0]
        change()
        memory, seed = memories[kill % 3], kill % 3
        assert memory[:] == random.Random(seed).randbytes(8 * MIB)
        memory.madvise(MADV_PAGEOUT)
    end(toucher)
    assert kernel_complains() == []
    subprocess.run(["swapoff", node], check=True)
    for seed, memory in enumerate(memories):
        assert memory[:] == random.Random(seed).randbytes(8 * MIB)
        memory.close()

"""A server that short memory must not stop. What takes CAP_SYS_RESOURCE, which containers lack, is
seen in a guest too: tests/kernel/in_guest.py.
"""

import fcntl
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import places
from tests.conftest import require
from tests.kernel.servers import ROOT, SERVERS, served, wait_for, zramd
from tests.nbd.harness import RawClient, request
from tests.store.contents import noise, text
from zramd.errors import NoMemory, NotHardened
from zramd.nbd import wire
from zramd.nbd.address import UnixAddress
from zramd.service import hardening
from zramd.service.runtime import Paths
from zramd.store import PAGE

MIB = 1 << 20


@pytest.fixture(params=SERVERS)
def server(request: pytest.FixtureRequest, tmp_path, monkeypatch) -> Iterator[int]:
    """The process of a server for swap, as far as it can be hardened here; its device is h0."""
    require.program("nbdkit")
    require.root()
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(tmp_path))
    with served(request.param, "h0", "64M", use="swap", allow_deadlock=True):
        yield Paths("h0").worker()


def status(pid: int, key: str) -> int:
    found = re.search(rf"^{key}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


def faults(pid: int) -> int:
    """Pages that it has asked the system for."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[7])


def threads(pid: int) -> list[int]:
    return sorted(int(entry) for entry in os.listdir(f"/proc/{pid}/task"))


def work(client: RawClient) -> None:
    """A bit of everything that a kernel asks for, incompressible or not."""
    contents = [noise(1, 32 * PAGE), text(1) * 32, bytes(32 * PAGE), b"12345678" * 512 * 32]
    for turn in range(128):
        offset = turn % 100 * 128 * 1024
        client.write(offset, contents[turn % len(contents)])
        client.write(offset + 8192, text(1))
        assert len(client.read(offset, 128 * 1024)) == 128 * 1024
    for content in contents[:3]:  # these go to threads
        client.write(0, content * 8)
        assert client.read(0, MIB) == content * 8
    client.error(request(wire.NBD_CMD_TRIM, 0, 32 * MIB))


def test_its_memory_is_locked_and_its_class_is_real_time(server):
    assert status(server, "VmLck") * 1024 > 32 * MIB + 20 * MIB
    assert "locked memory" not in hardening.lacking(Path(f"/proc/{server}"))
    assert status(server, "VmSwap") == 0
    for thread in threads(server):
        assert os.sched_getscheduler(thread) == os.SCHED_FIFO


def test_its_requests_ask_the_system_for_no_memory_and_no_thread(server):
    with RawClient(UnixAddress(Paths("h0").nbd_socket)) as client:
        # It copies what it shares with the supervisor and writes to: 300 to 900 pages in the first
        # 400 requests, some only by and by, 60 of 1600 more, and then none.
        for _ in range(6):
            work(client)
        before, had = faults(server), threads(server)
        for _ in range(4):
            work(client)
        assert threads(server) == had
        assert faults(server) - before < 32  # of 1500 requests and 65 MiB


def heap(pid: int) -> int:
    """Bytes of it that are in memory."""
    maps = Path(f"/proc/{pid}/smaps").read_text()
    return sum(int(kib) << 10 for kib in re.findall(r"\[heap\]\n.*?Rss: +(\d+)", maps, re.DOTALL))


def test_it_has_heap_in_store(server):
    with served("zramd", "h2", "64M"):
        assert heap(server) > heap(Paths("h2").worker()) + 3 * MIB


def test_what_it_preallocates_is_said_and_kept(server):
    mm_stat = zramd("get", "h0", "mm_stat").stdout.split()
    assert int(mm_stat[3]) == 32 * MIB + 128 * 1024  # mem_limit
    assert zramd("get", "h0", "prealloc").stdout == "1\n"
    assert status(server, "RssShmem") * 1024 >= 32 * MIB


@pytest.fixture
def runtime(monkeypatch) -> Iterator[Path]:
    """A runtime directory that others than root can use, too."""
    with places.place(places.RUNTIME) as place:
        place.chmod(0o777)
        monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(place))
        yield place


def unprivileged(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`zramd` by someone who may lock 1 MiB and has no capability."""
    script = (
        "import resource, os, sys\n"
        "resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))\n"
        "os.setgroups([]), os.setgid(65534), os.setuid(65534)\n"
        "from zramd.cli import main\n"
        "main(sys.argv[1:])"
    )
    return subprocess.run(
        [sys.executable, "-c", script, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_swap_that_could_deadlock_is_refused_naming_all_that_is_missing(runtime):
    require.root()
    done = unprivileged("serve", "h1", "--disksize=64M", "--for=swap")
    assert done.returncode == NotHardened.exit_code
    (line,) = done.stderr.splitlines()
    for what in ("PR_SET_IO_FLUSHER", "real-time", "oom_score_adj", "mlockall", "--allow-deadlock"):
        assert what in line
    assert list(runtime.iterdir()) == []


def test_a_reserve_that_cannot_be_locked_is_refused_though_a_deadlock_is_allowed(runtime):
    require.root()
    done = unprivileged("serve", "h1", "--disksize=64M", "--for=swap", "--allow-deadlock")
    assert done.returncode == NoMemory.exit_code
    assert "do not preallocate" in done.stderr
    assert list(runtime.iterdir()) == []


def test_a_mount_is_served_all_the_same_and_what_is_missing_is_said(runtime):
    require.root()
    # An address that nobody can listen on ends it after that.
    nowhere = "--listen=tcp:192.0.2.1:10809", "--allow-plain-tcp"
    done = unprivileged("serve", "h1", "-s64M", "--for=mount", *nowhere)
    said = [line for line in done.stderr.splitlines() if "had better have" in line]
    assert len(said) == 4, done.stderr
    assert list(runtime.iterdir()) == []


def test_a_reader_of_stderr_that_does_not_read_does_not_stop_it(runtime):
    """As journald, whose memory may be on our swap."""
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETPIPE_SZ, PAGE)
    all_said = "from zramd.nbd import server; server._BURST_SECONDS = 0"
    program = f"{all_said}; from zramd.cli import main; main()"
    command = [sys.executable, "-c", program, "serve", "h1", "-s64M", "--for=swap"]
    server = subprocess.Popen([*command, "--allow-deadlock"], cwd=ROOT, stderr=writer)
    try:
        wait_for(Paths("h1").control_socket.exists, "the server")
        address = UnixAddress(Paths("h1").nbd_socket)
        for _ in range(200):  # each is logged, in about 60 bytes
            with RawClient(address) as client:
                client.send(b"\xff" * 28)
                assert client.ended()
        with RawClient(address) as client:
            client.write(0, text(1))
            assert client.read(0, PAGE) == text(1)
        assert len(os.read(reader, MIB)) > PAGE // 2
    finally:
        server.kill()
        server.wait()
        os.close(reader)
        os.close(writer)
        zramd("down", "h1", status=None)


def test_a_process_that_has_locked_its_arena_alone_lacks_locked_memory():
    script = (
        "from zramd.store.arena import Arena\n"
        "arena = Arena(64 << 20, 'lz4', limit=16 << 20, reserve=True)\n"
        "print('ready', flush=True); input()"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        assert status(child.pid, "VmLck") >= 15 << 10
        assert "locked memory" in hardening.lacking(Path(f"/proc/{child.pid}"))
    finally:
        child.communicate("\n")


def test_garbage_is_not_collected_once_all_stands():
    script = (
        "import gc\n"
        "from zramd.service import hardening\n"
        "hardening.settle()\n"
        "print(gc.isenabled(), gc.get_freeze_count() > 1000)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout == "False True\n", done.stderr


def test_a_hardened_idle_server_with_an_empty_device_of_1_gib_is_small(runtime):
    with served("zramd", "h1", "1G", use="mount") as supervisor:
        worker = Paths("h1").worker()
        assert worker != supervisor.pid
        own = Path(f"/proc/{supervisor.pid}/smaps_rollup").read_text().partition("Private_Dirty:")
        assert status(worker, "VmRSS") + int(own[2].split()[0]) < 60 * 1024
        for process in (worker, supervisor.pid):
            assert status(process, "VmLck") + 64 >= status(process, "VmRSS")  # and the vdso

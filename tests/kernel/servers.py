"""A device's server, started as users start it, and the verbs of the command line."""

import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from zramd.service.runtime import Paths
from zramd.store import PAGE

ROOT = Path(__file__).resolve().parents[2]
SERVERS = ("zramd", "nbdkit")
FAILED_WRITE = re.compile(rf"OSError: \[Errno ({errno.EIO}|{errno.EROFS})\]")
"""What a writer ends with, when the device below has failed: at once, or the file system first."""

_WRITER = """
import itertools, os, sys
for n in itertools.count():
    with open(f"{sys.argv[1]}/{n % 10}", "wb", buffering=0) as file:
        file.write(os.urandom(1 << 18))
        os.fsync(file)
"""


def zramd(*arguments: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line; asserts its exit status unless `status` is None."""
    command = [sys.executable, "-m", "zramd.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if status is not None:
        assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stderr}"
    return done


def start(
    kind: str,
    name: str,
    disksize: str,
    *,
    use: str | None = None,
    mem_limit: str | None = None,
    allow_deadlock: bool = False,
    module: str = "zramd.cli",
    options: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Start the server `kind` of SERVERS in the background; returns when it serves. `module` is run
    for zramd's, with more `options`."""
    paths = Paths(name)
    if kind == "zramd":
        command = [sys.executable, "-m", module, "serve", name, f"--disksize={disksize}", *options]
        command += [f"--for={use}"] if use else []
        command += [f"--mem-limit={mem_limit}"] if mem_limit else []
        command += ["--allow-deadlock"] if allow_deadlock else []
    else:
        paths.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        paths.nbd_socket.unlink(missing_ok=True)
        command = ["nbdkit", "-f", "-U", os.fspath(paths.nbd_socket), "python"]
        command += [os.fspath(ROOT / "nbd_plugin.py"), f"name={name}", f"disksize={disksize}"]
        command += [f"for={use}"] if use else []
        command += [f"mem_limit={mem_limit}"] if mem_limit else []
        command += ["allow_deadlock=1"] if allow_deadlock else []
    command = ["setpriv", "--pdeathsig", "KILL", *command]  # a killed test run leaves none
    server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "VIRTUAL_ENV": sys.prefix})
    try:
        for path in (paths.nbd_socket, paths.control_socket):
            wait_for(lambda path=path: _listens(path) or server.poll() is not None, str(path))
        if kind == "zramd":  # it is written down when it serves already
            wait_for(
                lambda: paths.worker() != paths.server() or server.poll() is not None, "a worker"
            )
        assert server.poll() is None, f"the server ended with status {server.returncode}"
    except BaseException:
        kill(server)
        raise
    return server


@contextmanager
def served(
    kind: str, name: str, disksize: str = "512M", **more: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """A server that is killed at the end, with all that is left of its device cleared; `more` is
    for `start`."""
    server = start(kind, name, disksize, **more)
    try:
        yield server
    finally:
        done = zramd("down", name, status=None)
        kill(server)
        if done.returncode != 0:
            zramd("down", name, status=None)


def kill(server: subprocess.Popen[bytes]) -> None:
    """kill -9, and wait until it is gone, with its worker."""
    workers = []
    if server.poll() is None:
        children = Path(f"/proc/{server.pid}/task/{server.pid}/children")
        workers = [Path("/proc", child) for child in children.read_text().split()]
        server.send_signal(signal.SIGKILL)
    server.wait()
    wait_for(lambda: not any(map(_lives, workers)), "its worker to die with it")


def _lives(process: Path) -> bool:
    """Whether any thread of it does: until then its sockets listen."""
    try:
        is_zombie = " Z " in (process / "stat").read_text()
        return not is_zombie or len(os.listdir(process / "task")) > 1
    except OSError:
        return False


def stored_data_size(name: str) -> int:
    """Bytes stored in the device, uncompressed, in pages that are not same-filled.

    Zeros that a file system writes in the background (ext4 fills its inode tables when it is
    mounted first) are left out, or they would disturb whoever compares two moments.
    """
    mm_stat = zramd("get", name, "mm_stat").stdout.split()
    orig_data_size, same_pages = int(mm_stat[0]), int(mm_stat[5])
    return orig_data_size - same_pages * PAGE


def start_writer(directory: Path) -> subprocess.Popen[str]:
    """A process that writes files 0 to 9 again and again, synced, until that fails."""
    return subprocess.Popen(
        [sys.executable, "-c", _WRITER, os.fspath(directory)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end_of(process: subprocess.Popen[str], limit_s: float = 20) -> tuple[int, str]:
    """Exit status and output of a process that is to end by itself; one that hangs fails the test.

    What waits for a device is not ended by its kill before the device's end wakes it.
    """
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        stat = Path(f"/proc/{process.pid}/stat").read_text()
        process.kill()
        raise AssertionError(f"it hangs, {limit_s} s by now: {stat}") from None
    return process.returncode, output


def wait_for(fact: Callable[[], bool], what: str, limit_s: float = 60) -> None:
    """Wait for something that another process does."""
    deadline = time.monotonic() + limit_s
    while not fact():
        assert time.monotonic() < deadline, f"waited {limit_s} s for {what}"
        time.sleep(0.02)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return False
    return True

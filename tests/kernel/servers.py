"""A device's server, started as users start it, and the verbs of the command line."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zramd.service.runtime import Paths

ROOT = Path(__file__).resolve().parents[2]
SERVERS = ("zramd", "nbdkit")


def zramd(*arguments: str, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run the command line; asserts its exit status unless `status` is None."""
    command = [sys.executable, "-m", "zramd.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    if status is not None:
        assert done.returncode == status, f"{arguments}: {done.returncode}\n{done.stderr}"
    return done


def start(kind: str, name: str, disksize: str) -> subprocess.Popen[bytes]:
    """Start the server `kind` of SERVERS in the background; returns when it serves."""
    paths = Paths(name)
    if kind == "zramd":
        command = [sys.executable, "-m", "zramd.cli", "serve", name, f"--disksize={disksize}"]
    else:
        paths.dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        paths.nbd_socket.unlink(missing_ok=True)
        command = ["nbdkit", "-f", "-U", os.fspath(paths.nbd_socket), "python"]
        command += [os.fspath(ROOT / "nbd_plugin.py"), f"name={name}", f"disksize={disksize}"]
    command = ["setpriv", "--pdeathsig", "KILL", *command]  # a killed test run leaves none
    server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "VIRTUAL_ENV": sys.prefix})
    try:
        for path in (paths.nbd_socket, paths.control_socket):
            wait_for(lambda path=path: _listens(path) or server.poll() is not None, str(path))
        assert server.poll() is None, f"the server ended with status {server.returncode}"
    except BaseException:
        kill(server)
        raise
    return server


@contextmanager
def served(kind: str, name: str, disksize: str = "512M") -> Iterator[subprocess.Popen[bytes]]:
    """A server that is killed at the end, with all that is left of its device cleared."""
    server = start(kind, name, disksize)
    try:
        yield server
    finally:
        done = zramd("down", name, status=None)
        kill(server)
        if done.returncode != 0:
            zramd("down", name, status=None)


def kill(server: subprocess.Popen[bytes]) -> None:
    """kill -9, and wait until it is gone."""
    if server.poll() is None:
        server.send_signal(signal.SIGKILL)
    server.wait()


def orig_data_size(name: str) -> int:
    """Bytes stored in the device, uncompressed, as zram's mm_stat tells it."""
    return int(zramd("get", name, "mm_stat").stdout.split()[0])


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

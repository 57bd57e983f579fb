"""Both servers as users start them, for other people's clients to meet: `zramd serve`, and nbdkit
with our plugin. And how those clients are run."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

from tests import places
from tests.conftest import require

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("zramd", "nbdkit")
SIZE = 64 << 20
PAGE = 4096
DEADLINE_S = 60


class Served:
    """A device called zram0, behind one of the servers."""

    def __init__(
        self, command: list[str], directory: Path, path: Path | None, port: int | None = None
    ) -> None:
        """Listening on a Unix socket, or on a port of the loopback address, or both."""
        self.kind = "nbdkit" if Path(command[0]).name == "nbdkit" else "zramd"
        self.path = path
        self.port = port
        self.uri = f"nbd://127.0.0.1:{port}" if path is None else uri_of(path)
        self.environment = environment(directory)
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=self.environment, stderr=subprocess.PIPE
        )
        deadline = time.monotonic() + DEADLINE_S
        while not self._listens():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"{command} did not start: {self.process.communicate()[1]}")
            time.sleep(0.01)

    def _listens(self) -> bool:
        if self.port is not None:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.path)) == 0

    def close(self) -> None:
        self.process.terminate()
        _, errors = self.process.communicate(timeout=DEADLINE_S)
        assert b"Traceback" not in errors, errors.decode()


@contextmanager
def served(
    kind: str,
    *,
    size: int = SIZE,
    over_tcp: bool = False,
    mem_limit: str | None = None,
    read_only: bool = False,
) -> Iterator[Served]:
    """A server of KINDS, ended at the end."""
    with places.place(places.RUNTIME) as directory:
        port = free_port() if over_tcp else None
        path = directory / ("zram0/nbd.sock" if kind == "zramd" else "nbdkit.sock")
        if kind == "zramd":
            command = zramd_command(size)
            command += [f"--listen=tcp:127.0.0.1:{port}"] if over_tcp else []
            command += [f"--mem-limit={mem_limit}"] if mem_limit else []
            command += ["--read-only"] if read_only else []
        else:
            where = ["-i", "127.0.0.1", "-p", str(port)] if over_tcp else ["-U", str(path)]
            command = [require.program("nbdkit"), "-f", *where, *["-r"] * read_only]
            command += plugin_command(size)
            command += [f"mem_limit={mem_limit}"] if mem_limit else []
        server = Served(command, directory, None if over_tcp else path, port)
        try:
            yield server
        finally:
            server.close()


def environment(directory: Path) -> dict[str, str]:
    """What both servers, and `zramd`, need to find the device and its code."""
    return {
        **os.environ,
        "ZRAMD_RUNTIME_DIR": str(directory),
        "VIRTUAL_ENV": sys.prefix,
        "PYTHONPATH": str(ROOT),
    }


def zramd_command(size: int = SIZE) -> list[str]:
    return [sys.executable, "-m", "zramd.cli", "serve", "zram0", f"--disksize={size}"]


def plugin_command(size: int = SIZE) -> list[str]:
    return ["python", str(ROOT / "nbd_plugin.py"), "name=zram0", f"disksize={size}"]


def uri_of(path: Path | str, export: str = "") -> str:
    return f"nbd+unix:///{quote(export)}?socket={quote(str(path))}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run(
    program: str, *arguments: str, status: int = 0, environment: dict[str, str] | None = None
) -> str:
    """What the client printed."""
    done = finished(program, *arguments, environment=environment)
    command = [program, *arguments]
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


def finished(
    program: str, *arguments: str, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [require.program(program), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=environment,
    )

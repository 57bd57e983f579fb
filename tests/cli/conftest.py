"""The command as a user runs it: a process of its own, with a runtime directory of its own."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import places

DEADLINE_S = 60


class Zramd:
    """`zramd` with a runtime directory; whatever it starts is ended with it."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self.environment = {
            **os.environ,
            "ZRAMD_RUNTIME_DIR": str(runtime),
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        self._servers: list[subprocess.Popen[str]] = []

    def argv(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "zramd.cli", *arguments]

    def run(self, *arguments: str, **more) -> subprocess.CompletedProcess[str]:
        """One command to its end, whatever that is."""
        return subprocess.run(
            self.argv(*arguments),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            **more,
        )

    def ok(self, *arguments: str) -> str:
        """One command that must succeed; its stdout."""
        done = self.run(*arguments)
        assert (done.returncode, done.stderr if done.returncode else "") == (0, "")
        return done.stdout

    def fails(self, exit_code: int, *arguments: str) -> str:
        """One command that must fail as documented, with one line on stderr; that line."""
        done = self.run(*arguments)
        assert done.returncode == exit_code, done.stderr
        assert done.stdout == ""
        (line,) = done.stderr.splitlines()
        assert line.startswith("zramd: ")
        return line

    def start(self, *arguments: str, **more) -> subprocess.Popen[str]:
        server = subprocess.Popen(
            self.argv(*arguments),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **more,
        )
        self._servers.append(server)
        return server

    def serve(self, name: str, *arguments: str) -> subprocess.Popen[str]:
        """A server that says it is ready."""
        server = self.start("serve", name, *(arguments or ("--disksize=16M",)))
        said = []
        for line in server.stderr:
            said.append(line)
            if " is served on " in line:
                return server
        raise AssertionError(f"the server ended: {said}")

    def devices(self, *arguments: str) -> dict[str, dict]:
        """What `zramd list --json` tells, by name."""
        told = json.loads(self.ok("list", "--json", *arguments))
        return {device["name"]: device for device in told["devices"]}

    def left(self) -> list[str]:
        """What stands in the runtime directory."""
        return sorted(str(p.relative_to(self.runtime)) for p in self.runtime.rglob("*"))

    def connect(self, name: str) -> socket.socket:
        """A client that has the export open: an NBD handshake by hand (EXPORT_NAME)."""
        client = socket.socket(socket.AF_UNIX)
        client.settimeout(DEADLINE_S)
        client.connect(str(self.runtime / name / "nbd.sock"))
        assert client.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGICIHAVEOPT")
        client.sendall(b"\0\0\0\3" + b"IHAVEOPT" + b"\0\0\0\1" + len(name).to_bytes(4, "big"))
        client.sendall(name.encode())
        assert len(client.recv(10, socket.MSG_WAITALL)) == 10
        return client

    def worker(self, name: str) -> int:
        """The process that does the I/O of `name`."""
        return int((self.runtime / name / "lock").read_text().split()[-1])

    def kill(self, name: str) -> None:
        """SIGKILL the server of `name`, whoever started it."""
        processes = [int(line) for line in (self.runtime / name / "lock").read_text().split()]
        os.kill(processes[0], signal.SIGKILL)  # its worker dies with it
        for server in self._servers:
            if server.pid == processes[0]:
                server.wait(DEADLINE_S)
        wait_for(lambda: not any(map(alive, processes)))

    def close(self) -> None:
        """End what still runs; a device that `zramd down` cannot clear is a failure."""
        for server in self._servers:
            if server.poll() is None:
                server.kill()
            server.communicate()
        failed = []
        for name in [entry.name for entry in self.runtime.iterdir() if entry.is_dir()]:
            self.run("reset", "--force", name)
            done = self.run("down", name)
            if done.returncode:
                failed.append(done.stderr)
                with contextlib.suppress(OSError):
                    self.kill(name)
        assert failed == []


def alive(process: int) -> bool:
    """Whether any thread of it is: until then its sockets listen."""
    try:
        is_zombie = " Z " in Path(f"/proc/{process}/stat").read_text()
        return not is_zombie or len(os.listdir(f"/proc/{process}/task")) > 1
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for(fact) -> None:
    """Until a foreign process has made it so."""
    deadline = time.monotonic() + DEADLINE_S
    while not fact():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


@pytest.fixture
def zramd():
    with places.place(places.RUNTIME) as runtime:
        zramd = Zramd(runtime)
        yield zramd
        zramd.close()

"""Starting a server that outlives its starter, for `zramd up`.

The server's stderr is a pipe to us until it is ready; then it moves its stderr to NAME/log. So
end of file means either ready or dead, and asking its control socket tells which. Nothing polls,
and a server that fails is heard to the last line.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import zramd
from zramd.control.client import Control
from zramd.errors import KINDS, NoServer, ServerExists, ServerFailed, ZramdError
from zramd.service.runtime import Paths, claim


def start(name: str, arguments: Sequence[str]) -> list[str]:
    """Run `zramd serve NAME ARGUMENTS...`; returns what it said, once it serves.

    Raises what the server failed with. Nothing is left of a server that failed.
    """
    environment = {k: v for k, v in os.environ.items() if k != "NOTIFY_SOCKET"}
    server = subprocess.Popen(
        [*_interpreter(), "-m", "zramd.cli", "serve", "--background", name, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
        start_new_session=True,
        text=True,
        errors="replace",
    )
    assert server.stderr is not None
    try:
        with server.stderr:
            said = server.stderr.read().splitlines()
        Control(Paths(name).control_socket).close()
        if Paths(name).server() != server.pid:
            raise NoServer(f"it is not ours that serves {name}")
    except NoServer:
        status = server.wait()
        _clear(name)
        raise _failure(said, status) from None
    except BaseException:
        # Interrupted: the server has a session of its own and did not hear it.
        server.send_signal(signal.SIGTERM)
        server.wait()
        _clear(name)
        raise
    return said


def go_to_background(log: Path) -> None:
    """In the server: say all in this file from now on, and hold neither our starter's terminal nor
    a mount."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(descriptor, stream.fileno())
    os.close(descriptor)
    os.chdir("/")


def _interpreter() -> list[str]:
    """Our Python. It must not look for modules in the working directory, which may be anyone's,
    unless that is where we are running from."""
    root = Path(zramd.__file__).parents[1]
    return [sys.executable] if root == Path.cwd() else [sys.executable, "-P"]


def _clear(name: str) -> None:
    """Remove what a server that a signal ended before it was ready may have left."""
    try:
        claim(name).release()
    except ServerExists:
        pass  # that is why ours failed


def _failure(said: list[str], status: int) -> ZramdError:
    """The error that the server printed in the form of zramd.cli.main."""
    kinds = {kind.exit_code: kind for kind in KINDS}
    errors = [line.removeprefix("zramd: ") for line in said if line.startswith("zramd: ")]
    if status in kinds and errors:
        return kinds[status](errors[-1])
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    last = f": {said[-1]}" if said else ""
    return ServerFailed(f"the server ended with {how} before it was ready{last}")

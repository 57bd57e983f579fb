"""Temporary directories that a killed test run leaves behind can be told from those in use.

A live run holds a lock (flock) on each of its directories; the kernel drops it with the process.
Runtime directories of servers under test lie in such a directory, so that `sweep` can end what a
killed run has left: servers, mounts, loop devices.
"""

import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RUNTIME = "zramd-test-"
"""How directories begin that are, or hold in `run`, a runtime directory."""


def sweep() -> None:
    """End what killed test runs have left in their runtime directories."""
    for left in abandoned(RUNTIME):
        for runtime in (left, left / "run"):
            kill_servers(runtime)
            for device in runtime.glob("*/lock"):
                subprocess.run(
                    [sys.executable, "-m", "zramd.cli", "down", device.parent.name],
                    cwd=Path(__file__).parents[1],
                    env={**os.environ, "ZRAMD_RUNTIME_DIR": str(runtime)},
                    check=False,
                )


def kill_servers(runtime: Path) -> None:
    """Kill whoever was told to use this runtime directory."""
    variable = b"ZRAMD_RUNTIME_DIR=" + os.fsencode(runtime)
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if variable in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue  # it ended meanwhile, or is not ours


@contextmanager
def place(prefix: str) -> Iterator[Path]:
    """A directory of this name's beginning, locked, removed at the end."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix))
        with _locked(path) as ours:
            if ours:
                try:
                    yield path
                finally:
                    shutil.rmtree(path)
                return


def abandoned(prefix: str) -> Iterator[Path]:
    """The directories of killed runs, each removed when the caller is done with it."""
    for path in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with _locked(path) as ours:
            if ours:
                yield path
                shutil.rmtree(path)


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Whether the directory is there and its lock is ours."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        ours = path.exists()
    except BlockingIOError:
        ours = False
    try:
        yield ours
    finally:
        os.close(descriptor)

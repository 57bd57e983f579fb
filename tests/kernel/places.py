"""Temporary directories that a killed test run leaves behind can be told from those in use.

A live run holds a lock (flock) on each of its directories; the kernel drops it with the process.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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

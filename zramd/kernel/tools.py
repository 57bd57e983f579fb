"""Running the system's programs, with errors that a user can act on."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from zramd.errors import NeedsRoot, ToolMissing, ZramdError

_PACKAGES: Final = {
    "blkid": "util-linux",
    "losetup": "mount",
    "mkfs.btrfs": "btrfs-progs",
    "mkfs.ext2": "e2fsprogs",
    "mkfs.ext3": "e2fsprogs",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.f2fs": "f2fs-tools",
    "mkfs.xfs": "xfsprogs",
    "mkswap": "util-linux",
    "modprobe": "kmod",
    "mount": "mount",
    "nbdfuse": "libnbd-bin",
    "swapoff": "mount",
    "swapon": "mount",
    "umount": "mount",
}
"""Debian's and Ubuntu's package of each program."""


def find(program: str) -> str | None:
    """Where the program is, /usr/sbin and /sbin included; None where it is not."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def missing(program: str) -> ToolMissing:
    """The error that says where to get the program from."""
    package = _PACKAGES.get(program)
    hint = f"apt install {package}" if package else "install the package that brings it"
    return ToolMissing(f"{program} is not installed", hint=hint)


def run(*argv: str, error: type[ZramdError], accept: tuple[int, ...] = (0,)) -> str:
    """Run a program to its end; its stdout. ToolMissing, or `error` with what it said on stderr."""
    path = find(argv[0])
    if path is None:
        raise missing(argv[0])
    done = subprocess.run(
        [path, *argv[1:]],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env={**os.environ, "LC_ALL": "C"},
        check=False,
    )
    if done.returncode not in accept:
        raise error(f"`{' '.join(argv)}` failed: {_said(done)}")
    return done.stdout


def one_line(text: str) -> str:
    """Its lines that say something, joined."""
    return "; ".join(line.strip() for line in text.splitlines() if line.strip())


def need_root(doing: str) -> None:
    """NeedsRoot unless we are root."""
    if os.geteuid() != 0:
        raise NeedsRoot(f"{doing} needs root", hint="run it with sudo")


@contextmanager
def undone(step: Callable[[], object]) -> Iterator[None]:
    """What fails inside is undone by `step`, and raised: should `step` fail too, with a note."""
    try:
        yield
    except BaseException as error:
        try:
            step()
        except (ZramdError, OSError) as another:
            error.add_note(f"and what was done stays: {another}")
        raise


def wait_until(fact: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Poll until `fact()` or the deadline; whether it came true."""
    deadline = time.monotonic() + seconds
    while not fact():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return one_line(done.stderr) or one_line(done.stdout) or f"exit status {done.returncode}"

"""What the kernel says about block devices, mounts and swap.

From /sys/block, /proc/self/mountinfo and /proc/swaps, and from the nodes themselves.
Nothing here changes anything, and nothing is remembered: what stands in the kernel is the truth,
so a killed process leaves no record that could be wrong. Mounts are those of our own mount
namespace; `held` also sees those of others.
"""

import errno
import mmap
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

PROC: Final = Path("/proc")
SYS_BLOCK: Final = Path("/sys/block")

_PROBE: Final = 4096


@dataclass(frozen=True, slots=True)
class Mount:
    """One line of mountinfo: what is mounted (a node, usually), where, its device number, and its
    file system's type."""

    source: str
    target: str
    device: int
    fstype: str


@dataclass(frozen=True, slots=True)
class User:
    """Something that uses a node. `where`: the mount point, "[SWAP]", or the device on top."""

    kind: Literal["mount", "swap", "holder"]
    where: str

    def __str__(self) -> str:
        if self.kind == "mount":
            return f"mounted on {self.where}"
        return "used as swap" if self.kind == "swap" else f"held by {self.where}"


@dataclass(frozen=True, slots=True)
class Swap:
    """A line of /proc/swaps; sizes in bytes."""

    node: str
    size: int
    used: int
    priority: int


def swaps(proc: Path | None = None) -> list[Swap]:
    """All swap that is on; `proc` is where another machine's /proc lies."""
    found = []
    for line in ((proc or PROC) / "swaps").read_text(errors="replace").splitlines()[1:]:
        node, _kind, size, used, priority = line.split()
        found.append(Swap(_unescape(node), int(size) << 10, int(used) << 10, int(priority)))
    return found


def mounts() -> list[Mount]:
    """Every mount of this namespace, in the order in which they were made."""
    found = []
    for line in (PROC / "self/mountinfo").read_text(errors="surrogateescape").splitlines():
        before, _, after = line.partition(" - ")
        _id, _parent, device, _root, target, *_options = before.split()
        major, _, minor = device.partition(":")
        fstype, source, *_options = after.split(" ")
        number = os.makedev(int(major), int(minor))
        found.append(Mount(_unescape(source), _unescape(target), number, fstype))
    return found


def is_mount(path: Path) -> bool:
    """Whether something is mounted on exactly `path`, even a FUSE mount whose process is dead.

    (os.path.ismount says False for those: it cannot stat them.)
    """
    place = os.path.join(os.path.realpath(path.parent), path.name)
    return any(mount.target == place for mount in mounts())


def users(node: str) -> list[User]:
    """What uses the block device `node`, in the order in which it began; [] where nothing does."""
    found = [User("swap", "[SWAP]") for swap in swaps() if swap.node == node]
    number = _number(node)
    for mount in mounts():
        # By name as well as by number: a btrfs mount has a number of its own.
        if mount.source == node or mount.device == number:
            found.append(User("mount", mount.target))
    for holder in sorted((SYS_BLOCK / Path(node).name / "holders").glob("*")):
        found.append(User("holder", holder.name))
    return found


def held(node: str) -> bool:
    """Whether anything has claimed the node: a mount in any namespace, swap, a program."""
    try:
        os.close(os.open(node, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def answers(node: str) -> bool:
    """Whether reads of the node still reach its server: its first or its last page can be read.

    The page cache is passed by. Waits for as long as a server that lives takes.
    """
    try:
        device = os.open(node, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        page = mmap.mmap(-1, _PROBE)  # O_DIRECT wants it aligned
        end = os.lseek(device, 0, os.SEEK_END)
        for offset in (0, end - _PROBE):
            try:
                if os.preadv(device, [page], max(offset, 0)) == _PROBE:
                    return True
            except OSError:
                pass
        return False
    finally:
        os.close(device)


def processes_in(target: str) -> list[str]:
    """ "NAME (pid N)" of the processes that have a file or a directory under `target` open.

    Goes by the names of the open files alone: to look at the files could hang.
    """
    found = []
    for process in PROC.glob("[0-9]*"):
        try:
            links = [
                process / "cwd",
                process / "root",
                process / "exe",
                *(process / "fd").iterdir(),
            ]
            if any(_lies_in(os.readlink(link), target) for link in links):
                found.append(
                    f"{(process / 'comm').read_text(errors='replace').strip()} (pid {process.name})"
                )
        except OSError:
            continue  # it ended meanwhile, or is not ours to look at
    return found


def _lies_in(path: str, directory: str) -> bool:
    return path == directory or path.startswith(directory.rstrip("/") + "/")


def _number(node: str) -> int | None:
    try:
        return os.stat(node).st_rdev
    except OSError:
        return None


def _unescape(text: str) -> str:
    """Spaces and the like stand as octal in /proc: `\\\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), text)

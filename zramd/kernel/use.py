"""Use a block device node for swap or a file system, and stop using it.

    format(node, content)                   # mkswap or mkfs, where it is blank
    prepare_for_swap(name, via)             # or NotHardened
    swapon(node, priority=None)             # format, swapon --discard
    mount(node, directory, fstype="ext4")   # format, mount -o discard
    users(node) -> list[User]               # .kind "swap", "mount" or "holder", and .where
    release(node)                           # swapoff, umount

Promises
1. Nothing that is on the node is overwritten: swap space, or a file system of the wanted type, is
   used as it is, anything else is refused.
2. `release` undoes the uses in reverse order and stops at the first that fails; what it has not
   come to still stands, and so does the attachment.
3. A dead server does not hang `release`: the node is cut off first, so that what waits for the
   server fails instead. What was only there is lost then, but the node comes free.
"""

import os
import re
from pathlib import Path
from typing import Final

from zramd.errors import BadValue, NotHardened, UseFailed
from zramd.kernel import nbd, tools
from zramd.kernel.state import User, mounts, processes_in, swaps, users

MIN_FREE_KIB: Final = 8192
"""The least vm.min_free_kbytes for swap: real-time tasks may take part of it where others get no
memory any more, and that is what a server answers from. With 512 a guest hung, with 4096 one of
five did, full and on a busy machine (docs/swap.md). From 4 GiB of RAM on, the kernel's own is as
much."""

_MIN_FREE: Final = Path("/proc/sys/vm/min_free_kbytes")

__all__ = ["MIN_FREE_KIB", "User", "format", "mount", "release", "swapon", "users"]


def format(node: str, content: str) -> None:
    """Make swap space ("swap") or a file system (its type) on the node; there already: nothing."""
    if re.fullmatch(r"[a-z][a-z0-9]*", content) is None:
        raise BadValue(f"{content!r} is not a file system type", hint="use ext4, xfs or btrfs")
    tools.need_root(f"formatting {node}")
    found = _content(node)
    if found == content:
        return
    if found is not None:
        raise UseFailed(
            f"{node} holds {found} already, and it stays",
            hint=f"reset the device, or `wipefs -a {node}`, if nobody needs that",
        )
    _refuse_use(node, users(node))
    if content == "swap":
        tools.run("mkswap", node, error=UseFailed)
    else:
        tools.run(f"mkfs.{content}", "-q", node, error=UseFailed)


def swapon(node: str, priority: int | None = None) -> None:
    """Make the node swap space and swap on it, freed pages discarded. Swap already, with this
    priority or for None: nothing.

    `priority` -1 to 32767, higher is used first; None leaves it to the kernel.
    """
    if priority is not None and not -1 <= priority <= 32767:
        raise BadValue(f"{priority} is not a swap priority", hint="use -1 to 32767")
    tools.need_root(f"swapping on {node}")
    in_use = users(node)
    if in_use == [User("swap", "[SWAP]")]:
        has = swap_priority(node)
        if priority not in (None, has):
            raise UseFailed(
                f"{node} is swap space already, with priority {has}",
                hint=f"`swapoff {node}` first, or leave the priority as it is",
            )
        return
    _refuse_use(node, in_use)
    format(node, "swap")
    options = [] if priority is None else ["--priority", str(priority)]
    tools.run("swapon", "--discard", *options, node, error=UseFailed)


def prepare_for_swap(name: str, via: str, *, allow_deadlock: bool = False) -> str | None:
    """See that swap on the device `name`, attached through `via`, can go on when there is no free
    memory; what was changed for that, in a line. Nothing takes that back: it is the machine's, and
    other devices may have come to rely on it.

    Raises NotHardened where it cannot, unless `allow_deadlock`; NeedsRoot.
    """
    if via == "loop" and not allow_deadlock:
        raise NotHardened(
            f"swap on {name} through loop could deadlock: FUSE, which it goes through, needs memory"
            " to write",
            hint="use a kernel with nbd, or say --allow-deadlock",
        )
    tools.need_root(f"preparing {name} for swap")
    has = int(_MIN_FREE.read_text())
    if has >= MIN_FREE_KIB:
        return None
    try:
        _MIN_FREE.write_text(str(MIN_FREE_KIB))
    except OSError as error:
        if allow_deadlock:
            return None
        raise NotHardened(
            f"swap on {name} could deadlock: vm.min_free_kbytes is {has}, too little to answer"
            f" from, and cannot be raised: {error.strerror}",
            hint=f"sysctl vm.min_free_kbytes={MIN_FREE_KIB}, or say --allow-deadlock",
        ) from error
    return f"vm.min_free_kbytes is {MIN_FREE_KIB} now, and was {has}; it stays so until reboot"


def swap_priority(node: str) -> int | None:
    """The priority of the swap on this node; None where it is none."""
    return next((swap.priority for swap in swaps() if swap.node == node), None)


def mount(node: str, directory: Path, fstype: str = "ext4") -> None:
    """Make a file system on the node and mount it on `directory`; mounted there already: nothing.

    A node that holds a file system of this type already is mounted as it is.
    """
    if re.fullmatch(r"[a-z][a-z0-9]*", fstype) is None:
        raise BadValue(f"{fstype!r} is not a file system type", hint="use ext4, xfs or btrfs")
    if not directory.is_dir():
        raise BadValue(f"{directory} is not a directory", hint=f"mkdir -p {directory}")
    tools.need_root(f"mounting {node}")
    in_use = users(node)
    target = os.path.realpath(directory)
    if User("mount", target) in in_use:
        types = {mount.fstype for mount in mounts() if mount.target == target}
        if fstype in types:
            return
        raise UseFailed(
            f"{node} is mounted on {directory} already, as {', '.join(types)}",
            hint="unmount it first, or leave the type as it is",
        )
    _refuse_use(node, in_use)
    format(node, fstype)
    tools.run("mount", "-t", fstype, "-o", "discard", node, os.fspath(directory), error=UseFailed)


def sync(node: str) -> None:
    """Have all that was written to file systems mounted from the node arrive at it."""
    for user in users(node):
        if user.kind == "mount":
            tools.run("sync", "--file-system", user.where, error=UseFailed)


def release(node: str) -> None:
    """Stop every use of the node; UseFailed names what holds on. Unused: nothing."""
    in_use = users(node)
    if not in_use:
        return
    tools.need_root(f"releasing {node}")
    nbd.cut_if_dead(node)
    for user in reversed(in_use):
        if user.kind == "holder":
            raise UseFailed(
                f"{node} is held by {user.where}", hint=f"take /dev/{user.where} down first"
            )
        if user.kind == "swap":
            tools.run("swapoff", node, error=UseFailed)
        else:
            _umount(user.where)


def _umount(target: str) -> None:
    try:
        tools.run("umount", target, error=UseFailed)
    except UseFailed as error:
        busy = ", ".join(processes_in(target))
        if not busy:
            raise
        raise UseFailed(
            f"{target} is in use by {busy}", hint="end these, then try again"
        ) from error


def _content(node: str) -> str | None:
    """What the node holds, by its signature: a file system's type, "swap", "dos"; None: nothing."""
    # 2: no signature. (8, several that contradict each other, is an error here.)
    found = tools.run(
        *("blkid", "--probe", "--output", "export", node), error=UseFailed, accept=(0, 2)
    )
    values = dict(line.split("=", 1) for line in found.splitlines() if "=" in line)
    return values.get("TYPE", values.get("PTTYPE"))


def _refuse_use(node: str, in_use: list[User]) -> None:
    if in_use:
        raise UseFailed(
            f"{node} is in use already: {', '.join(map(str, in_use))}",
            hint="`zramd down` stops that use",
        )

"""The way without nbd: nbdfuse shows the export as a file, a loop device makes a node of it.

nbdfuse mounts on `loop` in the device's runtime directory and shows `disk` in it, and so the kernel
names them in mountinfo and in /sys/block/loopN/loop/backing_file. A dead nbdfuse leaves both
standing: I/O on the node fails at once, nothing hangs, and `clear` takes both away.

An attach that is killed may leave children that go on: an nbdfuse about to mount, a losetup about
to attach. Without the directory neither can; nbdfuse mounts on a directory, and not over a file,
because for want of the file it would take the directory above.
"""

import os
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from typing import Final

from zramd.errors import AttachFailed, NoServer, ToolMissing, ZramdError
from zramd.kernel import tools
from zramd.kernel.state import SYS_BLOCK, answers, is_mount
from zramd.nbd.address import UnixAddress
from zramd.store import PAGE

_MOUNT: Final = "loop"
_FILE: Final = "disk"


def missing() -> ZramdError | None:
    """Why this way cannot be gone on this machine, modules loaded where they can be; or None."""
    for module, node in (("fuse", "/dev/fuse"), ("loop", "/dev/loop-control")):
        if os.path.exists(node):
            continue
        try:
            tools.run("modprobe", module, error=ToolMissing)
        except ToolMissing as error:
            return ToolMissing(f"the kernel has no {module}: {error}", hint=f"`modprobe {module}`")
        if not tools.wait_until(partial(os.path.exists, node)):
            return ToolMissing(f"there is no {node}", hint="is /dev a devtmpfs, or kept by udev?")
    return next((tools.missing(p) for p in ("nbdfuse", "losetup") if not tools.find(p)), None)


def attach(directory: Path, server: Path, export: str, node: str | None) -> str:
    """Make a node of the export on the socket `server`; all or nothing."""
    assert node is None, "which loop device it is losetup finds"
    mount = directory / _MOUNT
    with tools.undone(partial(clear, directory)):
        mount.mkdir(0o700)
        _start_nbdfuse(mount, server, export)
        return tools.run(
            *("losetup", "--find", "--show", "--direct-io=on"),
            *("--sector-size", str(PAGE), os.fspath(mount / _FILE)),
            error=AttachFailed,
        ).strip()


def find(directory: Path) -> str | None:
    """The node that is attached to the device of `directory`; None where none is."""
    return next(iter(_loops(directory)), None)


def alive(node: str) -> bool:
    """Whether nbdfuse and the server behind it live: one of them dead fails every read at once."""
    return answers(node)


def cut(node: str) -> None:
    """Nothing: nbdfuse fails every request by itself, from its server's end on."""


def clear(directory: Path) -> None:
    """Take node, mount and directory away, as far as they are there; nbdfuse may be dead."""
    failed: list[ZramdError] = []
    if tools.wait_until(lambda: _try_clear(directory, failed)):
        return
    node = find(directory)
    if node is None:
        raise failed[-1]
    raise AttachFailed(
        f"{node} will be detached when what keeps it open ends",
        hint=f"`fuser -v {node}` shows what; then detach again",
    )


def _try_clear(directory: Path, failed: list[ZramdError]) -> bool:
    """One round; whether nothing is left. What a killed attach's child holds, the next may get."""
    mount = directory / _MOUNT
    try:
        for node in _loops(directory):
            tools.run("losetup", "--detach", node, error=AttachFailed)
        # Not lazily: a losetup that has the file open would attach it after that, unseen.
        while is_mount(mount):
            tools.run("umount", os.fspath(mount), error=AttachFailed)
    except AttachFailed as error:
        failed.append(error)
        return False
    try:
        mount.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:  # mounted on since we looked
        failed.append(AttachFailed(f"{mount} cannot be removed: {error.strerror}"))
        return False
    return not _loops(directory)


def _loops(directory: Path) -> list[str]:
    file = os.path.join(os.path.realpath(directory), _MOUNT, _FILE)
    found = []
    for backing in SYS_BLOCK.glob("loop*/loop/backing_file"):
        try:
            if os.fsdecode(backing.read_bytes()).rstrip("\n") == file:
                found.append(f"/dev/{backing.parent.parent.name}")
        except OSError:
            continue  # detached meanwhile
    return found


def _start_nbdfuse(mount: Path, server: Path, export: str) -> None:
    """Mount the export on `mount`; returns when it can be used. nbdfuse ends with its mount."""
    uri = UnixAddress(server).uri(export)
    program = tools.find("nbdfuse")
    if program is None:
        raise tools.missing("nbdfuse")
    with tempfile.TemporaryFile() as said:
        nbdfuse = subprocess.Popen(
            [program, os.fspath(mount / _FILE), uri],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=said,
            cwd="/",
            start_new_session=True,  # a ^C for the command that attaches is not for this
        )
        if tools.wait_until(lambda: is_mount(mount) or nbdfuse.poll() is not None, 30.0):
            if nbdfuse.poll() is None:
                return
        else:
            nbdfuse.kill()
            nbdfuse.wait()
        said.seek(0)
        message = tools.one_line(said.read().decode(errors="replace"))
    if not server.exists() or "refused" in message:
        raise NoServer(f"no NBD server listens on {server}", hint="start one with `zramd serve`")
    raise AttachFailed(f"nbdfuse did not mount {server}: {message or 'it took too long'}")

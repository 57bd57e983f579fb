"""The way through the kernel's nbd: we negotiate, the kernel takes the socket over netlink.

A connected device is found again by its backend identifier, `zramd:DIRECTORY#SOCKET`, in
/sys/block/nbdN/backend: the device's runtime directory, and the inode of the socket that the
kernel was given. It stands as long as the device is connected or open. The kernel's side of the
connection lives without any process of ours.

A server that was killed leaves requests in the kernel that wait for ever, and with them whoever
opens the node; so nothing here opens a node, and whether the server lives is asked of its socket.

Assumes the network namespace in which the device was attached: sockets of others cannot be asked.
"""

import errno
import os
import re
import socket
import stat
from functools import partial
from pathlib import Path
from typing import Final

from zramd.errors import AttachFailed, DeviceBusy, NeedsRoot, NoServer, ToolMissing, ZramdError
from zramd.kernel import netlink, tools
from zramd.kernel.state import SYS_BLOCK
from zramd.nbd.client import negotiate
from zramd.store import PAGE

_ANSWER_S: Final = 30.0
"""How long a server may take for one message of the handshake."""


def missing() -> ZramdError | None:
    """Why this way cannot be gone on this machine, the module loaded where it can be; or None."""
    if _loaded():
        return None
    try:
        tools.run("modprobe", "nbd", error=ToolMissing)
    except ToolMissing as error:
        return ToolMissing(
            f"the kernel has no nbd: {error}",
            hint="install the kernel's nbd module (`modprobe nbd`), or use --via loop",
        )
    if tools.wait_until(_loaded):
        return None
    return ToolMissing(
        'the kernel\'s nbd cannot be reached from here (netlink knows no family "nbd")',
        hint="attach outside the container, or use --via loop",
    )


def attach(directory: Path, server: Path, export: str, node: str | None) -> str:
    """Connect the kernel to the server on the socket `server`; the node, ready, with its size.

    Raises DeviceBusy where `node` is another's.
    """
    asked = None if node is None else _index(node)
    with _connect(server) as connection:
        info = negotiate(connection, export)
        connection.settimeout(None)
        if info.size == 0 or info.size % PAGE:
            raise AttachFailed(
                f"the server on {server} offers {info.size} bytes, not whole pages of {PAGE}",
                hint="give the device a disksize that is a multiple of 4096",
            )
        identifier = f"zramd:{directory}#{os.fstat(connection.fileno()).st_ino}"
        try:
            index = netlink.nbd_connect(connection, info.size, PAGE, info.flags, identifier, asked)
        except PermissionError as error:
            raise NeedsRoot(
                "the kernel lets only root connect nbd devices", hint="run it with sudo"
            ) from error
        except OSError as error:
            if node is not None and error.errno == errno.EBUSY:
                raise _taken(node) from error
            raise AttachFailed(
                f"the kernel's nbd refused the connection: {error.strerror}",
                hint="`dmesg | tail` may say why",
            ) from error
    node = f"/dev/nbd{index}"
    with tools.undone(partial(netlink.nbd_disconnect, index)):
        if not tools.wait_until(lambda: _ready(node, info.size)):
            raise AttachFailed(
                f"the kernel connected nbd{index}, but {node} did not appear with its size",
                hint="is /dev a devtmpfs, or kept by udev?",
            )
        if find(directory) is None:
            raise AttachFailed(
                f"the kernel's nbd{index} does not keep the name of its backend",
                hint="that needs Linux 5.14 or later; use --via loop",
            )
    return node


def find(directory: Path) -> str | None:
    """The node that is attached to the device of `directory`; None where none is."""
    for backend in SYS_BLOCK.glob("nbd*/backend"):
        if _identifier(backend)[0] == f"zramd:{directory}":
            return f"/dev/{backend.parent.name}"
    return None


def alive(node: str) -> bool:
    """Whether the node's connection still has its server."""
    inode = _identifier(SYS_BLOCK / Path(node).name / "backend")[1]
    return inode.isdigit() and netlink.unix_peer_lives(int(inode))


def clear(directory: Path) -> None:
    """Disconnect the device's node, whether its server lives or not. None there: nothing."""
    node = find(directory)
    if node is None:
        return
    cut(node)
    if not tools.wait_until(lambda: find(directory) != node):
        raise AttachFailed(
            f"{node} is disconnected, but something keeps it open",
            hint=f"`fuser -v {node}` shows what; the kernel frees the device when that ends",
        )


def cut_if_dead(node: str) -> None:
    """End a connection whose server is dead, so that what waits for the server gets EIO.

    Any other node, one of another kind too, is left alone.
    """
    if re.fullmatch(r"/dev/nbd\d+", node) and not alive(node):
        cut(node)


def cut(node: str) -> None:
    """End the node's connection. Requests under way get EIO, and so do all that come."""
    try:
        netlink.nbd_disconnect(_index(node))
    except OSError as error:
        raise AttachFailed(f"the kernel did not disconnect {node}: {error.strerror}") from error


def _index(node: str) -> int:
    return int(node.removeprefix("/dev/nbd"))


def _taken(node: str) -> DeviceBusy:
    """Who has the node that the kernel did not give us, and how to have it freed."""
    sys = SYS_BLOCK / Path(node).name
    holder, _inode = _identifier(sys / "backend")
    if holder.startswith("zramd:"):
        name = Path(holder).name
        return DeviceBusy(
            f"{node} is taken by the zramd device of {holder.removeprefix('zramd:')}",
            hint=f"zramd detach {name}, or choose another node",
        )
    return DeviceBusy(
        f"{node} is taken by {_who(sys)}", hint=f"nbd-client -d {node}, or choose another node"
    )


def _who(sys: Path) -> str:
    """Another's connection, by the name that it has there, or else by its process."""
    for told, kind in (("backend", "the connection"), ("pid", "process")):
        try:
            name = os.fsdecode((sys / told).read_bytes()).strip()
        except OSError:
            continue
        if name:
            return f"{kind} {name}"
    return "another connection"


def _identifier(backend: Path) -> tuple[str, str]:
    """The two parts of what `attach` gave the kernel; empty where the device is not ours."""
    try:
        text = os.fsdecode(backend.read_bytes()).rstrip("\n")
    except OSError:  # not connected, or not any more
        return "", ""
    first, _, inode = text.rpartition("#")
    return first, inode


def _loaded() -> bool:
    try:
        netlink.nbd_family()
    except OSError:
        return False
    return True


def _connect(server: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(_ANSWER_S)
        connection.connect(os.fspath(server))
    except OSError as error:
        connection.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            raise NoServer(
                f"no NBD server listens on {server}", hint="start one with `zramd serve`"
            ) from error
        raise AttachFailed(f"cannot connect to {server}: {error.strerror or error}") from error
    return connection


def _ready(node: str, size: int) -> bool:
    try:
        sectors = int((SYS_BLOCK / Path(node).name / "size").read_text())
        return sectors * 512 == size and stat.S_ISBLK(os.stat(node).st_mode)
    except OSError:
        return False

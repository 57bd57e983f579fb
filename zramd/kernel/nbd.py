"""The way through the kernel's nbd: we negotiate, the kernel takes the socket over netlink.

A connected device is found again by its backend identifier, `zramd:DIRECTORY#SOCKET`, in
/sys/block/nbdN/backend: the device's runtime directory, and the inode of the socket that the
kernel was given. It stands as long as the device is connected or open. The kernel's side of the
connection lives without any process of ours.

A server that dies leaves requests in the kernel that wait for a new connection, and with them
whoever opens the node; so nothing here opens a node, and whether the server lives is asked of its
socket. `reconnect` gives the kernel a new server's. The identifier stays as it was then: the new
socket's inode stands in the file `nbd.inode` in the device's directory, after that of the first,
which says whose successor it is. It is written before the kernel gets the socket, so whoever is
killed in between leaves a connection that is taken for dead, which it is.

Assumes the network namespace in which the device was attached: sockets of others cannot be asked.
"""

import errno
import os
import re
import socket
import stat
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Final

from zramd.errors import AttachFailed, DeviceBusy, NeedsRoot, NoServer, ToolMissing, ZramdError
from zramd.kernel import netlink, tools
from zramd.kernel.state import SYS_BLOCK
from zramd.nbd.client import negotiate
from zramd.nbd.wire import ExportInfo
from zramd.store import PAGE

_ANSWER_S: Final = 30.0
"""How long a server may take for one message of the handshake."""

_DEAD_CONN_S: Final = 300
"""How long the kernel waits for the successor of a dead server before new requests fail: plenty for
a start on a machine that is short of memory. Nobody waits in vain: `cut` ends it at once."""

_IO_TIMEOUT_MS: Final = 1000
"""How often the kernel looks at a request that is not answered. What was lost in a dead server is
sent to its successor then, and only then: within 1.5 s, as measured, since the kernel rounds up to
a second and more; with 5000, within 6 s. A slow server is not harmed, but is told of in the
kernel's log ("Possible stuck request"), a line for each of its requests each time."""

_KERNELS_IO_TIMEOUT_MS: Final = 30_000
"""What it is where nobody has said anything."""

_TAKEN_S: Final = 10.0
"""How long the kernel may take to see the end of a connection whose server is dead."""

_POLL_S: Final = 0.02

_SUCCESSOR: Final = "nbd.inode"
"""The file with two inodes: the first socket's, and that of the one in its place now."""


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
    connection, info = _negotiated(server, export)
    with connection:
        (directory / _SUCCESSOR).unlink(missing_ok=True)  # of no use any more
        if info.size == 0 or info.size % PAGE:
            raise AttachFailed(
                f"the server on {server} offers {info.size} bytes, not whole pages of {PAGE}",
                hint="give the device a disksize that is a multiple of 4096",
            )
        identifier = f"zramd:{directory}#{_inode(connection)}"
        try:
            index = netlink.nbd_connect(
                connection, info.size, PAGE, info.flags, identifier, _DEAD_CONN_S, asked
            )
        except OSError as error:
            if node is not None and error.errno == errno.EBUSY:
                raise _taken(node) from error
            raise _refused(error) from error
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
    _set_io_timeout(node, _IO_TIMEOUT_MS)
    return node


def reconnect(
    directory: Path,
    server: Path,
    export: str,
    alone: Callable[[], AbstractContextManager[None]],
    *,
    dead: bool = False,
) -> str | None:
    """Have the kernel go on with the server on the socket `server`, in the place of a dead one;
    the node. None: there is none, or its server lives, and it is not known to be `dead`. (Then no
    file of before is read: its page may have been swapped out, to that node.)

    `alone` holds the device's lock; it is not held while the server answers.
    """
    deadline = time.monotonic() + _TAKEN_S
    while True:
        connection, info = _negotiated(server, export)
        with connection, alone():
            node = find(directory)
            if node is None or (not dead and alive(node)):
                return None
            dead = False  # only the old one was
            size = _size(node)
            if size != info.size:
                raise AttachFailed(
                    f"the server on {server} offers {info.size} bytes, and {node} has {size}",
                    hint="that is another device; `zramd down` clears the node",
                )
            holder, first = _identifier(node)
            _write_successor(directory, first, _inode(connection))
            try:
                netlink.nbd_reconfigure(_index(node), connection, f"{holder}#{first}")
            except OSError as error:
                if error.errno == errno.EINVAL:
                    raise AttachFailed(
                        f"{node} has been disconnected, and is only kept by what uses it",
                        hint=f"`zramd down {directory.name}` clears it",
                    ) from error
                raise _refused(error) from error
            # A socket that the kernel has not taken ends here. It takes none before it has seen the
            # end of the old one, which may be a moment after us.
            connection.close()
            if alive(node):
                return node
        if time.monotonic() > deadline:
            raise AttachFailed(
                f"the kernel has not taken a new connection for {node}",
                hint=f"does the server on {server} live? `dmesg | tail` may say more",
            )
        time.sleep(_POLL_S)


def find(directory: Path) -> str | None:
    """The node that is attached to the device of `directory`; None where none is."""
    for backend in SYS_BLOCK.glob("nbd*/backend"):
        node = f"/dev/{backend.parent.name}"
        if _identifier(node)[0] == f"zramd:{directory}":
            return node
    return None


def others() -> dict[int, str]:
    """The nodes that are connected and not by us, by the process that has connected each."""
    found = {}
    for path in SYS_BLOCK.glob("nbd*/pid"):
        node = f"/dev/{path.parent.name}"
        if _identifier(node)[0].startswith("zramd:"):
            continue
        try:
            found[int(path.read_text())] = node
        except (OSError, ValueError):
            pass  # it has just been disconnected
    return found


def alive(node: str) -> bool:
    """Whether the node's connection still has its server."""
    holder, first = _identifier(node)
    inode = _successor(Path(holder.removeprefix("zramd:")), first) or first
    return inode.isdigit() and netlink.unix_peer_lives(int(inode))


def clear(directory: Path) -> None:
    """Disconnect the device's node, whether its server lives or not. None there: nothing."""
    node = find(directory)
    if node is None:
        return
    # The node's next user may be none of ours.
    _set_io_timeout(node, _KERNELS_IO_TIMEOUT_MS)
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
    holder, _first = _identifier(node)
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


def _identifier(node: str) -> tuple[str, str]:
    """The two parts of what `attach` gave the kernel; empty where the device is not ours."""
    try:
        text = os.fsdecode((SYS_BLOCK / Path(node).name / "backend").read_bytes()).rstrip("\n")
    except OSError:  # not connected, or not any more
        return "", ""
    holder, _, first = text.rpartition("#")
    return holder, first


def _successor(directory: Path, first: str) -> str | None:
    """The inode of the socket that came in the place of the one that was the first, if any."""
    try:
        of, inode = (directory / _SUCCESSOR).read_text().split()
    except (OSError, ValueError):
        return None
    return inode if of == first else None


def _write_successor(directory: Path, first: str, inode: int) -> None:
    """All or nothing. Root writes here into a directory that may be a user's."""
    path = directory / _SUCCESSOR
    new = path.with_suffix(".new")
    try:
        new.unlink(missing_ok=True)
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(f"{first} {inode}\n")
        new.replace(path)
    except OSError as error:
        raise AttachFailed(f"cannot write {path}: {error.strerror}") from error


def _set_io_timeout(node: str, milliseconds: int) -> None:
    """Where /sys may not be written it stays as it is: what is lost is sent again later then."""
    try:
        (SYS_BLOCK / Path(node).name / "queue/io_timeout").write_text(str(milliseconds))
    except OSError:
        pass


def _refused(error: OSError) -> ZramdError:
    if isinstance(error, PermissionError):
        return NeedsRoot("the kernel lets only root connect nbd devices", hint="run it with sudo")
    return AttachFailed(
        f"the kernel's nbd refused the connection: {error.strerror}",
        hint="`dmesg | tail` may say why",
    )


def _loaded() -> bool:
    try:
        netlink.nbd_family()
    except OSError:
        return False
    return True


def _negotiated(server: Path, export: str) -> tuple[socket.socket, ExportInfo]:
    """A connection to the server, in transmission, and what is said of the export."""
    connection = _connect(server)
    try:
        info = negotiate(connection, export)
        connection.settimeout(None)
    except BaseException:
        connection.close()
        raise
    return connection, info


def _inode(connection: socket.socket) -> int:
    return os.fstat(connection.fileno()).st_ino


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
        return _size(node) == size and stat.S_ISBLK(os.stat(node).st_mode)
    except OSError:
        return False


def _size(node: str) -> int:
    return int((SYS_BLOCK / Path(node).name / "size").read_text()) * 512

"""Make a block device node of a served device, and take it away again.

    attach(name, socket, export="", via=None, node=None)
        -> Attachment                       # .node is ready, with its size
    reconnect(name, socket, export="")
        -> Attachment | None                # a new server goes on where a dead one ended
    detach(name) -> None                                        # idempotent
    attached(name) -> Attachment | None
    cut(attachment) -> None                 # the server has dropped the device

Two ways, each a module with `missing`, `attach`, `find`, `alive`, `cut` and `clear`: `nbd`, the
kernel's own NBD client, and `loop`, nbdfuse under a loop device, for kernels without nbd.

Promises
1. An attachment is found by what the kernel says about it, and in no file of ours. So a process of
   ours that is killed at any moment leaves nothing that `detach` cannot clear.
2. Two callers for the same device cannot attach it twice: the second gets the first one's node.
3. A node that something uses (a mount, swap, a device on top) is never taken away.

Assumes that the device's runtime directory exists, as it does while a server of zramd lives: its
path is the attachment's identity, and its lock (flock) keeps two callers apart.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, Literal, Protocol, cast

from zramd.errors import BadValue, DeviceBusy, NoServer, ZramdError
from zramd.kernel import loop, nbd, tools
from zramd.kernel.state import held, users
from zramd.service.config import check_node
from zramd.service.runtime import Paths

Via = Literal["nbd", "loop"]

_CAP_SYS_ADMIN: Final = 21


@dataclass(frozen=True, slots=True)
class Attachment:
    """A device that the kernel has as a block device node."""

    name: str
    node: str
    """Such as /dev/nbd0."""
    via: Via
    """The way it took."""


class _Way(Protocol):
    def missing(self) -> ZramdError | None: ...
    def attach(self, directory: Path, server: Path, export: str, node: str | None) -> str: ...
    def find(self, directory: Path) -> str | None: ...
    def alive(self, node: str) -> bool: ...
    def cut(self, node: str) -> None: ...
    def clear(self, directory: Path) -> None: ...


_WAYS: Final[dict[Via, _Way]] = {"nbd": cast(_Way, nbd), "loop": cast(_Way, loop)}
"""In the order in which they are tried."""


def attach(
    name: str, socket: Path, export: str = "", via: Via | None = None, node: str | None = None
) -> Attachment:
    """The kernel's node for the export `export` on the Unix socket `socket`.

    `via` None: through nbd where the kernel has it, else through loop. `node` is one of nbd's, such
    as /dev/nbd3; None: the first that is free. A device that is attached already keeps its node.
    An attachment whose server is gone is cleared first.

    Raises NeedsRoot; NoServer; ToolMissing when no way (or not the one asked for) can be gone on
    this machine; DeviceBusy when it is attached the other way or at another node, when `node` is
    another's, or when a dead attachment is still in use; AttachFailed; BadValue.
    """
    if via is not None and via not in _WAYS:
        raise BadValue(f"{via!r} is not a way to attach", hint="use nbd or loop")
    if node is not None:
        check_node(node)
        if via == "loop":
            raise BadValue(f"through loop it cannot be {node}", hint="use nbd, or name no node")
        via = "nbd"
    tools.need_root(f"attaching {name}")
    directory = Paths(name).dir
    with _alone(name, directory):
        existing = attached(name)
        if existing is not None and _WAYS[existing.via].alive(existing.node):
            if via not in (None, existing.via) or node not in (None, existing.node):
                raise DeviceBusy(
                    f"{name} is attached as {existing.node} through {existing.via} already",
                    hint=f"zramd detach {name}",
                )
            return existing
        _clear(name)
        way = _choose(via)
        return Attachment(name, _WAYS[way].attach(directory, socket, export, node), way)


def reconnect(
    name: str, socket: Path, export: str = "", *, dead: bool = False
) -> Attachment | None:
    """Give the kernel's dead connection of the device a successor: the server on the Unix socket
    `socket`, which serves the same pages. What the kernel waits for is sent to that one, what was
    lost in the dead server after a second or two; whoever uses the node only sees it wait.

    None, and nothing is done, where the device is not attached, or through loop, or its server
    lives; with `dead`, the caller knows that it does not. Any thread may call it, and a process
    that is short of memory too: it starts no program, and does not open the node.

    Raises NeedsRoot; NoServer; ServerFailed, BadValue from the handshake; AttachFailed where the
    size is another, or where the node has been disconnected and is only still in use.
    """
    existing = attached(name)
    if existing is None or existing.via != "nbd" or (not dead and nbd.alive(existing.node)):
        return None
    tools.need_root(f"reconnecting {existing.node}")
    directory = Paths(name).dir
    alone = partial(_alone, name, directory)
    node = nbd.reconnect(directory, socket, export, alone, dead=dead)
    return None if node is None else Attachment(name, node, "nbd")


def detach(name: str) -> None:
    """Take the device's node away, with everything that an attach may have left; or do nothing.

    Works whether the server and nbdfuse live or not. Raises DeviceBusy, naming the users, where
    the node is in use; NeedsRoot; AttachFailed.
    """
    directory = Paths(name).dir
    if not directory.exists():
        _clear(name)
        return
    with _alone(name, directory):
        _clear(name)


def attached(name: str) -> Attachment | None:
    """The attachment of the device, whether its server lives or not; None where there is none."""
    directory = Paths(name).dir
    for via, way in _WAYS.items():
        node = way.find(directory)
        if node is not None:
            return Attachment(name, node, via)
    return None


def others() -> dict[int, str]:
    """Nodes that another program than ours, such as nbd-client, has connected to some server, by
    its process. Nobody connects these again."""
    return nbd.others()


def may_connect(process: int) -> bool:
    """Whether `process` may `reconnect`; True where that cannot be told."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return True
    fields = dict(line.split(":", 1) for line in status.splitlines())
    is_root = fields["Uid"].split()[1] == "0"
    return is_root and bool(int(fields["CapEff"], 16) >> _CAP_SYS_ADMIN & 1)


def cut_if_dead(name: str) -> Attachment | None:
    """End the node's connection where its server is dead, for one that has not its pages; what was
    cut. Whoever waits for them gets errors. Raises AttachFailed, OSError."""
    existing = attached(name)
    if existing is None or existing.via != "nbd" or nbd.alive(existing.node):
        return None
    nbd.cut(existing.node)
    return existing


def cut(attachment: Attachment) -> None:
    """End the connection of a node whose device has been reset: whatever the kernel waits for there
    fails now. The node stays as long as it is in use. Raises AttachFailed."""
    _WAYS[attachment.via].cut(attachment.node)


def _clear(name: str) -> None:
    existing = attached(name)
    if existing is not None:
        tools.need_root(f"detaching {existing.node}")
        in_use = users(existing.node)
        # To open the node of a dead server could hang.
        if in_use or (_WAYS[existing.via].alive(existing.node) and held(existing.node)):
            how = ", ".join(map(str, in_use)) or "held by another program or mount namespace"
            raise DeviceBusy(
                f"{existing.node} is in use: {how}",
                hint=f"`zramd down {name}` stops using it first",
            )
    for way in _WAYS.values():
        way.clear(Paths(name).dir)


def _choose(via: Via | None) -> Via:
    reasons = []
    for way in _WAYS if via is None else (via,):
        reason = _WAYS[way].missing()
        if reason is None:
            return way
        reasons.append(reason)
    if len(reasons) == 1:
        raise reasons[0]
    raise type(reasons[0])(
        "; ".join(map(str, reasons)), hint=" or ".join(str(r.hint) for r in reasons)
    )


@contextmanager
def _alone(name: str, directory: Path) -> Iterator[None]:
    """Hold the lock of the device's directory: no other attach or detach of it runs meanwhile."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise NoServer(
            f"no server runs for {name}", hint=f"start one: zramd serve {name} --disksize SIZE"
        ) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)

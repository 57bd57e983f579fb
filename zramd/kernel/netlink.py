"""Netlink, as much of it as attaching an nbd device takes.

Five calls, each over a short-lived socket: is the generic family "nbd" there, connect, reconfigure,
disconnect; and does a Unix socket still have its peer. Wire formats: include/uapi/linux/netlink.h,
genetlink.h, nbd-netlink.h, unix_diag.h; all integers in host order. The kernel answers with any
number of data messages, then one NLMSG_ERROR whose code 0 is the acknowledgement. A code other
than 0 is raised as OSError with that errno.
"""

import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

_NLMSG: Final = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_GENL: Final = struct.Struct("=BBH")  # command, version, reserved
_ATTR: Final = struct.Struct("=HH")  # length with this header, type
_U16: Final = struct.Struct("=H")
_U32: Final = struct.Struct("=I")
_U64: Final = struct.Struct("=Q")
_ERROR: Final = struct.Struct("=i")

_NLMSG_ERROR: Final = 2
_REQUEST_ACK: Final = 1 | 4
_NETLINK_SOCK_DIAG: Final = 4
_NETLINK_GENERIC: Final = 16
_NESTED: Final = 0x8000
_TYPE_MASK: Final = 0x3FFF

_CTRL_FAMILY: Final = 16
_CTRL_GETFAMILY: Final = 3
_CTRL_ATTR_FAMILY_ID: Final = 1
_CTRL_ATTR_FAMILY_NAME: Final = 2

_SOCK_DIAG_BY_FAMILY: Final = 20
_UNIX_DIAG_REQUEST: Final = struct.Struct("=BBHIIIII")
"""Family, protocol, padding, states, inode, what to show, cookie (two words, all ones: any)."""
_UNIX_DIAG_MESSAGE_SIZE: Final = 16
_UNIX_DIAG_SHUTDOWN: Final = 6

_NBD_CONNECT: Final = 1
_NBD_DISCONNECT: Final = 2
_NBD_RECONFIGURE: Final = 3
_NBD_INDEX: Final = 1
_NBD_SIZE_BYTES: Final = 2
_NBD_BLOCK_SIZE_BYTES: Final = 3
_NBD_SERVER_FLAGS: Final = 5
_NBD_SOCKETS: Final = 7
_NBD_DEAD_CONN_TIMEOUT: Final = 8
_NBD_BACKEND_IDENTIFIER: Final = 10
_NBD_SOCK_ITEM: Final = 1
_NBD_SOCK_FD: Final = 1


def nbd_family() -> int:
    """The number of the family "nbd". FileNotFoundError: the kernel has no nbd (loaded)."""
    request = _attribute(_CTRL_ATTR_FAMILY_NAME, b"nbd\0")
    answer = _ask_generic(_CTRL_FAMILY, _CTRL_GETFAMILY, request)
    return int(_U16.unpack(answer[_CTRL_ATTR_FAMILY_ID])[0])


def nbd_connect(
    connection: socket.socket,
    size: int,
    block_size: int,
    flags: int,
    identifier: str,
    dead_conn_s: int,
    index: int | None = None,
) -> int:
    """Give the kernel a negotiated NBD connection; the index N of the /dev/nbdN that it took.

    It makes the device of the `index` asked for where there is none (EBUSY: it is connected); None
    asked for, it takes the first unused one, or makes one; all under its own lock. `size` and
    `block_size` are bytes, `flags` the server's transmission flags. `identifier` can be read in
    /sys/block/nbdN/backend for as long as the device is connected (since Linux 5.14, 6497ef8df568
    "nbd: provide a way for userspace processes to identify device backends"). For `dead_conn_s`
    seconds after the connection's end requests wait for an `nbd_reconfigure`.

    No time limit is set for an answer: a merely slow server would lose its connection by it.
    """
    answer = _ask_generic(
        nbd_family(),
        _NBD_CONNECT,
        (b"" if index is None else _attribute(_NBD_INDEX, _U32.pack(index)))
        + _attribute(_NBD_SIZE_BYTES, _U64.pack(size))
        + _attribute(_NBD_BLOCK_SIZE_BYTES, _U64.pack(block_size))
        + _attribute(_NBD_SERVER_FLAGS, _U64.pack(flags))
        + _attribute(_NBD_DEAD_CONN_TIMEOUT, _U64.pack(dead_conn_s))
        + _backend(connection, identifier),
    )
    return int(_U32.unpack(answer[_NBD_INDEX])[0])


def nbd_reconfigure(index: int, connection: socket.socket, identifier: str) -> None:
    """Give /dev/nbdN a negotiated connection in the place of its dead one; the rest stays as it was
    at `nbd_connect`, the seconds for the next dead connection too.

    `identifier` is the one given then; another, or a device that is not connected (any more):
    OSError with EINVAL. Where the kernel has not seen the end of the old connection yet it takes
    nothing, and says nothing.
    """
    _ask_generic(
        nbd_family(),
        _NBD_RECONFIGURE,
        _attribute(_NBD_INDEX, _U32.pack(index)) + _backend(connection, identifier),
    )


def nbd_disconnect(index: int) -> None:
    """End the connection of /dev/nbdN; requests under way end in EIO. Not connected: nothing."""
    _ask_generic(nbd_family(), _NBD_DISCONNECT, _attribute(_NBD_INDEX, _U32.pack(index)))


def unix_peer_lives(inode: int) -> bool:
    """Whether the Unix stream socket with this inode has not been shut down, by its peer's end or
    otherwise. True also where the kernel cannot tell (no unix_diag)."""
    try:
        return _shutdown(inode) == 0
    except FileNotFoundError:
        pass  # there is no such socket any more, or no unix_diag: ask for one that there is
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            _shutdown(os.fstat(probe.fileno()).st_ino)
        except OSError:
            return True
    return False


def _shutdown(inode: int) -> int:
    """Which directions of a Unix socket are shut down: 0 to 3. FileNotFoundError."""
    any_state, any_cookie = 0xFFFFFFFF, 0xFFFFFFFF
    request = _UNIX_DIAG_REQUEST.pack(
        socket.AF_UNIX, 0, 0, any_state, inode, 0, any_cookie, any_cookie
    )
    answer = _ask(_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, request, header=_UNIX_DIAG_MESSAGE_SIZE)
    return answer[_UNIX_DIAG_SHUTDOWN][0]


def _backend(connection: socket.socket, identifier: str) -> bytes:
    """The attributes that say what is behind a device."""
    item = _attribute(_NBD_SOCK_FD, _U32.pack(connection.fileno()))
    sockets = _attribute(_NBD_SOCK_ITEM | _NESTED, item)
    name = os.fsencode(identifier) + b"\0"
    return _attribute(_NBD_SOCKETS | _NESTED, sockets) + _attribute(_NBD_BACKEND_IDENTIFIER, name)


def _ask_generic(family: int, command: int, attributes: bytes) -> dict[int, bytes]:
    body = _GENL.pack(command, 1, 0) + attributes
    return _ask(_NETLINK_GENERIC, family, body, header=_GENL.size)


def _ask(protocol: int, kind: int, body: bytes, *, header: int) -> dict[int, bytes]:
    """Send one message and wait for its acknowledgement; the attributes that the answer has after
    its `header` bytes."""
    message = _NLMSG.pack(_NLMSG.size + len(body), kind, _REQUEST_ACK, 1, 0) + body
    answer: dict[int, bytes] = {}
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, protocol) as netlink:
        netlink.sendto(message, (0, 0))
        while True:
            for answered, payload in _messages(netlink.recv(65536)):
                if answered == _NLMSG_ERROR:
                    (code,) = _ERROR.unpack_from(payload)
                    if code:
                        raise OSError(-code, os.strerror(-code))
                    return answer
                answer.update(_attributes(payload[header:]))


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, payload) of each message in a datagram."""
    while data:
        length, kind, _flags, _sequence, _port = _NLMSG.unpack_from(data)
        yield kind, data[_NLMSG.size : length]
        data = data[_aligned(length) :]


def _attributes(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(type, value) of each attribute."""
    while data:
        length, kind = _ATTR.unpack_from(data)
        yield kind & _TYPE_MASK, data[_ATTR.size : length]
        data = data[_aligned(length) :]


def _attribute(kind: int, value: bytes) -> bytes:
    length = _ATTR.size + len(value)
    return _ATTR.pack(length, kind) + value + bytes(_aligned(length) - length)


def _aligned(length: int) -> int:
    return (length + 3) & ~3

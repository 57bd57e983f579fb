"""The client's side of the handshake, just enough to hand a negotiated socket to the kernel.

nbd.ko cannot negotiate: it wants a connected socket that is in transmission already, with simple
replies. So nothing is asked for here that would change the replies.

Promises: no byte after the handshake's last is read from the socket. A server that does not answer,
or not in NBD, raises ServerFailed; one that does not have the export, BadValue.
Assumes a connected blocking socket; a time-out set on it holds for each step.
"""

import socket
from struct import Struct
from typing import Any

from zramd.errors import BadValue, ServerFailed
from zramd.nbd import wire
from zramd.nbd.wire import ExportInfo, Malformed

_MAX_REPLY = 64 << 10


def negotiate(sock: socket.socket, export: str) -> ExportInfo:
    """Brings `sock` into transmission on `export` and tells what the server said of it."""
    try:
        return _negotiate(sock, export)
    except (OSError, EOFError, Malformed) as error:
        raise ServerFailed(f"the NBD handshake failed: {error}") from error


def _negotiate(sock: socket.socket, export: str) -> ExportInfo:
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    magic, style, offered = _receive_struct(sock, wire.GREETING)
    if (magic, style) != (wire.NBDMAGIC, wire.IHAVEOPT):
        old = style == wire.OLDSTYLE_MAGIC
        raise Malformed("the server speaks oldstyle NBD" if old else "this is no NBD server")
    known = wire.NBD_FLAG_FIXED_NEWSTYLE | wire.NBD_FLAG_NO_ZEROES
    sock.sendall(wire.CLIENT_FLAGS.pack(offered & known))
    if offered & wire.NBD_FLAG_FIXED_NEWSTYLE:
        info = _maybe_go(sock, export)
        if info is not None:
            return info
    return _export_name(sock, export, padded=not offered & wire.NBD_FLAG_NO_ZEROES)


def _maybe_go(sock: socket.socket, export: str) -> ExportInfo | None:
    """NBD_OPT_GO; None where the server does not know that option."""
    go = wire.pack_go(export, (wire.NBD_INFO_BLOCK_SIZE,))
    sock.sendall(wire.pack_option(wire.NBD_OPT_GO, go))
    told: dict[int, tuple[int, ...]] = {}
    while True:  # servers may send information that nobody asked for
        magic, option, reply, length = _receive_struct(sock, wire.OPTION_REPLY)
        if magic != wire.NBD_OPT_REPLY_MAGIC or option != wire.NBD_OPT_GO:
            raise Malformed("that is no reply to NBD_OPT_GO")
        if length > _MAX_REPLY:
            raise Malformed(f"a reply of {length} bytes")
        data = _receive(sock, length)
        if reply == wire.NBD_REP_INFO:
            info, numbers = wire.parse_info(data)
            told[info] = numbers
        elif reply == wire.NBD_REP_ACK:
            if wire.NBD_INFO_EXPORT not in told:
                raise Malformed("the server did not tell the export's size")
            size, flags = told[wire.NBD_INFO_EXPORT]
            if wire.NBD_INFO_BLOCK_SIZE not in told:
                return ExportInfo(size, flags)
            minimum, preferred, payload = told[wire.NBD_INFO_BLOCK_SIZE]
            return ExportInfo(size, flags, minimum, preferred, payload)
        elif reply == wire.NBD_REP_ERR_UNSUP:
            return None
        elif reply == wire.NBD_REP_ERR_UNKNOWN:
            raise _no_export(export, _said(data))
        else:
            why = _said(data) or f"NBD reply {reply:#x}"
            raise ServerFailed(f"the server does not serve {export!r}: {why}")


def _export_name(sock: socket.socket, export: str, *, padded: bool) -> ExportInfo:
    sock.sendall(wire.pack_option(wire.NBD_OPT_EXPORT_NAME, export.encode()))
    try:
        size, flags = _receive_struct(sock, wire.EXPORT_NAME_REPLY)
    except (EOFError, ConnectionError):
        # All that a server can do to say no to this option.
        raise _no_export(export, "it closed the connection") from None
    if padded:
        _receive(sock, len(wire.EXPORT_NAME_ZEROES))
    return ExportInfo(size, flags)


def _said(raw: bytes) -> str:
    """What a server says, as one line that nobody's terminal obeys."""
    text = raw[: wire.NBD_MAX_STRING].decode(errors="replace")
    return "".join(each if each.isprintable() else " " for each in text)


def _no_export(export: str, why: str) -> BadValue:
    return BadValue(f"the server has no export {export!r}" + (f": {why}" if why else ""))


def _receive_struct(sock: socket.socket, layout: Struct) -> tuple[Any, ...]:
    return layout.unpack(_receive(sock, layout.size))


def _receive(sock: socket.socket, size: int) -> bytes:
    """Exactly `size` bytes; the kernel gets all that follow."""
    data = bytearray()
    while len(data) < size:
        piece = sock.recv(size - len(data))
        if not piece:
            raise EOFError("the server closed the connection")
        data += piece
    return bytes(data)

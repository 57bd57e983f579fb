"""A small NBD server over a file of pages: what one that was killed has taken, the next one serves.

    python page_server.py SOCKET FILE

It stands in for a server whose pages outlive it, whatever that one is made of. One thread for each
connection, requests in their order. The file is to lie on a tmpfs. Nothing is at SOCKET before.
SIGHUP ends all connections, and is sooner done than a kill and a new start.
"""

import mmap
import os
import signal
import socket
import struct
import sys
import threading
import weakref

from zramd.nbd import wire

_FLAGS = (
    wire.NBD_FLAG_HAS_FLAGS
    | wire.NBD_FLAG_SEND_FLUSH
    | wire.NBD_FLAG_SEND_FUA
    | wire.NBD_FLAG_SEND_TRIM
)
_READ, _WRITE, _DISCONNECT, _TRIM = 0, 1, 2, 4
_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, type, handle, offset, length
_REPLY = struct.Struct(">IIQ")
_REPLY_MAGIC = 0x67446698
_HANGUP = {signal.SIGHUP}


def _receive(connection: socket.socket, size: int) -> bytes:
    data = connection.recv(size, socket.MSG_WAITALL) if size else b""
    if len(data) < size:
        raise EOFError
    return data


def _serve(connection: socket.socket, pages: mmap.mmap) -> None:
    try:
        # Not fixed newstyle, so that EXPORT_NAME is all that a client can ask for.
        connection.sendall(wire.GREETING.pack(wire.NBDMAGIC, wire.IHAVEOPT, 2))
        _receive(connection, wire.CLIENT_FLAGS.size)
        _magic, _option, length = wire.OPTION.unpack(_receive(connection, wire.OPTION.size))
        _receive(connection, length)
        connection.sendall(wire.EXPORT_NAME_REPLY.pack(len(pages), _FLAGS))
        while True:
            request = _receive(connection, _REQUEST.size)
            _magic, _flags, kind, handle, offset, length = _REQUEST.unpack(request)
            answer = b""
            if kind == _READ:
                answer = pages[offset : offset + length]
            elif kind == _WRITE:
                pages[offset : offset + length] = _receive(connection, length)
            elif kind == _TRIM:
                pages[offset : offset + length] = bytes(length)
            elif kind == _DISCONNECT:
                return
            connection.sendall(_REPLY.pack(_REPLY_MAGIC, 0, handle) + answer)
    except (EOFError, OSError):
        pass
    finally:
        connection.close()


def main(path: str, file: str) -> None:
    with open(file, "r+b") as opened:
        pages = mmap.mmap(opened.fileno(), 0)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}.new")
    listening.listen()
    os.rename(f"{path}.new", path)  # who sees it can connect
    connections = weakref.WeakSet[socket.socket]()

    def end_all_on_hangup() -> None:
        while True:
            signal.sigwait(_HANGUP)
            for connection in list(connections):
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # it has ended by itself

    # A handler would wait for accept() to return where the signal comes just before it.
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANGUP)
    threading.Thread(target=end_all_on_hangup, daemon=True).start()
    while True:
        connection, _ = listening.accept()
        connections.add(connection)
        threading.Thread(target=_serve, args=(connection, pages), daemon=True).start()


if __name__ == "__main__":
    main(*sys.argv[1:])

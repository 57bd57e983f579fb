"""One client on a process's own stdin and stdout, as inetd(8) and its like start a server.

    taken = take()                      # before anything is said, and before there are threads
    sock, drained = connected(taken)    # for Server.serve
    drained()                           # when the connection has gone

Promise: nothing but NBD is written to that stdout. From `take` on the process has other ones: what
is printed goes to stderr, and nowhere where stderr is the client too, as inetd has it.

stdin and stdout are one stream socket, or two of anything that can be read and written, such as
pipes; these are copied to and from a socket, by two threads.
"""

import fcntl
import os
import socket
import stat
import threading
from collections.abc import Callable
from typing import Final, NamedTuple

from zramd.errors import BadValue
from zramd.nbd.address import Address, address_of

_CHUNK: Final = 256 << 10
_DRAINED_S: Final = 10.0
"""How long who reads our stdout may take for what is left, as for a connection's last replies."""

_HINT: Final = "have a client, a super-server such as inetd or systemd, or a shell's pipe start it"


class Taken(NamedTuple):
    """Descriptors; one socket may be both."""

    stdin: int
    stdout: int


def take() -> Taken:
    """Raises BadValue for what is no client; then nothing has changed."""
    try:
        states = [os.fstat(descriptor) for descriptor in (0, 1)]
    except OSError as error:
        raise BadValue("stdin or stdout is closed, and --stdio serves there", hint=_HINT) from error
    for descriptor, state in enumerate(states):
        if os.isatty(descriptor):
            raise BadValue("a terminal does not speak NBD, as --stdio does", hint=_HINT)
        if stat.S_ISSOCK(state.st_mode) and not _is_stream(descriptor):
            raise BadValue("--stdio serves on a connected stream socket, or on pipes", hint=_HINT)
    taken = Taken(*(fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 3) for descriptor in (0, 1)))
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        if any(os.path.samestat(os.fstat(2), state) for state in states):
            os.dup2(null, 2)
    except OSError:
        os.dup2(null, 2)  # it is closed, and might become anything
    os.dup2(null, 0)
    os.dup2(2, 1)
    os.close(null)
    return taken


def address(taken: Taken) -> Address | None:
    """Where a client on a socket of its own comes from; None where it is on pipes."""
    if not _is_stream(taken.stdin):
        return None
    with socket.socket(fileno=os.dup(taken.stdin)) as sock:
        return address_of(sock.family, sock.getsockname())


def connected(taken: Taken) -> tuple[socket.socket, Callable[[], None]]:
    """A socket that is the client, and what waits until all that was sent to it has gone out; that
    is to be called once the socket has been closed."""
    if os.path.samestat(os.fstat(taken.stdin), os.fstat(taken.stdout)) and _is_stream(taken.stdin):
        os.close(taken.stdout)
        return socket.socket(fileno=taken.stdin), lambda: None
    ours, theirs = socket.socketpair()
    copies = [
        threading.Thread(target=copy, args=(taken, theirs), name=f"stdio {n}", daemon=True)
        for n, copy in enumerate((_copy_in, _copy_out))
    ]
    for thread in copies:
        thread.start()
    return ours, lambda: copies[1].join(_DRAINED_S)


def _copy_in(taken: Taken, theirs: socket.socket) -> None:
    try:
        os.set_blocking(taken.stdin, True)
        while data := os.read(taken.stdin, _CHUNK):
            theirs.sendall(data)
        theirs.shutdown(socket.SHUT_WR)
    except OSError:
        _give_up(theirs)


def _copy_out(taken: Taken, theirs: socket.socket) -> None:
    try:
        os.set_blocking(taken.stdout, True)
        while data := theirs.recv(_CHUNK):
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(taken.stdout, rest) :]
    except OSError:
        _give_up(theirs)
    os.close(taken.stdout)


def _give_up(theirs: socket.socket) -> None:
    """Nobody is there any more."""
    try:
        theirs.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass


def _is_stream(descriptor: int) -> bool:
    try:
        with socket.socket(fileno=os.dup(descriptor)) as sock:
            sock.getpeername()
            return sock.type == socket.SOCK_STREAM
    except OSError:
        return False

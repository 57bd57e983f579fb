"""A client that asks for all that it can get, as a process of its own:

    python -m tests.nbd.flood SOCKET {stream|connect|secure} HELLO ASK [CA]

stream      says HELLO, then ASK again and again, and reads whatever comes
connect     says both, waits for an answer to something of it, and connects anew
secure      begins TLS, trusting CA; then, where there is a HELLO, as `stream`, else as `connect`

HELLO and ASK are files. It says so when it has begun, and goes on until it is killed.
"""

import socket
import ssl
import sys
import threading
from pathlib import Path

from tests.nbd.tls_client import secure, trusting
from zramd.nbd.address import UnixAddress

PIECE = 1 << 20


def stream(sock: socket.socket, ask: bytes) -> None:
    """TLS is not for two threads at once: there, one thing is done after the other."""
    buffer = bytearray(PIECE)
    if isinstance(sock, ssl.SSLSocket):
        sock.settimeout(0.001)
        unsent = memoryview(ask)
        while True:
            try:
                unsent = unsent[sock.send(unsent) :] or memoryview(ask)
            except TimeoutError:
                pass
            try:
                sock.recv_into(buffer)
            except TimeoutError:
                pass

    def say() -> None:
        while True:
            sock.sendall(ask)

    threading.Thread(target=say, daemon=True).start()
    while sock.recv_into(buffer):
        pass


def main(path: str, kind: str, hello_file: str, ask_file: str, ca: str = "") -> None:
    hello, ask = Path(hello_file).read_bytes(), Path(ask_file).read_bytes()
    address = UnixAddress(Path(path))
    context = trusting(Path(ca)) if ca else None
    print(flush=True)
    while True:
        if context is not None:
            sock = secure(address, context).sock
        else:
            sock = socket.socket(socket.AF_UNIX)
            sock.connect(path)
        if hello and kind != "connect":
            sock.sendall(hello)
            stream(sock, ask)
        elif kind == "connect":
            sock.sendall(hello + ask)
            heard = sock.recv(PIECE)
            while heard and b"\0\3\xe8\x89\x04\x55\x65\xa9" not in heard:
                heard = sock.recv(PIECE)
        sock.close()


if __name__ == "__main__":
    main(*sys.argv[1:])

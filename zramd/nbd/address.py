"""Where a server listens, as users type it: `unix:PATH`, `tcp:HOST:PORT` or `vsock:CID:PORT`.

Nothing here touches the file system or the network, but for `TcpAddress.is_loopback`, which may
have to ask for a name; a well-formed address may still be refused by `Server.listen`.
"""

import ipaddress
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from zramd.errors import BadValue

UNIX_PATH_MAX = 107
"""Bytes in sockaddr_un.sun_path less its terminating zero (unix(7))."""

_HINT = (
    "give unix:PATH, tcp:HOST:PORT or vsock:CID:PORT, such as tcp:127.0.0.1:10809,"
    " tcp:[::1]:10809 or vsock:any:10809"
)

_MOST_VSOCK: Final = 0xFFFFFFFE
"""Of both numbers; the next one stands for any."""

CIDS: Final = {
    "any": socket.VMADDR_CID_ANY,
    "local": 1,  # VMADDR_CID_LOCAL, which Python has no name for
    "host": socket.VMADDR_CID_HOST,
}
"""Names of context identifiers (vsock(7)): every one that we have, loopback, and a guest's host."""


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def uri(self, export: str = "", *, tls: bool = False) -> str:
        """What NBD clients call this address (doc/uri.md)."""
        scheme = "nbds" if tls else "nbd"
        return f"{scheme}+unix:///{quote(export, safe='')}?socket={quote(str(self.path))}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    """A name or a number; IPv6 without brackets."""
    port: int
    """0 lets the kernel choose."""

    def __str__(self) -> str:
        return f"tcp:{self._authority}"

    def uri(self, export: str = "", *, tls: bool = False) -> str:
        """What NBD clients call this address (doc/uri.md)."""
        return f"{'nbds' if tls else 'nbd'}://{self._authority}/{quote(export, safe='')}"

    def is_loopback(self) -> bool:
        """Whether only this machine can connect. Of a name, whether that is so of all it stands
        for now; one that stands for nothing is taken for another machine's."""
        try:
            hosts = [self.host.partition("%")[0]]
            if not _is_number(hosts[0]):
                found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
                hosts = [str(name[0]) for *_, name in found]
        except (OSError, UnicodeError):
            return False
        return all(_is_loopback(host) for host in hosts)

    @property
    def _authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class VsockAddress:
    """Between a virtual machine and its host."""

    cid: int
    port: int

    def __str__(self) -> str:
        return f"vsock:{self._cid}:{self.port}"

    def uri(self, export: str = "", *, tls: bool = False) -> str:
        """What NBD clients call this address (doc/uri.md); for any, what guests call it."""
        cid = CIDS["host"] if self.cid == CIDS["any"] else self.cid
        scheme = "nbds" if tls else "nbd"
        return f"{scheme}+vsock://{cid}:{self.port}/{quote(export, safe='')}"

    @property
    def _cid(self) -> str:
        names = (name for name, cid in CIDS.items() if cid == self.cid)
        return next(names, str(self.cid))


Address = UnixAddress | TcpAddress | VsockAddress


def address_of(family: int, name: Any) -> Address:
    """What the kernel calls `name`, the end of a socket of `family`; of an abstract one, with the @
    that ss(8) shows."""
    if family == socket.AF_UNIX:
        path = os.fsdecode(name)
        return UnixAddress(Path("@" + path[1:] if path.startswith("\0") else path))
    if family == socket.AF_VSOCK:
        return VsockAddress(*name)
    return TcpAddress(name[0], name[1])


def parse_listen(text: str) -> Address:
    """The address that `text` means. Raises BadValue."""
    kind, _, rest = text.partition(":")
    if kind == "unix":
        return _unix(rest)
    if kind == "tcp":
        return _tcp(text, rest)
    if kind == "vsock":
        return _vsock(text, rest)
    raise BadValue(f"{text!r} is not an address to listen on", hint=_HINT)


def _unix(path: str) -> UnixAddress:
    if not path or "\0" in path:
        raise BadValue(f"{path!r} is not a socket's path", hint=_HINT)
    size = len(path.encode(errors="surrogateescape"))
    if size > UNIX_PATH_MAX:
        raise BadValue(
            f"the socket path {path!r} has {size} bytes; a unix socket's path has at most"
            f" {UNIX_PATH_MAX}",
            hint="choose a shorter directory, for instance through ZRAMD_RUNTIME_DIR",
        )
    return UnixAddress(Path(path))


def _tcp(text: str, rest: str) -> TcpAddress:
    host, colon, port = rest.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise BadValue(f"the IPv6 address in {text!r} needs brackets", hint=_HINT)
    if not colon or not host:
        raise BadValue(f"{text!r} does not name both host and port", hint=_HINT)
    number = _maybe_number(port)
    if not (number and number <= 65535):
        raise BadValue(f"{port!r} in {text!r} is not a port; ports are 1 to 65535", hint=_HINT)
    return TcpAddress(host, number)


def _vsock(text: str, rest: str) -> VsockAddress:
    cid, colon, port = rest.partition(":")
    if not colon or not cid:
        raise BadValue(f"{text!r} does not name both CID and port", hint=_HINT)
    number = CIDS.get(cid, _maybe_number(cid))
    if number is None:
        raise BadValue(
            f"{cid!r} in {text!r} is not a CID; those are numbers, {', '.join(CIDS)}", hint=_HINT
        )
    port_number = _maybe_number(port)
    if not port_number:
        raise BadValue(
            f"{port!r} in {text!r} is not a port; vsock's are 1 to {_MOST_VSOCK}", hint=_HINT
        )
    return VsockAddress(number, port_number)


def _maybe_number(text: str) -> int | None:
    """One that a context identifier, or a port, may be."""
    if not (text.isascii() and text.isdecimal() and len(text) <= len(str(_MOST_VSOCK))):
        return None
    return number if (number := int(text)) <= _MOST_VSOCK else None


def _is_number(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _is_loopback(host: str) -> bool:
    address = ipaddress.ip_address(host.partition("%")[0])
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback

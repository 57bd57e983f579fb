"""Where a server listens, as users type it: `unix:PATH` or `tcp:HOST:PORT`.

Nothing here touches the file system or the network; a well-formed address may still be refused by
`Server.listen`.
"""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from zramd.errors import BadValue

UNIX_PATH_MAX = 107
"""Bytes in sockaddr_un.sun_path less its terminating zero (unix(7))."""

_HINT = "give unix:PATH or tcp:HOST:PORT, such as tcp:127.0.0.1:10809 or tcp:[::1]:10809"


@dataclass(frozen=True, slots=True)
class UnixAddress:
    path: Path

    def __str__(self) -> str:
        return f"unix:{self.path}"

    def uri(self, export: str = "") -> str:
        """What NBD clients call this address (doc/uri.md)."""
        return f"nbd+unix:///{quote(export, safe='')}?socket={quote(str(self.path))}"


@dataclass(frozen=True, slots=True)
class TcpAddress:
    host: str
    """A name or a number; IPv6 without brackets."""
    port: int
    """0 lets the kernel choose."""

    def __str__(self) -> str:
        return f"tcp:{self._authority}"

    def uri(self, export: str = "") -> str:
        """What NBD clients call this address (doc/uri.md)."""
        return f"nbd://{self._authority}/{quote(export, safe='')}"

    @property
    def _authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


Address = UnixAddress | TcpAddress


def parse_listen(text: str) -> Address:
    """The address that `text` means. Raises BadValue."""
    kind, _, rest = text.partition(":")
    if kind == "unix":
        return _unix(rest)
    if kind == "tcp":
        return _tcp(text, rest)
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
    if not (port.isascii() and port.isdecimal() and 1 <= int(port) <= 65535):
        raise BadValue(f"{port!r} in {text!r} is not a port; ports are 1 to 65535", hint=_HINT)
    return TcpAddress(host, int(port))

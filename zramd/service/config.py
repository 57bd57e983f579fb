"""What a device is to be: said on the command line, or in its file /etc/zramd/NAME.toml.

    read(file) -> Config                    # raises BadValue for the first that is wrong in it
    faults(file) -> list[BadValue]          # all that is wrong in it, by line

Every fault begins with FILE:LINE: and says in one line what is allowed.
"""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias

from zramd import sizes
from zramd.errors import BadValue
from zramd.nbd.address import Address, TcpAddress, UnixAddress, parse_listen
from zramd.service.runtime import check_name
from zramd.store import PAGE

Use: TypeAlias = Literal["swap", "mount"]
TlsMode: TypeAlias = Literal["off", "on", "require"]


MOST_CONNECTIONS: Final = 1 << 20
"""As many descriptors as a process may have (sysctl fs.nr_open)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """One device. Sizes are bytes; None is the default. The fields are the keys of the file."""

    disksize: int | None
    """None where that is found in what there is: an arena, a snapshot."""
    comp_algorithm: str | None = None
    mem_limit: int | None = None
    prealloc: bool | None = None
    """Take all of mem_limit at once; the default is to do that for swap."""
    arena: Path | None = None
    """The file in which to keep the pages, and not in memory."""
    listen: tuple[Address, ...] = ()
    """Where to serve it besides its own socket."""
    tls: TlsMode = "off"
    """On: for clients that ask for it; on the device's own socket it is never required."""
    tls_certificates: Path | None = None
    """The directory that has them (zramd/nbd/tls.py)."""
    tls_verify_peer: bool = False
    tls_psk: Path | None = None
    """Keys that both sides have beforehand, in the place of certificates."""
    allow_plain_tcp: bool = False
    """Serve other machines without requiring TLS."""
    read_only: bool = False
    max_connections: int | None = None
    """None: as many as fit the limit of descriptors (zramd/nbd/server.py)."""
    node: str | None = None
    """The nbd device to attach it as; None: the first that is free."""
    use: Use | None = None
    """What it will carry; the server is hardened for it (hardening.py)."""
    swap_priority: int | None = None
    mount_point: Path | None = None
    fs_type: str | None = None
    allow_deadlock: bool = False
    """Serve it for swap even where the process cannot be hardened."""

    def __post_init__(self) -> None:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        for _, fault in _senseless(given):
            raise fault

    @property
    def reserves(self) -> bool:
        """Whether mem_limit is taken at once."""
        return self.use == "swap" if self.prealloc is None else self.prealloc

    @property
    def reservation(self) -> int:
        """How much of it is taken at once, as the device rounds it: of 0, as of None, the default;
        0 where it is not."""
        if not self.reserves:
            return 0
        from zramd.store.arena import default_mem_limit  # which few verbs need

        return _pages(self.mem_limit or default_mem_limit(_pages(self.disksize or 0)))

    @property
    def content(self) -> str | None:
        """What its node is to hold: "swap", or a type of file system; None: whatever it may be."""
        return self.fs_type or "ext4" if self.use == "mount" else self.use


def directory() -> Path:
    """Where the files are: $ZRAMD_CONFIG_DIR, else /etc/zramd."""
    return Path(os.environ.get("ZRAMD_CONFIG_DIR") or "/etc/zramd")


def path_of(name: str) -> Path:
    """The file of the device `name`, whether or not it exists; BadValue for the name."""
    return directory() / f"{check_name(name)}.toml"


def check_node(node: str) -> str:
    """`node` itself when it can be asked for; else BadValue."""
    if re.fullmatch(r"/dev/nbd(0|[1-9]\d{0,5})", node, re.ASCII) is None:
        raise BadValue(f"{node!r} is not an nbd device", hint="use one such as /dev/nbd0")
    return node


def read(file: Path) -> Config:
    """The device that `file` describes. BadValue: the first fault, and how many there are."""
    config, wrong = _examine(file)
    if config is not None:
        return config
    first, *more = wrong
    if not more:
        raise first
    count = f"and {len(more)} more: zramd check-config {file}"
    raise BadValue(first.message, hint=count if first.hint is None else f"{first.hint}; {count}")


def faults(file: Path) -> list[BadValue]:
    """All that is wrong with the file; nothing where `read` would succeed."""
    return _examine(file)[1]


def _examine(file: Path) -> tuple[Config | None, list[BadValue]]:
    """The configuration, or why there is none."""
    try:
        text = _text(file)
        found = _parse(file, text)
    except BadValue as fault:
        return None, [fault]
    values: dict[str, Any] = {}
    wrong: list[tuple[str, BadValue]] = []  # with the key that it is about
    for key, value in found.items():
        try:
            values[key] = _parser(key)(value)
        except BadValue as fault:
            wrong.append((key, BadValue(f"{key}: {fault.message}", hint=fault.hint)))
    if "disksize" not in found:
        hint = 'add a line such as disksize = "1G"'
        wrong.append(("", BadValue("a disksize is missing", hint=hint)))
    wrong += _clashes(values, set(found))
    if not wrong:
        return Config(**values), []
    line_of, end = _lines(text), _count_lines(text)
    told = [(line_of.get(key, end), fault) for key, fault in wrong]
    told.sort(key=lambda one: one[0])
    return None, [
        BadValue(f"{file}:{line}: {fault.message}", hint=fault.hint) for line, fault in told
    ]


def _text(file: Path) -> str:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise BadValue(f"{file} cannot be read: {error.strerror}") from error
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise BadValue(f"{file}:{line}: this is not UTF-8", hint="save it in UTF-8") from error


def _parse(file: Path, text: str) -> dict[str, object]:
    import tomllib  # 15 ms that a device without a file need not pay

    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise BadValue(f"{file}:1: lists or tables lie in each other too deep") from error
    except ValueError as error:  # a TOMLDecodeError; of a number with 5000 digits, another
        # "MESSAGE (at line 3, column 7)", or "(at end of document)"
        message, _, place = str(error).partition(" (at ")
        number = re.match(r"line (\d+)", place)
        line = int(number[1]) if number else _count_lines(text)
        raise BadValue(
            f"{file}:{line}: {message}",
            hint='a line is as in disksize = "1G", sizes and words in quotes',
        ) from error


def _count_lines(text: str) -> int:
    return text.rstrip().count("\n") + 1


def _lines(text: str) -> dict[str, int]:
    """The line on which each key begins.

    tomllib tells none. But what begins on a line is complete at the first line up to which it can
    be parsed by itself, and there the next one begins; whatever its strings look like. Keys in
    tables are among them, after all others: they hide none.
    """
    import tomllib

    found: dict[str, int] = {}
    lines = text.split("\n")
    begin = 0
    for end in range(1, len(lines) + 1):
        statement = "\n".join(lines[begin:end]).strip()
        try:
            keys = tomllib.loads(statement)
        except ValueError:
            continue  # in the middle of it
        for key in keys:
            found.setdefault(key, begin + 1)
        begin = end
    return found


def _parser(key: str) -> Callable[[Any], object]:
    """What makes the field of a value that TOML gives; raises BadValue for this and for the key."""
    parser = _PARSERS.get(key)
    if parser is None:
        import difflib

        near = difflib.get_close_matches(key, _PARSERS, 1)
        raise BadValue(
            "there is no such key",
            hint=f"do you mean {near[0]}?" if near else f"there are {', '.join(_PARSERS)}",
        )
    return parser


def _clashes(values: dict[str, Any], found: set[str]) -> Iterator[tuple[str, BadValue]]:
    """What is wrong with good values together; `found` are the keys of the bad ones too."""
    if "use" in found and "use" not in values:
        return  # what goes with it cannot be told
    use = values.get("use")
    for key, its_use in (("swap_priority", "swap"), ("mount_point", "mount"), ("fs_type", "mount")):
        if key in found and use != its_use:
            hint = f'leave it out, or add use = "{its_use}"' if use is None else "leave it out"
            yield key, BadValue(f'{key} goes with use = "{its_use}"', hint=hint)
    if use == "mount" and "mount_point" not in found:
        hint = 'add a line such as mount_point = "/mnt"'
        yield "use", BadValue('use = "mount" needs a mount_point', hint=hint)
    broken = {"tls", "tls_certificates", "tls_psk"} & found - values.keys()
    for key, fault in _senseless(values):
        if not (broken and key.startswith(("tls", "listen"))):  # what goes with it cannot be told
            yield key, fault
    sizing = {"disksize", "mem_limit", "prealloc"} & found
    if "disksize" in sizing <= values.keys():
        from zramd.store.arena import reserved_spans

        made = Config(use=use, **{key: values[key] for key in sizing})
        try:
            if made.reserves:
                reserved_spans(_pages(values["disksize"]), made.reservation)
        except BadValue as fault:
            yield "mem_limit" if made.mem_limit else "disksize", fault


def _senseless(given: dict[str, Any]) -> Iterator[tuple[str, BadValue]]:
    """What does not go together, whoever says it; with the key that it is about. `given` are fields
    of Config, of which some may be missing."""
    use, arena = given.get("use"), given.get("arena")
    certificates, psk = given.get("tls_certificates"), given.get("tls_psk")
    tls = given.get("tls", "off")
    if use == "swap":
        for address in given.get("listen", ()):
            if not isinstance(address, UnixAddress):
                kind = "TCP" if isinstance(address, TcpAddress) else "vsock"
                yield (
                    "listen",
                    BadValue(
                        f"swap is not served on {address}: over {kind} it can deadlock",
                        hint="listen on unix:PATH only",
                    ),
                )
        if arena is not None:
            yield (
                "arena",
                BadValue(
                    f"swap is not kept in {arena}: writing to a file can take memory, and so"
                    " deadlock",
                    hint="leave the file out: swap is not needed beyond a reboot",
                ),
            )
        if given.get("read_only"):
            yield "read_only", BadValue("swap cannot be read-only", hint="leave one of them out")
    elif tls != "require" and not given.get("allow_plain_tcp"):
        for address in given.get("listen", ()):
            if isinstance(address, TcpAddress) and not address.is_loopback():
                yield (
                    "listen",
                    BadValue(
                        f"whoever reaches {address} could read and write without TLS",
                        hint="say --tls require, or --allow-plain-tcp (in a file tls, and"
                        " allow_plain_tcp), or listen on tcp:127.0.0.1:PORT",
                    ),
                )
    if tls == "off":
        for key in ("tls_certificates", "tls_verify_peer", "tls_psk"):
            if given.get(key):
                yield (
                    key,
                    BadValue(
                        f"{_option(key)} says how, and nothing says that there is to be TLS",
                        hint="add --tls require, or --tls on (in a file tls)",
                    ),
                )
    elif certificates is None and psk is None:
        yield (
            "tls",
            BadValue(
                f"tls {tls} needs certificates",
                hint="add --tls-certificates DIR (in a file tls_certificates), or --tls-psk FILE",
            ),
        )
    elif psk is not None and (certificates is not None or given.get("tls_verify_peer")):
        other = "tls_verify_peer" if certificates is None else "tls_certificates"
        yield (
            "tls_psk",
            BadValue(
                f"{_option('tls_psk')} and {_option(other)} exclude each other",
                hint="choose one of them",
            ),
        )
    elif tls == "on" and given.get("tls_verify_peer"):
        yield (
            "tls_verify_peer",
            BadValue(
                "--tls-verify-peer keeps nobody out who does without TLS",
                hint="say --tls require (in a file tls)",
            ),
        )


def _option(key: str) -> str:
    return f"--{key.replace('_', '-')}"


def _pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise _wrong(value, 'a size, such as "1G", or a number of bytes')
    return sizes.parse(str(value))


def _disksize(value: object) -> int:
    size = _size(value)
    if size == 0:
        raise BadValue("a disksize of 0 is senseless", hint="give it a size such as 1G")
    return size


def _algorithm(value: object) -> str:
    text = _string(value, '"zstd" or "zstd(level=3)"')
    from zramd.store.zcomp import Algorithm  # which loads every compressor

    Algorithm.parse(text)
    return text


def _switch(value: object) -> bool:
    if not isinstance(value, bool):
        raise _wrong(value, "true or false")
    return value


def _addresses(value: object) -> tuple[Address, ...]:
    if not isinstance(value, list):
        raise _wrong(value, 'a list, such as ["unix:/run/zram0.sock"]')
    addresses = [parse_listen(_string(item, '"unix:/run/zram0.sock"')) for item in value]
    for address in addresses:
        if isinstance(address, UnixAddress) and not address.path.is_absolute():
            raise BadValue(f"{address} is relative", hint="write the path from / on")
    return tuple(addresses)


def _node(value: object) -> str:
    return check_node(_string(value, '"/dev/nbd0"'))


def _use(value: object) -> Use:
    if value == "swap":
        return "swap"
    if value == "mount":
        return "mount"
    raise _wrong(value, '"swap" or "mount"')


def _tls(value: object) -> TlsMode:
    if value == "off":
        return "off"
    if value == "on":
        return "on"
    if value == "require":
        return "require"
    raise _wrong(value, '"off", "on" or "require"')


def _connections(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_CONNECTIONS:
        raise _wrong(value, f"a number from 1 to {MOST_CONNECTIONS}")
    return value


def _priority(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not -1 <= value <= 32767:
        raise _wrong(value, "a number from -1 to 32767")
    return value


def _path(value: object) -> Path:
    path = Path(_string(value, '"/mnt"'))
    if not path.is_absolute():
        raise BadValue(f"{str(path)!r} is relative", hint="write the path from / on")
    return path


def _fs_type(value: object) -> str:
    text = _string(value, '"ext4", "xfs" or "btrfs"')
    if re.fullmatch(r"[a-z][a-z0-9]*", text) is None:
        raise BadValue(f"{text!r} is not a file system type", hint="write ext4, xfs or btrfs")
    return text


def _string(value: object, such_as: str) -> str:
    if not isinstance(value, str):
        raise _wrong(value, f"a word in quotes, such as {such_as}")
    return value


def _wrong(value: object, allowed: str) -> BadValue:
    """A value of another kind; shown as TOML has it, as far as that is worth the room."""
    if isinstance(value, dict):
        shown = "a table"
    elif isinstance(value, list):
        shown = "a list"
    elif isinstance(value, bool):
        shown = str(value).lower()
    else:
        shown = repr(value) if isinstance(value, str) else str(value)
    return BadValue(f"{shown} is not allowed", hint=f"write {allowed}")


_PARSERS: Final[dict[str, Callable[[Any], object]]] = {
    "disksize": _disksize,
    "comp_algorithm": _algorithm,
    "mem_limit": _size,
    "prealloc": _switch,
    "arena": _path,
    "listen": _addresses,
    "tls": _tls,
    "tls_certificates": _path,
    "tls_verify_peer": _switch,
    "tls_psk": _path,
    "allow_plain_tcp": _switch,
    "read_only": _switch,
    "max_connections": _connections,
    "node": _node,
    "use": _use,
    "swap_priority": _priority,
    "mount_point": _path,
    "fs_type": _fs_type,
    "allow_deadlock": _switch,
}
"""One for each field of Config."""

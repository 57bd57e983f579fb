"""What several verbs take: kinds of values, options, and how they talk on stderr."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from zramd import sizes
from zramd.errors import BadValue, ZramdError
from zramd.nbd.address import Address, UnixAddress, parse_listen
from zramd.service import config, runtime

if TYPE_CHECKING:
    from zramd.nbd.tls import Tls

_F = TypeVar("_F", bound=Callable[..., Any])


def talk(line: str) -> None:
    """One line for the person at the terminal."""
    click.echo(f"zramd: {line}", err=True)


@contextmanager
def progress(what: str, size: int) -> Iterator[Callable[[int], None]]:
    """A bar on a terminal's stderr; what it gives is called with how many of `size` bytes are done,
    about."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=size, label=f"zramd: {what}", file=sys.stderr) as bar:
        yield lambda done: bar.update(min(done, size) - bar.pos)


class _Value(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """A value that our own code checks: BadValue names the option, and what is allowed."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return self._parse(value)
        except BadValue as error:
            if not isinstance(param, click.Option):
                raise
            raise BadValue(f"{param.opts[-1]}: {error.message}", hint=error.hint) from error


class _Completed(_Value):
    """A value whose completions can be listed."""

    def __init__(
        self, name: str, parse: Callable[[str], Any], offers: Callable[[], list[str]]
    ) -> None:
        super().__init__(name, parse)
        self._offers = offers

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        try:
            return [CompletionItem(o) for o in self._offers() if o.startswith(incomplete)]
        except ZramdError:
            return []  # a shell that completes is no place for errors


def _address(text: str) -> Address:
    """A path is made absolute: a server in the background leaves the working directory."""
    address = parse_listen(text)
    if isinstance(address, UnixAddress) and not address.path.is_absolute():
        return parse_listen(f"unix:{os.path.abspath(address.path)}")
    return address


def _absolute(text: str) -> Path:
    """A server in the background leaves the working directory."""
    return Path(os.path.abspath(text))


def _algorithms() -> list[str]:
    from zramd.store.zcomp import NAMES  # this and the next two load every compressor

    return list(NAMES)


def _readable() -> list[str]:
    from zramd.attributes import READABLE

    return list(READABLE)


def _writable() -> list[str]:
    from zramd.attributes import WRITABLE

    return list(WRITABLE)


def _file(text: str) -> Path:
    return Path(text) if "/" in text or text.endswith(".toml") else config.path_of(text)


def _configured() -> list[str]:
    return sorted(file.stem for file in config.directory().glob("*.toml"))


SIZE = _Value("size", sizes.parse)
NODE = _Value("node", config.check_node)
ADDRESS = _Value("address", _address)
FILE = _Value("file", _absolute)
NAME = _Completed("name", runtime.check_name, runtime.names)
CONFIG = _Completed("file", _file, _configured)
READABLE = _Completed("attribute", str, _readable)
WRITABLE = _Completed("attribute", str, _writable)
ALGORITHM = _Completed("algorithm", str, _algorithms)

name_argument = click.argument("name", type=NAME)

config_option = click.option(
    *("--config", "file"),
    type=FILE,
    metavar="FILE",
    help="Take the device's configuration from FILE, and not from options.",
)


def device_options(command: _F) -> _F:
    """What makes a device: --config, or the others; `config_of` makes one of what they give."""
    for option in reversed(
        [
            config_option,
            click.option(
                *("-s", "--disksize"),
                type=SIZE,
                metavar="SIZE",
                help="What the device can hold, such as 2G; K, M, G, T are powers of 1024.",
            ),
            click.option(
                *("-a", "--algorithm", "comp_algorithm"),
                type=ALGORITHM,
                metavar="ALG",
                help="lz4, lz4hc, zstd or deflate, or with a level: zstd(level=3).",
            ),
            click.option(
                "--mem-limit",
                type=SIZE,
                metavar="SIZE",
                help="The RAM that it may take; a write that would pass it fails with ENOSPC.",
            ),
            click.option(
                "--prealloc/--no-prealloc",
                default=None,
                help="Take all of mem_limit at once and lock it in memory. The default for swap,"
                " with a mem_limit of about half the disksize.",
            ),
            click.option(
                "--arena",
                type=FILE,
                metavar="FILE",
                help="Keep the pages in FILE, not in memory: what is there is served, also after a"
                " reboot, and if nothing is, it is made.",
            ),
            click.option(
                "--listen",
                type=ADDRESS,
                multiple=True,
                metavar="ADDRESS",
                help="Serve on unix:PATH, tcp:HOST:PORT or vsock:CID:PORT too. Anyone who can"
                " connect may read and write, unless there is TLS. Repeatable.",
            ),
            click.option(
                "--tls",
                type=click.Choice(["off", "on", "require"]),
                default="off",
                show_default=True,
                help="For clients that ask for it, or for all of them, but those of the device's"
                " own socket.",
            ),
            click.option(
                "--tls-certificates",
                type=FILE,
                metavar="DIR",
                help="Has server-cert.pem and server-key.pem.",
            ),
            click.option(
                "--tls-verify-peer",
                is_flag=True,
                help="Serve only clients with a certificate of DIR/ca-cert.pem.",
            ),
            click.option(
                "--tls-psk",
                type=FILE,
                metavar="FILE",
                help="Has keys, as psktool makes them, in the place of certificates.",
            ),
            click.option(
                "--allow-plain-tcp",
                is_flag=True,
                help="Serve other machines though TLS is not required.",
            ),
            click.option("--read-only", is_flag=True, help="Serve no writes."),
            click.option(
                "--max-connections",
                type=click.IntRange(1, config.MOST_CONNECTIONS),
                metavar="N",
                help="More are closed at once. The default is 1024, or what the limit of open"
                " files leaves room for.",
            ),
            click.option(
                "--allow-deadlock",
                is_flag=True,
                help="Serve swap even where the server cannot be hardened against running out of"
                " memory.",
            ),
        ]
    ):
        command = option(command)
    return command


def config_of(file: Path | None, options: dict[str, Any], *, found: bool = False) -> config.Config:
    """The device that `file` describes, or where that is None, `options`: fields of Config.
    `found`: there is something else that says its disksize."""
    if file is not None:
        return config_in(file)
    if options["disksize"] is None and options["arena"] is None and not found:
        raise BadValue(
            "neither --disksize nor --config says what to make",
            hint=f"give one of them; see `{click.get_current_context().command_path} --help`",
        )
    return config.Config(**options)


def config_in(file: Path) -> config.Config:
    """The device that `file` describes. Options that would say the same are refused."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and isinstance(option, click.Option) and option.name not in _BESIDE_A_FILE:
            said = max(option.opts, key=len)
            raise BadValue(
                f"{file} says what the device is, and {said} cannot change that",
                hint=f"change the file, or leave {said} out",
            )
    return config.read(file)


def make_tls(device: config.Config) -> "Tls | None":
    """None where it is off, and OpenSSL is not imported then. Raises BadValue."""
    if device.tls == "off":
        return None
    from zramd.nbd import tls

    return tls.make(
        required=device.tls == "require",
        certificates=device.tls_certificates,
        verify_peer=device.tls_verify_peer,
        psk=device.tls_psk,
    )


_BESIDE_A_FILE: Final = ("file", "via", "background", "restore", "stdio")
"""What options say that a file does not."""

"""What several verbs take: kinds of values, options, and how they talk on stderr."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from zramd import sizes
from zramd.errors import BadValue, ZramdError
from zramd.nbd.address import Address, UnixAddress, parse_listen
from zramd.service import runtime

_F = TypeVar("_F", bound=Callable[..., Any])


def talk(line: str) -> None:
    """One line for the person at the terminal."""
    click.echo(f"zramd: {line}", err=True)


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


def _algorithms() -> list[str]:
    from zramd.store.zcomp import NAMES  # this and the next two load every compressor

    return list(NAMES)


def _readable() -> list[str]:
    from zramd.device import READABLE

    return list(READABLE)


def _writable() -> list[str]:
    from zramd.device import WRITABLE

    return list(WRITABLE)


SIZE = _Value("size", sizes.parse)
ADDRESS = _Value("address", _address)
NAME = _Completed("name", runtime.check_name, runtime.names)
READABLE = _Completed("attribute", str, _readable)
WRITABLE = _Completed("attribute", str, _writable)
ALGORITHM = _Completed("algorithm", str, _algorithms)

name_argument = click.argument("name", type=NAME)


def device_options(command: _F) -> _F:
    """What makes a device: parameters disksize, algorithm, mem_limit and listen."""
    for option in reversed(
        [
            click.option(
                *("-s", "--disksize"),
                type=SIZE,
                required=True,
                metavar="SIZE",
                help="What the device can hold, such as 2G; K, M, G, T are powers of 1024.",
            ),
            click.option(
                *("-a", "--algorithm"),
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
                "--listen",
                type=ADDRESS,
                multiple=True,
                metavar="ADDRESS",
                help="Serve on unix:PATH or tcp:HOST:PORT too. Anyone who can connect may read"
                " and write. Repeatable.",
            ),
        ]
    ):
        command = option(command)
    return command

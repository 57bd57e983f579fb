"""zramd list: the devices and their figures, as a table, raw, or JSON."""

import json
from collections.abc import Sequence

import click
from click.shell_completion import CompletionItem

from zramd import sizes
from zramd.cli.columns import COLUMNS, DEFAULT, Column, Device
from zramd.cli.options import talk
from zramd.errors import BadValue
from zramd.service import runtime
from zramd.statistics import Statistics

_BY_NAME = {column.name: column for column in COLUMNS}


class _Columns(click.ParamType):  # type: ignore[type-arg]  # generic only since click 8.2
    """A list as zramctl takes it: COL,COL,... or +COL,COL,... for the default ones and these."""

    name = "columns"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Column]:
        asked = [word.strip().upper() for word in value.removeprefix("+").split(",")]
        unknown = [word for word in asked if word not in _BY_NAME]
        if unknown:
            raise BadValue(
                f"--output: there is no column {unknown[0]!r}",
                hint=f"choose from {', '.join(_BY_NAME)}",
            )
        before = DEFAULT if value.startswith("+") else ()
        return [_BY_NAME[word] for word in (*before, *asked)]

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        start, last = _split_last(incomplete)
        return [CompletionItem(start + n) for n in _BY_NAME if n.startswith(last.upper())]


def _split_last(text: str) -> tuple[str, str]:
    """What stands before the last word of a column list, and that word."""
    cut = max(text.rfind(","), text.rfind("+")) + 1
    return text[:cut], text[cut:]


_EPILOG = "\b\nColumns:\n" + "\n".join(f"  {c.name:10}  {c.meaning}" for c in COLUMNS)


@click.command(epilog=_EPILOG)
@click.option("-J", "--json", "as_json", is_flag=True, help="JSON, sizes in bytes; all columns.")
@click.option("-b", "--bytes", "in_bytes", is_flag=True, help="Sizes in bytes.")
@click.option("-n", "--noheadings", is_flag=True, help="No headings, and no closing sentence.")
@click.option("--raw", is_flag=True, help="One space between columns, for scripts.")
@click.option("-o", "--output", type=_Columns(), metavar="[+]COLUMNS", help="Which columns.")
@click.option("--output-all", is_flag=True, help="All columns.")
def command(
    as_json: bool,
    in_bytes: bool,
    noheadings: bool,
    raw: bool,
    output: list[Column] | None,
    output_all: bool,
) -> None:
    """List the devices. Options and columns are those of zramctl.

    The keys of the JSON are the columns' names in small letters, with _ for -; what is not known
    is null. Keys may be added in later versions; "schema" changes when one changes its meaning.
    """
    devices = [Device.look(name) for name in runtime.names()]
    columns: Sequence[Column] = output or [_BY_NAME[name] for name in DEFAULT]
    if output_all or (as_json and output is None):
        columns = COLUMNS
    if as_json:
        click.echo(_json(devices, columns))
        return
    rows = [[c.text(device, in_bytes=in_bytes) for c in columns] for device in devices]
    headings = [] if noheadings else [[c.name for c in columns]]
    if raw:
        for row in headings + rows:
            click.echo(" ".join(cell.replace(" ", "\\x20") for cell in row))
    elif devices:
        for line in _table(headings + rows, columns):
            click.echo(line)
        if not noheadings:
            _close(devices)
    else:
        talk(f"no devices in {runtime.runtime_dir()}; `zramd up NAME --disksize SIZE` makes one")


def _json(devices: list[Device], columns: Sequence[Column]) -> str:
    rows = [{c.key: c.value(device) for c in columns} for device in devices]
    return json.dumps({"schema": 1, "devices": rows}, indent=2)


def _table(rows: list[list[str]], columns: Sequence[Column]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return [
        " ".join(
            cell.ljust(width) if column.kind == "text" else cell.rjust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in rows
    ]


def _close(devices: list[Device]) -> None:
    """What the figures mean, for all devices together, and who tells none."""
    known = [device.now for device in devices if device.now is not None]
    if known:
        click.echo(_sentence(known))
    for device in devices:
        if device.state == "dead":
            talk(
                f"{device.name} has lost its server; `zramd down {device.name}` clears what is left"
            )
        elif device.state == "silent":
            talk(f"the server of {device.name} does not answer")


def _sentence(known: list[Statistics]) -> str:
    data = sum(now.orig_data_size for now in known)
    total = sum(now.mem_used_total for now in known)
    limit = sizes.human(sum(now.disksize for now in known))
    saving = f" (saving {sizes.human(data - total)})" if data > total else ""
    who = "device" if len(known) == 1 else "devices"
    return (
        f"{sizes.human(data)} of pages are stored in {sizes.human(total)} of RAM{saving};"
        f" the {who} can hold {limit}."
    )

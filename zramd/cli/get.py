"""zramd get: one attribute of a device, as reading its file in sysfs would give it."""

import click

from zramd.cli.options import READABLE, name_argument
from zramd.control.client import Control
from zramd.service.runtime import Paths


@click.command()
@name_argument
@click.argument("attribute", type=READABLE)
def command(name: str, attribute: str) -> None:
    """Print ATTRIBUTE of the device NAME, in zram's format."""
    with Control(Paths(name).control_socket) as control:
        click.echo(control.get(attribute))

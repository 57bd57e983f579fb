"""zramd set: write one attribute of a device, as writing its file in sysfs would."""

import click

from zramd.cli.options import WRITABLE, name_argument
from zramd.control.client import Control
from zramd.service.runtime import Paths


@click.command()
@name_argument
@click.argument("attribute", type=WRITABLE)
@click.argument("value")
def command(name: str, attribute: str, value: str) -> None:
    """Write VALUE to ATTRIBUTE of the device NAME, in zram's format."""
    with Control(Paths(name).control_socket) as control:
        control.set(attribute, value)

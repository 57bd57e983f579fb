"""zramd reset: drop a device's pages and its disksize; the server stays."""

import click

from zramd.cli.options import name_argument
from zramd.control.client import Control
from zramd.errors import DeviceBusy
from zramd.kernel import attach
from zramd.service.runtime import Paths


@click.command()
@name_argument
@click.option("--force", is_flag=True, help="Even while it is in use: its connections end.")
def command(name: str, force: bool) -> None:
    """Drop all pages of the device NAME, and its disksize. Refused while it is in use.

    `zramd set NAME disksize SIZE` makes it usable again.
    """
    attachment = attach.attached(name)
    if attachment is not None and not force:
        raise DeviceBusy(
            f"{name} is attached as {attachment.node}",
            hint=f"detach it first: zramd detach {name}",
        )
    with Control(Paths(name).control_socket) as control:
        control.reset(force=force)

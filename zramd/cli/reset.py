"""zramd reset: drop a device's pages and its disksize; the server stays."""

import click

from zramd.cli.options import name_argument, talk
from zramd.control.client import Control
from zramd.errors import DeviceBusy
from zramd.kernel import attach
from zramd.service.runtime import Paths


@click.command()
@name_argument
@click.option(
    "--force",
    is_flag=True,
    help="Even while it is in use: what is under way is finished, all that comes after fails,"
    " and the connections end.",
)
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

    def waiting(in_flight: tuple[str, ...]) -> None:
        if in_flight:
            talk(f"{name} waits for requests of {', '.join(in_flight)}")

    with Control(Paths(name).control_socket) as control:
        control.reset(force=force, waiting=waiting)
    if attachment is not None and attachment == attach.attached(name):
        talk(f"{attachment.node} gives errors from now on; `zramd down {name}` clears it")
        # The server ends its connections by itself, but only the kernel can end its own for sure.
        attach.cut(attachment)

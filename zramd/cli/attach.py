"""zramd attach: make the kernel's block device node of a served device."""

import click

from zramd.cli.options import name_argument, talk
from zramd.kernel import attach
from zramd.service.runtime import Paths


@click.command()
@name_argument
@click.option("--via", type=click.Choice(["nbd", "loop"]), help="How; nbd where the kernel can.")
def command(name: str, via: attach.Via | None) -> None:
    """Attach the device NAME as a block device; prints the device node.

    `nbd` is the kernel's own NBD client; `loop` is nbdfuse and a loop device, for kernels without
    nbd. A device that is attached already keeps its node.
    """
    attachment = attach.attach(name, Paths(name).nbd_socket, name, via)
    talk(f"{name} is attached through {attachment.via}")
    click.echo(attachment.node)

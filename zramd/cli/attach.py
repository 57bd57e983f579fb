"""zramd attach: make the kernel's block device node of a served device."""

import contextlib
from functools import partial
from pathlib import Path

import click

from zramd.cli.options import NODE, config_in, config_option, name_argument, talk
from zramd.kernel import attach, tools, use
from zramd.service.runtime import Paths


@click.command()
@name_argument
@config_option
@click.option("--via", type=click.Choice(["nbd", "loop"]), help="How; nbd where the kernel can.")
@click.option("--node", type=NODE, metavar="/dev/nbdN", help="Which; the first free one if not.")
def command(name: str, file: Path | None, via: attach.Via | None, node: str | None) -> None:
    """Attach the device NAME as a block device; prints the device node.

    `nbd` is the kernel's own NBD client; `loop` is nbdfuse and a loop device, for kernels without
    nbd. A device that is attached already keeps its node.

    With --config it gets the node that FILE names, and is made ready for what FILE says it is for:
    swap space or a file system is made on it if it is blank. Swapping on it, or mounting it, is
    left to the units that do that.
    """
    config = None if file is None else config_in(file)
    if config is not None:
        node = config.node
    before = attach.attached(name)
    attachment = attach.attach(name, Paths(name).nbd_socket, name, via, node)
    talk(f"{name} is attached through {attachment.via}")
    if config is not None and config.content is not None:
        detach = partial(attach.detach, name)
        with tools.undone(detach) if before is None else contextlib.nullcontext():
            if config.use == "swap":
                changed = use.prepare_for_swap(
                    name, attachment.via, allow_deadlock=config.allow_deadlock
                )
                if changed is not None:
                    talk(changed)
            use.format(attachment.node, config.content)
        talk(f"{attachment.node} is ready: it holds {config.content}")
    click.echo(attachment.node)

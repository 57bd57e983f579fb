"""zramd serve: one device in the foreground, until SIGTERM, SIGINT or `zramd down`."""

import logging

import click

from zramd.cli.options import device_options, name_argument, talk
from zramd.nbd.address import Address
from zramd.service import worker


@click.command()
@name_argument
@device_options
@click.option("--background", is_flag=True, hidden=True, help="How `zramd up` starts it.")
def command(
    name: str,
    disksize: int,
    algorithm: str | None,
    mem_limit: int | None,
    listen: tuple[Address, ...],
    background: bool,
) -> None:
    """Serve the device NAME over NBD, in the foreground.

    It listens on NAME/nbd.sock in the runtime directory: $ZRAMD_RUNTIME_DIR, else /run/zramd for
    root, else $XDG_RUNTIME_DIR/zramd. Export names are NAME and the empty one. SIGTERM and SIGINT
    end it, and its pages with it, even while clients are connected; `zramd down` asks first.
    """
    form = "%(asctime)s %(levelname)s %(message)s" if background else "zramd: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form)
    zram = worker.build(name, disksize, algorithm=algorithm, mem_limit=mem_limit)
    if zram.disksize != disksize:
        talk(f"--disksize {disksize} is no multiple of a page: made it {zram.disksize} bytes")
    worker.run(zram, listen, background=background)

"""zramd serve: one device in the foreground, until SIGTERM, SIGINT or `zramd down`."""

import logging
from pathlib import Path
from typing import Any

import click

from zramd import sizes
from zramd.cli.options import config_of, device_options, name_argument, talk
from zramd.service import worker
from zramd.service.runtime import claim


@click.command()
@name_argument
@device_options
@click.option(
    *("--for", "use"),
    type=click.Choice(["swap", "mount"]),
    help="What it will carry: the server is hardened for that. For swap it must succeed.",
)
@click.option("--background", is_flag=True, hidden=True, help="How `zramd up` starts it.")
def command(name: str, file: Path | None, background: bool, **options: Any) -> None:
    """Serve the device NAME over NBD, in the foreground.

    It listens on NAME/nbd.sock in the runtime directory: $ZRAMD_RUNTIME_DIR, else /run/zramd for
    root, else $XDG_RUNTIME_DIR/zramd. Export names are NAME and the empty one. SIGTERM and SIGINT
    end it, and its pages with it, even while clients are connected; `zramd down` asks first.
    """
    form = "%(asctime)s %(levelname)s %(message)s" if background else "zramd: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form)
    config = config_of(file, options)
    with claim(name) as held:  # first: who is refused has taken no memory
        zram, missing = worker.build(name, config)
        for what in missing:
            talk(f"{name} can do without, but had better have, {what}")
        if zram.disksize != config.disksize:
            made = f"made it {zram.disksize} bytes"
            talk(f"a disksize of {config.disksize} is no multiple of a page: {made}")
        reserved = zram.statistics().mem_reserved
        if reserved:
            talk(f"{sizes.human(reserved)} of RAM are reserved for {name}")
        worker.run(zram, config, held, background=background)

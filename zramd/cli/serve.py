"""zramd serve: one device in the foreground, until SIGTERM, SIGINT or `zramd down`."""

import io
import logging
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final

import click

from zramd import sizes, without_ssl  # noqa: F401 - it is what it does that counts
from zramd.cli.options import FILE, config_of, device_options, name_argument, talk
from zramd.errors import ZramdError
from zramd.kernel import attach
from zramd.service import handover, hardening, systemd, worker
from zramd.service.candidate import stand_by
from zramd.service.config import Config
from zramd.service.runtime import claim, stay_there
from zramd.service.supervisor import rehearse, supervise

_DYING_S: Final = 60.0
"""A worker whose supervisor has died dies with it, as soon as its last request lets it."""


@click.command()
@name_argument
@device_options
@click.option(
    *("--for", "use"),
    type=click.Choice(["swap", "mount"]),
    help="What it will carry: the server is hardened for that. For swap it must succeed.",
)
@click.option(
    "--restore",
    type=FILE,
    metavar="FILE",
    help="Begin with what the snapshot FILE has; see `zramd save`.",
)
@click.option("--background", is_flag=True, hidden=True, help="How `zramd up` starts it.")
def command(
    name: str, file: Path | None, restore: Path | None, background: bool, **options: Any
) -> None:
    """Serve the device NAME over NBD, in the foreground.

    It listens on NAME/nbd.sock in the runtime directory: $ZRAMD_RUNTIME_DIR, else /run/zramd for
    root, else $XDG_RUNTIME_DIR/zramd. Export names are NAME and the empty one. SIGTERM and SIGINT
    end it, and its pages with it, even while clients are connected; `zramd down` asks first.
    """
    # Without a buffer: what cannot be written, as its reader is gone or slow, must not be kept and
    # tried again and again, at the end too.
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)
    form = "%(asctime)s %(levelname)s %(message)s" if background else "zramd: %(message)s"
    logging.basicConfig(level=logging.INFO, format=form)
    handed = handover.received()
    goes_on = handed is not None and handed.role == "supervisor"
    with systemd.restarted(lambda: goes_on):
        stay_there()
        if file is not None:
            _say_where(file)
        passed = systemd.passed()
        config: Config | None
        try:
            config = config_of(file, options, found=restore is not None)
        except ZramdError:
            if not goes_on and passed.arena is None:
                raise
            # The file has changed since it was read. We have the pages to keep all the same; the
            # next worker will say what is wrong, and the last of them leaves them here.
            config = None
        # The claim comes first: who is refused has taken no memory.
        dying_s = 0 if passed.arena is None else _DYING_S
        claimed = claim(name, wait_s=dying_s) if handed is None else handed.claimed(name)
    with claimed as held:
        harden = config is None or config.use is not None
        log = held.paths.log if background else None
        if handed is not None and not goes_on:
            rehearse(held, handed, harden=harden, log=log)
            link = stand_by(handed, harden=harden)
        else:
            link = supervise(held, harden=harden, log=log, passed=passed, handed=handed)
        # From here on in each worker: the first, and those that take over.
        with worker.pages_stay(link):
            config = config or config_of(file, options, found=restore is not None)
            zram, missing = worker.build(name, config, link, restore)
        for what in missing:
            talk(f"{name} can do without, but had better have, {what}")
        if config.disksize not in (None, zram.disksize) and not link.takes_over:
            made = f"made it {zram.disksize} bytes"
            talk(f"a disksize of {config.disksize} is no multiple of a page: {made}")
        reserved = zram.statistics().mem_reserved
        if reserved and not link.takes_over:
            talk(f"{sizes.human(reserved)} of RAM are reserved for {name}")
        if not link.takes_over:
            _end_what_waits(name)
        if config.use:
            hardening.log_beside()
        worker.run(
            *(zram, config, held.paths, link),
            background=background,
            reconnect=partial(attach.reconnect, name, held.paths.nbd_socket, name, dead=True),
        )


def _say_where(file: Path) -> None:
    """In our arguments too: a program that goes on for us reads the file again, from a working
    directory that may be another."""
    for n, argument in enumerate(sys.argv):
        if argument.startswith("--config="):
            sys.argv[n] = f"--config={file}"
        elif sys.argv[n - 1] == "--config":
            sys.argv[n] = os.fspath(file)


def _end_what_waits(name: str) -> None:
    """For the pages of a server that was killed and had them nowhere else."""
    try:
        was = attach.cut_if_dead(name)
    except (ZramdError, OSError) as error:
        talk(f"what waits for an earlier server of {name} waits on: {error}")
        return
    if was is not None:
        talk(f"{was.node} was cut off: the earlier server of {name} has died with its pages")

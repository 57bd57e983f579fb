"""zramd restore: make a device of a snapshot."""

import os
from pathlib import Path

import click

from zramd import sizes
from zramd.cli.options import name_argument, progress, talk
from zramd.control.client import Control
from zramd.errors import BadArena, BadValue, NoServer
from zramd.service import background
from zramd.service.runtime import Paths


@click.command()
@name_argument
@click.argument("file", type=click.Path(path_type=Path))
def command(name: str, file: Path) -> None:
    """Make the device NAME what it was when FILE was saved: its pages, its disksize, its algorithm,
    its limits.

    A server without a disksize takes them over; one that has its pages refuses (`zramd reset`
    drops these). Where none runs, one is started, in the background.
    """
    try:
        # Or a FIFO would have us wait for who writes to it, before it is refused.
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise BadValue(f"{file} cannot be read: {error.strerror}") from error
    try:
        with Control(Paths(name).control_socket) as control:
            with progress(f"restoring {name}", os.fstat(descriptor).st_size) as shown:
                try:
                    lost = control.restore(
                        descriptor, lambda: shown(os.lseek(descriptor, 0, os.SEEK_CUR))
                    )
                except BadArena as error:
                    raise error.of(file) from error
            for page in lost:
                talk(f"page {page} of {name} was lost before it was saved")
    except NoServer:
        for line in background.start(name, [f"--restore={file.absolute()}"]):
            click.echo(line, err=True)
    finally:
        os.close(descriptor)
    with Control(Paths(name).control_socket) as control:
        now = control.statistics()
    stored = sizes.human(now.orig_data_size)
    talk(f"{name} ({sizes.human(now.disksize)}) has {stored} of pages, as {file} has them")

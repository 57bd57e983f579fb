"""zramd save: write all that a device holds to a file, while it is in use."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from zramd import sizes
from zramd.cli.options import name_argument, progress, talk
from zramd.control.client import Control
from zramd.errors import BadValue, SaveFailed
from zramd.service.runtime import Paths


@click.command()
@name_argument
@click.argument("file", type=click.Path(path_type=Path))
def command(name: str, file: Path) -> None:
    """Write a snapshot of the device NAME to FILE: all its pages, compressed as they are, as they
    were at one moment. It may be in use meanwhile.

    What stands at FILE is replaced when the snapshot is complete and on the disk, and not before.
    `zramd restore` makes a device of it.
    """
    with Control(Paths(name).control_socket) as control, _replacing(file) as descriptor:
        expected = control.statistics().mem_used_total
        with progress(f"saving {name}", expected) as shown:
            control.save(descriptor, lambda: shown(os.fstat(descriptor).st_size))
        size = os.fstat(descriptor).st_size
    talk(f"{name} is saved in {file}, {sizes.human(size)}")


@contextmanager
def _replacing(file: Path) -> Iterator[int]:
    """The descriptor of a new file, which stands at this path in the end, if all went well."""
    try:
        with suppress(FileNotFoundError):
            if not stat.S_ISREG(file.stat().st_mode):
                raise BadValue(
                    f"{file} is no file", hint="name one, or a path where there is nothing"
                )
        target = Path(os.path.realpath(file))
        beside = target.with_name(f".{target.name}.{os.getpid()}")
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            beside.unlink(missing_ok=True)  # of one of our number that was killed
            descriptor, has_name = _create(beside)
            try:
                yield descriptor
                os.fsync(descriptor)
                if not has_name:
                    # With a directory, os.link is linkat(2), which follows /proc's link.
                    os.link(f"/proc/self/fd/{descriptor}", beside, src_dir_fd=directory)
                os.replace(beside, target)
                os.fsync(directory)
            finally:
                os.close(descriptor)
                beside.unlink(missing_ok=True)
        finally:
            os.close(directory)
    except OSError as error:
        raise SaveFailed(f"{file} cannot be written: {error.strerror}") from error


def _create(path: Path) -> tuple[int, bool]:
    """A file without a name in that directory, which goes with us; where its file system has none,
    one with this path, and True."""
    try:
        return os.open(path.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600), False
    except OSError:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), True

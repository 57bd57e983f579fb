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
from zramd.errors import BadValue, NoServer, SaveFailed
from zramd.kernel import attach, use
from zramd.service.kept import arena_kept_for
from zramd.service.runtime import Paths
from zramd.store import image


@click.command()
@name_argument
@click.argument("file", type=click.Path(path_type=Path))
def command(name: str, file: Path) -> None:
    """Write a snapshot of the device NAME to FILE: all its pages, compressed as they are, as they
    were at one moment. It may be in use meanwhile: of a file system mounted from it, it is what a
    crash at that moment would have left, with all that had been written when this began.

    What stands at FILE is replaced when the snapshot is complete and on the disk, and not before.
    `zramd restore` makes a device of it.
    """
    with _replacing(file) as descriptor:
        try:
            _save(name, descriptor)
        except NoServer:
            arena = arena_kept_for(Paths(name))
            if arena is None:
                raise
            talk(f"{name} has no worker: what it has left is saved")
            image.pack(arena, descriptor)
        size = os.fstat(descriptor).st_size
    talk(f"{name} is saved in {file}, {sizes.human(size)}")


def _save(name: str, descriptor: int) -> None:
    with Control(Paths(name).control_socket) as control:
        attachment = attach.attached(name)
        if attachment is not None:
            use.sync(attachment.node)
        expected = control.statistics().mem_used_total
        with progress(f"saving {name}", expected) as shown:
            control.save(descriptor, lambda: shown(os.fstat(descriptor).st_size))


@contextmanager
def _replacing(file: Path) -> Iterator[int]:
    """The descriptor of a new file, which stands at this path in the end, if all went well."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(file.stat().st_mode):
            raise BadValue(f"{file} is no file", hint="name one, or a path where there is nothing")
    target = Path(os.path.realpath(file))
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            descriptor = _create(beside)
            try:
                yield descriptor
                os.fsync(descriptor)
                if not beside.exists():
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


def _create(path: Path) -> int:
    """A file without a name in that directory, which goes with us; where its file system has none,
    one with this path."""
    try:
        return os.open(path.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600)
    except OSError:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)

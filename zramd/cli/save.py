"""zramd save: write all that a device holds to a file, while it is in use."""

import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from zramd import sizes
from zramd.cli.options import name_argument, progress, talk
from zramd.control.client import Control
from zramd.errors import BadValue, DeviceBusy, NoServer, SaveFailed
from zramd.kernel import attach, use
from zramd.service.kept import arena_kept_for
from zramd.service.runtime import Paths
from zramd.store import image
from zramd.store.header import MAGIC


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
            if not _save_what_is_kept(name, descriptor):
                raise
        size = os.fstat(descriptor).st_size
    talk(f"{name} is saved in {file}, {sizes.human(size)}")


def _save(name: str, descriptor: int) -> None:
    with Control(Paths(name).control_socket) as control:
        attachment = attach.attached(name)
        if attachment is not None:
            if use.swap_priority(attachment.node) is not None:
                raise DeviceBusy(
                    f"{attachment.node} is swap, which is of no use once its programs are gone",
                    hint=f"`swapoff {attachment.node}` first",
                )
            use.sync(attachment.node)
        expected = control.statistics().mem_used_total
        with progress(f"saving {name}", expected) as shown:
            control.save(descriptor, lambda: shown(os.fstat(descriptor).st_size))


def _save_what_is_kept(name: str, descriptor: int) -> bool:
    """Of a server whose worker died again and again; False where there is none."""
    paths = Paths(name)
    arena = arena_kept_for(paths)
    if arena is None:
        return False
    talk(f"{name} has no worker: what it has left is saved")
    image.pack(arena, descriptor)
    if not paths.rests():
        raise SaveFailed(f"{name} has a worker again", hint="save it once more")
    os.close(arena)
    return True


@contextmanager
def _replacing(file: Path) -> Iterator[int]:
    """The descriptor of a new file, which stands at this path in the end, if all went well."""
    target = Path(os.path.realpath(file))
    with _written(file):
        _must_be_replaceable(file)
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    beside = target.with_name(f".zramd-{secrets.token_hex(8)}")
    try:
        with _written(file):
            descriptor, has_name = _create(beside)
        try:
            yield descriptor
            with _written(file):
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


def _must_be_replaceable(file: Path) -> None:
    """BadValue where the device itself may be kept there, or what is no file. Raises OSError."""
    try:
        if not stat.S_ISREG(file.stat().st_mode):
            raise BadValue(f"{file} is no file", hint="name one, or a path where there is nothing")
        with file.open("rb") as before:
            if before.read(len(MAGIC)) == MAGIC:
                raise BadValue(
                    f"{file} is the arena of a device", hint="save it elsewhere, or remove that"
                )
    except FileNotFoundError:
        pass


def _create(path: Path) -> tuple[int, bool]:
    """A file in that directory, and whether it has this path: where it can be, it has none, and
    goes with us. Raises OSError."""
    try:
        return os.open(path.parent, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600), False
    except OSError:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), True


@contextmanager
def _written(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SaveFailed(f"{file} cannot be written: {error.strerror}") from error

"""zramd up: serve in the background, attach, and use, as one step that is done or undone."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import click

from zramd import sizes
from zramd.cli.down import stop
from zramd.cli.options import device_options, name_argument, talk
from zramd.control.client import Control
from zramd.errors import BadValue, DeviceBusy, NoServer, ZramdError
from zramd.kernel import attach, tools, use
from zramd.nbd.address import Address
from zramd.service import background
from zramd.service.runtime import Paths
from zramd.store import PAGE
from zramd.store.zcomp import Algorithm


@click.command()
@name_argument
@device_options
@click.option("--swap", is_flag=True, help="Make it swap space, and swap on it.")
@click.option("--priority", type=click.IntRange(-1, 32767), help="With --swap; 100 if not given.")
@click.option(
    "--mount",
    "directory",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Make a file system on it, and mount it on DIR.",
)
@click.option("--fs", "fstype", metavar="TYPE", help="With --mount; ext4 if not given.")
@click.option("--via", type=click.Choice(["nbd", "loop"]), help="How to attach; nbd where it can.")
def command(
    name: str,
    disksize: int,
    algorithm: str | None,
    mem_limit: int | None,
    listen: tuple[Address, ...],
    swap: bool,
    priority: int | None,
    directory: Path | None,
    fstype: str | None,
    via: attach.Via | None,
) -> None:
    """Bring the device NAME up: serve it in the background, attach it, and use it.

    Prints the device node. What is up already is left as it is, so the same command may be given
    twice; if a step fails, the steps before it that this command did are undone.
    """
    if swap and directory is not None:
        raise BadValue("--swap and --mount exclude each other", hint="choose one of them")
    if priority is not None and not swap:
        raise BadValue("--priority goes with --swap", hint="add --swap, or leave it out")
    if fstype is not None and directory is None:
        raise BadValue("--fs goes with --mount", hint="add --mount DIR, or leave it out")
    if directory is not None and not directory.is_dir():
        raise BadValue(f"{directory} is not a directory", hint=f"mkdir -p {directory}")
    tools.need_root(f"attaching {name}")
    with contextlib.ExitStack() as undo:
        was_served = _serves(name, disksize, algorithm)
        if was_served:
            talk(f"{name} is served already")
        else:
            for line in background.start(name, _arguments(disksize, algorithm, mem_limit, listen)):
                click.echo(line, err=True)
            undo.callback(_undo, stop, name)
        was_attached = was_served and attach.attached(name) is not None
        attachment = attach.attach(name, Paths(name).nbd_socket, name, via)
        if not was_attached:
            undo.callback(_undo, attach.detach, name)
        talk(f"{name} is attached through {attachment.via}")
        if swap:
            use.swapon(attachment.node, 100 if priority is None else priority)
            talk(f"{attachment.node} is swap space")
        if directory is not None:
            use.mount(attachment.node, directory, fstype or "ext4")
            talk(f"{attachment.node} is mounted on {directory}")
        undo.pop_all()
    click.echo(attachment.node)


def _undo(step: Callable[[str], None], name: str) -> None:
    """Take a step back. What made that necessary is the error to report, not what fails here."""
    try:
        step(name)
    except ZramdError as error:
        talk(f"and what was done stays: {error.message}")


def _serves(name: str, disksize: int, algorithm: str | None) -> bool:
    """Whether the device is up as wanted; DeviceBusy where it is up otherwise."""
    try:
        with Control(Paths(name).control_socket) as control:
            now = control.statistics()
    except NoServer:
        return False
    same_size = now.disksize == -(-disksize // PAGE) * PAGE
    if same_size and (algorithm is None or str(Algorithm.parse(algorithm)) == now.algorithm):
        return True
    is_now = f"with {sizes.human(now.disksize)}, {now.algorithm}" if now.disksize else "but reset"
    raise DeviceBusy(
        f"{name} is up already, {is_now}",
        hint=f"`zramd down {name}` ends it, pages included",
    )


def _arguments(
    disksize: int, algorithm: str | None, mem_limit: int | None, listen: tuple[Address, ...]
) -> list[str]:
    """What `zramd serve` is given, in the words of device_options."""
    arguments = [f"--disksize={disksize}"]
    if algorithm is not None:
        arguments.append(f"--algorithm={algorithm}")
    if mem_limit is not None:
        arguments.append(f"--mem-limit={mem_limit}")
    return arguments + [f"--listen={address}" for address in listen]

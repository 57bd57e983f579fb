"""zramd up: serve in the background, attach, and use, as one step that is done or undone."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click

from zramd import sizes
from zramd.cli.down import stop
from zramd.cli.options import config_in, device_options, name_argument, talk
from zramd.control.client import Control
from zramd.errors import BadValue, DeviceBusy, NoServer, NotHardened, ZramdError
from zramd.kernel import attach, tools, use
from zramd.service import background, hardening
from zramd.service.config import Config, path_of
from zramd.service.runtime import Paths
from zramd.store import PAGE
from zramd.store.zcomp import Algorithm

_PRIORITY: Final = 100
"""Of swap: it is used before that on disks, which begin at -2."""


@click.command()
@name_argument
@device_options
@click.option("--swap", is_flag=True, help="Make it swap space, and swap on it.")
@click.option(
    *("--priority", "swap_priority"),
    type=click.IntRange(-1, 32767),
    help=f"With --swap; {_PRIORITY} if not given.",
)
@click.option(
    *("--mount", "mount_point"),
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Make a file system on it, and mount it on DIR.",
)
@click.option("--fs", "fs_type", metavar="TYPE", help="With --mount; ext4 if not given.")
@click.option("--via", type=click.Choice(["nbd", "loop"]), help="How to attach; nbd where it can.")
def command(
    name: str, file: Path | None, swap: bool, via: attach.Via | None, **options: Any
) -> None:
    """Bring the device NAME up: serve it in the background, attach it, and use it.

    Without --disksize, all is as /etc/zramd/NAME.toml says. Prints the device node. What is up
    already is left as it is, so the same command may be given twice; if a step fails, the steps
    before it that this command did are undone.
    """
    config = _config(name, file, swap, options)
    directory = config.mount_point
    if directory is not None and not directory.is_dir():
        raise BadValue(f"{directory} is not a directory", hint=f"mkdir -p {directory}")
    if config.use == "swap" and via == "loop":
        _prepare(name, config, via)  # which refuses it before anything is made
    tools.need_root(f"attaching {name}")
    with contextlib.ExitStack() as undo:
        was_served = _serves(name, config)
        if was_served:
            talk(f"{name} is served already{_as_before(config)}")
        else:
            said = background.start(name, _arguments(config))
            undo.callback(_undo, stop, name)
            for line in said:
                click.echo(line, err=True)
        was_attached = was_served and attach.attached(name) is not None
        attachment = attach.attach(name, Paths(name).nbd_socket, name, via, config.node)
        if not was_attached:
            undo.callback(_undo, attach.detach, name)
        talk(f"{name} is attached through {attachment.via}")
        if config.use == "swap":
            _prepare(name, config, attachment.via)
            use.swapon(attachment.node, _priority(config, attachment.node))
            talk(f"{attachment.node} is swap space")
        if directory is not None and config.content is not None:
            use.mount(attachment.node, directory, config.content)
            talk(f"{attachment.node} is mounted on {directory}")
        undo.pop_all()
    click.echo(attachment.node)


def _config(name: str, file: Path | None, swap: bool, options: dict[str, Any]) -> Config:
    """What the options say; for want of them, what the file of the device says."""
    if file is None and options["disksize"] is None and options["arena"] is None:
        file = path_of(name)
        if not os.path.exists(file):
            raise BadValue(
                f"neither --disksize nor a file {file} says what {name} is to be",
                hint="give --disksize SIZE, or write that file",
            )
    if file is not None:
        return config_in(file)
    mounts = options["mount_point"] is not None
    if swap and mounts:
        raise BadValue("--swap and --mount exclude each other", hint="choose one of them")
    if options["swap_priority"] is not None and not swap:
        raise BadValue("--priority goes with --swap", hint="add --swap, or leave it out")
    if options["fs_type"] is not None and not mounts:
        raise BadValue("--fs goes with --mount", hint="add --mount DIR, or leave it out")
    return Config(use="swap" if swap else "mount" if mounts else None, **options)


def _as_before(config: Config) -> str:
    """A word about options that a server has from its start, and which are not compared."""
    asked = config.listen or config.tls != "off" or config.read_only or config.max_connections
    return ", and listens where and as it was told when it was started" if asked else ""


def _prepare(name: str, config: Config, via: attach.Via) -> None:
    changed = use.prepare_for_swap(name, via, allow_deadlock=config.allow_deadlock)
    if changed is not None:
        talk(changed)


def _undo(step: Callable[[str], None], name: str) -> None:
    """Take a step back. What made that necessary is the error to report, not what fails here."""
    try:
        step(name)
    except ZramdError as error:
        talk(f"and what was done stays: {error.message}")


def _priority(config: Config, node: str) -> int | None:
    """None where it is on already, and nobody asks for another priority."""
    if config.swap_priority is None and use.swap_priority(node) is None:
        return _PRIORITY
    return config.swap_priority


def _serves(name: str, config: Config) -> bool:
    """Whether the device is up as wanted. DeviceBusy where it is up otherwise, NotHardened where it
    is to carry swap, and its server was not started for that."""
    paths = Paths(name)
    try:
        with Control(paths.control_socket) as control:
            now = control.statistics()
    except NoServer:
        return False
    algorithm, limit = config.comp_algorithm, config.mem_limit
    if limit == 0:
        limit = config.reservation
    if (
        (config.disksize is not None and now.disksize != -(-config.disksize // PAGE) * PAGE)
        or (algorithm is not None and str(Algorithm.parse(algorithm)) != now.algorithm)
        or (limit is not None and -(-limit // PAGE) * PAGE != now.mem_limit)
    ):
        is_now = f"with {sizes.human(now.disksize)}, {now.algorithm}"
        if now.mem_limit:
            is_now += f", a mem_limit of {sizes.human(now.mem_limit)}"
        raise DeviceBusy(
            f"{name} is up already, {is_now if now.disksize else 'but reset'}",
            hint=f"`zramd down {name}` ends it, pages included",
        )
    if config.use == "swap" and not config.allow_deadlock:
        try:
            lacks = hardening.lacking(Path("/proc", str(paths.worker())))
        except (OSError, ValueError) as error:
            lacks = [f"sign of it in /proc ({error})"]
        if config.reserves and not now.mem_reserved:
            lacks.append("preallocated memory")
        if lacks:
            raise NotHardened(
                f"swap on {name} could deadlock: its server has no {', no '.join(lacks)}",
                hint=f"zramd down {name}, then `zramd up` it with --swap",
            )
    return True


def _arguments(config: Config) -> list[str]:
    """What `zramd serve` is given, in the words of device_options."""
    arguments = [] if config.disksize is None else [f"--disksize={config.disksize}"]
    if config.comp_algorithm is not None:
        arguments.append(f"--algorithm={config.comp_algorithm}")
    if config.mem_limit is not None:
        arguments.append(f"--mem-limit={config.mem_limit}")
    if config.arena is not None:
        arguments.append(f"--arena={config.arena}")
    if config.prealloc is not None:
        arguments.append("--prealloc" if config.prealloc else "--no-prealloc")
    if config.use is not None:
        arguments.append(f"--for={config.use}")
    if config.allow_deadlock:
        arguments.append("--allow-deadlock")
    if config.tls != "off":
        arguments.append(f"--tls={config.tls}")
    if config.tls_certificates is not None:
        arguments.append(f"--tls-certificates={config.tls_certificates}")
    if config.tls_verify_peer:
        arguments.append("--tls-verify-peer")
    if config.tls_psk is not None:
        arguments.append(f"--tls-psk={config.tls_psk}")
    if config.allow_plain_tcp:
        arguments.append("--allow-plain-tcp")
    if config.read_only:
        arguments.append("--read-only")
    if config.max_connections is not None:
        arguments.append(f"--max-connections={config.max_connections}")
    return arguments + [f"--listen={address}" for address in config.listen]

"""zramd upgrade: this program goes on in the place of the server's, while the device is in use."""

import os
import re
import sys
import time
from pathlib import Path
from typing import Final

import click

import zramd
from zramd.cli.options import name_argument, talk
from zramd.control.client import Control
from zramd.errors import DeviceBusy, NoServer, ServerFailed
from zramd.kernel import attach
from zramd.service.runtime import Paths

_READY_S: Final = 90.0
"""For the server in use to leave (10 s at most) and this one to take over, or to be given up."""
_POLL_S: Final = 0.02


@click.command()
@name_argument
def command(name: str) -> None:
    """Have the zramd that is typed here serve the device NAME, without taking it down.

    The pages, the sockets and the server's process id stay; swap and mounts see a short pause,
    other clients the end of their connection. If this zramd cannot take over, the old one serves
    on.
    """
    paths = Paths(name)
    server, before = paths.server(), paths.worker()
    try:
        with Control(paths.control_socket) as control:
            was, now = control.version(), control.statistics()
            _must_connect_again(paths, now.openers)
            candidate = control.upgrade(_program())
    except NoServer:
        if not _lives(server):
            raise
        raise ServerFailed(
            f"{name} has no worker now that could be replaced",
            hint=f"`kill -HUP {server}` has one started",
        ) from None
    worker = _next_worker(paths, server, before, candidate)
    with Control(paths.control_socket) as control:
        is_now, disksize = control.version(), control.statistics().disksize
    if worker != candidate:
        raise ServerFailed(
            f"process {candidate} of zramd {zramd.__version__} died before it was ready: {name} is"
            f" served by zramd {is_now}, and"
            f" {'has its pages' if disksize == now.disksize else 'its pages are gone'}",
            hint="the server's log says how it ended",
        )
    talk(f"{name} is served by zramd {is_now} now (was {was})")


def _must_connect_again(paths: Paths, openers: tuple[str, ...]) -> None:
    """Where nobody does that, the kernel would see the end of its connection. Raises DeviceBusy."""
    name, hint = paths.name, f"`zramd detach {paths.name}` first, and attach it again afterwards"
    attachment = attach.attached(name)
    if attachment is not None and attachment.via == "loop":
        raise DeviceBusy(
            f"{name} is attached as {attachment.node} through loop, which does not connect again",
            hint=hint,
        )
    if attachment is not None and not attach.may_connect(paths.worker()):
        raise DeviceBusy(
            f"the server of {name} may not connect {attachment.node} again: it is not root, or has"
            " no CAP_SYS_ADMIN",
            hint=hint,
        )
    others = attach.others()
    for who in openers:
        process = re.search(r"\bpid (\d+)", who)
        node = others.get(int(process[1])) if process else None
        if node is not None:
            raise DeviceBusy(
                f"{node} is connected to it by another program, which does not connect again",
                hint=f"nbd-client -d {node} first, and use `zramd attach {name}`",
            )


def _program() -> list[str]:
    """What runs this zramd, wherever from: the server may have another working directory and
    environment. Where it may not see ours, an installed one must not be taken instead; and where
    ours is installed, what lies beside it must not be taken for Python's own modules."""
    root = os.fspath(Path(zramd.__file__).parents[1])
    code = (
        f"import os, sys; os.stat({root + '/zramd'!r}); sys.path.insert(0, {root!r});"
        " import zramd; sys.path.append(sys.path.pop(0));"
        " from zramd.cli import main; main()"
    )
    return [sys.executable, "-P", "-c", code]


def _next_worker(paths: Paths, server: int, before: int, candidate: int) -> int:
    """The worker after `before`, when the server has it written down. Others that stand there while
    the candidate lives came before it, after a death."""
    deadline = time.monotonic() + _READY_S
    while (worker := paths.worker()) != candidate and (
        worker in (0, server, before) or _lives(candidate)
    ):
        if not _lives(server):
            raise ServerFailed(
                f"the server of {paths.name} has ended",
                hint=f"`zramd down {paths.name}` clears what it left",
            )
        if time.monotonic() > deadline:
            raise ServerFailed(
                f"nobody serves {paths.name} within {_READY_S:.0f} s",
                hint="its pages are safe; the server's log may say more",
            )
        time.sleep(_POLL_S)
    return worker


def _lives(process: int) -> bool:
    return process != 0 and Path(f"/proc/{process}").exists()

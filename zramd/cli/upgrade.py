"""zramd upgrade: this program goes on in the place of the server's, while the device is in use."""

import os
import sys
import time
from pathlib import Path
from typing import Final

import click

import zramd
from zramd.cli.options import name_argument, talk
from zramd.control.client import Control
from zramd.errors import NoServer, ServerFailed
from zramd.service.runtime import Paths

_READY_S: Final = 60.0
"""For the server in use to leave (10 s at most) and this one to take over: 1 us a stored page, and
2 s for the kernel."""
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
            was = control.version()
            candidate = control.upgrade(_program())
    except NoServer:
        if not _lives(server):
            raise
        raise ServerFailed(
            f"{name} has no worker now that could be replaced",
            hint=f"`kill -HUP {server}` has one started",
        ) from None
    worker = _next_worker(paths, server, before)
    with Control(paths.control_socket) as control:
        now = control.version()
    if worker != candidate:
        raise ServerFailed(
            f"process {candidate} of zramd {zramd.__version__} died before it was ready: {name} is"
            f" served by zramd {now}, and has all its pages",
            hint="the server's log says how it ended",
        )
    talk(f"{name} is served by zramd {now} now (was {was})")


def _program() -> list[str]:
    """What runs this zramd, wherever from: the server may have another working directory and
    environment. Where it may not see ours, an installed one must not be taken instead."""
    root = os.fspath(Path(zramd.__file__).parents[1])
    code = (
        f"import os, sys; os.stat({root + '/zramd'!r}); sys.path.insert(0, {root!r});"
        " from zramd.cli import main; main()"
    )
    return [sys.executable, "-P", "-c", code]


def _next_worker(paths: Paths, server: int, before: int) -> int:
    """The worker after `before`, when the server has it written down."""
    deadline = time.monotonic() + _READY_S
    while (worker := paths.worker()) in (0, server, before):
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

"""zramd down: the reverse of up, in the reverse order; whatever of it still stands."""

import contextlib
import os
import signal
import time

import click

from zramd.cli.detach import find
from zramd.cli.options import name_argument, talk
from zramd.control.client import Control, ServerEnded
from zramd.errors import DeviceBusy, NoServer, ServerExists, ServerFailed
from zramd.kernel import attach, use
from zramd.service.runtime import Paths, claim

_LEAVE_S = 3.0
_END_S = 10.0


@click.command()
@name_argument
def command(name: str) -> None:
    """Take the device NAME down: stop using it, detach it, drop its pages, end its server.

    If it cannot be unmounted, or swap on it not be turned off, all stays as it is. What a killed
    server or a killed attachment has left is cleared too.
    """
    attachment = find(name)
    _must_not_be_silent(name)
    if attachment is not None:
        use.release(attachment.node)
    attach.detach(name)
    stop(name, leave_s=0 if attachment is None else _LEAVE_S)
    talk(f"{name} is down")


def _must_not_be_silent(name: str) -> None:
    """A dead server is no obstacle. One that lives and does not answer is: ServerFailed."""
    try:
        with Control(Paths(name).control_socket) as control:
            control.statistics()
    except (NoServer, ServerEnded):
        pass


def stop(name: str, *, leave_s: float = _LEAVE_S) -> None:
    """End the server of `name` where one lives, wait for its end, and remove what it leaves.

    Raises DeviceBusy while a client is connected; one that is being detached gets `leave_s`
    seconds, as the kernel's connection ends a moment after its node.
    """
    deadline = time.monotonic() + leave_s
    silent = False
    while True:
        try:
            with Control(Paths(name).control_socket) as control:
                control.stop()
        except NoServer:
            silent = True
            break  # dead, or gone, or without a worker
        except ServerEnded:
            continue  # of itself, told to before; or this was its worker
        except DeviceBusy as busy:
            if time.monotonic() >= deadline:
                raise DeviceBusy(
                    busy.message,
                    hint=f"disconnect these, or end them: zramd reset {name} --force",
                ) from busy
            time.sleep(0.05)
        else:
            break
    server = Paths(name).server()
    try:
        claim(name).release()
        return
    except ServerExists:
        if silent and server:  # it keeps the pages of a worker that died again and again
            with contextlib.suppress(ProcessLookupError):
                os.kill(server, signal.SIGTERM)
    try:
        claim(name, wait_s=_END_S).release()
    except ServerExists:
        raise ServerFailed(
            f"the server of {name} has not ended within {_END_S:.0f} seconds",
            hint=f"try again, or kill the process whose id stands first in {Paths(name).lock}",
        ) from None

"""What `zramd serve` does when its options are read. Whether the process is to have OpenSSL has
been decided by then: asyncio, which is imported here, takes it or does without for good."""

import io
import logging
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from zramd import sizes
from zramd.cli.options import config_of, make_tls, talk
from zramd.errors import BadValue, ZramdError
from zramd.kernel import attach
from zramd.nbd import stdio as nbd_stdio
from zramd.nbd.server import most_connections
from zramd.service import handover, hardening, systemd, worker
from zramd.service.candidate import stand_by
from zramd.service.config import Config
from zramd.service.runtime import claim, stay_there
from zramd.service.supervisor import rehearse, supervise

if TYPE_CHECKING:  # it imports OpenSSL
    from zramd.nbd.tls import Tls

_DYING_S: Final = 60.0
"""A worker whose supervisor has died dies with it, as soon as its last request lets it."""


def serve(
    name: str,
    file: Path | None,
    restore: Path | None,
    options: dict[str, Any],
    config: Config | None,
    *,
    background: bool,
    stdio: bool,
) -> None:
    """In the foreground, until it is to end. `config` is what file or options say; None where
    something is wrong with that."""
    taken = nbd_stdio.take() if stdio else None  # first: nothing is to be said to the client
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
        if stdio and handed is not None:
            raise BadValue(
                f"{name} serves its client on stdin and stdout, who would not survive it",
                hint="it ends with that client: start the new one then",
            )
        tls: Tls | None = None
        try:
            config = config or config_of(file, options, found=restore is not None)
            client = nbd_stdio.address(taken) if taken else None
            if client is not None:  # the same holds for it as for who comes to an address
                replace(config, listen=(*config.listen, client))
            most_connections(config.max_connections)
            tls = make_tls(config)
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
            tls = _tls_again(config, tls)
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
            tls=tls,
            stdio=taken,
            background=background,
            reconnect=partial(attach.reconnect, name, held.paths.nbd_socket, name, dead=True),
        )


def _tls_again(config: Config, before: "Tls | None") -> "Tls | None":
    """As its files are by now: they are renewed while a server runs. What is wrong with them then
    is no reason to leave the pages unserved; and where something is carried, they are not looked
    at, as they might lie on that."""
    if before is not None and config.use is not None:
        return before
    try:
        return make_tls(config)
    except BadValue as error:
        if before is None:
            raise
        worker.say_later(f"TLS goes on as it was when the server started: {error.line()}")
        return before


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

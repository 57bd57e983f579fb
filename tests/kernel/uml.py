"""Boot user-mode Linux (Debian's package user-mode-linux) and run one command in it.

The guest sees the host's files, read-only: the guest's root user is us on the host, so nothing
may be writable. Only /run is its own, a tmpfs; HOME and TMPDIR lie there. The guest has nbd.ko and
unix_diag.ko loaded, and ext4, xfs and btrfs built in; it has no FUSE.

The command runs as a child of the init script; its standard output and error arrive as the
guest's console, followed by a marker line with its exit status. Without a marker the guest died
or was killed, whatever it printed before.

A guest has a time limit. It is a process group of its own, so that one kill takes all of it. Its
kernel dies with the thread that started it (PR_SET_PDEATHSIG); helper processes that a killed test
run leaves all the same, idle, are killed by the next run. Its memory is an unlinked file; its
control socket lies in a temporary directory.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests import places
from tests.conftest import require
from tests.kernel.servers import wait_for

MODULES = Path("/usr/lib/uml/modules")
_PREFIX = "zramd-uml-"

_INIT = """#!/bin/sh
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
{{
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mountpoint -q /dev || mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /run
mkdir /run/tmp /run/home /run/mnt
ip link set lo up
dmesg -C
for module in drivers/block/nbd net/unix/unix_diag; do
    insmod {modules}/$(uname -r)/kernel/$module.ko
done
}} 2>&1
export HOME=/run/home TMPDIR=/run/tmp PYTHONDONTWRITEBYTECODE=1
cd {directory}
{environment} {command} </dev/null 2>&1
status=$?
[ $status = 0 ] || dmesg | tail -n 40
echo
echo {marker} $status
sync
echo o >/proc/sysrq-trigger
sleep 60
"""


@dataclass(frozen=True)
class Finished:
    """What a guest did. `status`: of its command; None where the guest did not come to its end."""

    status: int | None
    output: str


def program() -> str:
    """The kernel as a program, with its nbd module; a test without them is skipped or fails."""
    found = shutil.which("linux.uml")
    require.that(found is not None, "user-mode Linux (package user-mode-linux) is not installed")
    require.that(
        next(MODULES.glob("*/kernel/drivers/block/nbd.ko"), None) is not None,
        f"no nbd.ko under {MODULES}",
    )
    return str(found)


def run(
    *command: str,
    limit_s: float,
    memory: str = "512M",
    environment: dict[str, str] | None = None,
    directory: Path | None = None,
    disk: Path | None = None,
) -> Finished:
    """Boot, run `command` in `directory` as root, shut down; killed after `limit_s` seconds.
    `disk`: a file that is /dev/ubda, and stays as the guest leaves it."""
    marker = f"guest-status-{uuid.uuid4().hex}"
    with guest_place() as place:
        init = place / "init"
        init.write_text(
            _INIT.format(
                modules=MODULES,
                directory=shlex.quote(os.fspath(directory or Path.cwd())),
                environment=" ".join(
                    f"{key}={shlex.quote(value)}" for key, value in (environment or {}).items()
                ),
                command=shlex.join(command),
                marker=marker,
            )
        )
        init.chmod(0o700)
        output = boot(
            place,
            *("rootfstype=hostfs", "rootflags=/", "ro", f"init={init}"),
            *("quiet", "loglevel=1"),
            *(() if disk is None else (f"ubd0={disk}",)),
            limit_s=limit_s,
            memory=memory,
        )
    text, found, after = output.partition(f"{marker} ")
    return Finished(int(after.split()[0]) if found else None, text)


@contextmanager
def guest_place() -> Iterator[Path]:
    """A directory for one guest; what killed test runs left of theirs is ended first."""
    for left in places.abandoned(_PREFIX):
        _kill_helpers(left)
    with places.place(_PREFIX) as place:
        yield place


def boot(place: Path, *parameters: str, limit_s: float, memory: str = "512M") -> str:
    """Boot a kernel with these parameters, in a `guest_place`, until it halts or its time is up.

    Returns the console's text; no process of the guest is left then.
    """
    argv = [
        *(program(), f"mem={memory}", "con=null", "con0=null,fd:1"),
        *(*parameters, _uml_dir(place), "umid=guest"),
    ]
    # The guest's memory wants a tmpfs: on a disk it is written out again and again.
    shm = Path("/dev/shm")
    memory_place = shm if os.access(shm, os.W_OK) else Path(tempfile.gettempdir())
    with tempfile.TemporaryFile() as console:
        guest = subprocess.Popen(
            [require.program("setpriv"), "--pdeathsig", "KILL", *argv],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "TMPDIR": os.fspath(memory_place)},
        )
        try:
            guest.wait(limit_s)
        except subprocess.TimeoutExpired:
            pass
        finally:
            try:
                os.killpg(guest.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            guest.wait()
        # Its other processes were told to die as well, but are not ours to wait for.
        wait_for(lambda: not _group_lives(guest.pid), "the guest's processes to end")
        console.seek(0)
        return console.read().decode(errors="replace").replace("\r", "")


def _uml_dir(place: Path) -> str:
    return f"uml_dir={place}/"


def _kill_helpers(place: Path) -> None:
    """Kill what is left of a guest whose kernel is dead, by the argument that names its place."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(_uml_dir(place)) in (process / "cmdline").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGKILL)
        except OSError:
            continue  # it ended meanwhile


def _group_lives(group: int) -> bool:
    """Whether a process of the group runs; one that only waits to be reaped by init does not."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, _parent, its_group = (
                (process / "stat").read_text().rpartition(")")[2].split()[:3]
            )
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


if __name__ == "__main__":
    ended = run(*sys.argv[1:], limit_s=float(os.environ.get("LIMIT", "120")))
    print(ended.output, end="")
    sys.exit(99 if ended.status is None else ended.status)

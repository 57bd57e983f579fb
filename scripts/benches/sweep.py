"""Nothing is left of a bench, however it ends.

All that one run starts carries MARK in its environment, and all that it writes lies in one
directory, in RAM. Who holds the directory's lock is alive (tests/places.py). A second process,
`python -m scripts.benches.sweep`, waits for the end of the bench, whatever that is, and clears what
it has left. A run that is killed together with this second one is swept up after by the next.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scripts.benches import machine
from tests import places

ROOT = Path(__file__).resolve().parents[2]
PREFIX = f"zramd-bench-{os.getuid()}-"
MARK = "ZRAMD_BENCH"
ZRAM = "kernel-zram"
"""A file in a run's directory: the number of the kernel's zram device that the run has added."""


@contextmanager
def workplace() -> Iterator[Path]:
    """A directory in RAM, where there is a tmpfs; at the end nothing is left of it, nor of what was
    started meanwhile. Temporary files of this process lie in it, too."""
    _lie_in_ram()
    sweep()
    with places.place(PREFIX) as work:
        second = subprocess.Popen(
            [sys.executable, "-m", "scripts.benches.sweep"],
            stdin=subprocess.PIPE,
            cwd=ROOT,
            start_new_session=True,
        )
        os.environ[MARK] = str(work)
        tempfile.tempdir = str(work)
        try:
            yield work
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_IGN)
            _end_all(work)
    second.communicate()


def sweep() -> None:
    """End what dead benches have left."""
    for left in places.abandoned(PREFIX):
        _end_all(left)


def _lie_in_ram() -> None:
    tempfile.tempdir = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _end_all(work: Path) -> None:
    for process in machine.marked(str(work), MARK):
        machine.kill(process)
    for lock in work.glob("*/*/lock"):
        subprocess.run(
            [sys.executable, "-m", "zramd.cli", "down", lock.parent.name],
            env=os.environ | {"ZRAMD_RUNTIME_DIR": str(lock.parents[1]), "PYTHONPATH": str(ROOT)},
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
    number = work / ZRAM
    if number.exists():
        remove_zram(int(number.read_text()))
        number.unlink()
    for path in work.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def remove_zram(number: int) -> None:
    """Reset this zram device and take it away."""
    deadline = time.monotonic() + 10
    while True:
        try:
            Path(f"/sys/block/zram{number}/reset").write_text("1")
            Path("/sys/class/zram-control/hot_remove").write_text(str(number))
            return
        except FileNotFoundError:
            return  # it is gone
        except OSError:  # somebody, udev perhaps, has it open for a moment
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


def main() -> None:
    """Wait until the bench that started this has ended, and sweep up."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    time.sleep(0.2)  # its lock may outlive its end of the pipe by a moment
    _lie_in_ram()
    sweep()


if __name__ == "__main__":
    main()

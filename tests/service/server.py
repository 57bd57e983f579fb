"""`zramd serve s0 ...` as a process, what can happen to it, and pages to find again afterwards."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.nbd.harness import RawClient, wait_for
from tests.store.contents import noise, text
from zramd.control.client import Control
from zramd.nbd.address import UnixAddress
from zramd.service.runtime import Paths
from zramd.service.supervisor import MOST_DEATHS
from zramd.store import PAGE

ROOT = Path(__file__).parents[2]


class Server:
    """`zramd serve s0 ...`, and what can happen to it."""

    def __init__(
        self,
        *arguments: str,
        reader_leaves: bool = False,
        module: str = "zramd.cli",
        starter: Sequence[str] = (),
        pass_fds: Sequence[int] = (),
    ) -> None:
        """`reader_leaves`: who reads its stderr does so until it is ready. `module` is run for
        zramd's; `starter` is a command that executes what it is given."""
        self.paths = Paths("s0")
        self.log = self.paths.dir.parent / "stderr"
        with self.log.open("wb") as stderr:
            self.process = subprocess.Popen(
                [*starter, sys.executable, "-m", module, "serve", "s0", *arguments],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE if reader_leaves else stderr,
                pass_fds=pass_fds,
                env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
            )
        if self.process.stderr is not None:
            while b" is served on " not in self.process.stderr.readline():
                assert self.process.poll() is None
            self.process.stderr.close()
        else:
            wait_for(lambda: self.said(" is served on ") or self.process.poll() is not None)

    def said(self, words: str) -> int:
        return self.log.read_text().count(words)

    @property
    def worker(self) -> int:
        return self.paths.worker()

    def kill_worker(self, signal_number: int = signal.SIGKILL) -> None:
        """Returns when another serves, and stands in the lock file."""
        before, served = self.worker, self.said(" is served on ")
        os.kill(before, signal_number)
        wait_for(lambda: self.said(" is served on ") > served and self.worker != before)

    def wear_out(self) -> None:
        """Kill workers until no other is started."""
        for _ in range(MOST_DEATHS - 1):
            self.kill_worker()
        os.kill(self.worker, signal.SIGKILL)
        wait_for(lambda: self.said("its pages are kept"))

    def wear_out_at_once(self) -> None:
        """Kill a worker whose successors cannot even begin."""
        os.kill(self.worker, signal.SIGKILL)
        wait_for(lambda: self.said("its pages are kept"))

    def begin_again(self) -> None:
        """Have one started all the same; returns when it serves."""
        served = self.said(" is served on ")
        self.process.send_signal(signal.SIGHUP)
        wait_for(lambda: self.said(" is served on ") > served)
        wait_for(lambda: self.worker != self.process.pid)

    def client(self) -> RawClient:
        return RawClient(UnixAddress(self.paths.nbd_socket))

    def control(self) -> Control:
        return Control(self.paths.control_socket)

    def end(self, signal_number: int = signal.SIGTERM) -> int:
        self.process.send_signal(signal_number)
        return self.process.wait(30)


def instead(code: str) -> list[str]:
    """A starter that runs this in the place of the `python -m MODULE ...` that it is given."""
    return [sys.executable, "-c", f"import sys; sys.argv = sys.argv[3:]; exec({code!r})"]


def lives(process: int) -> bool:
    """Whether it or a thread of it does; its parent hears of the last one's end."""
    try:
        threads = os.listdir(f"/proc/{process}/task")
        return len(threads) > 1 or " Z " not in Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return False


CONTENTS = {0: noise(1), 1: text(2), 2: b"12345678" * 512, 3: bytes(PAGE), 700: noise(3)}


def write(server: Server) -> None:
    with server.client() as client:
        for page, content in CONTENTS.items():
            client.write(page * PAGE, content)


def check(server: Server) -> None:
    with server.client() as client:
        for page, content in CONTENTS.items():
            assert client.read(page * PAGE, PAGE) == content, page
        assert client.read(5 * PAGE, PAGE) == bytes(PAGE)

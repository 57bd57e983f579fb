"""What is measured: each peer is one server, or one device of the kernel, of one size.

A peer is started empty, and told apart by its processes' mark (machine.py). `ready` gives one that
holds what a measurement needs, whatever became of it before: it starts what has not been started,
or has died, and fills it with the corpus where it must hold it.

Peers that this machine lacks say why, and are left out.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

from scripts.benches import machine, sweep
from scripts.benches.machine import Failed, client, last_line
from zramd.control.client import Control
from zramd.nbd.client import negotiate

ROOT = Path(__file__).resolve().parents[2]
MIB = 1 << 20
_NAME = "bench"
_START_S = 60


class Holds(IntEnum):
    """What lies in a peer. Later ones will do where earlier ones are asked for."""

    NOTHING = 0
    ANYTHING = 1
    """Every page has been written, by fio or by us."""
    CORPUS = 2


class Peer:
    """One thing that is measured; see the module. `place` is a directory of its own."""

    name = ""
    node = ""
    """The block device, of those that are one."""
    uri = ""
    """Of those that are NBD servers."""
    quick = True
    """Whether --quick measures it, too."""
    files: Sequence[Path] = ()
    """On a tmpfs, where its pages lie."""

    def __init__(self, work: Path, image: Path) -> None:
        slug = re.sub(r"\W+", "-", self.name).strip("-")
        self.place = work / slug
        self.image = image
        self.size = image.stat().st_size
        self.holds: Holds | None = None
        self.environment = os.environ | {
            machine.MARK: str(self.place),
            "ZRAMD_RUNTIME_DIR": str(self.place),
            "VIRTUAL_ENV": sys.prefix,
            "PYTHONPATH": str(ROOT),
        }

    def missing(self) -> str:
        """Why it cannot be measured here; empty if it can."""
        return ""

    def ready(self, needs: Holds) -> None:
        """Make it one that holds this."""
        if self.holds is not None and not self.alive():
            self.stop()
        if self.holds is not None and needs is Holds.NOTHING:
            self.stop()
        if self.holds is None:
            shutil.rmtree(self.place, ignore_errors=True)
            self.place.mkdir()
            try:
                self.start()
            except BaseException:
                self.stop()
                raise
            self.holds = Holds.NOTHING
        if self.holds < needs:
            client(self.filling(128 << 10, 1))
            self.holds = Holds.CORPUS

    def filling(self, request: int, connections: int) -> list[str]:
        """The command that writes the whole corpus to it."""
        if self.node:
            return _dd(self.image, self.node, request, "oflag=direct")
        return [*_nbdcopy(request, connections), str(self.image), self.uri]

    def emptying(self, request: int, connections: int) -> list[str]:
        """The command that reads all of it."""
        if self.node:
            return _dd(self.node, "/dev/null", request, "iflag=direct")
        return [*_nbdcopy(request, connections), self.uri, "null:"]

    def ram(self) -> int:
        """Bytes that it takes of the system's RAM."""
        return machine.ram(machine.marked(str(self.place)), self.files)

    def cpu_seconds(self) -> float:
        return machine.cpu_seconds(machine.marked(str(self.place)))

    def compressed(self) -> int | None:
        """Bytes that are stored compressed, of those that say so."""
        return None

    def start(self) -> None:
        raise NotImplementedError

    def alive(self) -> bool:
        raise NotImplementedError

    def stop(self) -> None:
        """End it, and remove what it leaves, whatever its state."""
        self.holds = None

    def kill(self) -> None:
        """End it where `stop` could not. What it leaves is swept up at the end."""
        for process in machine.marked(str(self.place)):
            machine.kill(process)
        self.holds = None


def _nbdcopy(request: int, connections: int) -> list[str]:
    # The same for all: nobody is asked for extents (which nbdkit's zstd allocator dies of), and
    # zeros are written like the rest.
    how = ["--no-extents", "--sparse=0", "--destination-is-zero"]
    return ["nbdcopy", *how, f"--request-size={request}", f"--connections={connections}"]


def _dd(source: str | Path, destination: str, request: int, how: str) -> list[str]:
    return ["dd", f"if={source}", f"of={destination}", f"bs={request}", how, "status=none"]


def _found(program: str) -> str | None:
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Server(Peer):
    """A server that runs in the foreground and listens on a Unix socket."""

    program = ""

    def command(self) -> list[str]:
        raise NotImplementedError

    @property
    def listening(self) -> Path:
        return self.place / "socket"

    def missing(self) -> str:
        return "" if _found(self.program) else f"{self.program} is not installed"

    def start(self) -> None:
        self.uri = f"nbd+unix:///?socket={self.listening}"
        with (self.place / "stderr").open("wb") as log:
            self._process = subprocess.Popen(
                machine.pinned(machine.SERVERS, self.command()),
                env=self.environment,
                cwd=self.place,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        _wait(self.listening.exists, self.alive, self._said)

    def _said(self) -> str:
        return last_line((self.place / "stderr").read_text(errors="replace"))

    def alive(self) -> bool:
        return self._process.poll() is None

    def stop(self) -> None:
        process = getattr(self, "_process", None)
        if process is not None and process.poll() is None:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                machine.kill(process.pid, group=True)
                process.wait()
        super().stop()


@contextmanager
def connected(path: Path) -> Iterator[socket.socket]:
    """A client of the server that listens on this socket, in transmission."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        negotiate(sock, "")
        yield sock


def _wait(ready: Callable[[], bool], alive: Callable[[], bool], said: Callable[[], str]) -> None:
    deadline = time.monotonic() + _START_S
    while not ready():
        if not alive() or time.monotonic() > deadline:
            raise Failed(said() or "it did not start")
        time.sleep(0.02)


class Nbdkit(Server):
    program = "nbdkit"

    def __init__(self, work: Path, image: Path, name: str, *arguments: str, quick: bool) -> None:
        self.name, self.quick, self._arguments = name, quick, arguments
        super().__init__(work, image)

    def command(self) -> list[str]:
        arguments = (argument.format(size=self.size) for argument in self._arguments)
        return ["nbdkit", "-f", "-U", str(self.listening), *arguments]


class Qemu(Server):
    """qemu-nbd on a sparse file of a tmpfs."""

    name = "qemu-nbd on tmpfs"
    program = "qemu-nbd"

    def missing(self) -> str:
        if not str(self.place).startswith("/dev/shm"):
            return "there is no tmpfs on /dev/shm"
        return super().missing()

    def command(self) -> list[str]:
        file = self.place / "disk"
        file.touch()
        os.truncate(file, self.size)
        self.files = [file]
        how = ["--format=raw", "--discard=unmap", "--persistent", "--shared=16"]
        return ["qemu-nbd", *how, f"--socket={self.listening}", str(file)]


class Ours:
    """What `zramd serve` and nbd_plugin.py share: the control socket."""

    place: Path

    def compressed(self) -> int | None:
        with self.control() as control:
            return control.statistics().compr_data_size

    def control(self) -> Control:
        return Control(self.place / _NAME / "control")


class Serve(Ours, Server):
    program = sys.executable
    kind = "zramd serve"
    runs = ("-m", "zramd.cli")

    def __init__(self, work: Path, image: Path, algorithm: str, *, quick: bool) -> None:
        self.name, self.quick, self._algorithm = f"{self.kind} {algorithm}", quick, algorithm
        super().__init__(work, image)

    @property
    def listening(self) -> Path:
        return self.place / _NAME / "nbd.sock"

    def command(self) -> list[str]:
        how = ["--disksize", str(self.size), "--algorithm", self._algorithm]
        return [sys.executable, *self.runs, "serve", _NAME, *how]


class Still(Serve):
    """One that is compacted when it is told to, and not by itself."""

    kind = "still zramd serve"
    runs = (
        "-c",
        "from zramd.service import upkeep; upkeep.INTERVAL_S = 1e9\n"
        "from zramd.cli import main; main()",
    )


class Plugin(Ours, Server):
    program = "nbdkit"

    def __init__(self, work: Path, image: Path, algorithm: str, *, quick: bool) -> None:
        self.name, self.quick, self._algorithm = f"nbd_plugin.py {algorithm}", quick, algorithm
        super().__init__(work, image)

    def command(self) -> list[str]:
        device = [f"name={_NAME}", f"disksize={self.size}", f"algorithm={self._algorithm}"]
        plugin = str(ROOT / "nbd_plugin.py")
        return ["nbdkit", "-f", "-U", str(self.listening), "python", plugin, *device]


class Up(Ours, Peer):
    """`zramd up`: the server, and a block device of the kernel's in front of it."""

    def __init__(self, work: Path, image: Path, via: str) -> None:
        self.name, self._via = f"zramd up --via {via}", via
        super().__init__(work, image)

    def missing(self) -> str:
        if os.getuid():
            return "it needs root"
        node = "/dev/nbd0" if self._via == "nbd" else "/dev/loop-control"
        if self._via == "nbd" and not os.path.exists(node):
            subprocess.run(["modprobe", "nbd"], stderr=subprocess.DEVNULL, check=False)
        if not os.path.exists(node):
            return f"there is no {node}"
        if self._via == "loop" and not (os.path.exists("/dev/fuse") and _found("nbdfuse")):
            return "there is no /dev/fuse, or no nbdfuse"
        return ""

    def start(self) -> None:
        how = ["--disksize", str(self.size), "--via", self._via]
        self.node = self._zramd("up", _NAME, *how).strip()

    def alive(self) -> bool:
        return len(machine.marked(str(self.place))) > 1

    def stop(self) -> None:
        if (self.place / _NAME / "lock").exists():
            self._zramd("down", _NAME)
        super().stop()

    def _zramd(self, *arguments: str) -> str:
        done = subprocess.run(
            machine.pinned(machine.SERVERS, [sys.executable, "-m", "zramd.cli", *arguments]),
            env=self.environment,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=False,
        )
        if done.returncode:
            raise Failed(last_line(done.stderr))
        return done.stdout


class KernelZram(Peer):
    """A device of the kernel's own, added for this run. It has no process: who writes to it
    compresses, and its RAM is what it says itself."""

    name = "kernel zram lz4"
    _CONTROL = Path("/sys/class/zram-control/hot_add")

    def missing(self) -> str:
        if os.getuid():
            return "it needs root"
        if not self._CONTROL.exists():
            subprocess.run(["modprobe", "zram"], stderr=subprocess.DEVNULL, check=False)
        return "" if self._CONTROL.exists() else "this kernel has no zram, or it cannot be loaded"

    def start(self) -> None:
        kept = self.place.parent / sweep.ZRAM
        if not kept.exists():
            kept.write_text(self._CONTROL.read_text())
        number = int(kept.read_text())
        self.node = f"/dev/zram{number}"
        self._attributes = Path(f"/sys/block/zram{number}")
        algorithms = (self._attributes / "comp_algorithm").read_text()
        if "lz4" not in algorithms.replace("[", " ").replace("]", " ").split():
            raise Failed(f"the kernel's zram has no lz4, only {algorithms.strip()}")
        (self._attributes / "comp_algorithm").write_text("lz4")
        (self._attributes / "disksize").write_text(str(self.size))
        _wait(Path(self.node).is_block_device, lambda: True, lambda: f"no {self.node} came")

    def alive(self) -> bool:
        return (self._attributes / "disksize").read_text() != "0\n"

    def stop(self) -> None:
        if self.node:
            (self._attributes / "reset").write_text("1")
        super().stop()

    def ram(self) -> int:
        return int((self._attributes / "mm_stat").read_text().split()[2])

    def compressed(self) -> int | None:
        return int((self._attributes / "mm_stat").read_text().split()[1])


def all_peers(work: Path, image: Path) -> list[Peer]:
    """In the order in which the report names them."""
    memory = ["memory", "{size}"]
    idle = ["python", str(ROOT / "scripts/benches/idle_plugin.py"), "size={size}"]
    algorithms = ("lz4", "lz4hc", "zstd(level=1)", "zstd", "deflate")
    quick = ("lz4", "zstd(level=1)")
    return [
        *(Serve(work, image, name, quick=name in quick) for name in algorithms),
        *(Plugin(work, image, name, quick=name == "lz4") for name in algorithms),
        Nbdkit(work, image, "nbdkit memory", *memory, quick=True),
        Nbdkit(work, image, "nbdkit memory malloc", *memory, "allocator=malloc", quick=False),
        Nbdkit(work, image, "nbdkit memory zstd", *memory, "allocator=zstd", quick=True),
        Nbdkit(work, image, "idle Python plugin", *idle, quick=True),
        Nbdkit(work, image, "idle Python plugin, threads kept", *idle, "keep=1", quick=False),
        Qemu(work, image),
        KernelZram(work, image),
        Up(work, image, "loop"),
        Up(work, image, "nbd"),
    ]

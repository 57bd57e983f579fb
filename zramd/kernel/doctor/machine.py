"""The machine, and the devices on it, as the checks see them.

Whatever a check knows comes from here: files below `root`, and what no file tells and has to be
tried. So a test makes another machine of a directory and a few answers.

Nothing here changes anything, waits for a device, or opens a device node. A file that is not there,
or not for us to read, is the OSError that it is: `examine` makes "unknown" of it.
"""

import ctypes
import errno
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from zramd.control.client import State, look
from zramd.errors import BadValue, ZramdError
from zramd.kernel import netlink, tools
from zramd.kernel.attach import Attachment, attached
from zramd.kernel.state import SYS_BLOCK, Swap, User, swaps, users
from zramd.service import config, runtime
from zramd.service.runtime import Paths
from zramd.statistics import Statistics

CAP_IPC_LOCK: Final = 14
CAP_SYS_MODULE: Final = 16
CAP_SYS_NICE: Final = 23
CAP_SYS_RESOURCE: Final = 24

_PATIENCE_S: Final = 2.0
"""For a program that tells its version, and for the child that tries."""


@dataclass(frozen=True, slots=True)
class Device:
    """A device that has a server, or has lost it and left something."""

    name: str
    state: State
    process: str = ""
    """The server's number in /proc."""
    now: Statistics | None = None
    """None where no server tells."""
    attachment: Attachment | None = None
    users: tuple[User, ...] = ()
    """Of its node."""

    @property
    def node(self) -> str:
        return "" if self.attachment is None else self.attachment.node

    @property
    def is_swap(self) -> bool:
        return any(user.kind == "swap" for user in self.users)

    @property
    def wants(self) -> int:
        """The memory that it may come to take, in bytes; 0 where no server tells."""
        return 0 if self.now is None else self.now.mem_limit or self.now.disksize

    @classmethod
    def look(cls, name: str) -> "Device":
        """Ask server and kernel; its node is never opened. A server that is stopped takes as long
        as control.client.ANSWER_S."""
        state, now = look(Paths(name).control_socket)
        attachment = attached(name)
        used_by = () if attachment is None else tuple(users(attachment.node))
        process = Paths(name).worker()
        return cls(name, state, str(process or ""), now, attachment, used_by)


def device_names() -> list[str]:
    """Those that have a directory, and those that the kernel's nbd still has though a server that
    was told to end has removed theirs."""
    found = runtime.names()
    for backend in SYS_BLOCK.glob("nbd*/backend"):
        try:
            identifier = os.fsdecode(backend.read_bytes())
        except OSError:
            continue  # not connected, or not any more
        directory = Path(identifier.removeprefix("zramd:").rpartition("#")[0])
        if directory.parent == runtime.runtime_dir() and directory.name not in found:
            found.append(directory.name)
    return found


class Machine:
    """One look at a machine; what was read once is not read again."""

    python = sys.version_info[:2]

    def __init__(
        self,
        root: Path = Path("/"),
        devices: Sequence[Device] = (),
        *,
        hidden: ZramdError | None = None,
        config_dir: Path | None = None,
    ) -> None:
        """`hidden`: why the devices cannot be told. `config_dir`: where their files are; None:
        where they are for all of zramd."""
        self.root = root
        self.devices = devices
        self.hidden = hidden
        self.config_dir = config.directory() if config_dir is None else config_dir

    def knows(self, name: str) -> bool:
        """Whether there is anything of this device, its file included."""
        there = any(device.name == name for device in self.devices)
        return there or os.path.lexists(self.config_dir / f"{name}.toml")

    @property
    def swaps_on_ours(self) -> bool:
        """Whether a device carries swap, or is to."""
        return any(device.is_swap for device in self.devices) or any(
            config.use == "swap" for config in self.configs.values()
        )

    # Files

    def path(self, name: str) -> Path:
        """Where the file of this absolute name lies."""
        return self.root / name.lstrip("/")

    def has(self, name: str) -> bool:
        return os.path.lexists(self.path(name))

    def read(self, name: str) -> str:
        return self.path(name).read_text(errors="replace").strip()

    def number(self, name: str) -> int:
        return int(self.read(name))

    def status(self, field: str, process: str = "self") -> str:
        """A field of /proc/PROCESS/status."""
        for line in self.read(f"/proc/{process}/status").splitlines():
            key, _, value = line.partition(":")
            if key == field:
                return value.strip()
        raise ValueError(f"/proc/{process}/status has no {field}")

    def meminfo(self, field: str) -> int:
        """Bytes."""
        for line in self.read("/proc/meminfo").splitlines():
            key, _, value = line.partition(":")
            if key == field:
                return int(value.split()[0]) << 10
        raise ValueError(f"/proc/meminfo has no {field}")

    @cached_property
    def release(self) -> tuple[int, int]:
        """The kernel's version, as far as it counts."""
        major, minor = self.read("/proc/sys/kernel/osrelease").split(".")[:2]
        return int(major), int("".join(filter(str.isdigit, minor.partition("-")[0])))

    @cached_property
    def swaps(self) -> list[Swap]:
        return swaps(self.path("/proc"))

    @cached_property
    def is_root(self) -> bool:
        return self.status("Uid").split()[1] == "0"

    def capable(self, capability: int) -> bool:
        """Whether this process has the capability."""
        return bool(int(self.status("CapEff"), 16) >> capability & 1)

    def may_become_capable(self, capability: int) -> bool:
        """Whether root, by sudo from here, would have it."""
        return bool(int(self.status("CapBnd"), 16) >> capability & 1)

    @cached_property
    def in_user_namespace(self) -> bool:
        """Whether our root is only a user's: its capabilities do not count where memory is
        concerned."""
        return self.read("/proc/self/uid_map").split() != ["0", "0", "4294967295"]

    def has_module(self, module: str) -> bool:
        """Whether the kernel comes with the module, loaded or not."""
        release = self.read("/proc/sys/kernel/osrelease")
        for index in ("modules.builtin", "modules.dep"):
            try:
                listed = self.read(f"/lib/modules/{release}/{index}")
            except FileNotFoundError:
                continue
            if f"/{module}.ko" in listed:
                return True
        return False

    @cached_property
    def can_load_modules(self) -> bool:
        forbidden = "/proc/sys/kernel/modules_disabled"
        if self.has(forbidden) and self.read(forbidden) != "0":
            return False
        return self.may_become_capable(CAP_SYS_MODULE) and not self.in_user_namespace

    def cgroups(self, process: str = "self", controller: str = "memory") -> list[str]:
        """The directories of the control groups that the process is in, its own first: those of
        the controller's hierarchy, or of the one that has all of them."""
        everything = None
        for line in self.read(f"/proc/{process}/cgroup").splitlines():
            _number, controllers, group = line.split(":", 2)
            if controller in controllers.split(","):
                return _upwards(f"/sys/fs/cgroup/{controllers}", group)
            if not controllers:
                everything = group
        if everything is None:
            return []
        unified = "/sys/fs/cgroup/unified"
        return _upwards(unified if self.has(unified) else "/sys/fs/cgroup", everything)

    def memory_limit(self, process: str = "self") -> int | None:
        """The least that any of its control groups grants; None where all of memory is granted."""
        return min(self.memory_limits(process).values(), default=None)

    def memory_limits(self, process: str = "self") -> dict[str, int]:
        """What each of its control groups grants that does not grant all of memory."""
        found: dict[str, int] = {}
        for group in self.cgroups(process):
            for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
                if self.has(f"{group}/{name}"):
                    told = self.read(f"{group}/{name}")
                    if told != "max" and int(told) < self.meminfo("MemTotal"):
                        found[group] = min(int(told), found.get(group, int(told)))
        return found

    def processes(self, *names: str) -> list[str]:
        """Those of the names that a running process has."""
        running = set()
        for comm in self.path("/proc").glob("[0-9]*/comm"):
            try:
                running.add(comm.read_text(errors="replace").strip())
            except OSError:
                continue  # it has ended
        return [name for name in names if name in running]

    @property
    def configs(self) -> dict[str, config.Config]:
        """The devices that have a file without faults, as far as files are for us to read."""
        try:
            found = self.configurations
        except PermissionError:
            return {}
        return {name: made for name, made in found.items() if isinstance(made, config.Config)}

    @cached_property
    def configurations(self) -> dict[str, config.Config | BadValue]:
        """What each device's file says, or the fault in it; PermissionError where one cannot be
        read."""
        found: dict[str, config.Config | BadValue] = {}
        try:
            files = [self.config_dir / name for name in sorted(os.listdir(self.config_dir))]
        except FileNotFoundError:
            return {}
        for file in files:
            if file.suffix != ".toml":
                continue
            if not os.access(file, os.R_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))
            try:
                found[file.stem] = config.read(file)
            except BadValue as fault:
                found[file.stem] = fault
        return found

    # What no file tells

    def find(self, program: str) -> str | None:
        return tools.find(program)

    def ask(self, *argv: str) -> str | None:
        """What a program prints; None where it is not there, fails, or takes too long."""
        path = self.find(argv[0])
        if path is None:
            return None
        try:
            done = subprocess.run(
                [path, *argv[1:]],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_PATIENCE_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout if done.returncode == 0 else None

    def reaches_nbd(self) -> bool:
        """Whether the kernel's nbd can be talked to from here, which it can where it is loaded, but
        for containers with a network of their own."""
        try:
            netlink.nbd_family()
        except OSError:
            return False
        return True

    @cached_property
    def refusals(self) -> dict[str, int]:
        """The errno with which each of MOVES is refused, 0 where it is not. Tried in a child, which
        is left with what it gets. One that is never heard of did not come to run any more."""
        return _try_moves()


def _upwards(mount: str, group: str) -> list[str]:
    parts = [part for part in group.split("/") if part]
    return ["/".join([mount, *parts[:end]]) for end in range(len(parts), -1, -1)]


# What a server for swap does to itself (zramd/service/hardening.py)

IO_FLUSHER: Final = "PR_SET_IO_FLUSHER"
OOM_SCORE: Final = "oom_score_adj -1000"
MEMORY_LOCK: Final = "mlockall"
REALTIME: Final = "SCHED_FIFO"

_PR_SET_IO_FLUSHER: Final = 57
_MCL_CURRENT_FUTURE_ONFAULT: Final = 1 | 2 | 4
_libc = ctypes.CDLL(None, use_errno=True)


def _protect() -> None:
    Path("/proc/self/oom_score_adj").write_text("-1000")


def _be_realtime() -> None:
    os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def _call(function: Callable[..., int], *arguments: int) -> None:
    if function(*arguments) != 0:
        raise OSError(ctypes.get_errno(), "refused")


MOVES: Final[dict[str, Callable[[], None]]] = {
    IO_FLUSHER: lambda: _call(_libc.prctl, _PR_SET_IO_FLUSHER, 1, 0, 0, 0),
    OOM_SCORE: _protect,
    MEMORY_LOCK: lambda: _call(_libc.mlockall, _MCL_CURRENT_FUTURE_ONFAULT),
    REALTIME: _be_realtime,  # last: where real-time tasks get no time, it is the child's end
}


def _try_moves() -> dict[str, int]:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            for name, move in MOVES.items():
                os.write(writer, f"{name}={_errno_of(move)}\n".encode())
        finally:
            os._exit(0)
    os.close(writer)
    told = b""
    with open(reader, "rb", buffering=0) as answers:
        while select.select([answers], [], [], _PATIENCE_S)[0]:
            chunk = answers.read(4096)
            if not chunk:
                os.waitpid(child, 0)
                break
            told += chunk
        else:
            os.kill(child, signal.SIGKILL)  # and not waited for: it may never run
    pairs = (line.split("=") for line in told.decode().splitlines())
    return {name: int(code) for name, code in pairs}


def _errno_of(move: Callable[[], None]) -> int:
    try:
        move()
    except OSError as error:
        return error.errno or errno.EIO
    return 0

"""Where a device's server keeps its sockets, and how two servers of one name exclude each other.

One directory per device, NAME, in the runtime directory: `$ZRAMD_RUNTIME_DIR`, else `/run/zramd`
for root, else `$XDG_RUNTIME_DIR/zramd`. In it `nbd.sock` (NBD), `control` (varlink), `log` (of a
server started by `zramd up`) and `lock`. Directories are 0700, sockets and files 0600.

Guarantees
1. At most one process holds the Claim on a name. The kernel drops it with the process, however
   that ends, so a claim that can be had means that everything in the directory is a leftover.
2. A claim is held on the lock file that stands at its path, never on one that a predecessor
   has unlinked meanwhile.
3. Releasing a claim removes the device's directory. The runtime directory itself stays.

Assumes that only zramd puts files into a device's directory; release removes them all.
"""

import errno
import fcntl
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from zramd.errors import BadValue, ServerExists, ServerFailed
from zramd.files import stands_at
from zramd.nbd.address import UNIX_PATH_MAX

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,31}", re.ASCII)
_POLL_S: Final = 0.02
_TRIES: Final = 1000
"""How often another server's end may take the directory away from under us, in a row."""


def check_name(name: str) -> str:
    """`name` itself when it can name a device; else BadValue."""
    if _NAME.fullmatch(name) is None:
        raise BadValue(
            f"{name!r} is not a device name",
            hint="use 1 to 32 letters, digits, '_', '.' and '-', the first a letter or digit,"
            " such as zram0",
        )
    return name


def runtime_dir() -> Path:
    """The runtime directory, absolute, whether or not it exists; BadValue where none is known."""
    chosen = os.environ.get("ZRAMD_RUNTIME_DIR")
    if chosen:
        return Path(os.path.realpath(chosen))
    if os.geteuid() == 0:
        return Path(os.path.realpath("/run/zramd"))
    session = os.environ.get("XDG_RUNTIME_DIR")
    if session:
        return Path(os.path.realpath(session)) / "zramd"
    raise BadValue(
        "there is no runtime directory: neither ZRAMD_RUNTIME_DIR nor XDG_RUNTIME_DIR is set",
        hint="set ZRAMD_RUNTIME_DIR to a directory of yours, or run as root",
    )


def stay_there() -> None:
    """Let the runtime directory be for this process, and those it starts, where it is now, though
    it leaves the working directory."""
    os.environ["ZRAMD_RUNTIME_DIR"] = os.fspath(runtime_dir())


@dataclass(frozen=True, slots=True, init=False)
class Paths:
    """The places of one device, whether or not they exist."""

    name: str
    dir: Path

    def __init__(self, name: str) -> None:
        object.__setattr__(self, "name", check_name(name))
        object.__setattr__(self, "dir", runtime_dir() / name)
        length = len(os.fsencode(self.nbd_socket))
        if length > UNIX_PATH_MAX:
            raise BadValue(
                f"the socket path {self.nbd_socket} has {length} bytes,"
                f" and the kernel takes {UNIX_PATH_MAX}",
                hint="choose a shorter device name, or a shorter ZRAMD_RUNTIME_DIR",
            )

    @property
    def nbd_socket(self) -> Path:
        return self.dir / "nbd.sock"

    @property
    def control_socket(self) -> Path:
        return self.dir / "control"

    @property
    def log(self) -> Path:
        return self.dir / "log"

    @property
    def lock(self) -> Path:
        """Holds the server's process id, and that of its worker where it has one, a line each; 0
        where it will have none."""
        return self.dir / "lock"

    def server(self) -> int:
        """The process that holds the claim, or held it last; 0 where that cannot be told."""
        return self._processes()[0]

    def worker(self) -> int:
        """The process that does the I/O: the server's worker, or the server itself."""
        return self._processes()[:2][-1] or self.server()

    def rests(self) -> bool:
        """Whether the server keeps pages, and starts no worker for them any more."""
        return self._processes()[1:] == [0]

    def _processes(self) -> list[int]:
        try:
            return [int(line) for line in self.lock.read_text().split()] or [0]
        except (OSError, ValueError):
            return [0]


def names() -> list[str]:
    """The devices that have a directory, zram2 before zram10; their servers may be dead."""
    try:
        with os.scandir(runtime_dir()) as entries:
            found = [e.name for e in entries if _NAME.fullmatch(e.name) and e.is_dir()]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise _unusable(error) from error
    return sorted(found, key=_natural)


def _natural(name: str) -> list[tuple[bool, int, str]]:
    parts = re.findall(r"\d+|\D+", name)
    return [(not p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


class Claim:
    """The right to be the server of one name; see `claim`. A context manager that releases it."""

    def __init__(self, paths: Paths, descriptor: int) -> None:
        self.paths = paths
        self._descriptor = descriptor
        self._is_ours = True
        self.adopt()

    @classmethod
    def inherited(cls, paths: Paths, descriptor: int) -> "Claim":
        """The claim that is held on the lock that `descriptor` is open on, by a process that has
        executed this program; who it is stands in the lock file."""
        self = cls.__new__(cls)
        self.paths = paths
        self._descriptor = descriptor
        self._is_ours = True
        return self

    def fileno(self) -> int:
        """The descriptor on which it is held."""
        return self._descriptor

    def adopt(self) -> None:
        """Write down that this process is the holder; again after a fork, whose child inherits
        the claim."""
        self._write(b"%d\n" % os.getpid())

    def serve_by(self, worker: int) -> None:
        """Write down, beside the holder, which process does the I/O where that is another; 0 where
        none does."""
        self._write(b"%d\n%d\n" % (os.getpid(), worker))

    def _write(self, text: bytes) -> None:
        os.pwrite(self._descriptor, text, 0)  # first: a reader must not find nothing
        os.ftruncate(self._descriptor, len(text))

    def disown(self) -> None:
        """Leave the release to another process, which has forked this one."""
        self._is_ours = False

    def release(self) -> None:
        """Remove the device's directory, then let the next one in. Idempotent."""
        if self._descriptor < 0 or not self._is_ours:
            return
        # The lock goes last: until then nobody else can claim what is being removed.
        for entry in sorted(self.paths.dir.glob("*"), key=self.paths.lock.__eq__):
            try:
                entry.unlink()
            except OSError:
                pass  # nbdfuse's mount point while it is mounted; `zramd detach` clears it
        try:
            self.paths.dir.rmdir()
        except OSError:
            pass  # kept by that mount point, or by the lock of a new claimant
        os.close(self._descriptor)
        self._descriptor = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def claim(name: str, *, wait_s: float = 0) -> Claim:
    """Become the one server of `name`, making its directory; leftovers there are harmless.

    Waits up to `wait_s` seconds for a server that is ending. Raises ServerExists when another
    process holds the claim then, BadValue for the name, ServerFailed where the directory cannot
    be made.
    """
    paths = Paths(name)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            descriptor = _try_lock(paths)
        except OSError as error:
            raise _unusable(error) from error
        if descriptor is not None:
            return Claim(paths, descriptor)
        if time.monotonic() >= deadline:
            raise ServerExists(
                f"a server for {name} is running already{_holder(paths)}",
                hint=f"choose another name, or stop that one: zramd down {name}",
            )
        time.sleep(_POLL_S)


def _try_lock(paths: Paths) -> int | None:
    """The descriptor of the lock, taken; None when another has it."""
    for _ in range(_TRIES):
        _make(paths.dir.parent)
        _make(paths.dir)
        try:
            descriptor = os.open(paths.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except FileNotFoundError:
            continue  # the directory went between the two calls: its last server ended
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return None
        if stands_at(paths.lock, descriptor):
            return descriptor
        os.close(descriptor)  # locked, but its owner had unlinked it: look again
    raise FileNotFoundError(errno.ENOENT, "it does not stay", str(paths.lock))


def _make(directory: Path) -> None:
    # Not Path.mkdir(exist_ok=True): that fails when the directory is there and then goes.
    try:
        os.mkdir(directory, 0o700)
    except FileExistsError:
        pass


def _holder(paths: Paths) -> str:
    """` (process N)` of who wrote the lock file last, or nothing."""
    process = paths.server()
    return f" (process {process})" if process else ""


def _unusable(error: OSError) -> ServerFailed:
    return ServerFailed(
        f"the runtime directory cannot be used: {error.filename}: {error.strerror}",
        hint="set ZRAMD_RUNTIME_DIR to a directory that you may write",
    )

"""What can go wrong, once.

Every error a user can meet is one class here. The class owns what does not depend on the occasion:
`slug` (a stable name for scripts and logs), `exit_code` (of the command line), and `errno` (what a
zram user, or an NBD client, would see). The occasion gives `message`, one line that names the
culprit and what is allowed, and `hint`, the next step to take, or None where there is none.

Exit codes: 0 done; 2 wrong use or value; 3 anything unforeseen; 20 to 29 the server of a device;
30 to 39 the device itself; 40 to 49 the kernel side (attach, swap, mount). `docs/errors.md` lists
them; a test compares.
"""

import errno as _errno
from pathlib import Path
from typing import ClassVar, Final


class ZramdError(Exception):
    """Something went wrong that has no class of its own."""

    slug: ClassVar[str] = "error"
    exit_code: ClassVar[int] = 3
    errno: ClassVar[int] = _errno.EIO

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message

    def line(self) -> str:
        """All there is to say, notes too, in the one line in which every front end says it."""
        notes = getattr(self, "__notes__", [])
        said = [self.message, *notes, *([] if self.hint is None else [self.hint])]
        return " ".join("; ".join(said).split())


class BadValue(ZramdError):
    """A size, name, algorithm, path, attribute or value is not one of those allowed."""

    slug = "bad-value"
    exit_code = 2
    errno = _errno.EINVAL


class NoServer(ZramdError):
    """No server runs for the device of this name."""

    slug = "no-server"
    exit_code = 20
    errno = _errno.ENODEV


class ServerExists(ZramdError):
    """A server for this device, or on this socket, is running already."""

    slug = "server-exists"
    exit_code = 21
    errno = _errno.EEXIST


class ServerFailed(ZramdError):
    """The server could not start, or ended while it was being asked."""

    slug = "server-failed"
    exit_code = 22


class NotHardened(ZramdError):
    """The server cannot be hardened against running out of memory, as swap needs it."""

    slug = "not-hardened"
    exit_code = 23
    errno = _errno.EPERM


class DeviceBusy(ZramdError):
    """The device is in use, or already initialised; nothing was changed."""

    slug = "device-busy"
    exit_code = 30
    errno = _errno.EBUSY


class NotInitialised(ZramdError):
    """I/O on a device that has no disksize, or whose disksize was reset meanwhile."""

    slug = "not-initialised"
    exit_code = 31
    errno = _errno.EIO


class NoMemory(ZramdError):
    """The memory for a device's table could not be had; the device is as it was before."""

    slug = "no-memory"
    exit_code = 32
    errno = _errno.ENOMEM


class StoreFull(ZramdError):
    """The write would pass mem_limit; the old content is untouched."""

    slug = "store-full"
    exit_code = 33
    errno = _errno.ENOSPC


class OutOfRange(ZramdError):
    """The request does not lie inside the device."""

    slug = "out-of-range"
    exit_code = 34
    errno = _errno.EINVAL


class Corrupt(ZramdError):
    """A stored page does not decompress to 4096 bytes, or a recovery has found it lost."""

    slug = "corrupt"
    exit_code = 35


class NotSupported(ZramdError):
    """The attribute or operation exists in zram and is not built here yet."""

    slug = "not-supported"
    exit_code = 36
    errno = _errno.EOPNOTSUPP


class BadArena(ZramdError):
    """The arena that was handed over is none of zramd's, of another version, or damaged."""

    slug = "bad-arena"
    exit_code = 37
    errno = _errno.EINVAL

    def of(self, file: Path) -> "BadArena":
        """The same, of this file."""
        return BadArena(f"{file}: {self.message}", hint=self.hint)


class SaveFailed(ZramdError):
    """The snapshot could not be written; the device is as it was, and so is what stood there."""

    slug = "save-failed"
    exit_code = 38


class NeedsRoot(ZramdError):
    """Only root, or a capability we lack, may do this."""

    slug = "needs-root"
    exit_code = 40
    errno = _errno.EPERM


class ToolMissing(ZramdError):
    """A program or kernel feature that this needs is not on this machine."""

    slug = "tool-missing"
    exit_code = 41
    errno = _errno.ENOENT


class AttachFailed(ZramdError):
    """The kernel did not take, or did not let go of, the device node."""

    slug = "attach-failed"
    exit_code = 42


class UseFailed(ZramdError):
    """mkswap, swapon, mkfs, mount or their reverse failed; what stood before still stands."""

    slug = "use-failed"
    exit_code = 43


KINDS: Final[tuple[type[ZramdError], ...]] = (ZramdError, *ZramdError.__subclasses__())
"""Every class of this page."""

_BY_SLUG: Final = {kind.slug: kind for kind in KINDS}


def by_slug(slug: str) -> type[ZramdError]:
    """The class with this slug; ZramdError itself where none has it."""
    return _BY_SLUG.get(slug, ZramdError)

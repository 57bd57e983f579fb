"""What the control socket of a device says: the varlink interface zramd.Device.

`org.varlink.service` beside it describes it to any varlink client, such as systemd's varlinkctl:

    varlinkctl call /run/zramd/zram0/control zramd.Device.Statistics {}

Every error travels as `Failed`, with the slug that names its class in zramd.errors, so that the
client raises the same error that the device did.

Guarantees
1. No call blocks the event loop: what changes the device is done in a thread, since a reset waits
   for the requests that are inside, and writing disksize may allocate much. What only looks waits
   for nothing and needs no thread, so it is answered also while all threads wait for a reset.
2. What was begun is done, whether its caller waits for the end of it or is gone: a connection that
   ends cancels nothing. But a snapshot ends with who wanted it.
3. Stop goes through a reset, so it cannot race a client that connects meanwhile: that client
   either makes it fail with DeviceBusy, or is refused for want of a disksize.
4. Upgrade is answered by the process that is replaced, before it is: who called sees the end of the
   connection then, and is told by the lock file who has come. It is refused while a call is under
   way that it would cut short.

The client uses DeviceInterface for its signatures only; this module must not load a compressor.
"""

import asyncio
import dataclasses
import logging
import os
import select
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeAlias, TypedDict, TypeVar

from asyncvarlink import (
    FileDescriptor,
    TypedVarlinkErrorReply,
    VarlinkInterface,
    varlinkmethod,
)

from zramd.errors import DeviceBusy, NotSupported, SaveFailed, ZramdError, by_slug
from zramd.statistics import Statistics

if TYPE_CHECKING:
    from zramd.device import Zram

INTERFACE: Final = "zramd.Device"

Upgrade: TypeAlias = Callable[[list[str]], Awaitable[int]]
"""Has a program, a command without its arguments, go on in our place; see DeviceInterface."""

_log = logging.getLogger(__name__)
_P = ParamSpec("_P")
_T = TypeVar("_T")

# The reply of Statistics has the fields of the dataclass; varlink knows lists, not tuples.
_LISTS = ("openers", "in_flight")
_FIELDS = {f.name: f.type for f in dataclasses.fields(Statistics)} | dict.fromkeys(
    _LISTS, list[str]
)
_StatisticsReply: Any = TypedDict("_StatisticsReply", _FIELDS)  # type: ignore[misc]


class Failed(TypedVarlinkErrorReply, interface=INTERFACE):
    """Why it was not done: slug is a stable name, message one line, hint the next step to take."""

    class Parameters:
        slug: str
        message: str
        hint: str | None

    def to_error(self) -> ZramdError:
        said = self.parameters
        return by_slug(said["slug"])(said["message"], hint=said.get("hint"))


def statistics_from_reply(reply: dict[str, Any]) -> Statistics:
    return Statistics(**reply | {name: tuple(reply[name]) for name in _LISTS})


class DeviceInterface(VarlinkInterface, name=INTERFACE):
    """One zramd device. Attributes have the names and formats of zram's."""

    errors = (Failed,)

    def __init__(
        self, zram: "Zram", stop: Callable[[], None], upgrade: Upgrade | None = None
    ) -> None:
        """`stop` is called on the event loop when the server is to end."""
        self._zram = zram
        self._stop = stop
        self._upgrade = upgrade
        self._under_way: list[str] = []

    @varlinkmethod(return_parameter="value")
    def Get(self, attribute: str) -> str:
        """The text of an attribute, as reading /sys/block/zramN/ATTRIBUTE gives it."""
        from zramd import attributes  # the server has loaded it, and the client must not

        return _ask(attributes.get, self._zram, attribute)

    @varlinkmethod
    async def Set(self, attribute: str, value: str) -> None:
        """Write an attribute, as writing to /sys/block/zramN/ATTRIBUTE does."""
        from zramd import attributes

        await asyncio.to_thread(_ask, attributes.set, self._zram, attribute, value)

    @varlinkmethod(return_type=_StatisticsReply)
    def Statistics(self) -> dict[str, Any]:
        """All figures of the device at one moment: bytes, or pages of 4096 bytes."""
        now = _ask(self._zram.statistics)
        return dataclasses.asdict(now) | {name: list(getattr(now, name)) for name in _LISTS}

    @varlinkmethod
    async def Reset(self, force: bool = False) -> None:
        """Drop all pages and the disksize. Refused while the device is open; force ends its
        connections instead."""
        with self._alone("reset"):
            await asyncio.to_thread(_ask, self._zram.reset, force=force)

    @varlinkmethod
    async def Save(self, file: FileDescriptor, while_open: FileDescriptor) -> None:
        """Write a snapshot of what is stored now to this file, open for writing and empty, while
        the device is in use. Its size tells how far that is. It ends when nobody has the writing
        end of the pipe `while_open` any more."""
        with self._alone("saved"):
            ours, wanted = os.dup(file.fileno()), os.dup(while_open.fileno())
            await asyncio.to_thread(_ask, _save, self._zram, ours, wanted)

    @varlinkmethod(return_parameter="lost")
    async def Restore(self, file: FileDescriptor) -> list[int]:
        """Make the device, which has no disksize, what this snapshot has. Its position tells how
        far that is. Returns the pages that were lost already when the snapshot was made."""
        with self._alone("restored"):
            return await asyncio.to_thread(_ask, _with, os.dup(file.fileno()), self._zram.restore)

    @varlinkmethod
    async def Stop(self, force: bool = False) -> None:
        """Reset, but for a file that the user keeps the device in, then end the server. Refused as
        Reset is."""
        with self._alone("stopped"), _told():
            try:
                await asyncio.to_thread(self._zram.close, force=force)
            except SaveFailed:  # the device has ended all the same
                self._stop()
                raise
            self._stop()

    @varlinkmethod(return_parameter="process")
    async def Upgrade(self, program: list[str]) -> int:
        """Have this program (an absolute path, and arguments that come before `serve NAME ...`)
        serve the device from now on, in use as it is, in the place of the one that runs. Returns
        the process that has been started for that; what runs ends next."""
        with _told():
            if self._upgrade is None:
                raise NotSupported(
                    f"the server of {self._zram.name} cannot be upgraded in use",
                    hint="only `zramd serve` and `zramd up` start one that can; take the device"
                    " down, and start it anew",
                )
            if self._under_way:
                raise DeviceBusy(
                    f"{self._zram.name} is being {self._under_way[0]}",
                    hint="try again when that has ended",
                )
            return await self._upgrade(program)

    @contextmanager
    def _alone(self, what: str) -> Iterator[None]:
        """No upgrade begins meanwhile."""
        self._under_way.append(what)
        try:
            yield
        finally:
            self._under_way.remove(what)


def _save(zram: "Zram", file: int, while_open: int) -> None:
    """With descriptors that are ours: the caller's go when the caller does."""
    writers = select.poll()
    writers.register(while_open, 0)  # their end is told unasked

    def must_go_on() -> None:
        if writers.poll(0):
            raise SaveFailed("who wanted the snapshot has gone")

    try:
        zram.save(file, must_go_on)
    finally:
        os.close(file)
        os.close(while_open)


def _with(descriptor: int, function: Callable[[int], _T]) -> _T:
    """Have it use a descriptor of ours."""
    try:
        return function(descriptor)
    finally:
        os.close(descriptor)


def _ask(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call the device."""
    with _told():
        return function(*args, **kwargs)


@contextmanager
def _told() -> Iterator[None]:
    """What is raised in it becomes a reply."""
    try:
        yield
    except ZramdError as error:
        raise Failed(slug=error.slug, message=error.message, hint=error.hint) from error
    except Exception as error:
        _log.exception("a control call failed unforeseen")
        message = f"unforeseen in the server: {type(error).__name__}: {error}"
        raise Failed(slug=ZramdError.slug, message=message, hint="see the server's log") from error

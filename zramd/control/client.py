"""Asking the server of a device: a blocking face on the varlink client, for the command line.

What the device raises is raised here, as the same class. A server that is not there is NoServer;
one that ends while it is being asked is ServerEnded, one that does not answer ServerFailed.
"""

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self, TypeAlias

from asyncvarlink import (
    FileDescriptor,
    VarlinkClientProtocol,
    VarlinkErrorReply,
    VarlinkTransport,
)
from asyncvarlink.conversion import ConversionError
from asyncvarlink.serviceinterface import VarlinkServiceInterface

from zramd.control.interface import DeviceInterface, Failed, statistics_from_reply
from zramd.errors import NoServer, ServerFailed, ZramdError
from zramd.statistics import Statistics

ANSWER_S: Final = 5.0
"""How long a server may take to connect or to tell something; a live one takes milliseconds.
Calls that change something may wait for I/O in flight, and have no limit."""

PATIENCE_S: Final = 1.0
"""How long a reset waits for I/O in flight before it is told whose that is."""

PROGRESS_S: Final = 0.1


class ServerEnded(ServerFailed):
    """It ended while it was being asked: to some that is what they wanted."""


State: TypeAlias = Literal["serving", "idle", "dead", "silent"]


def look(path: Path) -> tuple[State, Statistics | None]:
    """How the server on this control socket is, and what it tells; None where it tells nothing. A
    server that is dead, or does not answer for ANSWER_S, is a state."""
    try:
        with Control(path) as control:
            now = control.statistics()
    except (NoServer, ServerEnded):
        return "dead", None
    except ZramdError:
        return "silent", None
    return ("serving" if now.disksize else "idle"), now


class Control:
    """A connection to the control socket at `path`, PATH/TO/NAME/control. A context manager."""

    def __init__(self, path: Path) -> None:
        """Raises NoServer where nobody listens, ServerFailed where the path cannot be used."""
        self._path = path
        self._name = path.parent.name
        self._runner = asyncio.Runner()
        try:
            sock = self._connect(path)
            self._protocol = self._runner.run(_talk_over(sock))
        except BaseException:
            self._runner.close()
            raise
        self._device = self._protocol.make_proxy(DeviceInterface)

    def get(self, attribute: str) -> str:
        value: str = self._call(self._device.Get(attribute=attribute), ANSWER_S)["value"]
        return value

    def set(self, attribute: str, value: str) -> None:
        self._call(self._device.Set(attribute=attribute, value=value))

    def statistics(self) -> Statistics:
        return statistics_from_reply(self._call(self._device.Statistics(), ANSWER_S))

    def reset(
        self, *, force: bool = False, waiting: Callable[[tuple[str, ...]], None] = lambda _: None
    ) -> None:
        """`waiting` is called once if it takes long, with whose requests are being waited for."""
        call = self._begin(self._device.Reset(force=force))
        if not self._wait(call, PATIENCE_S):
            with suppress(ZramdError), Control(self._path) as other:
                waiting(other.statistics().in_flight)
        self._call(call)

    def save(self, file: int, going_on: Callable[[], None] = lambda: None) -> None:
        """Have a snapshot written to this descriptor; `going_on` is called every PROGRESS_S."""
        while_open, kept_open = os.pipe()  # it ends with us
        try:
            descriptors = FileDescriptor(file), FileDescriptor(while_open)
            call = self._begin(self._device.Save(file=descriptors[0], while_open=descriptors[1]))
            while not self._wait(call, PROGRESS_S):
                going_on()
            self._call(call)
        finally:
            os.close(while_open)
            os.close(kept_open)

    def restore(self, file: int, going_on: Callable[[], None] = lambda: None) -> list[int]:
        """Have a snapshot read from this descriptor; `going_on` is called every PROGRESS_S. Returns
        the pages that it does not have."""
        call = self._begin(self._device.Restore(file=FileDescriptor(file)))
        while not self._wait(call, PROGRESS_S):
            going_on()
        lost: list[int] = self._call(call)["lost"]
        return lost

    def stop(self, *, force: bool = False) -> None:
        """Returns when the server has agreed to end, not when it has ended."""
        self._call(self._device.Stop(force=force))

    def version(self) -> str:
        """The server's, of zramd."""
        service = self._protocol.make_proxy(VarlinkServiceInterface)
        version: str = self._call(service.GetInfo(), ANSWER_S)["version"]
        return version

    def upgrade(self, program: Sequence[str]) -> int:
        """Have `program` serve the device from now on. Returns its process when that has loaded;
        this server ends next."""
        process: int = self._call(self._device.Upgrade(program=list(program)))["process"]
        return process

    def close(self) -> None:
        """Idempotent."""
        self._runner.run(_hang_up(self._protocol))
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _connect(self, path: Path) -> socket.socket:
        # A blocking connect waits its turn in a full backlog; asyncio's takes EAGAIN for done.
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(ANSWER_S)
        try:
            sock.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            raise NoServer(
                f"no server runs for {self._name}",
                hint="`zramd list` shows what there is, `zramd up` and `zramd serve` start one",
            ) from None
        except TimeoutError:
            sock.close()
            raise self._silent() from None
        except OSError as error:
            sock.close()
            raise ServerFailed(f"cannot ask {path}: {error.strerror or error}") from error
        sock.setblocking(False)
        return sock

    def _begin(self, call: Awaitable[Any]) -> "asyncio.Task[Any]":
        return self._runner.get_loop().create_task(_within(call, None))

    def _wait(self, call: "asyncio.Task[Any]", seconds: float) -> bool:
        """Whether it has ended within that time."""
        self._runner.run(asyncio.wait({call}, timeout=seconds))
        return call.done()

    def _call(self, call: Awaitable[Any], answer_s: float | None = None) -> Any:
        try:
            return self._runner.run(_within(call, answer_s))
        except Failed as failed:
            raise failed.to_error() from None
        except TimeoutError:
            raise self._silent() from None
        except OSError as error:
            raise ServerEnded(
                f"the server of {self._name} ended while it was being asked",
                hint=f"`zramd list` shows whether it still runs; `zramd down {self._name}`"
                " clears what it left",
            ) from error
        except (VarlinkErrorReply, ConversionError) as error:
            raise ServerFailed(
                f"the server of {self._name} speaks another version: {error}",
                hint="ask it with the version of zramd that started it",
            ) from error

    def _silent(self) -> ServerFailed:
        return ServerFailed(
            f"the server of {self._name} does not answer within {ANSWER_S:.0f} seconds",
            hint="it is stopped or overloaded; its process id stands in"
            " the file `lock` of its runtime directory",
        )


async def _talk_over(sock: socket.socket) -> VarlinkClientProtocol:
    protocol = VarlinkClientProtocol()
    VarlinkTransport(asyncio.get_running_loop(), sock, sock, protocol)
    await asyncio.sleep(0)  # lets the transport tell the protocol that it is connected
    return protocol


async def _within(call: Awaitable[Any], seconds: float | None) -> Any:
    async with asyncio.timeout(seconds):
        return await call


async def _hang_up(protocol: VarlinkClientProtocol) -> None:
    protocol.close()
    await asyncio.sleep(0)  # lets the transport close its socket
    await asyncio.sleep(0)

"""A coroutine that is cancelled at an await, whichever, leaves nobody inside the device for good.

What a coroutine waits for goes on in a thread (a request, a reset); cancelling it, or losing the
client for whom it runs, ends the waiting and not that. So afterwards the thread is through, the
gate is empty, and the device can be reset and used.
"""

import asyncio
import json
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Generator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.nbd.harness import RawClient, request
from tests.store.contents import text
from tests.store.test_pages import Codec
from zramd.control.interface import DeviceInterface
from zramd.control.server import ControlThread
from zramd.device import Zram
from zramd.errors import NotInitialised
from zramd.nbd.address import UnixAddress
from zramd.nbd.server import Server
from zramd.nbd.transmission import INLINE
from zramd.nbd.wire import NBD_CMD_READ, NBD_CMD_WRITE
from zramd.service import worker
from zramd.service.config import Config
from zramd.service.runtime import claim
from zramd.store import PAGE

DEADLINE_S = 30
LONG = INLINE + PAGE


class CutAt:
    """Awaits a coroutine, which is cancelled where it waits for the `n`th time."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any], n: int) -> None:
        self.coroutine = coroutine
        self.n = n
        self.cut = False

    def __await__(self) -> Generator[Any, Any, Any]:
        steps = self.coroutine.__await__()
        waits = 0
        sent: Any = None
        try:
            future = steps.send(None)
            while True:
                waits += 1
                if waits == self.n:
                    self.cut = True
                    future = steps.throw(asyncio.CancelledError())
                    continue
                try:
                    sent = yield future
                except BaseException as error:
                    future = steps.throw(error)
                else:
                    future = steps.send(sent)
        except StopIteration as ended:
            return ended.value


def cut_at_each_await(run: Callable[[Callable[..., Any]], object]) -> int:
    """Call `run` with a way to await that cuts at the first await, at the second, ... until there
    is no such await; returns how many there were."""
    for n in range(1, 1000):
        cuts: list[CutAt] = []

        async def cutting(coroutine: Coroutine[Any, Any, Any], n: int = n, cuts=cuts) -> Any:
            cuts.append(CutAt(coroutine, n))
            try:
                return await cuts[-1]
            except asyncio.CancelledError:
                return None

        run(cutting)
        if not any(cut.cut for cut in cuts):
            return n - 1
    raise AssertionError("awaits without end")


class HeldCodec(Codec):
    """Reads and writes stop in the codec until they are told to go on."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.go = threading.Event(), threading.Event()
        self.hook = self.hook_of_reads = self._hold

    def _hold(self) -> None:
        self.reached.set()
        assert self.go.wait(DEADLINE_S)


def held(zram: Zram) -> HeldCodec:
    codec = HeldCodec()
    assert zram._meta is not None
    zram._meta.comp = codec  # type: ignore[assignment]
    return codec


def is_free(zram: Zram) -> None:
    """Nobody is inside, and the device can be reset, initialised and used."""
    deadline = time.monotonic() + DEADLINE_S
    while zram._gate.inside() or zram._reset_lock.locked() or zram._openers:
        assert time.monotonic() < deadline, zram.statistics()
        time.sleep(0.001)
    zram.reset()
    zram.init(PAGE)
    opener = zram.open("afterwards")
    opener.write(0, text(1))
    assert opener.read(0, PAGE) == text(1)
    zram.reset(force=True)


@pytest.mark.parametrize("call", ["Reset", "Stop", "Set"])
@pytest.mark.parametrize("job", ["read", "write"])
def test_a_control_call_that_is_cancelled_while_a_request_is_inside_ends_its_work(call, job):
    def run(cutting) -> None:
        zram = Zram("zram0")
        zram.init(1 << 20)
        opener = zram.open("test")
        codec = held(zram)
        if job == "read":
            codec.go.set()
            opener.write(0, text(1))
            codec.go.clear()
            codec.reached.clear()
        jobs = {"read": lambda: opener.read(0, PAGE), "write": lambda: opener.write(0, text(2))}
        inside = threading.Thread(target=jobs[job])
        inside.start()
        assert codec.reached.wait(DEADLINE_S)
        stopped: list[bool] = []
        device = DeviceInterface(zram, lambda: stopped.append(True))

        async def ask() -> None:
            if call == "Set":
                waiting = device.Set(attribute="mem_limit", value="1M")
            else:
                waiting = getattr(device, call)(force=True)
            task = asyncio.ensure_future(cutting(waiting))
            await asyncio.sleep(0)
            if call != "Set":
                while zram._gate.init_done:
                    await asyncio.sleep(0.001)
                with pytest.raises(NotInitialised):
                    opener.read(0, 1)
                assert zram._meta is not None
                assert not zram._meta.arena.map.closed
            codec.go.set()
            await task

        asyncio.run(ask())  # its end waits for the threads
        inside.join(DEADLINE_S)
        if call == "Set":
            assert zram.statistics().mem_limit == 1 << 20
            opener.close()
        else:
            assert zram.disksize == 0
            assert opener.closed
        is_free(zram)

    assert cut_at_each_await(run) >= 1


@pytest.mark.parametrize("command", [NBD_CMD_READ, NBD_CMD_WRITE])
def test_a_server_whose_end_is_cancelled_at_any_await_ends_at_the_next_try(command, tmp_path):
    def run(cutting) -> None:
        zram = Zram("zram0")
        zram.init(1 << 20)
        opener = zram.open("before")
        opener.write(0, text(1) * (LONG // PAGE))
        opener.close()
        codec = held(zram)
        address = UnixAddress(tmp_path / "nbd.sock")

        async def serve() -> None:
            server = Server(zram)
            await server.listen(address)
            client = await asyncio.to_thread(RawClient, address)
            payload = text(2) * (LONG // PAGE) if command == NBD_CMD_WRITE else b""
            client.send(request(NBD_CMD_WRITE, 0, LONG) + text(3) * (LONG // PAGE))
            await asyncio.to_thread(codec.reached.wait, DEADLINE_S)
            client.send(request(command, 0, LONG, cookie=2) + payload)
            closing = asyncio.ensure_future(cutting(server.close()))
            await asyncio.sleep(0)
            codec.go.set()
            await closing
            client.sock.close()
            await server.close()
            assert server.connections == 0
            assert not server.addresses

        asyncio.run(serve())
        is_free(zram)

    assert cut_at_each_await(run) >= 1


class Alone:
    """The link of a worker without a supervisor."""

    kept: ClassVar[dict[str, int]] = {}
    takes_over = False
    relied_on = False

    def keep(self, name: str, descriptor: int) -> None:
        os.fstat(descriptor)

    def ready(self) -> None:
        pass

    def ending(self) -> None:
        pass


def test_a_service_that_is_cancelled_at_any_await_leaves_nothing(monkeypatch):
    """From its start, with a client that has a request under way, to its end by SIGTERM."""

    def run(cutting) -> None:
        zram = Zram("zram0")
        zram.init(1 << 20)
        codec = held(zram)
        with claim("zram0") as mine:

            async def serve() -> None:
                config = Config(disksize=zram.disksize)
                serving = worker._serve(
                    zram,
                    mine.paths,
                    config,
                    Alone(),
                    threading.Event(),
                    None,
                    None,
                    False,
                    lambda: None,
                )
                service = asyncio.ensure_future(cutting(serving))
                while not service.done() and not mine.paths.control_socket.exists():
                    await asyncio.sleep(0.001)
                if not service.done():
                    address = UnixAddress(mine.paths.nbd_socket)
                    client = await asyncio.to_thread(RawClient, address)
                    client.send(request(NBD_CMD_WRITE, 0, LONG) + text(3) * (LONG // PAGE))
                    await asyncio.to_thread(codec.reached.wait, DEADLINE_S)
                    os.kill(os.getpid(), signal.SIGTERM)
                    codec.go.set()
                    await service
                    client.sock.close()
                assert not mine.paths.nbd_socket.exists()
                assert not mine.paths.control_socket.exists()

            asyncio.run(serve())
            zram.close()  # as worker.run does
        assert list(Path(runtime).iterdir()) == []
        is_free(zram)

    with tempfile.TemporaryDirectory(prefix="z") as runtime:
        monkeypatch.setenv("ZRAMD_RUNTIME_DIR", runtime)
        assert cut_at_each_await(run) >= 2


def test_a_client_that_is_gone_before_its_reset_has_ended_does_not_stop_it():
    zram = Zram("zram0")
    zram.init(1 << 20)
    opener = zram.open("test")
    codec = held(zram)
    writer = threading.Thread(target=opener.write, args=(0, text(1)))
    writer.start()
    assert codec.reached.wait(DEADLINE_S)
    with tempfile.TemporaryDirectory(prefix="z") as directory:
        control = ControlThread(zram, Path(directory, "control"), lambda: None)
        control.start()
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(Path(directory, "control")))
            call = {"method": "zramd.Device.Reset", "parameters": {"force": True}}
            client.sendall(json.dumps(call).encode() + b"\0")
            deadline = time.monotonic() + DEADLINE_S
            while zram._gate.init_done:
                assert time.monotonic() < deadline
                time.sleep(0.001)
        assert not zram._meta.arena.map.closed
        codec.go.set()
        writer.join(DEADLINE_S)
        control.close()
    assert zram.disksize == 0
    assert opener.closed
    is_free(zram)

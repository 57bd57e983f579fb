"""A forced reset of a device under I/O, again and again: nothing old is ever read as new.

Clients write, read and discard the same few pages without a pause; against them a controller resets
the device and gives it another size and another algorithm, while one more asks for statistics. Once
in one process, once with `zramd serve`, once with nbdkit. What it asserts:

1. Every page read is whole, is of the place that it was read from, and was written by a connection
   to the same initialisation. Pages tell all this themselves, and each initialisation (generation)
   has a disksize of its own, so that the handshake tells a client which one it talks to.
2. What all clients saw of each page in each generation is linearizable (`linear`), where a refused
   request has had no effect.
3. Every request that was sent whole is answered before the connection ends: normally, or with EIO
   once a reset of its generation has begun, and then for good.
4. A connection ends, and is not cut off, when its generation has; nothing waits for ever.
5. In the end the server holds no more descriptors, threads, memory and arenas than after the first
   200 resets.

ZRAMD_TORTURE_RESETS is the number of resets per target, 2000 where it is not set. Nothing is
asserted on speed: STALL_S without a single reset is what a hang is.
"""

import errno
import gc
import math
import os
import random
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from io import BufferedReader
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import linear, places
from tests.conftest import require
from tests.store.contents import ZEROS, noise, text
from zramd import attributes
from zramd.control.client import Control
from zramd.device import Zram
from zramd.errors import DeviceBusy, NoServer, NotInitialised, ZramdError
from zramd.nbd import wire
from zramd.nbd.client import negotiate
from zramd.nbd.transmission import INLINE
from zramd.opener import Opener
from zramd.store import PAGE

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "nbd_plugin.py"
RESETS = int(os.environ.get("ZRAMD_TORTURE_RESETS", "2000"))
STALL_S = 60
CLIENTS = 4
PAGES = 40
"""So few that requests meet."""
LONG = INLINE // PAGE + 1
"""A request of so many pages is done in a thread by `zramd serve`, the shorter ones on its loop."""
DEEPEST = 6
"""Requests that one connection may have under way. Their replies must fit the socket's buffer: a
client that sends does not read, and nbdkit then does not read either."""
ALGORITHMS = ("lz4", "zstd", "deflate(level=1)", "lz4hc", "zstd(level=-3)", "lz4(level=9)")
JUMPS = (0, 1 << 17, 1 << 18)
"""Pages on top of what makes a generation's disksize its own: 512 MiB, 1 GiB."""
RSS_SLACK = 8 << 20
NBDKIT_LOSES = 1024
"""Bytes per refusal: nbdkit 1.32 never drops an exception that a plugin has raised."""
SWITCH_S = 0.00001
"""How long a thread holds the GIL where others want it, a 500th of what is usual."""
IN_SERVER = f"""
import ctypes, gc, sys, threading, time

def trim():
    while True:
        time.sleep(0.5)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)

threading.Thread(target=trim, daemon=True).start()
sys.setswitchinterval({SWITCH_S})
"""
"""What a server runs besides, so that its resident memory is what it holds, not what it has freed
as well, and threads change as often as here."""
POOLED_THREADS = 8
"""A server's pools start a thread when they first need one more, and this is what they stop at."""

# Pages

_CHECKSUM = struct.Struct("<I")
_HEAD = struct.Struct("<IIQ")
_NOISE = noise(0, 2 * PAGE)
_TEXT = text(1) + text(2)
_BODIES = (
    lambda at: _TEXT[at : at + PAGE],
    lambda at: _NOISE[at : at + PAGE],
    lambda at: _NOISE[at : at + at // 2] + _TEXT[at : at + PAGE],
    lambda at: bytes(at // 2) + _NOISE[at : at + 64] + bytes(PAGE),
)


def page_of(page: int, generation: int, number: int) -> bytes:
    """What write `number` puts to `page`, a body of one of several kinds behind a head that names
    it; `number` is not 0, and no other write has it."""
    body = _HEAD.pack(page, generation, number) + _BODIES[number // 5 % 4](number * 61 % PAGE)
    body = body[: PAGE - _CHECKSUM.size]
    return _CHECKSUM.pack(zlib.crc32(body)) + body


def number_in(data: bytes, page: int, generation: int) -> int:
    """Who wrote what was read from `page`; 0 for zeros."""
    if data == ZEROS:
        return 0
    body = data[_CHECKSUM.size :]
    where, when, number = _HEAD.unpack_from(body)
    told = f"read from page {page} in generation {generation}"
    assert _CHECKSUM.unpack_from(data) == (zlib.crc32(body),), f"a torn page, {told}"
    assert when == generation, f"a page of generation {when}, {told}"
    assert where == page, f"page {where}, {told}"
    return number


# Requests


@dataclass(slots=True)
class Request:
    """`count` pages from `first` on. The first of them is written with `number`, the next with the
    next, and no other request has these numbers."""

    command: int
    first: int
    count: int
    number: int
    generation: int
    start: int = 0

    def data(self) -> bytes:
        """What a write carries."""
        if self.command != wire.NBD_CMD_WRITE:
            return b""
        return b"".join(
            page_of(self.first + i, self.generation, self.number + i) for i in range(self.count)
        )

    def ops(self, end: int, data: bytes) -> Iterator[tuple[int, linear.Op]]:
        """Per page, what the request has done to it, or seen there in `data`."""
        is_write = self.command != wire.NBD_CMD_READ
        for i in range(self.count):
            page = self.first + i
            if self.command == wire.NBD_CMD_READ:
                value = number_in(data[i * PAGE : (i + 1) * PAGE], page, self.generation)
            else:
                value = self.number + i if self.command == wire.NBD_CMD_WRITE else 0
            yield page, linear.Op(self.start, end, is_write, value)


COMMANDS = (wire.NBD_CMD_WRITE, wire.NBD_CMD_READ, wire.NBD_CMD_TRIM, wire.NBD_CMD_WRITE_ZEROES)


# Who takes part


class Torture:
    """What all who take part share."""

    def __init__(self) -> None:
        self.generation = 0
        self.generations: dict[int, int] = {}
        """By disksize."""
        self.doomed = self.ended = 0
        """The last generation whose reset has begun, and has returned."""
        self.histories: dict[int, list[list[linear.Op]]] = {}
        """By generation and page; taken away when checked."""
        self.initialised = threading.Event()
        self.numbers = [count(client + 1, CLIENTS) for client in range(CLIENTS)]
        """What each client takes the numbers of its requests from, by the PAGES of them."""
        self.over = threading.Event()
        self.failures: list[str] = []
        self.refused = self.cut = self.turned_away = self.checked = 0

    def begin_generation(self) -> int:
        """A new one; its disksize."""
        self.generation += 1
        pages = PAGES + self.generation + JUMPS[self.generation % len(JUMPS)]
        self.histories[self.generation] = [[] for _ in range(PAGES)]
        self.generations[pages * PAGE] = self.generation
        return pages * PAGE

    def answered(self) -> int:
        """Answers of this generation so far, by the page."""
        return sum(map(len, self.histories[self.generation]))

    def record(self, request: Request, end: int, data: bytes = b"") -> None:
        pages = self.histories[request.generation]
        for page, op in request.ops(end, data):
            pages[page].append(op)

    def check(self, before: int) -> None:
        """The generations before this one, of which no more will come."""
        for generation in [g for g in self.histories if g < before]:
            for page, ops in enumerate(self.histories.pop(generation)):
                self.checked += len(ops)
                fault = linear.fault(ops, 0)
                assert not fault, f"page {page} of generation {generation}: {fault}"


class Actor(threading.Thread):
    """A thread that takes part; `doing` is what it waits for."""

    def __init__(self, torture: Torture, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.torture = torture
        self.doing: object = "starts"

    def run(self) -> None:
        try:
            self.act()
        except BaseException:
            self.torture.failures.append(f"{self.name}:\n{traceback.format_exc()}")
            self.torture.over.set()
        self.doing = "has ended"

    def act(self) -> None:
        raise NotImplementedError


class Client(Actor):
    """One connection after another, until all is over."""

    def __init__(self, torture: Torture, number: int) -> None:
        super().__init__(torture, f"client {number}")
        self.generation = 0
        """That of its connection; it will never come back to an earlier one."""
        self.chance = random.Random(f"{number} after {torture.generation}")
        self.numbers = torture.numbers[number]
        self.refused = self.cut = self.turned_away = 0

    def act(self) -> None:
        while not self.torture.over.is_set():
            if not self.connection():
                self.turned_away += 1
                self.doing = "waits for a device to connect to"
                self.torture.initialised.wait(self.chance.choice((0.001, 0.01)))

    def connection(self) -> bool:
        """One, from its beginning to its end; False where there was none to be had."""
        raise NotImplementedError

    def begin(self, size: int, ended: int) -> None:
        """`ended` is the generation that had ended before this connection began."""
        assert size in self.torture.generations, f"a device of {size} bytes, which there never was"
        self.generation = self.torture.generations[size]
        assert self.generation > ended, f"connected to {self.generation}, which had ended"

    def draw(self, generation: int) -> Request:
        """The next request, at random."""
        (command,) = self.chance.choices(COMMANDS, (45, 45, 5, 5))
        pages = LONG if self.chance.random() < 0.03 else self.chance.randint(1, 8)
        first = self.chance.randrange(PAGES - pages + 1)
        return Request(command, first, pages, next(self.numbers) * PAGES, generation)

    def refuse(self, generation: int) -> None:
        self.refused += 1
        assert generation <= self.torture.doomed, "refused, and nobody resets"


class InProcess(Client):
    """Calls an Opener, one request at a time, and the one before it, which must stay closed."""

    def __init__(self, torture: Torture, number: int, zram: Zram) -> None:
        super().__init__(torture, number)
        self.zram = zram
        self.former: Opener | None = None
        self.former_generation = 0

    def connection(self) -> bool:
        ended = self.torture.ended
        try:
            opener = self.zram.open(self.name)
        except (NotInitialised, DeviceBusy):
            return False
        self.begin(opener.size, ended)
        while not self.torture.failures and self.ask(opener, self.generation):
            if self.former is not None and self.chance.random() < 0.1:
                admitted = self.ask(self.former, self.former_generation)
                assert not admitted, f"an opener of generation {self.former_generation} revived"
        self.former, self.former_generation = opener, self.generation
        return True

    def ask(self, opener: Opener, generation: int) -> bool:
        """Whether the request was admitted."""
        request = self.draw(generation)
        content = request.data()
        span = request.first * PAGE, request.count * PAGE
        self.doing = "does", request
        data = b""
        request.start = time.monotonic_ns()
        try:
            if request.command == wire.NBD_CMD_READ:
                data = opener.read(*span)
            elif request.command == wire.NBD_CMD_WRITE:
                opener.write(span[0], content)
            elif request.command == wire.NBD_CMD_TRIM:
                opener.discard(*span)
            else:
                opener.zero(*span)
        except NotInitialised:
            self.refuse(generation)
            return False
        end = time.monotonic_ns()
        if generation == self.generation:
            self.torture.record(request, end, data)
        return True


class OverSocket(Client):
    """Speaks NBD, with several requests under way."""

    def __init__(self, torture: Torture, number: int, path: Path, *, spared: bool) -> None:
        """`spared`: a reset ends no connection that was in its handshake; nbdkit's does."""
        super().__init__(torture, number)
        self.path = path
        self.spared = spared

    def connection(self) -> bool:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(STALL_S)
            self.doing = "is in a handshake"
            ended = self.torture.ended
            try:
                sock.connect(os.fspath(self.path))
                info = negotiate(sock, "")
            except ZramdError as error:
                if isinstance(error.__cause__, TimeoutError):
                    raise  # it hangs: that is no refusal
                return False
            self.begin(info.size, ended)
            with sock.makefile("rb") as replies:
                self.talk(sock, replies)
        if self.spared:
            assert self.generation <= self.torture.doomed, "the connection ended, and nobody resets"
        return True

    def talk(self, sock: socket.socket, replies: BufferedReader) -> None:
        """Send requests until that fails, and read replies until they end. Once refused, often send
        only a few more; always to nbdkit, which lets a client that goes on and on do so for five
        seconds."""
        waiting: dict[int, Request] = {}
        self.doing = "waits for the answers to", waiting
        deepest = self.chance.randint(1, DEEPEST)
        following = self.draw(self.generation)
        to_send = math.inf
        refused = 0  # when the first refusal came
        while True:
            while (
                to_send
                and len(waiting) < deepest
                and sum(request.count for request in waiting.values()) + following.count <= PAGES
            ):
                if self.send(sock, following):
                    waiting[following.number] = following
                    following = self.draw(self.generation)
                    to_send -= 1
                else:
                    self.cut += 1
                    to_send = 0
            try:
                head = replies.read(wire.SIMPLE_REPLY.size)
            except ConnectionResetError:
                head = b""
            if not head:
                break
            magic, error, cookie = wire.SIMPLE_REPLY.unpack(head)
            assert magic == wire.NBD_SIMPLE_REPLY_MAGIC
            request = waiting.pop(struct.unpack(">Q", cookie)[0])
            if error:
                assert error == errno.EIO, f"error {error} for {request}"
                self.refuse(self.generation)
                if not refused:
                    refused = time.monotonic_ns()
                    if self.chance.random() < 0.8 or not self.spared:
                        to_send = min(to_send, self.chance.randint(0, DEEPEST))
                continue
            data = b""
            if request.command == wire.NBD_CMD_READ:
                data = replies.read(request.count * PAGE)
            end = time.monotonic_ns()
            assert not refused or request.start < refused, f"{request} was admitted after a refusal"
            self.torture.record(request, end, data)
        assert not waiting, f"no answer to {list(waiting.values())}"

    def send(self, sock: socket.socket, request: Request) -> bool:
        """False where the server does not take the whole of it any more."""
        cookie = struct.pack(">Q", request.number)
        span = request.first * PAGE, request.count * PAGE
        packed = wire.pack_request(request.command, cookie, *span) + request.data()
        request.start = time.monotonic_ns()
        try:
            sock.sendall(packed)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True


class Watcher(Actor):
    """Asks for statistics all the time."""

    def __init__(self, torture: Torture, device: "Device") -> None:
        super().__init__(torture, "watcher")
        self.device = device

    def act(self) -> None:
        with self.device.controlled() as control:
            while not self.torture.over.is_set():
                self.doing = "asks for statistics"
                now = control.statistics()
                assert not now.disksize or now.disksize in self.torture.generations
                assert (now.failed_reads, now.failed_writes, now.invalid_io) == (0, 0, 0)
                assert now.orig_data_size >= 0
                assert control.get("initstate") in ("0", "1")
                time.sleep(0.001)


class Controller(Actor):
    """Resets the device, when there has been some I/O, and initialises it anew."""

    def __init__(
        self, torture: Torture, device: "Device", clients: list[Client], resets: int
    ) -> None:
        super().__init__(torture, "controller")
        self.device = device
        self.clients = clients
        self.left = resets
        self.chance = random.Random(resets)

    def act(self) -> None:
        torture = self.torture
        with self.device.controlled() as control:
            while self.left and not torture.over.is_set():
                size = torture.begin_generation()
                self.doing = f"initialises generation {torture.generation}"
                control.set("comp_algorithm", ALGORITHMS[torture.generation % len(ALGORITHMS)])
                control.set("disksize", str(size))
                torture.initialised.set()
                self.wait_for_answers(self.chance.randint(5, 150))
                torture.doomed = torture.generation
                if self.left == 1:
                    torture.over.set()
                self.doing = f"resets generation {torture.generation}"
                torture.initialised.clear()
                control.reset(force=True)
                torture.ended = torture.generation
                self.left -= 1
                torture.check(min(client.generation for client in self.clients))

    def wait_for_answers(self, enough: int) -> None:
        self.doing = f"waits for {enough} pages to be answered in {self.torture.generation}"
        while self.torture.answered() < enough and not self.torture.over.is_set():
            time.sleep(0.0002)


# What is tortured


@dataclass
class Device:
    """A device, in the process `pid`."""

    pid: int
    controlled: Callable
    """Gives a context in which to control it."""
    client: Callable[[Torture, int], Client]
    lost_per_refusal: int = 0
    """Bytes that a refused request or handshake may cost for good."""
    torture: Torture = field(default_factory=Torture)

    def leg(self, resets: int) -> None:
        """So many resets under load; from a device that is not initialised to one."""
        torture = self.torture
        torture.over.clear()
        clients = [self.client(torture, number) for number in range(CLIENTS)]
        controller = Controller(torture, self, clients, resets)
        actors = [*clients, Watcher(torture, self), controller]
        for actor in actors:
            actor.start()
        left, stalled = resets, time.monotonic() + STALL_S
        while any(actor.is_alive() for actor in actors):
            if torture.failures:
                pytest.fail("\n".join(torture.failures), pytrace=False)
            if controller.left < left:
                left, stalled = controller.left, time.monotonic() + STALL_S
            if time.monotonic() > stalled:
                torture.over.set()
                told = [f"{actor.name} {actor.doing}" for actor in actors if actor.is_alive()]
                pytest.fail(f"{left} resets to go, and none ends: " + "; ".join(told))
            time.sleep(0.01)
        if torture.failures:
            pytest.fail("\n".join(torture.failures), pytrace=False)
        torture.check(torture.generation + 1)
        torture.refused += sum(client.refused for client in clients)
        torture.cut += sum(client.cut for client in clients)
        torture.turned_away += sum(client.turned_away for client in clients)
        assert torture.generation == torture.doomed


@dataclass
class Held:
    """What a process holds while the device is not initialised and nobody but us is connected."""

    descriptors: int
    threads: int
    rss: int

    @classmethod
    def by(cls, pid: int) -> "Held":
        status = Path(f"/proc/{pid}/status").read_text()
        return cls(
            len(os.listdir(f"/proc/{pid}/fd")),
            int(re.search(r"Threads:\s+(\d+)", status)[1]),
            int(re.search(r"VmRSS:\s+(\d+)", status)[1]) << 10,
        )


def tortured(device: Device) -> None:
    """Everything that a test here asserts."""
    with device.controlled() as control:
        control.reset(force=True)
        gc.collect()  # in one process, what other tests have left is ours, too
        descriptors = Held.by(device.pid).descriptors  # before there was any client
    torture = device.torture
    early = min(200, RESETS // 2)
    held: list[Held] = []
    refused = [0]
    for resets in (early, RESETS - early):
        device.leg(resets)
        refused.append(torture.refused + torture.turned_away)
        gc.collect()  # in one process, what is measured is ours, too
        with device.controlled() as control:
            now = control.statistics()
            assert (now.disksize, now.orig_data_size, now.mem_used_total) == (0, 0, 0)
            deadline = time.monotonic() + STALL_S
            while Held.by(device.pid).descriptors != descriptors or control.statistics().openers:
                assert time.monotonic() < deadline, _open_in(device.pid)
                time.sleep(0.01)
            time.sleep(1)  # the server trims its heap meanwhile
            held.append(Held.by(device.pid))
        assert "zramd-arena" not in Path(f"/proc/{device.pid}/maps").read_text()
        assert not [name for name in _open_in(device.pid) if "zramd-arena" in name]
    print(
        f"{torture.generation} resets, {torture.checked} pages answered,"
        f" {torture.refused} requests refused, {torture.cut} not taken,"
        f" {torture.turned_away} handshakes refused; {held}"
    )
    assert torture.refused, "no reset ever met a request"
    assert held[1].threads <= held[0].threads + POOLED_THREADS
    lost = (refused[2] - refused[1]) * device.lost_per_refusal
    assert held[1].rss <= held[0].rss + RSS_SLACK + lost


def _open_in(pid: int) -> list[str]:
    found = []
    for entry in os.scandir(f"/proc/{pid}/fd"):
        try:
            found.append(os.readlink(entry.path))
        except FileNotFoundError:
            continue
    return sorted(found)


# Targets


@pytest.fixture(autouse=True)
def _impatient() -> Iterator[None]:
    """Threads change more often, so in the midst of more things, and none waits long for its turn
    among those that compute."""
    once = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    yield
    sys.setswitchinterval(once)


@pytest.mark.timeout(280)
def test_resets_in_one_process():
    zram = Zram("zram0")
    control = SimpleNamespace(
        statistics=zram.statistics,
        reset=zram.reset,
        get=partial(attributes.get, zram),
        set=partial(attributes.set, zram),
    )

    @contextmanager
    def controlled() -> Iterator[SimpleNamespace]:
        yield control

    tortured(Device(os.getpid(), controlled, lambda *args: InProcess(*args, zram)))


@pytest.mark.timeout(280)
def test_resets_of_zramd_serve():
    command = (sys.executable, "-m", "zramd.cli", "serve", "zram0", "--disksize=1M")
    with served(*command) as (pid, control, nbd):
        tortured(Device(pid, control, lambda *args: OverSocket(*args, nbd, spared=True)))


@pytest.mark.timeout(280)
def test_resets_of_nbdkit():
    command = (require.program("nbdkit"), "-f", "-U", "zram0/nbd.sock", "python")
    with served(*command, str(PLUGIN), "name=zram0", "disksize=1M") as (pid, control, nbd):
        tortured(
            Device(pid, control, lambda *args: OverSocket(*args, nbd, spared=False), NBDKIT_LOSES)
        )


@contextmanager
def served(*command: str) -> Iterator[tuple[int, Callable[[], Control], Path]]:
    """A server's process, what makes a Control of it, and its NBD socket. What it says on stderr is
    part of the test: a fault of ours is EIO to a client, and a traceback there."""
    with places.place(places.RUNTIME) as runtime:
        (runtime / "sitecustomize.py").write_text(IN_SERVER)
        directory = runtime / "zram0"
        directory.mkdir(mode=0o700)
        log = runtime / "stderr"
        with log.open("wb") as stderr:
            server = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *command],
                cwd=runtime,
                env={
                    **os.environ,
                    "ZRAMD_RUNTIME_DIR": str(runtime),
                    "PYTHONPATH": os.pathsep.join([str(runtime), str(ROOT)]),
                    "VIRTUAL_ENV": sys.prefix,
                },
                stdin=subprocess.DEVNULL,
                stderr=stderr,
            )
        try:
            _wait_for_control(server, directory / "control")
            worker = int((directory / "lock").read_text().split()[-1])
            yield worker, lambda: Control(directory / "control"), directory / "nbd.sock"
            assert server.poll() is None
            said = log.read_text()
            assert not re.search("Traceback|unexpected|unforeseen", said), said[-5000:]
        finally:
            server.kill()
            server.wait()


def _wait_for_control(server: subprocess.Popen[bytes], path: Path) -> None:
    """Without a probe, whose end the server might not have noticed when it is measured."""
    deadline = time.monotonic() + STALL_S
    while True:
        try:
            Control(path).close()
            return
        except NoServer:
            assert server.poll() is None, f"it ended with {server.returncode}"
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)

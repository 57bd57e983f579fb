"""Clients that know what each page of theirs may hold, and a server that changes under them.

Each writes, connects again where its connection has ended, and verifies all of its pages then: a
page reads as the last write left it that was answered, or as one that was under way and never
answered; and then it stays so.
"""

import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests import places
from tests.nbd.harness import RawClient, request
from tests.store.contents import noise, part_noise, text
from zramd.control.client import Control
from zramd.errors import ServerFailed
from zramd.nbd.address import UnixAddress
from zramd.nbd.wire import NBD_CMD_TRIM, NBD_CMD_WRITE
from zramd.service.runtime import Paths
from zramd.store import PAGE
from zramd.store.table import SLOTS_PER_TABLE_PAGE

ROOT = Path(__file__).parents[1]
REGION = 96  # pages of a client
FIRSTS = (0, REGION, 2 * REGION, SLOTS_PER_TABLE_PAGE)
"""The first page of each client's: some share a table page, so slot locks, and all share spans."""
CLEARS = 1 / 16
"""How often a client discards its whole region, and the last one its table page."""
DEADLINE_S = 30
ZEROS = bytes(PAGE)


class Client(threading.Thread):
    """Writes to pages of its own, with up to 8 requests under way, and knows what each may hold."""

    def __init__(self, path: Path, first: int, ended: threading.Event) -> None:
        super().__init__(name=f"client of page {first}")
        self.first = first
        self.may_hold: list[list[bytes]] = [[ZEROS] for _ in range(REGION)]
        self.fault: BaseException | None = None
        self.answered = 0
        self.lost = 0
        self._path = path
        self._ended = ended
        self._random = random.Random(first)

    def run(self) -> None:
        try:
            while not self._ended.is_set():
                try:
                    with self.connected() as client:
                        self.verify(client)
                        while not self._ended.is_set():
                            self.batch(client)
                except (EOFError, OSError, ServerFailed):
                    self.lost += 1
        except BaseException as fault:
            self.fault = fault

    @contextmanager
    def connected(self) -> Iterator[RawClient]:
        with RawClient(UnixAddress(self._path)) as client:
            yield client

    def verify(self, client: RawClient) -> None:
        """Every page holds what it may hold, and from now on nothing else."""
        data = client.read(self.first * PAGE, REGION * PAGE)
        for page, may_hold in enumerate(self.may_hold):
            holds = data[page * PAGE : (page + 1) * PAGE]
            assert holds in may_hold, f"page {self.first + page} holds {holds[:16]!r}..."
            self.may_hold[page] = [holds]

    def batch(self, client: RawClient) -> None:
        """Some requests at once, no two for one page, and then their answers, in any order."""
        under_way = {}
        message = b""
        for cookie, (page, new) in enumerate(self.changes()):
            place = (self.first + page) * PAGE, len(new) * PAGE
            if any(content is not ZEROS for content in new):
                message += request(NBD_CMD_WRITE, *place, cookie=cookie) + b"".join(new)
            else:
                message += request(NBD_CMD_TRIM, *place, cookie=cookie)
            for at, content in enumerate(new, page):
                self.may_hold[at].append(content)
            under_way[cookie] = page, new
        client.send(message)
        while under_way:
            cookie, error = client.reply()
            assert error == 0
            page, new = under_way.pop(cookie)
            for at, content in enumerate(new, page):
                self.may_hold[at] = [content]
            self.answered += 1

    def changes(self) -> Iterator[tuple[int, list[bytes]]]:
        """Pages and what comes to stand there from each on; ZEROS alone are discarded."""
        if self._random.random() < CLEARS:
            yield 0, [ZEROS] * REGION
            return
        for quarter in self._random.sample(range(REGION // 4), 8):
            count = self._random.randint(1, 4)
            is_discard = self._random.random() < 0.15
            yield quarter * 4, [ZEROS if is_discard else self.content() for _ in range(count)]

    def content(self) -> bytes:
        seed = self._random.getrandbits(32)
        kind = seed % 5
        if kind == 0:
            return noise(seed)
        if kind == 1:
            return seed.to_bytes(8, "little") * (PAGE // 8)
        if kind == 2:
            return part_noise(seed, seed % 3000 + 1)
        return text(seed)


def worker_after(paths: Paths, before: int) -> int:
    """The worker that has come after `before`, when it answers."""
    deadline = time.monotonic() + DEADLINE_S
    while True:
        assert time.monotonic() < deadline, "no other worker has come"
        worker = paths.worker()
        if worker not in (0, before, paths.server()):  # not written down yet
            try:
                with Control(paths.control_socket) as control:
                    control.statistics()
                return worker
            except ServerFailed:
                pass  # it answers a moment later
        time.sleep(0.005)


@dataclass(frozen=True)
class Served:
    """What goes on."""

    paths: Paths
    server: int
    clients: list[Client]
    log: Path

    def must_be_right(self) -> None:
        for client in self.clients:
            if client.fault is not None:
                raise client.fault


@contextmanager
def clients_of(
    name: str,
    *options: str,
    monkeypatch: pytest.MonkeyPatch,
    module: str = "tests.unlimited",
    before: Callable[[Paths], None] = lambda _: None,
) -> Iterator[Served]:
    """Clients at work on `zramd serve NAME OPTIONS`, which never tires of workers that die; with
    something done to it before they come. In the end they all work once more, and then nothing has
    been lost."""
    with places.place(places.RUNTIME) as runtime:
        monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(runtime))
        paths, log = Paths(name), runtime / "stderr"
        with log.open("wb") as stderr:
            server = subprocess.Popen(
                [
                    *("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", module),
                    *("serve", name, "--disksize=16M", *options),
                ],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stderr=stderr,
            )
        ended = threading.Event()
        clients = [Client(paths.nbd_socket, first, ended) for first in FIRSTS]
        served = Served(paths, server.pid, clients, log)
        try:
            while "is served on" not in log.read_text():
                assert server.poll() is None
                time.sleep(0.01)
            before(paths)
            for client in clients:
                client.start()
            yield served
            answered = sum(client.answered for client in clients)
            while sum(client.answered for client in clients) == answered:
                time.sleep(0.01)
            ended.set()
            for client in clients:
                client.join(DEADLINE_S)
            served.must_be_right()
            with RawClient(UnixAddress(paths.nbd_socket)) as last:
                for client in clients:
                    client.verify(last)
            with Control(paths.control_socket) as control:
                control.set("compact", "1")
                stored = sum(page != [ZEROS] for client in clients for page in client.may_hold)
                assert control.statistics().orig_data_size == stored * PAGE
            said = log.read_text()
            assert "lost" not in said, said
            assert "Traceback" not in said, said
            print(f"{answered} requests answered, {sum(c.lost for c in clients)} connections lost")
        finally:
            ended.set()
            server.kill()
            server.wait()

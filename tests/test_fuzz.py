"""What the fuzzers of tests/fuzz have found and begun with, again, and a few thousand inputs more.

Without atheris, and the same in every run. `scripts/fuzz` is the real thing.
"""

import importlib
import random
from pathlib import Path

import pytest

from tests.fuzz import nbd, peer
from tests.fuzz.mutate import Mutator, bytes_changed, go, option, pack, request
from tests.planted import plant
from zramd.nbd import connection, replies, transmission
from zramd.nbd.connection import Connection
from zramd.nbd.negotiation import Negotiation
from zramd.nbd.transmission import Receiver, answer
from zramd.opener import Opener
from zramd.store.pages import Pages

HERE = Path(__file__).parent / "fuzz"
TARGETS = ("nbd", "client")
MUTATIONS = 3000


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    module = importlib.import_module(f"tests.fuzz.{request.param}")
    with module.small():
        world = module.World()
        yield request.param, world
        world.close()


@pytest.fixture(scope="module")
def world():
    with nbd.small():
        world = nbd.World()
        yield world
        world.close()


def inputs(name: str) -> list[bytes]:
    folders = (HERE / kind / name for kind in ("seeds", "cases"))
    return [path.read_bytes() for folder in folders for path in sorted(folder.glob("*"))]


def test_seeds_and_findings(target):
    name, world = target
    assert inputs(name)
    for data in inputs(name):
        world.run(data)


def test_mutations_of_them(target, tmp_path):
    name, world = target
    rng = random.Random(name)
    mutator = Mutator(rng)
    corpus = inputs(name)
    for number in range(MUTATIONS):
        data = rng.choice(corpus)
        if name != "nbd":
            data = bytes_changed(data, rng)
        elif number % 4:
            data = mutator.mutate(data)
        else:
            data = mutator.conversation()
        if number % 10 == 0:
            corpus.append(data)
        try:
            world.run(data)
        except BaseException as error:
            finding = tmp_path / "finding"
            finding.write_bytes(data)
            error.add_note(f"the input, for tests/fuzz/cases/{name}: {finding}")
            raise


# Faults that it must find

FAULTS = {
    "a reply twice": (
        Connection._worked,
        ("self._send(reply)\n", "self._send(reply * 2)\n"),
    ),
    "another cookie": (answer, ("form.data(cookie, offset", "form.data(cookie[::-1], offset")),
    "the payload of a refused write is taken for requests": (
        Receiver.requests,
        ("if command == NBD_CMD_WRITE or (", "if command == NBD_CMD_WRITE and not refusal or ("),
    ),
    "a write is done before its payload is here": (
        Receiver.requests,
        ("if missing > 0:\n", "if missing > 1000:\n"),
    ),
    "an opener survives a reset connection": (
        Connection._finish_if_idle,
        ("if self._opener is not None:", "if self._opener is not None and not self._lost:"),
    ),
    "a request in flight is not taken back": (
        Connection._worked,
        ("self._in_flight_bytes -= held", "pass"),
    ),
    "replies without bound": (
        Connection._has_room,
        ("self._peer_reads\n", "True\n"),
        ("not self._unsent\n", "True\n"),
    ),
    "requests in flight without bound": (
        Connection._has_room,
        ("self._in_flight < _IN_FLIGHT\n", "True\n"),
    ),
    "the common buffer is not left": (Receiver.keep, ("memoryview(bytes(rest))", "rest")),
    "what came with the handshake is lost": (
        Connection._negotiate,
        ("head=negotiation.trailing", 'head=b""'),
    ),
    "the end of file does not wait for what is in flight": (
        Connection._finish_if_idle,
        ("if not self._ending or self._in_flight:", "if not self._ending:"),
        ("del self._transport\n", "pass\n"),
    ),
    "a timer is left": (
        Connection._finish_if_idle,
        ("self._cancel_timer()\n", "pass\n"),
    ),
    "it spins": (
        Connection._pump,
        ("more = True  #", "self._loop.call_soon(self._pump); more = True  #"),
    ),
    "a fault of ours": (answer, ("opener.discard(offset, length)", "opener.discard(offset)")),
    "a long option's data are taken for options": (
        Negotiation._maybe_step,
        ("self._skip = length\n", "self._skip = length - 1\n"),
    ),
    "zeroes that were not to be": (
        Negotiation._export_name,
        ("if self._no_zeroes", "if not self._no_zeroes"),
    ),
    "contexts of another export": (
        Negotiation._open,
        ("self._selected_for == name", "True"),
    ),
    "contexts that survive a failure": (
        Negotiation._set_contexts,
        ("self._selected = ()  #", "pass  #"),
    ),
    "zeroes written to what is read-only": (
        Receiver._refusal,
        ("command in _CHANGING", "command == NBD_CMD_WRITE"),
    ),
    "two chunks that are the last": (
        replies.Structured.status,
        ("*chunk, flags=0)", "*chunk)"),
    ),
    "a range that ends one byte too late": (
        Opener._check,
        ("offset > self.size - length", "offset > self.size - length + 1"),
    ),
    "a page is zeroed too much": (
        Pages.discard,
        ("-(-offset // PAGE)", "offset // PAGE"),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    function, *changes = FAULTS[fault]
    plant(monkeypatch, function, *changes)
    monkeypatch.setattr(connection, "answer", transmission.answer)
    mutator = Mutator(random.Random(fault))
    corpus = inputs("nbd")
    with nbd.small():
        world = nbd.World()
        try:
            for number in range(MUTATIONS):
                data = mutator.conversation()
                if number % 2:
                    data = mutator.mutate(mutator.rng.choice(corpus))
                try:
                    world.run(data)
                except peer.Wrong as found:
                    print(f"found by input {number}: {found!r}")
                    return
        finally:
            world.abandon()
    pytest.fail("it was not found")


# What the inputs reach: a fuzzer that stops at the first magic number finds nothing.

HELLO = b"\0\0\0\3" + option(peer.GO, go())


def test_the_seeds_come_to_the_transmission(world):
    outcomes = [world.run(data) for data in inputs("nbd")]
    assert sum(outcome.transmits for outcome in outcomes) > len(outcomes) / 2
    assert sum(outcome.requests for outcome in outcomes) > 40


def test_most_new_conversations_have_requests_that_succeed(world):
    mutator = Mutator(random.Random(1))
    outcomes = [world.run(mutator.conversation()) for _ in range(200)]
    assert sum(outcome.transmits for outcome in outcomes) > 80
    assert sum(outcome.requests - outcome.failed for outcome in outcomes) > 150
    assert sum(outcome.stored for outcome in outcomes) > 50


def test_a_full_device_and_a_peer_that_does_not_read_are_reached(world):
    filled = b"".join(
        request(peer.WRITE, at, 16384, extended=False) + random.Random(at).randbytes(16384)
        for at in range(0, 1 << 19, 16384)
    )
    outcome = world.run(pack(b"\x07\x00", HELLO + filled))
    assert outcome.failed > 0
    reads = request(peer.READ, 0, 65536, extended=False) * 40
    assert world.run(pack(b"\x07\x00\x03\x00", HELLO + reads)).got > 40 * 65536

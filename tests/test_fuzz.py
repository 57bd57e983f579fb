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
from zramd.nbd import connection, replies, stream, transmission
from zramd.nbd.connection import Connection
from zramd.nbd.negotiation import Negotiation
from zramd.nbd.piecewise import Piecewise
from zramd.nbd.stream import Stream
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
        ("self._stream.send(reply)\n", "self._stream.send(reply * 2)\n"),
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
        ("del self._stream\n", "pass\n"),
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
    "more is forgotten than has gone out": (Stream._forget, ("[sent:]", "[sent + 1 :]")),
    "a part goes out twice": (
        Stream._forget,
        ("unsent.appendleft(memoryview(part)[sent:])", "unsent.appendleft(part)"),
    ),
    "what is unsent is overtaken": (Stream.send, ("if not self._unsent:", "if True:")),
    "a stream never resumes": (Stream._writable, ("self._protocol.resume_writing()", "pass")),
    "a stream without bound": (
        Stream.send,
        ("self._choked = True\n", "pass\n"),
        ("self._protocol.pause_writing()", "pass"),
    ),
    "a stream waits to write what it has not": (
        Stream._writable,
        ("self._loop.remove_writer(self._fd)", "pass"),
    ),
    "a stream is lost, and nobody hears of it": (
        Stream._tell_lost,
        ("self._protocol.connection_lost(error)", "pass"),
    ),
    "a socket that is closed is read": (Stream._lose, ("self.pause_reading()", "pass")),
    "a socket stays open": (Stream._tell_lost, ("self._sock.close()", "pass")),
    "a stream closes before all has gone out": (
        Stream.close,
        ("if not self._unsent:", "if True:"),
    ),
    "a stream that closes with something unsent is never lost": (
        Stream._writable,
        ("if self._closing:", "if False:"),
    ),
    "the end of file is taken for nothing yet": (Stream._receive, ("if not count:", "if False:")),
    "what comes while it is not to be read": (
        Stream._receive,
        ("if not alone or not self._reading:", "if not alone:"),
    ),
    "others wait for one who is alone": (
        Stream._receive,
        ("if now >= stays_until:", "if False:"),
    ),
    "it looks for requests for ever": (
        Stream._receive,
        ("min(now + patience, stays_until)", "now + 100 * patience"),
    ),
    "a stream that is gone is remembered": (
        Stream._lose,
        ("Stream._latest = None", "pass"),
    ),
    "more parts than a socket takes": (Stream.send, ("parts[:_MOST_PARTS]", "parts")),
    "a stream chokes once only": (Stream._writable, ("self._choked = False", "pass")),
    "a stream without the limit that it is given": (
        stream.take_over,
        ("stream.set_write_buffer_limits(high=batch)", "pass"),
    ),
    "a stream that is lost waits to write": (
        Stream._lose,
        ("self._loop.remove_writer(self._fd)", "pass"),
    ),
    "what asyncio's transport has not sent is lost": (
        stream.take_over,
        ("or transport.get_write_buffer_size():", "or False:"),
    ),
    "TLS is left for the socket": (
        stream.take_over,
        ("not transport.can_write_eof()", "False"),
    ),
    "TLS is to stay half open": (
        Piecewise.eof_received,
        ("if self._transport.can_write_eof():", "if True:"),
    ),
    "TLS is given something after the end": (
        Piecewise.eof_received,
        ("self._unsent.clear()", "pass"),
    ),
    "TLS is given all in one piece": (
        Piecewise._give,
        ("while self._unsent and size + len(self._unsent[0]) <= _PIECE:", "while self._unsent:"),
    ),
    "TLS is given all in one turn": (Piecewise._give, ("given < self._batch", "True")),
    "TLS is given what the peer does not read": (
        Piecewise._give,
        ("self._cut or (not self._full and given < self._batch)", "given < self._batch"),
    ),
    "TLS is not given all at the cut": (
        Piecewise._give,
        ("self._cut or (", "("),
    ),
    "TLS is not given the rest": (
        Piecewise._give,
        ("self._loop.call_soon(self._go_on)", "pass"),
    ),
    "what goes through TLS is out of order": (
        Piecewise._give,
        ("piece.append(self._unsent.popleft())", "piece.insert(0, self._unsent.popleft())"),
    ),
    "nothing is asked for once all has gone through TLS": (
        Piecewise._go_on,
        ("self._protocol.resume_writing()", "pass"),
    ),
    "a connection ends before all has gone through TLS": (
        Piecewise.close,
        ("if not self._unsent:", "if True:"),
    ),
    "TLS is closed twice": (
        Piecewise._go_on,
        ("elif waited:", "else:"),
    ),
    "what goes through TLS at the end is not waited for": (
        Piecewise._go_on,
        ("elif waited:", "elif False:"),
    ),
    "what came with the end of the TLS handshake is lost": (
        Connection._begin_tls,
        ("self._negotiate(memoryview(early))", "pass"),
    ),
    "what came with the end of the TLS handshake is plain": (
        Connection.buffer_updated,
        ("self._securing is not None and not self._secure", "False"),
    ),
    "a TLS handshake that fails is not told": (
        Connection._begin_tls,
        ("self.connection_lost(None)", "pass"),
    ),
    "what is slipped in before TLS": (
        Negotiation.receive,
        ("if self.state is State.SECURING and self._buffer:", "if False:"),
    ),
    "contexts selected before TLS": (
        Negotiation.secured,
        ("self.form, self._selected = SIMPLE, ()", "self.form = SIMPLE"),
    ),
    "a form of replies chosen before TLS": (
        Negotiation.secured,
        ("self.form, self._selected = SIMPLE, ()", "self._selected = ()"),
    ),
    "TLS that begins twice": (Negotiation._starttls, ("if self._secure:", "if False:")),
    "TLS that is required after it has begun": (
        Negotiation.secured,
        ("True, False", "True, self._must_secure"),
    ),
    "TLS that is not required": (Negotiation._answer, ("if self._must_secure and", "if False and")),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault, monkeypatch):
    function, *changes = FAULTS[fault]
    plant(monkeypatch, function, *changes)
    monkeypatch.setattr(connection, "answer", transmission.answer)
    monkeypatch.setattr(connection, "take_over", stream.take_over)
    mutator = Mutator(random.Random(fault))
    corpus = inputs("nbd")
    with nbd.small():
        world = nbd.World()
        try:
            for number in range(2 * MUTATIONS):  # most take less than 100
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

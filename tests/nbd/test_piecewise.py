"""Pieces for a transport of asyncio's; real ones, with TLS, are in test_tls.py."""

import asyncio
import socket

import pytest

from tests.nbd.test_stream import Told
from zramd.nbd.piecewise import Piecewise

PIECE, BATCH = 128 << 10, 256 << 10


class Transport(asyncio.Transport):
    """Writes down what it is given, and is full when a test says so."""

    def __init__(self, *, half_open: bool) -> None:
        self.ours, self.peer = socket.socketpair()
        super().__init__({"socket": self.ours})
        self.given: list[bytes] = []
        self.closed = 0
        self.half_open = half_open
        self.protocol: Piecewise

    def set_protocol(self, protocol):
        self.protocol = protocol

    def set_write_buffer_limits(self, high=None, low=None):
        self.limits = high, low

    def can_write_eof(self):
        return self.half_open

    def is_closing(self):
        return self.closed > 0

    def write(self, data):
        self.given.append(bytes(data))

    def get_write_buffer_size(self):
        return 7

    def close(self):
        self.closed += 1

    def take(self) -> list[int]:
        """The sizes of what was given since we looked."""
        given, self.given = self.given, []
        return [len(each) for each in given]


class World:
    def __init__(self, loop: asyncio.AbstractEventLoop, *, half_open: bool) -> None:
        self.loop = loop
        self.told = Told()
        self.transport = Transport(half_open=half_open)
        asyncio._set_running_loop(loop)
        try:
            self.pieces = Piecewise(self.transport, self.told, BATCH)
        finally:
            asyncio._set_running_loop(None)
        assert self.transport.protocol is self.pieces
        assert self.transport.limits == (BATCH, None)

    def turn(self) -> None:
        self.loop.call_soon(self.loop.stop)
        self.loop.run_forever()


@pytest.fixture
def world(request):
    """Of TLS, unless a test asks for another."""
    loop = asyncio.new_event_loop()
    made = World(loop, half_open=getattr(request, "param", False))
    yield made
    made.transport.ours.close()
    made.transport.peer.close()
    loop.close()


def test_parts_are_joined_to_pieces_in_their_order(world):
    world.pieces.send([b"a", b"b" * PIECE, b"c" * (PIECE - 1), b"d"])
    assert world.transport.given == [b"a", b"b" * PIECE, b"c" * (PIECE - 1) + b"d"]
    assert world.told.told == []


def test_a_turn_gives_a_batch_and_the_protocol_pauses_until_all_is_given(world):
    world.pieces.send([bytes(PIECE)] * 5)
    assert world.transport.take() == [PIECE] * 2
    assert world.pieces.get_write_buffer_size() == 3 * PIECE + 7
    assert world.told.told == ["pause"]
    world.pieces.send([b"more"])  # waits for its turn
    assert world.transport.take() == []
    world.turn()
    assert world.transport.take() == [PIECE] * 2
    assert "resume" not in world.told.told
    world.turn()
    assert world.transport.take() == [PIECE, 4]
    assert world.told.told[-1] == "resume"
    assert world.pieces.get_write_buffer_size() == 7


def test_a_full_transport_is_given_nothing_and_the_protocol_hears_of_it(world):
    world.pieces.pause_writing()
    assert world.told.told == ["pause"]
    world.pieces.send([b"one"])
    world.pieces.send([b"two"])
    world.turn()
    assert world.transport.given == []
    assert "resume" not in world.told.told
    world.pieces.resume_writing()
    assert world.transport.given == [b"onetwo"]
    assert world.told.told[-1] == "resume"


def test_what_was_full_when_it_was_taken_is_told_to_resume_too(world):
    world.pieces.resume_writing()
    assert world.told.told == ["resume"]


def test_at_the_cut_all_is_given_and_after_it_too_though_it_is_full(world):
    world.pieces.pause_writing()
    world.pieces.send([bytes(PIECE)] * 5)
    assert world.transport.take() == []
    world.pieces.cut()
    assert world.transport.take() == [PIECE] * 5
    with pytest.raises(BrokenPipeError):
        world.transport.peer.send(b"too late")
    world.pieces.send([b"an answer"])
    assert world.transport.given == [b"an answer"]
    assert "resume" not in world.told.told  # it is still full
    world.transport.ours.close()
    world.pieces.cut()  # of who is gone


def test_it_closes_when_all_is_given_and_once(world):
    world.pieces.send([bytes(PIECE)] * 3)
    world.pieces.close()
    world.pieces.send([b"nothing after it"])
    assert world.transport.closed == 0
    world.pieces.resume_writing()  # before its next turn, which has nothing left to do
    world.turn()
    world.pieces.close()
    assert world.transport.take() == [PIECE] * 3
    assert world.transport.closed == 1
    assert "resume" not in world.told.told


def test_who_got_full_in_the_meantime_is_not_told_to_resume(world):
    world.pieces.send([bytes(PIECE)] * 3)
    world.pieces.pause_writing()
    world.pieces.cut()
    world.turn()  # of what has been given by now
    assert "resume" not in world.told.told


def test_nothing_is_sent_once_the_transport_is_closing(world):
    world.transport.closed = 1  # aborted
    world.pieces.send([b"too late"])
    assert world.transport.given == []
    assert world.pieces.get_write_buffer_size() == 7


def test_it_closes_at_once_where_nothing_waits(world):
    world.pieces.close()
    world.pieces.close()
    assert world.transport.closed == 1


def test_tls_ends_as_a_whole(world):
    world.pieces.pause_writing()
    world.pieces.send([b"never seen"])
    assert not world.pieces.eof_received()
    world.pieces.resume_writing()
    world.turn()
    assert world.transport.given == []
    assert world.told.told[-2:] == ["eof", "resume"]


@pytest.mark.parametrize("world", [True], indirect=True)
@pytest.mark.parametrize("keeps_open", [True, False])
def test_without_tls_a_half_may_stay_open(world, keeps_open):
    world.told.keeps_open = keeps_open
    world.pieces.pause_writing()
    world.pieces.send([b"still to come"])
    assert world.pieces.eof_received() is keeps_open
    world.pieces.resume_writing()
    assert world.transport.given == [b"still to come"]


def test_who_is_lost_is_told_once_and_given_nothing(world):
    world.pieces.pause_writing()
    world.pieces.send([b"never seen"])
    world.pieces.connection_lost(None)
    world.pieces.resume_writing()
    world.turn()
    assert world.transport.given == []
    assert world.told.told.count("lost: NoneType") == 1

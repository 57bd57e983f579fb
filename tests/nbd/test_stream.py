"""A stream does what asyncio's transport does, and what it is there for."""

import asyncio
import errno
import os
import socket
from asyncio import trsock
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from zramd.nbd import stream
from zramd.nbd.piecewise import Piecewise
from zramd.nbd.stream import Stream, take_over


class Told(asyncio.BufferedProtocol):
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.buffer = memoryview(bytearray(1 << 16))
        self.got: list[bytes] = []
        self.told: list[str] = []
        self.keeps_open = True
        self.on_data: Callable[[], None] = lambda: None

    def get_buffer(self, _hint: int) -> memoryview:
        return self.buffer

    def buffer_updated(self, count: int) -> None:
        self.got.append(bytes(self.buffer[:count]))
        self.on_data()

    def eof_received(self) -> bool:
        self.told.append("eof")
        return self.keeps_open

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")

    def connection_lost(self, error: Exception | None) -> None:
        self.told.append(f"lost: {type(error).__name__}")


class World:
    """A stream, its protocol, and the socket at the other end."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        ours, self.peer = socket.socketpair()
        ours.setblocking(False)
        self.peer.setblocking(False)
        self.told = Told()
        self.faults: list[dict[str, object]] = []
        loop.set_exception_handler(lambda _loop, context: self.faults.append(context))
        self.stream = Stream(loop, ours, self.told, "somebody")

    def turn(self, times: int = 3) -> None:
        for _ in range(times):
            self.loop.call_soon(self.loop.stop)
            self.loop.run_forever()

    def read(self) -> bytes:
        """All that comes until the loop has nothing more to do."""
        data = bytearray()
        while True:
            try:
                part = self.peer.recv(1 << 20)
            except BlockingIOError:
                before = self.stream.get_write_buffer_size()
                self.turn()
                if self.stream.get_write_buffer_size() == before:
                    return bytes(data)
                continue
            if not part:
                return bytes(data)
            data += part


@contextmanager
def new_world() -> Iterator[World]:
    loop = asyncio.new_event_loop()
    world = World(loop)
    try:
        yield world
    finally:
        world.peer.close()
        world.stream.abort()
        world.turn()
        loop.close()


@pytest.fixture
def world() -> Iterator[World]:
    with new_world() as world:
        yield world


def parts(count: int, size: int) -> list[bytes]:
    return [os.urandom(size) for _ in range(count)]


# Writing


@pytest.mark.parametrize(("count", "size"), [(1, 1), (33, 4096), (3000, 7), (1500, 4096)])
def test_parts_arrive_whole_and_in_order_however_little_fits(world, count, size):
    first, second = parts(count, size), parts(count, size)
    world.stream.send(first)
    world.stream.send(second)
    assert world.read() == b"".join(first + second)
    assert world.stream.get_write_buffer_size() == 0


def test_more_parts_than_the_kernel_takes_are_not_lost(world):
    sent = parts(stream._MOST_PARTS + 1, 1)
    world.stream.send(sent)
    assert world.read() == b"".join(sent)


def test_the_protocol_hears_of_the_limits_once_each(world):
    world.stream.set_write_buffer_limits(high=100_000)
    world.stream.send(parts(500, 4096))
    world.stream.send(parts(1, 4096))
    assert world.told.told == ["pause"]
    world.read()
    assert world.told.told == ["pause", "resume"]


def test_at_the_limit_is_not_beyond_it(world):
    while not world.stream.get_write_buffer_size():
        world.stream.send([bytes(4096)])
    world.stream.set_write_buffer_limits(high=world.stream.get_write_buffer_size() + 10)
    world.stream.send([bytes(10)])
    assert not world.told.told
    world.stream.send([bytes(1)])
    assert world.told.told == ["pause"]


def test_close_sends_first_what_is_left_and_nothing_after_it(world):
    sent = parts(500, 4096)
    world.stream.send(sent)
    world.stream.close()
    world.stream.send([b"too late"])
    world.turn()
    assert world.stream.is_closing()
    assert world.told.told == ["pause"]
    assert world.read() == b"".join(sent)
    assert world.told.told[-1] == "lost: NoneType"
    assert world.peer.recv(1) == b""


def test_abort_throws_away_what_is_left(world):
    world.stream.send(parts(500, 4096))
    world.stream.abort()
    assert world.stream.get_write_buffer_size() == 0
    world.turn()
    assert world.told.told == ["pause", "lost: NoneType"]


@pytest.mark.parametrize("waiting", [False, True])
def test_a_peer_that_is_gone_is_told_lost_once_from_the_loop(world, waiting):
    if waiting:
        world.stream.send(parts(500, 4096))
    world.peer.close()
    world.stream.send([b"x"])
    assert "lost" not in "".join(world.told.told)
    world.turn()
    world.stream.close()
    world.stream.abort()
    world.turn()
    assert len([told for told in world.told.told if told.startswith("lost")]) == 1
    assert not world.faults


# Reading


def test_what_is_paused_is_not_read_and_nothing_is_lost(world):
    world.stream.pause_reading()
    world.stream.pause_reading()
    world.peer.send(b"one")
    world.turn()
    assert (world.told.got, world.stream.is_reading()) == ([], False)
    world.stream.resume_reading()
    world.turn()
    assert (world.told.got, world.stream.is_reading()) == ([b"one"], True)


@pytest.mark.parametrize("keeps_open", [True, False])
def test_an_end_is_told_once_and_the_other_direction_may_live_on(world, keeps_open):
    world.told.keeps_open = keeps_open
    world.peer.shutdown(socket.SHUT_WR)
    world.turn()
    assert world.told.told == (["eof"] if keeps_open else ["eof", "lost: NoneType"])
    world.stream.send([b"answer"])
    assert world.read() == (b"answer" if keeps_open else b"")


def test_a_fault_of_the_protocol_ends_this_connection_and_is_reported(world):
    def fail() -> None:
        raise ZeroDivisionError

    world.told.on_data = fail
    world.peer.send(b"x")
    world.turn()
    assert world.told.told == ["lost: ZeroDivisionError"]
    assert [type(fault["exception"]) for fault in world.faults] == [ZeroDivisionError]


# Staying and looking, with a clock of our own


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.looks = 0

    def __call__(self) -> float:
        self.looks += 1
        self.now += 1e-6
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(stream, "perf_counter", clock)
    return clock


def looks_after_a_request(world: World, clock: Clock) -> int:
    world.peer.send(b"x")
    before = clock.looks
    world.stream._readable()
    return clock.looks - before


def test_a_next_request_is_looked_for_where_one_came_soon(world, clock):
    few = looks_after_a_request(world, clock)  # not known yet to be alone
    assert few < 6
    assert looks_after_a_request(world, clock) > stream._SPIN_S / 1e-6 / 2


def test_a_next_request_is_not_looked_for_where_the_last_took_its_time(world, clock):
    looks_after_a_request(world, clock)
    clock.now += 1
    assert looks_after_a_request(world, clock) < 8


def test_looking_in_vain_is_tried_half_as_often_each_time(world, clock):
    looks_after_a_request(world, clock)
    looked = [looks_after_a_request(world, clock) > 20 for _ in range(64)]
    assert [n for n, long in enumerate(looked) if long] == [0, 2, 6, 14, 30, 62]


def test_what_is_found_takes_the_doubt_away(world, clock):
    looks_after_a_request(world, clock)
    for _ in range(5):
        looks_after_a_request(world, clock)
    assert world.stream._doubt
    world.stream._skips = 0
    answers = iter([b"y"])
    real = world.stream._sock

    def recv_into(buffer: memoryview) -> int:
        if clock.looks % 9 == 0 and (answer := next(answers, b"")):
            world.peer.send(answer)
        return real.recv_into(buffer)

    world.stream._sock = SimpleNamespace(recv_into=recv_into)
    world.peer.send(b"x")
    world.stream._receive(alone=True)
    world.stream._sock = real
    assert world.told.got[-2:] == [b"x", b"y"]
    assert world.stream._doubt == 1  # what came after that was not found


def test_who_sends_without_end_leaves_the_loop_after_a_while(world, clock):
    world.told.on_data = lambda: world.peer.send(b"more")
    world.peer.send(b"x")
    world.stream._receive(alone=True)
    assert 10 < len(world.told.got) < 2 * stream._STAY_S / 1e-6


def test_beside_others_each_is_read_once_in_its_turn(world, clock):
    with new_world() as other:
        for each in (world, other):
            each.told.on_data = lambda each=each: each.peer.send(b"more")
            each.peer.send(b"x")
        for _ in range(5):
            world.stream._readable()
            other.stream._readable()
        assert (len(world.told.got), len(other.told.got)) == (5, 5)


def test_who_pauses_is_not_read_again(world, clock):
    def pause() -> None:
        world.stream.pause_reading()
        world.peer.send(b"more")

    world.told.on_data = pause
    world.peer.send(b"x")
    world.stream._receive(alone=True)
    assert world.told.got == [b"x"]


# Taking over


def connected() -> tuple[asyncio.AbstractEventLoop, asyncio.Transport, Told, socket.socket]:
    loop = asyncio.new_event_loop()
    ours, peer = socket.socketpair()
    peer.setblocking(False)
    told = Told()
    transport, _ = loop.run_until_complete(loop.connect_accepted_socket(lambda: told, ours))
    return loop, transport, told, peer


def test_the_socket_lives_on_and_the_protocol_hears_of_the_stream_only():
    loop, transport, told, peer = connected()

    async def run() -> None:
        new = take_over(transport, told, 1 << 20)
        assert isinstance(new, Stream)
        await asyncio.sleep(0.01)
        assert told.told == []
        assert transport.is_closing()
        new.send([b"hello"])
        assert peer.recv(9) == b"hello"
        peer.send(b"there")
        await asyncio.sleep(0.01)
        assert told.got == [b"there"]
        new.close()
        await asyncio.sleep(0.01)
        assert told.told == ["lost: NoneType"]
        assert peer.recv(1) == b""

    loop.run_until_complete(run())
    loop.close()
    peer.close()


def no_descriptor(_sock: object) -> None:
    raise OSError(errno.EMFILE, "no more")


def test_a_transport_with_something_unsent_or_no_descriptor_left_goes_on(monkeypatch):
    loop, transport, told, peer = connected()

    async def run() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(trsock.TransportSocket, "dup", no_descriptor)
            wrapped = take_over(transport, told, 1 << 20)
        assert isinstance(wrapped, Piecewise)
        wrapped.send([b"hel", b"lo"])
        assert peer.recv(9) == b"hello"
        wrapped.send([bytes(8 << 20)])
        assert told.told == ["pause"]
        assert isinstance(take_over(transport, told, 1 << 20), Piecewise)
        transport.abort()
        await asyncio.sleep(0)

    loop.run_until_complete(run())
    loop.close()
    peer.close()

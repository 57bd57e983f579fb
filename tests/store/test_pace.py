"""How long background work rests: as long as others want the CPU, but not for ever."""

import threading
import time

import pytest

from zramd.store import pace
from zramd.store.pace import Hurry, Pace


class World:
    """A clock, and others that take a share of the CPU until some time."""

    def __init__(self, monkeypatch, share: float, until: float = float("inf")) -> None:
        self.now, self.share, self.until = 1.0, share, 1.0 + until
        self.others = 0.0
        monkeypatch.setattr(pace.time, "sleep", self.sleep)
        monkeypatch.setattr(pace.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(pace, "_others", lambda: self.others)
        self.hurry = Hurry()
        self.pace = Pace(self.hurry)

    def sleep(self, seconds: float) -> None:
        assert seconds == pace._REST_S
        if self.now < self.until:
            self.others += self.share * seconds
        self.now += seconds

    def rest(self) -> float:
        """How long, after a turn."""
        self.now += pace._TURN_S
        self.others += 1  # what they took during the turn tells nothing: it may have been a page
        began = self.now
        self.pace.keep()
        return self.now - began


@pytest.mark.parametrize("share", [0, 0.4])
def test_who_is_alone_or_nearly_rests_once_after_each_turn(monkeypatch, share):
    world = World(monkeypatch, share)
    for _ in range(5):
        assert world.rest() == pytest.approx(pace._REST_S)


@pytest.mark.parametrize("share", [0.6, 1])
def test_who_is_beside_others_that_want_the_cpu_rests_long_and_goes_on(monkeypatch, share):
    world = World(monkeypatch, share)
    for _ in range(5):
        assert world.rest() == pytest.approx(pace._LONGEST_REST_S, abs=1.1 * pace._REST_S)


def test_the_rest_ends_when_the_others_have_had_their_fill(monkeypatch):
    world = World(monkeypatch, 1, until=pace._TURN_S + 10.5 * pace._REST_S)
    assert world.rest() == pytest.approx(12 * pace._REST_S)


def test_while_somebody_waits_for_it_no_rest_is_long(monkeypatch):
    world = World(monkeypatch, 1)
    with world.hurry:
        with world.hurry:
            assert world.rest() == pytest.approx(pace._REST_S)
        assert world.rest() == pytest.approx(pace._REST_S)
    assert world.rest() > 10 * pace._REST_S


def test_nobody_rests_within_a_turn(monkeypatch):
    """Nor in the first, which begins with the work; and each begins when the rest has ended."""
    world = World(monkeypatch, 1)
    for _ in range(3):
        began = world.now
        world.now += 0.9 * pace._TURN_S
        world.pace.keep()
        assert world.now == began + 0.9 * pace._TURN_S
        assert world.rest()


def test_what_others_take_is_counted_and_what_we_take_is_not():
    ended = threading.Event()

    def spin():
        while not ended.is_set():
            pass

    def others_took(enough: float) -> bool:
        before, deadline = pace._others(), time.monotonic() + 10
        while pace._others() - before < enough and time.monotonic() < deadline:
            time.sleep(0.01)
        return pace._others() - before >= enough

    other = threading.Thread(target=spin)
    other.start()
    try:
        assert others_took(0.05)
    finally:
        ended.set()
        other.join()
    before, ours = pace._others(), time.thread_time()
    while time.thread_time() - ours < 0.2:
        pass
    assert pace._others() - before < 0.1

"""How long background work rests: it depends on whether others want the CPU."""

import itertools
import threading
import time

import pytest

from zramd.store import pace
from zramd.store.pace import Pace


def test_who_has_lost_the_cpu_in_a_turn_rests_longer(monkeypatch):
    rests = []
    switches = 10
    clock = itertools.count(1.0, pace._TURN_S * 1.5)

    def sleep(seconds):
        nonlocal switches
        switches += 1  # the sleep's own
        rests.append(seconds)

    monkeypatch.setattr(pace.time, "sleep", sleep)
    monkeypatch.setattr(pace.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(pace, "_switches", lambda: switches)
    mine = Pace()
    for lost in (0, 0, 1, 0, 5, 0):
        switches += lost
        mine.keep()
    short, long = pace._REST_S, pace._REST_BESIDE_OTHERS_S
    assert short < long
    assert rests == [short, short, long, short, long, short]


def test_nobody_rests_within_a_turn(monkeypatch):
    """Nor in the first, which begins with the work."""
    now = time.monotonic()
    monkeypatch.setattr(pace.time, "sleep", lambda _: pytest.fail("it rested"))
    monkeypatch.setattr(pace.time, "monotonic", lambda: now)
    mine = Pace()
    now += pace._TURN_S / 2
    mine.keep()


def test_who_wants_the_gil_is_noticed():
    ended = threading.Event()

    def spin():
        while not ended.is_set():
            pass

    other = threading.Thread(target=spin)
    other.start()
    try:
        before = pace._switches()
        deadline = time.monotonic() + 10
        while pace._switches() <= before:
            assert time.monotonic() < deadline
    finally:
        ended.set()
        other.join()

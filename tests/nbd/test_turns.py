"""Turns: who asks for much waits for itself, and others for one piece of it."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from zramd.nbd.turns import Turns

DEADLINE_S = 30


@pytest.fixture
def threads():
    with ThreadPoolExecutor(2) as threads:
        yield threads


def test_each_connection_gets_its_turn(threads):
    turns, begun, go = Turns(threads, 1), [], threading.Event()
    turns.submit("first", lambda: go.wait(DEADLINE_S))
    for n in range(3):
        turns.submit("greedy", lambda n=n: begun.append(("greedy", n)))
    turns.submit("other", lambda: begun.append(("other", 0)))
    ended = threading.Event()
    turns.submit("last", lambda: begun.append(("last", 0)))
    turns.submit("last", lambda: (begun.append(("last", 1)), ended.set()))
    turns.submit("greedy", lambda: begun.append(("greedy", 3)))
    go.set()
    assert ended.wait(DEADLINE_S)
    threads.shutdown()
    assert begun == [
        ("greedy", 0),
        ("other", 0),
        ("last", 0),
        ("greedy", 1),
        ("last", 1),
        ("greedy", 2),
        ("greedy", 3),
    ]


def test_all_threads_are_used_and_no_more(threads):
    turns = Turns(threads, 2)
    meet = threading.Barrier(3)
    for _ in range(2):
        turns.submit("one", lambda: meet.wait(DEADLINE_S))
    third = threading.Event()
    turns.submit("one", third.set)
    assert not third.is_set()
    meet.wait(DEADLINE_S)
    assert third.wait(DEADLINE_S)


def test_turns_go_on_after_all_work_was_done(threads):
    turns = Turns(threads, 1)
    for _ in range(100):
        done = threading.Event()
        turns.submit("one", done.set)
        assert done.wait(DEADLINE_S)

"""The gate: no request inside, none missed, none waited for twice, whatever the order of steps."""

import sys
import threading
from types import SimpleNamespace

import pytest

import zramd.gate
from zramd.errors import NotInitialised
from zramd.gate import Gate

DEADLINE = 60
"""Seconds after which a test has failed: never waited for, unless something hangs."""


@pytest.fixture
def waiting(monkeypatch):
    """An event that is set when a resetter begins to wait for a request inside."""
    waiting = threading.Event()

    class Meeting(threading.Event):
        def wait(self, timeout=None):
            waiting.set()
            return super().wait(timeout)

    monkeypatch.setattr(
        zramd.gate,
        "threading",
        SimpleNamespace(
            Event=Meeting,
            Lock=threading.Lock,
            local=threading.local,
            current_thread=threading.current_thread,
        ),
    )
    return waiting


class Request(threading.Thread):
    """Enters when started, and leaves when told; then enters again and again while it can."""

    def __init__(self, gate: Gate, who: str = "a request", again: int = 0) -> None:
        super().__init__(daemon=True)
        self.gate = gate
        self.who = who
        self.again = again
        self.inside = threading.Event()
        self.go = threading.Event()
        self.refused = 0

    def run(self) -> None:
        record = self.gate.enter(self.who)
        try:
            self.inside.set()
            assert self.go.wait(DEADLINE)
        finally:
            self.gate.leave(record)
        for _ in range(self.again):
            try:
                self.gate.leave(self.gate.enter(self.who))
            except NotInitialised:
                self.refused += 1


def started(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        if isinstance(thread, Request):
            assert thread.inside.wait(DEADLINE)


def ended(*threads: threading.Thread) -> None:
    for thread in threads:
        thread.join(DEADLINE)
        assert not thread.is_alive()


def test_a_new_gate_is_closed_and_refuses_with_eio():
    gate = Gate()
    with pytest.raises(NotInitialised) as caught:
        gate.enter("us")
    assert caught.value.errno == 5
    assert caught.value.hint
    assert gate.inside() == []
    gate.drain()


def test_an_open_gate_lets_in_and_a_closed_one_does_not():
    gate = Gate()
    gate.open()
    record = gate.enter("us")
    assert gate.inside() == ["us"]
    gate.leave(record)
    assert gate.inside() == []
    gate.close()
    with pytest.raises(NotInitialised):
        gate.enter("us")
    gate.drain()
    gate.open()
    gate.leave(gate.enter("us"))


def test_drain_waits_for_the_request_inside_and_says_who_it_is(waiting):
    gate = Gate()
    gate.open()
    request = Request(gate, "a slow one", again=5)
    started(request)
    gate.close()
    drained = threading.Event()
    resetter = threading.Thread(target=lambda: (gate.drain(), drained.set()), daemon=True)
    started(resetter)
    assert waiting.wait(DEADLINE)
    assert not drained.is_set()
    assert gate.inside() == ["a slow one"]
    request.go.set()
    ended(resetter, request)
    assert drained.is_set()
    assert request.refused == 5
    assert gate.inside() == []


def test_a_hundred_overlapping_readers_cannot_starve_a_drain(waiting):
    """At no moment is the gate empty: each one leaves only when the resetter waits for it."""
    gate = Gate()
    gate.open()
    readers = [Request(gate, again=20) for _ in range(100)]
    started(*readers)
    gate.close()
    resetter = threading.Thread(target=gate.drain, daemon=True)
    started(resetter)
    assert waiting.wait(DEADLINE)
    for reader in readers:
        assert resetter.is_alive()
        reader.go.set()
    ended(resetter, *readers)
    assert [reader.refused for reader in readers] == [20] * 100
    assert gate.inside() == []


def test_a_thread_that_leaves_and_comes_back_is_not_waited_for_twice(waiting):
    """Its second request is of the next initialisation: the drain was over with its first."""
    gate = Gate()
    gate.open()
    request = Request(gate)
    started(request)
    gate.close()
    resetter = threading.Thread(target=gate.drain, daemon=True)
    started(resetter)
    assert waiting.wait(DEADLINE)
    request.go.set()
    ended(request, resetter)
    gate.open()
    second = Request(gate)
    started(second)
    assert len(gate.inside()) == 1
    second.go.set()
    ended(second)


def test_an_exception_inside_leaves_the_gate():
    gate = Gate()
    gate.open()

    def request() -> None:
        record = gate.enter("us")
        try:
            raise KeyboardInterrupt
        finally:
            gate.leave(record)

    with pytest.raises(KeyboardInterrupt):
        request()
    gate.close()
    gate.drain()


def test_threads_that_die_leave_no_record():
    gate = Gate()
    gate.open()
    for _ in range(50):
        request = Request(gate)
        request.go.set()
        started(request)
        ended(request)
        del request
        assert gate._living() == []
    assert len(gate._records) <= 1


def test_a_thread_keeps_one_record_for_all_its_requests():
    gate = Gate()
    gate.open()
    first = gate.enter("us")
    gate.leave(first)
    assert gate.enter("us") is first
    gate.leave(first)
    assert len(gate._records) == 1


@pytest.mark.parametrize("fails", [False, True])
def test_threads_take_short_turns_while_a_drain_waits_and_only_then(waiting, monkeypatch, fails):
    """The resetter would wait for its turn, when the last request has ended."""
    before = sys.getswitchinterval()
    gate = Gate()
    gate.open()
    request = Request(gate)
    started(request)
    gate.close()

    def drain() -> None:
        try:
            gate.drain()
        except KeyError:
            assert fails

    if fails:
        monkeypatch.setattr(zramd.gate, "kick", lambda: {}[fails])
        drain()
    else:
        resetter = threading.Thread(target=drain, daemon=True)
        started(resetter)
        assert waiting.wait(DEADLINE)
        assert sys.getswitchinterval() < before
    request.go.set()
    ended(request, *([] if fails else [resetter]))
    assert sys.getswitchinterval() == before


def test_two_gates_do_not_share_records():
    one, other = Gate(), Gate()
    one.open()
    other.open()
    record = one.enter("us")
    other.leave(other.enter("us"))
    assert other.inside() == []
    other.close()
    other.drain()
    one.leave(record)


def test_a_record_the_resetter_does_not_know_is_never_used(monkeypatch):
    """A thread interrupted while it makes its record makes another one next time."""
    gate = Gate()
    gate.open()

    class Interrupted:
        def __enter__(self):
            raise KeyboardInterrupt

        def __exit__(self, *_):
            pass

    with monkeypatch.context() as patch:
        patch.setattr(gate, "_records_lock", Interrupted())
        with pytest.raises(KeyboardInterrupt):
            gate.enter("us")
    record = gate.enter("us")
    assert gate.inside() == ["us"]
    gate.leave(record)

"""Init, I/O, reset: the real Gate and Zram in every order of their threads' steps (schedules.py).

The world around them is small: the store is a stand-in that notices when it is used before it is
whole or after it is freed, is freed twice or by a stranger, and when there are two at once.

What is asserted, at every step or when all threads have ended, after the invariants I1 to I12 that
the history of zram's reset teaches:

I1   A request sees a whole store or none.
I2   Who was admitted is waited for; who was not touches nothing.
I3   Once the gate is closed nobody gets in, so a drain meets no thread twice.
I4   Nothing is freed while a request is inside, wherever it was stopped there.
I5   Every end of a request wakes who waits for it, also when it raises. Nobody waits for ever.
I6   Freed once, by a resetter, after the drain; a late request touches no later generation.
I7   Without force an open device is busy and unchanged. The claim keeps new openers out, and is
     gone at the end, whatever happened.
I10  A request takes no lock while inside; who waits in the drain holds none that I/O needs.
I11  The end of a device leaves nothing, also where it meets an init.

I8 and I9 are the store's (tests/store). I12, that one is told whom a reset waits for, is in
test_device.py.

The checker itself is checked: a fault at a time is planted in the real code, and must be found.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

import zramd.device
import zramd.gate
from tests import schedules
from tests.planted import plant
from zramd.device import Counters, Zram
from zramd.errors import DeviceBusy, NotInitialised
from zramd.gate import Gate, Record
from zramd.opener import Opener
from zramd.store import PAGE

Body = Callable[[], object]

world: Any = None
"""The World of the present run."""


class CodecFailed(Exception):
    """What the stand-in's codec raises."""


class Store(schedules.Shared):
    """In the place of Pages, with arena and comp. Every use can be stopped in its middle."""

    def __init__(self, arena: Any) -> None:
        super().__init__()
        self.arena = arena
        self.comp = SimpleNamespace(at_once=0)
        self._whole = False
        self._freed = False

    @classmethod
    def build(cls, arena: Any, _comp: object) -> "Store":
        assert not world.stores, "two tables at once"
        store = cls(arena)
        world.stores.append(store)
        store.touch(change=True)
        store._whole = True
        return store

    def parts(self, _offset: int, _length: int) -> list[bytes]:
        self._use()
        return []

    def write(self, _offset: int, _data: bytes, *, nowait: bool) -> None:
        self._use()
        raise CodecFailed

    def snapshot(self) -> Counters:
        self._use()
        return Counters()

    def close(self, *, keep: bool) -> None:
        self.touch(change=True)
        assert not self._freed, "I6: freed twice"
        assert world.resetters, "I6: freed by somebody else than a resetter"
        self._freed = True
        world.stores.remove(self)

    def _use(self) -> None:
        for _ in range(2):
            self.touch()
            assert self._whole, "I1: used before it was whole"
            assert not self._freed, "I4: used after it was freed"
        assert not schedules.held(), "I10: a request inside holds a lock"


class World:
    """The device of the present run, and what its threads do with it."""

    def __init__(self) -> None:
        self.stores: list[Store] = []
        self.resetters = 0
        self.meetings = 0  # of the present drain
        self.zram = Zram("zram0")
        drain = self.zram._gate.drain
        self._sizes = iter(range(PAGE, 9 * PAGE, PAGE))

        def counted_drain() -> None:
            self.meetings = 0
            drain()

        self.zram._gate.drain = counted_drain

    def init(self) -> None:
        try:
            self.zram.init(next(self._sizes))
        except DeviceBusy:
            pass

    def reset(self) -> None:
        self.resetters += 1
        self.zram.reset(force=True)
        self.resetters -= 1

    def reset_unless_busy(self) -> None:
        self.resetters += 1
        try:
            self.zram.reset()
        except DeviceBusy:
            pass
        self.resetters -= 1

    def reset_interrupted(self) -> None:
        Meeting.interrupt = True
        try:
            self.reset()
        except KeyboardInterrupt:
            self.resetters -= 1
        Meeting.interrupt = False

    def reader(self, times: int = 1) -> Body:
        """Reads through an opener that it has already."""
        opener = self.zram.open("a reader")

        def read() -> None:
            for _ in range(times):
                self._read(opener)

        return read

    def failing_writer(self) -> Body:
        opener = self.zram.open("a writer")

        def write() -> None:
            with pytest.raises((CodecFailed, NotInitialised)):
                opener.write(0, b"x")

        return write

    def newcomer(self) -> None:
        """Opens, reads, closes."""
        try:
            opener = self.zram.open("a newcomer")
        except (DeviceBusy, NotInitialised):
            return
        self._read(opener)
        opener.close()

    def keeper(self) -> None:
        """Opens, and where it could is sure of the device until a forced reset."""
        try:
            opener = self.zram.open("a keeper")
        except (DeviceBusy, NotInitialised):
            return
        opener.read(0, 1)

    def look(self) -> None:
        self.zram.statistics()

    @staticmethod
    def _read(opener: Opener) -> None:
        try:
            opener.read(0, 1)
        except NotInitialised:
            pass

    def check(self) -> None:
        """All threads have ended."""
        zram, gate = self.zram, self.zram._gate
        assert gate.inside() == []
        for lock in (zram._reset_lock, zram._init_lock, zram._openers_lock, gate._records_lock):
            assert not lock.locked()
        assert not zram._claimed, "I7: the claim is left behind"
        assert all(record.meeting is None for record in gate._living())
        assert gate.init_done == bool(zram.disksize) == bool(self.stores)
        for opener in zram._openers:
            assert not opener.closed
            assert opener._pages is zram._meta, "I6: an opener of a generation before"
            opener.read(0, 1)
        self.resetters = 1
        zram.close()
        assert self.stores == zram._openers == [], "I11"


class Meeting(schedules.Event):
    """Where a resetter waits."""

    interrupt = False

    def wait(self) -> None:
        zram = world.zram
        needed = {zram._openers_lock, zram._gate._records_lock}
        assert needed.isdisjoint(schedules.held()), "I10: waits with a lock that I/O needs"
        world.meetings += 1
        records = len(zram._gate._records)
        assert world.meetings <= records, "I3: somebody is waited for twice"
        if self.interrupt:
            raise KeyboardInterrupt
        super().wait()


@pytest.fixture(autouse=True)
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code under test on the scheduler's threads, over the stand-in."""
    threading = SimpleNamespace(**{**vars(schedules.threading), "Event": Meeting})
    monkeypatch.setattr(zramd.gate, "threading", threading)
    monkeypatch.setattr(zramd.device, "threading", threading)
    monkeypatch.setattr(zramd.gate, "kick", schedules.kick)
    monkeypatch.setattr(zramd.device, "Pages", Store.build)
    monkeypatch.setattr(zramd.device, "heap", SimpleNamespace(trim=int))
    monkeypatch.setattr(zramd.device, "Comp", lambda _algorithm: None)
    monkeypatch.setattr(
        zramd.device,
        "Arena",
        lambda size, *_, **__: SimpleNamespace(
            **dict.fromkeys(("used", "used_max", "reserved", "fd"), 0),
            figures=memoryview(bytes(64)).cast("Q"),
            slots=size // PAGE,
            close=int,
        ),
    )


SCENARIOS: dict[str, Callable[[World], list[Body]]] = {
    "two requests, a reset, an init": lambda w: [w.reader(), w.reader(), w.reset, w.init],
    "a request, a newcomer, a reset, an init": lambda w: [
        *(w.reader(), w.newcomer, w.reset, w.init)
    ],
    "two newcomers, a reset": lambda w: [w.newcomer, w.newcomer, w.reset],
    "two requests in a row, a reset, an init": lambda w: [w.reader(times=2), w.reset, w.init],
    "a request, a reset, one without force, an init": lambda w: [
        *(w.reader(), w.reset, w.reset_unless_busy, w.init)
    ],
    "a request, two resets": lambda w: [w.reader(), w.reset, w.reset],
    "a keeper, a newcomer, a reset without force, an init": lambda w: [
        *(w.keeper, w.newcomer, w.reset_unless_busy, w.init)
    ],
    "a failing request, a reset, an init": lambda w: [w.failing_writer(), w.reset, w.init],
    "a look, a reset, an init": lambda w: [w.look, w.reset, w.init],
    "a look, a request, a reset": lambda w: [w.look, w.reader(), w.reset],
    "two requests, a reset interrupted": lambda w: [
        *(w.reader(), w.reader(times=2), w.reset_interrupted)
    ],
    "the end, an init, a newcomer": lambda w: [w.reset, w.init, w.newcomer],
}


def explored(scenario: str) -> int:
    def make() -> list[Body]:
        global world
        world = World()
        world.init()
        return SCENARIOS[scenario](world)

    watched = [Gate, Record, Zram, Opener]
    return schedules.explore(watched, make, check=lambda: world.check())


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_in_every_order_of_steps_the_invariants_hold(scenario: str) -> None:
    assert explored(scenario) > 10


# Without the GIL


class Guarded(schedules.Shared):
    """What a bare gate guards. Freeing it is a system call, whose effect all see at once."""

    freed = False


def explored_weakly(requests: list[int]) -> int:
    """A gate alone, with threads that make so many requests each, and a reset and init."""

    def make() -> list[Body]:
        gate = Gate()
        gate.open()
        guarded = Guarded()

        def request(times: int) -> None:
            for _ in range(times):
                try:
                    record = gate.enter("us")
                except NotInitialised:
                    continue
                guarded.touch()
                assert not guarded.freed
                gate.leave(record)

        def reset() -> None:
            gate.close()
            gate.drain()
            guarded.touch(change=True)
            guarded.freed = True

        return [*(lambda times=times: request(times) for times in requests), reset]

    return schedules.explore([Gate, Record], make, weak=True)


@pytest.fixture
def bare_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zramd.gate, "threading", schedules.threading)


@pytest.mark.parametrize("requests", [[1], [2], [1, 1]])
def test_with_store_buffers_too_nothing_is_freed_under_a_request_and_all_end(
    bare_gate: None, requests: list[int]
) -> None:
    assert explored_weakly(requests) > 10


# Planted faults


@dataclass
class Fault:
    scenario: str
    """Where it must be found."""
    said: str
    """Part of what the checker must say."""
    method: Callable[..., object]
    changes: tuple[tuple[str, str], ...]


FAULTS = {
    "testing before counting": Fault(
        "two requests, a reset, an init",
        "I4",
        Gate.enter,
        (
            ("record.inside = who\n    if not self.init_done:", "if not self.init_done:"),
            ("    return record", "    record.inside = who\n    return record"),
        ),
    ),
    "waiting before clearing init_done": Fault(
        "two requests, a reset, an init",
        "I4",
        Zram._deinit_locked,
        (
            ("self._gate.close()\n", "self._gate.drain()\n"),
            ("try:\n            self._gate.drain()\n", "try:\n            self._gate.close()\n"),
        ),
    ),
    "kicking without draining, as the seed patch did": Fault(
        "two requests, a reset, an init", "I4", Gate.drain, (("meeting.wait()", "pass"),)
    ),
    "a put that does not wake": Fault(
        "two requests, a reset, an init",
        "nobody can go on",
        Gate.leave,
        (("meeting.set()", "pass"),),
    ),
    "freeing before the drain": Fault(
        "two requests, a reset, an init",
        "I4",
        Zram._deinit_locked,
        (
            ("self._gate.close()\n", "self._gate.close()\n        meta.close(keep=keep)\n"),
            ("    meta.close(keep=keep)\n        finally", "    pass\n        finally"),
        ),
    ),
    "freeing twice": Fault(
        "a request, two resets",
        "I6",
        Zram._reset,
        (
            ("if not self._reset_lock.acquire(blocking=force):", "if False:"),
            ("self._reset_lock.release()", "pass"),
            ("with self._init_lock:", "if True:"),
        ),
    ),
    "publishing init_done before meta": Fault(
        "a look, a reset, an init",
        "meta is published",
        Zram.init,
        (
            (
                "    try:\n            comp =",
                "    self._gate.open()\n        try:\n            comp =",
            ),
        ),
    ),
    "a drain that waits for threads that come again": Fault(
        "two requests in a row, a reset, an init",
        "I3",
        Gate.drain,
        (
            (
                "if record.inside is not None:\n                meeting.wait()",
                "while record.inside is not None:\n"
                "                record.meeting = meeting = threading.Event()\n"
                "                if record.inside is not None:\n"
                "                    meeting.wait()",
            ),
        ),
    ),
    "a put that looks twice": Fault(
        "a request, two resets",
        "no attribute 'set'",
        Gate.leave,
        (
            ("if meeting is not None", "if record.meeting is not None"),
            ("meeting.set()", "record.meeting.set()"),
        ),
    ),
    "a look before the meeting point is posted": Fault(
        "a request, two resets",
        "nobody can go on",
        Gate.drain,
        (
            ("            record.meeting = meeting\n", "            pass\n"),
            ("meeting.wait()", "record.meeting = meeting\n                meeting.wait()"),
        ),
    ),
    "a drain that does not know all records": Fault(
        "two requests, a reset, an init",
        "I4",
        Gate._new_record,
        (("self._records.append(weakref.ref(record))", "pass"),),
    ),
    "openers that outlive their generation": Fault(
        "two requests, a reset, an init",
        "I4",
        Zram._close_openers,
        (("opener.closed = True", "pass"),),
    ),
    "opening a device that is claimed": Fault(
        "a keeper, a newcomer, a reset without force, an init",
        "I4",
        Zram.open,
        (("if self._claimed:", "if False:"),),
    ),
    "a claim that is not dropped": Fault(
        "two newcomers, a reset", "I7", Zram._reset, (("self._claimed = False", "pass"),)
    ),
    "a gate that stays closed when a reset is interrupted": Fault(
        "two requests, a reset interrupted",
        "init_done",
        Zram._deinit_locked,
        (("self._gate.open()", "pass"),),
    ),
    "waiting with a lock that requests need": Fault(
        "two newcomers, a reset",
        "I10",
        Zram._deinit_locked,
        (
            (
                "self._gate.drain()\n",
                "self._openers_lock.acquire()\n"
                "            self._gate.drain()\n"
                "            self._openers_lock.release()\n",
            ),
        ),
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    planted = FAULTS[fault]
    plant(monkeypatch, planted.method, *planted.changes)
    with pytest.raises((AssertionError, AttributeError, NotInitialised)) as found:
        explored(planted.scenario)
    assert planted.said in str(found.value)


_POST = "        for record, meeting in visited:\n            record.meeting = meeting\n"
_KICK = "        kick()\n"


@pytest.mark.parametrize(
    ("old", "new"),
    [(_KICK, ""), (_POST + _KICK, _KICK + _POST)],
    ids=["no kick", "a kick before the meeting points are posted"],
)
def test_with_store_buffers_a_drain_needs_the_kick_in_its_place(
    bare_gate: None, monkeypatch: pytest.MonkeyPatch, old: str, new: str
) -> None:
    plant(monkeypatch, Gate.drain, (old, new))
    with pytest.raises(AssertionError):
        explored_weakly([1])

"""A crash at every step of every schedule: the real store and the real Zram (schedules.py).

Threads make a few requests, in every order of their steps that can make a difference. A step is a
store to the arena or a look at it, a change of the account, taking a lock or giving it back, and
whatever of the gate and the device others can notice. At every moment of every such run, and of
those that it stands for, the process is killed: what the arena holds then, if somebody keeps it, is
adopted by another Zram, and must be legal at that moment:

- The device is there, if its last init or a write to it had returned and no reset was begun; it is
  not, if the last thing to return was a reset.
- A page reads as its last completed write, or one that was under way. So it is newer than what a
  request that had returned had replaced or not seen any more. What was refused has left nothing.
- Nothing is lost, and an audit of the arena from its bytes agrees with all that the store believes
  (audit.py: counters, spans, pool, account).
- It occupies no more than was charged at that moment, so no more than the limit.

Not a step is a look at which spans a compaction empties, of which pool.py says that it may be late.

The memory at a moment is put together from the stores that had been done by then, and compared with
the real one at the end. Many moments have the same: each is recovered once.

The checker itself is checked: a fault at a time is planted in the real code, and must be found. Not
among them is what a crash cannot show:
- giving back a span's memory before its class is zero, or not zeroing that at all: recovery zeroes
  the class of a span that no word names;
- telling the keeper that a reset has been before the memory is freed: nobody can lose by that any
  more, once all requests have been waited for;
- writing the header's magic before the header: who keeps an arena is told of it when it is whole.
  test_recovery.py kills while one is made.
"""

import functools
import gc
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from textwrap import indent
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest

import zramd.device
import zramd.gate
import zramd.store.arena
import zramd.store.pages
import zramd.store.pool
from tests import schedules
from tests.planted import plant
from tests.store.audit import audit
from tests.store.contents import ZEROS, filled, noise, part_noise
from tests.store.watched import Watcher, watch
from zramd.device import Zram
from zramd.errors import BadArena, DeviceBusy, NotInitialised, StoreFull
from zramd.gate import Gate, Record
from zramd.opener import Opener
from zramd.store import PAGE, SPAN
from zramd.store.arena import Arena
from zramd.store.compaction import _move
from zramd.store.pages import Pages
from zramd.store.pool import PART, Pool
from zramd.store.zcomp import Algorithm, Comp

Body = Callable[[], object]
Key = Any
"""What has a state: DEVICE, which is a generation or None, or (generation, slot), a page."""

DEVICE = "device"
SLOTS = 40

world: Any = None
"""The World of the present run."""


@functools.cache
def page(name: str) -> bytes:
    """The content of this name; what kind it is the name says."""
    kind, _, number = name.partition(" ")
    if kind == "zeros":
        return ZEROS
    seed = zlib.crc32(number.encode())
    return {
        "raw": noise(seed),
        "small": part_noise(seed, 1500),
        "fill": filled(seed),
    }[kind]


class Instant(NamedTuple):
    """What a crash at some moment leaves, and what was charged for it; by generation."""

    kept: int | None
    memory: dict[int, dict[int, bytes]]
    """By number, the 4 KiB pages that are there."""
    used: dict[int, int]


@dataclass
class Request:
    begun: int
    ended: int = -1
    leaves: dict[Key, Any] = field(default_factory=dict)
    """What it changes, and to what."""
    shows: dict[Key, Any] = field(default_factory=dict)
    """What there must have been before it ended, or had been made by it."""


class Scribe(Watcher):
    """Notes what is done to the arena of a generation."""

    def __init__(self, arena: Arena, generation: int) -> None:
        self.arena = arena
        self.generation = generation
        self.size = arena.size
        self.before: dict[int, bytes] = {}
        """The memory when the run began."""
        self.charged = 0
        self.used = schedules.Shared()
        self._memory = schedules.Shared()

    def begin(self) -> None:
        self.before = present(self.arena.fd)
        self.charged = self.arena.used

    def look(self, at: int, size: int) -> None:
        self._memory.touch(part=(at, at + size))

    def store(self, at: int, content: bytes) -> None:
        step = self._memory.touch(change=True, part=(at, at + len(content)))

        def stored(instant: Instant) -> Instant:
            done, start, rest = instant.memory[self.generation].copy(), at, content
            while rest:
                number, first = divmod(start, PAGE)
                piece, rest = rest[: PAGE - first], rest[PAGE - first :]
                old = done.get(number, ZEROS)
                new = old[:first] + piece + old[first + len(piece) :]
                done[number] = world.known.setdefault(new, new)
                start += len(piece)
            return instant._replace(memory={**instant.memory, self.generation: done})

        world.note(step, stored)

    def punch(self, at: int, size: int) -> None:
        step = self._memory.touch(change=True, part=(at, at + size))
        gone = range(at // PAGE, (at + size) // PAGE)

        def punched(instant: Instant) -> Instant:
            done = instant.memory[self.generation]
            done = {number: there for number, there in done.items() if number not in gone}
            return instant._replace(memory={**instant.memory, self.generation: done})

        world.note(step, punched)

    def charge(self, used: int) -> None:
        def charged(instant: Instant) -> Instant:
            return instant._replace(used={**instant.used, self.generation: used})

        world.note(self.used.touch(change=True), charged)


class Account:
    """In Arena, in the place of `used`: every look and every change is a step."""

    def __get__(self, arena: Any, _owner: type) -> int:
        if arena in world.scribes:
            world.scribes[arena].used.touch()
        used: int = arena.__dict__["used"]
        return used

    def __set__(self, arena: Any, used: int) -> None:
        if arena in world.scribes:
            world.scribes[arena].charge(used)
        arena.__dict__["used"] = used


class Looked(bytearray):
    """Which pages of a region are occupied, each look and change a step."""

    def __init__(self, content: bytearray) -> None:
        super().__init__(content)
        self._shared = schedules.Shared()

    def __getitem__(self, key: Any) -> Any:
        self._shared.touch(part=(key, key + 1))
        return super().__getitem__(key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._shared.touch(change=True, part=(key, key + 1))
        super().__setitem__(key, value)

    def find(self, *args: Any) -> int:
        self._shared.touch(part=(0, len(self)))
        return super().find(*args)


def present(fd: int) -> dict[int, bytes]:
    """The pages of a file that are not holes, by number."""
    found, at, size = {}, 0, os.fstat(fd).st_size
    while at < size:
        try:
            at = os.lseek(fd, at, os.SEEK_DATA)
        except OSError:
            break
        end = os.lseek(fd, at, os.SEEK_HOLE)
        for start in range(at, end, PAGE):
            content = os.pread(fd, PAGE, start)
            found[start // PAGE] = world.known.setdefault(content, content)
        at = end
    return found


@dataclass
class Found:
    """What recovery finds in a memory."""

    slots: list[bytes]
    used: int


@dataclass
class Census:
    """What has been checked, in all runs of a scenario."""

    runs: int = 0
    steps: int = 0
    moments: int = 0
    memories: dict[frozenset[tuple[int, bytes]], Found] = field(default_factory=dict)
    known: dict[bytes, bytes] = field(default_factory=dict)
    """Of equal pages one, so that memories are compared quickly."""


class World:
    """The store or device of the present run, and what its threads do with it."""

    def __init__(self, census: Census) -> None:
        self.census = census
        self.known = census.known
        self.scribes: dict[Arena, Scribe] = {}
        self.requests: list[Request] = []
        self.told: dict[Key, list[Request]] = {}
        """Those that say something of it; known when all threads have ended."""
        self.notes: dict[int, Callable[[Instant], Instant]] = {}
        self.kept: int | None = None  # before the run
        self.before: dict[Key, Any] = {}
        self.made = schedules.Local()  # the generation that a thread has made
        self.zram: Zram | None = None
        self.pages: Pages | None = None
        self.running = True
        """Arenas that are made now are of this world."""

    # Before the run

    def store(self, *writes: tuple[int, str], limit: int = 0) -> None:
        """Begin with a store of these pages."""
        self.pages = Pages(Arena(SLOTS * PAGE, "lz4", limit=limit), Comp(Algorithm("lz4")))
        self.kept = 0
        for slot, name in writes:
            self.pages.write(slot * PAGE, page(name))
            self.before[0, slot] = page(name)

    def sparse_store(self) -> None:
        """One in which the object of slot 0 can move into the only hole of another span, which
        frees its own."""
        self.store(*((slot, f"raw {slot}") for slot in range(32)))
        for slot in (*range(1, 16), 31):
            self.pages.discard(slot * PAGE, PAGE)
            del self.before[0, slot]
        assert self.pages.pool.gain() == SPAN

    def device(self, *, init: bool = True) -> None:
        """Begin with a device, whose page 1 is written if it is initialised."""
        self.zram = Zram("zram0")
        self.zram.on_arena = self.keep
        if init:
            self.zram.init(SLOTS * PAGE)
            self.opener = self.zram.open("a client")
            self.opener.write(PAGE, page("fill old"))
            self.before[0, 1] = page("fill old")

    def keep(self, fd: int | None) -> None:
        """Take the arena, or drop it, as the supervisor does."""
        kept = None
        if fd is not None:
            # The last one: the number of a descriptor that was closed is used again.
            kept = [k.generation for a, k in self.scribes.items() if a.fd == fd][-1]
            self.made.generation = kept
        if schedules.running():
            self.note(schedules.mark(), lambda instant: instant._replace(kept=kept))
        else:
            self.kept = kept

    # Requests

    @contextmanager
    def request(self, leaves: dict[Key, Any]) -> Iterator[Request]:
        request = Request(schedules.mark(), leaves=leaves)
        self.requests.append(request)
        try:
            yield request
        except (StoreFull, DeviceBusy, NotInitialised, KeyboardInterrupt):
            request.leaves, request.shows = {}, {}
        request.ended = schedules.mark()
        self.note(request.ended, lambda instant: instant)

    def note(self, step: int, effect: Callable[[Instant], Instant]) -> None:
        if schedules.running():
            self.notes[step] = effect

    def write(self, first: int, *names: str) -> Body:
        def write() -> None:
            data = b"".join(map(page, names))
            leaves = {(0, slot): page(name) for slot, name in enumerate(names, first)}
            with self.request(leaves):
                self.pages.write(first * PAGE, data)

        return write

    def discard(self, first: int, last: int) -> Body:
        def discard() -> None:
            with self.request({(0, slot): ZEROS for slot in range(first, last)}):
                self.pages.discard(first * PAGE, (last - first) * PAGE)

        return discard

    def read(self, slot: int) -> Body:
        def read() -> None:
            with self.request({}) as request:
                request.shows[0, slot] = self.pages.read(slot * PAGE, PAGE)

        return read

    def compact(self) -> None:
        with self.request({}):
            self.pages.compact()

    def use(self, opener: Opener, name: str) -> None:
        """Write to page 0 of the device."""
        generation = self.scribes[opener._pages.arena].generation
        with self.request({(generation, 0): page(name)}) as request:
            request.shows[DEVICE] = generation
            opener.write(0, page(name))

    def client(self, name: str) -> Body:
        """Writes through an opener that it has already."""
        return lambda: self.use(self.opener, name)

    def newcomer(self, name: str) -> Body:
        def write() -> None:
            try:
                opener = self.zram.open("a newcomer")
            except (DeviceBusy, NotInitialised):
                return
            self.use(opener, name)

        return write

    def init(self) -> None:
        with self.request({}) as request:
            self.zram.init(SLOTS * PAGE)
            request.leaves[DEVICE] = self.made.generation

    def reset(self) -> None:
        with self.request({DEVICE: None}):
            self.zram.reset(force=True)

    def reset_interrupted(self) -> None:
        Meeting.interrupt = True
        self.reset()
        Meeting.interrupt = False

    # After the run

    def check(self) -> None:
        """All threads have ended."""
        self.running = False
        scribes = self.scribes.values()
        instant = Instant(
            self.kept,
            {k.generation: k.before for k in scribes},
            {k.generation: k.charged for k in scribes},
        )
        for request in self.requests:
            for key in {*request.leaves, *request.shows}:
                self.told.setdefault(key, []).append(request)
        at: dict[schedules.Cut, Instant] = {}
        census = self.census
        census.runs += 1
        census.steps += schedules.steps()
        for cut, before, step in schedules.cuts(self.notes):
            census.moments += 1
            if before is not None:
                instant = self.notes[step](at[before])
            at[cut] = instant
            try:
                self.judge(cut, instant)
            except AssertionError as error:
                error.add_note(f"killed after these steps, by thread: {cut}")
                raise
        for scribe in scribes:
            if scribe.generation == instant.kept:
                assert present(scribe.arena.fd) == instant.memory[instant.kept], "a store unseen"

    def judge(self, cut: schedules.Cut, instant: Instant) -> None:
        """The process is killed at this moment."""
        kept = instant.kept
        self.must_be_legal(DEVICE, kept, cut)
        if kept is None:
            return
        memory = instant.memory[kept]
        key = frozenset(memory.items())
        found = self.census.memories.get(key)
        if found is None:
            size = next(k.size for k in self.scribes.values() if k.generation == kept)
            found = self.census.memories[key] = recovered(memory, size)
        assert found.used <= instant.used[kept], "more is used than was charged"
        for slot, content in enumerate(found.slots):
            self.must_be_legal((kept, slot), content, cut)

    def must_be_legal(self, key: Key, value: Any, cut: schedules.Cut) -> None:
        told = self.told.get(key, [])
        made = [request for request in told if request.leaves.get(key, self) == value]
        if value == self.at_first(key):
            made.append(None)
        assert made, f"{key} is what nobody has made it: {named(value)}"
        assert any(
            not any(self.is_over(key, request, later, cut) for later in told) for request in made
        ), f"{key} is {named(value)}, which was replaced before something returned"

    def is_over(self, key: Key, request: Request | None, later: Request, cut: Any) -> bool:
        """Whether `later` has returned, has seen or left something else there, and can have begun
        when `request` had returned; None is what was before all."""
        seen = later.leaves[key] if key in later.leaves else later.shows[key]
        if not schedules.is_done(later.ended, cut):
            return False
        if request is None:
            return bool(seen != self.at_first(key))
        return (
            seen != request.leaves[key]
            and schedules.is_done(request.ended, cut)
            and not schedules.caused(later.begun, request.ended)
        )

    def at_first(self, key: Key) -> Any:
        return self.kept if key == DEVICE else self.before.get(key, ZEROS)

    def end(self) -> None:
        """Give all back; the run may have been broken off anywhere."""
        self.running = False
        for arena in self.scribes:
            if not is_closed(arena):
                arena.close()
        self.scribes.clear()


def is_closed(arena: Arena) -> bool:
    memory = arena.map
    return getattr(memory, "_memory", memory).closed  # a Watched, or what it watches


def named(value: Any) -> str:
    return repr(value[:16]) if isinstance(value, bytes) else repr(value)


def recovered(memory: dict[int, bytes], size: int) -> Found:
    """What the successor of a killed process finds in this memory. It is sound in itself."""
    fd = os.memfd_create("zramd-arena")
    os.ftruncate(fd, size)
    for number, content in memory.items():
        os.pwrite(fd, content, number * PAGE)
    successor = Zram("zram0")
    try:
        lost = successor.adopt(fd)
    except BadArena:
        os.close(fd)
        raise AssertionError("no arena is kept") from None
    assert not lost, f"pages are lost: {lost}"
    pages = successor._meta
    audit(pages, snug=False)
    content = pages.read(0, SLOTS * PAGE)
    found = Found(
        [content[at : at + PAGE] for at in range(0, SLOTS * PAGE, PAGE)], pages.arena.used
    )
    successor.close()
    return found


class Meeting(schedules.Event):
    """Where a resetter waits."""

    interrupt = False

    def wait(self) -> None:
        if self.interrupt:
            raise KeyboardInterrupt
        super().wait()


@pytest.fixture(autouse=True)
def watched_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """The code under test on the scheduler's threads; its arenas tell what is done to them."""
    threading = SimpleNamespace(**{**vars(schedules.threading), "Event": Meeting})
    for module in (
        zramd.device,
        zramd.gate,
        zramd.store.arena,
        zramd.store.pages,
        zramd.store.pool,
    ):
        monkeypatch.setattr(module, "threading", threading)
    monkeypatch.setattr(zramd.gate, "kick", schedules.kick)
    monkeypatch.setattr(zramd.device, "heap", SimpleNamespace(trim=int))
    view = Arena._view

    def watched_view(arena: Arena) -> None:
        view(arena)
        if world.running:
            scribe = world.scribes[arena] = Scribe(arena, len(world.scribes))
            watch(arena, scribe)
            for region in arena.table_pages, arena.map_pages:
                region.occupied = Looked(region.occupied)

    monkeypatch.setattr(Arena, "_view", watched_view)
    monkeypatch.setattr(Arena, "used", Account(), raising=False)


def script(*requests: Body) -> Body:
    def run() -> None:
        for request in requests:
            request()

    return run


SCENARIOS: dict[str, Callable[[World], list[Body]]] = {}


def scenario(name: str) -> Callable[[Callable[[World], list[Body]]], None]:
    return functools.partial(SCENARIOS.__setitem__, name)


OLD = (0, "raw old"), (1, "fill old")


@scenario("two writes of a page")
def _(w: World) -> list[Body]:
    w.store(*OLD)
    return [w.write(0, "raw a"), w.write(0, "raw b")]


@scenario("two writes of a page, one in a row with another")
def _(w: World) -> list[Body]:
    w.store(*OLD)
    return [script(w.write(0, "fill a"), w.write(0, "raw b")), w.write(0, "fill c")]


@scenario("a write of two pages, a write of one of them")
def _(w: World) -> list[Body]:
    w.store(*OLD)
    return [w.write(0, "fill a", "raw a"), w.write(1, "fill b")]


@scenario("a write, a discard of the page")
def _(w: World) -> list[Body]:
    w.store(*OLD)
    return [w.write(0, "raw a"), w.discard(0, 1)]


@scenario("a write, a discard that empties the table page")
def _(w: World) -> list[Body]:
    w.store((1, "fill old"))
    return [w.write(0, "raw a"), w.discard(1, 2)]


@scenario("a write, a read")
def _(w: World) -> list[Body]:
    w.store(*OLD)
    return [w.write(0, "raw a"), script(w.read(0), w.read(0))]


@scenario("a write that opens a span, a discard that frees one")
def _(w: World) -> list[Body]:
    w.store((0, "raw old"), (2, "fill old"))
    return [w.write(1, "small a"), w.discard(0, 1)]


@scenario("two writes that open a span")
def _(w: World) -> list[Body]:
    w.store((2, "fill old"))
    return [w.write(0, "raw a"), w.write(1, "raw b")]


@scenario("two writes that need what another frees")
def _(w: World) -> list[Body]:
    w.store((0, "raw old"))
    return [script(w.write(0, "fill a"), w.write(1, "raw b")), w.write(2, "raw c")]


@scenario("two writes, and memory for one")
def _(w: World) -> list[Body]:
    w.store((2, "fill old"), limit=3 * PAGE + PART)
    return [w.write(0, "raw a"), w.write(1, "small b")]


@scenario("a write, a discard, a write of another page")
def _(w: World) -> list[Body]:
    w.store((0, "fill old"))
    return [w.write(0, "fill a"), w.discard(0, 1), w.write(1, "fill b")]


@scenario("a compaction, a write of what it moves")
def _(w: World) -> list[Body]:
    w.sparse_store()
    return [w.compact, w.write(0, "raw a")]


@scenario("a compaction, a discard of what it moves")
def _(w: World) -> list[Body]:
    w.sparse_store()
    return [w.compact, w.discard(0, 1)]


@scenario("a compaction, a write of another page")
def _(w: World) -> list[Body]:
    w.sparse_store()
    return [w.compact, w.write(33, "raw a")]


@scenario("a compaction, a read of what it moves")
def _(w: World) -> list[Body]:
    w.sparse_store()
    return [w.compact, w.read(0)]


@scenario("a write that compacts, a discard")
def _(w: World) -> list[Body]:
    w.sparse_store()
    w.pages.arena.limit = w.pages.arena.used
    return [w.write(33, "small a"), w.discard(0, 1)]


@scenario("writes and a discard that free each other's spans")
def _(w: World) -> list[Body]:
    w.store((0, "raw old"), (1, "small old"))
    return [
        script(w.write(0, "small a"), w.discard(0, 1)),
        script(w.write(1, "raw b"), w.write(0, "raw c")),
    ]


@scenario("a discard of all, a write, a read")
def _(w: World) -> list[Body]:
    w.store(*OLD)
    return [w.discard(0, SLOTS), w.write(0, "fill a"), w.read(0)]


@scenario("a write, a reset")
def _(w: World) -> list[Body]:
    w.device()
    return [w.client("raw a"), w.reset]


@scenario("two writes, a reset")
def _(w: World) -> list[Body]:
    w.device()
    return [w.client("raw a"), w.client("fill b"), w.reset]


@scenario("a reset and an init, a newcomer")
def _(w: World) -> list[Body]:
    w.device()
    return [script(w.reset, w.init), w.newcomer("fill a")]


@scenario("an init, a newcomer")
def _(w: World) -> list[Body]:
    w.device(init=False)
    return [w.init, w.newcomer("raw a")]


@scenario("an init, another, a reset")
def _(w: World) -> list[Body]:
    w.device(init=False)
    return [w.init, w.init, w.reset]


@scenario("writes, a reset interrupted")
def _(w: World) -> list[Body]:
    w.device()
    return [script(w.client("raw a"), w.client("fill b")), w.reset_interrupted]


def explored(scenario: str) -> Census:
    census = Census()

    def make() -> list[Body]:
        global world
        if world is not None:
            world.end()
        world = World(census)
        bodies = SCENARIOS[scenario](world)
        for scribe in world.scribes.values():
            scribe.begin()
        return bodies

    watched = [Pages, Gate, Record, Zram, Opener]
    schedules.explore(watched, make, check=lambda: world.check())
    return census


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_at_every_step_of_every_schedule_a_crash_leaves_what_is_legal(scenario: str) -> None:
    census = explored(scenario)
    print(
        f"{scenario}: {census.runs} runs, {census.steps} steps, {census.moments} moments,"
        f" {len(census.memories)} memories"
    )
    assert census.runs > 1
    assert census.moments > 4 * census.runs


# Planted faults


class Fault:
    """Where it must be found; part of what the checker must say; and what is planted: functions,
    each with the changes of its source."""

    def __init__(self, scenario: str, said: str, *planted: tuple[Any, ...]) -> None:
        self.scenario = scenario
        self.said = said
        self.planted = planted


_CHARGE = (
    "    if self._saving is not None or not self.arena.table_pages.occupied[page]:\n"
    "        self._prepare_locked(page)\n"
)
_NOT_FILLED = ("self.arena.map[address : address + len(blob)] = blob", "pass")
_TAKE = ("self._grown.clear()\n", "self._grown.clear()\n        before = set(self.spans)\n")
_COPY = "memory[new : new + length] = memory[old : old + length]\n"
_PUBLISH = "table[slot] = with_address(word, new)\n"

FAULTS = {
    "an object is given back before its word is gone": Fault(
        "two writes that need what another frees",
        "lost",
        (
            Pages._swap_page_locked,
            (
                "    try:\n        table[slot] = word",
                "    if old and not old & INLINE: self.pool.give([address_of(old)])\n"
                "    try:\n        table[slot] = word",
            ),
        ),
        (Pages._settle_page, ("self.pool.give((old >> ADDRESS_SHIFT << 4,))", "pass")),
    ),
    "a discard gives back before it empties": Fault(
        "a write, a discard of the page",
        "lost",
        (
            Pages.discard,
            (
                "olds = self._empty_locked(start, stop)",
                "gone = self._words_locked(start, stop)\n"
                "            self._settle(gone, [0] * len(gone))\n"
                "            self._empty_locked(start, stop)",
            ),
            ("        self._settle(olds, [0] * len(olds))\n", ""),
        ),
    ),
    "a word is published before its object's bytes": Fault(
        "two writes of a page",
        "nobody has made it",
        (Pages._fill, _NOT_FILLED),
        (
            Pages._write_page,
            (
                "self._settle_page(",
                "if blob: self.arena.map[address : address + PAGE] = page\n    self._settle_page(",
            ),
        ),
    ),
    "words are published before their objects' bytes": Fault(
        "a write of two pages, a write of one of them",
        "nobody has made it",
        (Pages._fill, _NOT_FILLED),
        (
            Pages._write_page,
            (
                "try:\n        try:\n            old =",
                "if blob:\n"
                "        self.arena.map[address : address + len(blob)] = blob\n"
                "    try:\n        try:\n            old =",
            ),
        ),
        (
            Pages._write_pages,
            (
                "self._settle(",
                "for address, (_, blob) in zip(taken, [e for e in encoded if e[1]]):\n"
                "        self.arena.map[address : address + len(blob)] = blob\n"
                "    self._settle(",
            ),
        ),
    ),
    "words are stored by a memcpy": Fault(
        "a write of two pages, a write of one of them",
        "lost",
        (
            Pages._store_locked,
            (
                "for slot, word in enumerate(news, start):\n            table[slot] = word\n",
                "table[start : start + len(news)] = b''.join(\n"
                "            word.to_bytes(8, 'little') for word in news\n"
                "        )\n",
            ),
        ),
    ),
    "a class is written when an object of its span is handed out": Fault(
        "two writes that open a span",
        "lost",
        (Pool._grow_locked, ("    arena.span_map[index] = cls + 1\n", "")),
        (
            Pool.take,
            _TAKE,
            (
                "return taken",
                "for index in set(self.spans) - before:\n"
                "        self._arena.span_map[index] = self.spans[index].cls + 1\n"
                "    return taken",
            ),
        ),
    ),
    "a class is zeroed when an object is left": Fault(
        "two writes that need what another frees",
        "lost",
        (
            Pool._give_locked,
            (
                "free.append(address)\n",
                "free.append(address)\n"
                "        if len(free) == span.capacity - 1:\n"
                "            self._arena.span_map[span.index] = 0\n",
            ),
        ),
    ),
    "a table page goes while a word stands": Fault(
        "a write, a discard that empties the table page",
        "replaced",
        (Pages._empty_locked, ("if not any(table[base", "if True or (table[base")),
    ),
    "a table page goes when its lock is dropped": Fault(
        "a write, a discard that empties the table page",
        "replaced",
        (Pages._empty_locked, ("pages.vacate(page)", "return olds")),
        (
            Pages.discard,
            (
                "        self._settle(",
                "        if not any(self.arena.table[:SLOTS_PER_TABLE_PAGE]):\n"
                "            self.arena.table_pages.vacate(0)\n"
                "        self._settle(",
            ),
        ),
    ),
    "a table page is charged after its first word": Fault(
        "a write, a discard that empties the table page",
        "more is used",
        (
            Pages._swap_page_locked,
            (_CHARGE, ""),
            ("        return old", indent(_CHARGE, "    ") + "        return old"),
        ),
    ),
    "a part is charged when an object of it is handed out": Fault(
        "two writes that open a span",
        "more is used",
        (Pool._grow_locked, ("arena.occupy(base, PART)\n    if self._vacant", "if self._vacant")),
        (
            Pool.take,
            _TAKE,
            (
                "return taken",
                "for index in set(self.spans) - before:\n"
                "        self._arena.occupy(self.spans[index].base, PART)\n"
                "    return taken",
            ),
        ),
    ),
    "a compaction gives back before it publishes": Fault(
        "a compaction, a write of another page",
        "lost",
        (_move, (_PUBLISH, f"pool.give([old]); {_PUBLISH}"), ("spare[i] = old", "spare[i] = 0")),
    ),
    "a compaction publishes before it copies": Fault(
        "a compaction, a read of what it moves",
        "nobody has made it",
        (_move, (_PUBLISH, "pass\n"), (_COPY, f"{_PUBLISH[:-1]}; {_COPY}")),
    ),
    "a compaction moves without the lock": Fault(
        "a compaction, a write of what it moves",
        "replaced",
        (_move, ("with slot_lock:", "if True:"), ("pool.give(filter(None, spare))", "pass")),
    ),
    "a keeper is told of a reset before the drain": Fault(
        "writes, a reset interrupted",
        "device is what nobody has made it: None",
        (
            Zram._deinit_locked,
            ("            self.on_arena(None)\n", ""),
            ("self._gate.close()", "self._gate.close(); self.on_arena(None)"),
        ),
    ),
    "a keeper is not told of a reset": Fault(
        "a write, a reset",
        "device is 0",
        (Zram._deinit_locked, ("self.on_arena(None)", "pass")),
    ),
    "a keeper is told of an arena when the gate is open": Fault(
        "an init, a newcomer",
        "device is None",
        (
            Zram.init,
            ("self.on_arena(arena.fd)", "pass"),
            ("self._publish_locked(meta)", "self._publish_locked(meta); self.on_arena(arena.fd)"),
        ),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _what_is_broken_off_leaves_nothing() -> Iterator[None]:
    """Runs that end in the middle of a drain, or before their device is closed."""
    before, interval = _arenas(), sys.getswitchinterval()
    yield
    sys.setswitchinterval(interval)
    for arena in [thing for thing in gc.get_objects() if isinstance(thing, Arena)]:
        # A thread that was left in the midst of things holds it for ever.
        if hasattr(arena, "map") and not is_closed(arena):
            arena.close()
    for descriptor in _arenas() - before:
        os.close(descriptor)


def _arenas() -> set[int]:
    links = {}
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # that of this listing
            links[int(descriptor)] = os.readlink(f"/proc/self/fd/{descriptor}")
    return {n for n, link in links.items() if link.startswith("/memfd:")}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    planted = FAULTS[fault]
    for function, *changes in planted.planted:
        plant(monkeypatch, function, *changes)
    with pytest.raises(AssertionError) as found:
        explored(planted.scenario)
    assert planted.said in str(found.value)
    assert any("killed after" in note for note in found.value.__notes__)

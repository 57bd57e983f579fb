"""Recovery: after a kill at any instruction, after damage, and in the middle of any history."""

import functools
import itertools
import mmap
import os
import random
import signal
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis.stateful import rule

from tests.store import contents
from tests.store.audit import audit
from tests.store.contents import ZEROS, filled, noise, text
from tests.store.stores import (
    MIB,
    SLOTS,
    Journal,
    clone,
    fork,
    killed,
    pages_of,
    recovered,
    some_of_all,
    store,
    use_up,
    whole,
    work_for_ever,
)
from tests.store.test_pages_model import StoreAgainstBytearray
from tests.store.watched import Watched, Watcher, watch
from zramd.errors import BadArena, Corrupt, NoMemory, StoreFull
from zramd.store import PAGE, SPAN
from zramd.store.arena import Arena
from zramd.store.header import Header
from zramd.store.pages import Pages
from zramd.store.pool import CLASSES, PART
from zramd.store.recovery import recover
from zramd.store.table import LOST, SLOTS_PER_TABLE_PAGE, Kind
from zramd.store.zcomp import Algorithm, Comp

HEADER = 128
"""Bytes of what stands in an arena once and for all."""


# Any history


class RecoveredAgainstBytearray(StoreAgainstBytearray):
    """The store of test_pages_model, whose process now and then is another."""

    @rule()
    def go_on_in_another_process(self) -> None:
        before = self.pages
        self.pages, lost = recovered(before.arena.fd)
        assert lost == []
        assert self.pages.counters == before.counters
        old, new = before.arena, self.pages.arena
        assert (new.limit, new.used_max) == (old.limit, old.used_max)
        assert new.used <= old.used
        before.close()


TestRecoveredAgainstBytearray = RecoveredAgainstBytearray.TestCase


@pytest.mark.parametrize("algorithm", ["lz4", "zstd(level=1)"])
@pytest.mark.parametrize("reserve", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_store_goes_on_in_one_process_after_another(algorithm, reserve, seed):
    numbers = random.Random(seed)
    pages = store(1500, algorithm, limit=3 * MIB, reserve=reserve)
    content = bytearray(1500 * PAGE)
    kinds = [*map(noise, range(9)), *map(text, range(9)), *map(filled, contents.WORDS), ZEROS]
    kinds += [contents.part_noise(n, n * 97) for n in range(1, 40)]
    for _ in range(6):
        for _ in range(60):
            at = numbers.randrange(1500 * PAGE)
            if numbers.random() < 0.3:
                length = min(numbers.randrange(300 * PAGE), 1500 * PAGE - at)
                pages.discard(at, length)
                first, last = -(-at // PAGE) * PAGE, (at + length) // PAGE * PAGE
                content[first:last] = bytes(max(0, last - first))
            else:
                data = b"".join(numbers.choices(kinds, k=numbers.randrange(1, 20)))
                data = data[: min(len(data), 1500 * PAGE - at) - numbers.randrange(PAGE)]
                try:
                    pages.write(at, data)
                    content[at : at + len(data)] = data
                except StoreFull:
                    content[at : at + len(data)] = pages.read(at, len(data))
        if numbers.random() < 0.5:
            pages.compact()
        new, lost = recovered(pages.arena.fd)
        assert lost == []
        assert new.counters == pages.counters
        assert new.arena.used <= pages.arena.used
        assert new.arena.used_max == pages.arena.used_max
        assert new.arena.reserved == pages.arena.reserved
        assert new.arena.limit == 3 * MIB
        pages.close()
        pages = new
        audit(pages, snug=False)
        assert whole(pages) == content
    pages.close()


def test_an_empty_store_is_recovered_as_one():
    pages = store()
    new, lost = recovered(pages.arena.fd)
    assert (lost, whole(new)) == ([], bytes(600 * PAGE))
    assert new.arena.used == new.arena.resident() == PAGE
    audit(new)
    pages.close()
    new.close()


@pytest.mark.parametrize("reserve", [False, True])
def test_a_full_store_is_below_its_limit_afterwards(reserve):
    pages = store(4096, limit=4 * MIB, reserve=reserve)
    numbers = random.Random(1)
    slot = 0
    try:
        for slot in itertools.count():
            length = numbers.choice((300, 1500, 2500, 4095))
            pages.write(slot * PAGE, contents.part_noise(slot, length))
    except StoreFull:
        pass
    content = whole(pages)
    assert pages.arena.used > 4 * MIB - 2 * SPAN
    new, lost = recovered(pages.arena.fd)
    assert lost == []
    assert new.arena.used <= pages.arena.used <= new.arena.limit == 4 * MIB
    assert whole(new) == content
    with pytest.raises(StoreFull):
        new.write(slot * PAGE, b"".join(map(noise, range(40))))
    assert new.arena.used_max <= 4 * MIB
    audit(new, snug=False)
    new.discard(0, 4096 * PAGE)
    new.write(0, noise(1) * 100)
    audit(new, snug=False)
    pages.close()
    new.close()


def test_what_no_word_names_is_free_and_back_with_the_system():
    """A span and parts that a killed process had opened, a table page it had emptied."""
    pages = store(1200)
    pages.write(0, noise(1) * 6)
    pages.write(512 * PAGE, noise(2) * 60)
    for slot in range(1, 6):
        pages.arena.table[slot] = 0
    for slot in range(512, 572):
        pages.arena.table[slot] = 0
    new, lost = recovered(pages.arena.fd)
    assert lost == []
    assert new.arena.used == new.arena.resident() == 3 * PAGE + PART
    assert list(new.arena.table_pages.occupied) == [1, 0, 0]
    assert new.counters.pages == 1
    audit(new)
    pages.close()
    new.close()


def test_the_span_that_needs_fewest_parts_is_the_one_not_open_to_the_end():
    pages = store()
    pages.write(0, b"".join(map(noise, range(40))))  # two spans and a half
    for slot in (*range(1, 16), *range(22, 32), *range(33, 40)):
        pages.arena.table[slot] = 0  # leaves 1, 6 and 1 objects
    used = pages.arena.used
    new, _ = recovered(pages.arena.fd)
    assert sorted(span.opened for span in new.pool.spans.values()) == [PART, SPAN, SPAN]
    assert new.arena.used <= used
    audit(new)
    pages.close()
    new.close()


# Kills


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [("lz4", {}), ("zstd", {}), ("lz4", {"limit": 1 * MIB, "reserve": True})],
)
def test_whenever_a_process_is_killed_what_it_has_promised_is_there(algorithm, options):
    pages = store(SLOTS, algorithm, **options)
    keeper = pages.arena
    journal = Journal()
    numbers = random.Random(1)
    for seed in range(80):
        child = fork(functools.partial(work_for_ever, pages, journal, seed))
        time.sleep(numbers.uniform(0.003, 0.015))
        os.kill(child, signal.SIGKILL)
        assert killed(child)
        new, lost = recovered(keeper.fd)
        journal.check(new, lost)
        if pages.arena is not keeper:
            pages.close()
        pages = new
    assert max(journal.done) > 100, "nothing was done"
    pages.close()
    keeper.close()


class Steps(Watcher):
    """Each store is two places to be killed at: before it, or a piece of it, and after."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step = step

    def store(self, at: int, content: bytes) -> None:
        self._step()

    def punch(self, at: int, size: int) -> None:
        self._step()

    def stored(self) -> None:
        self._step()


def at_every_step(make: Callable[[], Any]) -> Iterator[int]:
    """Have a child killed at each of its steps, one after the other, until one ends before that.

    `make` returns the body of a child, to be called with what is a step, and a check, to be called
    in the parent afterwards.
    """
    for last in itertools.count(1):
        body, check = make()
        left = last

        def step() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

        was_killed = killed(fork(functools.partial(body, step)))
        check()
        if not was_killed:
            return
        yield last


def test_a_process_killed_while_it_makes_an_arena_leaves_none_or_a_whole_one(monkeypatch):
    pages_seen = []
    view = Arena._view

    def watched_view(arena: Arena) -> None:
        view(arena)
        watch(arena, Steps(lambda: pages_seen.append(os.pread(arena.fd, PAGE, 0))))

    with monkeypatch.context() as patch:
        patch.setattr(Arena, "_view", watched_view)
        new = Arena(600 * PAGE, "lz4", limit=8 * MIB)

    def is_whole(page: bytes) -> bool:
        try:
            header = Header.unpack(page, new.size)
        except BadArena:
            return False
        return header == new.header and struct.unpack_from("<QQ", page, 512) == (8 * MIB, PAGE)

    assert [is_whole(page) for page in pages_seen] == [*[False] * (len(pages_seen) - 1), True]
    os.close(new.fd)


def prepared(journal: Journal, pages: Pages) -> None:
    """A store with some of all: raw pages in two spans with holes, compressed ones, fills."""
    journal.request(pages, 0, 24, 4)  # raw: tagged() of a number divided by 4
    journal.request(pages, 4, 20, 8)
    journal.request(pages, 30, 40, 3)
    journal.request(pages, 40, 45, 9)
    journal.request(pages, 45, 50, 10)


SCRIPTS: dict[str, Callable[[Journal, Pages], object]] = {
    "writes to empty slots": lambda j, p: j.request(p, 60, 64, 13),
    "the first raw pages": lambda j, p: j.request(p, 60, 66, 12),
    "writes over raw pages": lambda j, p: j.request(p, 0, 4, 13),
    "writes over fills": lambda j, p: j.request(p, 42, 48, 12),
    "fills over raw pages": lambda j, p: j.request(p, 0, 4, 17),
    "larger fills over others": lambda j, p: j.request(p, 30, 50, 18),
    "a discard that frees a span": lambda j, p: j.request(p, 16, 24, 16),
    "a discard of all": lambda j, p: j.request(p, 0, SLOTS, 16),
    "a discard of all and new pages of other sizes": lambda j, p: (
        j.request(p, 0, SLOTS, 16),
        j.request(p, 0, 3, 19),
    ),
    "a compaction": lambda j, p: p.compact(),
    "a compaction and writes to where it was": lambda j, p: (
        p.compact(),
        j.request(p, 70, 74, 13),
        j.request(p, 74, 78, 12),
    ),
    "a part of a page": lambda j, p: (j.part(p, 0), j.part(p, 31), j.part(p, 41)),
}


@pytest.mark.parametrize("reserve", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_at_whatever_store_a_process_is_killed_what_it_has_promised_is_there(script, reserve):
    def make() -> Any:
        options = {"limit": 1 * MIB, "reserve": True} if reserve else {}
        pages, journal = store(SLOTS, **options), Journal()
        prepared(journal, pages)

        def body(step: Callable[[], None]) -> None:
            def step_and_tell() -> None:
                journal.rest[0] = pages.arena.used
                step()

            watch(pages.arena, Steps(step_and_tell))
            SCRIPTS[script](journal, pages)

        def check() -> None:
            new, lost = recovered(pages.arena.fd)
            journal.check(new, lost)
            assert new.arena.used <= journal.rest[0]
            journal.request(new, 1, 60, 20)
            journal.request(new, 50, 70, 13)
            journal.check(new, [])
            new.close()
            pages.close()

        return body, check

    assert len(list(at_every_step(make))) >= 6


def test_a_recovery_that_is_killed_can_be_repeated_and_reports_the_same():
    def make() -> Any:
        pages, journal = store(SLOTS), Journal()
        prepared(journal, pages)
        table = pages.arena.table
        for slot in (*range(20, 24), 30):
            table[slot] = 0
            journal.begun[slot] = journal.done[slot] = 0
        table[1] = table[0]
        table[31] ^= 0x80
        broken = [0, 1, 31]

        def body(step: Callable[[], None]) -> None:
            arena = Arena.adopt(pages.arena.fd)
            watch(arena, Steps(step))
            _, lost = recover(arena, Comp(Algorithm("lz4")))
            assert lost == broken

        def check() -> None:
            new, lost = recovered(pages.arena.fd)
            assert lost == broken
            for slot in broken:
                with pytest.raises(Corrupt, match=f"page {slot} was lost"):
                    new.read(slot * PAGE, PAGE)
                new.discard(slot * PAGE, PAGE)
                journal.begun[slot] = journal.done[slot] = 0
            journal.check(new, [])
            new.close()
            pages.close()

        return body, check

    assert len(list(at_every_step(make))) >= 8


@pytest.mark.parametrize(
    "request_",
    [
        lambda pages: pages.write(0, noise(7) * 9),
        lambda pages: pages.write(0, noise(7)),
        lambda pages: pages.discard(0, 9 * PAGE),
        lambda pages: pages.write(PAGE + 1, b"part"),
    ],
)
def test_who_is_interrupted_while_he_stores_words_has_stored_none(request_):
    pages = store()
    pages.write(0, b"".join(map(text, range(9))))
    content, table = whole(pages), pages.arena.table
    left = [-1]

    def interrupt() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    for first in range(1, 20):
        left[0] = first
        pages.arena.table = Watched(table, PAGE, Steps(interrupt))
        try:
            request_(pages)
        except KeyboardInterrupt:
            pages.arena.table = table
            assert whole(pages) == content
            audit(pages)
        else:
            assert first > 2
            break
    pages.arena.table = table
    pages.close()


# Lost pages


def test_a_lost_page_is_corrupt_until_it_is_written_as_a_whole_or_discarded():
    pages = store()
    pages.write(0, noise(1) * 4)
    pages.arena.table[1] = 0xFFFF_FFFF_FFFF_FF00
    pages.arena.table[3] = 2 << 21 | 100 << 8
    new, lost = recovered(pages.arena.fd)
    pages.close()
    assert lost == [1, 3]
    assert list(new.arena.table[0:4])[1::2] == [LOST, LOST]
    assert new.counters.same == 2
    for slot in lost:
        for use in (
            lambda: new.read(slot * PAGE, PAGE),  # noqa: B023 - called at once
            lambda: new.read(0, 5 * PAGE),
            lambda: new.write(slot * PAGE + 5, b"part"),  # noqa: B023
            lambda: new.zero(slot * PAGE + 5, 9),  # noqa: B023
        ):
            with pytest.raises(Corrupt, match="was lost") as caught:
                use()
            assert "discard" in str(caught.value.hint)
    assert new.read(0, PAGE) == new.read(2 * PAGE, PAGE) == noise(1)
    assert list(new.extents(0, 600 * PAGE)) == [
        (PAGE, Kind.HUGE),
        (PAGE, Kind.LOST),
        (PAGE, Kind.HUGE),
        (PAGE, Kind.LOST),
        (596 * PAGE, Kind.HOLE),
    ]
    again, lost = recovered(new.arena.fd)
    new.close()
    assert lost == [1, 3]
    again.write(PAGE, text(1))
    again.discard(3 * PAGE, PAGE)
    assert again.read(0, 4 * PAGE) == noise(1) + text(1) + noise(1) + ZEROS
    assert audit(again).pages == 3
    again.close()


# Damage


@pytest.fixture(scope="module")
def sound() -> Iterator[Pages]:
    """Not to be changed, but cloned."""
    pages = some_of_all()
    yield pages
    pages.close()


def damaged(pages: Pages, *writes: tuple[int, bytes]) -> tuple[Pages, list[int]]:
    """What is recovered from a copy with these bytes."""
    fd = clone(pages.arena.fd)
    try:
        for at, content in writes:
            os.pwrite(fd, content, at)
        return recovered(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("bit", range(8))
def test_a_bit_of_the_header_changed_anywhere_is_refused_or_harmless(sound, bit):
    first = os.pread(sound.arena.fd, PAGE, 0)
    content = whole(sound)
    fd = clone(sound.arena.fd)
    for at in range(PAGE):
        os.pwrite(fd, bytes([first[at] ^ 1 << bit]), at)
        if at < HEADER:
            with pytest.raises(BadArena) as caught:
                Arena.adopt(fd)
            assert "\n" not in caught.value.line()
        elif 500 <= at < 600:
            new, lost = recovered(fd)
            assert (lost, whole(new)) == ([], content)
            arena = new.arena
            assert 0 <= arena.limit < 1 << 62
            assert arena.used <= arena.used_max <= arena.size
            assert new.counters.huge <= new.counters.huge_since < 1 << 62
            assert 0 <= new.counters.compacted < 1 << 62
            new.close()
        os.pwrite(fd, first, 0)
    os.close(fd)


def test_every_byte_of_the_header_may_be_any_other(sound):
    fd = clone(sound.arena.fd)
    first = os.pread(fd, HEADER, 0)
    for at in range(HEADER):
        for value in {0, 255, 1, 127, *random.Random(at).randbytes(4)} - {first[at]}:
            os.pwrite(fd, bytes([value]), at)
            with pytest.raises(BadArena):
                Arena.adopt(fd)
        os.pwrite(fd, first, 0)
    os.close(fd)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"magic": b"someone's"[:8]}, "no arena of zramd"),
        ({"magic": bytes(8)}, "no arena of zramd"),
        ({"magic": b"zramd\0\0\1"}, "version 1"),
        ({"magic": b"zramd\0\0\3"}, "version 3"),
        ({"disksize": 0}, "disksize 0"),
        ({"disksize": 700 * PAGE + 1}, "senseless"),
        ({"disksize": 1 << 63}, "senseless"),
        ({"disksize": 699 * PAGE, "spans": 699 + 4096}, "where its header says"),
        ({"table_at": 2 * PAGE}, "not where they belong"),
        ({"map_at": 4 * PAGE}, "not where they belong"),
        ({"spans_at": 2 * SPAN}, "not where they belong"),
        ({"spans": 0}, "senseless"),
        ({"spans": 700 + 4095}, "where its header says"),
        ({"spans": (1 << 64) - 1}, "senseless"),
    ],
)
def test_a_header_that_makes_no_sense_is_refused_though_its_checksum_be_right(sound, fields, said):
    names = ("disksize", "table_at", "map_at", "spans_at", "spans", "reserved", "algorithm")
    found = dict(
        zip(names, struct.unpack("<6Q64s", os.pread(sound.arena.fd, 112, 16)), strict=True)
    )
    fd = clone(sound.arena.fd)
    packed = struct.pack(
        "<6Q64s", *{name: fields.get(name, found[name]) for name in names}.values()
    )
    magic = fields.get("magic", b"zramd\0\0\2")
    os.pwrite(fd, magic + struct.pack("<Q", zlib.crc32(packed)) + packed, 0)
    with pytest.raises(BadArena, match=said) as caught:
        Arena.adopt(fd)
    assert "\n" not in caught.value.line()
    os.fstat(fd)  # is the caller's still
    os.close(fd)


def test_an_arena_cut_off_anywhere_is_refused(sound):
    arena = sound.arena
    places = [0, 1, 8, HEADER - 1, HEADER, 512, PAGE, arena.header.map_at, arena.spans_at]
    places += [arena.spans_at + 5 * SPAN, arena.size - SPAN, arena.size - PAGE, arena.size]
    for size in {size + more for size in places for more in (-1, 0, 1)} - {-1, arena.size}:
        fd = clone(arena.fd)
        os.ftruncate(fd, size)
        with pytest.raises(BadArena):
            Arena.adopt(fd)
        os.close(fd)


def test_what_is_no_file_to_be_written_is_refused(tmp_path):
    ours, theirs = socket.socketpair()
    pipe = os.pipe()
    readable = os.open(tmp_path, os.O_RDONLY)
    for fd in (ours.fileno(), theirs.fileno(), *pipe, readable):
        with pytest.raises(BadArena, match="no file"):
            Arena.adopt(fd)
        os.fstat(fd)
    pages = store()
    read_only = os.open(f"/proc/self/fd/{pages.arena.fd}", os.O_RDONLY)
    with pytest.raises(BadArena, match="reading and writing"):
        Arena.adopt(read_only)
    for fd in (*pipe, readable, read_only):
        os.close(fd)
    ours.close()
    theirs.close()
    pages.close()


def test_an_adoption_that_fails_leaves_no_descriptor_and_the_callers_open(monkeypatch, sound):
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    fd = clone(sound.arena.fd)
    before = sorted(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(mmap, "mmap", refuse)
        with pytest.raises(NoMemory):
            Arena.adopt(fd)
    assert sorted(os.listdir("/proc/self/fd")) == before
    new, _ = recovered(fd)
    assert whole(new) == whole(sound)
    new.close()
    os.close(fd)


def test_adopting_a_reserve_locks_it_in_this_process_too():
    pages = store(limit=2 * MIB, reserve=True)
    pages.write(0, noise(1) * 9)
    held = []
    monkey = pytest.MonkeyPatch()
    monkey.setattr(Arena, "hold", lambda self: held.append(self))
    new, _ = recovered(pages.arena.fd)
    monkey.undo()
    assert held == [new.arena]
    assert new.arena.reserved == new.arena.resident() == pages.arena.reserved
    audit(new)
    pages.close()
    new.close()


@pytest.mark.parametrize("limit", [0, 2 * MIB + PAGE, 1 << 61, (1 << 64) - 1])
def test_a_limit_that_a_reserve_cannot_have_is_the_one_it_was_made_with(limit):
    pages = store(limit=2 * MIB, reserve=True)
    pages.arena.figures[0] = limit
    adopted = Arena.adopt(pages.arena.fd)
    assert adopted.limit == 2 * MIB
    adopted.close()
    pages.close()


def test_pages_that_were_published_and_not_counted_yet_are_counted():
    pages = store()
    pages.write(0, noise(1) * 3)
    pages.arena.figures[2] = 1
    new, _ = recovered(pages.arena.fd)
    assert audit(new).huge_since == 3
    pages.close()
    new.close()


def names_an_object(pages: Pages, word: int) -> bool:
    """Whether this word could be a stored one: a second reading of table.py and pool.py."""
    flags, length, address = word & 0xFF, word >> 8 & 0x1FFF, word >> 21 << 4
    kinds = {0: range(1, CLASSES[-2] + 1), 2: (8,), 4: (PAGE,)}
    if length not in kinds.get(flags, ()) or (flags == 0 and length == 8):
        return False
    span, at = divmod(address - pages.arena.spans_at, SPAN)
    if not 0 <= span < pages.arena.spans or not pages.arena.map_pages.occupied[span // PAGE]:
        return False
    cls = pages.arena.span_map[span]
    if not 0 < cls <= len(CLASSES):
        return False
    size = CLASSES[cls - 1]
    return at % size == 0 and at + size <= SPAN and length <= size


def test_a_bit_of_the_table_changed_costs_the_page_that_it_was_of_and_no_other(sound):
    """Or, where the word now names the object of another page, these two.

    Not seen is what nobody could see: a fill in place of a fill or an object, and an object that no
    other word names. Then the one page reads as something else, or as corrupt.
    """
    words, before = sound.arena.table.tolist(), pages_of(sound)
    slots = [slot for slot, word in enumerate(words) if word]
    owners = {word >> 21: slot for slot, word in enumerate(words) if word and not word & 1}
    numbers = random.Random(3)
    places = [(numbers.choice(slots), bit) for bit in range(64) for _ in range(3)]
    places += [(slot, bit) for slot in (3, 550, 699) for bit in range(0, 64, 5)]
    seen = set()
    for slot, bit in places:
        word = words[slot] ^ 1 << bit
        new, lost = damaged(sound, (PAGE + slot * 8, word.to_bytes(8, "little")))
        after = pages_of(new)
        owner = owners.get(word >> 21, slot)
        if word & 1 and word != LOST:
            seen.add("fill")
            assert lost == []
            assert after[slot] == filled((word >> 1) | (word >> 63) << 63)
        elif word == 0:
            assert (lost, after[slot]) == ([], ZEROS)
        elif not names_an_object(sound, word):
            seen.add("no object")
            assert (lost, after[slot]) == ([slot], None)
        elif owner != slot:
            seen.add("shared")
            assert lost == sorted([slot, owner])
            assert after[slot] is after[owner] is None
        elif word >> 21 == words[slot] >> 21:
            seen.add("length")
            assert lost == []
            assert after[slot] in (None, before[slot])
        else:
            seen.add("unused")
            assert lost == []
        for other in range(700):
            if other not in (slot, owner):
                assert after[other] == before[other]
        use_up(new) if bit % 9 == 0 else new.close()
    assert seen == {"fill", "no object", "shared", "length", "unused"}


def test_a_bit_of_the_span_map_changed_costs_pages_of_that_span_only(sound):
    before = pages_of(sound)
    words = sound.arena.table.tolist()
    at = sound.arena.header.map_at
    classes = os.pread(sound.arena.fd, 80, at)
    seen = 0
    for span, bit in itertools.product(range(0, 80, 4), range(8)):
        new, lost = damaged(sound, (at + span, bytes([classes[span] ^ 1 << bit])))
        after = pages_of(new)
        base = sound.arena.spans_at + span * SPAN
        inside = [
            slot
            for slot, word in enumerate(words)
            if word and not word & 1 and base <= word >> 21 << 4 < base + SPAN
        ]
        assert set(lost) <= set(inside)
        seen += len(lost)
        for slot in range(700):
            assert after[slot] == (None if slot in lost else before[slot])
        use_up(new) if bit == 0 else new.close()
    assert seen > 50


@pytest.mark.parametrize("seed", range(60))
def test_whatever_stands_in_table_and_span_map_ends_in_a_sound_store(sound, seed):
    numbers = random.Random(seed)
    before = pages_of(sound)
    words = sound.arena.table.tolist()
    stop = sound.arena.header.map_at + sound.arena.spans
    writes = []
    for _ in range(numbers.choice((1, 5, 50, 500))):
        length = numbers.choice((1, 1, 8, 100))
        at = numbers.choice((numbers.randrange(PAGE, stop), numbers.randrange(PAGE, 2 * PAGE)))
        content = numbers.choice((bytes(length), b"\xff" * length, numbers.randbytes(length)))
        if numbers.random() < 0.2:
            at = at // 8 * 8
            content = numbers.choice(words).to_bytes(8, "little")
        writes.append((at, content[: stop - at]))
    fd = clone(sound.arena.fd)
    for at, content in writes:
        os.pwrite(fd, content, at)
    now = memoryview(os.pread(fd, 700 * 8, PAGE)).cast("Q").tolist()
    new, lost = recovered(fd)
    os.close(fd)
    assert lost == sorted(set(lost))
    after = pages_of(new)
    for slot in range(700):
        if slot in lost:
            assert after[slot] is None
        elif now[slot] == words[slot]:
            assert after[slot] == before[slot]
    use_up(new)


def test_table_of_nothing_but_one_word_loses_all_that_name_its_object(sound):
    word = next(w for w in sound.arena.table.tolist() if w & 0xFF == 4)
    new, lost = damaged(sound, (PAGE, word.to_bytes(8, "little") * 700))
    assert lost == list(range(700))
    assert new.counters.same == new.counters.pages == 700
    assert new.arena.used == 3 * PAGE
    use_up(new)


def test_a_word_that_names_what_no_object_fits_into_at_the_end_of_a_span_is_lost():
    pages = store()
    pages.write(0, contents.part_noise(1, 3700))  # 17 of 3840 bytes make a span, and 256 are left
    word = pages.arena.table[0]
    size = CLASSES[pages.pool.spans[0].cls]
    assert SPAN % size
    pages.arena.table[1] = word + (SPAN // size * size >> 4 << 21)
    new, lost = recovered(pages.arena.fd)
    assert lost == [1]
    assert new.read(0, PAGE) == pages.read(0, PAGE)
    pages.close()
    use_up(new)


def test_what_a_destroyed_objects_page_reads_as_is_corrupt(sound):
    """Objects are not checked by recovery, which decompresses nothing."""
    words = sound.arena.table.tolist()
    slot = next(s for s, w in enumerate(words) if w and not w & 7)
    new, lost = damaged(sound, (words[slot] >> 21 << 4, b"\xff" * (words[slot] >> 8 & 0x1FFF)))
    assert lost == []
    with pytest.raises(Corrupt, match="does not decompress"):
        new.read(slot * PAGE, PAGE)
    use_up(new)


def test_the_largest_fill_that_is_no_lost_page_is_told_apart():
    fill = (1 << 64) - (1 << 62)
    pages = store()
    pages.write(0, filled(fill) + filled(fill + 1))
    assert pages.arena.table[0] & 1 == 0
    assert pages.arena.table[1] == LOST + 2
    new, lost = recovered(pages.arena.fd)
    assert lost == []
    assert new.read(0, 2 * PAGE) == filled(fill) + filled(fill + 1)
    pages.close()
    new.close()


def test_all_of_a_large_arena_that_is_not_stored_costs_nothing():
    """1 TiB of device, two pages stored: neither time nor memory goes with the size. It takes 16 of
    the 128 TiB of addresses that a process has, and 4 TiB find no room among what tests leave."""
    pages = store((1 << 40) // PAGE)
    last = pages.arena.slots - 1
    pages.write(last * PAGE, noise(1))
    pages.write(5 * SLOTS_PER_TABLE_PAGE * PAGE, text(1))
    used, fd = pages.arena.used, os.dup(pages.arena.fd)
    pages.close()  # the address space of a process does not hold it twice
    started = time.monotonic()
    new, lost = recovered(fd)
    os.close(fd)
    assert time.monotonic() - started < 2
    assert (lost, new.counters.pages) == ([], 2)
    assert new.arena.resident() <= new.arena.used == used
    assert new.read(last * PAGE, PAGE) == noise(1)
    new.close()

"""Compaction: content, accounts and memory after it, beside others, at the limit, and cut short."""

import random
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.store.audit import audit
from tests.store.contents import ZEROS, filled, noise, part_noise, tag_of, tagged
from tests.store.test_pages import Codec, run_all
from zramd.errors import Corrupt, StoreFull
from zramd.store import PAGE, compaction, table
from zramd.store.arena import SPAN, Arena
from zramd.store.pace import Pace
from zramd.store.pages import SPARSE_LEAST, Pages
from zramd.store.pool import CLASSES, PER_SPAN, Pool
from zramd.store.zcomp import NAMES, Algorithm, Comp

SLOTS = 3 * 512 + 100
"""Four table pages, the last one short."""


@pytest.fixture
def make() -> Iterator[Callable[..., Pages]]:
    made = []

    def make(algorithm: str = "lz4", *, slots: int = SLOTS) -> Pages:
        made.append(Pages(Arena(slots * PAGE, algorithm), Comp(Algorithm.parse(algorithm))))
        return made[-1]

    yield make
    for pages in made:
        pages.close()


@pytest.fixture
def pages(make) -> Pages:
    return make()


def of_all_kinds(slot: int) -> bytes:
    """A page of its own for each slot: raw, compressed, fills with and without an object."""
    kind = slot % 6
    if kind == 0:
        return noise(slot)
    if kind == 1:
        return filled(1 << 63 | slot)
    if kind == 2:
        return filled(slot)
    return part_noise(slot, 300 * kind)


def fill(pages: Pages, page_of: Callable[[int], bytes] = of_all_kinds) -> dict[int, bytes]:
    """Write every slot; what stands where."""
    content = {slot: page_of(slot) for slot in range(pages.arena.slots)}
    pages.write(0, b"".join(content.values()))
    return content


def thin_out(pages: Pages, content: dict[int, bytes], share: float, seed: int = 1) -> None:
    """Discard this share of the slots, chosen at random."""
    numbers = random.Random(seed)
    for slot in numbers.sample(sorted(content), int(share * len(content))):
        pages.discard(slot * PAGE, PAGE)
        content[slot] = ZEROS


def read_all(pages: Pages) -> dict[int, bytes]:
    return {slot: pages.read(slot * PAGE, PAGE) for slot in range(pages.arena.slots)}


def spans_by_class(pages: Pages) -> dict[int, list[int]]:
    """Objects in use in each span, per class."""
    found: dict[int, list[int]] = {}
    for span in pages.pool.spans.values():
        found.setdefault(span.cls, []).append(span.capacity - len(span.free))
    return found


def sparse_pair(pages: Pages) -> tuple[list[bytes], int]:
    """Two spans of raw pages, of which the first holds one page, and the second has room for one:
    the content of the slots, and the address of the object that is to move."""
    content = [noise(slot) for slot in range(32)]
    pages.write(0, b"".join(content))
    address = table.address_of(pages.arena.table[0])
    for slot in (*range(1, 16), 20):
        pages.discard(slot * PAGE, PAGE)
        content[slot] = ZEROS
    assert pages.pool.gain() == SPAN
    return content, address


# What it does


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", NAMES)
def test_what_was_discarded_at_random_goes_back_and_all_else_is_as_it_was(make, name, share):
    pages = make(name)
    content = fill(pages)
    thin_out(pages, content, share)
    gain, used, before = pages.pool.gain(), pages.arena.used, audit(pages)
    assert gain % SPAN == 0
    pages.compact()
    assert read_all(pages) == content
    after = audit(pages)
    assert pages.arena.used == used - gain
    assert pages.arena.resident() <= used - gain
    assert after.compacted == gain // PAGE
    assert after == replace(before, compacted=gain // PAGE), "nothing else is counted otherwise"
    assert gain


def test_afterwards_no_class_has_a_spans_worth_of_free_objects(pages):
    content = fill(pages)
    thin_out(pages, content, 0.6)
    pages.compact()
    for cls, in_use in spans_by_class(pages).items():
        room = sum(span.capacity for span in pages.pool.spans.values() if span.cls == cls)
        assert room - sum(in_use) < PER_SPAN[cls]
    assert pages.pool.gain() == 0


def test_the_sparsest_spans_are_emptied_so_that_least_is_moved(pages, monkeypatch):
    pages.write(0, b"".join(noise(slot) for slot in range(16 * 10)))
    kept_in_span = [3, 16, 15, 7, 16, 1, 12, 16, 2, 9]
    for span, kept in enumerate(kept_in_span):
        pages.discard((span * 16 + kept) * PAGE, (16 - kept) * PAGE)
    moved = []
    destinations = Pool.destinations
    monkeypatch.setattr(
        Pool, "destinations", lambda self, olds: moved.extend(olds) or destinations(self, olds)
    )
    pages.compact()
    spans = sorted({(address - pages.arena.spans_at) // SPAN for address in moved})
    assert spans == [0, 5, 8], "97 objects fit into 7 of the 10 spans"
    audit(pages)


def test_the_flags_and_the_length_move_with_the_object(pages):
    content, _ = sparse_pair(pages)
    word = pages.arena.table[0]
    pages.compact()
    moved = pages.arena.table[0]
    assert moved != word
    assert moved & table.HUGE
    assert table.length_of(moved) == PAGE
    assert [pages.read(slot * PAGE, PAGE) for slot in range(32)] == content


def test_a_fill_that_reads_like_an_address_in_a_span_to_be_emptied_stays_what_it_is(pages):
    _, old = sparse_pair(pages)
    pages.discard(21 * PAGE, PAGE)  # room for it, too
    pages.write(40 * PAGE, filled(old // SPAN << 32 | 5))
    word = pages.arena.table[40]
    assert word & table.INLINE
    assert table.address_of(word) // SPAN == old // SPAN
    pages.compact()
    assert pages.arena.table[40] == word
    assert audit(pages).compacted == SPAN // PAGE


def test_a_table_page_that_goes_when_its_turn_comes_is_not_looked_at(pages, monkeypatch):
    content = fill(pages, noise)
    thin_out(pages, content, 0.5)
    move, grown = compaction._move, []

    def emptied_before(arena, pool, page, at, slot_lock) -> None:
        if page == 1:
            pages.discard(512 * PAGE, 512 * PAGE)
        before = arena.resident()
        move(arena, pool, page, at, slot_lock)
        if page == 1:
            grown.append(arena.resident() - before)

    monkeypatch.setattr(compaction, "_move", emptied_before)
    pages.compact()
    assert grown
    assert not any(grown), "a look at a hole fills it"
    audit(pages)


def test_a_pool_that_is_dense_is_left_alone(pages, monkeypatch):
    content = fill(pages)
    words = bytes(pages.arena.table)
    monkeypatch.setattr(compaction, "_move", lambda *_: pytest.fail("scanned for nothing"))
    pages.compact()
    assert bytes(pages.arena.table) == words
    assert audit(pages).compacted == 0
    assert read_all(pages) == content


def test_the_scan_ends_when_all_that_was_to_be_emptied_is_empty(pages, monkeypatch):
    sparse_pair(pages)
    pages.write(512 * PAGE, filled(1))
    pages.write(1024 * PAGE, filled(1))
    scanned = []
    move = compaction._move
    monkeypatch.setattr(compaction, "_move", lambda *at: scanned.append(at[2]) or move(*at))
    pages.compact()
    assert scanned == [0]


def test_a_span_that_is_not_opened_to_its_end_is_never_emptied(pages):
    pages.write(0, b"".join(noise(slot) for slot in range(16 + 4)))
    pages.discard(PAGE, 3 * PAGE)
    pages.discard(17 * PAGE, 3 * PAGE)
    pages.compact()
    assert audit(pages).pages == 14
    pages.write(30 * PAGE, b"".join(noise(slot) for slot in range(20)))
    audit(pages)  # two spans of a class would be opened in part


def test_an_empty_store_is_compacted_in_no_time(pages):
    pages.compact()
    assert pages.arena.resident() == PAGE
    pages.write(0, noise(1))
    pages.compact()
    assert pages.read(0, PAGE) == noise(1)
    audit(pages)


def test_what_is_gained_serves_other_classes(pages):
    """At a limit that half of the pages fill, the other half turns into room for smaller ones."""
    pages.arena.limit = 40 * SPAN
    raw = 38 * 16
    pages.write(0, b"".join(noise(slot) for slot in range(raw)))
    for slot in range(0, raw, 2):
        pages.discard(slot * PAGE, PAGE)
    pages.compact()
    small = 700
    for slot in range(raw, raw + small):
        pages.write(slot * PAGE, part_noise(slot, 1500))
    for slot in range(raw):
        assert pages.read(slot * PAGE, PAGE) == (noise(slot) if slot % 2 else ZEROS)
    for slot in range(raw, raw + small):
        assert pages.read(slot * PAGE, PAGE) == part_noise(slot, 1500)
    audit(pages)


def test_sparse_is_what_would_lose_an_eighth_and_a_mib(pages):
    fill(pages, noise)
    assert not pages.sparse
    for slot in range(0, SLOTS, 9):
        pages.discard(slot * PAGE, PAGE)
    assert pages.pool.gain() < pages.arena.used / 8
    assert not pages.sparse
    for slot in range(1, SLOTS, 9):
        pages.discard(slot * PAGE, PAGE)
    assert pages.pool.gain() > pages.arena.used / 8
    assert pages.sparse
    pages.compact()
    assert not pages.sparse


def test_a_small_pool_is_never_sparse(pages):
    pages.write(0, b"".join(noise(slot) for slot in range(16 * 15)))
    for slot in range(16 * 15):
        if slot % 16:
            pages.discard(slot * PAGE, PAGE)
    assert pages.arena.used * 7 / 8 < pages.pool.gain() < SPARSE_LEAST
    assert not pages.sparse


# Order of moves


def test_the_bytes_are_there_before_a_word_names_them_and_an_object_is_free_only_after(
    pages, monkeypatch
):
    content = fill(pages, noise)
    thin_out(pages, content, 0.5)
    arena, named_before = pages.arena, set()

    def named() -> set[int]:
        return {table.address_of(word) for word in arena.table if word}

    destinations, give, publish = Pool.destinations, Pool.give, compaction.with_address
    steps = []

    def checked_destinations(self, olds):
        news = destinations(self, olds)
        named_before.update(named())
        assert not named_before & set(filter(None, news)), "taken and in use"
        steps.append("take")
        return news

    def checked_publish(word, new):
        old, length = table.address_of(word), table.length_of(word)
        assert arena.map[new : new + length] == arena.map[old : old + length]
        steps.append("publish")
        return publish(word, new)

    def checked_give(self, addresses):
        addresses = list(addresses)
        assert not named() & set(addresses), "free and named"
        steps.append("give")
        give(self, addresses)

    monkeypatch.setattr(Pool, "destinations", checked_destinations)
    monkeypatch.setattr(Pool, "give", checked_give)
    monkeypatch.setattr(compaction, "with_address", checked_publish)
    pages.compact()
    assert 4 < steps.count("take") <= 4 * 512 // compaction.PIECE
    assert steps.count("publish") > 100
    monkeypatch.undo()
    assert read_all(pages) == content
    audit(pages)


def test_a_look_at_the_store_from_every_checkpoint_finds_it_whole(pages):
    content = fill(pages)
    thin_out(pages, content, 0.7)
    looks = []

    def look() -> None:
        assert read_all(pages) == content
        looks.append(1)

    pages.checkpoint = look
    pages.compact()
    assert 4 < len(looks) <= 4 * 512 // compaction.PIECE
    audit(pages)


# What is in flight


def test_objects_taken_and_not_yet_published_keep_their_span_and_are_not_lost(pages):
    pages.comp = codec = Codec()
    codec.length = PAGE
    for slot in range(48):
        pages.write(slot * PAGE, noise(slot))
    pages.discard(0, 15 * PAGE)
    pages.discard(16 * PAGE, 15 * PAGE)
    kept = pages.pool.take([PAGE] * 20)  # of a write between its moves 2 and 4
    pages.discard(15 * PAGE, PAGE)
    pages.discard(31 * PAGE, 10 * PAGE)
    before = pages.pool.gain()
    pages.compact()
    assert pages.counters.compacted <= before // PAGE
    assert not pages.pool.leaving
    lengths = dict.fromkeys(kept, PAGE)
    for slot in range(41, 48):
        assert pages.read(slot * PAGE, PAGE) == noise(slot)
        lengths[table.address_of(pages.arena.table[slot])] = PAGE
    pages.pool.check(lengths)
    pages.pool.give(kept)
    pages.compact()
    audit(pages)


def test_nothing_is_put_into_a_span_that_is_leaving_and_what_is_given_there_is_not_taken(pages):
    content, old = sparse_pair(pages)
    pool = pages.pool
    pool.begin_compaction()
    number = old // SPAN
    assert list(pool.leaving) == [number]
    taken = pool.take([PAGE] * 30)
    assert number not in {address // SPAN for address in taken}
    pool.give(taken[:5])
    assert pool.end_compaction() == 0
    again = pool.take([PAGE] * 20)
    assert number in {address // SPAN for address in again}
    pool.give(again + taken[5:])
    audit(pages)
    assert pages.read(0, PAGE) == content[0]


def test_a_full_span_that_has_left_the_partial_ones_does_not_come_back_while_it_leaves(pages):
    pool = pages.pool
    _, old = sparse_pair(pages)
    pool.begin_compaction()
    span = pool.leaving[old // SPAN]
    taken = [span.free.pop() for _ in range(len(span.free))]  # as if a write had them in flight
    pool._free[span.cls] -= len(taken)
    pool.give(taken[:1])
    assert span.index not in pool._partial[span.cls]
    assert taken[0] not in pool.take([PAGE] * 40)
    pool.give(taken[1:])
    assert span.index not in pool._partial[span.cls]


def test_an_index_that_is_used_again_meanwhile_is_no_longer_leaving(pages):
    _, old = sparse_pair(pages)
    pages.pool.begin_compaction()
    pages.discard(0, PAGE)
    assert not pages.pool.leaving
    pages.write(600 * PAGE, part_noise(1, 1000))
    assert table.address_of(pages.arena.table[600]) // SPAN == old // SPAN
    assert pages.pool.destinations([table.address_of(pages.arena.table[600])]) == [0]
    assert pages.pool.end_compaction() == SPAN // PAGE
    audit(pages)


def test_where_others_take_the_room_meanwhile_what_finds_none_stays(pages):
    content, old = sparse_pair(pages)
    pages.arena.limit = pages.arena.used
    taken: list[int] = []
    begin = pages.pool.begin_compaction
    pages.pool.begin_compaction = lambda: (begin(), taken.extend(pages.pool.take([PAGE])))
    pages.compact()
    assert table.address_of(pages.arena.table[0]) == old
    pages.pool.give(taken)
    assert audit(pages).compacted == 0
    assert [pages.read(slot * PAGE, PAGE) for slot in range(32)] == content
    del pages.pool.begin_compaction
    pages.compact()
    assert audit(pages).compacted == SPAN // PAGE


@pytest.mark.parametrize("algorithm", ["lz4", "zstd"])
@pytest.mark.parametrize("limit", [0, 20 * SPAN])
def test_writers_readers_and_discarders_beside_compactions_see_only_what_was_written(
    make, algorithm, limit
):
    slots = 700
    pages = make(algorithm, slots=slots)
    pages.arena.limit = limit
    over: list[int] = []
    writers = 3

    def work(writer: int) -> None:
        numbers = random.Random(writer)
        mine = range(writer, slots, writers)
        latest: dict[int, bytes] = {}
        try:
            for number in range(1, 1500):
                if number % 150 == 0:
                    for slot in mine:
                        if numbers.random() < 0.8:
                            pages.discard(slot * PAGE, PAGE)
                            latest[slot] = ZEROS
                slot = numbers.choice(mine)
                at = slot * PAGE
                kind = numbers.random()
                try:
                    if kind < 0.35:
                        pages.discard(at, PAGE)
                        latest[slot] = ZEROS
                    elif kind < 0.45:
                        page = bytearray(latest.get(slot, ZEROS))
                        page[100:200] = bytes([number % 255 + 1]) * 100
                        pages.write(at + 100, page[100:200])
                        latest[slot] = bytes(page)
                    else:
                        page = tagged(slot, writer, number * (1 + number % 2 * 3))
                        pages.write(at, page)
                        latest[slot] = page
                except StoreFull:
                    assert limit
                assert pages.read(at, PAGE) == latest.get(slot, ZEROS)
        finally:
            over.append(writer)
        for slot in mine:
            assert pages.read(slot * PAGE, PAGE) == latest.get(slot, ZEROS)

    def compact() -> None:
        while len(over) < writers:
            pages.compact()
            time.sleep(0.001)

    def look() -> None:
        while len(over) < writers:
            assert pages.snapshot().pages >= 0
            assert not limit or pages.arena.used_max <= limit
            time.sleep(0.001)

    run_all(*(lambda writer=writer: work(writer) for writer in range(writers)), compact, look)
    assert audit(pages, snug=not limit).compacted > 0
    pages.compact()
    audit(pages, snug=not limit)
    pages.discard(0, slots * PAGE)
    map_pages = sum(pages.arena.map_pages.occupied)
    assert pages.arena.used == pages.arena.resident() == PAGE * (1 + map_pages)


def test_readers_of_whole_ranges_beside_compactions_see_whole_pages(pages):
    for slot in range(SLOTS):
        pages.write(slot * PAGE, tagged(slot, 0, slot))
    over: list[int] = []

    def thin_and_compact() -> None:
        try:
            for step in range(2, 12):
                for slot in range(step, SLOTS, 13):
                    pages.discard(slot * PAGE, PAGE)
                pages.compact()
        finally:
            over.append(1)

    def read() -> None:
        while not over:
            data = pages.read(0, SLOTS * PAGE)
            for slot in range(SLOTS):
                tag = tag_of(data[slot * PAGE : (slot + 1) * PAGE])
                assert tag is None or (tag[0], tag[2]) == (slot, slot)

    run_all(thin_and_compact, read, read)
    assert audit(pages).compacted > 0


# Cut short


class Stop(Exception):
    """What a checkpoint raises."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt])
@pytest.mark.parametrize("checkpoints", [0, 1, 2])
def test_cut_short_it_leaves_ordinary_spans_and_the_next_one_ends_the_work(
    pages, checkpoints, error
):
    content = fill(pages)
    thin_out(pages, content, 0.6)
    gain = pages.pool.gain()
    left = checkpoints

    def stop() -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise error

    pages.checkpoint = stop
    with pytest.raises(error):
        pages.compact()
    counted = audit(pages)
    assert 0 <= counted.compacted < gain // PAGE
    assert read_all(pages) == content
    # What was leaving is taken from again: as much fits as is free.
    used = pages.arena.used
    free = pages.pool._free[CLASSES.index(PAGE)]
    pages.pool.give(pages.pool.take([PAGE] * free))
    assert pages.arena.used == used
    pages.checkpoint = lambda: None
    pages.compact()
    assert audit(pages).compacted == gain // PAGE
    assert read_all(pages) == content


@pytest.mark.parametrize("after", [0, 1, 5, 30])
def test_an_exception_between_two_moves_loses_no_object(pages, monkeypatch, after):
    content = fill(pages, noise)
    thin_out(pages, content, 0.5)
    publish, left = compaction.with_address, after

    def fail(word, address):
        nonlocal left
        left -= 1
        if left < 0:
            raise MemoryError
        return publish(word, address)

    with monkeypatch.context() as patch:
        patch.setattr(compaction, "with_address", fail)
        with pytest.raises(MemoryError):
            pages.compact()
    assert not any(lock.locked() for lock in [*pages._slot_locks, pages._compaction])
    audit(pages)
    assert read_all(pages) == content
    pages.compact()
    audit(pages)
    assert read_all(pages) == content


# Before a write is refused


def limited_and_sparse(pages: Pages) -> dict[int, bytes]:
    """At its limit, with two thirds of the memory in objects that are free, of 4096 bytes."""
    content = {slot: noise(slot) for slot in range(16 * 30)}
    pages.write(0, b"".join(content.values()))
    for slot in content:
        if slot % 3:
            pages.discard(slot * PAGE, PAGE)
            content[slot] = ZEROS
    pages.write(1600 * PAGE, part_noise(1, 1000))  # its table page, and the class's first part
    content[1600] = part_noise(1, 1000)
    pages.arena.limit = pages.arena.used
    return content


@pytest.mark.parametrize("who", ["nobody", "its own write", "another's write"])
def test_a_compaction_hurries_while_a_write_waits_for_it(pages, monkeypatch, who):
    limited_and_sparse(pages)
    hurried = []
    writer = threading.Thread(target=lambda: pages.write(500 * PAGE, part_noise(1, 1000) * 1000))

    def keep(self) -> None:
        if who == "another's write" and not hurried:
            writer.start()
            deadline = time.monotonic() + 60
            while not self._hurry and time.monotonic() < deadline:
                time.sleep(0.001)
        hurried.append(bool(self._hurry))

    monkeypatch.setattr(Pace, "keep", keep)
    if who == "its own write":
        writer.run()
    else:
        pages.compact()
    if who == "another's write":
        writer.join()
    assert set(hurried) == {who != "nobody"}
    assert not pages._in_need
    audit(pages, snug=False)


def test_at_the_limit_a_write_compacts_before_it_is_refused(pages):
    content = limited_and_sparse(pages)
    free = pages.pool.gain() // SPAN * PER_SPAN[CLASSES.index(1024)]
    first = 16 * 30
    for slot in range(first, first + 1000):
        content[slot] = part_noise(slot, 1000)
        pages.write(slot * PAGE, content[slot])
    assert free > 1000
    counted = audit(pages)
    assert counted.compacted == 20 * SPAN // PAGE
    assert pages.arena.used <= pages.arena.used_max == pages.arena.limit
    for slot, page in content.items():
        assert pages.read(slot * PAGE, PAGE) == page


def test_at_the_limit_a_write_of_a_part_compacts_too_and_not_under_its_slot_lock(pages):
    content = limited_and_sparse(pages)
    given_back = pages.counters.compacted
    slot = 1599
    while pages.counters.compacted == given_back:
        slot -= 1
        pages.write(slot * PAGE + 5, noise(slot)[:1000])
    assert pages.read(slot * PAGE, PAGE) == bytes(5) + noise(slot)[:1000] + bytes(PAGE - 1005)
    counted = audit(pages)
    assert counted.compacted == 20 * SPAN // PAGE
    for slot, page in content.items():
        assert pages.read(slot * PAGE, PAGE) == page


def test_at_the_limit_a_zero_of_a_part_compacts_too(pages):
    content = limited_and_sparse(pages)
    pages.zero(1600 * PAGE, 500)  # what is left of it belongs to a class that has no span
    assert pages.read(1600 * PAGE, PAGE) == bytes(500) + content[1600][500:]
    assert audit(pages).compacted == 20 * SPAN // PAGE


def test_at_the_limit_a_table_page_is_made_room_for_too(pages):
    content = limited_and_sparse(pages)
    pages.write(600 * PAGE, filled(5))  # no object, but a table page
    assert pages.read(600 * PAGE, PAGE) == filled(5)
    assert audit(pages).compacted == 20 * SPAN // PAGE
    for slot, page in content.items():
        assert pages.read(slot * PAGE, PAGE) == page


def test_a_write_refused_its_table_page_drops_its_objects_whatever_ends_the_compaction(pages):
    limited_and_sparse(pages)

    def stop() -> None:
        raise Stop

    pages.checkpoint = stop
    with pytest.raises(Stop):
        pages.write(600 * PAGE, noise(5) + noise(6))
    assert pages.read(600 * PAGE, PAGE) == ZEROS
    audit(pages)


@pytest.mark.parametrize(
    ("offset", "data"), [(1610 * PAGE, part_noise(7, 2000)), (1610 * PAGE + 1, b"x")]
)
def test_a_write_whose_compaction_is_cut_short_fails_with_that_and_changes_nothing(
    pages, offset, data
):
    limited_and_sparse(pages)

    def stop() -> None:
        raise Stop

    pages.checkpoint = stop
    with pytest.raises(Stop):
        pages.write(offset, data)
    assert pages.read(1610 * PAGE, PAGE) == ZEROS
    audit(pages)


def test_where_nothing_is_to_be_gained_a_refusal_looks_at_no_table_page_and_marks_no_span(
    pages, monkeypatch
):
    content = fill(pages, noise)
    pages.arena.limit = pages.arena.used
    for name in ("begin_compaction", "destinations"):
        monkeypatch.setattr(Pool, name, lambda *_: pytest.fail("compacted for nothing"))
    looked = []
    take = Pool.take
    monkeypatch.setattr(
        Pool, "take", lambda self, *of, **how: looked.append(how) or take(self, *of, **how)
    )
    free = sum(pages.pool._free)
    for _ in range(10):
        with pytest.raises(StoreFull):
            pages.write(0, noise(1) * (free + 1))
    assert looked == [{}, {"larger": False}, {"larger": True}] * 10
    assert read_all(pages) == content


def test_a_refused_write_has_left_nothing_that_compaction_could_give_back(pages):
    content = limited_and_sparse(pages)
    refused = 0
    for slot in range(16 * 30, SLOTS):
        page = part_noise(slot, 1000 + slot % 3000)
        try:
            pages.write(slot * PAGE, page)
        except StoreFull:
            refused += 1
            assert pages.pool.gain() == 0
        else:
            content[slot] = page
    assert refused
    assert pages.arena.limit - pages.arena.used < SPAN // 4
    assert pages.pool._free[CLASSES.index(PAGE)] == 0, "full for every length"
    audit(pages, snug=False)
    for slot, page in content.items():
        assert pages.read(slot * PAGE, PAGE) == page


def test_a_limit_below_what_is_used_refuses_after_one_compaction(pages, monkeypatch):
    limited_and_sparse(pages)
    pages.arena.limit = 10 * SPAN
    compactions = []
    begin = Pool.begin_compaction
    monkeypatch.setattr(Pool, "begin_compaction", lambda self: compactions.append(1) or begin(self))
    room = pages.pool._free[CLASSES.index(PAGE)]
    for _ in range(5):
        with pytest.raises(StoreFull):
            pages.write(16 * 31 * PAGE, noise(1) * (room + 1))
    assert compactions == [1]
    audit(pages)


# Objects of larger classes


def test_a_full_pool_gives_objects_of_the_next_larger_class_that_has_room(pages):
    pool = pages.pool
    lengths = [CLASSES[-1]] * 15 + [CLASSES[-3]] * 3
    taken = dict(zip(pool.take(lengths), lengths, strict=True))
    pages.arena.limit = pages.arena.used
    with pytest.raises(StoreFull):
        pool.take([100])
    room = sum(pool._free)
    more = pool.take([100] * room, larger=True)
    taken |= dict.fromkeys(more, 100)
    sizes = [CLASSES[pool.spans[(at - pages.arena.spans_at) // SPAN].cls] for at in more]
    assert sizes == sorted(sizes), "the next larger one first"
    assert set(sizes) == {CLASSES[-3], CLASSES[-1]}
    pool.check(taken)
    assert sum(pool._free) == 0
    with pytest.raises(StoreFull):
        pool.take([100], larger=True)
    pool.check(taken)
    pool.give(taken)
    assert pool.spans == {}


def test_where_only_spans_have_run_out_parts_of_larger_classes_are_still_opened(make):
    pages = make(slots=64)
    pages.arena.spans = 3
    pool = pages.pool
    taken = pool.take([4096]) + pool.take([2000]) + pool.take([64])
    lengths = [4096, 2000, 64]
    with pytest.raises(StoreFull, match="every span"):
        pool.take([100])
    count = PER_SPAN[CLASSES.index(4096)] + PER_SPAN[CLASSES.index(2048)] - 2
    more = pool.take([100] * count, larger=True)
    pool.check(dict(zip(taken + more, lengths + [100] * count, strict=True)))
    assert [span.opened for span in pool.spans.values()] == [SPAN, SPAN, SPAN // 4]
    used = pages.arena.used
    with pytest.raises(StoreFull, match="every span"):
        pool.take([100], larger=True)
    assert pages.arena.used == used


def test_a_take_refused_though_larger_classes_would_do_leaves_all_as_it_was(make):
    pages = make(slots=64)
    pages.arena.spans = 2
    pool = pages.pool
    taken = pool.take([4096, 64])
    used, free = pages.arena.used, list(pool._free)
    opened = [span.opened for span in pool.spans.values()]
    with pytest.raises(StoreFull):
        pool.take([100] * 16, larger=True)
    assert (pages.arena.used, pool._free) == (used, free)
    assert [span.opened for span in pool.spans.values()] == opened
    pool.check(dict(zip(taken, [4096, 64], strict=True)))
    pool.take([100] * 15, larger=True)


def test_pages_in_larger_objects_are_read_moved_and_freed_like_others(pages):
    content = {slot: noise(slot) for slot in range(16 * 20)}
    pages.write(0, b"".join(content.values()))
    pages.write(1600 * PAGE, filled(1))
    pages.arena.limit = pages.arena.used
    holes = range(0, 16 * 20, 22)  # too few to empty a span
    for slot in holes:
        pages.discard(slot * PAGE, PAGE)
        content[slot] = ZEROS
    assert pages.pool.gain() == 0
    for i, _ in enumerate(holes):
        content[1540 + i] = part_noise(i, 700)
        pages.write((1540 + i) * PAGE, content[1540 + i])
    assert sum(pages.pool._free) == 0
    with pytest.raises(StoreFull):
        pages.write(1599 * PAGE, part_noise(5, 700))
    for slot in range(0, 16 * 20, 2):
        pages.discard(slot * PAGE, PAGE)
        content[slot] = ZEROS
    gain = pages.pool.gain()
    assert gain > SPAN
    addresses = {slot: table.address_of(pages.arena.table[slot]) for slot in range(1540, 1555)}
    pages.compact()
    assert audit(pages, snug=False).compacted == gain // PAGE
    moved = [
        at for slot, at in addresses.items() if table.address_of(pages.arena.table[slot]) != at
    ]
    assert moved
    for slot, page in content.items():
        assert pages.read(slot * PAGE, PAGE) == page
    pages.compact()
    assert audit(pages, snug=False).compacted == gain // PAGE, "a second one finds nothing to do"
    assert not pages.sparse


def test_a_full_arena_is_full_for_every_length_and_a_write_over_old_pages_goes_on(make):
    pages = make(slots=2000)
    pages.arena.spans = 40
    numbers = random.Random(3)
    content: dict[int, bytes] = {}
    refused = 0
    for number in range(5000):
        slot = numbers.randrange(2000)
        page = part_noise(number, numbers.choice([200, 500, 1000, 2000, 3000, 3700, 4090]))
        try:
            pages.write(slot * PAGE, page)
        except StoreFull:
            refused += 1
            pages.discard(slot * PAGE, PAGE)
            page = ZEROS
        content[slot] = page
    assert refused
    audit(pages, snug=False)
    assert all(pages.read(slot * PAGE, PAGE) == page for slot, page in content.items())
    stored = pages.counters.compressed_bytes
    assert stored > 0.8 * 40 * SPAN


# The account of free objects


def test_any_history_keeps_the_account_of_what_is_free(pages):
    numbers = random.Random(5)
    pool = pages.pool
    taken: dict[int, int] = {}
    for step in range(400):
        kind = numbers.random()
        if taken and kind < 0.5:
            given = numbers.sample(sorted(taken), numbers.randrange(len(taken)) + 1)
            pool.give(given)
            for address in given:
                del taken[address]
        elif kind < 0.6:
            pool.begin_compaction()
            olds = [at for at in taken if at // SPAN in pool.leaving]
            news = pool.destinations(olds)
            for old, new in zip(olds, news, strict=True):
                if new:
                    taken[new] = taken.pop(old)
            pool.give([old for old, new in zip(olds, news, strict=True) if new])
            assert pool.leaving == {}, f"step {step}: not all went back"
            pool.end_compaction()
            assert pool.gain() == 0
        else:
            pages.arena.limit = numbers.choice([0, 0, pages.arena.used + 2 * SPAN])
            lengths = numbers.choices([1, 16, 17, 1000, 3840, 4096], k=numbers.randrange(200))
            try:
                new = pool.take(lengths, larger=numbers.random() < 0.5)
            except StoreFull:
                continue
            taken.update(zip(new, lengths, strict=True))
        pool.check(taken)


def test_check_finds_a_wrong_account_and_a_span_that_nobody_takes_from(pages):
    pool = pages.pool
    (address,) = pool.take([100])
    pool._free[CLASSES.index(112)] += 1
    with pytest.raises(Corrupt, match="by class"):
        pool.check({address: 100})
    pool._free[CLASSES.index(112)] -= 1
    pool._partial[CLASSES.index(112)].clear()
    with pytest.raises(Corrupt, match="nobody will find"):
        pool.check({address: 100})

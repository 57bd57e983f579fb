"""The pool: classes, spans, and objects that are nobody else's."""

import random
from itertools import pairwise

import pytest

from zramd.errors import Corrupt, StoreFull
from zramd.store import PAGE
from zramd.store.arena import SPAN, Arena
from zramd.store.pool import CLASS_OF, CLASSES, PART, UNIT, Pool


@pytest.fixture
def arena():
    new = Arena(2000 * PAGE, "lz4")
    yield new
    new.close()


@pytest.fixture
def pool(arena):
    return Pool(arena)


def parts_used(arena: Arena) -> int:
    used = arena.used - PAGE - PAGE * sum(arena.map_pages.occupied)
    assert used % PART == 0
    return used // PART


def spans_used(arena: Arena) -> int:
    # Only what is occupied: to look at a hole of the mapping would fill it.
    pages = [page for page, used in enumerate(arena.map_pages.occupied) if used]
    return sum(map(bool, b"".join(arena.span_map[at * PAGE : (at + 1) * PAGE] for at in pages)))


def test_classes_fit_their_lengths_and_waste_little():
    assert sorted(set(CLASSES)) == CLASSES
    assert CLASSES[-1] == PAGE
    assert len(CLASSES) < 255, "a span map byte holds the class plus one"
    for length in range(1, PAGE + 1):
        size = CLASSES[CLASS_OF[length + UNIT - 1 >> 4]]
        assert size % UNIT == 0
        assert size >= length
        if length > 1024:
            assert size - length < 260, "the largest step, 3840 to 4096, and rounding"
            assert SPAN // size == SPAN // length or size == next(c for c in CLASSES if c >= length)
        else:
            assert size - length < 16
    for size in CLASSES:
        assert SPAN % size <= SPAN // 40


def test_a_length_gets_the_smallest_class_that_holds_it():
    for size, larger in zip(CLASSES, [*CLASSES[1:], None], strict=True):
        assert CLASSES[CLASS_OF[size + 15 >> 4]] == size
        assert CLASSES[CLASS_OF[size - 1 + 15 >> 4]] == size
        if larger:
            assert CLASSES[CLASS_OF[size + 1 + 15 >> 4]] == larger


@pytest.mark.parametrize("size", CLASSES)
def test_a_span_is_filled_to_its_last_object_before_another_is_opened(size, arena, pool):
    count = SPAN // size
    first = pool.take([size] * count)
    assert spans_used(arena) == 1
    assert len(set(first)) == count
    assert first == sorted(first), "filled in order, so it is read in order"
    assert max(first) + size <= arena.spans_at + SPAN
    assert all(address % UNIT == 0 for address in first)
    assert parts_used(arena) == 4
    one_more = pool.take([size])
    assert spans_used(arena) == 2
    assert parts_used(arena) == 5
    pool.check(dict.fromkeys(first + one_more, size))
    pool.give(first + one_more)
    assert spans_used(arena) == parts_used(arena) == 0
    assert arena.resident() <= arena.used


@pytest.mark.parametrize("size", CLASSES)
def test_a_span_is_charged_by_the_quarters_that_its_objects_reach_into(size, arena, pool):
    taken = []
    for count in range(1, SPAN // size + 1):
        taken += pool.take([size])
        assert parts_used(arena) == -(-count * size // PART)
        assert max(taken) + size <= arena.spans_at + parts_used(arena) * PART


def test_an_object_given_back_is_taken_again_before_a_new_span_is_opened(arena, pool):
    objects = pool.take([4096] * 48)
    assert spans_used(arena) == 3
    holes = objects[3:16:5] + objects[17:40:7]
    pool.give(holes)
    assert set(pool.take([4096] * len(holes))) == set(holes)
    assert spans_used(arena) == 3


def test_a_span_that_fell_out_of_the_partial_ones_comes_back_with_its_first_free_object(
    arena, pool
):
    first = pool.take([4096] * 16)
    second = pool.take([4096] * 16)
    third = pool.take([4096])
    pool.give(first[:1])
    pool.give(second[:1])
    again = pool.take([4096] * 17)
    assert spans_used(arena) == 3
    assert set(first[:1] + second[:1]) <= set(again)
    pool.check(dict.fromkeys(first[1:] + second[1:] + third + again, 4096))


def test_given_back_spans_are_used_again_lowest_first(arena, pool):
    objects = pool.take([4096] * 64)
    pool.give(objects[16:32])
    pool.give(objects[0:16])
    assert pool.take([4096]) == [arena.spans_at]
    assert arena.span_map[0] == len(CLASSES)
    assert arena.span_map[1] == 0


def test_the_span_map_names_the_class_of_each_span(arena, pool):
    objects = pool.take([16, 4096, 100])
    for address, size in zip(objects, [16, 4096, 112], strict=True):
        assert CLASSES[arena.span_map[(address - arena.spans_at) // SPAN] - 1] == size


@pytest.mark.parametrize("room", range(24))
def test_a_refused_take_changes_nothing(room, arena, pool):
    kept = pool.take([4096] * 15 + [100] * 3)
    before = (spans_used(arena), arena.used, bytes(arena.span_map))
    pool.check(dict(zip(kept, [4096] * 15 + [100] * 3, strict=True)))
    free_before = {index: sorted(span.free) for index, span in pool.spans.items()}
    arena.limit = arena.used + room * PART
    lengths = [4096] * 17 + [100] * 700 + [2000] * 40 + [4096] * 70
    with pytest.raises(StoreFull):
        pool.take(lengths)
    assert (spans_used(arena), arena.used, bytes(arena.span_map)) == before
    assert {index: sorted(span.free) for index, span in pool.spans.items()} == free_before
    assert arena.resident() <= arena.used
    arena.limit = 0
    taken = pool.take(lengths)
    lengths_of = dict(zip(kept, [4096] * 15 + [100] * 3, strict=True))
    pool.check(lengths_of | dict(zip(taken, lengths, strict=True)))


def test_a_page_of_the_span_map_that_does_not_fit_the_limit_charges_no_span(arena, pool):
    arena.limit = PAGE + PART + PAGE - 1
    with pytest.raises(StoreFull):
        pool.take([1])
    assert arena.used == PAGE * (1 + sum(arena.map_pages.occupied))
    assert not pool.spans
    arena.limit += 1
    pool.take([1])
    assert arena.used == arena.limit


def test_an_arena_whose_spans_are_all_in_use_is_full_and_says_so():
    arena = Arena(PAGE, "lz4")
    pool = Pool(arena)
    spans = len(arena.span_map)
    with pytest.raises(StoreFull, match="every span"):
        pool.take([4096] * (spans * 16 + 1))
    assert arena.used <= PAGE + 2 * PAGE
    arena.close()


def test_any_history_of_takes_and_gives_keeps_objects_apart(arena, pool):
    numbers = random.Random(1)
    taken: dict[int, int] = {}
    for _ in range(300):
        if taken and numbers.random() < 0.5:
            given = numbers.sample(sorted(taken), numbers.randrange(len(taken)) + 1)
            pool.give(given)
            for address in given:
                del taken[address]
        else:
            arena.limit = numbers.choice([0, 0, arena.used + 3 * SPAN])
            lengths = numbers.choices([1, 16, 17, 1000, 3840, 3841, 4096], k=numbers.randrange(60))
            try:
                addresses = pool.take(lengths)
            except StoreFull:
                continue
            assert not taken.keys() & set(addresses)
            taken.update(zip(addresses, lengths, strict=True))
        pool.check(taken)
        ends = [(at, at + length) for at, length in sorted(taken.items())]
        assert all(a[1] <= b[0] for a, b in pairwise(ends))
        assert all(len(span.free) < span.capacity for span in pool.spans.values())
    pool.give(taken)
    assert spans_used(arena) == 0


class TestCheckFinds:
    def test_an_object_in_no_span(self, arena, pool):
        with pytest.raises(Corrupt, match="no span"):
            pool.check({arena.spans_at: 1})

    def test_an_object_off_its_place(self, pool):
        (address,) = pool.take([100])
        with pytest.raises(Corrupt, match="does not fit"):
            pool.check({address + 16: 100})

    def test_an_object_longer_than_its_class(self, pool):
        (address,) = pool.take([100])
        with pytest.raises(Corrupt, match="does not fit"):
            pool.check({address: 113})

    def test_an_object_beyond_the_last_of_a_span(self, arena, pool):
        pool.take([3840])
        with pytest.raises(Corrupt, match="does not fit"):
            pool.check({arena.spans_at + 3840 * 17: 3840})

    def test_an_object_both_free_and_named(self, pool):
        taken = pool.take([100, 100])
        pool.give(taken[:1])
        with pytest.raises(Corrupt, match="free and in use"):
            pool.check(dict.fromkeys(taken, 100))

    def test_a_lost_object(self, pool):
        taken = pool.take([100, 100])
        with pytest.raises(Corrupt, match="no slot names"):
            pool.check({taken[0]: 100})

    def test_a_span_map_that_disagrees(self, arena, pool):
        (address,) = pool.take([100])
        arena.span_map[0] += 1
        with pytest.raises(Corrupt, match="span map disagrees"):
            pool.check({address: 100})


def test_a_closed_pool_keeps_no_bookkeeping(pool):
    pool.take([100] * 1000)
    pool.close()
    assert not pool.spans

"""The slot word: what goes in comes out, and kinds of words cannot be taken for each other."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store.contents import INLINE_EDGE, WORDS
from zramd.store.table import (
    FILL_ZERO,
    HUGE,
    INLINE,
    LOST,
    SAME,
    Kind,
    address_of,
    fill_of,
    inline_fill,
    kind_of,
    kinds_of,
    length_of,
    object_word,
    with_address,
)


@given(st.sampled_from(WORDS) | st.integers(0, (1 << 64) - 1))
def test_a_fill_is_inline_where_63_bits_hold_it_and_comes_back_the_same(fill):
    as_bytes = fill.to_bytes(8, "little")
    word = inline_fill(as_bytes)
    signed = fill - (1 << 64) if fill >> 63 else fill
    if -INLINE_EDGE < signed < INLINE_EDGE:
        assert word & INLINE
        assert 0 < word < 1 << 64
        assert fill_of(word) == as_bytes
    else:
        assert word == 0


@pytest.mark.parametrize(
    ("fill", "fits"),
    [
        (0, True),
        (INLINE_EDGE - 1, True),
        (INLINE_EDGE, False),
        ((1 << 64) - INLINE_EDGE + 1, True),
        ((1 << 64) - INLINE_EDGE, False),  # its word means a lost page
        ((1 << 64) - INLINE_EDGE - 1, False),
        ((1 << 64) - 1, True),
    ],
)
def test_the_edges_of_the_inline_form(fill, fits):
    assert bool(inline_fill(fill.to_bytes(8, "little"))) == fits


def test_a_page_of_zeros_is_stored_and_not_empty():
    assert inline_fill(bytes(8)) == FILL_ZERO != 0
    assert fill_of(FILL_ZERO) == bytes(8)


@given(
    st.integers(1, (1 << 40) - 1),
    st.integers(1, 4096),
    st.sampled_from([0, SAME, HUGE, SAME | HUGE, 0xFE]),
)
def test_an_objects_word_gives_back_address_length_and_flags(units, length, flags):
    word = object_word(units * 16, length, flags)
    assert word < 1 << 64
    assert not word & INLINE
    assert (address_of(word), length_of(word), word & 0xFF) == (units * 16, length, flags)


@given(st.integers(1, (1 << 40) - 1), st.integers(1, (1 << 40) - 1), st.integers(0, 127))
def test_a_word_whose_object_moves_keeps_all_but_its_address(units, others, flags):
    word = object_word(units * 16, 1234, flags << 1)
    assert with_address(word, others * 16) == object_word(others * 16, 1234, flags << 1)


KINDS_OF_WORDS = st.one_of(
    st.sampled_from([0, FILL_ZERO, LOST]),
    st.integers(0, (1 << 63) - 1).map(lambda fill: fill << 1 | INLINE),
    st.builds(
        object_word,
        st.integers(1, 1 << 30).map(lambda unit: unit * 16),
        st.integers(1, 4096),
        st.sampled_from([0, SAME, HUGE, 1 << 3, 1 << 7]),
    ),
)


@given(st.lists(st.tuples(KINDS_OF_WORDS, st.integers(1, 9)), max_size=60))
def test_kinds_of_many_words_are_those_of_each(runs):
    words = [word for word, count in runs for _ in range(count)]
    told: list[Kind] = []
    for count, kind in kinds_of(struct.pack(f"<{len(words)}Q", *words)):
        told += [kind] * count
    assert told == list(map(kind_of, words))

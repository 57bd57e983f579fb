"""Pages of every kind a store meets, each from a few numbers, so that a failure can be repeated."""

import random
import struct
import zlib

from hypothesis import strategies as st

from zramd.store import PAGE

ZEROS = bytes(PAGE)
INLINE_EDGE = 1 << 62
"""Fills from -INLINE_EDGE + 1 to INLINE_EDGE - 1 fit a slot word; others need an object."""

WORDS = [
    *(1, 8, 255, 4096, (1 << 64) - 1, (1 << 64) - 2, 0x7F00_1234_5678_9AB0),
    *(INLINE_EDGE - 1, INLINE_EDGE, INLINE_EDGE + 1, (1 << 63) - 1, 1 << 63),
    *((1 << 64) - INLINE_EDGE + i for i in (-1, 0, 1)),
    0xDEAD_BEEF_DEAD_BEEF,
]
_TEXT = b"the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. "


def filled(word: int) -> bytes:
    """A page that repeats a 64-bit word."""
    return word.to_bytes(8, "little") * (PAGE // 8)


def noise(seed: int, length: int = PAGE) -> bytes:
    """Incompressible."""
    return random.Random(seed).randbytes(length)


def part_noise(seed: int, length: int) -> bytes:
    """Compresses to a bit more than `length`: the way to every size class and to their edges."""
    return noise(seed, length) + bytes(PAGE - length)


def text(seed: int) -> bytes:
    words = _TEXT.split()
    chosen = random.Random(seed).choices(words, k=PAGE // 2)
    return b" ".join(chosen)[:PAGE]


def pointers(seed: int) -> bytes:
    """Like the heap of a program: addresses near each other, with small numbers between."""
    numbers = random.Random(seed)
    base = 0x7F00_0000_0000 + numbers.randrange(1 << 30) * 16
    return struct.pack(
        f"<{PAGE // 8}Q",
        *(
            base + numbers.randrange(1 << 12) * 16 if i % 3 else numbers.randrange(100)
            for i in range(PAGE // 8)
        ),
    )


def periodic(seed: int, period: int) -> bytes:
    """Repeats `period` bytes: what compresses best and is not same-filled."""
    return (noise(seed, period) * (PAGE // period + 1))[:PAGE]


def almost_filled(word: int, at: int) -> bytes:
    """Same-filled but for one bit, in the byte `at`."""
    page = bytearray(filled(word))
    page[at] ^= 1
    return bytes(page)


_seeds = st.integers(0, 30)
_words = st.sampled_from(WORDS) | st.integers(0, (1 << 64) - 1)
pages = st.one_of(
    st.just(ZEROS),
    st.binary(min_size=1, max_size=1).map(lambda byte: byte * PAGE),
    _words.map(filled),
    st.builds(almost_filled, _words, st.integers(0, PAGE - 1)),
    _seeds.map(noise),
    st.builds(part_noise, _seeds, st.integers(1, PAGE - 1)),
    st.builds(part_noise, _seeds, st.integers(3780, 3880)),  # where huge begins
    st.builds(periodic, _seeds, st.integers(3, 80)),
    _seeds.map(text),
    _seeds.map(pointers),
)
"""One page."""


@st.composite
def pieces(draw: st.DrawFn, most: int = 24) -> bytes:
    """What a request writes: up to `most` pages, as often as not cut off inside a page."""
    kinds = draw(st.lists(pages, min_size=1, max_size=4))
    data = b"".join(kinds[i % len(kinds)] for i in range(draw(st.integers(1, most))))
    if draw(st.booleans()):
        return data
    first = draw(st.integers(0, PAGE))
    return data[first : draw(st.integers(first, len(data)))]


_TAG = struct.Struct("<8sQIII")


def tagged(slot: int, writer: int, number: int, generation: int = 0) -> bytes:
    """A page that says which slot it belongs to and who wrote it, of a kind `number` chooses."""
    tag = _TAG.pack(b"a page: ", slot, writer, number, generation)
    kind = number % 4
    if kind == 0:
        body = noise(zlib.crc32(tag), PAGE - len(tag))
    elif kind == 1:
        body = tag * (PAGE // len(tag))
    elif kind == 2:
        body = noise(zlib.crc32(tag), number * 37 % 3500).ljust(PAGE)
    else:
        body = text(zlib.crc32(tag))
    return (tag + body)[:PAGE]


def tag_of(page: bytes) -> tuple[int, int, int, int] | None:
    """(slot, writer, number, generation) of a tagged page, None for zeros; asserts it is whole."""
    if page == ZEROS:
        return None
    name, slot, writer, number, generation = _TAG.unpack_from(page)
    assert name == b"a page: ", f"no page of ours: {page[:64]!r}"
    assert page == tagged(slot, writer, number, generation), "a torn page"
    return slot, writer, number, generation

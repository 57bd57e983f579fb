"""The compressors: names, levels, round trips, and what damaged blobs do."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.store import contents
from zramd.errors import BadValue
from zramd.store import PAGE
from zramd.store.zcomp import FAILURES, NAMES, Algorithm, Comp

EDGES = [
    *("lz4", "lz4(level=1)", "lz4(level=2)", "lz4(level=65537)"),
    *("lz4hc", "lz4hc(level=1)", "lz4hc(level=12)"),
    *("zstd", "zstd(level=-7)", "zstd(level=-1)", "zstd(level=1)", "zstd(level=22)"),
    *("deflate", "deflate(level=1)", "deflate(level=9)"),
]
STREAMS = {text: Comp(Algorithm.parse(text)).stream() for text in EDGES}


def test_the_compressors_are_these_four():
    assert NAMES == ("lz4", "lz4hc", "zstd", "deflate")


@pytest.mark.parametrize("text", EDGES)
def test_an_algorithm_is_written_as_it_is_read(text):
    assert str(Algorithm.parse(text)) == text
    assert Algorithm.parse(str(Algorithm.parse(text))) == Algorithm.parse(text)


@pytest.mark.parametrize(
    ("text", "algorithm"),
    [
        (" lz4 ", Algorithm("lz4")),
        ("zstd (level = 3)", Algorithm("zstd", 3)),
        ("zstd(level=-3)\n", Algorithm("zstd", -3)),
    ],
)
def test_blanks_around_an_algorithm_do_not_matter(text, algorithm):
    assert Algorithm.parse(text) == algorithm


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "lzo", "LZ4", "lz4 zstd", "lz4()", "lz4(level=)", "lz4(level=x)", "zstd(3)"),
        *("lz4(level=0)", "lz4(level=65538)", "lz4(level=-1)", "lz4hc(level=0)", "lz4hc(level=13)"),
        *("zstd(level=0)", "zstd(level=-8)", "zstd(level=23)", "deflate(level=0)"),
        *("deflate(level=10)", "zstd(level=1.5)", "zstd(level=\u0663)", "zstd(level=3", "[lz4]"),
        *("zstd(level=" + "9" * 5000 + ")", "zstd(level=3)(level=4)", "zstd,level=3", "-", "lz4\0"),
    ],
)
def test_an_algorithm_that_does_not_exist_is_a_bad_value_with_a_hint(text):
    with pytest.raises(BadValue) as caught:
        Algorithm.parse(text)
    assert caught.value.hint


@pytest.mark.parametrize("text", EDGES)
@given(page=contents.pages)
def test_a_page_comes_back_from_its_blob(text, page):
    compress, decompress = STREAMS[text]
    for source in (page, bytearray(page), memoryview(bytearray(page))):
        blob = compress(source)
        if len(blob) < PAGE:  # a store keeps others raw
            assert decompress(bytes(blob), PAGE) == page


@pytest.mark.parametrize("text", EDGES)
def test_no_page_that_is_not_same_filled_packs_into_8_bytes(text):
    """The store tells 8-byte fills from compressed pages by their length."""
    compress, _ = STREAMS[text]
    pages = [
        *(contents.periodic(1, period) for period in [3, 5, 6, 7, *range(9, 70)]),
        *(contents.almost_filled(0, at) for at in (0, 1, 7, 8, 2048, 4088, 4095)),
        *(contents.almost_filled((1 << 64) - 1, at) for at in (0, 7, 4088, 4095)),
        *(bytes(n) + b"\1" * (PAGE - n) for n in range(8, PAGE, 256)),
    ]
    assert min(len(compress(page)) for page in pages) > 8


@pytest.mark.parametrize("text", EDGES)
@given(blob=st.binary(max_size=200), at=st.integers(0, 10_000), xor=st.integers(1, 255))
def test_a_damaged_blob_fails_in_a_known_way_or_gives_bytes(text, blob, at, xor):
    compress, decompress = STREAMS[text]
    damaged = bytearray(compress(contents.text(1)))
    damaged[at % len(damaged)] ^= xor
    for bad in (blob, bytes(damaged), bytes(damaged[: at % len(damaged)])):
        try:
            page = decompress(bad, PAGE)
        except FAILURES:
            continue
        assert isinstance(page, bytes)


@pytest.mark.parametrize("name", NAMES)
def test_a_blob_of_two_pages_does_not_come_back_as_one(name):
    compress, decompress = STREAMS[name]
    try:
        page = decompress(compress(bytes(2 * PAGE)), PAGE)
    except FAILURES:
        return
    assert len(page) != PAGE


def test_levels_reach_the_compressor():
    page = contents.pointers(1)

    def packed(text: str) -> int:
        return len(STREAMS[text][0](page))

    assert packed("zstd(level=22)") < packed("zstd(level=-7)")
    assert packed("deflate(level=9)") < packed("deflate(level=1)")
    assert packed("lz4hc(level=12)") <= packed("lz4hc(level=1)")
    assert packed("lz4(level=2)") < packed("lz4(level=65537)")
    assert packed("lz4(level=1)") == packed("lz4")


@pytest.mark.parametrize("name", NAMES)
def test_a_thread_keeps_its_stream_and_shares_it_with_no_other(name):
    comp = Comp(Algorithm(name))
    mine = comp.stream()
    assert comp.stream() is mine
    others = []
    thread = threading.Thread(target=lambda: others.append(comp.stream()))
    thread.start()
    thread.join()
    assert others[0] is not mine
    assert others[0][0] is not mine[0] or name == "lz4hc"


def test_a_comp_that_cannot_work_fails_when_it_is_made():
    with pytest.raises(BadValue):
        Comp(Algorithm("lzo"))

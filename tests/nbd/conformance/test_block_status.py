"""What BLOCK_STATUS says of a device, against a model of what was written to it."""

import random

import pytest

from tests.nbd.conformance.proto import (
    BLOCK_STATUS,
    EINVAL,
    EIO,
    EXTENDED,
    FUA,
    HOLE,
    MODES,
    READ,
    REQ_ONE,
    SIMPLE,
    STRUCTURED,
    TRIM,
    WRITE_ZEROES,
    ZERO,
    Peer,
    Request,
    write,
)
from zramd.store.table import LOST

PAGE = 4096
LONGEST = 32 << 20  # of a WRITE
CONTEXTS = ("base:allocation", "zramd:state")
ALLOCATION, STATE = 1, 2  # the ids they have here

NOISE = random.Random(1).randbytes(PAGE)
TEXT = (b"compressible text " * 300)[:PAGE]
KINDS = {
    # content of a page: (base:allocation, zramd:state)
    None: (HOLE | ZERO, 0),
    bytes(PAGE): (ZERO, 1),
    b"\x55" * PAGE: (0, 1),
    TEXT: (0, 2),
    NOISE: (0, 3),
}


def merged(runs):
    """[(length, flags)] with equal neighbours as one."""
    found = []
    for length, flags in runs:
        if found and found[-1][1] == flags:
            found[-1] = (found[-1][0] + length, flags)
        else:
            found.append((length, flags))
    return found


def model(pages, offset, length):
    """What is to be said of a range of a device with such pages, whole: {context: extents}."""
    end, runs = offset + length, []
    for index in range(offset // PAGE, -(-end // PAGE)):
        size = min(end, (index + 1) * PAGE) - max(offset, index * PAGE)
        runs.append((size, KINDS[pages[index] if index < len(pages) else None]))
    return {
        ALLOCATION: merged((size, kind[0]) for size, kind in runs),
        STATE: merged((size, kind[1]) for size, kind in runs),
    }


def written(export, pages):
    """Makes the device these pages, and all else holes."""
    with Peer(export.path).enter(SIMPLE) as peer:
        assert peer.do(Request(TRIM, 0, 1 << 20)) == 0
        for index, page in enumerate(pages):
            if page is not None:
                assert peer.do(write(SIMPLE, index * PAGE, page)) == 0


MOST_EXTENTS = 64
"""Of pages as they are stored, that one answer tells of; the contexts merge some."""
ORDERS = {
    "nothing": [],
    "one of each": list(KINDS),
    "each twice": [kind for kind in KINDS for _ in range(2)],
    "data, hole, data": [TEXT, None, NOISE],
    "all to the end": [TEXT] * 256,
    "anything": random.Random(2).choices(list(KINDS), k=MOST_EXTENTS),
    "long runs": sorted(random.Random(3).choices(list(KINDS), k=256), key=list(KINDS).index),
}
RANGES = [
    (0, 1),
    (0, PAGE),
    (1, PAGE),
    (PAGE - 1, 2),
    (PAGE, PAGE),
    (0, 2 * PAGE - 1),
    (3 * PAGE + 5, 6 * PAGE),
    (0, 1 << 20),
    (1, (1 << 20) - 1),
    ((1 << 20) - 1, 1),
]


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
@pytest.mark.parametrize("pages", ORDERS)
def test_the_extents_are_those_of_what_was_written(small, meet, manner, mode, pages):
    peer = meet(small).enter(mode, *CONTEXTS)
    pages = ORDERS[pages]
    written(small, pages)
    for flags in (0, FUA):
        asked = [Request(BLOCK_STATUS, *each, flags, cookie=n) for n, each in enumerate(RANGES)]
        if manner == "with trailing data":
            peer.ask(*asked)
            answers = dict(peer.answer() for _ in asked)
        else:
            answers = {request.cookie: peer.do(request) for request in asked}
        assert answers == {n: model(pages, *each) for n, each in enumerate(RANGES)}


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
def test_an_answer_ends_early_where_there_is_much_to_tell_and_the_next_goes_on(small, mode):
    pages = random.Random(4).choices(list(KINDS), k=256)
    written(small, pages)
    expected, told = model(pages, 0, 1 << 20), {ALLOCATION: [], STATE: []}
    at = 0
    with Peer(small.path).enter(mode, *CONTEXTS) as peer:
        while at < 1 << 20:
            answer = peer.do(Request(BLOCK_STATUS, at, (1 << 20) - at))
            sizes = {sum(size for size, _ in extents) for extents in answer.values()}
            assert len(sizes) == 1
            assert len(answer[STATE]) <= MOST_EXTENTS
            at += sizes.pop()
            assert at == 1 << 20 or len(answer[STATE]) > MOST_EXTENTS // 2
            for context, extents in answer.items():
                told[context] += extents
    assert {context: merged(extents) for context, extents in told.items()} == expected


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
@pytest.mark.parametrize("pages", ORDERS)
@pytest.mark.parametrize("flags", [REQ_ONE, REQ_ONE | FUA])
def test_req_one_gets_one_extent_and_no_more_than_it_asked_for(small, mode, pages, flags):
    pages = ORDERS[pages]
    written(small, pages)
    with Peer(small.path).enter(mode, *CONTEXTS) as peer:
        for offset, length in RANGES:
            first = {context: each[:1] for context, each in model(pages, offset, length).items()}
            told = peer.do(Request(BLOCK_STATUS, offset, length, flags))
            assert told[ALLOCATION] == first[ALLOCATION]
            # Ours ends with that of the other context, and so may be shorter than it could be.
            ((size, status),), ((most, expected),) = told[STATE], first[STATE]
            assert (status, min(size, most)) == (expected, size)


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
@pytest.mark.parametrize(
    ("contexts", "ids"),
    [(CONTEXTS[:1], {1}), (CONTEXTS[1:], {2}), (CONTEXTS, {1, 2}), (CONTEXTS[::-1], {1, 2})],
)
def test_each_context_that_was_selected_is_told_and_no_other(small, mode, contexts, ids):
    written(small, list(KINDS))
    expected = model(list(KINDS), 0, 1 << 20)
    with Peer(small.path).enter(mode, *contexts) as peer:
        answer = peer.do(Request(BLOCK_STATUS, 0, 1 << 20))
    assert answer == {context: expected[context] for context in ids}


@pytest.mark.parametrize("mode", MODES)
def test_without_a_context_there_is_no_status(small, mode):
    with Peer(small.path).enter(mode) as peer:
        assert peer.do(Request(BLOCK_STATUS, 0, PAGE)) == EINVAL


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
@pytest.mark.parametrize("command", [WRITE_ZEROES, TRIM])
def test_zeroes_and_trim_make_holes(small, mode, command):
    written(small, [TEXT] * 4)
    with Peer(small.path).enter(mode, *CONTEXTS) as peer:
        assert peer.do(Request(command, PAGE, 2 * PAGE)) == 0
        found = peer.do(Request(BLOCK_STATUS, 0, 5 * PAGE))
    assert found == model([TEXT, None, None, TEXT], 0, 5 * PAGE)


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
def test_what_is_said_to_be_zero_reads_as_zeros(small, mode):
    written(small, ORDERS["anything"])
    at = 0
    with Peer(small.path).enter(mode, CONTEXTS[0]) as peer:
        for length, flags in peer.do(Request(BLOCK_STATUS, 0, 1 << 20))[ALLOCATION]:
            ((_, content),) = peer.do(Request(READ, at, length))
            assert (content == length) is (flags & ZERO != 0)
            at += length
    assert at == 1 << 20


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
def test_terabytes_of_hole_are_one_extent_of_what_was_asked(vast, meet, mode):
    peer = meet(vast).enter(mode, *CONTEXTS)
    lengths = [2**32 - 1, 2**32 - PAGE, 2**31]
    if mode == EXTENDED:
        lengths += [2**32, 2**40, vast.size]
    for length in lengths:
        for offset in {0, vast.size - length}:
            answer = peer.do(Request(BLOCK_STATUS, offset, length))
            assert answer == {ALLOCATION: [(length, HOLE | ZERO)], STATE: [(length, 0)]}


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
def test_a_page_in_terabytes_is_found(vast, mode):
    length = 2**32 - PAGE if mode == STRUCTURED else vast.size
    before = length - 3 * PAGE
    with Peer(vast.path).enter(mode, CONTEXTS[0]) as peer:
        assert peer.do(write(mode, before, TEXT)) == 0
        found = peer.do(Request(BLOCK_STATUS, 0, length))[ALLOCATION]
        assert found == [(before, HOLE | ZERO), (PAGE, 0), (2 * PAGE, HOLE | ZERO)]
        assert peer.do(Request(TRIM, before, PAGE)) == 0


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
@pytest.mark.parametrize(
    "pages",
    [[b"\x55" * PAGE, bytes(PAGE)], [b"\x55" * PAGE]],
    ids=["too many extents", "too much to look at"],
)
def test_an_answer_may_end_early_and_goes_on_when_it_is_asked_again(vast, mode, pages):
    chunk = b"".join(pages) * (LONGEST // PAGE // len(pages))
    total = 3 * LONGEST
    kinds = [KINDS[page][0] for page in pages] * (total // PAGE // len(pages))
    with Peer(vast.path).enter(mode, CONTEXTS[0]) as peer:
        for at in range(0, total, LONGEST):
            assert peer.do(write(mode, at, chunk)) == 0
        at, replies, extents = 0, 0, []
        while at < total:
            (found,) = peer.do(Request(BLOCK_STATUS, at, total - at)).values()
            at += sum(length for length, _ in found)
            extents += found
            replies += 1
        assert merged(extents) == merged((PAGE, kind) for kind in kinds)
        assert replies > 1
        assert peer.do(Request(TRIM, 0, total)) == 0


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
def test_a_lost_page_is_data_that_cannot_be_read_until_it_is_written_again(serve, mode):
    export = serve(1 << 20)
    written(export, [TEXT, TEXT])
    export.zram._meta.arena.table[1] = LOST
    with Peer(export.path).enter(mode, *CONTEXTS) as peer:
        answer = peer.do(Request(BLOCK_STATUS, 0, 2 * PAGE))
        assert answer == {ALLOCATION: [(2 * PAGE, 0)], STATE: [(PAGE, 2), (PAGE, 4)]}
        assert peer.do(Request(READ, 0, 2 * PAGE)) == EIO
        assert peer.do(Request(READ, 0, PAGE)) == [(0, TEXT)]
        assert peer.do(write(mode, PAGE, TEXT)) == 0
        assert peer.do(Request(READ, 0, 2 * PAGE)) == [(0, TEXT + TEXT)]

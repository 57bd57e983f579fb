"""Two requests on one page in every order of their steps, which the GIL would rarely show.

By default the second of the two switches is tried at some places only, with
HYPOTHESIS_PROFILE=long at all.
"""

import os

import pytest

import zramd.store.arena
import zramd.store.compaction
import zramd.store.pages
import zramd.store.pool
from tests import interleave
from tests.store.audit import audit
from tests.store.contents import ZEROS, filled, noise, text
from zramd.errors import StoreFull
from zramd.store import PAGE
from zramd.store.arena import SPAN, Arena
from zramd.store.pages import Pages
from zramd.store.zcomp import Algorithm, Comp

STRIDE = 1 if os.environ.get("HYPOTHESIS_PROFILE") == "long" else 40
FILES = {zramd.store.arena.__file__, zramd.store.pages.__file__}

WRITE = {
    "write a fill": (lambda pages: pages.write(0, filled(7)), filled(7)),
    "write noise": (lambda pages: pages.write(0, noise(2)), noise(2)),
    "discard": (lambda pages: pages.discard(0, PAGE), ZEROS),
}
OLD = text(1)


def store(slots: int = 1) -> Pages:
    """A store on the explorer's locks."""
    arena = Arena(slots * PAGE, "lz4")
    pages = Pages(arena, Comp(Algorithm("lz4")))
    arena._lock, pages._count_lock, pages.pool._lock = (interleave.Lock() for _ in range(3))
    pages._compaction = interleave.Lock()
    pages._slot_locks = [interleave.Lock() for _ in pages._slot_locks]
    return pages


@pytest.mark.parametrize(
    ("one", "other"), [("write a fill", "discard"), ("write noise", "write a fill")]
)
def test_two_changes_of_a_page_leave_one_of_them_and_right_accounts(one, other):
    def make():
        pages = store()
        pages.write(0, OLD)

        def check() -> None:
            assert pages.read(0, PAGE) in (WRITE[one][1], WRITE[other][1])
            audit(pages)
            pages.close()

        return [lambda: WRITE[one][0](pages), lambda: WRITE[other][0](pages), check]

    assert interleave.explore(FILES, make, stride=STRIDE) > 30


@pytest.mark.parametrize("change", ["write noise", "discard"])
def test_a_read_sees_the_page_before_or_after_a_change(change):
    def make():
        pages = store()
        pages.write(0, OLD)
        write, new = WRITE[change]

        def read() -> None:
            assert pages.read(0, PAGE) in (OLD, new)

        return [read, lambda: write(pages), lambda: audit(pages), pages.close]

    assert interleave.explore(FILES, make, stride=STRIDE) > 30


def test_two_changes_of_parts_of_a_page_are_both_there_afterwards():
    def make():
        pages = store()

        def check() -> None:
            assert pages.read(0, PAGE) == b"a" * 100 + b"b" * (PAGE - 100)
            audit(pages)
            pages.close()

        return [
            lambda: pages.write(0, b"a" * 100),
            lambda: pages.write(100, b"b" * (PAGE - 100)),
            check,
        ]

    assert interleave.explore(FILES, make, stride=STRIDE) > 30


def test_two_that_take_and_give_objects_never_hold_the_same_one():
    """Both need what is left, a part more, and a new span of a class that has none."""

    def make():
        pages = store()
        pool = pages.pool
        kept = pool.take([PAGE] * 3)
        taken: dict[int, int] = {}

        def take(*lengths: int) -> None:
            for address, length in zip(pool.take(lengths), lengths, strict=True):
                assert address not in taken
                taken[address] = length

        def give_and_take() -> None:
            pool.give(kept[:1])
            take(PAGE, 100, PAGE, PAGE)

        def check() -> None:
            pool.check(taken | dict.fromkeys(kept[1:], PAGE))
            assert len(taken) == 7
            pages.close()

        return [lambda: take(PAGE, 100, PAGE), give_and_take, check]

    assert interleave.explore({zramd.store.pool.__file__}, make, stride=STRIDE) > 30


def test_an_object_taken_while_the_last_of_its_span_is_given_back_lies_in_a_span():
    def make():
        pages = store()
        kept = pages.pool.take([PAGE])
        taken: list[int] = []

        def check() -> None:
            pages.pool.check(dict.fromkeys(taken, PAGE))
            pages.close()

        return [
            lambda: pages.pool.give(kept),
            lambda: taken.extend(pages.pool.take([PAGE])),
            check,
        ]

    assert interleave.explore({zramd.store.pool.__file__}, make, stride=STRIDE) > 30


def test_two_that_charge_the_last_page_below_the_limit_do_not_both_get_it():
    def make():
        arena = Arena(PAGE, "lz4", limit=2 * PAGE)
        arena._lock = interleave.Lock()
        charged = []

        def occupy() -> None:
            try:
                arena.occupy(arena.spans_at, PAGE)
            except StoreFull:
                return
            charged.append(PAGE)

        def check() -> None:
            assert charged == [PAGE]
            assert arena.used == arena.used_max == 2 * PAGE
            arena.close()

        return [occupy, occupy, check]

    assert interleave.explore(FILES, make) > 50


def test_a_charge_and_a_giving_back_at_once_are_both_counted():
    def make():
        arena = Arena(PAGE, "lz4")
        arena._lock = interleave.Lock()
        arena.occupy(arena.spans_at, PAGE)

        def check() -> None:
            assert arena.used == 3 * PAGE
            arena.close()

        return [
            lambda: arena.occupy(arena.spans_at, 2 * PAGE),
            lambda: arena.vacate(arena.spans_at, PAGE),
            check,
        ]

    assert interleave.explore(FILES, make) > 50


# Compaction: the object of slot 0 is to move into the only hole of another span, and that frees its
# own. The rest of both spans is full or discarded, and changes nothing.


MOVES = {zramd.store.pages.__file__, zramd.store.compaction.__file__}
CHOICE = {zramd.store.pool.__file__}

BESIDE = {
    "read": (lambda pages: pages.read(0, PAGE), [noise(0)]),
    "write noise": (lambda pages: pages.write(0, noise(2)), [noise(2)]),
    "write a fill": (lambda pages: pages.write(0, filled(7)), [filled(7)]),
    "discard": (lambda pages: pages.discard(0, PAGE), [ZEROS]),
    "write a part": (
        lambda pages: pages.write(1, b"part"),
        [noise(0)[:1] + b"part" + noise(0)[5:]],
    ),
    "write another page": (lambda pages: pages.write(PAGE, noise(3)), [noise(0)]),
    "discard another page": (lambda pages: pages.discard(20 * PAGE, PAGE), [noise(0)]),
    "compact": (lambda pages: pages.compact(), [noise(0)]),
}


def sparse_store() -> Pages:
    pages = store(32)
    pages.write(0, b"".join(noise(slot) for slot in range(32)))
    pages.discard(PAGE, 15 * PAGE)
    pages.discard(31 * PAGE, PAGE)
    assert pages.pool.gain() == SPAN
    return pages


@pytest.mark.parametrize(
    ("beside", "limited", "files"),
    [
        *((name, True, MOVES) for name in BESIDE),
        *((name, True, CHOICE) for name in ("write noise", "discard")),
        ("write noise", False, MOVES),
    ],
)
def test_compaction_beside_any_request_moves_pages_and_changes_none(beside, limited, files):
    request, after = BESIDE[beside]
    seen = set()

    def make():
        pages = sparse_store()
        if limited:
            pages.arena.limit = pages.arena.used
        read = []

        def check() -> None:
            assert read[0] in (None, 1, noise(0))
            assert pages.read(0, PAGE) in after
            wrote = beside == "write another page"
            assert pages.read(PAGE, PAGE) == (noise(3) if wrote else ZEROS)
            for slot in range(16, 31):
                gone = slot == 20 and beside.startswith("discard another")
                assert pages.read(slot * PAGE, PAGE) == (ZEROS if gone else noise(slot))
            seen.add(audit(pages).compacted)
            pages.close()

        return [pages.compact, lambda: read.append(request(pages)), check]

    assert interleave.explore(files, make, stride=5 * STRIDE) > 30
    assert SPAN // PAGE in seen

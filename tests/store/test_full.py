"""A full store: who is refused, how cheaply, and until when (promise 5 of pages.py)."""

from collections.abc import Iterator

import pytest

from tests.store.audit import audit
from tests.store.contents import noise
from zramd.errors import StoreFull
from zramd.store import PAGE
from zramd.store.arena import Arena
from zramd.store.pages import FULL_SHARE, Pages
from zramd.store.zcomp import Algorithm, Comp

MIB = 1 << 20
LIMIT = 8 * MIB


def refused(pages: Pages, slot: int, content: bytes) -> bool:
    try:
        pages.write(slot * PAGE, content)
    except StoreFull:
        return True
    return False


@pytest.fixture
def full() -> Iterator[Pages]:
    """A store of raw pages that has just refused one more: its slots from `end` on are empty."""
    arena = Arena(64 * MIB, "lz4", limit=LIMIT, reserve=True)
    pages = Pages(arena, Comp(Algorithm("lz4")))
    slot = 0
    while not refused(pages, slot, noise(slot)):
        slot += 1
    assert slot * PAGE > LIMIT * 0.97
    yield pages
    audit(pages, snug=False)
    pages.close()


def end(pages: Pages) -> int:
    return pages.counters.pages


def test_new_pages_are_refused_before_they_are_compressed(full, monkeypatch):
    monkeypatch.setattr(full.comp, "stream", lambda: pytest.fail("compressed for nothing"))
    for slot in (end(full), end(full) + 5000):
        assert refused(full, slot, noise(slot) * 4)
        with pytest.raises(StoreFull):
            full.write(slot * PAGE + 100, b"x" * 100)


def test_a_write_over_stored_pages_and_new_ones_is_refused_whole(full):
    last = end(full) - 1
    assert refused(full, last, noise(7) + noise(8))
    assert full.read(last * PAGE, PAGE) == noise(last)


def test_stored_pages_can_be_written_over_where_there_is_an_object_to_spare(full):
    full.discard(0, PAGE)
    assert not refused(full, 1, noise(77))
    assert full.read(PAGE, PAGE) == noise(77)


def test_a_little_room_opens_it_not_again_and_a_64th_does(full):
    little = LIMIT // FULL_SHARE // PAGE // 2
    full.discard(0, little * PAGE)
    assert refused(full, end(full) + little, noise(1))
    full.discard(0, 3 * little * PAGE)
    assert not refused(full, 0, noise(1))
    assert full.read(0, PAGE) == noise(1)


def test_room_that_only_compaction_can_make_opens_it_too(full):
    """Pages discarded here and there empty no span."""
    used = full.arena.used
    for slot in range(0, end(full), 16):
        full.discard(slot * PAGE, PAGE)
    assert full.arena.used > used - used // FULL_SHARE
    assert not refused(full, 0, noise(1))


def test_one_write_that_is_too_large_does_not_close_it(full):
    full.discard(0, MIB)
    assert refused(full, end(full) + 1000, noise(1) * 1000)
    assert not refused(full, 0, noise(1))


def test_where_nothing_is_reserved_each_write_is_tried(monkeypatch):
    pages = Pages(Arena(64 * MIB, "lz4", limit=LIMIT), Comp(Algorithm("lz4")))
    slot = 0
    while not refused(pages, slot, noise(slot)):
        slot += 1
    tried = []
    stream = pages.comp.stream
    monkeypatch.setattr(pages.comp, "stream", lambda: tried.append(1) or stream())
    assert refused(pages, slot, noise(slot))
    assert tried
    pages.close()

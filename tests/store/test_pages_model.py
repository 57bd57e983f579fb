"""The store against a bytearray: any history of requests, limits and initialisations."""

import os

import pytest
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests.store import contents
from tests.store.audit import audit
from tests.store.model import Model, extents_agree
from zramd.errors import StoreFull
from zramd.store import PAGE
from zramd.store.arena import SPAN, Arena
from zramd.store.pages import Pages
from zramd.store.zcomp import Algorithm, Comp

SLOTS = 2 * 512 + 37
"""Three table pages, the last one short."""
SIZE = SLOTS * PAGE

ALGORITHMS = ["lz4", "lz4(level=9)", "lz4hc", "zstd", "zstd(level=-7)", "zstd(level=12)", "deflate"]

offsets = st.one_of(
    st.integers(0, 6 * PAGE),
    st.integers(511 * PAGE - 9, 514 * PAGE),  # where the first table page ends
    st.integers(SIZE - 5 * PAGE, SIZE),
    st.integers(0, 12).map(lambda slot: slot * PAGE),
    st.integers(505, 518).map(lambda slot: slot * PAGE),
    st.integers(0, SIZE),
)
lengths = st.one_of(
    st.integers(0, 2 * PAGE),
    st.integers(0, 20).map(lambda pages: pages * PAGE),
    st.integers(0, 40 * PAGE),
    st.integers(0, SIZE),
)
limits = st.one_of(
    st.just(0),
    st.integers(1, 6).map(lambda spans: 3 * PAGE + spans * SPAN),
    st.integers(1, 100).map(lambda pages: pages * PAGE),
)


class StoreAgainstBytearray(RuleBasedStateMachine):
    """Every step ends with the whole content compared and every account audited."""

    @initialize(algorithm=st.sampled_from(ALGORITHMS), limit=limits)
    def begin(self, algorithm: str, limit: int) -> None:
        arena = Arena(SIZE, algorithm, limit=limit)
        self.pages = Pages(arena, Comp(Algorithm.parse(algorithm)))
        self.model = Model(SIZE)
        self.ceiling = limit
        """What `used` may not pass: the limit, or what was used when that was set lower."""
        self.huge_since = 0
        self.snug = not limit

    def used(self) -> int:
        return self.pages.arena.used

    def refused(self, used: int, pages: int) -> None:
        """A refusal was just: so many more pages could have needed more than there was."""
        event("refused")
        limit = self.pages.arena.limit
        assert limit
        assert used + pages * (SPAN + PAGE) + PAGE > limit

    @rule(offset=offsets, data=contents.pieces())
    def write(self, offset: int, data: bytes) -> None:
        data = data[: max(0, SIZE - offset)]
        used = self.used()
        try:
            self.pages.write(offset, data)
        except StoreFull:
            self.refused(used, len(data) // PAGE + 2)
            self.model.write_failed(offset, data, self.pages.read(offset, len(data)))
        else:
            self.model.write(offset, data)

    @rule(offset=offsets, data=contents.pieces(), kind=st.sampled_from([bytearray, memoryview]))
    def write_from_a_buffer_that_is_used_again(self, offset: int, data: bytes, kind: type) -> None:
        buffer = bytearray(data[: SIZE - offset])
        data = bytes(buffer)
        try:
            self.pages.write(offset, kind(buffer))
        except StoreFull:
            now = self.pages.read(offset, len(buffer))
            self.model.write_failed(offset, data, now)
        else:
            self.model.write(offset, data)
        buffer[:] = b"\xee" * len(buffer)

    @rule(offset=offsets, length=lengths)
    def read(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        assert self.pages.read(offset, length) == self.model.content[offset : offset + length]

    @rule(offset=offsets, length=lengths)
    def discard(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        assert self.pages.discard(offset, length) == self.model.discard(offset, length)

    @rule(offset=offsets, length=lengths)
    def zero(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        used = self.used()
        try:
            self.pages.zero(offset, length)
        except StoreFull:
            self.refused(used, 2)
            self.model.zero_failed(offset, length, self.pages.read(offset, length))
        else:
            self.model.zero(offset, length)

    @rule(offset=offsets, length=lengths)
    def extents(self, offset: int, length: int) -> None:
        length = min(length, SIZE - offset)
        content = self.model.content[offset : offset + length]
        extents_agree(content, list(self.pages.extents(offset, length)))

    @rule()
    def compact(self) -> None:
        used, gain = self.used(), self.pages.pool.gain()
        compacted = self.pages.counters.compacted
        self.pages.compact()
        assert self.used() == used - gain
        assert self.pages.counters.compacted == compacted + gain // PAGE
        assert self.pages.pool.gain() == 0

    @rule(offset=offsets, length=lengths, step=st.integers(2, 20))
    def discard_here_and_there(self, offset: int, length: int, step: int) -> None:
        for at in range(offset, min(offset + length, SIZE), step * PAGE):
            self.discard(at, PAGE)

    @rule(limit=limits)
    def change_the_limit(self, limit: int) -> None:
        self.snug = self.snug and not limit
        self.pages.arena.limit = limit
        self.ceiling = limit and max(limit, self.used())

    @rule()
    def limit_to_what_is_used(self) -> None:
        self.change_the_limit(self.used())

    @rule(room=st.integers(1, 20))
    def limit_to_little_more(self, room: int) -> None:
        self.change_the_limit(self.used() + room * PAGE)

    @rule()
    def forget_the_peak(self) -> None:
        self.pages.arena.forget_used_max()
        assert self.pages.arena.used_max == self.used()

    @rule(offset=offsets, seed=st.integers(0, 30))
    def write_a_lot(self, offset: int, seed: int) -> None:
        self.write(offset, contents.noise(seed) * 40)

    @rule(
        which=st.integers(0, 100),
        at=st.integers(0, PAGE - 1),
        data=contents.pages,
        length=st.integers(1, PAGE),
        full=st.booleans(),
    )
    def change_a_part_of_a_stored_page(
        self, which: int, at: int, data: bytes, length: int, full: bool
    ) -> None:
        stored = list(self.pages.extents(0, SIZE))
        ends = [sum(size for size, _ in stored[: i + 1]) for i in range(len(stored))]
        last_pages = [end - PAGE for end, (_, kind) in zip(ends, stored, strict=True) if kind]
        if not last_pages:
            return
        if full:
            self.limit_to_what_is_used()
        offset = last_pages[which % len(last_pages)] + at
        length = min(length, PAGE - at)
        if which % 2:
            self.zero(offset, length)
        else:
            self.write(offset, data[:length])

    @rule(sure=st.sampled_from([False, False, False, True]))
    def discard_all(self, sure: bool) -> None:
        if not sure:
            return
        map_pages = sum(self.pages.arena.map_pages.occupied)
        self.discard(0, SIZE)
        assert self.used() == PAGE + map_pages * PAGE

    @rule(algorithm=st.sampled_from(ALGORITHMS), limit=limits)
    def begin_again(self, algorithm: str, limit: int) -> None:
        fd = self.pages.arena.fd
        self.pages.close()
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        self.begin(algorithm, limit)

    @invariant()
    def content_is_as_the_model_says(self) -> None:
        assert self.pages.read(0, SIZE) == self.model.content

    @invariant()
    def accounts_are_right(self) -> None:
        counters = audit(self.pages, snug=self.snug)
        assert counters.huge_since >= max(self.huge_since, counters.huge)
        if self.ceiling:
            assert self.used() <= self.ceiling
            self.ceiling = max(self.pages.arena.limit, self.used())

    def teardown(self) -> None:
        if hasattr(self, "pages"):
            self.pages.close()


TestStoreAgainstBytearray = StoreAgainstBytearray.TestCase

"""Reading, writing and discarding pages: each kind, each size, each failure, and many threads."""

import sys
import threading
from collections.abc import Callable, Iterator

import pytest

from tests.store import contents
from tests.store.audit import audit
from tests.store.contents import ZEROS, filled, noise, part_noise, tag_of, tagged, text
from zramd.errors import Corrupt, StoreFull
from zramd.store import PAGE, table
from zramd.store.arena import SPAN, Arena
from zramd.store.pages import HUGE_LENGTH, Counters, Pages
from zramd.store.pool import CLASSES, PART
from zramd.store.table import Kind
from zramd.store.zcomp import NAMES, Algorithm, Comp

SLOTS = 1200


@pytest.fixture
def make() -> Iterator[Callable[..., Pages]]:
    made = []

    def make(algorithm: str = "lz4", *, limit: int = 0, slots: int = SLOTS) -> Pages:
        arena = Arena(slots * PAGE, algorithm, limit=limit)
        made.append(Pages(arena, Comp(Algorithm.parse(algorithm))))
        return made[-1]

    yield make
    for pages in made:
        pages.close()


@pytest.fixture
def pages(make) -> Pages:
    return make()


class Codec:
    """In place of a Comp: blobs of any length asked for, and hooks in the middle of work."""

    at_once = 1 << 30

    def __init__(self) -> None:
        self.length = 100
        self.kept: dict[bytes, bytes] = {}
        self.hook: Callable[[], None] = lambda: None
        self.hook_of_reads: Callable[[], None] = lambda: None

    def close(self) -> None:
        self.kept.clear()

    def stream(self):
        return self.compress, self.decompress

    def compress(self, page) -> bytes:
        self.hook()
        blob = len(self.kept).to_bytes(4, "little").ljust(self.length, b"b")[: self.length]
        self.kept[blob] = bytes(page)
        return blob

    def decompress(self, blob: bytes, size: int) -> bytes:
        self.hook_of_reads()
        return self.kept[blob]


def word(pages: Pages, slot: int) -> int:
    return pages.arena.table[slot]


# One page of each kind


def test_a_page_never_written_reads_as_zeros_and_costs_nothing(pages):
    assert pages.read(0, SLOTS * PAGE) == bytes(SLOTS * PAGE)
    assert pages.arena.used == pages.arena.resident() == PAGE
    assert audit(pages) == Counters()


@pytest.mark.parametrize("fill", [*contents.WORDS, 0])
def test_a_repeated_word_takes_no_object_where_it_fits_63_bits_and_8_bytes_otherwise(pages, fill):
    pages.write(7 * PAGE, filled(fill))
    assert pages.read(7 * PAGE, PAGE) == filled(fill)
    signed = fill - (1 << 64) if fill >> 63 else fill
    is_inline = -contents.INLINE_EDGE < signed < contents.INLINE_EDGE
    assert audit(pages) == Counters(pages=1, same=1, compressed_bytes=0 if is_inline else 8)
    assert bool(pages.pool.spans) != is_inline
    assert bool(word(pages, 7) & table.INLINE) == is_inline


@pytest.mark.parametrize("at", [0, 1, 7, 8, 15, 2047, 4080, 4087, 4088, 4095])
def test_a_page_that_is_same_filled_but_for_one_bit_is_not_same_filled(pages, at):
    page = contents.almost_filled(0x1122334455667788, at)
    pages.write(0, page)
    assert pages.read(0, PAGE) == page
    assert audit(pages).same == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", [contents.text, contents.pointers, contents.noise])
def test_a_page_comes_back_with_every_compressor(make, name, kind):
    pages = make(name)
    pages.write(0, kind(1) + kind(2))
    assert pages.read(0, 2 * PAGE) == kind(1) + kind(2)
    counters = audit(pages)
    assert counters.huge == counters.huge_since == (2 if kind is contents.noise else 0)
    assert counters.pages == 2


@pytest.mark.parametrize("size", CLASSES)
def test_blobs_around_the_edge_of_each_class_land_in_the_smallest_class_that_holds_them(
    pages, size
):
    pages.comp = codec = Codec()
    for slot, length in enumerate((size - 1, size, size + 1)):
        if length == 8:
            continue
        codec.length = length
        pages.write(slot * PAGE, part_noise(slot, 50))
        stored = table.length_of(word(pages, slot))
        assert stored == (length if length < HUGE_LENGTH else PAGE)
        assert pages.read(slot * PAGE, PAGE) == part_noise(slot, 50)
    audit(pages)


@pytest.mark.parametrize("length", [HUGE_LENGTH - 1, HUGE_LENGTH, PAGE - 1, PAGE, PAGE + 1, 9999])
def test_from_huge_length_on_a_page_is_stored_raw(pages, length):
    pages.comp = codec = Codec()
    codec.length = length
    pages.write(0, noise(1))
    is_huge = length > 3840
    assert bool(word(pages, 0) & table.HUGE) == is_huge
    address = table.address_of(word(pages, 0))
    assert (pages.arena.map[address : address + PAGE] == noise(1)) == is_huge
    assert pages.read(0, PAGE) == noise(1)
    assert audit(pages) == Counters(
        pages=1, compressed_bytes=PAGE if is_huge else length, huge=is_huge, huge_since=is_huge
    )


def test_huge_pages_ever_never_fall(pages):
    for _ in range(3):
        pages.write(0, noise(1))
    pages.discard(0, PAGE)
    assert audit(pages) == Counters(huge_since=3)


def test_overwriting_every_kind_by_every_kind_leaves_only_the_last(pages):
    kinds = [ZEROS, filled(5), filled(1 << 63), noise(1), contents.text(1), part_noise(1, 3000)]
    for old in kinds:
        for new in kinds:
            pages.write(0, old)
            pages.write(0, new)
            assert pages.read(0, PAGE) == new
            assert audit(pages).pages == 1
    pages.discard(0, PAGE)
    assert pages.arena.used == pages.arena.resident() == 2 * PAGE


# Ranges


@pytest.mark.parametrize("offset", [0, 1, 100, 4095, 4096, 511 * PAGE, 511 * PAGE + 5, 512 * PAGE])
@pytest.mark.parametrize("length", [0, 1, 50, 4095, 4096, 4097, 8192, 3 * PAGE - 5, 2 * PAGE + 1])
def test_any_offset_and_length_changes_its_bytes_and_no_others(pages, offset, length):
    around = noise(5) * 6
    start = offset // PAGE * PAGE
    pages.write(start, around)
    data = contents.text(3) * 3
    pages.write(offset, data[:length])
    expected = bytearray(around)
    at = offset - start
    expected[at : at + length] = data[:length]
    assert pages.read(start, len(around)) == expected
    assert pages.read(offset, length) == data[:length]
    audit(pages)
    pages.zero(offset, length)
    expected[at : at + length] = bytes(length)
    assert pages.read(start, len(around)) == expected
    audit(pages)


def test_the_last_byte_of_the_device_can_be_written_and_read(pages):
    pages.write(SLOTS * PAGE - 1, b"x")
    assert pages.read(SLOTS * PAGE - 2, 2) == b"\0x"
    assert pages.read(SLOTS * PAGE, 0) == b""
    audit(pages)


def test_discard_leaves_alone_what_is_not_a_whole_page(pages):
    pages.write(0, noise(1) * 4)
    assert pages.discard(1, 3 * PAGE) == 2
    assert pages.read(0, 4 * PAGE) == noise(1) + ZEROS * 2 + noise(1)
    assert pages.discard(100, 50) == 0
    assert pages.discard(100, PAGE) == 0
    assert pages.discard(0, 0) == 0
    assert audit(pages).pages == 2


def test_discard_counts_slots_that_were_empty_too(pages):
    assert pages.discard(0, SLOTS * PAGE) == SLOTS
    assert pages.arena.resident() == PAGE


def test_zero_of_a_hole_stores_nothing(pages):
    assert pages.zero(100, 3 * PAGE) == 2
    assert pages.zero(100, 50) == 0
    assert pages.arena.used == pages.arena.resident() == PAGE


def test_discard_and_reads_of_an_empty_device_look_only_at_what_is_stored(make, monkeypatch):
    pages = make(slots=(1 << 40) // PAGE)  # 1 TiB: by the slot this would take minutes
    pages.write(5 << 30, noise(1))
    looked = []
    lock = Pages._slot_lock
    monkeypatch.setattr(
        Pages, "_slot_lock", lambda self, slot: looked.append(slot) or lock(self, slot)
    )
    assert list(pages.extents(0, 1 << 40)) == [
        (5 << 30, Kind.HOLE),
        (PAGE, Kind.HUGE),
        ((1 << 40) - (5 << 30) - PAGE, Kind.HOLE),
    ]
    assert pages.discard(0, 1 << 40) == 1 << 28
    assert len(looked) == 2
    assert audit_of_used(pages) == 1


def audit_of_used(pages: Pages) -> int:
    """Pages of the span map in use, when there is nothing else but the header."""
    assert pages.arena.resident() == pages.arena.used
    return pages.arena.used // PAGE - 1


def test_extents_tell_how_each_page_is_stored(pages):
    sames = b"8 bytes." * (PAGE // 8) + b"\1" * PAGE  # as an object, and in the word
    pages.write(3 * PAGE, noise(1) + ZEROS + sames + text(2) + noise(3) + noise(4))
    assert list(pages.extents(0, 12 * PAGE)) == [
        (3 * PAGE, Kind.HOLE),
        (PAGE, Kind.HUGE),
        (PAGE, Kind.ZERO),
        (2 * PAGE, Kind.SAME),
        (PAGE, Kind.COMPRESSED),
        (2 * PAGE, Kind.HUGE),
        (2 * PAGE, Kind.HOLE),
    ]
    pages.discard(4 * PAGE, PAGE)
    assert list(pages.extents(3 * PAGE + 10, 2 * PAGE)) == [
        (PAGE - 10, Kind.HUGE),
        (PAGE, Kind.HOLE),
        (10, Kind.SAME),
    ]
    assert list(pages.extents(100, 0)) == []
    assert list(pages.extents(SLOTS * PAGE - 1, 1)) == [(1, Kind.HOLE)]


def test_extents_end_when_enough_that_is_stored_was_looked_at(make, monkeypatch):
    monkeypatch.setattr("zramd.store.pages.EXTENTS_LOOK", 4 << 20)  # two table pages
    pages = make(slots=(1 << 40) // PAGE)
    for offset in (0, 1 << 30, 1 << 39):
        pages.write(offset, noise(1))
    seen = list(pages.extents(0, 1 << 40))
    assert [kind for _, kind in seen] == [Kind.HUGE, Kind.HOLE] * 2
    assert sum(size for size, _ in seen) == 1 << 39
    assert next(pages.extents(1 << 39, 1 << 39)) == (PAGE, Kind.HUGE)


# Failures


def test_a_write_that_hits_the_limit_keeps_the_old_page_and_leaks_nothing(make):
    pages = make(limit=3 * PAGE + SPAN)
    pages.write(0, noise(1) * 16)
    for data in (contents.text(1), noise(2) * 3, filled(1 << 63), noise(2)):
        before = pages.arena.used
        with pytest.raises(StoreFull):
            pages.write(0, data)
        assert pages.arena.used == before
        assert pages.read(0, 16 * PAGE) == noise(1) * 16
        assert audit(pages).pages == 16
    pages.write(PAGE, filled(1234))  # an inline fill needs no memory but its table page's
    pages.discard(0, 16 * PAGE)
    pages.write(0, noise(3) * 16)
    assert pages.arena.used == pages.arena.limit


def test_a_refused_table_page_gives_back_the_objects_that_were_taken(make):
    pages = make(limit=3 * PAGE + PART)
    pages.write(0, noise(1))
    used = pages.arena.used
    with pytest.raises(StoreFull):
        pages.write(512 * PAGE, noise(2) * 3)
    with pytest.raises(StoreFull):
        pages.write(512 * PAGE + 1, b"x")
    with pytest.raises(StoreFull):
        pages.write(512 * PAGE, ZEROS)
    assert pages.arena.used == used
    assert audit(pages).pages == 1


def test_a_write_across_2_mib_that_fails_leaves_its_first_part(make):
    pages = make(limit=3 * PAGE + PART)
    with pytest.raises(StoreFull):
        pages.write(510 * PAGE, noise(1) * 4)
    assert pages.read(510 * PAGE, 4 * PAGE) == noise(1) * 2 + ZEROS * 2
    assert audit(pages).pages == 2


def test_an_unaligned_write_that_fails_leaves_its_first_parts(make):
    pages = make(limit=3 * PAGE + SPAN)
    pages.write(0, noise(1) * 14)
    before = pages.read(PAGE, 16 * PAGE)
    data = noise(2)[100:] + noise(2) * 14 + noise(2)[:100]
    with pytest.raises(StoreFull):
        pages.write(PAGE + 100, data)
    head = PAGE - 100
    assert pages.read(PAGE, 16 * PAGE) == before[:100] + data[:head] + before[PAGE:]
    audit(pages)


def test_a_zero_that_fails_at_its_edge_has_emptied_the_whole_pages(make):
    pages = make()
    # The whole pages free no object that could serve for the edges.
    pages.write(0, noise(1) + filled(5) * 2 + noise(1) * 3)
    pages.arena.limit = pages.arena.used
    with pytest.raises(StoreFull):
        pages.zero(100, 3 * PAGE)
    assert pages.read(0, 6 * PAGE) == noise(1) + ZEROS * 2 + noise(1) * 3
    audit(pages)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("offset", [0, 10])
def test_a_compressor_that_raises_changes_nothing_and_holds_no_lock(pages, error, offset):
    def fail():
        raise error

    pages.write(0, noise(1) * 2)
    good, pages.comp = pages.comp, Codec()
    pages.comp.hook = fail
    pages.comp.decompress = good.stream()[1]
    with pytest.raises(error):
        pages.write(offset, contents.text(1))
    pages.comp = good
    assert pages.read(0, 2 * PAGE) == noise(1) * 2
    assert audit(pages).pages == 2


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damage", [b"", b"\0", b"\xff" * 40, b"\xe0" + b"\0" * 7 + b"\1"])
def test_a_damaged_object_is_corrupt_and_names_its_page(make, name, damage):
    pages = make(name)
    pages.write(512 * PAGE, contents.text(1) + contents.text(2) + contents.text(3))
    address = table.address_of(word(pages, 513))
    length = table.length_of(word(pages, 513))
    pages.arena.map[address : address + length] = damage[:length].ljust(length, b"\xff")
    with pytest.raises(Corrupt, match="page 513 "):
        pages.read(0, SLOTS * PAGE)
    with pytest.raises(Corrupt, match="page 513 "):
        pages.write(513 * PAGE + 5, b"x")
    with pytest.raises(Corrupt):
        pages.zero(513 * PAGE + 5, 10)
    assert pages.read(512 * PAGE, PAGE) == contents.text(1)
    assert pages.read(514 * PAGE, PAGE) == contents.text(3)
    pages.write(513 * PAGE, contents.text(4))
    assert pages.read(513 * PAGE, PAGE) == contents.text(4)
    audit(pages)


@pytest.mark.parametrize("size", [0, PAGE - 1, PAGE + 1, 2 * PAGE])
def test_a_blob_that_decompresses_to_another_length_is_corrupt(pages, size):
    pages.comp = codec = Codec()
    pages.write(0, contents.text(1))
    codec.kept = dict.fromkeys(codec.kept, bytes(size))
    with pytest.raises(Corrupt, match=f"{size} bytes"):
        pages.read(0, PAGE)


def test_recount_finds_two_slots_that_share_an_object(pages):
    pages.write(0, noise(1))
    pages.arena.table[1] = word(pages, 0)
    with pytest.raises(Corrupt, match="share"):
        pages.recount()
    pages.arena.table[1] = 0


# Many threads


def run_all(*jobs: Callable[[], None]) -> None:
    """Run these at once, switching often, and raise what any of them raised."""
    start = threading.Barrier(len(jobs))
    failures: list[BaseException] = []

    def run(job: Callable[[], None]) -> None:
        start.wait()
        try:
            job()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(job,)) for job in jobs]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if failures:
        raise failures[0]


@pytest.mark.parametrize(
    ("algorithm", "limit"), [("lz4", 0), ("zstd", 0), ("lz4", 6 * PAGE + 3 * SPAN)]
)
def test_threads_on_overlapping_ranges_see_only_pages_that_were_written(make, algorithm, limit):
    pages = make(algorithm, limit=limit)
    first, span = 490, 44  # across the end of a table page
    written = [0] * 4

    def checked(slot: int, data: bytes) -> None:
        for i in range(len(data) // PAGE):
            tag = tag_of(data[i * PAGE : (i + 1) * PAGE])
            if tag:
                assert tag[0] == slot + i
                assert tag[2] <= written[tag[1]], "a page nobody has written yet"

    def work(writer: int) -> None:
        for number in range(1, 250):
            slot = first + (number * 7 + writer * 11) % span
            count = min(1 + number % 5, first + span - slot)
            written[writer] = number
            if number % 6 == 0:
                pages.discard(slot * PAGE, count * PAGE)
            elif number % 11 == 0:
                pages.zero(slot * PAGE, count * PAGE)
            else:
                data = b"".join(tagged(slot + i, writer, number) for i in range(count))
                try:
                    pages.write(slot * PAGE, data)
                except StoreFull:
                    assert limit
            checked(slot, pages.read(slot * PAGE, count * PAGE))

    def look() -> None:
        for _ in range(150):
            now = pages.snapshot()
            assert now.pages >= 0
            assert now.compressed_bytes >= 0
            assert sum(size for size, _ in pages.extents(0, SLOTS * PAGE)) == SLOTS * PAGE
            assert not limit or pages.arena.used_max <= limit
            checked(first, pages.read(first * PAGE, span * PAGE))

    run_all(*(lambda writer=writer: work(writer) for writer in range(4)), look)
    audit(pages, snug=not limit)
    checked(first, pages.read(first * PAGE, span * PAGE))
    pages.discard(0, SLOTS * PAGE)
    assert audit_of_used(pages) == 1


@pytest.mark.parametrize("back", [False, True])
def test_a_write_of_a_part_sees_what_another_has_written_meanwhile(pages, back):
    """Also where the word is what it was: an object of the same length, at the same address."""
    pages.comp = codec = Codec()
    pages.write(0, text(1))
    before = word(pages, 0)

    def overtake() -> None:
        codec.hook = lambda: None
        if back:
            pages.discard(0, PAGE)
            pages.write(0, text(2))
            assert word(pages, 0) == before
        else:
            pages.write(100, b"theirs")

    codec.hook = overtake
    pages.write(0, b"ours")
    expected = text(2) if back else text(1)[:100] + b"theirs" + text(1)[106:]
    assert pages.read(0, PAGE) == b"ours" + expected[4:]
    audit(pages)


def test_threads_on_parts_of_the_same_pages_lose_no_update(pages):
    part = PAGE // 4

    def work(owner: int) -> None:
        for number in range(120):
            at = 511 * PAGE + number % 3 * PAGE + owner * part
            mine = bytes([owner + 1, number]) * (part // 2)
            if number % 5 == 4:
                pages.zero(at, part)
                mine = bytes(part)
            else:
                pages.write(at, mine)
            assert pages.read(at, part) == mine

    run_all(*(lambda owner=owner: work(owner) for owner in range(4)))
    for number in (117, 118, 119):
        for owner in range(4):
            mine = bytes(part) if number % 5 == 4 else bytes([owner + 1, number]) * (part // 2)
            assert pages.read(511 * PAGE + number % 3 * PAGE + owner * part, part) == mine
    audit(pages)


def test_a_table_page_that_threads_empty_and_fill_is_accounted_exactly(pages):
    def work(slot: int) -> None:
        for number in range(300):
            pages.write(slot * PAGE, filled(number))
            assert pages.read(slot * PAGE, PAGE) == filled(number)
            pages.discard(slot * PAGE, PAGE)
            assert pages.read(slot * PAGE, PAGE) == ZEROS

    run_all(*(lambda slot=slot: work(slot) for slot in range(4)))
    assert audit(pages) == Counters()
    assert pages.arena.used == pages.arena.resident() == PAGE


# Threads that meet at a chosen point


def test_a_write_that_is_compressing_holds_up_nobody_and_wins_when_it_ends_last(pages):
    pages.write(0, noise(1))
    pages.comp = codec = Codec()

    def meanwhile() -> None:
        codec.hook = lambda: None
        assert pages.read(0, PAGE) == noise(1)
        pages.write(0, contents.text(2))
        assert pages.read(0, PAGE) == contents.text(2)
        pages.discard(0, PAGE)
        assert pages.read(0, PAGE) == ZEROS
        pages.write(0, filled(7))

    codec.hook = meanwhile
    pages.write(0, contents.text(3))
    assert pages.read(0, PAGE) == contents.text(3)
    assert audit(pages).pages == 1


def test_a_page_discarded_before_its_write_was_counted_never_shows_below_zero(pages, monkeypatch):
    seen = []
    settle = Pages._settle_page

    def slow_settle(self, old, new):
        monkeypatch.setattr(Pages, "_settle_page", settle)
        self.discard(0, PAGE)
        seen.append(self.snapshot())
        settle(self, old, new)

    monkeypatch.setattr(Pages, "_settle_page", slow_settle)
    pages.write(0, noise(1))
    assert seen == [Counters()]
    assert audit(pages) == Counters(huge_since=1)


def test_an_object_is_given_back_only_when_no_slot_names_it(pages, monkeypatch):
    give = pages.pool.give

    def checked_give(addresses):
        named = {table.address_of(word) for word in pages.arena.table[:8] if not word & 1}
        assert not named & set(addresses)
        give(addresses)

    monkeypatch.setattr(pages.pool, "give", checked_give)
    for number in range(3):
        pages.write(0, noise(number) * 8)
        pages.write(100, noise(number))
        pages.zero(100, 2 * PAGE)
        pages.discard(0, 5 * PAGE)
    audit(pages)


@pytest.mark.parametrize("count", [1, 3])
def test_an_object_is_filled_before_a_slot_names_it(pages, monkeypatch, count):
    swapped = []

    def check(words: list[int]) -> None:
        for word in words:
            address, length = table.address_of(word), table.length_of(word)
            assert pages.arena.map[address : address + length] == noise(1)
            swapped.append(word)

    swap, swap_page = Pages._swap_locked, Pages._swap_page_locked
    monkeypatch.setattr(
        Pages, "_swap_locked", lambda self, at, words: (check(words), swap(self, at, words))[1]
    )
    monkeypatch.setattr(
        Pages,
        "_swap_page_locked",
        lambda self, at, word: (check([word]), swap_page(self, at, word))[1],
    )
    pages.write(0, noise(1) * count)
    assert len(swapped) == count


# A page that comes alone goes another way than several

KINDS = {"zeros": ZEROS, "same": filled(7), "long fill": filled(1 << 63 | 5), "huge": noise(1)}
KINDS |= {"compressed": text(1), "empty": None}


@pytest.mark.parametrize("new", KINDS)
@pytest.mark.parametrize("old", KINDS)
def test_a_page_alone_is_stored_and_counted_as_among_others(make, old, new):
    def counted(first: int, count: int) -> Counters:
        pages = make(slots=4)
        for kind in (old, new):
            page = KINDS[kind]
            if page is None:
                pages.discard(PAGE, PAGE)
            else:
                pages.write(first * PAGE, ZEROS * (1 - first) + page + ZEROS * (count - 1))
        assert pages.read(PAGE, PAGE) == (KINDS[new] or ZEROS)
        if count > 1:
            pages.discard(0, PAGE)
            pages.discard(2 * PAGE, 2 * PAGE)
        return audit(pages)

    assert counted(1, 1) == counted(0, 2)


def test_a_page_alone_that_finds_no_room_leaves_the_old_one_and_with_nowait_does_not_look(make):
    pages = make(limit=3 * PAGE + PART, slots=8)
    pages.write(0, noise(1) * 4)
    before = pages.snapshot()
    with pytest.raises(BlockingIOError):
        pages.write(0, noise(2), nowait=True)
    with pytest.raises(StoreFull):
        pages.write(0, noise(2))
    assert pages.read(0, 4 * PAGE) == noise(1) * 4
    assert audit(pages) == before
    pages.discard(3 * PAGE, PAGE)
    pages.write(0, noise(2), nowait=True)
    assert pages.read(0, PAGE) == noise(2)


@pytest.mark.parametrize("slot", [0, 512])
def test_a_page_alone_whose_table_page_finds_no_room_takes_no_object(make, slot):
    pages = make(limit=3 * PAGE + PART)
    pages.write(0, noise(1))
    pages.discard(0, PAGE)
    pages.arena.limit = 2 * PAGE + PART
    with pytest.raises(StoreFull):
        pages.write(slot * PAGE, noise(1))
    assert audit(pages) == Counters(huge_since=1)


def test_an_object_of_a_page_alone_goes_back_though_its_span_is_held_or_leaving(pages):
    pages.write(0, noise(1) * 16 + noise(1) * 15)
    pages.discard(PAGE, 9 * PAGE)
    pages.discard(20 * PAGE, 9 * PAGE)
    pages.pool.begin_compaction()
    assert pages.pool.leaving
    for slot in range(31):
        pages.write(slot * PAGE, noise(2))
    pages.pool.end_compaction()
    pages.pool.hold()
    for slot in range(31):
        pages.write(slot * PAGE, text(slot))
    pages.pool.let_all_go()
    assert [pages.read(slot * PAGE, PAGE) for slot in range(31)] == [text(n) for n in range(31)]
    audit(pages)


# Parts


def test_parts_are_what_a_read_joins(pages):
    pages.write(510 * PAGE, noise(1) + text(1) + filled(7))
    pages.write(514 * PAGE, text(2))
    edges = (0, 1, 2047, PAGE - 1)
    for start in range(508, 516):
        for head in edges:
            for end in range(start, 516):
                for tail in edges:
                    offset, length = start * PAGE + head, (end - start) * PAGE + tail - head
                    if length < 0:
                        continue
                    parts = pages.parts(offset, length)
                    assert all(parts)
                    assert b"".join(parts) == pages.read(offset, length)
                    assert all(len(part) == PAGE for part in parts[1:-1])
    expected = bytes(2 * PAGE) + noise(1) + text(1) + filled(7) + ZEROS + text(2)
    for offset, length in (
        (0, 7 * PAGE),
        (100, PAGE),
        (2 * PAGE, PAGE),
        (PAGE + 9, 4 * PAGE),
        (5, 3),
    ):
        found = b"".join(pages.parts(508 * PAGE + offset, length))
        assert found == expected[offset : offset + length]

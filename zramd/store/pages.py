"""Read, write and discard of byte ranges over table, pool and compressors.

A write of whole pages is five moves; what each makes impossible is what makes the whole safe:

1. Encode, under no lock: same-filled, compressed, or raw where compression does not pay.
2. Take objects. Refused (StoreFull): nothing has changed, no slot has been looked at. But first
   room is made, see `_with_room`.
3. Copy the bytes in, under no lock: nobody else knows these objects.
4. Swap the slot words under the slot lock, each by one store, remembering the old ones. From here
   on readers see the new pages; a process killed before a word's store leaves that page's old one.
5. Give the old objects back, and count. Nobody can still be reading them: readers copy out under
   the slot lock, and the old words are gone.

Promises
1. A read returns what the last completed write left, or zeros.
2. A page is written whole or not at all; a failed write leaves its old content. A request goes in
   order, cut where it crosses a multiple of 2 MiB, and where it starts or ends inside a page; it
   may fail with its first parts written, as a disk's may.
3. Discard and zero cost what is stored in their range, not its length.
4. When no call is under way, the counters equal a recount of the table (`recount`).
5. A write is refused only where compaction could not free a span either; and, when that has come
   to pass in a reserved arena with less than FULL_SHARE of its memory left, those that fill empty
   slots at once, until so much is left again. That is for swap: when full it must be so quickly and
   for some time, or the kernel goes on and on trying instead of killing somebody.

Assumes 0 <= offset, 0 <= length, offset + length <= disksize: the device checks. Any number of
threads may call. Slot locks are striped by table page (512 slots, 2 MiB of device); codecs run
outside them. Lock order: compaction, slot, pool, the arena's account.
"""

import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from typing import Final, TypeVar

from zramd.errors import Corrupt, DeviceBusy, StoreFull
from zramd.store import PAGE, SPAN
from zramd.store.arena import Arena
from zramd.store.compaction import empty_leaving_spans
from zramd.store.header import COMPACTED, HUGE_SINCE
from zramd.store.image import seal
from zramd.store.pace import Hurry, Pace
from zramd.store.pool import CLASSES, Pool
from zramd.store.saving import PATIENCE_S, Saving
from zramd.store.table import (
    ADDRESS_SHIFT,
    FILL_ZERO,
    HUGE,
    INLINE,
    LENGTH_MASK,
    LENGTH_SHIFT,
    LOST,
    SAME,
    SLOTS_PER_TABLE_PAGE,
    Kind,
    address_of,
    fill_of,
    inline_fill,
    kinds_of,
    length_of,
)
from zramd.store.zcomp import FAILURES, Buffer, Comp

HUGE_LENGTH: Final = CLASSES[-2] + 1
"""From this compressed length on a page takes a 4096-byte object anyway, so it is stored raw."""

FULL_SHARE: Final = 64
"""Divides the memory. With each write tried, a guest whose reserve was full had not killed anybody
after 5 minutes, and nothing went on; so it had, and went on. The price: free objects do not count
as left, so where lengths are mixed 64 MiB hold an eighth less before they are full."""

SPARSE_SHARE: Final = 8
SPARSE_LEAST: Final = 1 << 20
"""Sparse is what would lose an eighth of its memory, and a MiB, by compaction. That costs 2 ms for
each MiB gained; with less to gain it costs more, 4.5 ms where it is a twentieth (lz4, programs)."""

_WORTH_SHARE: Final = 128
"""A write compacts before it takes larger objects than it needs where that gives back this share of
the memory: the scan, 50 us a table page, then costs less than the writes that fill what is gained.
"""

EXTENTS_LOOK: Final = 8 << 20
"""Bytes of stored pages that one call of `extents` looks at: 0.1 ms, in which others wait. Holes
cost next to nothing."""

_STRIPES: Final = 64
_ZEROS: Final = bytes(PAGE)
_ENDS: Final = struct.Struct(f"<Q{PAGE - 16}xQ").unpack

_T = TypeVar("_T")


@dataclass(slots=True)
class Counters:
    """What is stored, in pages and bytes; `same` and `huge` are disjoint parts of `pages`. Those
    that are LOST count as `same`."""

    pages: int = 0
    compressed_bytes: int = 0
    same: int = 0
    huge: int = 0
    huge_since: int = 0
    """Huge pages ever written; never falls."""
    compacted: int = 0
    """Pages of memory that compaction has given back; never falls."""


class Pages:
    """The content of one initialisation: `arena.slots` pages, all zeros at first."""

    def __init__(self, arena: Arena, comp: Comp) -> None:
        self.arena = arena
        self.pool = Pool(arena)
        self.comp = comp
        self.counters = Counters()
        self.checkpoint: Callable[[], None] = lambda: None
        """Called now and then by what takes long, with no slot lock held; what it raises ends that,
        and the write that has waited for it."""
        self._in_need = Hurry()  # who has found no room
        self._full = False  # no empty slot is filled any more
        self._compaction = threading.Lock()  # before the slot locks; held by the one who compacts
        self._one_save = threading.Lock()  # held by the one who saves
        self._saving: Saving | None = None  # set under all slot locks
        self._count_lock = threading.Lock()  # leaf lock; protects counters
        self._slot_locks = [threading.Lock() for _ in range(_STRIPES)]

    def close(self, *, keep: bool = False) -> None:
        """Free everything; `keep`: but seal a file of the user's. No call is under way, and none
        will come. Raises SaveFailed, having freed all but that file.

        Who still holds this object, such as an opener of before, holds next to nothing by it.
        """
        try:
            if keep and self.arena.is_file:
                seal(self.arena, self.pool.in_use())
        finally:
            self.comp.close()
            self.pool.close()
            self.arena.close(keep=keep)

    # Reading

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`. Raises Corrupt."""
        return b"".join(self.parts(offset, length))  # which is no copy of one

    def parts(self, offset: int, length: int) -> list[bytes]:
        """What `read` returns, before it is joined: a page each, less at the ends, none empty."""
        if length == PAGE and not offset % PAGE:
            return [self._read_page(offset // PAGE)]
        if not length:
            return []
        pages: list[bytes] = []
        decompress = self.comp.stream()[1]
        for start, stop in _by_table_page(offset // PAGE, -(-(offset + length) // PAGE)):
            with self._slot_lock(start):
                blobs = self._copy_out_locked(start, stop)
            if blobs:
                for slot, blob in enumerate(blobs, start):
                    pages.append(self._decode(slot, blob, decompress))
            else:
                pages += [_ZEROS] * (stop - start)
        if tail := (offset + length) % PAGE:
            pages[-1] = pages[-1][:tail]
        if head := offset % PAGE:
            pages[0] = pages[0][head:]
        return pages

    def _read_page(self, slot: int) -> bytes:
        """A page that comes alone, as most do: 1 us more as one of several, of 3.5 (lz4)."""
        page = slot // SLOTS_PER_TABLE_PAGE
        with self._slot_locks[page % _STRIPES]:
            if not self.arena.table_pages.occupied[page]:
                return _ZEROS
            blob = self._copy_out(self.arena.table[slot])
        return self._decode(slot, blob, self.comp.stream()[1])

    def _words_locked(self, start: int, stop: int) -> list[int]:
        """The words of one table page's slots; nothing where the table page is not occupied."""
        # A look at a hole of the mapping would fill it, behind the account's back.
        if not self.arena.table_pages.occupied[start // SLOTS_PER_TABLE_PAGE]:
            return []
        words: list[int] = self.arena.table[start:stop].tolist()
        return words

    def _copy_out_locked(self, start: int, stop: int) -> list[bytes | int]:
        return [self._copy_out(word) for word in self._words_locked(start, stop)]

    def _copy_out(self, word: int) -> bytes | int:
        """Its object's bytes, or the word itself where that says all; under its slot lock."""
        if not word or word & INLINE:
            return word
        at = word >> ADDRESS_SHIFT << 4
        blob: bytes = self.arena.map[at : at + (word >> LENGTH_SHIFT & LENGTH_MASK)]
        return blob

    def _decode(
        self, slot: int, blob: bytes | int, decompress: Callable[[Buffer, int], bytes]
    ) -> bytes:
        """The page of a blob. Lengths tell raw pages (4096) and fills (8) apart from compressed
        ones: those are shorter than HUGE_LENGTH, and no codec packs 4 KiB in 8 bytes."""
        try:
            if isinstance(blob, int):
                if blob == LOST:
                    raise Corrupt(
                        f"page {slot} was lost when the device was recovered",
                        hint="write it anew as a whole, or discard it",
                    )
                return _ZEROS if blob <= FILL_ZERO else fill_of(blob) * (PAGE // 8)
            if len(blob) == PAGE:
                return blob
            if len(blob) == 8:
                return blob * (PAGE // 8)
            page = decompress(blob, PAGE)
            if len(page) != PAGE:
                raise ValueError(f"{len(page)} bytes")
            return page
        except FAILURES as error:
            raise Corrupt(f"page {slot} does not decompress: {error}") from error

    # Writing

    def write(self, offset: int, data: Buffer, *, nowait: bool = False) -> None:
        """Write `data` at `offset`. Raises StoreFull, Corrupt (where a page is written in part);
        BlockingIOError where `nowait` and it may take a compaction: to be called again without."""
        if len(data) == PAGE and not offset % PAGE:
            self._write_page(offset // PAGE, data, nowait)
            return
        view = memoryview(data)
        at = min(-offset % PAGE, len(view))
        if at:
            self._write_part(offset, view[:at], nowait)
        first = (offset + at) // PAGE
        for start, stop in _by_table_page(first, first + (len(view) - at) // PAGE):
            size = (stop - start) * PAGE
            self._write_pages(start, view[at : at + size], nowait)
            at += size
        if at < len(view):
            self._write_part(offset + at, view[at:], nowait)

    def _write_page(self, slot: int, page: Buffer, nowait: bool) -> None:
        """One whole page: 5 us more as one of several, of 14 (lz4)."""
        if self._full:
            self._check_full(slot, slot + 1)
        word, blob = self._encode(page, self.comp.stream()[0])
        if blob:
            try:
                address = self.pool.take_one(len(blob))
            except StoreFull:
                (address,) = self._take_with_room([len(blob)], nowait)
            word = self._fill(word, blob, address)
        try:
            try:
                old = self._swap_page(slot, word)
            except StoreFull:
                old = self._with_room(nowait, lambda _: self._swap_page(slot, word))
        except BaseException:
            self._unstage([word])
            raise
        self._settle_page(old, word)

    def _write_pages(self, start: int, view: memoryview, nowait: bool) -> None:
        """Whole pages of one table page: all are written, or none."""
        if self._full:
            self._check_full(start, start + len(view) // PAGE)
        compress = self.comp.stream()[0]
        encoded = [self._encode(view[at : at + PAGE], compress) for at in range(0, len(view), PAGE)]
        lengths = [len(blob) for _, blob in encoded if blob]
        try:
            taken = self.pool.take(lengths)
        except StoreFull:
            taken = self._take_with_room(lengths, nowait)
        addresses = iter(taken)
        words = [
            self._fill(word, blob, next(addresses)) if blob else word for word, blob in encoded
        ]
        try:
            try:
                olds = self._swap(start, words)
            except StoreFull:
                olds = self._with_room(nowait, lambda _: self._swap(start, words))
        except BaseException:
            self._unstage(words)
            raise
        self._settle(olds, words)

    def _write_part(self, offset: int, part: memoryview, nowait: bool) -> None:
        """Less than a page, inside one page."""
        if self._full:
            self._check_full(offset // PAGE, offset // PAGE + 1)
        try:
            self._change(offset, part, larger=False)
        except StoreFull:
            self._with_room(nowait, lambda larger: self._change(offset, part, larger=larger))

    def _change(self, offset: int, part: memoryview, *, larger: bool) -> None:
        """Read, modify and write a page: where another write has come first, which shows when the
        word is to be swapped, once more. Raises StoreFull, Corrupt."""
        slot, at = divmod(offset, PAGE)
        compress, decompress = self.comp.stream()
        while True:
            with self._slot_lock(slot):
                read = self._copy_out_locked(slot, slot + 1)
            page = bytearray(self._decode(slot, read[0] if read else 0, decompress))
            page[at : at + len(part)] = part
            word, content = self._encode(page, compress)
            if content:
                (address,) = self.pool.take([len(content)], larger=larger)
                word = self._fill(word, content, address)
            try:
                with self._slot_lock(slot):
                    # The bytes too: the word alone may be the same by chance.
                    if self._copy_out_locked(slot, slot + 1) == read:
                        old = self._swap_page_locked(slot, word)
                        break
            except BaseException:
                self._unstage([word])
                raise
            self._unstage([word])
        self._settle_page(old, word)

    def _encode(self, page: Buffer, compress: Callable[[Buffer], bytes]) -> tuple[int, Buffer]:
        """Move 1: a page's slot word, and what its object is to hold; nothing where the word says
        all, else it still lacks the address."""
        # A filter that costs 0.1 us; on a match the whole comparison costs 0.5 us as bytes, 10 us
        # as views.
        first, last = _ENDS(page)
        if first == last:
            content = bytes(page)
            if content == content[:8] * (PAGE // 8):
                word = inline_fill(content[:8])
                return (word, b"") if word else (8 << LENGTH_SHIFT | SAME, content[:8])
        blob = compress(page)
        length = len(blob)
        if length >= HUGE_LENGTH:
            return PAGE << LENGTH_SHIFT | HUGE, page
        return length << LENGTH_SHIFT, blob

    def _fill(self, word: int, blob: Buffer, address: int) -> int:
        """Move 3: the whole word. Nobody else knows the object yet; `_swap_locked` publishes it,
        `_unstage` drops it."""
        self.arena.map[address : address + len(blob)] = blob
        return address << ADDRESS_SHIFT - 4 | word

    def _unstage(self, words: list[int]) -> None:
        self.pool.give([address_of(word) for word in words if not word & INLINE])

    def _swap(self, start: int, words: list[int]) -> list[int]:
        with self._slot_lock(start):
            return self._swap_locked(start, words)

    def _swap_page(self, slot: int, word: int) -> int:
        with self._slot_locks[slot // SLOTS_PER_TABLE_PAGE % _STRIPES]:
            return self._swap_page_locked(slot, word)

    def _swap_locked(self, start: int, words: list[int]) -> list[int]:
        """Move 4: publish `words`, return the old ones. Raises StoreFull, nothing changed."""
        self._prepare_locked(start // SLOTS_PER_TABLE_PAGE)
        olds: list[int] = self.arena.table[start : start + len(words)].tolist()
        self._store_locked(start, olds, words)
        return olds

    def _swap_page_locked(self, slot: int, word: int) -> int:
        """The same for one page."""
        page = slot // SLOTS_PER_TABLE_PAGE
        if self._saving is not None or not self.arena.table_pages.occupied[page]:
            self._prepare_locked(page)
        table = self.arena.table
        old: int = table[slot]
        try:
            table[slot] = word
            return old
        except BaseException:  # interrupted, as in `_store_locked`
            table[slot] = old
            raise

    def _prepare_locked(self, page: int) -> None:
        """See that this table page can be stored to. Raises StoreFull."""
        if not self.arena.table_pages.occupied[page]:
            self.arena.table_pages.occupy(page)
        saving = self._saving  # may end meanwhile
        if saving is not None:
            saving.keep(page)

    def _store_locked(self, start: int, olds: list[int], news: list[int]) -> None:
        """Replace words, each by one store. Interrupted (Ctrl-C), all are the old ones."""
        table = self.arena.table
        try:
            for slot, word in enumerate(news, start):
                table[slot] = word
        except BaseException:
            for slot, word in enumerate(olds, start):
                table[slot] = word
            raise

    def _settle(self, olds: Sequence[int], news: Sequence[int]) -> None:
        """Move 5: give back the objects of `olds` and count the change to `news`."""
        gone = [word >> ADDRESS_SHIFT << 4 for word in olds if word and not word & INLINE]
        if gone:
            self.pool.give(gone)
        with self._count_lock:
            for old, new in zip(olds, news, strict=True):
                if old != new:
                    self._count_locked(old, new)

    def _settle_page(self, old: int, new: int) -> None:
        """The same for one page."""
        if old and not old & INLINE:
            self.pool.give((old >> ADDRESS_SHIFT << 4,))
        if old != new:
            with self._count_lock:
                self._count_locked(old, new)

    def _count_locked(self, old: int, new: int) -> None:
        counters = self.counters
        if not old:
            counters.pages += 1
        elif old & INLINE:
            counters.same -= 1
        else:
            counters.compressed_bytes -= old >> LENGTH_SHIFT & LENGTH_MASK
            if old & SAME:
                counters.same -= 1
            elif old & HUGE:
                counters.huge -= 1
        if not new:
            counters.pages -= 1
        elif new & INLINE:
            counters.same += 1
        else:
            counters.compressed_bytes += new >> LENGTH_SHIFT & LENGTH_MASK
            if new & SAME:
                counters.same += 1
            elif new & HUGE:
                counters.huge += 1
                counters.huge_since += 1
                self.arena.figures[HUGE_SINCE] = counters.huge_since

    # Making room

    def compact(self) -> None:
        """Move objects together, so that spans go back. Raises what `checkpoint` raises."""
        with self._compaction:
            self._compact_locked()

    @property
    def sparse(self) -> bool:
        """Whether a compaction is worth its while, when nobody is in need. Costs microseconds."""
        return self.pool.gain() >= max(SPARSE_LEAST, self.arena.used // SPARSE_SHARE)

    def _compact_locked(self) -> int:
        """Returns how many pages went back."""
        try:
            self.pool.begin_compaction()
            locks, pace = self._slot_locks, Pace(self._in_need)
            empty_leaving_spans(self.arena, self.pool, locks, self.checkpoint, pace)
        finally:
            given_back = self.pool.end_compaction()
            with self._count_lock:
                self.counters.compacted += given_back
                self.arena.figures[COMPACTED] = self.counters.compacted
        return given_back

    def _take_with_room(self, lengths: list[int], nowait: bool) -> list[int]:
        return self._with_room(nowait, lambda larger: self.pool.take(lengths, larger=larger))

    def _with_room(self, nowait: bool, attempt: Callable[[bool], _T]) -> _T:
        """What `attempt` returns, which was refused once. The caller holds no slot lock.

        While a snapshot is made, after some of what it holds is let go, as often as it takes, or
        after that has given way. Then, in this order: as a compaction or a discard of somebody else
        has left things meanwhile; after a compaction, where much comes of it; with objects of
        larger classes, which `attempt` is told to take by True; after a compaction that frees a
        span or more. Raises StoreFull.

        A compaction takes 0.1 s for a GiB stored. With `nowait` it is not even looked into.
        """
        if nowait:
            raise BlockingIOError("this write may take a compaction")
        with self._in_need, self._compaction:
            larger, least = False, max(SPAN, self.arena.used // _WORTH_SHARE)
            until = time.monotonic() + PATIENCE_S
            while True:
                saving = self._saving
                let_go = saving.let_go if saving is not None else 0
                try:
                    return attempt(larger)
                except StoreFull:
                    if saving is not None and saving.makes_room(let_go, until):
                        continue
                    if self.pool.gain() >= least and self._compact_locked():
                        continue
                    if larger:
                        self._full = self.arena.reserved > 0 and self._is_full()
                        raise
                    larger, least = True, SPAN

    def _check_full(self, start: int, stop: int) -> None:
        """Where `_full` is set: raise StoreFull if that is clear before anything is compressed
        (promise 5)."""
        if self._saving is None:  # what a snapshot holds may be room
            self._full = self._is_full()
            if self._full and not all(self._words(start, stop) or [0]):
                raise self.arena.full()

    def _is_full(self) -> bool:
        return self.pool.room() + self.pool.gain() < self.arena.used // FULL_SHARE

    # Saving

    def save(self, fd: int, must_go_on: Callable[[], None] = lambda: None) -> None:
        """Write a snapshot to the file `fd`, from its beginning on, while others go on. Raises
        DeviceBusy when there is one under way, SaveFailed, and what `must_go_on`, called now and
        then, and `checkpoint` raise."""
        if not self._one_save.acquire(blocking=False):
            raise DeviceBusy(
                "a snapshot is being made already", hint="try again when that has ended"
            )
        saving = Saving(self.arena, self.pool, Pace(self._in_need))

        def publish(now: Saving | None) -> None:
            self._saving = now

        def look() -> None:
            self.checkpoint()
            must_go_on()

        try:
            with self._compaction:
                saving.begin(self._slot_locks, publish)
            saving.write_to(fd, self._slot_locks, look)
        finally:
            saving.end(publish)
            self._one_save.release()

    def end_saving(self, why: str) -> None:
        """Have the snapshot that is made, if one is, fail with this reason."""
        saving = self._saving
        if saving is not None:
            saving.give_way(why)

    # Discarding

    def discard(self, offset: int, length: int) -> int:
        """Empty the slots that lie wholly in the range; returns how many those are."""
        first, last = -(-offset // PAGE), (offset + length) // PAGE
        if first >= last:
            return 0
        for start, stop in self._stored(first, last):
            with self._slot_lock(start):
                olds = self._empty_locked(start, stop)
            self._settle(olds, [0] * len(olds))
        return last - first

    def zero(self, offset: int, length: int, *, nowait: bool = False) -> int:
        """Make the range read as zeros; returns how many slots were emptied. Raises what `write`
        raises, only for pages at the ends that are zeroed in part."""
        emptied = self.discard(offset, length)
        end = offset + length
        head = min(-offset % PAGE, length)
        tail = end % PAGE if end // PAGE * PAGE >= offset + head else 0
        for at, size in ((offset, head), (end - tail, tail)):
            if size and self._words(at // PAGE, at // PAGE + 1) not in ([], [0]):
                self._write_part(at, memoryview(_ZEROS)[:size], nowait)
        return emptied

    def _empty_locked(self, start: int, stop: int) -> list[int]:
        """Zero the words of one table page's slots; an empty table page goes back."""
        table, pages = self.arena.table, self.arena.table_pages
        olds = self._words_locked(start, stop)
        if any(olds):
            page = start // SLOTS_PER_TABLE_PAGE
            self._prepare_locked(page)
            self._store_locked(start, olds, [0] * len(olds))
            base = page * SLOTS_PER_TABLE_PAGE
            if not any(table[base : base + SLOTS_PER_TABLE_PAGE]):
                pages.vacate(page)
        return olds

    # Looking

    def snapshot(self) -> Counters:
        """A copy of the counters that belongs to one moment, none below zero: a page is counted
        after it is published, so one that is replaced at once may be taken off first."""
        with self._count_lock:
            return Counters(*(max(0, count) for count in astuple(self.counters)))

    def extents(self, offset: int, length: int) -> Iterator[tuple[int, Kind]]:
        """(bytes, how they are stored) along the range, neighbours merged, none empty. The sum of
        bytes is `length`, but at least one and no more than EXTENTS_LOOK of what is stored.

        A page that a write is changing meanwhile may show either way.
        """
        end = offset + length
        run, run_kind = 0, Kind.HOLE
        for start, stop, kind in self._runs(offset // PAGE, -(-end // PAGE)):
            size = min(stop * PAGE, end) - max(start * PAGE, offset)
            if kind is not run_kind and run:
                yield run, run_kind
                run = 0
            run, run_kind = run + size, kind
        if run:
            yield run, run_kind

    def _runs(self, first: int, last: int) -> Iterator[tuple[int, int, Kind]]:
        """(start, stop, kind) of slots, in order, neighbours not always merged; cut off where
        enough was looked at. A table page that was given up meanwhile is a hole."""
        at, looked = first, 0
        for start, stop in self._stored(first, last):
            if at < start:
                yield at, start, Kind.HOLE
                at = start
            if looked >= EXTENTS_LOOK // PAGE:
                return
            looked += stop - start
            with self._slot_lock(start):
                occupied = self.arena.table_pages.occupied[start // SLOTS_PER_TABLE_PAGE]
                words = self.arena.table[start:stop].tobytes() if occupied else b""
            for count, kind in kinds_of(words):
                yield at, at + count, kind
                at += count
        if at < last:
            yield at, last, Kind.HOLE

    def recount(self) -> Counters:
        """The counters as the table tells them, and a check of every word against its span.

        For tests and recovery; costs what is stored. `huge_since` and `compacted` are not in
        the table.
        """
        found = Counters(huge_since=self.counters.huge_since, compacted=self.counters.compacted)
        taken: dict[int, int] = {}
        for start, stop in self._stored(0, self.arena.slots):
            for word in self._words(start, stop):
                if not word:
                    continue
                found.pages += 1
                if word & INLINE:
                    found.same += 1
                    continue
                found.compressed_bytes += length_of(word)
                found.same += bool(word & SAME)
                found.huge += bool(word & HUGE)
                if address_of(word) in taken:
                    raise Corrupt(f"two slots share the object at {address_of(word):#x}")
                taken[address_of(word)] = length_of(word)
        self.pool.check(taken)
        return found

    def _stored(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The parts of the slots first..last whose table pages are occupied."""
        end = -(-last // SLOTS_PER_TABLE_PAGE)
        for page in self.arena.table_pages.pages(first // SLOTS_PER_TABLE_PAGE, end):
            base = page * SLOTS_PER_TABLE_PAGE
            yield max(base, first), min(base + SLOTS_PER_TABLE_PAGE, last)

    def _words(self, start: int, stop: int) -> list[int]:
        with self._slot_lock(start):
            return self._words_locked(start, stop)

    def _slot_lock(self, slot: int) -> threading.Lock:
        return self._slot_locks[slot // SLOTS_PER_TABLE_PAGE % _STRIPES]


def _by_table_page(start: int, stop: int) -> Iterator[tuple[int, int]]:
    """start..stop cut at table pages, so that each part has one slot lock."""
    while start < stop:
        end = min(stop, (start // SLOTS_PER_TABLE_PAGE + 1) * SLOTS_PER_TABLE_PAGE)
        yield start, end
        start = end

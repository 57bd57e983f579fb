"""A snapshot of a store in use is that of one moment, harms nobody, and leaves nothing held."""

import functools
import itertools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

import zramd.store.image
import zramd.store.pages
import zramd.store.pool
import zramd.store.saving
from tests import interleave
from tests.nbd.harness import wait_for
from tests.store.audit import audit
from tests.store.contents import ZEROS, filled, noise, part_noise, text
from tests.store.stores import MIB, recovered, store, use_up, version, whole
from tests.store.test_interleaved import STRIDE
from tests.store.test_interleaved import store as explored_store
from zramd.errors import DeviceBusy, NotInitialised, SaveFailed, StoreFull
from zramd.store import PAGE, SPAN
from zramd.store.arena import Arena
from zramd.store.image import unpack
from zramd.store.pace import Hurry, Pace
from zramd.store.pages import Pages
from zramd.store.pool import PART
from zramd.store.saving import Saving
from zramd.store.zcomp import Algorithm, Comp


def save(pages: Pages) -> int:
    file = os.memfd_create("snapshot")
    pages.save(file)
    return file


def restored(file: int) -> Pages:
    """What this snapshot has, which is closed."""
    arena = unpack(file)
    os.close(file)
    found, lost = recovered(arena)
    os.close(arena)
    assert lost == []
    audit(found, snug=False)
    return found


def content_of(file: int) -> bytes:
    """What this snapshot has, which is closed."""
    try:
        return _content(os.pread(file, os.fstat(file).st_size, 0))
    finally:
        os.close(file)


@functools.lru_cache  # most schedules of an exploration end in the same few snapshots
def _content(snapshot: bytes) -> bytes:
    file = os.memfd_create("snapshot")
    os.pwrite(file, snapshot, 0)
    pages = restored(file)
    content = whole(pages)
    pages.close()
    return content


@pytest.fixture
def in_spans(monkeypatch) -> None:
    """A small store is saved in many blocks, as a large one is."""
    monkeypatch.setattr(zramd.store.saving, "BLOCK", SPAN)


# One moment

SHARE = 40
WRITERS = 4


class Log:
    """What one thread asked for, slot by slot, when each began and ended, by one clock for all."""

    def __init__(self, clock: Iterator[int], share: range) -> None:
        self._clock = clock
        self.share = share
        self.requests = 0
        self.done: dict[int, list[tuple[int, int, bytes]]] = {
            slot: [(-2, -1, ZEROS)] for slot in share
        }

    def request(self, pages: Pages, first: int, last: int, number: int) -> None:
        begin = next(self._clock)
        at, length = first * PAGE, (last - first) * PAGE
        if number % 16 == 0:
            pages.discard(at, length)
        elif number % 16 == 8:
            pages.zero(at, length)
        else:
            pages.write(at, b"".join(version(slot, number) for slot in range(first, last)))
        end = next(self._clock)
        for slot in range(first, last):
            self.done[slot].append((begin, end, version(slot, number)))
        self.requests += 1

    def moments(self, slot: int, page: bytes) -> list[tuple[int, int]]:
        """When the slot may have had this content: from the begin of the request that made it so to
        the end of the next; those that meet are one."""
        found: list[tuple[int, int]] = []
        for (begin, _, content), after in itertools.zip_longest(
            self.done[slot], self.done[slot][1:]
        ):
            end = after[1] if after is not None else sys.maxsize
            if content == page:
                if found and begin < found[-1][1]:
                    found[-1] = (found[-1][0], end)
                else:
                    found.append((begin, end))
        return found


def common_moment(logs: list[Log], pages: Pages, begin: int, end: int) -> bool:
    """Whether there is one between begin and end at which every slot may have had its content."""
    edges: list[tuple[int, int]] = []
    slots = 0
    for log in logs:
        for slot in log.share:
            slots += 1
            moments = log.moments(slot, pages.read(slot * PAGE, PAGE))
            assert moments, f"slot {slot} has what it never had"
            for first, last in moments:
                if max(first, begin) < min(last, end):
                    edges += [(max(first, begin), 1), (min(last, end), -1)]
    at_once = 0
    for _, change in sorted(edges):
        at_once += change
        if at_once == slots:
            return True
    return False


def test_the_tests_tell_one_moment_from_two():
    clock = itertools.count()
    pages = store(2 * SHARE)
    logs = [Log(clock, range(SHARE)), Log(clock, range(SHARE, 2 * SHARE))]
    begin = next(clock)
    logs[0].request(pages, 0, 1, 1)
    logs[1].request(pages, SHARE, SHARE + 1, 1)
    end = next(clock)
    assert common_moment(logs, pages, begin, end)
    pages.discard(0, PAGE)  # as if the first of the two requests were not in it, but the second
    assert not common_moment(logs, pages, begin, end)
    pages.discard(SHARE * PAGE, PAGE)
    assert common_moment(logs, pages, begin, end)
    assert not common_moment(logs, pages, end, end + 9)
    pages.close()


@contextmanager
def switching_often() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize(
    "options", [{}, {"limit": 2 * MIB}, {"limit": 2 * MIB, "reserve": True}, {"algorithm": "zstd"}]
)
def test_whatever_goes_on_meanwhile_a_snapshot_is_of_one_moment(options, in_spans):
    """Each thread has slots of its own, on both sides of a border of table pages."""
    pages = store((WRITERS + 1) * 512, **options)
    clock = itertools.count()
    logs = [
        Log(clock, range(at - SHARE // 2, at + SHARE // 2))
        for at in range(512, (WRITERS + 1) * 512, 512)
    ]
    stop, failed = threading.Event(), []

    def change(log: Log) -> None:
        numbers = random.Random(log.share.start)
        try:
            for number in itertools.count(1):
                if stop.is_set():
                    return
                first = numbers.choice(log.share)
                last = min(log.share.stop, first + numbers.randrange(1, 12))
                log.request(pages, first, last, number)
        except BaseException as error:
            failed.append(error)

    def compact() -> None:
        while not stop.wait(0.001):
            pages.compact()

    threads = [threading.Thread(target=change, args=(log,)) for log in logs]
    threads.append(threading.Thread(target=compact))
    saves: list[tuple[int, int, int]] = []
    with switching_often():
        for thread in threads:
            thread.start()
        for done in range(0, 48, 4):
            wait_for(lambda: failed or min(log.requests for log in logs) > done)  # noqa: B023
            begin = next(clock)
            file = save(pages)
            saves.append((begin, next(clock), file))
        stop.set()
        for thread in threads:
            thread.join()
    assert failed == []
    audit(pages, snug=False)
    for begin, end, file in saves:
        found = restored(file)
        assert common_moment(logs, found, begin, end)
        found.close()
    assert all(log.requests > 20 for log in logs)
    use_up(pages) if not options.get("limit") else pages.close()


# One thread: whatever comes between two steps of a save


def few_spans() -> Pages:
    """Some of each: raw pages in spans of their own, compressed ones, fills, two table pages."""
    pages = store(600)
    pages.write(0, b"".join(map(noise, range(36))))
    pages.write(500 * PAGE, b"".join(part_noise(slot, 2000) for slot in range(40)))
    pages.write(560 * PAGE, b"".join(map(filled, (1, 7, 1 << 62))))
    pages.discard(3 * PAGE, PAGE)
    return pages


def change_all(pages: Pages) -> None:
    pages.write(0, b"".join(text(slot % 9) for slot in range(pages.arena.slots)))
    pages.compact()


def give_all_back_and_take_again(pages: Pages) -> None:
    """Spans that are held stay; others are freed, and opened again for other classes."""
    for length in (100, 4095, 700):
        pages.discard(0, pages.arena.slots * PAGE)
        pages.write(0, b"".join(part_noise(slot, length) for slot in range(200)))


def refused(pages: Pages) -> None:
    with pytest.raises(DeviceBusy, match="being made already") as busy:
        pages.save(0)
    assert busy.value.hint


BETWEEN: dict[str, Callable[[Pages], object]] = {
    "nothing": lambda pages: None,
    "all discarded": lambda pages: pages.discard(0, pages.arena.slots * PAGE),
    "all written": change_all,
    "all given back and taken again": give_all_back_and_take_again,
    "compaction": lambda pages: pages.compact(),
    "parts written": lambda pages: [pages.write(s * PAGE + 5, b"part") for s in range(520)],
    "another save": lambda pages: refused(pages),
}


@pytest.mark.parametrize("between", BETWEEN)
def test_what_comes_between_two_steps_of_a_save_is_not_in_it(between, in_spans):
    for step in itertools.count(1):
        pages = few_spans()
        content, left = whole(pages), [step]

        def checkpoint() -> None:
            left[0] -= 1  # noqa: B023
            if left[0] == 0:  # noqa: B023
                BETWEEN[between](pages)  # noqa: B023

        pages.checkpoint = checkpoint
        file = save(pages)
        pages.checkpoint = lambda: None
        assert content_of(file) == content
        audit(pages, snug=False)
        use_up(pages)
        if left[0] > 0:
            break
    assert step > 6


def test_a_save_changes_no_counter_and_no_memory():
    pages = few_spans()
    before, used, peak = pages.snapshot(), pages.arena.used, pages.arena.used_max
    content = whole(pages)
    for _ in range(2):
        assert content_of(save(pages)) == content
        assert (pages.snapshot(), pages.arena.used, pages.arena.used_max) == (before, used, peak)
        assert pages.arena.resident() <= used
    use_up(pages)


def sparse() -> Pages:
    pages = store(600)
    pages.write(0, b"".join(map(noise, range(160))))
    for slot in range(160):
        if slot % 16:
            pages.discard(slot * PAGE, PAGE)
    return pages


def test_a_compaction_during_a_save_does_nothing_and_after_it_all():
    pages = sparse()
    seen = []

    def checkpoint() -> None:
        if seen:
            return
        before = pages.arena.used
        pages.compact()
        seen.append((pages.arena.used - before, pages.pool.gain(), pages.counters.compacted))

    pages.checkpoint = checkpoint
    content = whole(pages)
    assert content_of(save(pages)) == content
    assert seen == [(0, 0, 0)]
    assert pages.pool.gain() > 0
    pages.compact()
    assert pages.counters.compacted == 9 * SPAN // PAGE
    audit(pages)
    use_up(pages)


# Ends before the end


class Stopped(Exception):
    """Like a reset's, out of a checkpoint."""


@pytest.mark.parametrize("change", ["nothing", "all discarded", "all given back and taken again"])
def test_a_save_that_is_stopped_at_any_checkpoint_leaves_nothing_held(change, in_spans):
    for step in itertools.count(1):
        pages = few_spans()
        left = [step]

        def checkpoint() -> None:
            left[0] -= 1  # noqa: B023
            if left[0] == 0:  # noqa: B023
                BETWEEN[change](pages)  # noqa: B023
                raise Stopped

        pages.checkpoint = checkpoint
        file = os.memfd_create("snapshot")
        try:
            pages.save(file)
        except Stopped:
            pass
        os.close(file)
        pages.checkpoint = lambda: None
        audit(pages, snug=False)
        content = whole(pages)
        assert content_of(save(pages)) == content
        use_up(pages)
        if left[0] > 0:
            break
    assert step > 6


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_save_whose_file_fails_at_any_write_leaves_nothing_held(error, monkeypatch, in_spans):
    write = zramd.store.image.write
    for step in itertools.count(1):
        pages = few_spans()
        left = [step]

        def fail(fd: int, data: bytes, at: int) -> None:
            left[0] -= 1  # noqa: B023
            if left[0] == 0:  # noqa: B023
                pages.discard(0, 300 * PAGE)  # noqa: B023
                raise error
            write(fd, data, at)

        monkeypatch.setattr(zramd.store.image, "write", fail)
        file = os.memfd_create("snapshot")
        try:
            pages.save(file)
        except (SaveFailed, KeyboardInterrupt):
            pass
        os.close(file)
        audit(pages, snug=False)
        use_up(pages)
        if left[0] > 0:
            break
    assert step > 6


@pytest.mark.parametrize("kind", ["a full device", "a pipe", "a pipe nobody reads", "read only"])
def test_a_file_that_cannot_be_written_fails_the_save_and_says_why(kind):
    pages = few_spans()
    reading, writing = os.pipe()
    full = os.open("/dev/full", os.O_WRONLY)
    null = os.open("/dev/null", os.O_RDONLY)
    if kind == "a pipe nobody reads":
        os.close(reading)
    file = {"a full device": full, "read only": null}.get(kind, writing)
    with pytest.raises(SaveFailed, match="cannot be written: ") as failed:
        pages.save(file)
    assert "\n" not in failed.value.line()
    for fd in {reading, writing, full, null} - ({reading} if "nobody" in kind else set()):
        os.close(fd)
    audit(pages)
    use_up(pages)


# Stores at their limit


class Slow:
    """A save in a thread, which waits at its first checkpoint until it is told how to go on."""

    def __init__(self, pages: Pages) -> None:
        self._pages = pages
        self._reached, self._go = threading.Event(), threading.Event()
        self._error: Exception | None = None
        self._raised: BaseException | None = None
        self.file = os.memfd_create("snapshot")
        pages.checkpoint = self._checkpoint
        self._thread = threading.Thread(target=self._save)
        self._thread.start()
        self._reached.wait()

    def _checkpoint(self) -> None:
        self._reached.set()
        self._go.wait()
        if self._error is not None:
            raise self._error

    def _save(self) -> None:
        try:
            self._pages.save(self.file)
        except BaseException as error:
            self._raised = error

    def wait_for_waiter(self) -> None:
        """Until somebody waits for what the save holds."""
        saving = self._pages._saving
        assert saving is not None
        wait_for(lambda: saving._progress._waiters)

    def go_on(self, error: Exception | None = None) -> BaseException | None:
        """To the end; what it raised."""
        self._error = error
        self._go.set()
        self._thread.join()
        self._pages.checkpoint = lambda: None
        return self._raised


def in_thread(body: Callable[[], object]) -> Callable[[], object]:
    """Start it; what is returned waits for it, and returns what it did, or raised."""
    results: list[object] = []

    def run() -> None:
        try:
            results.append(body())
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    def end() -> object:
        thread.join()
        return results[0]

    return end


LIMITS = [{"limit": 2 * MIB}, {"limit": 2 * MIB, "reserve": True}]


def full_of_noise(**options) -> tuple[Pages, int]:
    """A store into which nothing goes any more, and how many slots it has filled."""
    pages = store(1024, **options)
    for slot in itertools.count():
        try:
            pages.write(slot * PAGE, noise(slot))
        except StoreFull:
            return pages, slot
    raise AssertionError


@pytest.mark.parametrize("aborted", [False, True])
@pytest.mark.parametrize("options", LIMITS)
@pytest.mark.parametrize("part", [False, True])
def test_a_write_that_finds_no_room_for_what_a_save_holds_waits(
    options, aborted, part, monkeypatch
):
    """Without the save, what is discarded first makes the room."""
    hurried = []
    monkeypatch.setattr(Pace, "keep", lambda self: hurried.append(bool(self._hurry)))
    pages, slots = full_of_noise(**options)
    hurried.clear()  # filling it has compacted it
    content = whole(pages)
    slow = Slow(pages)
    pages.discard(0, 20 * PAGE)
    where = 20 * PAGE + 1 if part else 0
    end = in_thread(lambda: pages.write(where, noise(1000) * (1 if part else 20)))
    slow.wait_for_waiter()
    raised = slow.go_on(NotInitialised("a reset") if aborted else None)
    assert end() is None
    assert isinstance(raised, NotInitialised) if aborted else raised is None
    assert aborted or hurried[0]
    assert not pages._in_need
    if part:
        assert pages.read(where, PAGE) == noise(1000)
    else:
        assert whole(pages) == noise(1000) * 20 + content[20 * PAGE :]
    audit(pages, snug=False)
    if aborted:
        os.close(slow.file)
    else:
        assert content_of(slow.file) == content
    assert pages.arena.used_max <= 2 * MIB
    pages.discard(0, 1024 * PAGE)
    for slot in range(slots):
        pages.write(slot * PAGE, noise(slot + 1))
    audit(pages, snug=False)
    pages.close()


@pytest.mark.parametrize("options", LIMITS)
def test_a_write_that_would_find_no_room_anyway_is_refused_when_the_save_has_ended(options):
    pages, _ = full_of_noise(**options)
    pages._full = False  # a store that knows that it is full refuses at once, as it should
    slow = Slow(pages)
    end = in_thread(lambda: pages.write(900 * PAGE, noise(1)))
    slow.wait_for_waiter()
    assert slow.go_on() is None
    assert isinstance(end(), StoreFull)
    os.close(slow.file)
    pages.discard(0, 100 * PAGE)
    pages.write(900 * PAGE, noise(1))
    audit(pages, snug=False)
    pages.close()


def test_who_must_not_wait_is_told_that_it_might():
    pages, _ = full_of_noise(limit=2 * MIB)
    slow = Slow(pages)
    pages.discard(0, 20 * PAGE)
    with pytest.raises(BlockingIOError):
        pages.write(0, noise(1), nowait=True)
    assert slow.go_on() is None
    pages.write(0, noise(1), nowait=True)
    os.close(slow.file)
    pages.close()


def test_a_store_known_to_be_full_is_not_when_room_is_made_during_a_save():
    """Its empty slots are refused at once; but not for what is only held."""
    pages, slots = full_of_noise(limit=2 * MIB, reserve=True)
    assert pages._full
    slow = Slow(pages)
    pages.discard(0, slots // 2 * PAGE)
    end = in_thread(lambda: pages.write(0, noise(1)))
    slow.wait_for_waiter()
    assert slow.go_on() is None
    assert end() is None
    os.close(slow.file)
    pages.close()


def test_a_write_that_comes_as_a_save_ends_is_not_refused():
    """Where nobody is seen to save, nothing is held any more."""
    pages, _ = full_of_noise(limit=2 * MIB)
    let_all_go, ends = pages.pool.let_all_go, []

    def let_all_go_late() -> None:
        saving = pages._saving
        ends.append(in_thread(lambda: pages.write(0, noise(1000) * 20)))
        if saving is None:
            ends[0]()  # it does not wait
        else:
            wait_for(lambda: saving._progress._waiters)
        let_all_go()

    def discard() -> None:
        pages.discard(0, 20 * PAGE)
        raise Stopped

    pages.pool.let_all_go = let_all_go_late
    pages.checkpoint = discard
    file = os.memfd_create("snapshot")
    with pytest.raises(Stopped):
        pages.save(file)
    os.close(file)
    pages.checkpoint = lambda: None
    assert ends[0]() is None
    assert pages.read(0, 20 * PAGE) == noise(1000) * 20
    audit(pages, snug=False)
    pages.close()


class SavedUntilLookedAt(Pages):
    """A save ends whenever somebody has seen that there is one."""

    @property
    def _saving(self) -> Saving | None:
        now, self._now = self._now, None
        return now

    @_saving.setter
    def _saving(self, now: Saving | None) -> None:
        self._now = now


def test_a_write_that_has_seen_a_save_that_has_ended_goes_on():
    pages = SavedUntilLookedAt(Arena(PAGE, "lz4"), Comp(Algorithm("lz4")))
    pages.write(0, noise(1))
    saving = Saving(pages.arena, pages.pool, Pace(Hurry()))
    saving.begin(pages._slot_locks, lambda now: None)
    pages._saving = saving
    pages.write(0, noise(2))
    saving.end(lambda now: None)
    assert pages.read(0, PAGE) == noise(2)
    audit(pages)
    pages.close()


def test_two_saves_at_once_are_refused_also_while_a_write_waits():
    pages, _ = full_of_noise(limit=2 * MIB)
    slow = Slow(pages)
    pages.discard(0, 20 * PAGE)
    end = in_thread(lambda: pages.write(0, noise(1)))
    slow.wait_for_waiter()
    refused(pages)
    assert slow.go_on() is None
    assert end() is None
    os.close(slow.file)
    os.close(save(pages))
    pages.close()


# Every order


@pytest.fixture
def explored(monkeypatch) -> None:
    monkeypatch.setattr(zramd.store.saving, "threading", interleave)
    monkeypatch.setattr(zramd.store.pages, "_STRIPES", 2)  # to take 64 would be most of the steps


SAVE = {zramd.store.saving.__file__, zramd.store.pages.__file__}
HOLD = {zramd.store.saving.__file__, zramd.store.pool.__file__}
OLD = noise(1)

BESIDE: dict[str, tuple[Callable[[Pages], object], bytes]] = {
    "write a fill": (lambda pages: pages.write(0, filled(7)), filled(7)),
    "write a part": (lambda pages: pages.write(1, b"part"), OLD[:1] + b"part" + OLD[5:]),
    "discard and write": (
        lambda pages: (pages.discard(0, PAGE), pages.write(0, noise(3))),
        noise(3),
    ),
}


@pytest.mark.parametrize(
    ("beside", "files"),
    [
        *((name, SAVE) for name in ("write a fill", "write a part", "discard and write")),
        ("discard and write", HOLD),
    ],
)
def test_a_save_beside_any_request_has_the_page_before_or_after_it(beside, files, explored):
    request, new = BESIDE[beside]
    seen = set()

    def make():
        pages = explored_store(3)
        pages.write(0, OLD + text(1) + noise(5))
        file = os.memfd_create("snapshot")

        def check() -> None:
            content = content_of(file)
            assert content[:PAGE] in (OLD, new) or (
                beside == "discard and write" and content[:PAGE] == ZEROS
            )
            assert content[PAGE:] == text(1) + noise(5)
            seen.add(content[:PAGE])
            assert pages.read(0, 3 * PAGE) == new + text(1) + noise(5)
            audit(pages)
            pages.close()

        return [lambda: pages.save(file), lambda: request(pages), check]

    assert interleave.explore(files, make, stride=50 * STRIDE) > 30
    assert {OLD, new} <= seen


@pytest.mark.parametrize("files", [SAVE, HOLD], ids=["pages", "pool"])
def test_a_save_beside_the_first_write_has_it_or_not(files, explored):
    def make():
        pages = explored_store(1)
        file = os.memfd_create("snapshot")

        def check() -> None:
            assert content_of(file) in (ZEROS, noise(2))
            audit(pages)
            pages.close()

        return [lambda: pages.save(file), lambda: pages.write(0, noise(2)), check]

    assert interleave.explore(files, make, stride=50 * STRIDE) > 30


def test_a_save_beside_two_writes_has_not_the_second_alone(explored):
    """To table pages of one stripe, not the first: a new one, and then one that there is."""
    one, other = 512 * PAGE, 3 * 512 * PAGE
    seen = set()

    def make():
        pages = explored_store(3 * 512 + 1)
        pages.write(other, OLD)
        file = os.memfd_create("snapshot")

        def work() -> None:
            pages.write(one, text(2))
            pages.write(other, noise(2))

        def check() -> None:
            content = content_of(file)
            seen.add((content[one : one + PAGE], content[other:]))
            audit(pages)
            pages.close()

        return [lambda: pages.save(file), work, check]

    assert interleave.explore({zramd.store.saving.__file__}, make, stride=STRIDE) > 30
    assert seen <= {(ZEROS, OLD), (text(2), OLD), (text(2), noise(2))}


@pytest.mark.parametrize("files", [SAVE, HOLD], ids=["pages", "pool"])
def test_a_write_that_has_room_but_for_a_save_is_never_refused(files, explored):
    """There is room for four raw pages, and one is free."""

    def make():
        pages = explored_store(8)
        pages.write(0, b"".join(map(noise, range(4))))
        pages.arena.limit = pages.arena.used
        pages.discard(3 * PAGE, PAGE)
        file = os.memfd_create("snapshot")

        def work() -> None:
            pages.write(0, noise(5))
            pages.write(PAGE, noise(6))
            pages.discard(2 * PAGE, PAGE)
            pages.write(6 * PAGE, noise(7))

        def check() -> None:
            os.close(file)
            assert pages.read(0, 3 * PAGE) == noise(5) + noise(6) + ZEROS
            assert pages.read(6 * PAGE, PAGE) == noise(7)
            audit(pages, snug=False)
            pages.close()

        return [lambda: pages.save(file), work, check]

    assert interleave.explore(files, make, stride=50 * STRIDE) > 30


def test_a_save_beside_a_refused_take_touches_nothing_that_is_not_charged(explored):
    """The take opens another part of the only span, and gives it back when there is no other."""

    def make():
        pages = explored_store(64)
        pages.write(0, noise(1) + noise(2))
        pages.arena.limit = pages.arena.used + PART
        file = os.memfd_create("snapshot")

        def take() -> None:
            with pytest.raises(StoreFull):
                pages.pool.take([PAGE, PAGE, PAGE, 3000])

        def check() -> None:
            assert pages.arena.resident() <= pages.arena.used
            audit(pages)
            assert content_of(file)[: 2 * PAGE] == noise(1) + noise(2)
            pages.close()

        return [lambda: pages.save(file), take, check]

    assert interleave.explore(HOLD, make, stride=50 * STRIDE) > 30


def test_what_is_given_back_while_held_is_nobodys_and_then_everybodys():
    pages = store(64)
    pool = pages.pool
    first = pool.take([PAGE] * 16)
    second = pool.take([PAGE] * 16)
    pool.give(second)  # its place is vacant
    pool.hold()
    used = pages.arena.used
    pool.give(first)
    again = pool.take([PAGE] * 16)  # opened in the vacant place, which is held too
    assert not {*first} & {*again}
    pool.give(again)
    others = pool.take([PAGE] * 32)
    assert not {*first, *again} & {*others}
    (start, stop), *_ = pool.copy_held(memoryview(bytearray(SPAN)))
    assert (start, stop) == (pages.arena.spans_at, pages.arena.spans_at + SPAN)
    assert pool.let_go(stop) == 16
    assert pages.arena.used == used + SPAN - SPAN + 2 * SPAN
    pool.let_all_go()
    pool.check(dict.fromkeys(others, PAGE))
    pool.give(others)
    pool.check({})
    pages.close()


def test_a_snapshot_gives_way_to_a_write_that_finds_no_room_for_long(monkeypatch, in_spans):
    pages = few_spans()
    content = whole(pages)
    pages.arena.limit = pages.arena.used
    stuck, go_on = threading.Event(), threading.Event()
    failed: list[SaveFailed] = []

    def write(fd: int, data: bytes, at: int) -> None:
        if at >= PAGE * 2:
            stuck.set()
            assert go_on.wait(30)

    def try_to_save() -> None:
        try:
            pages.save(file)
        except SaveFailed as error:
            failed.append(error)

    file = os.memfd_create("snapshot")
    with monkeypatch.context() as patch:
        patch.setattr(zramd.store.image, "write", write)
        patch.setattr(zramd.store.pages, "PATIENCE_S", 0.05)
        saver = threading.Thread(target=try_to_save)
        saver.start()
        assert stuck.wait(30)
        for slot in range(4, 36):  # one is free, and what each gives back is held
            pages.write(slot * PAGE, noise(1000 + slot))
        go_on.set()
        saver.join()
    assert "goes before a snapshot" in failed[0].message
    changed = b"".join(noise(1000 + slot) for slot in range(4, 36))
    assert whole(pages) == content[: 4 * PAGE] + changed + content[36 * PAGE :]
    audit(pages, snug=False)
    assert content_of(save(pages)) == whole(pages)
    pages.close()

"""The device: attributes, init, I/O, reset, with zram's error codes; alone and against threads."""

import errno
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import groupby
from types import SimpleNamespace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tests import interleave
from tests.store import (
    conftest,  # noqa: F401 - the profiles of Hypothesis
    contents,
)
from tests.store.audit import audit
from tests.store.contents import ZEROS, noise, tag_of, tagged
from tests.store.model import Model, extents_agree, whole_pages
from tests.store.test_pages import Codec, run_all
from zramd import attributes, device, gate
from zramd import opener as opener_module
from zramd.attributes import READABLE, WRITABLE
from zramd.device import Zram
from zramd.errors import (
    BadArena,
    BadValue,
    Corrupt,
    DeviceBusy,
    NoMemory,
    NotInitialised,
    NotSupported,
    OutOfRange,
    StoreFull,
    ZramdError,
)
from zramd.opener import IoCounts, Opener
from zramd.store import PAGE, compaction, table
from zramd.store.arena import SPAN, Arena
from zramd.store.pages import Pages
from zramd.store.table import Kind

DEADLINE = 60
"""Seconds after which a test has failed: never waited for, unless something hangs."""


@pytest.fixture
def zram():
    zram = Zram("zram7")
    yield zram
    zram.close()


def until(fact: Callable[[], bool]) -> None:
    """Return when `fact` holds: of another thread's doing, which nothing announces."""
    end = time.monotonic() + DEADLINE
    while not fact():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.001)


def open_files() -> list[str]:
    """The arenas' descriptors: two for each, as mmap keeps one of its own."""
    names = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            names.append(os.readlink(f"/proc/self/fd/{fd}"))
        except FileNotFoundError:
            pass  # the listing's own
    return sorted(name for name in names if "zramd-arena" in name)


def state(zram: Zram) -> dict[str, str]:
    return {attribute: attributes.get(zram, attribute) for attribute in READABLE}


FRESH = {
    "disksize": "0",
    "initstate": "0",
    "comp_algorithm": "[lz4] lz4hc zstd deflate",
    "max_comp_streams": str(len(os.sched_getaffinity(0))),
    "mem_limit": "0",
    "mem_used_max": "0",
    "prealloc": "0",
    "mm_stat": " ".join(["       0"] * 9),
    "io_stat": " ".join(["       0"] * 4),
}


# Attributes


def test_a_new_device_reads_as_zrams_does(zram):
    assert state(zram) == FRESH


def test_the_attributes_are_those_of_zram():
    assert set(READABLE) == set(FRESH)
    assert set(WRITABLE) == {
        *("disksize", "reset", "comp_algorithm", "algorithm_params", "max_comp_streams"),
        *("mem_limit", "prealloc", "mem_used_max", "compact"),
    }


@pytest.mark.parametrize("attribute", ["reset", "compact", "algorithm_params"])
def test_a_write_only_attribute_cannot_be_read(zram, attribute):
    with pytest.raises(BadValue, match="can only be set"):
        attributes.get(zram, attribute)


@pytest.mark.parametrize("attribute", ["initstate", "mm_stat", "io_stat"])
def test_a_read_only_attribute_cannot_be_set(zram, attribute):
    with pytest.raises(BadValue, match="read-only"):
        attributes.set(zram, attribute, "1")


@pytest.mark.parametrize("attribute", ["", "disk_size", "DISKSIZE", "__init__", "close", "bd_stat"])
def test_what_is_not_an_attribute_is_a_bad_value_that_lists_them(zram, attribute):
    with pytest.raises(BadValue, match="is not an attribute") as caught:
        attributes.get(zram, attribute)
    assert all(name in caught.value.hint for name in READABLE)
    with pytest.raises(BadValue, match="is not an attribute") as caught:
        attributes.set(zram, attribute, "1")
    assert all(name in caught.value.hint for name in WRITABLE)


BEFORE, AFTER, ANY = "before init", "after init", "any time"
GOOD = [
    ("disksize", "4096", BEFORE, {"disksize": "4096", "initstate": "1"}),
    ("disksize", "1", BEFORE, {"disksize": "4096"}),
    ("disksize", "4097\n", BEFORE, {"disksize": "8192"}),
    ("disksize", " 1M ", BEFORE, {"disksize": "1048576"}),
    ("disksize", "1.5k", BEFORE, {"disksize": "4096"}),
    ("disksize", "1MB", BEFORE, {"disksize": "1003520"}),
    ("disksize", "1GiB", BEFORE, {"disksize": "1073741824"}),
    ("comp_algorithm", "zstd\n", BEFORE, {"comp_algorithm": "lz4 lz4hc [zstd] deflate"}),
    ("comp_algorithm", "zstd(level=9)", BEFORE, {"comp_algorithm": "lz4 lz4hc [zstd] deflate"}),
    ("algorithm_params", "level=9", BEFORE, {}),
    ("algorithm_params", "algo=lz4 level=9\n", BEFORE, {}),
    ("algorithm_params", "priority=0 level=9", BEFORE, {}),
    ("mem_limit", "0", ANY, {"mem_limit": "0"}),
    ("mem_limit", "1", ANY, {"mem_limit": "4096"}),
    ("mem_limit", "64M\n", ANY, {"mem_limit": "67108864"}),
    ("mem_used_max", "0\n", ANY, {}),
    ("max_comp_streams", "1", ANY, {}),
    ("max_comp_streams", "100", ANY, {}),
    ("reset", "1\n", ANY, FRESH),
    ("reset", "65535", ANY, FRESH),
    ("compact", "1\n", AFTER, {}),
    ("compact", "", AFTER, {}),
]
BAD = [
    *(("disksize", value, BEFORE, BadValue) for value in ("", "0", "x", "-1", "0K", "0.1", "1 1")),
    *(
        ("disksize", value, BEFORE, BadValue)
        for value in ("1X", "1e3", "K", "5T", "\u0661", "1,5K")
    ),
    *(("disksize", value, AFTER, DeviceBusy) for value in ("4096", "0", "1M")),
    ("disksize", "junk", AFTER, BadValue),
    *(
        ("comp_algorithm", value, ANY, BadValue)
        for value in ("", "lzo", "LZ4", "lz4 zstd", "x" * 200)
    ),
    *(("comp_algorithm", value, ANY, BadValue) for value in ("zstd(level=99)", "[lz4]")),
    *(("comp_algorithm", value, AFTER, DeviceBusy) for value in ("zstd", "lz4")),
    *(("algorithm_params", value, ANY, BadValue) for value in ("", "level", "level=", "=1", "9")),
    *(("algorithm_params", value, ANY, BadValue) for value in ("colour=1", "deflate.winbits=12")),
    *(("algorithm_params", value, ANY, BadValue) for value in ("priority=4", "priority=-1")),
    *(("algorithm_params", value, ANY, BadValue) for value in ("priority=x level=1", "priority=")),
    *(
        ("algorithm_params", value, BEFORE, BadValue)
        for value in ("level=0", "level=x", "level=1.5")
    ),
    ("algorithm_params", "level=" + "9" * 5000, BEFORE, BadValue),
    ("algorithm_params", "algo=zstd level=3", BEFORE, BadValue),
    ("algorithm_params", "priority=1 level=3", ANY, NotSupported),
    ("algorithm_params", "dict=/etc/passwd", ANY, NotSupported),
    ("algorithm_params", "level=3", AFTER, DeviceBusy),
    *(("mem_limit", value, ANY, BadValue) for value in ("", "x", "-1", "1X", "none")),
    *(("mem_limit", value, ANY, BadValue) for value in ("4E", "9" * 5000)),
    *(("mem_used_max", value, ANY, BadValue) for value in ("", "1", "-1", "x", "0.0", "9" * 5000)),
    *(("max_comp_streams", value, ANY, BadValue) for value in ("", "0", "-1", "x", "9" * 5000)),
    *(("reset", value, ANY, BadValue) for value in ("", "0", "-1", "x", "65536", "9" * 5000)),
    ("compact", "1", BEFORE, BadValue),
]


def times(when: str) -> list[bool]:
    return {BEFORE: [False], AFTER: [True], ANY: [False, True]}[when]


@pytest.mark.parametrize(
    ("attribute", "value", "initialised", "expected"),
    [
        pytest.param(attribute, value, when, expected, id=f"{attribute}={value[:20]!r}-{when}")
        for attribute, value, whens, expected in GOOD
        for when in times(whens)
    ],
)
def test_a_value_zram_takes_is_taken(zram, attribute, value, initialised, expected):
    if initialised:
        zram.init(1 << 20)
    attributes.set(zram, attribute, value)
    assert expected.items() <= state(zram).items()


@pytest.mark.parametrize(
    ("attribute", "value", "initialised", "error"),
    [
        pytest.param(attribute, value, when, error, id=f"{attribute}={value[:20]!r}-{when}")
        for attribute, value, whens, error in BAD
        for when in times(whens)
    ],
)
def test_a_bad_value_is_refused_and_changes_nothing(zram, attribute, value, initialised, error):
    if initialised:
        zram.init(1 << 20)
    before = state(zram), zram.statistics(), open_files()
    with pytest.raises(error) as caught:
        attributes.set(zram, attribute, value)
    assert caught.type is error
    assert "\n" not in caught.value.message
    assert (state(zram), zram.statistics(), open_files()) == before


def test_error_codes_are_zrams():
    assert (BadValue.errno, OutOfRange.errno) == (errno.EINVAL, errno.EINVAL)
    assert (DeviceBusy.errno, NoMemory.errno) == (errno.EBUSY, errno.ENOMEM)
    assert (NotInitialised.errno, Corrupt.errno) == (errno.EIO, errno.EIO)
    assert (StoreFull.errno, NotSupported.errno) == (errno.ENOSPC, errno.EOPNOTSUPP)


def test_a_level_is_kept_shown_and_used(zram):
    attributes.set(zram, "comp_algorithm", "zstd")
    attributes.set(zram, "algorithm_params", "level=19")
    assert zram.statistics().algorithm == "zstd(level=19)"
    assert attributes.get(zram, "comp_algorithm") == "lz4 lz4hc [zstd] deflate"
    zram.init(PAGE)
    assert os.pread(zram._meta.arena.fd, 14, 64) == b"zstd(level=19)"
    assert zram._meta.comp._level == 19


def test_each_store_of_algorithm_params_resets_all_of_them(zram):
    attributes.set(zram, "algorithm_params", "level=9")
    attributes.set(zram, "algorithm_params", "algo=lz4")
    assert zram.statistics().algorithm == "lz4"


def test_mem_used_max_is_the_peak_until_it_is_set_to_what_is_used(zram):
    zram.init(1 << 20)
    opener = zram.open("test")
    opener.write(0, noise(1) * 16)
    opener.discard(0, 16 * PAGE)
    assert attributes.get(zram, "mem_used_max") == str(SPAN + 3 * PAGE)
    attributes.set(zram, "mem_used_max", "0")
    assert attributes.get(zram, "mem_used_max") == str(2 * PAGE)


def test_a_limit_set_live_holds_at_once_and_lifted_live_lets_go(zram):
    zram.init(1 << 20)
    opener = zram.open("test")
    opener.write(0, noise(1) * 16)
    attributes.set(zram, "mem_limit", "4K")
    with pytest.raises(StoreFull):
        opener.write(0, noise(2) * 16)
    assert opener.read(0, 16 * PAGE) == noise(1) * 16
    assert zram.statistics().mem_used_total == SPAN + 3 * PAGE
    attributes.set(zram, "mem_limit", "0")
    opener.write(0, noise(2) * 16)


def test_a_limit_set_before_init_holds_from_the_first_write(zram):
    attributes.set(zram, "mem_limit", "8K")
    zram.init(1 << 20)
    opener = zram.open("test")
    with pytest.raises(StoreFull):
        opener.write(0, b"x")
    assert attributes.get(zram, "io_stat") == "       0        1        0        0"
    assert zram.statistics().mem_used_max <= 8192
    assert audit(zram._meta).pages == 0


def test_mm_stat_has_zrams_columns(zram):
    attributes.set(zram, "mem_limit", "1G")
    zram.init(1 << 20)
    opener = zram.open("test")
    opener.write(0, noise(1) + noise(2) + ZEROS + contents.filled(1 << 63))
    opener.write(0, noise(3))
    opener.discard(PAGE, PAGE)
    orig, compr, used, limit, peak, same, compacted, huge, huge_since = map(
        int, attributes.get(zram, "mm_stat").split()
    )
    assert (orig, compr) == (3 * PAGE, PAGE + 8)
    assert used == zram._meta.arena.used >= zram._meta.arena.resident()
    assert (limit, peak, same, compacted) == (1 << 30, used, 2, 0)
    assert (huge, huge_since) == (1, 3)
    text = attributes.get(zram, "mm_stat")
    assert text == " ".join(f"{n:8}" for n in map(int, text.split()))


# Compaction


def sparse(zram: Zram, size: int = 8 << 20) -> dict[int, bytes]:
    """Initialise `zram` with half of its pages discarded; what its slots hold."""
    zram.init(size)
    opener = zram.open("test")
    content = {slot: noise(slot) for slot in range(size // PAGE)}
    opener.write(0, b"".join(content.values()))
    for slot in list(content)[::2]:
        opener.discard(slot * PAGE, PAGE)
        content[slot] = ZEROS
    opener.close()
    return content


def test_compact_gives_memory_back_is_counted_and_changes_no_page(zram):
    content = sparse(zram)
    assert zram.sparse
    before = zram.statistics()
    attributes.set(zram, "compact", "1")
    after = zram.statistics()
    assert before.pages_compacted == 0
    assert after.pages_compacted * PAGE == before.mem_used_total - after.mem_used_total == 4 << 20
    assert attributes.get(zram, "mm_stat").split()[6] == str(after.pages_compacted)
    assert zram._meta.arena.resident() <= after.mem_used_total
    assert not zram.sparse
    assert zram.open("test").read(0, 8 << 20) == b"".join(content.values())
    zram.compact()
    assert zram.statistics().pages_compacted == after.pages_compacted
    assert zram._gate.inside() == []


def test_pages_compacted_are_those_of_this_initialisation(zram):
    sparse(zram)
    zram.compact()
    assert zram.statistics().pages_compacted == 1024
    zram.reset(force=True)
    assert zram.statistics().pages_compacted == 0
    zram.init(1 << 20)
    assert zram.statistics().pages_compacted == 0


def test_without_a_disksize_nothing_is_sparse_and_compact_is_einval(zram):
    assert not zram.sparse
    with pytest.raises(BadValue, match="nothing to compact") as caught:
        zram.compact()
    assert caught.value.errno == errno.EINVAL
    assert zram._gate.inside() == []


def test_a_reset_ends_a_compaction_at_its_next_piece(zram, monkeypatch):
    sparse(zram)  # four table pages
    meta = zram._meta
    reached, go, moved, ended = threading.Event(), threading.Event(), [], []
    move = compaction._move

    def slow_move(*at) -> None:
        move(*at)
        moved.append(at[2:4])
        reached.set()
        assert go.wait(DEADLINE)

    def compact() -> None:
        with pytest.raises(NotInitialised) as caught:
            zram.compact()
        ended.append((caught.value.errno, meta.arena.map.closed, list(meta.pool.leaving)))

    monkeypatch.setattr(compaction, "_move", slow_move)
    compactor = in_thread(compact)
    assert reached.wait(DEADLINE)
    assert zram.statistics().in_flight == ("compact",)
    resetter = in_thread(lambda: zram.reset(force=True))
    until(lambda: not zram._gate.init_done)
    assert not meta.arena.map.closed, "freed under the compaction"
    go.set()
    for thread in (compactor, resetter):
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert moved == [(0, 0)]
    assert [error for error, *_ in ended] == [errno.EIO]
    assert state(zram) == FRESH
    zram.init(1 << 20)
    zram.compact()


def test_a_compaction_ended_by_a_reset_that_is_interrupted_has_lost_nothing(zram, monkeypatch):
    content = sparse(zram)
    meta = zram._meta

    def interrupted() -> None:
        # The compaction's next checkpoint comes while the gate is closed.
        with pytest.raises(NotInitialised, match="being reset"):
            meta.compact()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zram._gate, "drain", interrupted)
        with pytest.raises(KeyboardInterrupt):
            zram.reset(force=True)
    part = zram.statistics().pages_compacted
    assert part < 1024
    audit(meta)
    zram.compact()
    assert zram.statistics().pages_compacted == 1024
    audit(meta)
    assert zram.open("test").read(0, 8 << 20) == b"".join(content.values())


def test_a_reset_does_not_wait_for_the_compaction_of_a_write_that_found_no_room(zram, monkeypatch):
    sparse(zram)
    attributes.set(zram, "mem_limit", str(zram._meta.arena.used))
    opener = zram.open("test")
    reached, go, moved, failed = threading.Event(), threading.Event(), [], []
    move = compaction._move

    def slow_move(*at) -> None:
        move(*at)
        moved.append(at[2:4])
        reached.set()
        assert go.wait(DEADLINE)

    def write() -> None:
        with pytest.raises(NotInitialised):
            opener.write(0, contents.part_noise(1, 1000))
        failed.append(1)

    monkeypatch.setattr(compaction, "_move", slow_move)
    writer = in_thread(write)
    assert reached.wait(DEADLINE)
    assert zram.statistics().in_flight == ("test",)
    resetter = in_thread(lambda: zram.reset(force=True))
    until(lambda: not zram._gate.init_done)
    go.set()
    for thread in (writer, resetter):
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert failed == [1]
    assert moved == [(0, 0)]
    assert state(zram) == FRESH


def test_a_write_at_the_limit_makes_room_by_compaction_and_is_not_counted_as_failed(zram):
    sparse(zram)
    attributes.set(zram, "mem_limit", str(zram._meta.arena.used))
    opener = zram.open("test")
    for slot in range(0, 2000, 2):
        opener.write(slot * PAGE, contents.part_noise(slot, 1000))
    now = zram.statistics()
    assert now.failed_writes == 0
    assert now.pages_compacted == 1024
    assert now.mem_used_max <= now.mem_limit
    for slot in range(0, 2000, 2):
        assert opener.read(slot * PAGE, PAGE) == contents.part_noise(slot, 1000)


def test_compactions_and_resets_at_once_end_one_another_and_nothing_else(zram):
    over = threading.Event()

    def compact() -> None:
        while not over.is_set():
            try:
                if zram.sparse:
                    zram.compact()
            except (BadValue, NotInitialised):
                pass

    def reset() -> None:
        try:
            for _ in range(15):
                sparse(zram, 2 << 20)
                until(lambda: zram.statistics().pages_compacted > 0)
                zram.reset(force=True)
        finally:
            over.set()

    run_all(compact, compact, reset)
    assert state(zram) == FRESH
    assert open_files() == []


def test_in_every_order_of_two_stops_a_reset_beside_a_compaction_frees_nothing_under_it(
    monkeypatch,
):
    """The gate's meeting is on the explorer's events; the store's locks need no stop."""
    meeting = SimpleNamespace(Event=interleave.Event, Lock=interleave.Lock, local=threading.local)
    seen = set()

    def make():
        zram = Zram("zram7")
        zram.init(32 * PAGE)
        meta = zram._meta
        meta.write(0, b"".join(noise(slot) for slot in range(32)))
        meta.discard(PAGE, 15 * PAGE)
        meta.discard(31 * PAGE, PAGE)

        def compact() -> None:
            try:
                zram.compact()
            except (BadValue, NotInitialised) as error:
                seen.add(type(error))
            else:
                seen.add(None)

        def check() -> None:
            assert meta.arena.map.closed
            assert zram._gate.inside() == []
            assert zram.disksize == 0

        return [compact, lambda: zram.reset(force=True), check]

    monkeypatch.setattr(gate, "threading", meeting)
    files = {device.__file__, gate.__file__, compaction.__file__}
    assert interleave.explore(files, make, stride=10) > 30
    assert seen == {BadValue, NotInitialised, None}
    assert open_files() == []


# Init


@pytest.mark.parametrize("size", [0, -1, -4096])
def test_a_zero_or_negative_disksize_is_einval_and_nothing_is_made(zram, size):
    with pytest.raises(BadValue, match="senseless"):
        zram.init(size)
    assert state(zram) == FRESH
    assert open_files() == []


def test_a_disksize_too_large_is_einval_and_nothing_is_made(zram):
    with pytest.raises(BadValue, match="too large"):
        zram.init((4 << 40) + 1)
    assert state(zram) == FRESH
    assert open_files() == []


def test_an_initialised_device_is_busy_before_anything_is_allocated(zram, monkeypatch):
    def must_not(*_, **__):
        raise AssertionError("something was allocated")

    zram.init(1 << 20)
    meta = zram._meta
    monkeypatch.setattr(device, "Arena", must_not)
    monkeypatch.setattr(device, "Comp", must_not)
    monkeypatch.setattr(device, "Pages", must_not)
    for size in (1 << 20, 4096, 0, -1, 5 << 40):
        with pytest.raises(DeviceBusy) as caught:
            zram.init(size)
        assert "zramd reset zram7" in caught.value.hint
    assert zram._meta is meta


@pytest.mark.parametrize("what", ["Comp", "Arena", "Pages"])
@pytest.mark.parametrize("error", [MemoryError, NoMemory("none left")])
def test_no_memory_rolls_all_back_and_the_next_try_succeeds(zram, monkeypatch, what, error):
    def refuse(*_, **__):
        raise error

    attributes.set(zram, "comp_algorithm", "zstd(level=3)")
    attributes.set(zram, "mem_limit", "1M")
    before = state(zram)
    with monkeypatch.context() as patch:
        patch.setattr(device, what, refuse)
        with pytest.raises(NoMemory):
            zram.init(1 << 20)
    assert state(zram) == before
    assert open_files() == []
    with pytest.raises(NotInitialised):
        zram.open("test")
    zram.init(1 << 20)
    assert zram.statistics().algorithm == "zstd(level=3)"
    assert zram.statistics().mem_limit == 1 << 20
    zram.open("test").write(0, b"x")


def test_under_rlimit_as_init_is_no_memory_and_the_process_goes_on():
    script = """
import os, resource
from zramd.device import Zram
from zramd.errors import NoMemory

def files():
    return sorted(os.listdir("/proc/self/fd"))

zram = Zram("z")
zram.init(1 << 20)
zram.reset()
before = files(), zram.statistics()
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, resource.RLIM_INFINITY))
for size in (1 << 30, 1 << 40, 4 << 40):
    try:
        zram.init(size)
    except NoMemory as error:
        assert error.errno == 12
        assert "RLIMIT_AS" in error.hint
    else:
        raise SystemExit("init went through")
    assert (files(), zram.statistics()) == before
zram.init(1 << 20)
opener = zram.open("test")
opener.write(5, b"still here")
assert opener.read(5, 10) == b"still here"
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert (done.stdout, done.stderr) == ("done\n", "")


# I/O


@pytest.fixture
def opener(zram) -> Opener:
    zram.init(1 << 20)
    return zram.open("test")


REQUESTS = {
    "read": lambda opener, offset, length: opener.read(offset, length),
    "parts": lambda opener, offset, length: opener.parts(offset, length),
    "write": lambda opener, offset, length: opener.write(offset, bytes(length)),
    "discard": lambda opener, offset, length: opener.discard(offset, length),
    "zero": lambda opener, offset, length: opener.zero(offset, length),
    "extents": lambda opener, offset, length: opener.extents(offset, length, 10),
}
SIZE = 1 << 20


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize(
    ("offset", "length"),
    [
        *((SIZE, 1), (SIZE - 1, 2), (0, SIZE + 1), (SIZE + 1, 0), (1 << 70, 1)),
        *((-1, 1), (-PAGE, PAGE), (-1, 0)),
    ],
)
def test_io_out_of_range_is_einval_and_counted(zram, opener, request_name, offset, length):
    with pytest.raises(OutOfRange):
        REQUESTS[request_name](opener, offset, length)
    assert zram.statistics().invalid_io == 1
    assert attributes.get(zram, "io_stat").split() == ["0", "0", "1", "0"]
    assert zram._gate.inside() == []


@pytest.mark.parametrize("request_name", REQUESTS.keys() - {"write"})
def test_a_negative_length_is_out_of_range(opener, request_name):
    with pytest.raises(OutOfRange):
        REQUESTS[request_name](opener, 10, -1)


@pytest.mark.parametrize("request_name", REQUESTS)
def test_io_at_the_very_edge_is_in_range(zram, opener, request_name):
    for offset, length in ((0, SIZE), (SIZE, 0), (SIZE - 1, 1), (0, 0)):
        REQUESTS[request_name](opener, offset, length)
    assert zram.statistics().invalid_io == 0


@pytest.mark.parametrize("request_name", REQUESTS)
@pytest.mark.parametrize("again", [False, True])
def test_io_after_a_forced_reset_is_eio_also_when_the_device_is_initialised_again(
    zram, opener, request_name, again
):
    zram.reset(force=True)
    if again:
        zram.init(SIZE)
    with pytest.raises(NotInitialised):
        REQUESTS[request_name](opener, 0, PAGE)
    with pytest.raises(NotInitialised):
        REQUESTS[request_name](opener, SIZE, 1)
    assert zram._gate.inside() == []
    assert attributes.get(zram, "io_stat") == FRESH["io_stat"], "not the next generation's counters"
    opener.close()


def test_a_flush_after_a_forced_reset_is_eio_too(zram, opener):
    """What it should have made safe is gone."""
    opener.flush()
    zram.reset(force=True)
    with pytest.raises(NotInitialised):
        opener.flush()
    zram.init(SIZE)
    with pytest.raises(NotInitialised):
        opener.flush()
    zram.open("new").flush()
    assert zram._gate.inside() == []


def test_a_device_without_disksize_cannot_be_opened(zram):
    with pytest.raises(NotInitialised) as caught:
        zram.open("test")
    assert caught.value.errno == errno.EIO
    assert "disksize" in caught.value.hint


def test_openers_know_their_size_and_are_listed_until_they_close(zram):
    zram.init(10_000)
    first, second = zram.open("connection 1"), zram.open("connection 2")
    assert first.size == second.size == 3 * PAGE == zram.disksize
    assert zram.statistics().openers == ("connection 1", "connection 2")
    first.close()
    first.close()
    assert zram.statistics().openers == ("connection 2",)


def test_discards_and_zeroes_count_the_slots_they_freed(zram, opener):
    opener.write(0, noise(1) * 4)
    opener.discard(10, 3 * PAGE)
    opener.zero(10, 2 * PAGE)
    opener.discard(10, 10)
    assert zram.statistics().notify_free == 2 + 1


def test_failed_reads_and_writes_are_counted(zram, opener):
    opener.write(0, contents.text(1))
    arena = zram._meta.arena
    address = table.address_of(arena.table[0])
    arena.map[address : address + 100] = b"\xff" * 100
    with pytest.raises(Corrupt):
        opener.read(0, 10)
    with pytest.raises(Corrupt):
        opener.parts(0, 10)
    with pytest.raises(Corrupt):
        opener.write(1, b"x")
    with pytest.raises(Corrupt):
        opener.zero(1, 1)
    attributes.set(zram, "mem_limit", "4K")
    with pytest.raises(StoreFull):
        opener.write(0, noise(1))
    assert attributes.get(zram, "io_stat").split() == ["2", "3", "0", "0"]


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SystemExit])
def test_whatever_a_compressor_raises_the_request_leaves_the_gate(zram, opener, error):
    def fail() -> None:
        raise error

    zram._meta.comp = codec = Codec()
    codec.hook = fail
    with pytest.raises(error):
        opener.write(0, noise(1))
    assert zram._gate.inside() == []
    zram.reset(force=True)


def test_two_requests_that_count_at_once_are_both_counted():
    def make():
        counts = IoCounts(_lock=interleave.Lock())

        def check() -> None:
            assert counts == IoCounts(failed_writes=2, notify_free=2)

        def count() -> None:
            counts.add(failed_writes=1, notify_free=1)

        return [count, count, check]

    assert interleave.explore({opener_module.__file__}, make) > 50


def test_a_closed_opener_is_of_no_more_use_and_closing_it_again_is_harmless(zram, opener):
    opener.close()
    opener.close()
    for use in (
        lambda: opener.read(0, 1),
        lambda: opener.write(0, b"x"),
        lambda: opener.discard(0, PAGE),
        lambda: opener.zero(0, PAGE),
        lambda: opener.extents(0, PAGE, 1),
    ):
        with pytest.raises(NotInitialised):
            use()
    zram.reset()


def test_a_device_cannot_be_opened_before_its_gate_is(zram, monkeypatch):
    tried = []

    def open_too_early() -> None:
        with pytest.raises(NotInitialised):
            zram.open("too early")
        tried.append(zram._meta)

    with monkeypatch.context() as patch:
        patch.setattr(zram._gate, "open", open_too_early)
        zram.init(PAGE)
    assert tried == [zram._meta] != [None]
    zram._gate.open()


def test_the_lowered_mem_limit_of_a_reserve_can_be_raised_to_what_it_was_and_no_higher(zram):
    attributes.set(zram, "prealloc", "1")
    attributes.set(zram, "mem_limit", "5000K")
    zram.init(16 << 20)
    assert zram.statistics().mem_reserved < 5000 << 10  # whole spans
    attributes.set(zram, "mem_limit", "2M")
    attributes.set(zram, "mem_limit", "5000K")
    assert attributes.get(zram, "mem_limit") == str(5000 << 10)
    for refused in (str((5000 << 10) + 1), "0"):
        with pytest.raises(BadValue, match=r"has 4\.9M preallocated"):
            attributes.set(zram, "mem_limit", refused)
    assert zram.statistics().mem_limit == 5000 << 10


# Reset


def test_reset_brings_back_the_state_before_init(zram):
    attributes.set(zram, "comp_algorithm", "deflate(level=9)")
    attributes.set(zram, "mem_limit", "1M")
    zram.init(1 << 20)
    opener = zram.open("test")
    opener.write(0, noise(1) * 3)
    opener.discard(0, PAGE)
    with pytest.raises(OutOfRange):
        opener.read(1 << 20, 1)
    opener.close()
    zram.reset()
    assert state(zram) == FRESH
    assert zram.statistics().algorithm == "lz4"
    assert open_files() == []
    zram.init(1 << 20)
    assert zram.open("test").read(0, 1 << 20) == bytes(1 << 20)


def test_reset_works_before_init_too(zram):
    attributes.set(zram, "comp_algorithm", "zstd")
    attributes.set(zram, "mem_limit", "1M")
    attributes.set(zram, "reset", "1")
    assert state(zram) == FRESH


def test_reset_of_an_open_device_is_busy_names_the_openers_and_changes_nothing(zram):
    attributes.set(zram, "mem_limit", "1M")
    zram.init(1 << 20)
    opener, other = zram.open("nbd connection 5"), zram.open("nbdkit handle 3")
    opener.write(0, noise(1))
    before = state(zram)
    for reset in (zram.reset, lambda: attributes.set(zram, "reset", "1")):
        with pytest.raises(DeviceBusy, match=r"nbd connection 5, nbdkit handle 3") as caught:
            reset()
        assert caught.value.errno == errno.EBUSY
        assert "zramd reset zram7 --force" in caught.value.hint
    assert state(zram) == before
    assert opener.read(0, PAGE) == noise(1)
    zram.open("one more").close()
    opener.close()
    other.close()
    zram.reset()


def test_a_forced_reset_tells_the_servers_when_all_is_freed_and_nobody_can_have_come_anew(zram):
    told = []

    def tell() -> None:
        assert not zram._init_lock.locked()
        assert meta.arena.map.closed
        zram.init(1 << 20)
        with pytest.raises(DeviceBusy, match="being reset"):
            zram.open("too early")
        told.append(opener.closed)

    zram.init(4096)
    meta = zram._meta
    zram.on_reset.append(tell)
    opener = zram.open("test")
    with pytest.raises(DeviceBusy):
        zram.reset()
    assert told == []
    zram.reset(force=True)
    assert told == [True]
    assert zram.open("in time").size == 1 << 20
    zram.on_reset.clear()


def test_who_keeps_an_opener_of_before_keeps_nothing_of_what_was_reset(zram, opener):
    """Not the pool's account of it, and not the compressor's streams, of whatever thread."""

    class Stream:
        def __getitem__(self, which):
            return lambda page, *_: bytes(page[:50])

    streams = []

    def make(_level):
        stream = Stream()
        streams.append(weakref.ref(stream))
        return stream

    meta = zram._meta
    meta.comp.close()
    meta.comp._make = make
    written, over = threading.Event(), threading.Event()

    def write_and_stay() -> None:
        opener.write(0, noise(1))
        written.set()
        over.wait(DEADLINE)

    thread = in_thread(write_and_stay)
    assert written.wait(DEADLINE)
    opener.write(PAGE, noise(2))
    assert [stream() is None for stream in streams] == [False, False]
    assert meta.pool.spans
    zram.reset(force=True)
    assert thread.is_alive()
    assert [stream() is None for stream in streams] == [True, True]
    assert meta.pool.spans == {}
    assert not meta.pool._partial
    over.set()
    thread.join(DEADLINE)


def test_a_reset_that_closes_nobody_tells_nobody(zram):
    zram.on_reset.append(lambda: pytest.fail("told"))
    zram.reset()
    zram.init(4096)
    zram.open("gone before").close()
    zram.reset(force=True)


def test_a_second_reset_is_busy_and_names_whom_the_first_waits_for_unless_forced(zram, opener):
    zram._meta.comp = held = Held()
    writer = in_thread(lambda: opener.write(0, noise(1)))
    assert held.reached.wait(DEADLINE)
    resetter = in_thread(lambda: zram.reset(force=True))
    until(lambda: not zram._gate.init_done)
    with pytest.raises(DeviceBusy, match=r"being reset and waits for requests of test$"):
        zram.reset()
    assert zram.statistics().in_flight == ("test",)
    second = in_thread(lambda: zram.reset(force=True))
    assert second.is_alive()
    held.go.set()
    for thread in (writer, resetter, second):
        thread.join(DEADLINE)
        assert not thread.is_alive()
    assert state(zram) == FRESH
    assert zram.statistics().in_flight == ()


def test_a_reset_interrupted_while_it_waits_changes_nothing(zram, opener, monkeypatch):
    opener.write(0, noise(1))
    before = state(zram)

    def interrupted() -> None:
        with pytest.raises(NotInitialised):
            opener.read(0, PAGE)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(zram._gate, "drain", interrupted)
        with pytest.raises(KeyboardInterrupt):
            zram.reset(force=True)
    assert opener.read(0, PAGE) == noise(1)
    assert state(zram) == before
    zram.open("another").close()
    zram.reset(force=True)


class Held(Codec):
    """A compressor that stops, in reads and in writes, until it is told to go on; or to fail."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        self.go = threading.Event()
        self.fails = False
        self.hook = self.hook_of_reads = self.hold

    def hold(self) -> None:
        self.reached.set()
        assert self.go.wait(DEADLINE)
        if self.fails:
            raise RuntimeError


def in_thread(job: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=job, daemon=True)
    thread.start()
    return thread


HELD = {
    "a write": lambda opener: opener.write(0, noise(1)),
    "a write of a part": lambda opener: opener.write(1, noise(1)[1:]),
    "a read": lambda opener: opener.read(0, PAGE),
    "a read of a part": lambda opener: opener.read(5, 10),
    "a zero of a part": lambda opener: opener.zero(0, 10),
}


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "fails"])
@pytest.mark.parametrize("job", HELD)
def test_reset_waits_for_the_request_inside_and_frees_nothing_before(zram, opener, job, fails):
    meta = zram._meta
    meta.comp = held = Held()
    held.go.set()
    opener.write(0, noise(2))
    held.go.clear()
    held.reached.clear()
    held.fails = fails
    results = []

    def request() -> None:
        try:
            HELD[job](opener)
        except RuntimeError:
            assert fails
        results.append("done")

    writer = in_thread(request)
    assert held.reached.wait(DEADLINE)
    resetter = in_thread(lambda: (zram.reset(force=True), results.append("reset")))
    until(lambda: not zram._gate.init_done)

    assert zram._meta is meta
    assert not meta.arena.map.closed
    assert zram._gate.inside() == ["test"]
    assert zram.statistics().openers == ("test",)
    with pytest.raises(NotInitialised):
        opener.read(0, 1)
    with pytest.raises(DeviceBusy, match="being reset"):
        zram.open("newcomer")
    assert results == []
    assert resetter.is_alive()

    held.go.set()
    resetter.join(DEADLINE)
    writer.join(DEADLINE)
    assert sorted(results) == ["done", "reset"]
    assert meta.arena.map.closed
    assert state(zram) == FRESH
    zram.init(4096)
    assert zram.open("newcomer").read(0, PAGE) == ZEROS


def test_a_hundred_readers_that_overlap_cannot_starve_a_reset(zram, opener):
    """Each stays in the codec until another has come in after it, so at no moment before the reset
    is nobody inside."""
    opener.write(0, noise(1))
    came = 0
    changed = threading.Condition()
    zram._meta.comp = codec = Codec()
    opener.write(0, noise(1))

    def overlap() -> None:
        nonlocal came
        with changed:
            came += 1
            mine = came
            changed.notify_all()
            closed = lambda: not zram._gate.init_done  # noqa: E731
            while not (came > mine or closed()):
                changed.wait(0.01)  # the gate tells nobody that it closes

    codec.hook_of_reads = overlap
    refused = []

    def read() -> None:
        try:
            while True:
                opener.read(0, PAGE)
        except NotInitialised:
            refused.append(1)

    readers = [in_thread(read) for _ in range(100)]
    until(lambda: came > 300)
    zram.reset(force=True)
    for reader in readers:
        reader.join(DEADLINE)
        assert not reader.is_alive()
    assert len(refused) == 100


def test_an_init_during_a_reset_waits_so_two_tables_never_exist_at_once(zram, opener, monkeypatch):
    first = zram._meta
    first.comp = held = Held()
    made = []
    make = device.Arena

    def arena(*args, **options):
        assert first.arena.map.closed, "the old table is still there"
        made.append(make(*args, **options))
        return made[-1]

    monkeypatch.setattr(device, "Arena", arena)
    writer = in_thread(lambda: opener.write(0, noise(1)))
    assert held.reached.wait(DEADLINE)
    resetter = in_thread(lambda: zram.reset(force=True))
    until(lambda: not zram._gate.init_done)
    initer = in_thread(lambda: zram.init(8192))
    held.go.set()
    for thread in (writer, resetter, initer):
        thread.join(DEADLINE)
        assert not thread.is_alive()
    # Whoever came first: init found the device free, or initialised still.
    assert zram.disksize == 8192
    assert len(made) == 1


def test_statistics_and_attributes_can_be_read_while_a_reset_waits(zram, opener):
    zram._meta.comp = held = Held()
    writer = in_thread(lambda: opener.write(0, noise(1)))
    assert held.reached.wait(DEADLINE)
    resetter = in_thread(lambda: zram.reset(force=True))
    until(lambda: not zram._gate.init_done)
    for attribute in READABLE:
        attributes.get(zram, attribute)
    assert zram.statistics().disksize == 0
    held.go.set()
    writer.join(DEADLINE)
    resetter.join(DEADLINE)


def test_a_reset_that_fails_lets_go_of_its_claim(zram, monkeypatch):
    def fail(self, *, keep: bool) -> None:
        raise RuntimeError

    zram.init(4096)
    with monkeypatch.context() as patch:
        patch.setattr(Pages, "close", fail)
        meta = zram._meta
        with pytest.raises(RuntimeError):
            zram.reset()
    meta.close()
    zram.reset()
    zram.init(4096)
    zram.open("test")


@pytest.mark.parametrize("algorithm", ["lz4", "zstd"])
def test_threads_that_hammer_a_device_while_it_is_reset_get_eio_or_right_data(zram, algorithm):
    slots, resets = 40, 25
    generation = 0
    over = threading.Event()

    def init() -> None:
        nonlocal generation
        generation += 1
        attributes.set(zram, "comp_algorithm", algorithm)
        zram.init(600 * PAGE)

    def open_one() -> tuple[Opener, int] | None:
        # A generation is known only when it is the same on both sides of the open.
        before = generation
        try:
            opener = zram.open("hammer")
        except (NotInitialised, DeviceBusy):
            return None
        return (opener, before) if generation == before else None

    def hammer(writer: int) -> None:
        number = 0
        while not over.is_set():
            opened = open_one()
            if opened is None:
                continue
            opener, mine = opened
            try:
                while not over.is_set():
                    number += 1
                    slot = (number * 7 + writer) % slots
                    if number % 5 == 0:
                        opener.discard(slot * PAGE, 3 * PAGE)
                    else:
                        opener.write(slot * PAGE, tagged(slot, writer, number, mine))
                    page = opener.read(slot * PAGE, PAGE)
                    tag = tag_of(page)
                    assert tag is None or (tag[0], tag[3]) == (slot, mine), "another generation"
            except NotInitialised:
                opener.close()

    def reset() -> None:
        try:
            for _ in range(resets):
                until(lambda: zram.statistics().orig_data_size > 0)
                zram.reset(force=True)
                assert zram._meta is None
                init()
        finally:
            over.set()

    init()
    run_all(*(lambda writer=writer: hammer(writer) for writer in range(3)), reset)
    assert zram._gate.inside() == []
    audit(zram._meta)
    assert len(open_files()) == 2


# Any history, against a bytearray


# Arenas that outlive their process


class Keeper:
    """What a supervisor is to a device: it holds the arena's descriptor."""

    def __init__(self, zram: Zram) -> None:
        self.fd = -1
        self.told: list[bool] = []
        zram.on_arena = self.on_arena

    def on_arena(self, fd: int | None) -> None:
        self.told.append(fd is not None)
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1 if fd is None else os.dup(fd)


def used_device(zram: Zram) -> None:
    """With figures in every counter."""
    attributes.set(zram, "comp_algorithm", "zstd")
    attributes.set(zram, "algorithm_params", "level=7")
    attributes.set(zram, "mem_limit", "8M")
    zram.init(16 << 20)
    opener = zram.open("test")
    opener.write(0, b"".join(map(noise, range(100))) + contents.text(1) + contents.filled(7))
    for slot in range(1, 100, 2):
        opener.discard(slot * PAGE, PAGE)
    opener.write(16 * PAGE, contents.text(2))
    zram.compact()
    with pytest.raises(OutOfRange):
        opener.read(1 << 40, 1)
    with pytest.raises(StoreFull):
        opener.write(2 << 20, b"".join(map(noise, range(3000))))
    meta = zram._meta
    assert meta is not None
    word = meta.arena.table[0]
    meta.arena.table[0] = table.LOST
    with pytest.raises(Corrupt):
        opener.read(0, PAGE)
    meta.arena.table[0] = word
    opener.close()


def test_an_adopted_device_is_the_one_that_was(zram):
    keeper = Keeper(zram)
    used_device(zram)
    assert keeper.told == [True]
    before, content = zram.statistics(), zram._meta.read(0, 16 << 20)
    assert min(before.failed_reads, before.failed_writes, before.invalid_io) == 1
    assert min(before.notify_free, before.pages_compacted, before.huge_pages_since) > 0
    heir = Zram("zram7")
    told = []
    heir.on_arena = told.append
    assert heir.adopt(os.dup(keeper.fd)) == []
    after = heir.statistics()
    assert after == replace(before, mem_used_total=after.mem_used_total)
    assert after.mem_used_total <= before.mem_used_total
    for attribute in READABLE:
        if attribute != "mm_stat":
            assert attributes.get(heir, attribute) == attributes.get(zram, attribute)
    opener = heir.open("test")
    assert opener.read(0, 16 << 20) == content
    opener.discard(0, PAGE)
    assert heir.statistics().notify_free == before.notify_free + 1
    audit(heir._meta, snug=False)
    with pytest.raises(DeviceBusy, match="initialised already"):
        heir.adopt(keeper.fd)
    assert told == []
    heir.reset(force=True)
    assert told == [None]
    assert heir.statistics().notify_free == 0
    zram.reset(force=True)
    assert keeper.told == [True, False]
    assert open_files() == []


def test_limits_and_a_lowered_peak_outlive_the_process(zram):
    keeper = Keeper(zram)
    attributes.set(zram, "mem_limit", "8M")
    zram.init(16 << 20)
    opener = zram.open("test")
    opener.write(0, noise(1) * 500)
    opener.discard(0, 400 * PAGE)
    opener.close()
    attributes.set(zram, "mem_limit", "5M")
    attributes.set(zram, "mem_used_max", "0")
    heir = Zram("zram7")
    heir.adopt(os.dup(keeper.fd))
    assert attributes.get(heir, "mem_limit") == str(5 << 20)
    assert attributes.get(heir, "mem_used_max") == attributes.get(zram, "mem_used_max")
    attributes.set(heir, "mem_limit", "0")
    heir.close()
    heir.adopt(os.dup(keeper.fd))
    assert attributes.get(heir, "mem_limit") == "0"
    heir.close()


def test_a_reserve_is_one_again_with_the_limit_that_it_was_made_with(zram):
    keeper = Keeper(zram)
    attributes.set(zram, "prealloc", "1")
    attributes.set(zram, "mem_limit", "8M")
    zram.init(64 << 20)
    zram.open("test").write(0, noise(1) * 100)
    attributes.set(zram, "mem_limit", "6M")
    before = zram.statistics()
    heir = Zram("zram7")
    assert heir.adopt(os.dup(keeper.fd)) == []
    after = heir.statistics()
    assert (after.mem_reserved, after.mem_limit) == (before.mem_reserved, 6 << 20)
    assert attributes.get(heir, "prealloc") == "1"
    with pytest.raises(BadValue, match="8M preallocated"):
        attributes.set(heir, "mem_limit", "9M")
    attributes.set(heir, "mem_limit", "8M")
    assert heir.open("test").read(0, 100 * PAGE) == noise(1) * 100
    audit(heir._meta)
    heir.close()


def test_an_adopted_device_reports_what_is_lost_and_counts_reads_of_it(zram):
    keeper = Keeper(zram)
    zram.init(1 << 20)
    opener = zram.open("test")
    opener.write(0, noise(1) * 9)
    zram._meta.arena.table[4] ^= 0x80
    heir = Zram("zram7")
    assert heir.adopt(os.dup(keeper.fd)) == [4]
    opener = heir.open("test")
    with pytest.raises(Corrupt):
        opener.read(0, 9 * PAGE)
    with pytest.raises(Corrupt):
        opener.write(4 * PAGE + 1, b"x")
    now = heir.statistics()
    assert (now.failed_reads, now.failed_writes) == (1, 1)
    opener.write(4 * PAGE, noise(1))
    assert opener.read(0, 9 * PAGE) == noise(1) * 9
    heir.close()


def test_what_cannot_be_adopted_leaves_the_device_as_it_was_and_the_callers_descriptor(zram):
    attributes.set(zram, "comp_algorithm", "zstd")
    fd = os.memfd_create("nothing")
    with pytest.raises(BadArena):
        zram.adopt(fd)
    os.fstat(fd)
    os.close(fd)
    unknown = Arena(PAGE, "snappy")
    with pytest.raises(BadValue, match="no algorithm 'snappy'"):
        zram.adopt(unknown.fd)
    os.fstat(unknown.fd)
    unknown.close()
    assert open_files() == []
    assert (zram.disksize, attributes.get(zram, "comp_algorithm")) == (
        0,
        "lz4 lz4hc [zstd] deflate",
    )
    with pytest.raises(NotInitialised):
        zram.open("test")
    zram.init(PAGE)


def test_the_keeper_is_told_before_anybody_can_write_and_after_all_is_freed(zram):
    seen = []

    def on_arena(fd: int | None) -> None:
        assert fd is None or os.pread(fd, 5, 0) == b"zramd"
        seen.append((zram._meta, zram._gate.init_done, len(open_files())))

    zram.on_arena = on_arena
    zram.reset()
    zram.init(PAGE)
    zram.reset()
    assert seen == [(None, False, 2), (None, False, 0)]


def test_an_init_whose_keeper_refuses_leaves_the_device_as_it_was(zram):
    def refuse(fd: int | None) -> None:
        raise OSError("nobody is there")

    zram.on_arena = refuse
    with pytest.raises(OSError, match="nobody is there"):
        zram.init(PAGE)
    assert (zram.disksize, zram._meta, open_files()) == (0, None, [])
    zram.on_arena = lambda fd: None
    zram.init(PAGE)


class DeviceAgainstBytearray(RuleBasedStateMachine):
    """Openers of this generation and of older ones, attributes in any order, right or refused."""

    SIZES = (PAGE, 30 * PAGE, 513 * PAGE, 600 * PAGE)

    @initialize()
    def begin(self) -> None:
        self.zram = Zram("zram1")
        self.model: Model | None = None
        self.openers: list[Opener] = []
        self.stale: list[Opener] = []
        self.algorithm, self.limit = "lz4", 0
        self.io = [0, 0, 0, 0]

    @rule(size=st.sampled_from(SIZES), short=st.integers(0, PAGE - 1))
    def init(self, size: int, short: int) -> None:
        if self.model is None:
            attributes.set(self.zram, "disksize", str(size - short))
            self.model = Model(size)
        else:
            with pytest.raises(DeviceBusy):
                self.zram.init(size)

    @rule(bad=st.sampled_from([0, -1, 1 << 60]))
    def init_with_nonsense(self, bad: int) -> None:
        with pytest.raises(DeviceBusy if self.model else BadValue):
            self.zram.init(bad)

    @rule(algorithm=st.sampled_from(["lz4", "zstd", "zstd(level=1)", "lz4hc", "deflate"]))
    def choose(self, algorithm: str) -> None:
        if self.model is None:
            attributes.set(self.zram, "comp_algorithm", algorithm)
            self.algorithm = algorithm
        else:
            with pytest.raises(DeviceBusy):
                attributes.set(self.zram, "comp_algorithm", algorithm)

    @rule(spans=st.integers(0, 4), more=st.integers(0, 5 * PAGE))
    def limit_memory(self, spans: int, more: int) -> None:
        limit = spans * SPAN + more
        attributes.set(self.zram, "mem_limit", str(limit))
        self.limit = -(-limit // PAGE) * PAGE

    @rule()
    def compact(self) -> None:
        if self.model is None:
            with pytest.raises(BadValue):
                self.zram.compact()
        else:
            attributes.set(self.zram, "compact", "1")
            assert not self.zram.sparse

    @rule()
    def lift_the_limit(self) -> None:
        self.limit_memory(0, 0)

    @rule()
    def open(self) -> None:
        if self.model is None:
            with pytest.raises(NotInitialised):
                self.zram.open("too early")
        else:
            self.openers.append(self.zram.open(f"opener {len(self.openers)}"))

    @rule(which=st.integers(0, 9))
    def close(self, which: int) -> None:
        if self.openers:
            self.openers.pop(which % len(self.openers)).close()

    @rule(force=st.booleans())
    def reset(self, force: bool) -> None:
        if self.openers and not force:
            with pytest.raises(DeviceBusy):
                self.zram.reset()
            return
        self.zram.reset(force=force)
        self.stale += self.openers
        self.openers, self.model = [], None
        self.algorithm, self.limit = "lz4", 0
        self.io = [0, 0, 0, 0]

    @rule(which=st.integers(0, 9), name=st.sampled_from(sorted(REQUESTS)))
    def use_an_opener_of_before(self, which: int, name: str) -> None:
        if self.stale:
            with pytest.raises(NotInitialised):
                REQUESTS[name](self.stale[which % len(self.stale)], 0, PAGE)

    @rule(
        name=st.sampled_from(sorted(REQUESTS)),
        before=st.integers(0, PAGE),
        past=st.integers(1, PAGE),
    )
    def reach_beyond_the_end(self, name: str, before: int, past: int) -> None:
        if self.openers:
            opener = self.openers[-1]
            with pytest.raises(OutOfRange):
                REQUESTS[name](opener, opener.size - before, before + past)
            self.io[2] += 1

    @rule(data=contents.pieces(), at=st.integers(0, 40 * PAGE), from_end=st.booleans())
    def write(self, data: bytes, at: int, from_end: bool) -> None:
        if self.openers and self.model:
            opener = self.openers[len(data) % len(self.openers)]
            data = data[: opener.size]
            room = opener.size - len(data)
            offset = room - min(at, room) if from_end else min(at, room)
            try:
                opener.write(offset, data)
            except StoreFull:
                assert self.limit
                self.io[1] += 1
                self.model.write_failed(offset, data, opener.read(offset, len(data)))
            else:
                self.model.write(offset, data)

    @rule(at=st.integers(0, 600 * PAGE), length=st.integers(0, 20 * PAGE), free=st.booleans())
    def discard_or_zero(self, at: int, length: int, free: bool) -> None:
        if self.openers and self.model:
            opener = self.openers[at % len(self.openers)]
            length = min(length, opener.size)
            offset = min(at, opener.size - length)
            if free:
                opener.discard(offset, length)
                self.io[3] += self.model.discard(offset, length)
                return
            try:
                opener.zero(offset, length)
            except StoreFull:
                assert self.limit
                self.io[1] += 1
                self.model.zero_failed(offset, length, opener.read(offset, length))
            else:
                first, last = whole_pages(offset, length)
                self.io[3] += (last - first) // PAGE
                self.model.zero(offset, length)

    @rule(at=st.integers(0, 600 * PAGE), length=st.integers(0, 600 * PAGE))
    def look(self, at: int, length: int) -> None:
        if self.openers and self.model:
            opener = self.openers[-1]
            length = min(length, opener.size)
            at = min(at, opener.size - length)
            content = self.model.content[at : at + length]
            assert opener.read(at, length) == content
            extents = opener.extents(at, length, length)
            extents_agree(content, extents)
            first = next(groupby(extents, lambda run: min(run[1], Kind.SAME)), (None, ()))[1]
            assert opener.extents(at, length, length, alike=True) == list(first)

    @invariant()
    def statistics_are_right(self) -> None:
        now = self.zram.statistics()
        assert now.openers == tuple(opener.who for opener in self.openers)
        assert (now.algorithm, now.mem_limit) == (self.algorithm, self.limit)
        io = [now.failed_reads, now.failed_writes, now.invalid_io, now.notify_free]
        assert io == self.io
        assert now.disksize == self.zram.disksize
        if self.model is None:
            assert attributes.get(self.zram, "mm_stat").split()[:3] == ["0", "0", "0"]
            assert now.disksize == 0
            return
        meta = self.zram._meta
        assert meta is not None
        counted = audit(meta, snug=False)
        assert now.disksize == len(self.model.content)
        assert now.orig_data_size == counted.pages * PAGE
        assert now.compr_data_size == counted.compressed_bytes
        assert now.mem_used_total == meta.arena.used
        assert now.pages_compacted == counted.compacted
        assert (now.same_pages, now.huge_pages) == (counted.same, counted.huge)
        assert meta.read(0, now.disksize) == self.model.content

    def teardown(self) -> None:
        if hasattr(self, "zram"):
            self.zram.close()
            assert open_files() == []


TestDeviceAgainstBytearray = DeviceAgainstBytearray.TestCase


def test_every_error_a_device_raises_is_one_of_ours(zram):
    """No plain ValueError or KeyError for whatever text comes in."""
    for attribute in WRITABLE:
        for value in ("\0", "\n", " ", "%", "\ud800", "1" * 100, "level=\u0663", "1e400", "NaN"):
            try:
                attributes.set(zram, attribute, value)
            except ZramdError:
                pass
            zram.reset()

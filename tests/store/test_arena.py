"""The arena: what it charges, gives back, refuses and leaves behind."""

import os
import re
import resource
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest

from tests.conftest import require
from zramd.errors import BadValue, NoMemory, StoreFull
from zramd.store import PAGE, arena
from zramd.store.arena import MAX_DISKSIZE, SPAN, Arena

ROOT = Path(__file__).parents[2]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_new_arena_occupies_its_header_and_nothing_else():
    new = Arena(64 << 20, "lz4")
    assert new.used == new.used_max == new.resident() == PAGE
    new.close()


def test_the_header_names_the_layout_and_comes_magic_last():
    new = Arena(1000 * PAGE, "zstd(level=3)")
    magic, crc, disksize, table_at, map_at, spans_at, spans, reserved, name = struct.unpack(
        "<8sQQQQQQQ64s", os.pread(new.fd, 128, 0)
    )
    assert crc == zlib.crc32(os.pread(new.fd, 112, 16))
    assert (magic, disksize, table_at, reserved) == (b"zramd\0\0\2", 1000 * PAGE, PAGE, 0)
    assert map_at == PAGE + 2 * PAGE  # 1000 words of 8 bytes
    assert (spans_at, spans) == (SPAN, 1000 + 4096)
    assert name.rstrip(b"\0") == b"zstd(level=3)"
    assert new.size == os.fstat(new.fd).st_size == spans_at + spans * SPAN
    new.close()


@pytest.mark.parametrize("slots", [1, 511, 512, 513, 4096, 4097, 60000, 1 << 20])
def test_parts_of_an_arena_do_not_overlap(slots):
    new = Arena(slots * PAGE, "lz4")
    table_at, map_at, spans_at, spans = struct.unpack("<QQQQ", os.pread(new.fd, 32, 24))
    table_end = table_at + len(new.table_pages.occupied) * PAGE
    map_end = map_at + len(new.map_pages.occupied) * PAGE
    assert table_at + slots * 8 <= table_end <= map_at
    assert map_at + spans <= map_end
    assert map_at + spans <= spans_at
    assert spans_at % SPAN == 0
    assert len(new.table) == new.slots == slots
    assert len(new.span_map) == spans
    new.close()


def test_the_last_page_of_the_span_map_does_not_reach_into_the_spans():
    for slots in (1, 4096 * 3, 60000, 61440):
        new = Arena(slots * PAGE, "lz4")
        map_at = PAGE * (1 + len(new.table_pages.occupied))
        assert map_at + len(new.map_pages.occupied) * PAGE <= new.spans_at
        new.close()


def test_used_is_charged_up_to_the_limit_and_a_refusal_charges_nothing():
    new = Arena(PAGE, "lz4", limit=PAGE + SPAN)
    new.occupy(new.spans_at, SPAN)
    with pytest.raises(StoreFull, match="mem_limit of 68K reached") as caught:
        new.occupy(new.spans_at, 1)
    assert caught.value.hint
    assert new.used == new.used_max == PAGE + SPAN
    new.limit = 0
    new.occupy(new.spans_at, 100 * SPAN)
    new.close()


def test_what_is_vacated_is_back_with_the_system_and_reads_as_zeros():
    new = Arena(PAGE, "lz4")
    new.occupy(new.spans_at, SPAN)
    new.map[new.spans_at : new.spans_at + SPAN] = b"x" * SPAN
    assert new.resident() == new.used == PAGE + SPAN
    new.vacate(new.spans_at, SPAN)
    assert new.resident() == new.used == PAGE
    assert os.pread(new.fd, SPAN, new.spans_at) == bytes(SPAN)
    assert new.used_max == PAGE + SPAN
    new.occupy(new.spans_at, PAGE)
    assert new.used_max == PAGE + SPAN
    new.forget_used_max()
    assert new.used_max == 2 * PAGE
    new.close()


def test_memory_is_off_the_account_only_when_it_is_back_with_the_system(monkeypatch):
    new = Arena(PAGE, "lz4")
    new.occupy(new.spans_at, SPAN)
    accounts = []

    punch = new.punch

    def look_and_punch(offset, size):
        accounts.append(new.used)
        punch(offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(new, "punch", look_and_punch)
        new.vacate(new.spans_at, SPAN)
    assert accounts == [PAGE + SPAN]
    assert new.used == PAGE
    new.close()


def test_a_page_of_a_region_is_charged_once_occupied_and_given_back_when_vacated():
    new = Arena(2000 * PAGE, "lz4", limit=2 * PAGE)
    new.table_pages.occupy(3)
    new.table[3 * 512] = 1
    assert new.table_pages.occupied == bytes([0, 0, 0, 1])
    with pytest.raises(StoreFull):
        new.table_pages.occupy(0)
    assert not new.table_pages.occupied[0]
    new.table[3 * 512] = 0
    new.table_pages.vacate(3)
    assert new.table_pages.occupied == bytes(4)
    assert new.resident() == new.used == PAGE
    new.close()


def test_a_closed_arena_has_given_back_its_file_and_its_mapping(tmp_path):
    before = open_files()
    for path in (None, tmp_path / "arena"):
        new = Arena(1 << 30, "lz4", path=path)
        new.close()
        assert new.map.closed
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []


def test_the_largest_device_is_4t_and_a_larger_one_is_senseless():
    Arena(MAX_DISKSIZE, "lz4").close()
    with pytest.raises(BadValue, match="disksize of 4T is too large") as caught:
        Arena(MAX_DISKSIZE + PAGE, "lz4")
    assert "4T" in (caught.value.hint or "")


def test_a_file_of_the_users_is_private_and_is_never_overwritten(tmp_path):
    path = tmp_path / "arena"
    new = Arena(PAGE, "lz4", path=path)
    assert path.stat().st_mode & 0o777 == 0o600
    with pytest.raises(BadValue, match="exists already"):
        Arena(PAGE, "lz4", path=path)
    assert path.exists()
    new.close()
    assert not path.exists()


def test_a_file_that_cannot_be_made_is_no_memory(tmp_path):
    with pytest.raises(NoMemory, match="cannot create the arena"):
        Arena(PAGE, "lz4", path=tmp_path / "no such directory" / "arena")


@pytest.mark.parametrize(
    ("owner", "name", "error"),
    [
        (os, "memfd_create", OSError(24, "Too many open files")),
        (os, "ftruncate", OSError(27, "File too large")),
        (arena.mmap, "mmap", OSError(12, "Cannot allocate memory")),
        (arena.mmap, "mmap", OverflowError("too large")),
        (arena.mmap, "mmap", ValueError("mmap length is too large")),
    ],
)
def test_what_the_system_refuses_is_no_memory_and_leaves_nothing(monkeypatch, owner, name, error):
    def refuse(*_):
        raise error

    before = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, refuse)
        with pytest.raises(NoMemory):
            Arena(PAGE, "lz4")
    assert open_files() == before


def test_a_file_of_the_users_goes_when_its_arena_could_not_be_made(monkeypatch, tmp_path):
    def refuse(*_):
        raise OSError(12, "Cannot allocate memory")

    before = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(arena.mmap, "mmap", refuse)
        with pytest.raises(NoMemory):
            Arena(PAGE, "lz4", path=tmp_path / "arena")
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []


def test_python_out_of_memory_leaves_no_file_behind(monkeypatch, tmp_path: Path):
    def refuse(*_):
        raise MemoryError

    before = open_files()
    with monkeypatch.context() as patch:
        patch.setattr(arena, "Region", refuse)
        with pytest.raises(MemoryError):
            Arena(PAGE, "lz4", path=tmp_path / "arena")
    assert open_files() == before
    assert list(tmp_path.iterdir()) == []


def test_a_host_of_the_other_byte_order_is_refused(monkeypatch):
    monkeypatch.setattr(arena.sys, "byteorder", "big")
    with pytest.raises(BadValue, match="little-endian"):
        Arena(PAGE, "lz4")


# Reserved


def resident_after_writes(new: Arena) -> int:
    new.occupy(new.spans_at, SPAN)
    new.map[new.spans_at : new.spans_at + SPAN] = b"x" * SPAN
    new.vacate(new.spans_at, SPAN)
    return new.resident()


def test_a_reserve_is_in_memory_and_locked_from_the_start_and_stays():
    new = Arena(64 << 20, "lz4", limit=16 << 20, reserve=True)
    try:
        assert new.reserved == new.size == new.resident() <= 16 << 20
        assert new.reserved > (16 << 20) - 2 * SPAN
        assert locked() >= new.reserved
        assert new.used == PAGE
        assert resident_after_writes(new) == new.reserved
        assert new.used == PAGE
    finally:
        new.close()
    assert locked() == 0


def locked() -> int:
    """Bytes of this process that are locked in memory."""
    found = re.search(r"^VmLck:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def test_writing_to_a_reserve_asks_the_system_for_no_page():
    new = Arena(64 << 20, "lz4", limit=16 << 20, reserve=True)
    try:
        whole = new.size - new.spans_at
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for at in range(new.spans_at, new.spans_at + whole, PAGE):
            new.map[at] = 1
        assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 16  # Python's own
    finally:
        new.close()


def test_a_reserve_is_no_larger_than_the_device_can_need():
    new = Arena(1 << 20, "lz4", limit=1 << 30, reserve=True)
    assert new.reserved < 10 << 20
    new.close()


def test_a_reserve_has_as_many_spans_as_fit():
    new = Arena(64 << 20, "lz4", limit=16 << 20, reserve=True)
    assert new.spans == len(new.span_map)
    assert new.spans_at + (new.spans + 1) * SPAN > 16 << 20
    new.close()


def test_a_reserve_that_the_table_alone_would_fill_is_refused():
    with pytest.raises(BadValue, match=r"1M cannot be reserved for a device of 1G"):
        Arena(1 << 30, "lz4", limit=1 << 20, reserve=True)


def test_a_reserve_that_the_machine_does_not_have_is_refused_before_it_is_taken():
    before = open_files()
    with pytest.raises(NoMemory, match=r"available") as refused:
        Arena(1 << 42, "lz4", limit=1 << 41, reserve=True)
    assert "mem_limit" in str(refused.value.hint)
    assert open_files() == before


def test_a_reserve_that_may_not_be_locked_is_refused():
    """In a process of its own: root's limit on locked memory does not bind."""
    script = """
import ctypes, os, resource
from zramd.errors import NoMemory
from zramd.store.arena import Arena
resource.setrlimit(resource.RLIMIT_MEMLOCK, (1 << 20, 1 << 20))
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
before = os.listdir("/proc/self/fd")
try:
    Arena(64 << 20, "lz4", limit=16 << 20, reserve=True)
except NoMemory as error:
    assert "RLIMIT_MEMLOCK" in error.hint, error.hint
    assert os.listdir("/proc/self/fd") == before
    print("refused")
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout == "refused\n", done.stderr


def test_a_forked_child_can_hold_the_reserve_for_itself():
    new = Arena(64 << 20, "lz4", limit=16 << 20, reserve=True)
    child = os.fork()
    if child == 0:
        unlocked = locked()
        new.hold()
        os._exit(0 if (unlocked, locked() >= new.reserved) == (0, True) else 1)
    try:
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    finally:
        new.close()


def test_a_hole_is_punched_where_all_memory_is_locked_too():
    """As a hardened server has it: MADV_REMOVE would fail there."""
    script = """
import ctypes
from zramd.store.arena import Arena, SPAN
assert ctypes.CDLL(None).mlockall(2 | 4) == 0
new = Arena(64 << 20, "lz4")
new.occupy(new.spans_at, SPAN)
new.map[new.spans_at : new.spans_at + SPAN] = b"x" * SPAN
before = new.resident()
new.vacate(new.spans_at, SPAN)
print(before - new.resident())
"""
    require.root()
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.stdout == f"{SPAN}\n", done.stderr


def test_where_all_that_is_mapped_is_locked_the_limit_on_that_is_named():
    script = """
import ctypes, os, resource
from zramd.errors import NoMemory
from zramd.store.arena import Arena
resource.setrlimit(resource.RLIMIT_MEMLOCK, (4 << 20, 4 << 20))
if os.geteuid() == 0:
    os.setgid(65534), os.setuid(65534)
assert ctypes.CDLL(None).mlockall(2 | 4) == 0
try:
    Arena(64 << 20, "lz4")
except NoMemory as error:
    print(error.hint)
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert "raise RLIMIT_MEMLOCK" in done.stdout, done.stderr
    assert "RLIMIT_AS" not in done.stdout

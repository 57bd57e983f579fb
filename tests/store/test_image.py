"""Snapshots and arena files: what is taken for good is as it was, all else is refused, unchanged.

Arena files lie on a tmpfs: an ext4 counts blocks of its own among a file's, which the audit of what
the arena occupies does not know.
"""

import functools
import os
import random
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from xxhash import xxh3_64_intdigest

import zramd.store.image
from tests.conftest import require
from tests.store import contents
from tests.store.audit import audit
from tests.store.contents import ZEROS, filled, noise, part_noise, text
from tests.store.stores import (
    MIB,
    SLOTS,
    Journal,
    clone,
    fork,
    killed,
    pages_of,
    some_of_all,
    store,
    use_up,
    work_for_ever,
)
from tests.store.test_pages_model import ALGORITHMS
from zramd import attributes
from zramd.device import Zram
from zramd.errors import BadArena, BadValue, DeviceBusy, NoMemory, SaveFailed, StoreFull, ZramdError
from zramd.store import PAGE, SPAN
from zramd.store.arena import Arena, run_of
from zramd.store.header import RUN_AT, RUN_SIZE, SNAPSHOT_MAGIC, Header
from zramd.store.image import Index
from zramd.store.pages import Counters, Pages
from zramd.store.pool import PART
from zramd.store.table import LOST

END = 32
ENTRY = 24
FIELDS = ("disksize", "table_at", "map_at", "spans_at", "spans", "reserved", "algorithm")


# Histories: what a store may have been through


def every_kind(pages: Pages) -> None:
    kinds = [ZEROS, *map(filled, contents.WORDS), *map(noise, range(5)), *map(text, range(5))]
    kinds += [part_noise(n, n) for n in (*range(1, 4000, 61), *range(3780, 3880, 7), 4095)]
    kinds += [contents.periodic(n, n) for n in range(3, 80, 5)]
    kinds += [*map(contents.pointers, range(5))]
    kinds += [contents.almost_filled(word, 4095) for word in contents.WORDS[:3]]
    pages.write(3 * PAGE, b"".join(kinds))


def fill_up(pages: Pages) -> None:
    numbers = random.Random(2)
    try:
        for slot in range(pages.arena.slots):
            pages.write(slot * PAGE, part_noise(slot, numbers.choice((300, 1500, 2500, 4095))))
    except StoreFull:
        return
    raise AssertionError("it was to be full")


def lose(pages: Pages) -> None:
    every_kind(pages)
    for slot in (7, 9, 20):
        pages.discard(slot * PAGE, PAGE)
        pages.arena.table[slot] = LOST
        pages.counters.pages += 1
        pages.counters.same += 1


def thin_out(pages: Pages) -> None:
    numbers = random.Random(3)
    for slot in range(1400):
        pages.write(slot * PAGE, part_noise(slot, numbers.choice((100, 900, 2000, 4095))))
    for slot in range(1400):
        if slot % 7 or 500 < slot < 1100:
            pages.discard(slot * PAGE, PAGE)


def thin_out_and_compact(pages: Pages) -> None:
    thin_out(pages)
    pages.compact()
    pages.write(70 * PAGE, b"".join(map(noise, range(20))))


def last_ones(pages: Pages) -> None:
    pages.write((pages.arena.slots - 2) * PAGE, noise(1) + text(1))


HISTORIES: dict[str, tuple[Callable[[Pages], None], dict]] = {
    **{f"every kind, {name}": (every_kind, {"algorithm": name}) for name in ALGORITHMS},
    "empty": (lambda _: None, {}),
    "one slot": (lambda pages: pages.write(0, noise(1)), {"slots": 1}),
    "one slot, empty": (lambda _: None, {"slots": 1}),
    "a last table page of one slot": (last_ones, {"slots": 513}),
    "full": (fill_up, {"slots": 4096, "limit": 4 * MIB}),
    "reserved": (every_kind, {"slots": 1500, "limit": 8 * MIB, "reserve": True}),
    "reserved and full": (fill_up, {"slots": 4096, "limit": 4 * MIB, "reserve": True}),
    "lost pages": (lose, {}),
    "sparse": (thin_out, {"slots": 1500}),
    "compacted": (thin_out_and_compact, {"slots": 1500}),
    "emptied": (lambda p: (every_kind(p), p.discard(0, 600 * PAGE)), {}),
}


# Files


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    require.path("/dev/shm")
    with tempfile.TemporaryDirectory(prefix="zramd-images-", dir="/dev/shm") as path:
        yield Path(path)


@pytest.fixture
def path(folder: Path) -> Iterator[Path]:
    """Where an arena file can be."""
    path = folder / "arena"
    yield path
    path.unlink(missing_ok=True)


@pytest.fixture
def rebooted(monkeypatch) -> None:
    """From now on arenas are looked at by another run of the machine."""
    monkeypatch.setattr(zramd.store.image, "run_of", lambda _: b"another boot id!")


def saved(pages: Pages) -> int:
    file = os.memfd_create("snapshot")
    pages.save(file)
    return file


def bytes_of(fd: int) -> bytes:
    return os.pread(fd, os.fstat(fd).st_size, 0)


def restored(content: bytes, path: Path | None = None) -> tuple[Zram, list[int]]:
    """The device that a file with this content gives."""
    file = os.memfd_create("snapshot")
    try:
        os.pwrite(file, content, 0)
        device = Zram("zram0", path)
        return device, device.restore(file)
    finally:
        assert bytes_of(file) == content
        os.close(file)


def loaded(path: Path) -> tuple[Zram, list[int]]:
    device = Zram("zram0", path)
    lost = device.load()
    assert lost is not None
    return device, lost


def pages_in(device: Zram) -> Pages:
    assert device._meta is not None
    return device._meta


def drop(device: Zram) -> None:
    """As a process that is killed leaves the device: its file is neither sealed nor removed."""
    pages_in(device).arena.close(keep=True)


@contextmanager
def leaving_nothing() -> Iterator[None]:
    """Assert that no descriptor is left of it."""
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) <= before


def why(refused: "pytest.ExceptionInfo[ZramdError]") -> str:
    line = refused.value.line()
    assert "\n" not in line
    return line


def snapshot_refused(content: bytes, kind: type[ZramdError] = BadArena) -> str:
    with leaving_nothing(), pytest.raises(kind) as refused:
        restored(content)
    return why(refused)


def image_of(path: Path) -> tuple[int, bytes]:
    """Size and content of a sparse file."""
    fd = os.open(path, os.O_RDONLY)
    try:
        size, at, found = os.fstat(fd).st_size, 0, bytearray()
        while (at := zramd.store.image.data_from(fd, at, size)) < size:
            end = os.lseek(fd, at, os.SEEK_HOLE)
            block = os.pread(fd, end - at, at)
            if block.strip(b"\0"):
                found += at.to_bytes(8, "big") + block
            at = end
        return size, bytes(found)
    finally:
        os.close(fd)


def arena_refused(path: Path, kind: type[ZramdError] = BadArena) -> str:
    """Assert that it is refused, and the file as it was."""
    before, listed = image_of(path), sorted(path.parent.iterdir())
    with leaving_nothing(), pytest.raises(kind) as refused:
        loaded(path)
    assert image_of(path) == before
    assert sorted(path.parent.iterdir()) == listed
    line = why(refused)
    assert str(path) in line
    return line


# Round trips


def is_the_same(device: Zram, lost: list[int], content: list[bytes | None], then: Pages) -> None:
    """`then`: the store of which that is the content, closed or not."""
    now = pages_in(device)
    assert pages_of(now) == content
    assert lost == [slot for slot, page in enumerate(content) if page is None]
    assert now.counters == then.counters
    assert now.arena.header == then.arena.header
    assert now.arena.limit == then.arena.limit == int(attributes.get(device, "mem_limit"))
    assert now.arena.used <= then.arena.used
    assert now.arena.used_max == then.arena.used_max
    audit(now, snug=False)


def use_up_all(device: Zram) -> None:
    """Use up what is there; where there is a limit, not beyond that."""
    if pages_in(device).arena.limit:
        device.close()
    else:
        use_up(pages_in(device))


@pytest.mark.parametrize("history", HISTORIES)
@pytest.mark.parametrize("to_file", [False, True])
def test_a_snapshot_gives_the_device_that_was_saved(history, to_file, path):
    go_through, options = HISTORIES[history]
    pages = store(**options)
    go_through(pages)
    content = pages_of(pages)
    file = saved(pages)
    audit(pages, snug=False) if not history.startswith("lost") else None
    device, lost = restored(bytes_of(file), path if to_file else None)
    is_the_same(device, lost, content, pages)
    again = saved(pages_in(device))
    other, lost = restored(bytes_of(again))
    is_the_same(other, lost, content, pages)
    use_up_all(other)
    device.close()
    pages.close()
    os.close(file)
    os.close(again)


@pytest.mark.parametrize("history", HISTORIES)
def test_an_arena_file_that_was_closed_gives_the_device_after_a_reboot(history, path, rebooted):
    go_through, options = HISTORIES[history]
    pages = store(**options, path=path)
    go_through(pages)
    content = pages_of(pages)
    pages.close(keep=True)
    for _ in range(2):
        device, lost = loaded(path)
        is_the_same(device, lost, content, pages)
        device.close()
    device, _ = loaded(path)
    now = pages_in(device)
    now.discard(0, PAGE)
    content[0] = ZEROS
    now.compact()
    device.close()
    device, _ = loaded(path)
    assert pages_of(pages_in(device)) == content
    use_up_all(device)


def test_figures_outlive_a_save_and_a_reboot(path, rebooted):
    device = Zram("zram0", path)
    attributes.set(device, "mem_limit", "2M")
    device.init(8 * MIB)
    opener = device.open("a test")
    opener.write(0, noise(1) * 3)
    opener.write(0, text(1))
    opener.discard(PAGE, PAGE)
    opener.close()
    before = device.statistics()
    assert before.huge_pages_since == 3
    assert before.notify_free == 1
    file = os.memfd_create("snapshot")
    device.save(file)
    device.close()
    other, _ = restored(bytes_of(file))
    device, _ = loaded(path)
    assert device.statistics() == other.statistics() == before
    device.reset()
    other.close()
    os.close(file)


# Snapshots that are none


@pytest.fixture(scope="module")
def sound() -> Iterator[Pages]:
    """Not to be changed."""
    pages = some_of_all()
    yield pages
    pages.close()


@pytest.fixture(scope="module")
def snapshot(sound) -> bytes:
    file = saved(sound)
    try:
        return bytes_of(file)
    finally:
        os.close(file)


Blocks = list[tuple[int, bytes]]


def blocks_of(snapshot: bytes) -> Blocks:
    position, count = struct.unpack_from("<QQ", snapshot, len(snapshot) - END)
    found, at = [], 0
    for offset, length, checksum in struct.iter_unpack(
        "<QQQ", snapshot[position : position + count * ENTRY]
    ):
        found.append((offset, snapshot[at : at + length]))
        assert xxh3_64_intdigest(found[-1][1]) == checksum
        at += length
    return found


def packed(blocks: Blocks, *, data: bytes | None = None) -> bytes:
    """A snapshot of these blocks, all checksums right. `data`: what stands before the index."""
    index = Index()
    for at, block in blocks:
        index.add(at, block)
    if data is None:
        data = b"".join(block for _, block in blocks)
    return data + index.pack(len(data))


def with_end(snapshot: bytes, *, position: int | None = None, count: int | None = None) -> bytes:
    """The same index, whose end says something else, under a right checksum."""
    was, n = struct.unpack_from("<QQ", snapshot, len(snapshot) - END)
    entries = snapshot[was : was + n * ENTRY]
    said = (was if position is None else position, n if count is None else count)
    checksum = xxh3_64_intdigest(entries + struct.pack("<QQQ8s", *said, 0, b"zramdend"))
    return snapshot[:-END] + struct.pack("<QQQ8s", *said, checksum, b"zramdend")


def test_the_tests_pack_snapshots_as_the_store_does(snapshot, sound):
    assert packed(blocks_of(snapshot)) == with_end(snapshot) == snapshot
    device, lost = restored(snapshot)
    is_the_same(device, lost, pages_of(sound), sound)
    device.close()


def each_byte_refused(snapshot: bytes, changes: Iterable[tuple[int, int]]) -> None:
    """With any one of these bytes, (place, value)."""
    file, device = os.memfd_create("snapshot"), Zram("zram0")
    os.pwrite(file, snapshot, 0)
    with leaving_nothing():
        for at, value in changes:
            os.pwrite(file, bytes([value]), at)
            with pytest.raises(BadArena) as refused:
                device.restore(file)
            why(refused)
            os.pwrite(file, snapshot[at : at + 1], at)
    assert bytes_of(file) == snapshot
    os.close(file)


def test_every_byte_of_header_and_index_of_a_snapshot_counts(snapshot):
    position, _ = struct.unpack_from("<QQ", snapshot, len(snapshot) - END)
    numbers = random.Random(1)
    each_byte_refused(
        snapshot,
        (
            (at, value)
            for at in (*range(PAGE), *range(position, len(snapshot)))
            for value in {snapshot[at] ^ 1 << numbers.randrange(8), 0, 255} - {snapshot[at]}
        ),
    )


def test_a_bit_of_a_snapshot_changed_anywhere_is_refused(snapshot):
    numbers = random.Random(2)
    places = [numbers.randrange(len(snapshot)) for _ in range(3000)]
    each_byte_refused(snapshot, ((at, snapshot[at] ^ 1 << numbers.randrange(8)) for at in places))


def test_a_snapshot_cut_off_anywhere_is_refused(snapshot):
    position, _ = struct.unpack_from("<QQ", snapshot, len(snapshot) - END)
    sizes = {0, 1, 7, 8, 9, 16, 127, 128, 129, 255, 512, PAGE, len(snapshot) - END, position}
    at = 0
    for _, block in blocks_of(snapshot):
        at += len(block)
        sizes.add(at)
    sizes = {size + more for size in sizes for more in (-1, 0, 1)} - {-1}
    sizes |= set(range(position, len(snapshot)))
    sizes |= set(random.Random(3).sample(range(len(snapshot)), 300))
    for size in sizes:
        snapshot_refused(snapshot[:size])


@pytest.mark.parametrize("more", [b"\0", b"zramdend", bytes(PAGE), "its end", "itself"])
def test_a_snapshot_with_something_behind_it_is_refused(snapshot, more):
    named = {"its end": snapshot[-END:], "itself": snapshot}
    snapshot_refused(snapshot + (more if isinstance(more, bytes) else named[more]))


def test_parts_of_a_snapshot_that_come_twice_not_at_all_or_elsewhere_are_refused(snapshot):
    numbers = random.Random(4)
    for _ in range(200):
        a, b, c = sorted(numbers.sample(range(0, len(snapshot), 8), 3))
        for damaged in (
            snapshot[:a] + snapshot[b:],
            snapshot[:b] + snapshot[a:],
            snapshot[:a] + snapshot[b:c] + snapshot[a:b] + snapshot[c:],
            snapshot[:a] + bytes(b - a) + snapshot[b:],
        ):
            if damaged != snapshot:
                snapshot_refused(damaged)


MOST = (1 << 64) - 1

LAYOUTS: dict[str, Callable[[Blocks], Blocks]] = {
    "the header twice": lambda blocks: blocks[:1] + blocks,
    "a header of two pages": lambda blocks: [(0, blocks[0][1] + bytes(PAGE)), *blocks[2:]],
    "two swapped": lambda blocks: [*blocks[:2], blocks[3], blocks[2], *blocks[4:]],
    "one twice": lambda blocks: [*blocks[:3], *blocks[2:]],
    "the last twice": lambda blocks: blocks + blocks[-1:],
    "overlapping": lambda blocks: [*blocks[:-1], (blocks[-1][0], blocks[-1][1] * 2), blocks[-1]],
    "no length": lambda blocks: [*blocks[:2], (blocks[2][0], b""), *blocks[2:]],
    "a page and a byte": lambda blocks: [*blocks[:-1], (blocks[-1][0], bytes(PAGE + 1))],
    "between pages": lambda blocks: [*blocks[:-1], (blocks[-1][0] + 1, blocks[-1][1])],
    "too long": lambda blocks: [*blocks[:-1], (blocks[-1][0], bytes(2 * MIB))],
    "beyond the arena": lambda blocks: [*blocks, (1 << 40, bytes(PAGE))],
    "across its end": lambda blocks: [*blocks, (end_of(blocks) - PAGE, bytes(SPAN))],
    "beyond all": lambda blocks: [*blocks, (MOST // PAGE * PAGE, bytes(PAGE))],
}


def end_of(blocks: Blocks) -> int:
    """Bytes of the arena that a snapshot is of."""
    return Header.of(blocks[0][1], SNAPSHOT_MAGIC).size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_that_make_no_arena_are_refused_though_all_checksums_be_right(snapshot, layout):
    assert "senseless" in snapshot_refused(packed(LAYOUTS[layout](blocks_of(snapshot))))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"position": n} for n in (0, 1, PAGE, MOST, 1 << 63)),
        *({"count": n} for n in (0, 1, MOST, 1 << 63, MOST // ENTRY + 1)),
        *({"position": MOST - n * ENTRY, "count": n} for n in (0, 1, 9)),
    ],
)
def test_figures_of_an_end_that_fit_nothing_are_refused(snapshot, wrong):
    snapshot_refused(with_end(snapshot, **wrong))


def test_blocks_and_index_of_different_lengths_are_refused(snapshot):
    blocks = blocks_of(snapshot)
    data = b"".join(block for _, block in blocks)
    snapshot_refused(packed(blocks[:-1], data=data))
    snapshot_refused(packed(blocks, data=data + bytes(PAGE)))
    snapshot_refused(packed(blocks, data=data[:-PAGE]))
    snapshot_refused(packed([], data=data))
    snapshot_refused(packed(blocks[1:], data=data))


def with_fields(page: bytes, **fields: object) -> bytes:
    """A first page whose header says this, under a right checksum."""
    found = dict(zip(FIELDS, struct.unpack_from("<6Q64s", page, 16), strict=True)) | fields
    said = struct.pack("<6Q64s", *(found[name] for name in FIELDS))
    return page[:8] + struct.pack("<Q", zlib.crc32(said)) + said + page[128:]


def header_fields(disksize: int, spans: int, reserved: int = 0) -> dict[str, int]:
    """All that a header says, consistent in itself, of an arena that may be absurd."""
    header = Header(disksize, spans, reserved, "lz4")
    return {
        "disksize": disksize,
        "spans": spans,
        "reserved": reserved,
        "map_at": header.map_at,
        "spans_at": header.spans_at,
    }


ABSURD: dict[str, dict] = {
    **{
        f"disksize {n}": {"disksize": n}
        for n in (0, 1, PAGE - 1, 700 * PAGE + 1, 1 << 63, MOST, MOST // PAGE * PAGE)
    },
    **{f"spans {n}": {"spans": n} for n in (0, 1, 1 << 32, 1 << 63, MOST)},
    **{f"{name} {n}": {name: n} for name in FIELDS[1:4] for n in (0, PAGE - 1, MOST)},
    "a disksize of 8 TiB": header_fields(8 << 40, 1 << 31),
    "a disksize of 1 EiB": header_fields(1 << 60, 1 << 48),
    "spans for 8 EiB": header_fields(700 * PAGE, 1 << 47),
    "spans for 1 ZiB": header_fields(700 * PAGE, 1 << 54),
    "a reserve of a page": {"reserved": PAGE},
    "a reserve of more than there is": header_fields(1 << 40, 1 << 24, 2 << 40),
}


@pytest.mark.parametrize("said", ABSURD)
def test_a_header_with_absurd_figures_is_refused_though_all_checksums_be_right(
    snapshot, said, monkeypatch
):
    def hold(arena: Arena) -> None:  # it would take all memory of the machine
        raise AssertionError(f"{arena.size} bytes are reserved")

    monkeypatch.setattr(Arena, "hold", hold)
    (_, first), *others = blocks_of(snapshot)
    kind = NoMemory if "than there is" in said else BadArena
    snapshot_refused(packed([(0, with_fields(first, **ABSURD[said])), *others]), kind)


@pytest.mark.parametrize(
    "algorithm", [b"", b"lzo", b"lz4(", b"lz4(level=)", b"zstd(level=99999999999999)", b"\xff\xfe"]
)
def test_an_algorithm_that_is_not_known_here_is_told(snapshot, algorithm):
    (_, first), *others = blocks_of(snapshot)
    damaged = packed([(0, with_fields(first, algorithm=algorithm)), *others])
    snapshot_refused(damaged, BadValue)


@pytest.mark.parametrize(
    ("magic", "said"),
    [
        (b"zramd\0S\1", "version 1"),
        (b"zramd\0S\3", "version 3"),
        (b"zramd\0S\xff", "version 255"),
        (b"zramd\0\0\2", "is an arena"),
        (b"zramd\0\0\3", "is an arena"),
        (b"zramd\0X\2", "does not begin as one"),
        (bytes(8), "does not begin as one"),
    ],
)
def test_a_file_of_another_kind_or_version_is_told_by_its_magic(snapshot, magic, said):
    (_, first), *others = blocks_of(snapshot)
    assert said in snapshot_refused(packed([(0, magic + first[8:]), *others]))


FOREIGN = {
    "nothing": b"",
    "a letter": b"z",
    "zeros": bytes(20 * PAGE),
    "text": text(1) * 9,
    "noise": noise(1, 9 * PAGE),
    "a beginning": b"zramd\0S\2",
    "an end": b"zramdend",
    "a beginning and an end": b"zramd\0S\2" + bytes(200) + b"zramdend",
    "a program": Path("/bin/true").read_bytes()[: 64 << 10],
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_somebody_else_wrote_is_refused(name, path):
    snapshot_refused(FOREIGN[name])
    path.write_bytes(FOREIGN[name])
    arena_refused(path)


@contextmanager
def things(folder: Path) -> Iterator[dict[str, Path]]:
    """What is no file, by its kind."""
    fifo, sock = folder / "fifo", folder / "socket"
    os.mkfifo(fifo)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(sock))
        yield {"folder": folder, "fifo": fifo, "device": Path("/dev/null"), "socket": sock}


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "socket"])
def test_what_is_no_file_is_no_arena(kind, tmp_path):
    with things(tmp_path) as found, leaving_nothing():
        with pytest.raises((BadArena, BadValue)) as refused:
            loaded(found[kind])
        assert str(found[kind]) in why(refused)


@pytest.mark.parametrize("kind", ["folder", "fifo", "device"])
def test_what_is_no_file_is_no_snapshot(kind, tmp_path):
    with things(tmp_path) as found, leaving_nothing():
        file = os.open(found[kind], os.O_RDONLY | os.O_NONBLOCK)
        device = Zram("zram0")
        with pytest.raises(BadArena) as refused:
            device.restore(file)
        why(refused)
        os.close(file)


def test_a_snapshot_is_not_restored_over_a_file(snapshot, path):
    path.write_bytes(b"somebody's")
    with leaving_nothing(), pytest.raises(BadValue, match="exists already"):
        restored(snapshot, path)
    assert path.read_bytes() == b"somebody's"


def test_a_snapshot_that_is_refused_leaves_no_arena_file(snapshot, path):
    damaged = bytearray(snapshot)
    damaged[-1000] ^= 1
    with leaving_nothing(), pytest.raises(BadArena):
        restored(bytes(damaged), path)
    assert not path.exists()


def test_a_file_of_terabytes_that_is_an_index_takes_no_memory():
    """As many entries as its size gives, all zeros; that it is no index, its checksum says."""
    file = os.memfd_create("snapshot")
    size = 3 << 40
    os.ftruncate(file, size)
    fields = header_fields(700 * PAGE, 4796) | {"table_at": PAGE, "algorithm": b"lz4"}
    os.pwrite(file, with_fields(SNAPSHOT_MAGIC.ljust(PAGE, b"\0"), **fields), 0)
    count = (size - PAGE - END) // ENTRY
    end = struct.pack("<QQQ8s", size - END - count * ENTRY, count, 7, b"zramdend")
    os.pwrite(file, end, size - END)
    with pytest.raises(BadArena):
        Zram("zram0").restore(file)
    os.close(file)


# Arena files that are none


@pytest.fixture(scope="module")
def sealed(folder: Path) -> Path:
    """An arena file, not to be changed, or changed back."""
    path = folder / "sealed"
    pages = store(700, path=path)
    donor = some_of_all()
    for slot, page in enumerate(pages_of(donor)):
        if page != ZEROS:
            pages.write(slot * PAGE, page)
    donor.close()
    pages.close(keep=True)
    return path


def copied(path: Path, to: Path) -> None:
    with path.open("rb") as file, to.open("xb") as copy:
        clone(file.fileno(), copy.fileno())


def taken_for_good(path: Path, to: Path) -> tuple[list[bytes | None], Counters]:
    """What a copy of an arena file gives."""
    copied(path, to)
    device, _ = loaded(to)
    found = pages_of(pages_in(device)), pages_in(device).counters
    audit(pages_in(device), snug=False)
    device.reset()
    return found


@contextmanager
def changed(path: Path, at: int, content: bytes) -> Iterator[None]:
    """With these bytes in the file."""
    with path.open("rb+", buffering=0) as file:
        was = os.pread(file.fileno(), len(content), at)
        os.pwrite(file.fileno(), content, at)
        try:
            yield
        finally:
            os.pwrite(file.fileno(), was, at)


@contextmanager
def cut(path: Path, size: int) -> Iterator[None]:
    """With so many bytes of the file."""
    with path.open("rb+", buffering=0) as file:
        whole = os.fstat(file.fileno()).st_size
        end = os.pread(file.fileno(), whole - size, size) if whole - size < MIB else None
        held = None if end is not None else clone(file.fileno())
        file.truncate(size)
        try:
            yield
        finally:
            if end is not None:
                file.truncate(size)
                os.pwrite(file.fileno(), end, size)
            if held is not None:
                clone(held, file.fileno())
                os.close(held)


def header_of(path: Path) -> Header:
    with path.open("rb") as file:
        return Header.of(file.read(PAGE))


def test_every_byte_of_header_figures_and_index_of_an_arena_file_counts(sealed, rebooted):
    numbers = random.Random(1)
    start, whole = header_of(sealed).size, sealed.stat().st_size
    with sealed.open("rb") as file:
        first, index = file.read(PAGE), os.pread(file.fileno(), whole - start, start)
    boot_bytes = range(RUN_AT, RUN_AT + RUN_SIZE)
    before = image_of(sealed)
    for at in (*range(PAGE), *range(start, whole)):
        was = first[at] if at < PAGE else index[at - start]
        if at in boot_bytes:
            continue
        with (
            changed(sealed, at, bytes([was ^ 1 << numbers.randrange(8)])),
            pytest.raises(BadArena),
        ):
            loaded(sealed)
    assert image_of(sealed) == before


def test_the_boot_in_a_sealed_file_says_nothing(sealed, path, rebooted):
    """It is not under the checksum, and need not be: sealed, the file is good for any."""
    sound = taken_for_good(sealed, path)
    for at in range(RUN_AT, RUN_AT + RUN_SIZE):
        with changed(sealed, at, b"!"):
            assert taken_for_good(sealed, path) == sound


def test_a_bit_of_an_arena_file_changed_anywhere_is_refused_or_of_nothing(sealed, path, rebooted):
    """Of nothing is what lies in spans that are not in use; holes of table and span map are not."""
    header = header_of(sealed)
    numbers = random.Random(2)
    sound = taken_for_good(sealed, path)
    with sealed.open("rb") as file:
        data, at = [], 0
        while (at := zramd.store.image.data_from(file.fileno(), at, header.size)) < header.size:
            end = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            data.append((at, min(end, header.size)))
            at = end
    places = [numbers.randrange(header.spans_at) for _ in range(400)]
    places += [numbers.randrange(*numbers.choice(data)) for _ in range(1200)]
    places += [numbers.randrange(header.spans_at, header.size) for _ in range(20)]
    in_holes = set()
    for at in set(places) - set(range(RUN_AT, RUN_AT + RUN_SIZE)):
        is_hole = not any(start <= at < stop for start, stop in data)
        with sealed.open("rb") as file:
            was = os.pread(file.fileno(), 1, at)[0]
        with changed(sealed, at, bytes([was ^ 1 << numbers.randrange(8)])):
            if is_hole and at >= header.spans_at:
                assert taken_for_good(sealed, path) == sound
            else:
                with pytest.raises(BadArena):
                    loaded(sealed)
                in_holes.add(is_hole)
    assert in_holes == {False, True}


def test_an_arena_file_cut_off_anywhere_is_refused_after_a_reboot(sealed, rebooted):
    header, whole = header_of(sealed), sealed.stat().st_size
    sizes = {0, 1, 8, 127, 128, 129, PAGE - 1, PAGE, 2 * PAGE, header.map_at, header.spans_at}
    sizes |= {header.spans_at + SPAN, header.size - SPAN, header.size - 1}
    sizes |= set(random.Random(3).sample(range(header.size), 20))
    sizes |= set(range(header.size, whole))
    for size in sizes:
        with cut(sealed, size):
            with leaving_nothing(), pytest.raises(BadArena) as refused:
                loaded(sealed)
            assert str(sealed) in why(refused)
            assert sealed.stat().st_size == size
    assert sealed.stat().st_size == whole


@pytest.mark.parametrize("more", [b"\0", b"zramdend", bytes(PAGE), "its end"])
def test_an_arena_file_with_something_behind_it_is_refused_after_a_reboot(sealed, rebooted, more):
    whole = sealed.stat().st_size
    with sealed.open("rb+", buffering=0) as file:
        if isinstance(more, str):
            more = os.pread(file.fileno(), END, whole - END)
        os.pwrite(file.fileno(), more, whole)
        try:
            arena_refused(sealed)
        finally:
            file.truncate(whole)


def index_of(path: Path) -> Iterator[tuple[int, int, int]]:
    start = header_of(path).size
    with path.open("rb") as file:
        packed = os.pread(file.fileno(), path.stat().st_size - start - END, start)
    return struct.iter_unpack("<QQQ", packed)


@contextmanager
def with_index(path: Path, entries: list[tuple[int, int, int]], position: int) -> Iterator[None]:
    """With another index, its checksum right."""
    start = header_of(path).size
    packed = b"".join(struct.pack("<QQQ", *entry) for entry in entries)
    end = struct.pack("<QQQ8s", position, len(entries), 0, b"zramdend")
    checksum = xxh3_64_intdigest(packed + end)
    end = struct.pack("<QQQ8s", position, len(entries), checksum, b"zramdend")
    with cut(path, start), path.open("rb+", buffering=0) as file:
        os.pwrite(file.fileno(), packed + end, position)
        yield


Entries = list[tuple[int, int, int]]
INDEXES: dict[str, Callable[[Entries], Entries]] = {
    "nothing": lambda entries: [],
    "no header": lambda entries: entries[1:],
    "the header twice": lambda entries: entries[:1] + entries,
    "no table page": lambda entries: entries[:1] + entries[2:],
    "no page of the span map": lambda entries: entries[:3] + entries[4:],
    "one twice": lambda entries: [*entries[:3], *entries[2:]],
    "two swapped": lambda entries: [*entries[:1], entries[2], entries[1], *entries[3:]],
    "no length": lambda entries: [*entries, (entries[-1][0] + SPAN, 0, xxh3_64_intdigest(b""))],
    "too long": lambda entries: [*entries[:-1], (entries[-1][0], 2 * MIB, 0)],
    "beyond all": lambda entries: [*entries, (MOST // PAGE * PAGE, PAGE, 0)],
    "overlapping": lambda entries: [*entries, (entries[-1][0] + PAGE, PAGE, 0)],
    "between pages": lambda entries: [*entries[:-1], (entries[-1][0] + 8, *entries[-1][1:])],
}


@pytest.mark.parametrize("index", INDEXES)
def test_an_index_that_does_not_cover_what_counts_is_refused(sealed, rebooted, index):
    with with_index(sealed, INDEXES[index](list(index_of(sealed))), header_of(sealed).size):
        arena_refused(sealed)


@pytest.mark.parametrize("more", [PAGE, ENTRY, 1])
def test_an_index_that_begins_elsewhere_is_refused(sealed, rebooted, more):
    with with_index(sealed, list(index_of(sealed)), header_of(sealed).size + more):
        arena_refused(sealed)


def test_words_in_the_table_of_an_empty_arena_file_are_refused(path, rebooted):
    store(path=path).close(keep=True)
    header = header_of(path)
    for at in (PAGE, 2 * PAGE + 8, header.map_at, header.spans_at - 1):
        with changed(path, at, b"\1"):
            arena_refused(path)
    device, _ = loaded(path)
    assert pages_in(device).snapshot() == Counters()
    device.reset()


@pytest.mark.parametrize("said", ABSURD)
def test_an_arena_file_with_absurd_figures_is_refused(sealed, said):
    """In the same boot, where an open file is believed."""
    if "than there is" in said:
        return  # a file of that size, of which memory is to be reserved; a snapshot tells enough
    with sealed.open("rb") as file:
        first = with_fields(file.read(PAGE), **ABSURD[said])
    with changed(sealed, 0, first):
        arena_refused(sealed)


@pytest.mark.parametrize(
    ("magic", "said"),
    [
        (b"zramd\0\0\1", "version 1"),
        (b"zramd\0\0\3", "version 3"),
        (b"zramd\0S\2", "is a snapshot"),
    ],
)
def test_an_arena_file_of_another_kind_or_version_is_told_by_its_magic(sealed, magic, said):
    with changed(sealed, 0, magic):
        assert said in arena_refused(sealed)


def test_a_seal_that_was_killed_leaves_a_file_for_this_boot_and_no_other(sealed, path, monkeypatch):
    copied(sealed, path)
    start, whole = header_of(path).size, path.stat().st_size
    with path.open("rb") as file:
        index = os.pread(file.fileno(), whole - start, start)
    content = taken_for_good(sealed, path.with_name("copy"))
    with path.open("rb+", buffering=0) as file:  # a copy has not been opened in this boot
        os.pwrite(file.fileno(), run_of(file.fileno()), RUN_AT)
    for size in sorted({*range(0, len(index), 7), *range(len(index) - 48, len(index))}):
        os.truncate(path, start)
        with path.open("rb+", buffering=0) as file:
            os.pwrite(file.fileno(), index[:size], start)
        with monkeypatch.context() as patch:
            patch.setattr(zramd.store.image, "run_of", lambda _: b"another boot id!")
            assert "when the machine went down" in arena_refused(path)
        device, lost = loaded(path)
        assert lost == []
        assert path.stat().st_size == start
        if size % 49 == 0:
            assert (pages_of(pages_in(device)), pages_in(device).counters) == content
        drop(device)


def test_a_copy_of_an_arena_file_in_use_is_refused(path):
    pages = store(path=path)
    pages.write(0, noise(1))
    copy = path.with_name("copy")
    copied(path, copy)
    assert "when the machine went down" in arena_refused(copy)
    copy.unlink()
    pages.close()


def test_an_arena_file_that_was_removed_or_replaced_cannot_be_sealed_and_says_so(path):
    for replace in (path.unlink, lambda: path.with_name("other").rename(path)):
        pages = store(path=path)
        pages.write(0, noise(1))
        path.with_name("other").write_bytes(b"somebody's")
        replace()
        with pytest.raises(SaveFailed, match="has been removed or replaced"):
            pages.close(keep=True)
    assert path.read_bytes() == b"somebody's"


def test_an_arena_file_in_use_is_refused_and_not_touched(path):
    pages = store(path=path)
    pages.write(0, noise(1))
    before = image_of(path)
    with leaving_nothing(), pytest.raises(DeviceBusy, match="in use by another server"):
        loaded(path)
    with leaving_nothing(), pytest.raises(BadValue, match="exists already"):
        Zram("zram1", path).init(MIB)
    assert image_of(path) == before
    pages.close(keep=True)
    device, _ = loaded(path)
    assert pages_in(device).read(0, PAGE) == noise(1)
    with pytest.raises(DeviceBusy):
        loaded(path)
    device.close()


def test_a_file_that_its_server_removes_while_another_waits_for_it_is_not_served(path):
    """Who waits gets the lock of a file that nobody will find any more."""
    one = Zram("zram0", path)
    one.init(MIB)
    before = set(os.listdir("/proc/self/fd"))
    found: list[object] = []
    with one_more_thread(lambda: found.append(Zram("zram1", path).load(wait_s=30))):
        # It has the file open once there is one descriptor more.
        deadline = time.monotonic() + 30
        while not set(os.listdir("/proc/self/fd")) > before:
            assert time.monotonic() < deadline
        one.reset()
    assert found == [None]


@contextmanager
def one_more_thread(body: Callable[[], object]) -> Iterator[None]:
    thread = threading.Thread(target=body)
    thread.start()
    try:
        yield
    finally:
        thread.join()


# Kills


def test_whenever_a_process_is_killed_its_arena_file_has_what_it_promised(path):
    device = Zram("zram0", path)
    device.init(SLOTS * PAGE)
    drop(device)
    journal = Journal()
    numbers = random.Random(1)

    def work(seed: int) -> None:
        device, lost = loaded(path)
        assert lost == []
        work_for_ever(pages_in(device), journal, seed)

    for seed in range(25):
        child = fork(functools.partial(work, seed))
        time.sleep(numbers.uniform(0.005, 0.03))
        os.kill(child, signal.SIGKILL)
        assert killed(child)
        device, lost = loaded(path)
        journal.check(pages_in(device), lost)
        device.close() if seed % 3 == 0 else drop(device)
    assert max(journal.done) > 20, "nothing was done"


# A file system that is full


@pytest.fixture
def small(tmp_path) -> Iterator[Path]:
    """A tmpfs of 2 MiB."""
    require.root()
    command = ["mount", "-t", "tmpfs", "-o", "size=2M", "zramd-test", str(tmp_path)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    require.that(mounted.returncode == 0, f"no tmpfs can be mounted: {mounted.stderr}")
    try:
        yield tmp_path
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)


def fill_file_system(folder: Path) -> Path:
    """A file that takes all that is left of it, to the last page."""
    path = folder / "full"
    with path.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(PAGE)):
                pass
        except OSError:
            return path
    raise AssertionError("it was to be full")


def in_a_child(body: Callable[[], None]) -> None:
    """What a store beyond the end of the disk does is end the process, by SIGBUS."""
    status = os.waitpid(fork(body), 0)[1]
    assert os.waitstatus_to_exitcode(status) == 0


def test_an_arena_file_for_which_there_is_no_room_is_refused(small):
    fill_file_system(small)

    def body() -> None:
        for reserve in ("0", "1"):
            device = Zram("zram0", small / "arena")
            attributes.set(device, "prealloc", reserve)
            with leaving_nothing(), pytest.raises(NoMemory):
                device.init(MIB)
            assert not (small / "arena").exists()

    in_a_child(body)


def test_a_snapshot_for_which_there_is_no_room_is_not_restored(small, snapshot):
    full = fill_file_system(small)

    def body() -> None:
        for left in (0, PAGE, 16 * PAGE, 64 * PAGE):
            os.truncate(full, full.stat().st_size - left)
            with leaving_nothing(), pytest.raises(NoMemory):
                restored(snapshot, small / "arena")
            assert not (small / "arena").exists()

    in_a_child(body)


def writes_until_full(
    pages: Pages, content: dict[int, bytes | None], numbers: random.Random
) -> None:
    """Then nothing is left for any kind of page."""
    for kind in (noise, text, lambda n: part_noise(n, 500), lambda n: filled(n << 1), noise):
        for _ in range(5 * pages.arena.slots):
            slot, page = numbers.randrange(pages.arena.slots), kind(numbers.randrange(99))
            try:
                pages.write(slot * PAGE, page)
                content[slot] = page
            except StoreFull:
                break


def test_a_full_file_system_fails_writes_and_harms_nobody(small):
    """Whatever the store does beside: it never touches what has no disk."""

    def body() -> None:
        numbers = random.Random(1)
        path, content = small / "arena", dict.fromkeys(range(2000), ZEROS)
        device = Zram("zram0", path)
        device.init(2000 * PAGE)
        for _ in range(6):
            pages = pages_in(device)
            writes_until_full(pages, content, numbers)
            full = fill_file_system(small)
            writes_until_full(pages, content, numbers)
            audit(pages, snug=False)
            for slot in numbers.sample(range(2000), 700):
                pages.discard(slot * PAGE, PAGE)
                content[slot] = ZEROS
            # Killed, and recovered; then spans are opened to the end that were not before.
            drop(device)
            device, lost = loaded(path)
            assert lost == []
            pages = pages_in(device)
            assert pages_of(pages) == list(content.values())
            writes_until_full(pages, content, numbers)
            assert pages_of(pages) == list(content.values())
            audit(pages, snug=False)
            full.unlink()
        device.close()
        device, _ = loaded(path)
        assert pages_of(pages_in(device)) == list(content.values())

    in_a_child(body)


def test_what_a_recovery_opens_to_the_end_has_disk(small):
    """Of three spans the last was open in part; then the second has the fewest objects, and is."""

    def body() -> None:
        path = small / "arena"
        pages = store(path=path)
        pages.write(0, b"".join(map(noise, range(37))))
        pages.discard(20 * PAGE, 12 * PAGE)
        pages.arena.close(keep=True)
        device, _ = loaded(path)
        pages = pages_in(device)
        assert [span.opened for span in pages.pool.spans.values()] == [SPAN, PART, SPAN]
        fill_file_system(small)
        content = dict(enumerate(pages_of(pages)))
        writes_until_full(pages, content, random.Random(1))
        assert pages_of(pages) == list(content.values())

    in_a_child(body)


def test_a_file_that_cannot_be_sealed_for_want_of_room_is_good_for_this_boot(small, monkeypatch):
    path = small / "arena"
    device = Zram("zram0", path)
    device.init(MIB)
    pages_in(device).write(0, noise(1))
    full = fill_file_system(small)
    with pytest.raises(SaveFailed, match="cannot be sealed: No space left") as failed:
        device.close()
    assert "good until the machine goes down" in str(failed.value.hint)
    with monkeypatch.context() as patch:
        patch.setattr(zramd.store.image, "run_of", lambda _: b"another boot id!")
        arena_refused(path)
    device, lost = loaded(path)
    assert (lost, pages_in(device).read(0, PAGE)) == ([], noise(1))
    full.unlink()
    device.close()
    monkeypatch.setattr(zramd.store.image, "run_of", lambda _: b"another boot id!")
    device, lost = loaded(path)
    assert (lost, pages_in(device).read(0, PAGE)) == ([], noise(1))
    device.close()

"""Ratios of zramd to bare codecs and to nbdkit's memory plugin, on real data, on this machine.

Shared machines are noisy, so nothing is quoted alone: what is compared runs alternately, round by
round, each round gives one ratio, and the table shows their median, minimum and maximum.

The corpus is half executables and libraries, and half the private memory of running programs, read
from /proc: of a type checker that has just checked zramd, and of whatever else runs that we may
read. What is missing of the second half is made up by the first, and the shares are told. The
clients' data is the corpus too: devices are filled with it before they are read, and fio writes
buffers that compress as well as it does.

fio's client runs on the last CPU and the server under test on the first, where there are two.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lz4.block

from zramd.store import PAGE
from zramd.store.arena import Arena
from zramd.store.pages import Pages
from zramd.store.zcomp import Algorithm, Comp

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
REQUEST = 128 << 10  # what the kernel sends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer, shorter rounds (a minute)")
    parser.add_argument("--json", type=Path, help="write all rounds to this file, too")
    options = parser.parse_args()
    rounds, seconds, mib = (3, 2, 128) if options.quick else (9, 4, 512)

    corpus, shares = make_corpus(mib * MIB)
    print(f"corpus: {len(corpus) // MIB} MiB: {shares}")
    results = {}
    for measure in (measure_store, measure_overhead, measure_servers):
        for name, target, ratios in measure(corpus, rounds, seconds):
            results[name] = {"target": target, "ratios": ratios}
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def table(results: dict[str, Any]) -> str:
    lines = ["| measure | target | median | min | max |", "|---|---|---|---|---|"]
    for name, result in results.items():
        ratios = result["ratios"]
        figures = (statistics.median(ratios), min(ratios), max(ratios))
        cells = [name, result["target"], *(f"{figure:.3f}" for figure in figures)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# The corpus


def make_corpus(size: int) -> tuple[bytes, str]:
    """`size` bytes of this machine's real data, and what it consists of."""
    with type_checker():
        memory = take(size // 2, memory_of_programs())
    files = take(size - len(memory), executables())
    corpus = memory + files
    share = 100 * len(memory) // len(corpus)
    return corpus, f"{share} % memory of running programs, {100 - share} % executables"


@contextmanager
def type_checker() -> Iterator[None]:
    """A program with a few hundred MiB of real heap, idle while its memory is read."""
    script = "import sys; from mypy import api; api.run(['zramd']); print(); sys.stdin.read()"
    process = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdin is not None
    with process:
        process.stdout.readline()
        yield
        process.stdin.close()


def take(size: int, pieces: Iterator[bytes]) -> bytes:
    found = bytearray()
    for piece in pieces:
        found += piece[: len(piece) // PAGE * PAGE]
        if len(found) >= size:
            break
    return bytes(found[:size])


def executables() -> Iterator[bytes]:
    for folder in ("/usr/bin", "/usr/lib"):
        for path in sorted(Path(folder).rglob("*")):
            if path.is_symlink() or not path.is_file() or path.stat().st_size > 64 * MIB:
                continue
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield b"\x7fELF" + file.read()


def memory_of_programs() -> Iterator[bytes]:
    """Resident private writable memory, without our own."""
    for process in sorted(Path("/proc").glob("[0-9]*"), key=lambda path: int(path.name)):
        if int(process.name) == os.getpid():
            continue
        try:
            regions = (process / "maps").read_text().splitlines()
            with (
                (process / "mem").open("rb", buffering=0) as mem,
                (process / "pagemap").open("rb", buffering=0) as pagemap,
            ):
                for region in regions:
                    bounds, permissions = region.split()[:2]
                    if permissions != "rw-p":
                        continue
                    start, stop = (int(bound, 16) for bound in bounds.split("-"))
                    yield from resident(mem, pagemap, start, stop)
        except (OSError, ValueError):
            continue  # it ended, or is not ours to read


def resident(mem: Any, pagemap: Any, start: int, stop: int) -> Iterator[bytes]:
    """Pages that are present; reading the others would make up zeros."""
    for at in range(start, stop, 64 * PAGE):
        count = min(64, (stop - at) // PAGE)
        pagemap.seek(at // PAGE * 8)
        present = pagemap.read(count * 8)[7::8]
        for page, top in enumerate(present):
            if top & 0x80:
                mem.seek(at + page * PAGE)
                yield mem.read(PAGE)


# The store alone


def measure_store(
    corpus: bytes, rounds: int, _seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    part = corpus[: min(len(corpus), 128 * MIB)]
    requests = [(at, part[at : at + REQUEST]) for at in range(0, len(part), REQUEST)]
    pages = [part[at : at + PAGE] for at in range(0, len(part), PAGE)]
    compress, decompress = lz4.block.compress, lz4.block.decompress
    writes, reads = [], []
    for _ in range(rounds):
        started = time.perf_counter()
        blobs = [compress(page, store_size=False) for page in pages]
        bare_write = time.perf_counter() - started
        started = time.perf_counter()
        for blob in blobs:
            decompress(blob, uncompressed_size=PAGE)
        bare_read = time.perf_counter() - started

        store = Pages(Arena(len(part), "lz4"), Comp(Algorithm("lz4")))
        started = time.perf_counter()
        for at, data in requests:
            store.write(at, data)
        writes.append(bare_write / (time.perf_counter() - started))
        started = time.perf_counter()
        for at, data in requests:
            store.read(at, len(data))
        reads.append(bare_read / (time.perf_counter() - started))
        store.close()
    yield "store, lz4, 128 KiB writes / bare lz4 compress loop", ">= 0.65", writes
    yield "store, lz4, 128 KiB reads / bare lz4 decompress loop", ">= 0.50", reads


def measure_overhead(
    corpus: bytes, _rounds: int, _seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    for name in ("lz4", "zstd"):
        store = Pages(Arena(len(corpus), name), Comp(Algorithm(name)))
        store.write(0, corpus)
        overhead = store.arena.used / store.counters.compressed_bytes
        ratio = store.counters.pages * PAGE / store.arena.used
        store.close()
        yield f"mem_used_total / compr_data_size, {name}", "<= 1.04", [overhead]
        yield f"data / mem_used_total, {name}", "", [ratio]


# Servers


def measure_servers(
    corpus: bytes, rounds: int, seconds: int
) -> Iterator[tuple[str, str, list[float]]]:
    size = len(corpus)
    ratio = sum(len(lz4.block.compress(corpus[at : at + PAGE])) for at in range(0, size, PAGE * 64))
    percent = max(0, 100 - round(100 * ratio / (size / 64)))
    with tempfile.TemporaryDirectory(prefix="zramd-bench.") as name:
        folder = Path(name)
        image = folder / "corpus"
        image.write_bytes(corpus)
        memory = [nbdkit(), "memory", str(size)]
        plugin = [nbdkit(), "-t", "1", "python", str(ROOT / "nbd_plugin.py")]
        device = ["name=bench", f"disksize={size}"]
        with (
            server(folder / "ours", serve(folder, size)) as ours,
            server(folder / "mem", memory) as mem,
            server(folder / "zstd", [*memory, "allocator=zstd"]) as zstd,
            server(folder / "plug", plugin + device) as plug,
        ):
            for uri in (ours, mem, zstd, plug):
                subprocess.run(["nbdcopy", str(image), uri], check=True)

            def iops(uri: str, mode: str) -> float:
                return fio(uri, mode, size, seconds, percent)

            def compare(mode: str, one: str, other: str) -> list[float]:
                return [iops(one, mode) / iops(other, mode) for _ in range(rounds)]

            what = "4 KiB random {}, 16 in flight: {}"
            yield (
                what.format("writes", "zramd serve / nbdkit memory allocator=zstd"),
                ">= 4.0",
                compare("randwrite", ours, zstd),
            )
            yield (
                what.format("reads", "zramd serve / nbdkit memory (no compression)"),
                ">= 0.90",
                compare("randread", ours, mem),
            )
            for mode in ("randwrite", "randread"):
                yield (
                    what.format(mode.removeprefix("rand") + "s", "nbd_plugin.py / zramd serve"),
                    "",
                    compare(mode, plug, ours),
                )


def nbdkit() -> str:
    return shutil.which("nbdkit") or sys.exit("bench: nbdkit is not installed")


def serve(folder: Path, size: int) -> list[str]:
    return [sys.executable, "-m", "zramd.cli", "serve", "bench", "--disksize", str(size)]


@contextmanager
def server(folder: Path, command: list[str]) -> Iterator[str]:
    """Run one server pinned to the first CPU; gives its URI."""
    folder.mkdir()
    socket = folder / "bench" / "nbd.sock"
    environment = os.environ | {"ZRAMD_RUNTIME_DIR": str(folder), "VIRTUAL_ENV": sys.prefix}
    if Path(command[0]).name == "nbdkit":
        socket = folder / "socket"
        command = [command[0], "-f", "-U", str(socket), *command[1:]]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        ["taskset", "-c", str(min(os.sched_getaffinity(0))), *command],
        env=environment,
        stderr=log,
    )
    try:
        wait_until(socket.exists, process)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        process.terminate()
        process.wait()
        log.close()


def wait_until(ready: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + 30
    while not ready():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"bench: {process.args!r} did not start")
        time.sleep(0.05)


def fio(uri: str, mode: str, size: int, seconds: int, percent: int) -> float:
    """IOPS of one run."""
    command = (
        f"taskset -c {max(os.sched_getaffinity(0))} fio --name=bench --ioengine=nbd --uri={uri}"
        f" --rw={mode} --bs=4k --iodepth=16 --size={size} --norandommap"
        f" --time_based --runtime={seconds} --output-format=json"
        f" --buffer_compress_percentage={percent} --refill_buffers"
    )
    done = subprocess.run(command.split(), check=True, capture_output=True, text=True)
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    return float(job[mode.removeprefix("rand")]["iops"])


if __name__ == "__main__":
    main()

"""Programs that use a device without a pause, and know what each page of theirs must hold.

They end when they are told to (SIGTERM): with status 0 and no output, if all was right to the end.
They take what CPU the others leave: a guest has one, and an upgrade needs it.
"""

import os
import subprocess
import sys
from pathlib import Path

from tests.kernel import servers

_END_S = 120

_TOUCHER = """
import itertools, mmap, random, signal
told = []
signal.signal(signal.SIGTERM, lambda *_: told.append(True))
content = random.Random(9).randbytes(8 << 20)
memory = mmap.mmap(-1, len(content), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[:] = content
print("begun", flush=True)
for turn in itertools.count():
    memory.madvise(21)  # MADV_PAGEOUT
    memory[turn % len(content) // 4096 * 4096] ^= 0
    if memory[:] != content:
        raise SystemExit(f"wrong in turn {turn}")
    if told:
        break
"""

_VERIFIER = """
import mmap, os, random, signal, sys, threading

PAGES = 512
told = threading.Event()

def work(number):
    numbers, holds, turn = random.Random(number), {}, 0
    path = f"{sys.argv[1]}/{number}"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT)
    page = mmap.mmap(-1, 4096)

    def verify(at):
        os.preadv(file, [page], at * 4096)
        if page[:] != holds[at]:
            raise SystemExit(f"page {at} of {path} is wrong in turn {turn}: {page[:16]!r}...")

    while not told.is_set():
        turn += 1
        at = numbers.randrange(PAGES)
        holds[at] = numbers.randbytes(1600) + bytes(2496)
        page[:] = holds[at]
        os.pwrite(file, page, at * 4096)
        verify(numbers.choice([*holds]))
        if turn % 64 == 0:  # the file system's own writes, too
            os.fsync(file)
            with open(f"{path}.new", "wb") as new:
                new.write(holds[at])
            os.rename(f"{path}.new", f"{path}.last")
    for at in holds:
        verify(at)
    os.unlink(path)

def guarded(number):
    try:
        work(number)
    except BaseException as fault:
        print(repr(fault), flush=True)
        os._exit(1)

signal.signal(signal.SIGTERM, lambda *_: told.set())
threads = [threading.Thread(target=guarded, args=(number,)) for number in range(4)]
for thread in threads:
    thread.start()
print("begun", flush=True)
for thread in threads:
    thread.join()
"""


def start_toucher() -> subprocess.Popen[str]:
    """8 MiB of memory go to the swap and come back, again and again."""
    return _start(_TOUCHER)


def start_verifier(directory: Path) -> subprocess.Popen[str]:
    """Four threads, each with a file of its own there, write pages and read them back, past the
    page cache. In the end each page is read once more."""
    return _start(_VERIFIER, os.fspath(directory))


def _start(program: str, *arguments: str) -> subprocess.Popen[str]:
    load = subprocess.Popen(
        ["nice", "-n", "19", sys.executable, "-c", program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert load.stdout is not None
    assert load.stdout.readline() == "begun\n"
    return load


def end(load: subprocess.Popen[str]) -> None:
    """Have it end, and be right."""
    load.terminate()
    status, said = servers.end_of(load, _END_S)
    assert status == 0, said
    assert said == ""


def goes_on(node: str, requests: int, limit_s: float = 60) -> None:
    """Wait until the node has done so many more."""
    before = _done(node)
    servers.wait_for(lambda: _done(node) > before + requests, f"{node} to go on", limit_s)


def _done(node: str) -> int:
    """Reads and writes that the node has done so far."""
    reads, _, _, _, writes, *_ = Path("/sys/block", Path(node).name, "stat").read_text().split()
    return int(reads) + int(writes)

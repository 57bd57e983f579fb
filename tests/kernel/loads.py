"""Programs that use a device without a pause, and know what each page of theirs must hold.

They end when they are told to (SIGTERM): with status 0 and no output, if all was right to the end.
They take what CPU the others leave: a guest has one, and an upgrade needs it.
"""

import subprocess
import sys
from pathlib import Path

from tests.kernel import servers

_END_S = 60

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


def start_toucher() -> subprocess.Popen[str]:
    """8 MiB of memory go to the swap and come back, again and again."""
    return _start(_TOUCHER)


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

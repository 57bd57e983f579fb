"""Run in a guest: swap on a server's device, then a program that needs more memory than there is.

    under_pressure.py SERVER DISKSIZE MEM_LIMIT MIB PASSES

SERVER is one of ours (tests.kernel.servers.SERVERS), or one of PEERS, for which MEM_LIMIT is
nothing. pressure.py touches MIB of memory, PASSES times; meanwhile we hold 8 MiB of our own, which
is swapped out early, and verify it at the end. With KILL_EVERY_S in the environment the server's
worker is killed that often. What happens is printed as it does, since a guest that hangs tells
nothing more; the last line is a `Result` as JSON.

The code of the programs is kept in memory. Where it is not, a guest whose swap is full throws pages
of it away and reads them again, for ever: each page thrown away is progress to the kernel, which
kills nobody then. That is so with any swap, and hides what ours does.
"""

import ctypes
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tests.kernel.pressure import Memory

ROOT = Path(__file__).resolve().parents[2]
PEERS = {
    "nbdkit memory allocator=zstd": ["nbdkit", "-f", "memory", "SIZE", "allocator=zstd"],
    "nbdkit --swap memory allocator=zstd": [
        *("nbdkit", "-f", "--swap", "memory", "SIZE", "allocator=zstd"),
    ],
    "nbdkit --swap memory allocator=malloc,mlock": [
        *("nbdkit", "-f", "--swap", "memory", "SIZE", "allocator=malloc,mlock=true"),
    ],
    "nbdkit --swap memory": ["nbdkit", "-f", "--swap", "memory", "SIZE"],
}
NODE = "/dev/nbd0"
_WITNESS_PAGES = 2048
_PATIENCE_S = 120


@dataclass
class Result:
    """What came of it. Seconds are the guest's."""

    program: int | None = None
    """Exit status of the program; -9: it was killed for want of memory."""
    mib_per_s: dict[str, float] = field(default_factory=dict)
    """What the program touched in a second, by phase."""
    killed: int = 0
    """How many processes the kernel has killed for want of memory."""
    write_errors: int = 0
    kills: int = 0
    """How often we have killed the worker."""
    responds_s: float = -1
    """How long starting a program took afterwards."""
    swapoff_s: float = -1
    mm_stat: str = ""
    io_stat: str = ""


def say(line: str) -> None:
    print(f"[{time.monotonic():.1f}] {line}", flush=True)


def run(*argv: str) -> str:
    done = subprocess.run(
        argv, check=True, timeout=_PATIENCE_S, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    return done.stdout


def zramd(*arguments: str) -> str:
    return run(sys.executable, "-m", "zramd.cli", *arguments)


def wait_for(fact: Callable[[], bool]) -> None:
    while not fact():
        time.sleep(0.1)


def keep_code() -> None:
    """Lock what is mapped of our files read-only: the interpreter, which pressure.py shares."""
    libc = ctypes.CDLL(None, use_errno=True)
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, mode, _, _, inode, *_ = line.split()
        first, last = (int(end, 16) for end in span.split("-"))
        if inode != "0" and mode[:2] == "r-":
            size = ctypes.c_size_t(last - first)
            if libc.mlock(ctypes.c_void_p(first), size) != 0:
                raise OSError(ctypes.get_errno(), f"mlock of {line}")


def begin(server: str, disksize: str, mem_limit: str) -> None:
    """Swap on NODE, and nowhere else."""
    if server == "zramd":
        zramd("up", "s", "-s", disksize, "--mem-limit", mem_limit, "--swap")
    elif server == "nbdkit":
        place = Path(os.environ["ZRAMD_RUNTIME_DIR"], "s")
        place.mkdir(0o700, parents=True)
        command = ["nbdkit", "-f", "--log=null", "-U", f"{place}/nbd.sock"]
        command += ["python", "./nbd_plugin.py"]
        command += ["name=s", "for=swap", f"disksize={disksize}", f"mem_limit={mem_limit}"]
        subprocess.Popen(command, cwd=ROOT)
        wait_for((place / "control").exists)
        zramd("up", "s", "-s", disksize, "--swap")
    else:
        argv = [disksize if word == "SIZE" else word for word in PEERS[server]]
        socket = "/run/peer.sock"
        subprocess.Popen([argv[0], "-U", socket, *argv[1:]])
        wait_for(Path(socket).exists)
        run("nbd-client", "-unix", socket, NODE, "-b", "4096", "-swap")
        run("mkswap", NODE)
        run("swapon", "--discard", "--priority", "100", NODE)


def kill_workers(program: subprocess.Popen[str], every_s: int, result: Result) -> None:
    """As long as the program runs."""
    lock = Path(os.environ["ZRAMD_RUNTIME_DIR"], "s/lock")
    while True:
        time.sleep(every_s)
        if program.poll() is not None:
            return
        os.kill(int(lock.read_text().split()[1]), signal.SIGKILL)
        result.kills += 1
        say(f"worker killed, {result.kills}")


def main() -> None:
    server, disksize, mem_limit, mib, passes = sys.argv[1:]
    ours = server not in PEERS
    result = Result()
    keep_code()
    begin(server, disksize, mem_limit)
    say(Path("/proc/swaps").read_text().splitlines()[1])
    witness = Memory(_WITNESS_PAGES)
    for number in range(_WITNESS_PAGES):
        witness.write(number)
    program = subprocess.Popen(
        [sys.executable, "-u", os.fspath(ROOT / "tests/kernel/pressure.py"), mib, passes],
        stdout=subprocess.PIPE,
        text=True,
    )
    Path(f"/proc/{program.pid}/oom_score_adj").write_text("500")
    assert program.stdout is not None
    every_s = int(os.environ.get("KILL_EVERY_S", "0"))
    if every_s:
        arguments = (program, every_s, result)
        threading.Thread(target=kill_workers, args=arguments, daemon=True).start()
    for line in program.stdout:
        say(line.rstrip())
        phase = re.match(r"(.+): ([\d.]+) MiB/s", line)
        if phase is not None:
            result.mib_per_s[phase[1]] = float(phase[2])
    result.program = program.wait()
    began = time.monotonic()
    run("ls", "/usr/bin")
    result.responds_s = time.monotonic() - began
    say(f"the program ended with {result.program}, and ls took {result.responds_s:.2f} s")
    for number in range(_WITNESS_PAGES):
        witness.verify(number)
    if ours:
        result.mm_stat = zramd("get", "s", "mm_stat").strip()
        result.io_stat = zramd("get", "s", "io_stat").strip()
    began = time.monotonic()
    run("swapoff", NODE)
    result.swapoff_s = time.monotonic() - began
    for number in range(_WITNESS_PAGES):
        witness.verify(number)
    witness.close()  # there is no swap any more
    if ours:
        zramd("down", "s")
    # Not by the log: thousands of write errors may have pushed that line out of it.
    (killed,) = re.findall(r"^oom_kill (\d+)", Path("/proc/vmstat").read_text(), re.MULTILINE)
    result.killed = int(killed)
    told = run("dmesg")
    result.write_errors = len(re.findall(r"Write-error on swap-device|returned error \(28\)", told))
    print(json.dumps(asdict(result)), flush=True)


if __name__ == "__main__":
    main()

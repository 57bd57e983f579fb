"""This machine while it measures: which CPUs serve and which ask, what processes cost, how noisy.

Servers run on the first half of the CPUs that we may use, clients on the second; with one CPU both
share it, and the report says so.

A peer's processes are told by their environment: what was started with MARK=value, and all that
it has started since, whoever its parent is now. Their CPU time has the kernel's resolution, 10 ms.

RAM is what the system must have for the whole server, each page once: its own memory, by the
processes' shares of it (Pss); its page tables; programs and libraries as if nobody else ran them;
and a memfd by its blocks, not by who maps it. Two processes that map one page of it have half of it
each in their Pss, but a page that neither has touched since it was forked is in nobody's.
"""

import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

MARK = "ZRAMD_BENCH_PEER"
MIB = 1 << 20
_TICK = os.sysconf("SC_CLK_TCK")

_ALL = sorted(os.sched_getaffinity(0))
SERVERS = _ALL[: max(1, len(_ALL) // 2)]
CLIENTS = _ALL[len(_ALL) // 2 :]


def pinned(cpus: Sequence[int], command: Iterable[str], *, nice: bool = False) -> list[str]:
    """The command, run on these CPUs only."""
    prefix = ["nice", "-n", "19"] if nice else []
    return [*prefix, "taskset", "-c", ",".join(map(str, cpus)), *command]


def pinning() -> str:
    """What is pinned to what, as the report says it."""
    if len(_ALL) == 1:
        return "one CPU, which servers and clients share"
    servers, clients = (
        ("CPU " if len(cpus) == 1 else "CPUs ") + ", ".join(map(str, cpus))
        for cpus in (SERVERS, CLIENTS)
    )
    return f"servers on {servers}, clients on {clients}"


class Failed(Exception):
    """A measurement has failed; its message is the last that the program in question said."""


def client(command: list[str], seconds: float = 120) -> tuple[str, float]:
    """Run a client where clients run; what it has printed, and the CPU seconds that it took.

    Nothing else that this process has started may end meanwhile, or it is counted, too.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(
        pinned(CLIENTS, command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            said, complained = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            kill(process.pid, group=True)
            raise Failed(f"{command[0]} has not ended after {seconds:.0f} s") from None
        except BaseException:
            kill(process.pid, group=True)
            raise
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise Failed(
            last_line(complained or said) or f"{command[0]} ended with {process.returncode}"
        )
    return said, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def kill(process: int, *, group: bool = False) -> None:
    """Kill it, or all of its group, if it is still there."""
    try:
        (os.killpg if group else os.kill)(process, signal.SIGKILL)
    except OSError:
        pass


def last_line(said: str) -> str:
    """Of what a program has said; empty if it has said nothing."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1] if lines else ""


# What processes cost


def marked(value: str, name: str = MARK) -> list[int]:
    """The processes that run with this in their environment."""
    wanted = os.fsencode(f"{name}={value}")
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
        except OSError:
            continue  # it ended meanwhile, or is not ours
    return found


def cpu_seconds(processes: Iterable[int]) -> float:
    """That they, and those of their children that ended, have taken so far."""
    ticks = 0
    for process in processes:
        try:
            stat = Path(f"/proc/{process}/stat").read_text()
        except OSError:
            continue
        ticks += sum(map(int, stat[stat.rindex(")") + 2 :].split()[11:15]))
    return ticks / _TICK


def ram(processes: Iterable[int], files: Iterable[Path] = ()) -> int:
    """Bytes of RAM that these processes and these files of a tmpfs take, each page once."""
    anonymous = mapped = 0
    shared: dict[tuple[int, int], int] = {}
    programs: dict[tuple[str, ...], int] = {}
    for process in processes:
        place = Path(f"/proc/{process}")
        try:
            rollup = _fields(place / "smaps_rollup")
            tables = _fields(place / "status").get("VmPTE", 0)
            for name, size in _mapped_files(place / "smaps"):
                programs[name] = max(size, programs.get(name, 0))
            descriptors = list((place / "fd").iterdir())
        except OSError:
            continue
        anonymous += rollup["Pss_Anon"] + rollup["SwapPss"] + tables
        mapped += rollup["Pss_Shmem"]
        for descriptor in descriptors:
            try:
                if os.readlink(descriptor).startswith("/memfd:"):
                    _count(shared, descriptor.stat())
            except OSError:
                continue
    for file in files:
        _count(shared, file.stat())
    # Shared memory without a file is mapped by those who have it, and by nobody else.
    return anonymous + sum(programs.values()) + max(mapped, sum(shared.values()))


def _count(shared: dict[tuple[int, int], int], stat: os.stat_result) -> None:
    shared[stat.st_dev, stat.st_ino] = stat.st_blocks * 512


def _mapped_files(smaps: Path) -> Iterator[tuple[tuple[str, ...], int]]:
    """Of each piece of a file that is mapped, but of shared memory: which, and its bytes in RAM."""
    name: tuple[str, ...] = ()
    resident = 0
    for line in smaps.read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            is_file = len(words) > 5 and words[5].startswith("/")
            is_shared = line.endswith("(deleted)") or "/memfd:" in line or "/SYSV" in line
            name = tuple(words[2:6]) if is_file and not is_shared else ()
        elif name and words[0] == "Rss:":
            resident = int(words[1]) << 10
        elif name and words[0] == "Anonymous:":
            yield name, resident - (int(words[1]) << 10)


def _fields(path: Path) -> dict[str, int]:
    """Those of `Name:   123 kB`, in bytes."""
    fields = {}
    for line in path.read_text().splitlines():
        words = line.split()
        if len(words) == 3 and words[2] == "kB":
            fields[words[0].rstrip(":")] = int(words[1]) << 10
    return fields


# Noise


class Noise:
    """How evenly this machine computed while it measured: one fixed piece of work, timed again and
    again, and the share of CPU time that the hypervisor gave to others.

    The load before anything was started is measured when this is made, which takes a second.
    """

    FEW_PERCENT = 10

    def __init__(self) -> None:
        self.times: list[float] = []
        before = _cpu_times()
        time.sleep(1)
        busy, _, total = (b - a for a, b in zip(before, _cpu_times(), strict=True))
        self.busy_before = 100 * busy / max(1, total)
        self._began = _cpu_times()
        self._text = Path(sys.executable).read_bytes()[: MIB // 2]

    def sample(self) -> None:
        """Do the fixed work once where servers run; about 10 ms."""
        everywhere = os.sched_getaffinity(0)
        os.sched_setaffinity(0, SERVERS)
        started = time.perf_counter()
        zlib.compress(self._text, 6)
        self.times.append(time.perf_counter() - started)
        os.sched_setaffinity(0, everywhere)

    def told(self) -> dict[str, Any]:
        _, stolen, total = (b - a for a, b in zip(self._began, _cpu_times(), strict=True))
        times = self.times if len(self.times) > 1 else self.times * 2 or [1.0, 1.0]
        low, middle, high = statistics.quantiles(times, n=4)
        spread = 100 * (high - low) / middle
        stolen = 100 * stolen / max(1, total)
        reasons = [
            f"{what} {percent:.0f} %"
            for what, percent in (
                ("CPUs were busy before it began:", self.busy_before),
                ("quartiles of a fixed computation lie apart by", spread),
                ("CPU time was stolen by the hypervisor:", stolen),
            )
            if percent > self.FEW_PERCENT
        ]
        return {
            "busy before, %": round(self.busy_before, 1),
            "stolen, %": round(stolen, 1),
            "fixed computation: samples": len(self.times),
            "fixed computation: quartiles apart, %": round(spread, 1),
            "fixed computation: slowest / median": round(max(times) / middle, 2),
            "too loaded to trust": reasons,
        }


def _cpu_times() -> tuple[int, int, int]:
    """Ticks of all CPUs: busy, stolen, all."""
    with open("/proc/stat") as stat:
        ticks = [int(word) for word in stat.readline().split()[1:9]]
    idle = ticks[3] + ticks[4]
    return sum(ticks) - idle, ticks[7], sum(ticks)


def available() -> int:
    """Bytes of RAM that can be had."""
    return _fields(Path("/proc/meminfo"))["MemAvailable"]


def told() -> dict[str, Any]:
    """This machine, without its name."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "CPUs": len(_ALL),
        "CPU": model,
        "RAM, GiB": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30), 1),
        "kernel": os.uname().release,
        "Python": platform.python_version(),
        "pinned": pinning(),
    }

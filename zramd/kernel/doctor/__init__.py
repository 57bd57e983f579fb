"""What on this machine would hurt, and what to do: the checks of `zramd doctor`.

    look() -> Machine                       # this machine, and its devices
    examine(machine, name=None) -> list[Report]
    sick(reports) -> Report | None          # the first problem

A check has a slug for scripts, and an exit status that is its own, from 60 to 89: what the command
ends with when it is the first problem. docs/doctor.md lists them; a test compares.

Promises
1. Nothing is changed: what has to be tried, a child tries. No device node is opened, since that of
   a dead server can hang.
2. What cannot be told is "unknown", with the reason; no check fails.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Final, TypeVar

from zramd.errors import NoServer, ZramdError
from zramd.kernel.doctor import device_checks, machine_checks
from zramd.kernel.doctor.machine import Device, Machine, device_names
from zramd.kernel.doctor.verdict import Status, Verdict, unknown

__all__ = ["CHECKS", "Check", "Device", "Machine", "Report", "Status", "examine", "look", "sick"]

_V = TypeVar("_V")


@dataclass(frozen=True, slots=True)
class Check:
    """`meaning` is what is so where it finds nothing; `look` makes a verdict on the machine, whose
    device is None, or one on each device that it has to do with."""

    exit_status: int
    slug: str
    meaning: str
    look: Callable[[Machine], list[tuple[str | None, Verdict]]]


@dataclass(frozen=True, slots=True)
class Report:
    """What a check found; `device` is None where it is about the machine."""

    check: Check
    device: str | None
    verdict: Verdict


def _machine(status: int, slug: str, of: Callable[[Machine], Verdict], meaning: str) -> Check:
    return Check(status, slug, meaning, lambda machine: [(None, _told(lambda: of(machine)))])


def _device(
    status: int, slug: str, of: Callable[[Machine, Device], Verdict | None], meaning: str
) -> Check:
    def look(machine: Machine) -> list[tuple[str | None, Verdict]]:
        told = [(device.name, _told(partial(of, machine, device))) for device in machine.devices]
        return [(name, verdict) for name, verdict in told if verdict is not None]

    return Check(status, slug, meaning, look)


def _told(look: Callable[[], _V]) -> _V | Verdict:
    try:
        return look()
    except PermissionError as error:
        return unknown(f"{error.filename} is not for us to read", "sudo zramd doctor")
    except OSError as error:
        return unknown(f"{error.filename or 'it cannot be told'}: {error.strerror}")
    except (ValueError, ZramdError) as error:
        return unknown(f"it cannot be told: {error}")


# fmt: off
CHECKS: Final = (
    _machine(60, "kernel", machine_checks.kernel,
             "The kernel has PR_SET_IO_FLUSHER (5.6) and names of nbd devices (5.14)."),
    _machine(61, "nbd", machine_checks.nbd,
             "nbd is loaded, or can be, and can be talked to from here."),
    _machine(62, "nbd-nodes", machine_checks.nbd_nodes,
             "The nodes that files in /etc/zramd ask for are free."),
    _machine(63, "loop", machine_checks.loop,
             "Without nbd: fuse, loop, nbdfuse and losetup are there."),
    _machine(64, "io-flusher", machine_checks.io_flusher,
             "A server may have PR_SET_IO_FLUSHER (CAP_SYS_RESOURCE); tried."),
    _machine(65, "oom-score", machine_checks.oom_score,
             "A server may have oom_score_adj -1000 (CAP_SYS_RESOURCE); tried."),
    _machine(66, "memory-lock", machine_checks.memory_lock,
             "A server may lock its memory (CAP_IPC_LOCK, RLIMIT_MEMLOCK); tried."),
    _machine(67, "realtime", machine_checks.realtime,
             "A server may have a real-time class (CAP_SYS_NICE, RLIMIT_RTPRIO), and run; tried."),
    _machine(68, "min-free", machine_checks.min_free,
             "vm.min_free_kbytes leaves a server enough to answer from."),
    _machine(69, "overcommit", machine_checks.overcommit,
             "vm.overcommit_memory does not refuse memory that is free."),
    _machine(70, "memory", machine_checks.memory,
             "What files in /etc/zramd will have preallocated is available."),
    _machine(71, "memory-cgroup", machine_checks.memory_cgroup,
             "No control group is too small for its servers, or, without any, limits a new one."),
    _machine(72, "oom-daemon", machine_checks.oom_daemon,
             "No systemd-oomd kills control groups with servers in them."),
    _machine(73, "config", machine_checks.config_files,
             "The files in /etc/zramd have no faults."),
    _machine(74, "swappiness", machine_checks.swappiness,
             "vm.swappiness is not 0."),
    _machine(75, "zswap", machine_checks.zswap,
             "zswap does not compress pages before we do."),
    _machine(76, "zram-swap", machine_checks.zram_swap,
             "The kernel's zram carries no swap beside ours."),
    _machine(77, "swap-priority", machine_checks.swap_priority,
             "No other swap is used before ours, or in turn with it."),
    _machine(78, "nbd-timeout", machine_checks.nbd_timeout,
             "No nbd device with swap has a timeout."),
    _machine(79, "nbd-client", machine_checks.nbd_client,
             "nbd-client, for those who attach by hand, is none of the broken ones."),
    _machine(80, "nbdkit", machine_checks.nbdkit,
             "nbdkit embeds the Python that zramd is installed for."),
    _machine(81, "devices", machine_checks.devices,
             "The devices that there are can be seen."),
    _device(82, "server", device_checks.server,
            "The device's server lives and answers."),
    _device(83, "hardened", device_checks.hardened,
            "With swap on the device: its server is locked, protected, real-time, I/O flusher."),
    _device(84, "preallocated", device_checks.preallocated,
            "With swap on the device: it has its memory already."),
    _device(85, "swap-way", device_checks.swap_way,
            "With swap on the device: it is attached through nbd."),
    _device(86, "room", device_checks.room,
            "The device is not nearly at its mem_limit."),
    _device(87, "discard", device_checks.discard,
            "What is freed on the node comes back to the device."),
    _device(88, "server-cgroup", device_checks.server_cgroup,
            "The control group of its server has room for the device."),
    _device(89, "server-oom-daemon", device_checks.omitted,
            "Where systemd-oomd runs: it leaves the server alone."),
)
# fmt: on


def look() -> Machine:
    """This machine, with its devices."""
    try:
        names = device_names()
        with ThreadPoolExecutor(len(names) or 1) as pool:  # each may take as long as a stopped one
            return Machine(devices=list(pool.map(Device.look, names)))
    except ZramdError as error:
        return Machine(hidden=error)


def examine(machine: Machine, name: str | None = None) -> list[Report]:
    """All checks, in the order of the table; of the devices all, or the one of that name.

    NoServer where there is nothing of that one, or what hides it.
    """
    if name is not None and machine.hidden is not None:
        raise machine.hidden
    if name is not None and not machine.knows(name):
        raise NoServer(f"there is no device {name}", hint="`zramd list` shows what there is")
    return [
        Report(check, device, verdict)
        for check in CHECKS
        for device, verdict in check.look(machine)
        if device is None or name in (None, device)
    ]


def sick(reports: list[Report]) -> Report | None:
    """The first problem."""
    return next((r for r in reports if r.verdict.status == "problem"), None)

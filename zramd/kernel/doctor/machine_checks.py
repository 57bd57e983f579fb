"""The checks of the machine. Each takes it, and tells one Verdict.

What matters for swap alone is a problem where a device carries swap, or its file says that it is
to; elsewhere it is a warning.
"""

import errno
import os
import re
from typing import Final

from zramd.errors import BadValue
from zramd.kernel.doctor import machine as facts
from zramd.kernel.doctor.machine import Device, Machine
from zramd.kernel.doctor.verdict import Verdict, ok, problem, unknown, warning
from zramd.kernel.use import MIN_FREE_KIB
from zramd.sizes import human

OUR_PRIORITY: Final = 100
"""What `zramd up --swap` gives where nobody says otherwise."""


def kernel(machine: Machine) -> Verdict:
    told = f"Linux {machine.read('/proc/sys/kernel/osrelease')}"
    if machine.release < (5, 6):
        return problem(
            f"{told} has no PR_SET_IO_FLUSHER, without which swap can deadlock",
            "use Linux 5.14 or later",
        )
    if machine.release < (5, 14):
        return warning(
            f"{told} does not keep the names of nbd devices, by which they are found again",
            "use Linux 5.14 or later, or attach with --via loop",
        )
    return ok(f"{told} has what is needed")


# Attaching


def nbd(machine: Machine) -> Verdict:
    if machine.reaches_nbd():
        return ok("nbd is loaded")
    if machine.has("/sys/module/nbd"):
        return _for_swap(
            machine,
            "nbd is loaded, but a container with a network of its own cannot talk to it",
            "attach outside the container, or run that with the host's network",
        )
    if not machine.has_module("nbd"):
        return _for_swap(
            machine,
            "this kernel has no nbd, and the other way, loop, is no place for swap",
            "install the kernel that has it (Debian: linux-image-amd64, not a cloud kernel)",
        )
    if not machine.can_load_modules:
        return _for_swap(
            machine,
            "nbd is not loaded, and nobody can load it from here",
            "`modprobe nbd` on the host",
        )
    return ok("nbd is not loaded yet, and attaching loads it")


def nbd_nodes(machine: Machine) -> Verdict:
    """The kernel makes nodes as they are wanted (nbds_max is only how many it begins with), so what
    can be in the way is another's connection on a node that a device's file asks for."""
    nodes = sorted(machine.path("/sys/block").glob("nbd*"))
    connected = {f"/dev/{node.name}" for node in nodes if (node / "pid").exists()}
    ours = {device.node: device.name for device in machine.devices}
    wanted: dict[str, str] = {}
    for name, config in machine.configs.items():
        if config.node is None:
            continue
        node = config.node
        if node in wanted:
            return problem(
                f"{name} and {wanted[node]} both want {node}", f"give {name} another node"
            )
        wanted[node] = name
        if node in connected and ours.get(node) != name:
            holder = ours.get(node) or _backend(machine, node)
            return problem(
                f"{name} wants {node}, which is taken by {holder}",
                f"free it, or give {name} another node",
            )
    if not nodes:
        return ok("no nbd nodes yet, and the kernel makes them as they are needed")
    return ok(
        f"{len(connected)} of {len(nodes)} nbd nodes are connected, and the kernel makes more"
    )


def _backend(machine: Machine, node: str) -> str:
    """Who has connected the node, in words of their own, as far as they left some."""
    place = f"/sys/block/{os.path.basename(node)}"
    for name, words in (("backend", ""), ("pid", "process ")):
        if machine.has(f"{place}/{name}"):
            return words + machine.read(f"{place}/{name}")
    return "another connection"


def loop(machine: Machine) -> Verdict:
    missing = [
        f"{module} in this kernel"
        for module, node in (("fuse", "/dev/fuse"), ("loop", "/dev/loop-control"))
        if not machine.has(node) and not (machine.has_module(module) and machine.can_load_modules)
    ]
    missing += [program for program in ("nbdfuse", "losetup") if machine.find(program) is None]
    if not missing:
        return ok("a device can be attached through nbdfuse and loop")
    if nbd(machine).status == "ok":
        return ok(f"a device cannot be attached through loop, nor needs to be: no {missing[0]}")
    return problem(
        f"a device cannot be attached at all: there is no nbd, and no {' and no '.join(missing)}",
        "apt install libnbd-bin mount, and give a container /dev/fuse and /dev/loop-control",
    )


def nbd_client(machine: Machine) -> Verdict:
    """Only for those who attach by hand; we talk to the kernel ourselves."""
    told = machine.ask("nbd-client", "--version")
    found = re.search(r"nbd (\d+)\.(\d+)(\.\d+)?", told or "")
    if found is None:
        return ok("no nbd-client, which zramd does not need")
    version = found[0].removeprefix("nbd ")
    if version in ("3.27", "3.27.0"):
        return warning(
            f"nbd-client {version} cannot read /etc/nbdtab (its issue 185)",
            "attach with `zramd attach`, or take a later nbd-client",
        )
    if (int(found[1]), int(found[2])) < (3, 17):
        return warning(
            f"nbd-client {version} attaches by ioctl: when its process ends, so does the device",
            "attach with `zramd attach`, or take nbd-client 3.17 or later",
        )
    return ok(f"nbd-client {version}, which zramd does not need")


def nbdkit(machine: Machine) -> Verdict:
    told = machine.ask("nbdkit", "--dump-plugin", "python")
    found = re.search(r"^python_version=(\d+)\.(\d+)", told or "", re.MULTILINE)
    if found is None:
        return ok("no nbdkit with Python, which only nbd_plugin.py needs")
    theirs, ours = (int(found[1]), int(found[2])), machine.python
    if theirs != ours:
        return warning(
            f"nbdkit has Python {theirs[0]}.{theirs[1]} and zramd {ours[0]}.{ours[1]}:"
            " nbd_plugin.py will not find its packages",
            f"make .venv with python{theirs[0]}.{theirs[1]}, or use `zramd serve`",
        )
    return ok(f"nbdkit and zramd have the same Python, {ours[0]}.{ours[1]}")


# Hardening of the server


def io_flusher(machine: Machine) -> Verdict:
    if machine.refusals.get(facts.IO_FLUSHER) == errno.EINVAL:
        return _for_swap(machine, "this kernel has no PR_SET_IO_FLUSHER", "use Linux 5.6 or later")
    return _allowed(machine, facts.IO_FLUSHER, "CAP_SYS_RESOURCE", facts.CAP_SYS_RESOURCE)


def oom_score(machine: Machine) -> Verdict:
    return _allowed(machine, facts.OOM_SCORE, "CAP_SYS_RESOURCE", facts.CAP_SYS_RESOURCE)


def memory_lock(machine: Machine) -> Verdict:
    return _allowed(
        machine,
        facts.MEMORY_LOCK,
        "CAP_IPC_LOCK",
        facts.CAP_IPC_LOCK,
        f" or RLIMIT_MEMLOCK unlimited (it is {_limit(machine, 'Max locked memory')})",
    )


def realtime(machine: Machine) -> Verdict:
    share = "/proc/sys/kernel/sched_rt_runtime_us"
    if machine.has(share) and machine.read(share) == "0":
        return _for_swap(
            machine,
            "kernel.sched_rt_runtime_us is 0: a server with a real-time class would never run",
            "sysctl kernel.sched_rt_runtime_us=950000",
        )
    for group in machine.cgroups(controller="cpu")[:1]:
        quota = f"{group}/cpu.rt_runtime_us"
        if machine.has(quota) and machine.read(quota) == "0":
            return _for_swap(
                machine,
                f"the control group {group} allows no real-time class: its cpu.rt_runtime_us is 0",
                f"echo 10000 > {quota}, and in the groups above it, or start servers elsewhere",
            )
    return _allowed(
        machine,
        facts.REALTIME,
        "CAP_SYS_NICE",
        facts.CAP_SYS_NICE,
        f" or RLIMIT_RTPRIO of 1 (it is {_limit(machine, 'Max realtime priority')})",
    )


def _allowed(
    machine: Machine, move: str, capability: str, number: int, otherwise: str = ""
) -> Verdict:
    """Whether a server of ours may make the move that hardens it."""
    refused = machine.refusals.get(move)
    if refused == 0:
        return ok(f"a server may have {move}")
    needs = f"{capability}{otherwise}"
    reason = "was not answered" if refused is None else f"is refused: {os.strerror(refused)}"
    if not machine.may_become_capable(number):
        return _for_swap(
            machine,
            f"{move} {reason}, and not even root has {capability} here",
            f"start the container, or the unit, with {needs}",
        )
    if not machine.is_root:
        return unknown(f"{move} {reason}, but may be granted to root", "sudo zramd doctor")
    if machine.in_user_namespace:
        return _for_swap(
            machine,
            f"{move} {reason}: what root of a user namespace has does not count",
            "start servers for swap outside of it",
        )
    return _for_swap(machine, f"{move} {reason}", f"start servers with {needs}")


def _limit(machine: Machine, name: str) -> str:
    """The soft limit of this process, as /proc has it."""
    for line in machine.read("/proc/self/limits").splitlines():
        if line.startswith(name):
            return line.removeprefix(name).split()[0]
    raise ValueError(f"/proc/self/limits has no {name}")


# Memory


def min_free(machine: Machine) -> Verdict:
    free = machine.number("/proc/sys/vm/min_free_kbytes")
    if free < MIN_FREE_KIB:
        return _for_swap(
            machine,
            f"vm.min_free_kbytes is {free}: too little for a server to answer from when no memory"
            " is free",
            f"sysctl vm.min_free_kbytes={MIN_FREE_KIB}, and in /etc/sysctl.d for good",
        )
    return ok(f"vm.min_free_kbytes is {free}, which leaves servers enough to answer")


def overcommit(machine: Machine) -> Verdict:
    mode = machine.number("/proc/sys/vm/overcommit_memory")
    if mode != 2:
        return ok(f"vm.overcommit_memory is {mode}: memory is not refused before it is used up")
    left = machine.meminfo("CommitLimit") - machine.meminfo("Committed_AS")
    return warning(
        f"vm.overcommit_memory is 2: a server gets no more memory when {human(left)} more have"
        " been promised, though it may be free",
        "sysctl vm.overcommit_memory=0, or a higher vm.overcommit_ratio",
    )


def memory(machine: Machine) -> Verdict:
    running = {device.name for device in machine.devices}
    wanted = {
        name: config.reservation
        for name, config in machine.configs.items()
        if config.reserves and name not in running
    }
    available, total = machine.meminfo("MemAvailable"), sum(wanted.values())
    if not wanted:
        return ok(f"{human(available)} of memory are available, and no device waits for some")
    who = ", ".join(wanted)
    if total > available:
        return problem(
            f"{who} will take {human(total)} at once, and {human(available)} are available",
            f"lower mem_limit or disksize of {who}",
        )
    if total > available * 0.8:
        return warning(
            f"{who} will take {human(total)} at once, of {human(available)} that are available",
            f"lower mem_limit or disksize of {who}",
        )
    return ok(f"{who} will take {human(total)} at once, and {human(available)} are available")


def memory_cgroup(machine: Machine) -> Verdict:
    """Of the servers that run, all of a group together; for want of any, of one started here."""
    servers = [device for device in machine.devices if device.now is not None]
    if servers:
        return _groups_of(machine, servers)
    limit = machine.memory_limit()
    if limit is None:
        return ok("no control group limits the memory of a server started here")
    wanted = sum(config.reservation for config in machine.configs.values())
    if wanted > limit:
        return problem(
            f"the control group of this process may take {human(limit)}, and devices that are"
            f" configured want {human(wanted)}",
            "start servers elsewhere (zramd@NAME.service), or raise memory.max and memory.high",
        )
    return warning(
        f"the control group of this process may take {human(limit)}: a server started here gets"
        " no more than that",
        "keep mem_limit well below, or start servers elsewhere (zramd@NAME.service)",
    )


def _groups_of(machine: Machine, servers: list[Device]) -> Verdict:
    limits: dict[str, int] = {}
    members: dict[str, list[Device]] = {}
    for server in servers:
        for group, limit in machine.memory_limits(server.process).items():
            limits[group] = limit
            members.setdefault(group, []).append(server)
    for group, inside in members.items():
        wanted = sum(device.wants for device in inside)
        if wanted > limits[group]:
            return problem(
                f"{group} may take {human(limits[group])}, and the devices whose servers are in it,"
                f" {', '.join(device.name for device in inside)}, want {human(wanted)}",
                "raise its memory.max and memory.high, or lower a mem_limit",
            )
    if limits:
        return ok("the control groups of the servers may take what their devices want")
    return ok("no control group limits the memory of the servers")


def oom_daemon(machine: Machine) -> Verdict:
    if not machine.processes("systemd-oomd"):
        return ok("no systemd-oomd kills whole control groups here")
    return warning(
        "systemd-oomd runs: it kills a whole control group, a server in it too, whatever its"
        " oom_score_adj",
        "start servers by zramd@NAME.service, which has ManagedOOMPreference=omit",
    )


def config_files(machine: Machine) -> Verdict:
    for made in machine.configurations.values():
        if isinstance(made, BadValue):
            return problem(made.message, made.hint or "correct that line")
    count = len(machine.configurations)
    return ok(f"devices with a file in {machine.config_dir}: {count}, and no fault in them")


def devices(machine: Machine) -> Verdict:
    if machine.hidden is not None:
        return unknown(machine.hidden.message, machine.hidden.hint or "")
    names = ", ".join(device.name for device in machine.devices)
    return ok(f"devices here: {names}" if names else "no devices here")


# Swap


def swappiness(machine: Machine) -> Verdict:
    value = machine.number("/proc/sys/vm/swappiness")
    if value == 0:
        return warning(
            "vm.swappiness is 0: the kernel swaps at the last moment only, when it is too late to"
            " compress",
            "sysctl vm.swappiness=100",
        )
    return ok(f"vm.swappiness is {value}")


def zswap(machine: Machine) -> Verdict:
    enabled = "/sys/module/zswap/parameters/enabled"
    if machine.has(enabled) and machine.read(enabled) in ("Y", "1"):
        return warning(
            "zswap is on: pages are compressed by it before they are swapped, and again by us",
            f"echo N > {enabled}, and zswap.enabled=0 on the kernel's command line for good",
        )
    return ok("zswap is off")


def zram_swap(machine: Machine) -> Verdict:
    theirs = [s.node for s in machine.swaps if s.node.startswith("/dev/zram")]
    if theirs:
        return warning(
            f"{theirs[0]} is swap of the kernel's zram, which is faster than ours and takes memory"
            " that ours could have",
            f"choose one: swapoff {theirs[0]}, or no swap on zramd",
        )
    return ok("no swap on the kernel's zram beside ours")


def swap_priority(machine: Machine) -> Verdict:
    nodes = {device.node for device in machine.devices if device.is_swap}
    ours = [swap for swap in machine.swaps if swap.node in nodes]
    # The lowest of ours is the one that is used last.
    priority = min((swap.priority for swap in ours), default=OUR_PRIORITY)
    rivals = [s for s in machine.swaps if s.node not in nodes and s.priority >= priority]
    if not rivals:
        return ok(f"no other swap has a priority of {priority} or more")
    rival = max(rivals, key=lambda swap: swap.priority)
    how = "before ours" if rival.priority > priority else "in turn with ours"
    return warning(
        f"{rival.node} is swap of priority {rival.priority}, used {how} of {priority}",
        f"swapoff {rival.node}, and swapon it with a priority below {priority}; or give ours more",
    )


def nbd_timeout(machine: Machine) -> Verdict:
    """`zramd attach` gives none; but nbd devices with swap may have been attached by hand."""
    nodes = [s.node for s in machine.swaps if re.fullmatch(r"/dev/nbd\d+", s.node)]
    others = [node for node in nodes if not _backend(machine, node).startswith("zramd:")]
    for node in others:
        timeout = f"/sys/kernel/debug/nbd/{os.path.basename(node)}/timeout"
        if not machine.has(timeout):
            return unknown(
                f"{node} carries swap, and its timeout is not to be seen without debugfs",
                "mount -t debugfs debugfs /sys/kernel/debug, and look as root",
            )
        if machine.read(timeout) != "0":
            return problem(
                f"{node} carries swap and has a timeout: a server that is only slow is cut off,"
                " and what was swapped is lost",
                f"swapoff {node}, and attach it without one, as `zramd attach` does",
            )
    return ok("no swap on nbd has a timeout" if nodes else "no swap on nbd")


def _for_swap(machine: Machine, finding: str, advice: str) -> Verdict:
    return (problem if machine.swaps_on_ours else warning)(finding, advice)

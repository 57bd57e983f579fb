"""The checks of a device. Each takes the machine and the device, and tells one Verdict, or None
where the device gives it nothing to tell.

What cannot be told: whether swap on a node is discarded (/proc/swaps does not say; that nothing was
ever discarded there does), and whether a server collects garbage.
"""

import os
from typing import Final

from zramd.kernel.doctor.machine import Device, Machine
from zramd.kernel.doctor.verdict import Verdict, ok, problem, unknown, warning
from zramd.service.hardening import lacking
from zramd.sizes import human

_NEARLY: Final = 0.9
_PILE: Final = 64 << 20
"""Freed swap comes back a cluster at a time, so that some that is not needed is always there."""


def server(machine: Machine, device: Device) -> Verdict:
    name, node = device.name, device.node
    if device.state == "silent":
        return problem(
            f"{name}: its server does not answer",
            f"see whether process {device.process} is stopped (kill -CONT) or overloaded"
            if device.process
            else "see whether it is stopped or overloaded",
        )
    if device.state != "dead":
        return ok(f"{name}: its server answers")
    if not node:
        return warning(f"{name}: its server is dead", f"zramd down {name}")
    uses = f", {' and '.join(map(str, device.users))}" if device.users else ""
    return problem(
        f"{name}: its server is dead, and its pages are lost, but {node} is still there{uses}",
        f"zramd down {name}",
    )


def hardened(machine: Machine, device: Device) -> Verdict | None:
    """What the server of swap has of hardening.py, as far as /proc tells."""
    if not device.is_swap or device.now is None:
        return None
    lacks = lacking(machine.path(f"/proc/{device.process}"))
    if lacks:
        return problem(
            f"{device.name} carries swap, and its server has no {', no '.join(lacks)}: short of"
            " memory, all can stand still",
            f"zramd down {device.name}, then up again as root, with --swap and without"
            " --allow-deadlock",
        )
    return ok(f"{device.name} carries swap, and its server is hardened for that")


def preallocated(machine: Machine, device: Device) -> Verdict | None:
    if not device.is_swap or device.now is None:
        return None
    if not device.now.mem_reserved:
        return problem(
            f"{device.name} carries swap, and takes memory only when there is none any more",
            f"zramd down {device.name}, then up again with --swap and without --no-prealloc",
        )
    return ok(f"{device.name} carries swap in {human(device.now.mem_reserved)} that it has")


def swap_way(machine: Machine, device: Device) -> Verdict | None:
    if not device.is_swap or device.attachment is None:
        return None
    if device.attachment.via == "loop":
        return problem(
            f"{device.name} carries swap through loop: FUSE, which is in between, needs memory to"
            " write, and can wait for the memory that is being freed",
            f"zramd down {device.name}, and attach it through nbd",
        )
    return ok(f"{device.name} carries swap through {device.attachment.via}")


def room(machine: Machine, device: Device) -> Verdict | None:
    now = device.now
    if now is None or not now.mem_limit:
        return None
    share = now.mem_used_total / now.mem_limit
    told = f"{device.name} has {human(now.mem_used_total)} of mem_limit {human(now.mem_limit)}"
    if share < _NEARLY:
        return ok(f"{told} in use")
    higher = f"zramd set {device.name} mem_limit SIZE"
    if now.mem_reserved:
        higher = f"zramd down {device.name}, and up again with a higher --mem-limit"
    if now.failed_writes:
        return problem(
            f"{told} in use, and {now.failed_writes} writes have failed",
            f"free some of what it holds, or {higher}",
        )
    return warning(
        f"{told} in use, and writes that pass it will fail",
        f"free some of what it holds, or {higher}",
    )


def discard(machine: Machine, device: Device) -> Verdict | None:
    """Whether what is freed on the node comes back to us."""
    if not device.users or device.now is None:
        return None
    for line in machine.read("/proc/self/mountinfo").splitlines():
        _before, _, after = line.partition(" - ")
        kind, source, options = after.split(" ", 2)
        given = options.split(",")
        if source == device.node and not any(option.startswith("discard") for option in given):
            return warning(
                f"{device.name} is mounted without discard: the memory of deleted files is kept",
                f"mount -o remount,discard {device.node}, or run fstrim now and then ({kind})",
            )
    for swap in machine.swaps:
        stored = device.now.orig_data_size
        # swapon --discard discards the whole node first. Without that, what has piled up is not the
        # kernel's slowness: it gives back a cluster when all of it is free, which may be never.
        never = device.now.notify_free == 0
        if swap.node == device.node and never and stored > 2 * swap.used + _PILE:
            return warning(
                f"{device.name} holds {human(stored)} for {human(swap.used)} of swap in use: what"
                " is freed is not discarded",
                f"swapoff {device.node}; swapon --discard --priority 100 {device.node}",
            )
    return ok(f"{device.name} gets back what is freed on {device.node}")


def server_cgroup(machine: Machine, device: Device) -> Verdict | None:
    if device.now is None:
        return None
    limit = machine.memory_limit(device.process)
    if limit is None:
        return ok(f"{device.name}: no control group limits the memory of its server")
    wants = device.wants
    grants = f"{device.name}: its server's control group may take {human(limit)}"
    if limit < wants:
        return problem(
            f"{grants}, and the device {human(wants)}: its server will be killed, or stand still",
            f"raise memory.max and memory.high, or lower mem_limit: zramd set {device.name}"
            f" mem_limit {human(limit // 2)}",
        )
    return ok(f"{grants}, which is more than the device takes")


def omitted(machine: Machine, device: Device) -> Verdict | None:
    """Where systemd-oomd runs: whether it leaves the server alone."""
    if device.now is None or not machine.processes("systemd-oomd"):
        return None
    for group in machine.cgroups(device.process)[:1]:
        try:
            if os.getxattr(machine.path(group), "user.oomd_omit") == b"1":
                return ok(f"{device.name}: systemd-oomd leaves its server alone")
        except OSError:
            break
    else:
        return unknown(f"{device.name}: its server's control group is not to be seen")
    return warning(
        f"{device.name}: systemd-oomd may kill its server, with all of {group}",
        f"run it by zramd@{device.name}.service, which has ManagedOOMPreference=omit",
    )

"""The checks of `zramd doctor`, each on made machines: directories that hold what its files would
tell, and answers for what no file tells. One on which nothing hurts, and a change for each ill."""

import errno
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import require
from zramd.errors import KINDS, BadValue, NoServer
from zramd.kernel import doctor
from zramd.kernel.attach import Attachment
from zramd.kernel.doctor import machine as facts
from zramd.kernel.doctor.machine import Device, Machine
from zramd.kernel.doctor.verdict import Verdict
from zramd.kernel.state import Swap, User
from zramd.statistics import Statistics

MIB = 1 << 20
SWAPS = "Filename Type Size Used Priority\n"
OURS = "/dev/nbd0 partition 131068 65536 100\n"
MOUNT = "40 27 43:0 / /mnt rw,relatime shared:2 - ext4 /dev/nbd0 rw,discard\n"
STAT = "42 (zramd (x) y) S 1 42 42 0 -1 {flags} " + "0 " * 31 + "{policy} 0 0\n"
HARDENED = STAT.format(flags=0x00080000 | 0x00400040, policy=1)
STATUS = (
    "Name:\tzramd\nUid:\t{uid}\t{uid}\t0\t0\nVmSize:\t  262176 kB\nVmLck:\t{locked} kB\n"
    "CapEff:\t{cap}\nCapBnd:\t{cap}\n"
)
ALL_CAPABILITIES = "000001ffffffffff"
NO_SYS_RESOURCE = "000001fffeffffff"
SWAP_FILE = 'disksize = "64M"\nuse = "swap"\nmem_limit = "32M"\n'

HEALTHY = {
    "/proc/sys/kernel/osrelease": "6.1.0-56-amd64",
    "/proc/sys/kernel/sched_rt_runtime_us": "950000",
    "/proc/sys/kernel/modules_disabled": "0",
    "/proc/sys/vm/min_free_kbytes": "67584",
    "/proc/sys/vm/overcommit_memory": "0",
    "/proc/sys/vm/swappiness": "60",
    "/proc/meminfo": "MemTotal: 1048576 kB\nMemAvailable: 524288 kB\n"
    "CommitLimit: 4096 kB\nCommitted_AS: 1024 kB\n",
    "/proc/swaps": SWAPS,
    "/proc/self/status": STATUS.format(uid=0, locked=0, cap=ALL_CAPABILITIES),
    "/proc/self/limits": "Max locked memory  8388608 8388608 bytes\nMax realtime priority 0 0\n",
    "/proc/self/uid_map": "         0          0 4294967295",
    "/proc/self/cgroup": "0::/user.slice/session-1.scope",
    "/proc/self/mountinfo": MOUNT + MOUNT.replace("/dev/nbd0", "/dev/sda1").replace(",discard", ""),
    "/proc/1/comm": "systemd",
    "/proc/42/comm": "zramd",
    "/proc/42/status": STATUS.format(uid=0, locked=262144, cap=ALL_CAPABILITIES),
    "/proc/42/oom_score_adj": "-1000",
    "/proc/42/task/42/stat": HARDENED,
    "/proc/42/task/43/stat": HARDENED,
    "/proc/42/cgroup": "0::/system.slice/zramd@swap0.service",
    "/sys/fs/cgroup/system.slice/zramd@swap0.service/memory.max": "max",
    "/sys/fs/cgroup/user.slice/session-1.scope/memory.max": "max",
    "/sys/fs/cgroup/user.slice/memory.high": "max",
    "/sys/module/zswap/parameters/enabled": "N",
    "/sys/block/nbd0/backend": "zramd:/run/zramd/swap0#17",
    "/sys/block/nbd0/pid": "42",
    "/sys/block/nbd1/size": "0",
    "/dev/fuse": "",
    "/dev/loop-control": "",
}
_FIGURES = {
    "name": "swap0",
    "disksize": 128 * MIB,
    "algorithm": "lz4",
    "orig_data_size": 64 * MIB,
    "mem_used_total": 32 * MIB,
    "mem_limit": 64 * MIB,
    "mem_reserved": 64 * MIB,
    "openers": (),
    "in_flight": (),
}
NOW = Statistics(**{**dict.fromkeys(Statistics.__dataclass_fields__, 0), **_FIGURES})
SWAP = Device(
    "swap0",
    "serving",
    process="42",
    now=NOW,
    attachment=Attachment("swap0", "/dev/nbd0", "nbd"),
    users=(User("swap", "[SWAP]"),),
)
MOUNTED = replace(SWAP, users=(User("mount", "/mnt"),))


class Made(Machine):
    """A machine of files and answers. A file that is None is not there."""

    python = (3, 11)

    def __init__(self, root: Path, files=None, *, configs=None, devices=(), **answers) -> None:
        for name, content in {**HEALTHY, **(files or {})}.items():
            if content is not None:
                file = root / name.lstrip("/")
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(content)
        config_dir = root / "etc/zramd"
        for name, content in (configs or {}).items():
            config_dir.mkdir(parents=True, exist_ok=True)
            (config_dir / f"{name}.toml").write_text(content)
        super().__init__(root, devices, config_dir=config_dir, hidden=answers.get("hidden"))
        self.answers = answers

    def find(self, program):
        return None if program in self.answers.get("missing", ()) else f"/usr/bin/{program}"

    def ask(self, *argv):
        told = {
            "nbd-client": "This is nbd-client, from nbd 3.24",
            "nbdkit": "python_version=3.11.2",
        }
        return {**told, **self.answers.get("told", {})}[argv[0]]

    def reaches_nbd(self):
        return self.answers.get("nbd", True)

    @property
    def refusals(self):
        return {**dict.fromkeys(facts.MOVES, 0), **self.answers.get("refused", {})}


def verdict(machine: Machine, slug: str) -> Verdict:
    """The only one of this check."""
    (found,) = [r.verdict for r in doctor.examine(machine) if r.check.slug == slug]
    return found


REFUSED = errno.EPERM
LACKS_SYS_RESOURCE = STATUS.format(uid=0, locked=0, cap=NO_SYS_RESOURCE)
USER = STATUS.format(uid=1000, locked=0, cap="0").replace(
    "CapBnd:\t0", f"CapBnd:\t{ALL_CAPABILITIES}"
)
GROUP = "/sys/fs/cgroup/user.slice/session-1.scope"
OTHER_NODE = {"/sys/block/nbd1/pid": "77"}

# slug, what it must say, what is otherwise on the machine, and the status of that
ILLS = [
    ("kernel", "problem", "Linux 5.4.0", "5.14", {"/proc/sys/kernel/osrelease": "5.4.0-1"}, {}),
    ("kernel", "warning", "Linux 5.13+", "--via loop", {"/proc/sys/kernel/osrelease": "5.13+"}, {}),
    ("nbd", "warning", "this kernel has no nbd", "install", {}, {"nbd": False}),
    ("nbd", "problem", "no nbd", "install", {}, {"nbd": False, "configs": {"swap1": SWAP_FILE}}),
    (
        *("nbd", "warning", "a container with a network", "outside the container"),
        *({"/sys/module/nbd/refcnt": "1"}, {"nbd": False}),
    ),
    (
        *("nbd", "warning", "nobody can load it", "modprobe nbd"),
        {
            "/lib/modules/6.1.0-56-amd64/modules.dep": "kernel/drivers/block/nbd.ko.xz:\n",
            "/proc/sys/kernel/modules_disabled": "1",
        },
        {"nbd": False},
    ),
    (
        *("nbd-nodes", "problem", "files wants /dev/nbd1, which is taken by process 77", "another"),
        *(OTHER_NODE, {"configs": {"files": 'disksize = "1G"\nnode = "/dev/nbd1"\n'}}),
    ),
    (
        *("nbd-nodes", "problem", "files wants /dev/nbd0, which is taken by swap0", "another"),
        {},
        {"configs": {"files": 'disksize = "1G"\nnode = "/dev/nbd0"\n'}, "devices": [SWAP]},
    ),
    (
        *("nbd-nodes", "problem", "b and a both want /dev/nbd3", "give b another"),
        {},
        {"configs": dict.fromkeys("ab", 'disksize = "1G"\nnode = "/dev/nbd3"\n')},
    ),
    (
        *("loop", "problem", "no nbdfuse", "apt install libnbd-bin"),
        *({}, {"nbd": False, "missing": ["nbdfuse"]}),
    ),
    (
        *("loop", "problem", "no fuse in this kernel and no losetup", "/dev/fuse"),
        *({"/dev/fuse": None}, {"nbd": False, "missing": ["losetup"]}),
    ),
    (
        *("io-flusher", "warning", "PR_SET_IO_FLUSHER is refused: Operation", "CAP_SYS_RESOURCE"),
        *({}, {"refused": {facts.IO_FLUSHER: REFUSED}}),
    ),
    (
        *("io-flusher", "problem", "not even root has CAP_SYS_RESOURCE", "start the container"),
        {"/proc/self/status": LACKS_SYS_RESOURCE},
        {"refused": {facts.IO_FLUSHER: REFUSED}, "configs": {"swap1": SWAP_FILE}},
    ),
    (
        *("io-flusher", "problem", "not even root", "start the container"),
        {"/proc/self/status": LACKS_SYS_RESOURCE, "/proc/swaps": SWAPS + OURS},
        {"refused": {facts.IO_FLUSHER: REFUSED}, "devices": [SWAP]},
    ),
    (
        *("io-flusher", "warning", "this kernel has no PR_SET_IO_FLUSHER", "Linux 5.6"),
        *({}, {"refused": {facts.IO_FLUSHER: errno.EINVAL}}),
    ),
    (
        *("oom-score", "warning", "oom_score_adj -1000 is refused", "CAP_SYS_RESOURCE"),
        *({}, {"refused": {facts.OOM_SCORE: errno.EACCES}}),
    ),
    (
        *("memory-lock", "warning", "mlockall is refused", "unlimited (it is 8388608)"),
        *({}, {"refused": {facts.MEMORY_LOCK: errno.ENOMEM}}),
    ),
    (
        *("memory-lock", "warning", "root of a user namespace", "outside"),
        {"/proc/self/uid_map": "0 1000 1"},
        {"refused": {facts.MEMORY_LOCK: errno.ENOMEM}},
    ),
    (
        *("memory-lock", "unknown", "may be granted to root", "sudo zramd doctor"),
        {"/proc/self/status": USER},
        {"refused": {facts.MEMORY_LOCK: errno.ENOMEM}},
    ),
    (
        *("realtime", "warning", "SCHED_FIFO is refused", "RLIMIT_RTPRIO of 1 (it is 0)"),
        *({}, {"refused": {facts.REALTIME: REFUSED}}),
    ),
    (
        *("realtime", "warning", "sched_rt_runtime_us is 0", "sysctl"),
        *({"/proc/sys/kernel/sched_rt_runtime_us": "0"}, {}),
    ),
    (
        *("realtime", "warning", "cpu.rt_runtime_us is 0", "echo"),
        {
            "/proc/self/cgroup": "3:cpu,cpuacct:/a/b\n0::/\n",
            "/sys/fs/cgroup/cpu,cpuacct/a/b/cpu.rt_runtime_us": "0",
        },
        {},
    ),
    (
        *("min-free", "warning", "vm.min_free_kbytes is 2799", "sysctl vm.min_free_kbytes="),
        *({"/proc/sys/vm/min_free_kbytes": "2799"}, {}),
    ),
    (
        *("min-free", "problem", "vm.min_free_kbytes is 2799", "sysctl.d"),
        *({"/proc/sys/vm/min_free_kbytes": "2799"}, {"configs": {"swap1": SWAP_FILE}}),
    ),
    (
        *("overcommit", "warning", "when 3M more have been promised", "sysctl"),
        *({"/proc/sys/vm/overcommit_memory": "2"}, {}),
    ),
    (
        *("memory", "problem", "a, b will take 640M at once, and 512M are", "lower mem_limit"),
        {},
        {"configs": dict.fromkeys("ab", SWAP_FILE.replace("32M", "320M"))},
    ),
    (
        *("memory", "warning", "swap1 will take 450M at once, of 512M", "lower mem_limit"),
        *({}, {"configs": {"swap1": SWAP_FILE.replace("32M", "450M")}}),
    ),
    (
        *("memory", "problem", "swap1 will take 1G at once", "lower"),
        *({}, {"configs": {"swap1": 'disksize = "2G"\nprealloc = true\n'}}),
    ),
    (
        *("memory-cgroup", "warning", "may take 16M", "zramd@NAME"),
        *({f"{GROUP}/memory.max": str(16 * MIB)}, {}),
    ),
    (
        *("memory-cgroup", "warning", "may take 32M", "zramd@NAME"),
        *({"/sys/fs/cgroup/user.slice/memory.high": str(32 * MIB)}, {}),
    ),
    (
        *("memory-cgroup", "warning", "may take 16M", "zramd@NAME"),
        {
            "/proc/self/cgroup": "4:memory:/box\n0::/\n",
            "/sys/fs/cgroup/memory/box/memory.limit_in_bytes": str(16 * MIB),
        },
        {},
    ),
    (
        *("memory-cgroup", "problem", "may take 16M, and devices that are configured want 32M", ""),
        *({f"{GROUP}/memory.max": str(16 * MIB)}, {"configs": {"swap1": SWAP_FILE}}),
    ),
    (
        *("memory-cgroup", "problem", "/system.slice may take 96M, and the devices", "memory.max"),
        {
            "/sys/fs/cgroup/system.slice/memory.max": str(96 * MIB),
            "/proc/43/cgroup": "0::/system.slice/zramd@swap1.service",
        },
        {"devices": [SWAP, replace(SWAP, name="swap1", process="43")]},
    ),
    (
        *("oom-daemon", "warning", "systemd-oomd runs", "ManagedOOMPreference=omit"),
        *({"/proc/9/comm": "systemd-oomd"}, {}),
    ),
    (
        *("config", "problem", "bad.toml:2: ", "disksize"),
        *({}, {"configs": {"bad": 'disksize = "1G"\ndiskzise = "2G"\n'}}),
    ),
    (
        *("swappiness", "warning", "vm.swappiness is 0", "sysctl vm.swappiness"),
        *({"/proc/sys/vm/swappiness": "0"}, {}),
    ),
    (
        *("zswap", "warning", "zswap is on", "echo N"),
        *({"/sys/module/zswap/parameters/enabled": "Y"}, {}),
    ),
    (
        *("zram-swap", "warning", "/dev/zram0 is swap", "swapoff /dev/zram0"),
        *({"/proc/swaps": SWAPS + "/dev/zram0 partition 1024 0 5\n"}, {}),
    ),
    (
        *("swap-priority", "warning", "/dev/sda2 is swap of priority 150, used before", "swapoff"),
        *({"/proc/swaps": SWAPS + "/dev/sda2 partition 1024 0 150\n"}, {}),
    ),
    (
        *("swap-priority", "warning", "priority 100, used in turn with ours of 100", "below 100"),
        *({"/proc/swaps": SWAPS + "/swap file 1024 0 100\n"}, {}),
    ),
    (
        *("swap-priority", "warning", "/swap is swap of priority 50, used before ours of 5", ""),
        {"/proc/swaps": SWAPS + OURS.replace(" 100", " 5") + "/swap file 1024 0 50\n"},
        {"devices": [SWAP]},
    ),
    (
        *("nbd-timeout", "problem", "/dev/nbd7 carries swap and has a timeout", "zramd attach"),
        {
            "/proc/swaps": SWAPS + "/dev/nbd7 partition 1024 0 5\n",
            "/sys/kernel/debug/nbd/nbd7/timeout": "1250",
        },
        {},
    ),
    (
        *("nbd-timeout", "unknown", "/dev/nbd7 carries swap", "debugfs"),
        *({"/proc/swaps": SWAPS + "/dev/nbd7 partition 1024 0 5\n"}, {}),
    ),
    (
        *("nbd-client", "warning", "nbd-client 3.27.0 cannot read", "zramd attach"),
        *({}, {"told": {"nbd-client": "This is nbd-client, from nbd 3.27.0\n"}}),
    ),
    (
        *("nbd-client", "warning", "nbd-client 3.16.2 attaches by ioctl", "zramd attach"),
        *({}, {"told": {"nbd-client": "This is nbd-client version 1, from nbd 3.16.2\n"}}),
    ),
    (
        *("nbdkit", "warning", "nbdkit has Python 3.13 and zramd 3.11", "python3.13"),
        *({}, {"told": {"nbdkit": "name=python\npython_version=3.13.5\n"}}),
    ),
    (
        *("devices", "unknown", "there is no runtime directory", "set it"),
        *({}, {"hidden": BadValue("there is no runtime directory", hint="set it")}),
    ),
]

DEVICE_ILLS = [
    (
        *("server", "problem", "swap0: its server is dead", "zramd down swap0"),
        *({}, replace(SWAP, state="dead", now=None)),
    ),
    (
        *("server", "problem", "/dev/nbd0 is still there, used as swap", "zramd down swap0"),
        *({}, replace(SWAP, state="dead", now=None)),
    ),
    (
        *("server", "warning", "swap0: its server is dead", "zramd down swap0"),
        *({}, Device("swap0", "dead")),
    ),
    (
        *("server", "problem", "swap0: its server does not answer", "process 42"),
        *({}, replace(SWAP, state="silent", now=None)),
    ),
    (
        *("hardened", "problem", "no locked memory:", "zramd down swap0"),
        *({"/proc/42/status": HEALTHY["/proc/self/status"]}, SWAP),
    ),
    (
        *("hardened", "problem", "no locked memory:", "zramd down swap0"),  # the arena alone is
        {"/proc/42/status": STATUS.format(uid=0, locked=65536, cap=ALL_CAPABILITIES)},
        SWAP,
    ),
    (
        *("hardened", "problem", "no oom_score_adj -1000:", "up again as root"),
        *({"/proc/42/oom_score_adj": "0"}, SWAP),
    ),
    (
        *("hardened", "problem", "no PR_SET_IO_FLUSHER:", "up again as root"),
        *({"/proc/42/task/43/stat": STAT.format(flags=0x00400040, policy=1)}, SWAP),
    ),
    (
        *("hardened", "problem", "no a real-time class:", "--allow-deadlock"),
        *({"/proc/42/task/43/stat": STAT.format(flags=0x00080000, policy=0)}, SWAP),
    ),
    (
        *("hardened", "unknown", "/proc/42/oom_score_adj: No such file", ""),
        *({"/proc/42/oom_score_adj": None}, SWAP),
    ),
    (
        *("preallocated", "problem", "takes memory only when there is none", "--no-prealloc"),
        *({}, replace(SWAP, now=replace(NOW, mem_reserved=0))),
    ),
    (
        *("swap-way", "problem", "swap0 carries swap through loop", "through nbd"),
        *({}, replace(SWAP, attachment=Attachment("swap0", "/dev/loop0", "loop"))),
    ),
    (
        *("room", "warning", "has 60M of mem_limit 64M in use", "zramd down swap0"),
        *({}, replace(SWAP, now=replace(NOW, mem_used_total=60 * MIB))),
    ),
    (
        *("room", "warning", "has 60M of mem_limit 64M in use", "zramd set swap0 mem_limit"),
        *({}, replace(SWAP, now=replace(NOW, mem_used_total=60 * MIB, mem_reserved=0))),
    ),
    (
        *("room", "problem", "7 writes have failed", "free some"),
        *({}, replace(SWAP, now=replace(NOW, mem_used_total=64 * MIB, failed_writes=7))),
    ),
    (
        *("discard", "warning", "swap0 is mounted without discard", "mount -o remount,discard"),
        *({"/proc/self/mountinfo": MOUNT.replace(",discard", "")}, MOUNTED),
    ),
    (
        *("discard", "warning", "swap0 holds 96M for 4M of swap in use", "swapon --discard"),
        {"/proc/swaps": SWAPS + OURS.replace("65536", "4096")},
        replace(SWAP, now=replace(NOW, orig_data_size=96 * MIB)),
    ),
    (
        *("server-cgroup", "problem", "may take 32M, and the device 64M", "mem_limit 16M"),
        {"/sys/fs/cgroup/system.slice/zramd@swap0.service/memory.max": str(32 * MIB)},
        SWAP,
    ),
    (
        *("server-oom-daemon", "warning", "may kill its server", "zramd@swap0.service"),
        *({"/proc/9/comm": "systemd-oomd"}, SWAP),
    ),
]


@pytest.mark.parametrize(
    ("slug", "status", "finding", "advice", "files", "more"),
    ILLS,
    ids=[f"{ill[0]}-{ill[2]}" for ill in ILLS],
)
def test_an_ill_of_the_machine_is_told_with_what_to_do(
    tmp_path, slug, status, finding, advice, files, more
):
    told = verdict(Made(tmp_path, files, **more), slug)
    assert (told.status, finding in told.finding, advice in told.advice) == (status, True, True), (
        told
    )
    assert "; " not in told.finding


@pytest.mark.parametrize(
    ("slug", "status", "finding", "advice", "files", "device"),
    DEVICE_ILLS,
    ids=[f"{ill[0]}-{ill[2]}" for ill in DEVICE_ILLS],
)
def test_an_ill_of_a_device_is_told_with_what_to_do(
    tmp_path, slug, status, finding, advice, files, device
):
    files = {"/proc/swaps": SWAPS + OURS, **files}
    told = verdict(Made(tmp_path, files, devices=[device]), slug)
    assert (told.status, finding in told.finding, advice in told.advice) == (status, True, True), (
        told
    )
    assert "; " not in told.finding


@pytest.mark.parametrize("device", [None, SWAP, MOUNTED], ids=["none", "swap", "mounted"])
def test_where_nothing_hurts_every_check_is_ok(tmp_path, device):
    files = {"/proc/swaps": SWAPS + OURS} if device is SWAP else {}
    machine = Made(tmp_path, files, devices=[] if device is None else [device])
    reports = doctor.examine(machine)
    assert [report for report in reports if report.verdict.status != "ok"] == []
    assert not any(report.verdict.advice or "; " in report.verdict.finding for report in reports)
    assert doctor.sick(reports) is None


def test_every_check_is_shown_an_ill_and_a_machine_on_which_it_is_ok(tmp_path):
    shown = {ill[0] for ill in ILLS + DEVICE_ILLS}
    assert [check.slug for check in doctor.CHECKS if check.slug not in shown] == []
    files = {"/proc/swaps": SWAPS + OURS}
    fine = {report.check.slug for report in doctor.examine(Made(tmp_path, files, devices=[SWAP]))}
    assert {check.slug for check in doctor.CHECKS} - fine == {"server-oom-daemon"}  # shown below


@pytest.mark.parametrize(
    ("slug", "files", "more"),
    [
        # As it is where it is not in the way.
        ("nbd", {"/lib/modules/6.1.0-56-amd64/modules.builtin": "kernel/drivers/block/nbd.ko"}, {}),
        ("nbd", {"/lib/modules/6.1.0-56-amd64/modules.dep": "x/nbd.ko.zst: y.ko"}, {}),
        ("loop", {"/dev/fuse": None}, {"nbd": True, "missing": ["nbdfuse"]}),
        ("loop", {}, {}),
        ("realtime", {"/proc/sys/kernel/sched_rt_runtime_us": "-1"}, {}),
        ("realtime", {"/proc/sys/kernel/sched_rt_runtime_us": None}, {}),
        ("memory-cgroup", {f"{GROUP}/memory.max": str(1 << 40)}, {}),
        (  # that is not where the server is
            "memory-cgroup",
            {f"{GROUP}/memory.max": str(16 * MIB)},
            {"devices": [SWAP], "configs": {"swap0": SWAP_FILE}},
        ),
        (
            "memory-cgroup",
            {"/sys/fs/cgroup/system.slice/memory.max": str(64 * MIB)},
            {"devices": [SWAP]},
        ),
        (  # so much is always left in clusters that are not quite free
            "discard",
            {"/proc/swaps": SWAPS + OURS.replace("65536", "4096")},
            {"devices": [replace(SWAP, now=replace(NOW, orig_data_size=96 * MIB, notify_free=1))]},
        ),
        ("memory", {}, {"configs": {"files": 'disksize = "9G"\n', "swap1": SWAP_FILE}}),
        ("memory", {}, {"configs": {"swap0": SWAP_FILE.replace("32M", "9G")}, "devices": [SWAP]}),
        ("nbd-nodes", {}, {"nbd": True}),
        (
            "nbd-nodes",
            {},
            {"configs": {"swap0": SWAP_FILE + 'node = "/dev/nbd0"\n'}, "devices": [SWAP]},
        ),
        ("zswap", {"/sys/module/zswap/parameters/enabled": None}, {}),
        ("swap-priority", {"/proc/swaps": SWAPS + "/swap file 1024 0 -2\n"}, {}),
        ("nbd-client", {}, {"told": {"nbd-client": None}}),
        ("nbd-client", {}, {"told": {"nbd-client": "from nbd 3.27.1"}}),
        ("nbdkit", {}, {"told": {"nbdkit": None}}),
    ],
)
def test_what_does_not_hurt_is_ok(tmp_path, slug, files, more):
    told = verdict(Made(tmp_path, files, **{"nbd": False, **more}), slug)
    assert told.status == "ok", told


def test_the_swaps_of_a_made_machine_are_read_as_the_machines_own_are(tmp_path):
    machine = Made(tmp_path, {"/proc/swaps": SWAPS + "/a\\040swap file 1024 4 -2\n"})
    assert machine.swaps == [Swap("/a swap", MIB, 4096, -2)]


def test_systemd_oomd_is_told_by_the_mark_on_its_control_group_to_leave_a_server(tmp_path):
    machine = Made(tmp_path, {"/proc/9/comm": "systemd-oomd"}, devices=[SWAP])
    group = machine.path("/sys/fs/cgroup/system.slice/zramd@swap0.service")
    try:
        os.setxattr(group, "user.oomd_omit", b"1")
    except OSError:
        require.that(False, f"no extended attributes in {tmp_path}")
    assert verdict(machine, "server-oom-daemon").status == "ok"


def test_what_is_not_there_or_not_for_us_to_read_is_unknown_and_no_check_fails(tmp_path):
    machine = Made(tmp_path, dict.fromkeys(HEALTHY), devices=[SWAP, MOUNTED])
    reports = doctor.examine(machine)
    assert all(r.verdict.status in ("ok", "unknown", "warning") for r in reports)
    (told,) = [r.verdict for r in reports if r.check.slug == "swappiness"]
    assert told.finding == f"{tmp_path}/proc/sys/vm/swappiness: No such file or directory"


@pytest.mark.parametrize("content", ["", "what?", "-", "\0", "x " * 100])
def test_files_of_another_form_than_expected_fail_no_check(tmp_path, content):
    doctor.examine(Made(tmp_path, dict.fromkeys(HEALTHY, content), devices=[SWAP, MOUNTED]))


def test_who_may_not_read_a_file_is_told_to_be_root(tmp_path, monkeypatch):
    machine = Made(tmp_path)

    def refuse(name):
        raise PermissionError(errno.EACCES, "Permission denied", name)

    monkeypatch.setattr(machine, "read", refuse)
    told = verdict(machine, "swappiness")
    assert told.status == "unknown"
    assert (told.finding, told.advice) == (
        "/proc/sys/vm/swappiness is not for us to read",
        "sudo zramd doctor",
    )


def test_a_configuration_that_we_may_not_read_hides_itself_and_nothing_else(tmp_path, monkeypatch):
    machine = Made(tmp_path, configs={"swap1": SWAP_FILE})
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    statuses = {r.check.slug: r.verdict.status for r in doctor.examine(machine)}
    assert statuses.pop("config") == "unknown"
    assert set(statuses.values()) == {"ok"}


def test_every_check_has_a_slug_and_an_exit_status_of_its_own_that_no_error_has():
    numbers = [check.exit_status for check in doctor.CHECKS]
    assert numbers == sorted(set(numbers))
    assert len({check.slug for check in doctor.CHECKS}) == len(numbers)
    assert 60 <= min(numbers) <= max(numbers) <= 89
    assert not {kind.exit_code for kind in KINDS} & set(numbers)


def test_the_first_problem_is_the_first_of_the_table(tmp_path):
    machine = Made(tmp_path, {"/proc/sys/kernel/osrelease": "5.4.0"}, configs={"bad": "x = 1"})
    first = doctor.sick(doctor.examine(machine))
    assert first is not None
    assert first.check.slug == "kernel"


def test_of_a_device_that_is_named_the_others_are_not_told_but_still_known(tmp_path):
    files = {"/proc/swaps": SWAPS + OURS + OURS.replace("nbd0", "nbd1"), **OTHER_NODE}
    other = replace(SWAP, name="swap1", attachment=Attachment("swap1", "/dev/nbd1", "nbd"))
    configs = {"swap1": SWAP_FILE.replace("32M", "9G") + 'node = "/dev/nbd1"\n'}
    machine = Made(tmp_path, files, configs=configs, devices=[SWAP, other])
    reports = doctor.examine(machine, "swap0")
    assert {report.device for report in reports} == {None, "swap0"}
    assert doctor.sick(reports) is None
    told = {report.check.slug: report.verdict.status for report in reports}
    assert told["memory"] == told["nbd-nodes"] == told["swap-priority"] == "ok"
    with pytest.raises(NoServer):
        doctor.examine(machine, "swap7")


def test_what_is_tried_is_what_a_server_does_and_leaves_us_as_we_were():
    before = [os.sched_getscheduler(0), Machine().status("VmLck")]
    refusals = Machine().refusals
    assert refusals.keys() == facts.MOVES.keys()
    assert [os.sched_getscheduler(0), Machine().status("VmLck")] == before
    script = """if True:
        from zramd.service import hardening
        print(len(hardening.prepare() + hardening.lock()))"""
    server = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert int(server.stdout) == sum(code != 0 for code in refusals.values())


def test_a_child_that_never_runs_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(facts, "_PATIENCE_S", 0.1)
    moves = {facts.IO_FLUSHER: lambda: None, facts.REALTIME: lambda: time.sleep(600)}
    monkeypatch.setattr(facts, "MOVES", moves)
    assert Machine().refusals == {facts.IO_FLUSHER: 0}


def test_a_program_that_hangs_or_fails_tells_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(facts, "_PATIENCE_S", 0.1)
    began = time.monotonic()
    assert Machine().ask("sleep", "600") is None
    assert time.monotonic() - began < 4
    assert Machine().ask("false") is None
    assert Machine().ask("no-such-program") is None


def test_a_server_is_found_hardened_by_what_the_kernel_says_of_it(tmp_path):
    """All but the flag of PR_SET_IO_FLUSHER, which few containers grant."""
    script = """if True:
        import os
        from zramd.service import hardening
        hardening.prepare(), hardening.lock()
        print("ready", flush=True); input()"""
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert child.stdout is not None
        child.stdout.readline()
        device = replace(SWAP, process=str(child.pid))
        (told,) = [
            r.verdict
            for r in doctor.examine(Machine(devices=[device]))
            if r.check.slug == "hardened"
        ]
    finally:
        child.communicate("\n")
    words = {
        facts.IO_FLUSHER: "PR_SET_IO_FLUSHER",
        facts.OOM_SCORE: "oom_score_adj -1000",
        facts.MEMORY_LOCK: "locked memory",
        facts.REALTIME: "a real-time class",
    }
    for move, refused in Machine().refusals.items():
        assert (f"no {words[move]}" in told.finding) == (refused != 0), told

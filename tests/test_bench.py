"""scripts/bench, in its smallest form: that each kind of row comes, not what it says; and that
nothing is left of it, also when it is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts.benches import machine, sweep
from scripts.benches.report import Results
from scripts.benches.targets import TARGETS
from tests.conftest import require

ROOT = Path(__file__).parents[1]
SMALL = ["--quick", "--mib=4", "--rounds=1", "--seconds=0.05"]
BENCH = [sys.executable, "-m", "scripts.benches", *SMALL]
MIX = {f"{kind}, %" for kind in ("memory", "executables", "text", "databases", "media")}


@pytest.fixture(autouse=True)
def _prerequisites():
    for program in ("nbdkit", "nbdcopy", "fio", "qemu-nbd", "taskset"):
        require.program(program)


def left() -> list[object]:
    """What a bench may leave: directories, kernel devices, mounts, processes."""
    places = [path for top in ("/dev/shm", "/tmp") for path in Path(top).glob(f"{sweep.PREFIX}*")]
    devices = list(Path("/sys/block").glob("zram*"))
    mounts = [
        line for line in Path("/proc/mounts").read_text().splitlines() if sweep.PREFIX in line
    ]
    processes = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"{sweep.MARK}=".encode() in (process / "environ").read_bytes():
                processes.append(process.name)
        except OSError:
            continue
    return [*sorted(places), *sorted(devices), *mounts, *processes]


def test_a_quick_run_has_every_kind_of_row_and_leaves_nothing(tmp_path):
    before = left()
    files = [f"--json={tmp_path}/rounds", f"--markdown={tmp_path}/report"]
    peers = "(zramd serve lz4|nbdkit memory|nbdkit memory zstd|kernel.*|zramd up.*)"
    rows = "(bulk|4 KiB random .* 64 in flight|RAM).*|.*(time|snapshots|compaction|sparse).*"
    only = f"^(part: store|({rows}): {peers})$"
    done = subprocess.run(
        [ROOT / "scripts/bench", *SMALL, *files, f"--charts={tmp_path}/charts", f"--only={only}"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert left() == before
    told = json.loads((tmp_path / "rounds").read_text())
    assert [row["failed"] for row in told["rows"] if row["failed"]] == []
    assert told["failed parts"] == {}
    found = {row["measure"] for row in told["rows"] if row["peer"] == "zramd serve lz4"}
    for kind in ("bulk in", "bulk out", "4 KiB random read", "4 KiB random write", "RAM", "time"):
        assert any(measure.startswith(kind) for measure in found), kind
    assert {row["peer"] for row in told["rows"]} >= {"zramd serve lz4", "nbdkit memory zstd"}
    for row in told["rows"]:
        for name, rounds in row["figures"].items():
            assert all(value is not None and value >= 0 for value in rounds), (row, name)
    assert any(target["reached"] is not None for target in told["targets"])
    assert len(told["parts"]) == 2
    assert abs(sum(v for k, v in told["corpus"].items() if k in MIX) - 100) < 1
    report = (tmp_path / "report").read_text()
    assert report == done.stdout
    for title in ("Figures to reach", "Bulk, MiB/s", "RAM of the whole server", "The corpus"):
        assert f"## {title}" in report
    assert (tmp_path / "charts/bulk.svg").read_text().count("<svg") == 1


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ("--only=(", "'(' is no regular expression"),
        ("--rounds=0", "'0' is not a number from 1 on"),
        ("--rounds=-2", "'-2' is not a number from 1 on"),
        ("--json=/proc", "/proc cannot be written"),
        ("--markdown=/proc/version/x", "/proc/version cannot be written"),
        ("--charts=/proc/version", "/proc/version cannot be written"),
        ("--only=none such", "names no row"),
    ],
)
def test_what_cannot_be_done_is_said_and_nothing_is_lost_by_it(wrong, why):
    before = left()
    done = subprocess.run([*BENCH, wrong], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert why in done.stderr.splitlines()[-1]
    assert left() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_of_a_run_that_is_ended(number):
    before = left()
    bench = subprocess.Popen(
        [*BENCH, "--rounds=99", "--only=kernel|serve lz4|via loop"],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert bench.stderr is not None
    for line in bench.stderr:
        if "round 3" in line:
            break
    bench.send_signal(number)
    bench.communicate()
    assert bench.returncode in (130, -signal.SIGKILL)
    deadline = time.monotonic() + 30
    while left() != before and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == before


def test_what_fails_is_told_and_the_rest_goes_on(tmp_path):
    """fio and nbdkit end badly; nbdcopy and our server do not."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("fio", "nbdkit"):
        (programs / name).write_text(
            f"#!/bin/sh\necho first >&2\necho {name} is sorry >&2\nexit 3\n"
        )
        (programs / name).chmod(0o755)
    only = "^bulk out.*: (zramd serve lz4|nbdkit memory)$|^4 KiB random read, 1 .*serve lz4"
    done = subprocess.run(
        [*BENCH, f"--only={only}", f"--json={tmp_path}/rounds"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rounds").read_text())["rows"]
    failed = {(row["measure"].split(",")[0], row["peer"]): row["failed"] for row in rows}
    assert failed == {
        ("bulk out", "zramd serve lz4"): "",
        ("bulk out", "nbdkit memory"): "nbdkit is sorry",
        ("4 KiB random read", "zramd serve lz4"): "fio is sorry",
    }


def test_targets_compare_the_same_round():
    target = TARGETS[0]
    results = Results()
    (measure, one, name), (_, other, _) = target.one, target.other
    for ours, theirs in ((30.0, 10.0), (None, 10.0), (20.0, 10.0), (10.0, 10.0)):
        results.add(measure, one, {} if ours is None else {name: ours}, "" if ours else "died")
        results.add(measure, other, {name: theirs})
    judged = target.judged(results)
    assert judged["rounds"] == [3.0, 2.0, 1.0]
    assert (judged["median"], judged["min"], judged["max"]) == (2.0, 1.0, 3.0)
    assert judged["reached"] is False


def test_ram_counts_a_shared_memfd_once_and_untouched_pages_too():
    """Two processes, of which one maps the pages and the other only holds the file."""
    script = (
        "import mmap, os, sys; fd = os.memfd_create('x'); os.ftruncate(fd, 64 << 20)\n"
        "os.pwrite(fd, bytes(32 << 20), 0)\n"
        "if os.fork(): m = mmap.mmap(fd, 64 << 20); m[:16 << 20] = bytes(16 << 20)\n"
        "print(flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script],
        env={**os.environ, machine.MARK: "test of RAM"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.readline()
        found = machine.marked("test of RAM")
        taken = machine.ram(found) >> 20
        assert process.stdin is not None
        process.stdin.close()
    assert len(found) == 2
    assert 32 <= taken < 32 + 40

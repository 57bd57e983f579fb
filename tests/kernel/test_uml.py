"""The harness itself: it tells the truth about a guest, and leaves nothing of it."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.kernel import uml
from tests.kernel.servers import ROOT, wait_for

pytestmark = pytest.mark.kernel


def guests() -> set[int]:
    """The processes that run a guest's kernel."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if "linux.uml" in os.readlink(process / "exe"):
                found.add(int(process.name))
        except OSError:
            continue
    return found


def test_output_and_exit_status_come_out() -> None:
    done = uml.run("sh", "-c", "echo out; echo err >&2; exit 3", limit_s=60)
    assert done.status == 3
    assert done.output.startswith("out\nerr\n")


def test_the_guest_has_nbd_and_cannot_write_the_hosts_files(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    command = f"test -b /dev/nbd0 && touch /run/ours && ! touch {tmp_path}/file"
    assert uml.run("sh", "-c", command, limit_s=60).status == 0
    assert list(tmp_path.iterdir()) == []


def test_a_guest_that_hangs_is_killed_whole_at_its_limit() -> None:
    before = guests()
    done = uml.run("sh", "-c", "sleep 1000 & echo here; sleep 1000", limit_s=8)
    assert done == uml.Finished(None, "here\n")
    assert guests() <= before


def test_what_a_killed_test_run_leaves_is_gone_after_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uml.program()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = guests()
    run = subprocess.Popen(
        [sys.executable, "-m", "tests.kernel.uml", "sleep", "1000"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    # Its kernel, that kernel's helpers, and one for each of the guest's processes.
    wait_for(lambda: len(guests() - before) > 4, "the guest to start")
    run.kill()
    run.wait()
    assert uml.run("true", limit_s=60).status == 0
    wait_for(lambda: guests() <= before, "the guest to end")
    assert list(tmp_path.iterdir()) == []

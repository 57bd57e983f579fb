"""A device that outlives the machine's run: in an arena file, or in a snapshot, on a real disk.

Each boot is a guest of user-mode Linux; all of them have one disk.
"""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require
from tests.kernel import uml
from tests.kernel.servers import ROOT

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(300)]

_LIMIT_S = 120
_BEGIN = f"""set -eu
zramd() {{ {ROOT}/.venv/bin/python -m zramd.cli "$@"; }}
mkdir /run/data /run/files
mount -t ext4 /dev/ubda /run/data
"""


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(512 << 20)
    subprocess.run([require.program("mkfs.ext4"), "-q", path], check=True)
    return path


def boot(disk: Path, script: str, status: int | None = 0) -> str:
    """What it said. `status`: of the script; None where the guest ends in the middle of it."""
    ended = uml.run(
        *("sh", "-c", _BEGIN + script),
        limit_s=_LIMIT_S,
        environment={"PYTHONPATH": os.fspath(ROOT), "ZRAMD_RUNTIME_DIR": "/run/z"},
        directory=ROOT,
        disk=disk,
    )
    assert ended.status == status, ended.output
    return ended.output


_UP = "zramd up files --disksize 128M --arena /run/data/arena --mount /run/files"


def test_a_mounted_file_system_is_there_again_after_a_reboot(disk):
    boot(
        disk,
        f"""{_UP}
        cp -r docs tests /run/files
        zramd save files /run/data/snapshot
        rm -r /run/files/tests
        zramd down files
        umount /run/data""",
    )
    boot(
        disk,
        f"""{_UP}
        diff -r docs /run/files/docs
        test ! -e /run/files/tests
        zramd down files
        zramd restore old /run/data/snapshot
        mount "$(zramd attach old)" /run/files
        diff -r tests /run/files/tests
        umount /run/files
        zramd down old
        umount /run/data""",
    )


def test_an_arena_in_use_when_the_machine_goes_down_is_refused_and_untouched(disk):
    output = boot(
        disk,
        f"""{_UP}
        cp -r docs /run/files
        zramd save files /run/data/snapshot
        echo it goes down
        echo o >/proc/sysrq-trigger
        sleep 60""",
        status=None,
    )
    assert "it goes down" in output
    output = boot(
        disk,
        f"""sum=$(cksum /run/data/arena)
        {_UP} || echo "exit code $?"
        test "$sum" = "$(cksum /run/data/arena)"
        rm /run/data/arena
        zramd serve files --arena /run/data/arena --restore /run/data/snapshot &
        until zramd get files initstate; do sleep 1; done
        mount "$(zramd attach files)" /run/files
        diff -r docs /run/files/docs
        umount /run/files
        zramd down files
        {_UP}
        diff -r docs /run/files/docs
        zramd down files
        umount /run/data""",
    )
    assert "was in use when the machine went down" in output
    assert "exit code 37" in output

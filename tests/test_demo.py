"""scripts/demo, one of the README's two commands, to its end: as root, and as nobody."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import require

ROOT = Path(__file__).parents[1]

# The checkout may lie where nobody cannot look: reading is all this capability gives.
AS_NOBODY = [
    *("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"),
    *("--inh-caps=-all,+dac_read_search", "--ambient-caps=-all,+dac_read_search"),
]


def demo(*prefix: str) -> str:
    require.root()
    require.that((ROOT / ".venv/.installed-for").exists(), "scripts/setup has not been run")
    before = set(Path("/tmp").glob("zramd-demo.*"))
    done = subprocess.run(
        [*prefix, str(ROOT / "scripts/demo")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HOME": "/nonexistent"},
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert set(Path("/tmp").glob("zramd-demo.*")) == before
    return done.stdout


@pytest.mark.timeout(600)
def test_root_sees_a_file_system_and_swap():
    for path in ("/dev/fuse", "/dev/loop-control"):
        require.path(path)
    said = demo()
    assert "all identical" in said
    assert "[SWAP]" in said
    assert "are stored in" in said
    assert "no devices" in said.splitlines()[-1]


@pytest.mark.timeout(600)
def test_nobody_sees_data_go_in_and_out_and_is_told_what_was_left_out():
    require.program("setpriv")
    said = demo(*AS_NOBODY)
    assert "identical" in said
    assert "are stored in" in said
    assert "Left out without root" in said

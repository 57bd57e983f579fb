"""libnbd as an oracle: the checks of in_libnbd.py, each in a process of its own, and what needs us
beside it."""

import re
import sys
from pathlib import Path

import pytest

from tests.clients.serving import finished, run
from tests.conftest import require

PYTHON = "/usr/bin/python3"
CHECKS = Path(__file__).with_name("in_libnbd.py")
_ALL = re.findall(r"^def (check_\w+)", CHECKS.read_text(), re.MULTILINE)
_ELSEWHERE = {"check_what_a_read_only_export_refuses", "check_a_full_store"}


@pytest.fixture(autouse=True)
def _libnbd():
    found = finished(PYTHON, "-c", "import nbd").returncode == 0
    require.that(found, "python3-libnbd is not installed")


@pytest.mark.parametrize("check", [check for check in _ALL if check not in _ELSEWHERE])
def test_libnbd(server, check):
    run(PYTHON, str(CHECKS), check, server.uri, server.kind)


def test_libnbd_on_a_read_only_export(read_only_server):
    server = read_only_server
    run(PYTHON, str(CHECKS), "check_what_a_read_only_export_refuses", server.uri, server.kind)


def test_libnbd_on_a_full_store(small_server):
    run(PYTHON, str(CHECKS), "check_a_full_store", small_server.uri, small_server.kind)


RESET = """
import errno, nbd, subprocess, sys
h = nbd.NBD()
h.set_strict_mode(0)
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
h.pwrite(b"old!" * 1024, 0)
subprocess.run(sys.argv[2:], check=True)
told = []
for ask in (
    lambda: h.pread(4096, 0), lambda: h.pwrite(bytes(4096), 0), lambda: h.flush(),
    lambda: h.trim(4096, 0), lambda: h.zero(4096, 0), lambda: h.cache(4096, 0),
    lambda: h.block_status(4096, 0, lambda *_: 0),
):
    try:
        ask()
        told.append(0)
    except nbd.Error as error:
        told.append(error.errnum)
print(told)
"""


def test_libnbd_after_a_forced_reset_hears_of_no_success(server):
    """The first request may still hear EIO; then the connection has ended."""
    reset = [sys.executable, "-m", "zramd.cli", "reset", "--force", "zram0"]
    told = run(PYTHON, "-c", RESET, server.uri, *reset, environment=server.environment)
    assert "0" not in re.findall(r"\d+", told)


NBDSH = """
h.connect_uri({uri!r})
h.pwrite(b"nbdsh" * 100, 4000)
h.zero(100, 4000, nbd.CMD_FLAG_NO_HOLE | nbd.CMD_FLAG_FUA)
assert h.pread(500, 4000) == bytes(100) + b"nbdsh" * 80
try:
    h.set_strict_mode(0)
    h.pread(512, h.get_size())
except nbd.Error as error:
    print(error.errno)
"""


def test_nbdsh(server):
    environment = {"PATH": "/usr/bin:/bin"}  # nbdsh runs PATH's Python, and that one has libnbd
    script = NBDSH.format(uri=server.uri)
    assert run("nbdsh", "-c", script, environment=environment) == "EINVAL\n"

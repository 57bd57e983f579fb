"""Servers that a client starts for itself: by passing sockets (LISTEN_FDS), and on stdin."""

import json
import subprocess
import sys
import textwrap

import pytest

from tests import places
from tests.clients.serving import ROOT, run
from tests.conftest import require
from tests.nbd.harness import wait_for

ZRAMD = [sys.executable, "-m", "zramd.cli", "serve", "zram0", "--disksize=64M"]
PYTHON = "/usr/bin/python3"  # which python3-libnbd is for


@pytest.fixture(autouse=True)
def runtime(monkeypatch):
    with places.place(places.RUNTIME) as directory:
        monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(directory))
        monkeypatch.setenv("PYTHONPATH", str(ROOT))
        yield directory
        wait_for(lambda: not list(directory.iterdir()))  # not every client waits for it


def nbd(script: str) -> str:
    """What a program prints that has libnbd, and a list `server`."""
    found = subprocess.run([PYTHON, "-c", "import nbd"], capture_output=True, check=False)
    require.that(found.returncode == 0, "python3-libnbd is not installed")
    code = f"import nbd\nserver = {ZRAMD!r}\n{textwrap.dedent(script)}"
    return run(PYTHON, "-c", code)


def test_nbdinfo_starts_a_server_and_ends_it():
    told = json.loads(run("nbdinfo", "--json", "--", "[", *ZRAMD, "]"))
    assert told["exports"][0]["export-size"] == 64 << 20
    assert told["exports"][0]["export-name"] == "zram0"


def test_nbdcopy_copies_from_one_such_server_into_another():
    other = [word.replace("zram0", "zram1") for word in ZRAMD]
    run("nbdcopy", "--", "[", *ZRAMD, "]", "[", *other, "]")


def test_libnbd_starts_a_server_by_a_socket_that_it_passes():
    said = nbd(
        """
        h = nbd.NBD()
        h.connect_systemd_socket_activation(server)
        h.pwrite(b"passed" * 1000, 7)
        print(h.pread(6, 7), h.get_size())
        h.shutdown()
        """
    )
    assert said == f"bytearray(b'passed') {64 << 20}\n"


def test_libnbd_starts_a_server_on_its_stdin():
    said = nbd(
        """
        h = nbd.NBD()
        h.connect_command(server + ["--stdio"])
        h.pwrite(b"stdin" * 1000000, 7)
        print(h.pread(5, 7), h.get_size())
        h.shutdown()
        """
    )
    assert said == f"bytearray(b'stdin') {64 << 20}\n"

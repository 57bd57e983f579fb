"""What a killed test run leaves is ended by the next one; what a live run uses is let be."""

import os
import subprocess
import sys
from pathlib import Path

from tests import places
from tests.kernel.servers import wait_for

ROOT = Path(__file__).parents[1]
RUN = """
import os, signal, subprocess, sys
from tests import places
with places.place(places.RUNTIME) as place:
    server = subprocess.Popen(
        [sys.executable, "-m", "zramd.cli", "serve", "zram0", "--disksize=1M"],
        env={**os.environ, "ZRAMD_RUNTIME_DIR": str(place)}, stderr=subprocess.PIPE)
    server.stderr.readline()
    print(place, server.pid, flush=True)
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def running(process: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return False


def test_a_killed_run_is_swept_and_a_live_one_is_not():
    run = subprocess.Popen(
        [sys.executable, "-c", RUN],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with run:
        path, server = run.stdout.readline().split()
        places.sweep()
        assert running(int(server))
        assert Path(path, "zram0", "control").is_socket()
        run.stdin.close()
        run.wait()
    assert running(int(server)), "the run was killed, its server was not"
    places.sweep()
    wait_for(lambda: not running(int(server)), "the server to be gone")
    assert not Path(path).exists()

"""Starting a server in the background: what is told, and what is left, when that goes wrong."""

import os
import signal
import sys
import threading
import time

import pytest

from tests import places
from zramd.errors import ServerFailed
from zramd.service import background

CLAIM = "import os, sys, time\nfrom zramd.service.runtime import claim\nheld = claim('zram0')\n"


@pytest.fixture
def home(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(p for p in sys.path if p))
    with places.place(places.RUNTIME) as directory:
        monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(directory))
        yield directory


@pytest.fixture
def server(monkeypatch):
    """Makes a script be what is started in place of `zramd serve`."""

    def is_now(script: str) -> None:
        monkeypatch.setattr(background, "_interpreter", lambda: [sys.executable, "-c", script])

    return is_now


def test_a_server_that_is_killed_before_it_is_ready_is_told_and_leaves_nothing(home, server):
    server(CLAIM + "print('last words', file=sys.stderr, flush=True)\nos.kill(os.getpid(), 9)")
    with pytest.raises(ServerFailed, match="signal 9 before it was ready: last words"):
        background.start("zram0", [])
    assert list(home.iterdir()) == []


def test_a_server_that_breaks_is_told_with_its_last_line(home, server):
    server("raise RuntimeError('a bug')")
    with pytest.raises(ServerFailed, match=r"exit status 1 .*: RuntimeError: a bug"):
        background.start("zram0", [])


def test_an_interrupted_start_ends_the_server_and_leaves_nothing(home, server):
    def interrupt():
        deadline = time.monotonic() + 60
        while not (home / "zram0" / "lock").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    server(CLAIM + "time.sleep(600)")
    user = threading.Thread(target=interrupt)
    # A shell's background job, as CI may be, starts with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        user.start()
        with pytest.raises(KeyboardInterrupt):
            background.start("zram0", [])
    finally:
        signal.signal(signal.SIGINT, before)
    user.join()
    assert list(home.iterdir()) == []


def test_the_manager_s_socket_is_not_for_a_server_in_the_background(home, server, monkeypatch):
    monkeypatch.setenv("NOTIFY_SOCKET", "/run/systemd/notify")
    server("import os; raise SystemExit(os.environ.get('NOTIFY_SOCKET', 'nobody to tell'))")
    with pytest.raises(ServerFailed, match="nobody to tell"):
        background.start("zram0", [])

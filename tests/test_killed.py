"""A worker that is killed at any instant loses nothing that a client was told was written.

`tests/verifying.py` says what the clients do, `tests/stepping.py` how a worker is killed at a store
of a certain kind. scripts/long runs KILLS=2000.
"""

import fcntl
import os
import random
import signal
import time
from collections import Counter

import pytest

from tests.nbd.harness import wait_for
from tests.verifying import clients_of, worker_after
from zramd.control.client import Control
from zramd.errors import ServerFailed
from zramd.service.runtime import Paths

KILLS = int(os.environ.get("KILLS", "200"))
RESERVED = "--mem-limit=8M", "--prealloc"


@pytest.mark.timeout(280 if KILLS <= 200 else 20 * KILLS)
@pytest.mark.parametrize("options", [[], RESERVED], ids=["", "reserved"])
def test_no_page_is_lost_or_wrong_however_often_the_worker_is_killed(options, monkeypatch):
    numbers = random.Random(7)
    with clients_of("k0", *options, monkeypatch=monkeypatch) as served:
        worker = worker_after(served.paths, 0)
        for _ in range(KILLS // 2):
            time.sleep(numbers.uniform(0, 0.2))
            os.kill(worker, signal.SIGKILL)
            worker = worker_after(served.paths, worker)
            served.must_be_right()
        assert served.log.read_text().count("another has taken over") == KILLS // 2


@pytest.mark.timeout(280 if KILLS <= 200 else 20 * KILLS)
@pytest.mark.parametrize("options", [[], RESERVED], ids=["", "reserved"])
def test_no_page_is_lost_or_wrong_at_whatever_store_the_worker_is_killed(
    options, monkeypatch, tmp_path
):
    monkeypatch.setenv("DEATHS", str(tmp_path / "deaths"))

    def deaths() -> list[str]:
        return (tmp_path / "deaths").read_text().splitlines()

    def make_it_anew(paths: Paths) -> None:
        """The worker dies at each store of that in its turn, until it gets through."""
        with Control(paths.control_socket) as control:
            control.reset()
            if options:
                control.set("mem_limit", "8M")
                control.set("prealloc", "1")
        fcntl.flock(file, fcntl.LOCK_UN)
        while not changed(paths, "disksize", "16M"):
            pass
        os.kill(worker_after(paths, 0), signal.SIGKILL)  # it dies by itself no more

    with (tmp_path / "deaths").open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # nobody dies yet
        with clients_of(
            *("k0", *options), monkeypatch=monkeypatch, module="tests.stepping", before=make_it_anew
        ) as served:
            made = len(deaths())
            while len(deaths()) < made + max(KILLS // 3, 16):  # two turns of each kind
                changed(served.paths, "compact", "1")
                served.must_be_right()
                time.sleep(0.02)
            fcntl.flock(file, fcntl.LOCK_EX)  # nobody dies any more
            found = Counter(deaths())
            taken_over = 1 + found.total()
            wait_for(lambda: served.log.read_text().count("another has taken over") == taken_over)
    print(dict(sorted(found.items())))
    numbers, workers = ({death.split()[n] for death in found} for n in (0, 1))
    assert numbers >= set("1234567")
    assert workers == {"request", "compaction", "recovery"}


def changed(paths: Paths, attribute: str, value: str) -> bool:
    """False where the worker has died of it, or meanwhile."""
    try:
        with Control(paths.control_socket) as control:
            control.set(attribute, value)
        return True
    except ServerFailed:
        return False

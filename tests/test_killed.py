"""A worker that is killed at any instant loses nothing that a client was told was written.

`tests/verifying.py` says what the clients do. scripts/long runs KILLS=2000.
"""

import os
import random
import signal
import time

import pytest

from tests.verifying import clients_of, worker_after

KILLS = int(os.environ.get("KILLS", "200"))


@pytest.mark.timeout(280 if KILLS <= 200 else 20 * KILLS)
@pytest.mark.parametrize("options", [[], ["--mem-limit=8M", "--prealloc"]], ids=["", "reserved"])
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

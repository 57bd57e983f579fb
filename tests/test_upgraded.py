"""An upgrade in use loses nothing, and fails no request.

`tests/verifying.py` says what the clients do.
"""

import os
import random
import time

import pytest

from tests.verifying import clients_of, worker_after
from zramd.cli import upgrade

UPGRADES = int(os.environ.get("UPGRADES", "100"))


@pytest.mark.timeout(280 if UPGRADES <= 100 else 20 * UPGRADES)
@pytest.mark.parametrize("options", [[], ["--mem-limit=8M", "--prealloc"]], ids=["", "reserved"])
def test_no_page_is_lost_or_wrong_however_often_the_server_is_upgraded(options, monkeypatch):
    numbers = random.Random(7)
    with clients_of("k0", *options, monkeypatch=monkeypatch) as served:
        worker = worker_after(served.paths, 0)
        for _ in range(UPGRADES // 2):
            time.sleep(numbers.uniform(0, 0.2))
            upgrade.command.callback("k0")
            worker, before = served.paths.worker(), worker
            assert worker not in (0, before)
            assert served.paths.server() == served.server
            served.must_be_right()
        said = served.log.read_text()
        assert said.count("has taken over from") == UPGRADES // 2
        assert "another has taken over" not in said, said

"""Guests that are short of memory: how large they are, what runs in them, and what came of it."""

import json
import os
import sys
from dataclasses import dataclass, replace

from tests.kernel import uml
from tests.kernel.servers import ROOT
from tests.kernel.under_pressure import Result

LIMIT_S = 600


@dataclass(frozen=True)
class Guest:
    """RAM of the guest, device, and what the program touches; sizes are MiB."""

    ram: int
    disksize: int
    mem_limit: int
    touched: int
    passes: int
    kill_every_s: int = 0
    """Of the guest's seconds: how often the worker is killed meanwhile; 0: never."""

    def run(self, server: str, limit_s: float = LIMIT_S) -> uml.Finished:
        return uml.run(
            *(sys.executable, "-u", os.fspath(ROOT / "tests/kernel/under_pressure.py")),
            *(server, f"{self.disksize}M", f"{self.mem_limit}M"),
            *(str(self.touched), str(self.passes)),
            limit_s=limit_s,
            memory=f"{self.ram}M",
            environment={
                "PYTHONPATH": os.fspath(ROOT),
                "ZRAMD_RUNTIME_DIR": "/run/z",
                "KILL_EVERY_S": str(self.kill_every_s),
            },
            directory=ROOT,
        )


# All that the kernel may have on swap takes a third of the disksize: the data compresses 2.98:1.
QUARTER_MORE = Guest(ram=256, disksize=336, mem_limit=120, touched=320, passes=1)
TWICE = Guest(ram=512, disksize=1030, mem_limit=360, touched=1024, passes=0)
# Never five deaths within a minute, which the supervisor would take for a loop.
KILLED = replace(QUARTER_MORE, kill_every_s=16)
# The store is full long before the swap is.
FULL = Guest(ram=256, disksize=400, mem_limit=60, touched=320, passes=1)


def result_of(finished: uml.Finished) -> Result:
    assert finished.status == 0, f"it hangs, or failed:\n{finished.output}"
    return Result(**json.loads(finished.output.strip().splitlines()[-1]))

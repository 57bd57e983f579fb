"""What a served device does by itself: it is compacted when it has become sparse, and garbage is
collected, where nothing else does that (hardening.py).

Assumes that its task is cancelled before the device is closed. A compaction under way then goes on
in its thread, and ends with the device.
"""

import asyncio
import gc
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from zramd.device import Zram
from zramd.errors import ZramdError

INTERVAL_S: Final = 1.0

YOUNG: Final = 2000
"""New objects that call for a collection. A connection leaves some dozens in cycles when it ends,
requests none. What had settled is frozen and not looked at, so it takes milliseconds."""

_log = logging.getLogger(__name__)


async def upkeep(zram: Zram) -> None:
    """Look every INTERVAL_S, for ever."""
    # Of its own: asyncio.run waits for the threads of the default one, for a whole compaction.
    executor = ThreadPoolExecutor(1, "upkeep")
    executor.submit(int)  # its thread, now: it might not be had later
    try:
        while True:
            await asyncio.sleep(INTERVAL_S)
            if not gc.isenabled() and gc.get_count()[0] > YOUNG:
                gc.collect()
            if not zram.sparse:
                continue
            try:
                await asyncio.get_running_loop().run_in_executor(executor, zram.compact)
            except ZramdError as error:  # a reset has come in between
                _log.debug("%s is not compacted: %s", zram.name, error)
            except Exception:
                _log.exception("%s is not compacted", zram.name)
    finally:
        executor.shutdown(wait=False)

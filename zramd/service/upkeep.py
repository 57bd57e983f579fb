"""What a served device does by itself: it is compacted when it has become sparse.

Assumes that its task is cancelled before the device is closed. A compaction under way then goes on
in its thread, and ends with the device.
"""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from zramd.device import Zram
from zramd.errors import ZramdError

INTERVAL_S: Final = 1.0

_log = logging.getLogger(__name__)


async def upkeep(zram: Zram) -> None:
    """Look every INTERVAL_S, for ever."""
    # Of its own: asyncio.run waits for the threads of the default one, for a whole compaction.
    executor = ThreadPoolExecutor(1, "upkeep")
    try:
        while True:
            await asyncio.sleep(INTERVAL_S)
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

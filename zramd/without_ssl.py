"""To be imported before asyncio, by a process that is to be small.

asyncio imports OpenSSL where it finds it: 5 to 7 MiB of a server, for swap locked in memory, and
nothing of it is used but for TLS. It does without where there is none; a later import of ssl is too
late for it.
"""

import sys

if "ssl" not in sys.modules:
    sys.modules["ssl"] = None  # type: ignore[assignment]
    import asyncio  # noqa: F401

    del sys.modules["ssl"]

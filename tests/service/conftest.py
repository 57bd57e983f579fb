"""A fixture that starts servers, and sees them end."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests import places
from tests.nbd.harness import wait_for
from tests.service.server import Server, lives


@pytest.fixture
def start(monkeypatch) -> Iterator[type[Server]]:
    with places.place(places.RUNTIME) as runtime:
        monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(runtime))
        started: list[Server] = []

        def start(*arguments: str, **more: Any) -> Server:
            started.append(Server(*(arguments or ("--disksize=64M",)), **more))
            return started[-1]

        yield start  # type: ignore[misc]
        for server in started:
            server.process.kill()
            server.process.wait()
        wait_for(lambda: not any(lives(server.worker) for server in started))

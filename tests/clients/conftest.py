"""A server of each kind for every test of a client, and something to put on its device."""

import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.serving import KINDS, SIZE, Served, served


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def server(kind: str) -> Iterator[Served]:
    with served(kind) as server:
        yield server


@pytest.fixture
def tcp_server(kind: str) -> Iterator[Served]:
    with served(kind, over_tcp=True) as server:
        yield server


@pytest.fixture
def read_only_server(kind: str) -> Iterator[Served]:
    with served(kind, read_only=True) as server:
        yield server


@pytest.fixture
def small_server(kind: str) -> Iterator[Served]:
    """Its store is full with 1 MiB of data."""
    with served(kind, mem_limit="1M") as server:
        yield server


@pytest.fixture(scope="session")
def real_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of the device's size: programs, a hole, zeros, one repeated word, and noise."""
    path = tmp_path_factory.mktemp("data") / "data"
    with open(path, "wb") as file:
        for program in sorted(Path("/usr/bin").iterdir()):
            if program.is_file() and not program.is_symlink():
                file.write(program.read_bytes()[: 4 << 20])
            if file.tell() > 40 << 20:
                break
        file.truncate(40 << 20)
        file.seek(48 << 20)
        file.write(bytes(4 << 20))
        file.write(b"12345678" * (1 << 19))
        file.write(random.Random(1).randbytes(4 << 20))
        file.truncate(SIZE)
    return path

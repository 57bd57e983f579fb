"""The servers the suite speaks to. What a row leaves behind is the next one's beginning: rows that
look at contents write them first."""

import contextlib
import gc
import logging
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.nbd.conformance.proto import Peer, byte_by_byte, whole
from tests.nbd.harness import RunningServer
from zramd.device import Zram
from zramd.nbd import connection, server
from zramd.nbd.address import UnixAddress

MIB, TIB = 1 << 20, 1 << 40


@dataclass
class Export:
    """A device and its server, which is ended by whoever ends it first."""

    zram: Zram
    running: RunningServer
    path: Path
    size: int


@pytest.fixture(scope="package", autouse=True)
def _no_time_limit():
    """Who is dropped must be so for what he said, and not because his time was over."""
    with pytest.MonkeyPatch.context() as patched:
        for limit in ("_HANDSHAKE_SECONDS", "GATHER_SECONDS", "LINGER_SECONDS"):
            patched.setattr(connection, limit, 3600)
        patched.setattr(server, "LINGER_SECONDS", 3600)
        yield


@pytest.fixture(scope="package")
def serve(tmp_path_factory):
    """Serves a new device of so many bytes. All end with the suite, no exception left over."""
    exports, left_over = [], []
    handler = logging.Handler(logging.ERROR)
    handler.emit = left_over.append
    logging.getLogger("asyncio").addHandler(handler)

    def begin(size, **options):
        zram = Zram("zram0")
        zram.init(size)
        running = RunningServer(zram, **options)
        path = tmp_path_factory.mktemp("served") / "nbd.sock"
        running.listen(UnixAddress(path))
        exports.append(Export(zram, running, path, size))
        return exports[-1]

    yield begin
    for export in exports:
        export.running.close()
        assert export.zram.statistics().openers == ()
        export.zram.close()
    gc.collect()
    logging.getLogger("asyncio").removeHandler(handler)
    assert [record.getMessage() for record in left_over] == []


@pytest.fixture(scope="package")
def small(serve):
    return serve(MIB)


@pytest.fixture(scope="package")
def vast(serve):
    return serve(4 * TIB)


@pytest.fixture(scope="package")
def read_only(serve):
    return serve(MIB, read_only=True)


@pytest.fixture(params=["whole", "byte by byte", "with trailing data"])
def manner(request):
    """How a message is sent."""
    return request.param


@pytest.fixture
def meet(manner):
    """A new connection to an export, on which messages are sent in the manner of this run."""
    with contextlib.ExitStack() as peers:

        def connect(export):
            send = byte_by_byte if manner == "byte by byte" else whole
            return peers.enter_context(Peer(export.path, send))

        yield connect

"""Other people's clients, each against both servers: `zramd serve`, and nbdkit with our plugin."""

import json
import os
import random
import re
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from urllib.parse import quote

import pytest

from tests import places
from tests.conftest import require

ROOT = Path(__file__).resolve().parents[1]
SIZE = 64 << 20
DEADLINE_S = 60


class Served:
    """A device of 64 MiB called zram0, behind one of the servers."""

    def __init__(
        self, command: list[str], directory: Path, path: Path | None, port: int | None = None
    ) -> None:
        """Listening on a Unix socket, or on a port of the loopback address, or both."""
        self.port = port
        self.path = path
        self.uri = f"nbd+unix:///?socket={quote(str(path))}"
        environment = {
            **os.environ,
            "ZRAMD_RUNTIME_DIR": str(directory),
            "VIRTUAL_ENV": sys.prefix,
            "PYTHONPATH": str(ROOT),
        }
        self.process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
        deadline = time.monotonic() + DEADLINE_S
        while not self._listens():
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.process.kill()
                raise AssertionError(f"{command} did not start: {self.process.communicate()[1]}")
            time.sleep(0.01)

    def _listens(self) -> bool:
        if self.port is not None:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.path)) == 0

    def close(self) -> None:
        self.process.terminate()
        _, errors = self.process.communicate(timeout=DEADLINE_S)
        assert b"Traceback" not in errors, errors.decode()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def zramd_serve(directory: Path, port: int | None = None) -> Served:
    command = [sys.executable, "-m", "zramd.cli", "serve", "zram0", f"--disksize={SIZE}"]
    if port is not None:
        command.append(f"--listen=tcp:127.0.0.1:{port}")
    return Served(command, directory, directory / "zram0/nbd.sock", port)


def nbdkit(directory: Path, port: int | None = None) -> Served:
    socket_path = directory / "nbdkit.sock"
    where = ["-U", str(socket_path)] if port is None else ["-i", "127.0.0.1", "-p", str(port)]
    command = [require.program("nbdkit"), "-f", *where, "python", str(ROOT / "nbd_plugin.py")]
    return Served([*command, "name=zram0", f"disksize={SIZE}"], directory, socket_path, port)


SERVERS = [zramd_serve, nbdkit]


@pytest.fixture(params=SERVERS, ids=["zramd", "nbdkit"])
def server(request):
    with places.place(places.RUNTIME) as directory:
        served = request.param(directory)
        yield served
        served.close()


@pytest.fixture(params=SERVERS, ids=["zramd", "nbdkit"])
def tcp_server(request):
    with places.place(places.RUNTIME) as directory:
        served = request.param(directory, free_port())
        yield served
        served.close()


def run(program: str, *arguments: str, status: int = 0) -> str:
    """What the client printed."""
    command = [require.program(program), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def real_data(tmp_path_factory):
    """A file of the device's size: programs, zeros, one repeated word, and noise."""
    path = tmp_path_factory.mktemp("data") / "data"
    with open(path, "wb") as file:
        for program in sorted(Path("/usr/bin").iterdir()):
            if program.is_file() and not program.is_symlink():
                file.write(program.read_bytes()[: 4 << 20])
            if file.tell() > 40 << 20:
                break
        file.write(bytes(4 << 20))
        file.write(b"12345678" * (1 << 19))
        file.write(random.Random(1).randbytes(SIZE - (49 << 20)))
        file.truncate(SIZE)
    return path


# nbdinfo


def test_nbdinfo_sees_the_size(server):
    assert run("nbdinfo", "--size", server.uri) == f"{SIZE}\n"


def test_nbdinfo_sees_what_we_can(server):
    (export,) = json.loads(run("nbdinfo", "--json", server.uri))["exports"]
    assert export["export-size"] == SIZE
    assert export["block_size_minimum"] == 1
    assert export["block_size_preferred"] == 4096
    assert export["block_size_maximum"] >= 32 << 20
    assert export["is_read_only"] is False
    for can in ("flush", "fua", "trim", "zero", "multi_conn"):
        assert export[f"can_{can}"] is True, can


@pytest.mark.parametrize("what", ["connect", "flush", "fua", "multi-conn", "trim", "zero", "write"])
def test_nbdinfo_says_yes(server, what):
    run("nbdinfo", "--can", what, server.uri)


@pytest.mark.parametrize("what", ["read-only", "rotational"])
def test_nbdinfo_says_no(server, what):
    run("nbdinfo", "--is", what, server.uri, status=2)


def test_nbdinfo_lists_the_device(server):
    (export,) = json.loads(run("nbdinfo", "--list", "--json", server.uri))["exports"]
    assert (export["export-name"], export["export-size"]) == ("zram0", SIZE)


def test_nbdinfo_is_told_of_another_name(server):
    uri = server.uri.replace("///?", "///other?")
    command = [require.program("nbdinfo"), uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "other" in done.stderr


# nbdcopy


def test_nbdcopy_brings_real_data_in_and_out(server, real_data, tmp_path):
    copy = tmp_path / "copy"
    many = ["--connections=4", "--requests=64"]
    run("nbdcopy", *many, "--flush", str(real_data), server.uri)
    run("nbdcopy", *many, server.uri, str(copy))
    assert copy.read_bytes() == real_data.read_bytes()
    run("nbdcopy", "--synchronous", server.uri, str(copy))
    assert copy.read_bytes() == real_data.read_bytes()


def test_nbdcopy_with_the_longest_requests(server, real_data, tmp_path):
    copy = tmp_path / "copy"
    run("nbdcopy", f"--request-size={32 << 20}", str(real_data), server.uri)
    run("nbdcopy", f"--request-size={32 << 20}", server.uri, str(copy))
    assert copy.read_bytes() == real_data.read_bytes()


# qemu


def test_qemu_io_writes_zeroes_discards_and_reads_back(server):
    script = [
        *["write -P 1 0 64k", "read -P 1 0 64k"],
        *["write -z 4k 4k", "read -P 0 4k 4k", "read -P 1 8k 56k"],
        *["write -z -u 16k 4k", "read -P 0 16k 4k"],
        *["discard 32k 8k", "read -P 1 40k 24k"],
        *["write -f -P 2 0 4k", "flush", "read -P 2 0 4k"],
        *["write -P 3 512 513", "read -P 3 512 513", "read -P 2 0 512", "read -P 2 1025 3071"],
        *["write -P 4 1M 20M", "read -P 4 1M 20M", "discard 0 64M"],
        *["aio_write -P 5 0 64k", "aio_write -P 6 64k 64k", "aio_flush"],
        *["read -P 5 0 64k", "read -P 6 64k 64k"],
    ]
    said = run("qemu-io", "-f", "raw", *(f"-c{line}" for line in script), server.uri)
    assert "failed" not in said


def test_qemu_img_converts_in_and_compares(server, real_data):
    run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(real_data), server.uri)
    said = run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(real_data), server.uri)
    assert "Images are identical" in said
    run("qemu-io", "-f", "raw", "-c", "write -P 9 33M 1", server.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(real_data), server.uri, status=1)


# fio


@pytest.mark.parametrize("pattern", ["randwrite", "randtrimwrite"])
def test_fio_verifies_what_it_wrote(server, tmp_path, pattern):
    require.that("nbd" in run("fio", "--enghelp"), "fio has no nbd engine")
    run(
        "fio",
        *["--name=verify", "--ioengine=nbd", f"--uri={server.uri}", f"--rw={pattern}"],
        *["--bsrange=512-64k", "--blockalign=512", "--size=32m", "--iodepth=16"],
        *(
            ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"]
            if pattern == "randwrite"
            else []
        ),
        f"--output={tmp_path / 'report'}",
    )
    assert "err= 0" in (tmp_path / "report").read_text()


# nbd-client


def test_nbd_client_lists_the_device_over_tcp(tcp_server):
    said = run("nbd-client", "-l", "127.0.0.1", str(tcp_server.port))
    assert re.search(r"^zram0\b", said, re.MULTILINE)


# libnbd, its own checks off, as an oracle for errors

ERRORS = """
    import errno, nbd, sys
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.connect_uri(sys.argv[1])
    size = h.get_size()

    def error(call, *arguments, **named):
        try:
            call(*arguments, **named)
        except nbd.Error as e:
            return e.errnum
        return 0

    def check(what, got, *expected):
        if got not in expected:
            sys.exit(f"{what}: {errno.errorcode.get(got, got)}")

    page = bytearray(4096)
    check("read at the end", error(h.pread, 512, size), errno.EINVAL)
    check("read across the end", error(h.pread, 1024, size - 512), errno.EINVAL)
    check("read far beyond", error(h.pread, 512, 1 << 40), errno.EINVAL)
    check("write at the end", error(h.pwrite, page, size), errno.ENOSPC)
    check("write across the end", error(h.pwrite, page, size - 512), errno.ENOSPC)
    check("zero at the end", error(h.zero, 512, size), errno.ENOSPC)
    check("trim at the end", error(h.trim, 512, size), errno.EINVAL)
    check("empty read", error(h.pread, 0, 0), errno.EINVAL, 0)
    check("unknown flag", error(h.pwrite, page, 0, flags=1 << 14), errno.EINVAL)
    check("foreign flag", error(h.trim, 512, 0, flags=nbd.CMD_FLAG_REQ_ONE), errno.EINVAL)
    check("unaligned write", error(h.pwrite, page[:3], 4095), 0)
    check("FUA on trim", error(h.trim, 4096, 0, flags=nbd.CMD_FLAG_FUA), 0)
    check("FUA on zero", error(h.zero, 4096, 0, flags=nbd.CMD_FLAG_FUA), 0)
    check("trim of all", error(h.trim, size, 0), 0)
    h.pwrite(b"alive", 1)
    check("the connection lives", bytes(h.pread(7, 0)) != b"\\0alive\\0", False)
    h.shutdown()
"""


def test_libnbd_sees_the_errors_of_the_specification(server):
    python = "/usr/bin/python3"
    found = subprocess.run([python, "-c", "import nbd"], capture_output=True, check=False)
    require.that(found.returncode == 0, "python3-libnbd is not installed")
    command = [python, "-c", textwrap.dedent(ERRORS), server.uri]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr

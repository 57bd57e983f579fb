"""Other people's clients over TLS, each against both servers: `zramd serve`, and nbdkit with our
plugin. What they are refused is what the server has said before; these see that they agree."""

import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import quote

import pytest

from tests import places
from tests.clients.serving import ROOT, SIZE, Served, free_port, run
from tests.conftest import require


def zramd_serve(directory: Path, certificates: Path, mode: str, *, verify: bool) -> Served:
    port = free_port()
    command = [sys.executable, "-m", "zramd.cli", "serve", "zram0", f"--disksize={SIZE}"]
    command += [f"--listen=tcp:127.0.0.1:{port}", f"--tls={mode}"]
    command += [f"--tls-certificates={certificates}/server", *["--tls-verify-peer"] * verify]
    return Served(command, directory, None, port)


def nbdkit(directory: Path, certificates: Path, mode: str, *, verify: bool) -> Served:
    port = free_port()
    command = [require.program("nbdkit"), "-f", "-i", "127.0.0.1", "-p", str(port)]
    command += [f"--tls={mode}", f"--tls-certificates={certificates}/server"]
    command += ["--tls-verify-peer"] * verify
    plugin = ["python", str(ROOT / "nbd_plugin.py"), "name=zram0", f"disksize={SIZE}"]
    return Served([*command, *plugin], directory, None, port)


@pytest.fixture(params=[zramd_serve, nbdkit], ids=["zramd", "nbdkit"])
def serve(request, certificates):
    """Starts the server; its port."""
    with places.place(places.RUNTIME) as directory:
        served = []

        def serve(mode: str = "require", *, verify: bool = False) -> int:
            place = directory / str(len(served))
            place.mkdir()
            served.append(request.param(place, certificates, mode, verify=verify))
            return served[-1].port

        yield serve
        for each in served:
            each.close()


def uri(port: int, place: Path) -> str:
    return f"nbds://localhost:{port}/?tls-certificates={quote(str(place))}"


def refused(program: str, *arguments: str) -> str:
    """What a client says that must not get in."""
    done = subprocess.run(
        [require.program(program), *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0, done.stdout
    return done.stderr


def test_libnbd_reads_what_it_has_written(serve, certificates, tmp_path):
    address = uri(serve(), certificates / "anonymous")
    assert '"TLS": true' in run("nbdinfo", "--json", address)
    (tmp_path / "data").write_bytes(data := os.urandom(SIZE // 4) + bytes(SIZE // 4 * 3))
    run("nbdcopy", "--connections=4", str(tmp_path / "data"), address)
    run("nbdcopy", address, str(tmp_path / "back"))
    assert (tmp_path / "back").read_bytes() == data
    assert "hole" in run("nbdinfo", "--map", address)


@pytest.mark.parametrize("mode", ["require", "on"])
def test_qemu_reads_what_it_has_written(serve, certificates, tmp_path, mode):
    port = serve(mode, verify=mode == "require")
    (tmp_path / "data").write_bytes(data := os.urandom(1 << 20) + bytes(SIZE - (1 << 20)))
    credentials = [
        "--object",
        f"tls-creds-x509,id=tls0,endpoint=client,dir={certificates}/client",
    ]
    there = (
        f"driver=nbd,server.type=inet,server.host=localhost,server.port={port},tls-creds=tls0"
        ",export=zram0"
    )
    image = str(tmp_path / "data")
    run("qemu-img", "convert", "-n", *credentials, "-f", "raw", image, "--target-image-opts", there)
    run("qemu-img", "convert", *credentials, "--image-opts", there, "-O", "raw", f"{image}2")
    assert (tmp_path / "data2").read_bytes() == data


def test_a_client_that_does_not_trust_the_server_does_not_go_on(serve, certificates):
    port = serve()
    for place in ("distrustful", "stranger"):
        said = refused("nbdinfo", uri(port, certificates / place))
        assert "certificate" in said.lower()


def test_only_a_good_certificate_opens_where_one_is_wanted(serve, certificates):
    port = serve(verify=True)
    run("nbdinfo", uri(port, certificates / "client"))
    for place in ("anonymous", "expired"):
        refused("nbdinfo", uri(port, certificates / place))


def test_a_client_without_tls_is_told_where_it_is_required_and_served_where_not(
    serve, certificates
):
    port = serve()
    assert "not supported" in refused("nbdinfo", f"nbd://localhost:{port}")
    assert "TLS" in refused("qemu-img", "info", f"nbd://localhost:{port}/zram0")
    port = serve("on")
    assert '"TLS": false' in run("nbdinfo", "--json", f"nbd://localhost:{port}")
    assert '"TLS": true' in run("nbdinfo", "--json", uri(port, certificates / "anonymous"))
    assert run("nbdinfo", "--size", f"nbd://localhost:{port}") == f"{SIZE}\n"


def test_a_client_that_wants_tls_does_not_go_on_without(certificates):
    """A downgrade: the server, or somebody in between, says that there is none."""
    with places.place(places.RUNTIME) as directory:
        port = free_port()
        command = [sys.executable, "-m", "zramd.cli", "serve", "zram0", f"--disksize={SIZE}"]
        served = Served([*command, f"--listen=tcp:127.0.0.1:{port}"], directory, None, port)
        try:
            assert "closed" in refused("nbdinfo", uri(port, certificates / "anonymous"))
        finally:
            served.close()

"""`zramd serve --tls`: from the options to the socket."""

import os
import shutil
import signal
import ssl
from pathlib import Path

import pytest

from tests.cli.conftest import DEADLINE_S, wait_for
from tests.nbd import pki
from tests.nbd.harness import RawClient
from tests.nbd.tls_client import go, secure, trusting
from zramd.cli import up
from zramd.nbd.address import TcpAddress, UnixAddress
from zramd.service.config import Config


@pytest.fixture
def arguments(certificates, tmp_path):
    shutil.copytree(certificates / "server", tmp_path / "tls")
    where = f"--listen=unix:{tmp_path}/nbd.sock"
    return ["--disksize=16M", where, f"--tls-certificates={tmp_path}/tls"]


def maps(process):
    return Path(f"/proc/{process}/maps").read_text()


def test_it_serves_with_tls_and_its_own_socket_without(zramd, arguments, certificates, tmp_path):
    zramd.serve("zram0", "--tls=require", *arguments)
    with secure(UnixAddress(tmp_path / "nbd.sock"), trusting(certificates / "client")) as client:
        go(client)
        client.write(0, b"secret")
    with zramd.connect("zram0"):
        pass
    with pytest.raises(Exception, match="TLS"):
        RawClient(UnixAddress(tmp_path / "nbd.sock"))


def test_a_configuration_file_says_it_too(zramd, certificates, tmp_path):
    file = tmp_path / "zram0.toml"
    file.write_text(
        f'disksize = "16M"\nlisten = ["unix:{tmp_path}/nbd.sock"]\ntls = "require"\n'
        f'tls_certificates = "{certificates}/server"\ntls_verify_peer = true\nread_only = true\n'
        "max_connections = 1\n"
    )
    zramd.serve("zram0", f"--config={file}")
    address = UnixAddress(tmp_path / "nbd.sock")
    with secure(address, trusting(certificates / "client")) as client:
        go(client)
        with RawClient(address, None) as other:
            assert other.ended()


def test_only_a_process_that_is_asked_for_tls_has_openssl(zramd, arguments):
    zramd.serve("zram0", "--tls=on", *arguments)
    zramd.serve("zram1", "--disksize=16M")
    for name, has in (("zram0", True), ("zram1", False)):
        for process in (zramd.worker(name), (zramd.runtime / name / "lock").read_text().split()[0]):
            assert ("libssl" in maps(process)) is has


def test_a_fault_of_the_files_is_told_before_anything_is_made(zramd, arguments, tmp_path):
    (tmp_path / "tls/server-key.pem").unlink()
    said = zramd.fails(2, "serve", "zram0", "--tls=require", *arguments)
    assert f"{tmp_path}/tls/server-key.pem is not there" in said
    assert zramd.left() == []
    assert not (tmp_path / "nbd.sock").exists()


def test_check_config_looks_at_the_files_too(zramd, certificates, tmp_path):
    file = tmp_path / "zram0.toml"
    for place, said in (("server", f"zramd: {file} is good"), ("expired", "has expired")):
        file.write_text(
            f'disksize = "16M"\ntls = "on"\ntls_certificates = "{certificates}/{place}"\n'
        )
        done = zramd.run("check-config", str(file))
        assert said in done.stderr
        assert done.returncode == (2 if place == "expired" else 0)


def test_a_server_in_the_background_is_told_all_of_it(tmp_path):
    config = Config(
        disksize=1 << 20,
        listen=(TcpAddress("192.0.2.1", 1),),
        tls="require",
        tls_certificates=tmp_path,
        tls_verify_peer=True,
        allow_plain_tcp=True,
        read_only=True,
        max_connections=7,
    )
    assert up._arguments(config) == [
        *(
            "--disksize=1048576",
            "--tls=require",
            f"--tls-certificates={tmp_path}",
            "--tls-verify-peer",
        ),
        *("--allow-plain-tcp", "--read-only", "--max-connections=7", "--listen=tcp:192.0.2.1:1"),
    ]
    keys = Config(disksize=1 << 20, tls="require", tls_psk=tmp_path)
    assert f"--tls-psk={tmp_path}" in up._arguments(keys)


def test_a_killed_worker_s_successor_serves_tls_with_the_certificates_of_by_then(
    zramd,
    arguments,
    certificates,
    tmp_path,
):
    server = zramd.serve("zram0", "--tls=require", *arguments)
    address = UnixAddress(tmp_path / "nbd.sock")

    def serial():
        with secure(address, trusting(certificates / "anonymous")) as client:
            go(client)
            assert client.read(0, 4) == b"kept"
            return client.sock.getpeercert()["serialNumber"]

    with secure(address, trusting(certificates / "anonymous")) as client:
        go(client)
        client.write(0, b"kept")

    def kill():
        before = zramd.worker("zram0")
        os.kill(before, signal.SIGKILL)
        wait_for(lambda: zramd.worker("zram0") != before)

    first = serial()
    kill()
    assert serial() == first
    pki.sign(tmp_path / "tls", "server", certificates / "authority", 2)
    assert serial() == first
    kill()
    second = serial()
    assert second != first
    (tmp_path / "tls/server-key.pem").write_text("spoilt")
    kill()
    assert serial() == first  # what the supervisor has read
    server.terminate()
    said = server.communicate(timeout=DEADLINE_S)[1]
    assert f"TLS goes on as it was when the server started: {tmp_path}/tls/server-key.pem" in said


def test_an_upgrade_goes_on_with_tls_and_refuses_what_it_cannot_serve_with(
    zramd,
    arguments,
    certificates,
    tmp_path,
):
    server = zramd.serve("zram0", "--tls=require", *arguments)
    address = UnixAddress(tmp_path / "nbd.sock")
    context = trusting(certificates / "anonymous")
    with secure(address, context) as client:
        go(client)
        client.write(0, b"kept")
    zramd.ok("upgrade", "zram0")
    with secure(address, context) as client:
        go(client)
        assert client.read(0, 4) == b"kept"
    pki.sign(tmp_path / "tls", "server", certificates / "other", 2)
    (tmp_path / "tls/server-cert.pem").rename(tmp_path / "tls/gone")
    done = zramd.run("upgrade", "zram0")
    assert done.returncode == 22
    assert "server-cert.pem is not there" in done.stderr
    with secure(address, context) as client:
        go(client)
        assert client.read(0, 4) == b"kept"
    (tmp_path / "tls/gone").rename(tmp_path / "tls/server-cert.pem")
    zramd.ok("upgrade", "zram0")
    with pytest.raises(ssl.SSLCertVerificationError):
        secure(address, context)
    assert server.poll() is None

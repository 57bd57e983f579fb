"""TLS: what is made of files, and what a client meets that uses it, or tries to get round it."""

import gc
import logging
import os
import random
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import warnings
import weakref
from pathlib import Path

import pytest

from tests.nbd import pki
from tests.nbd.harness import DEADLINE_S, RawClient, RunningServer, request, wait_for
from tests.nbd.tls_client import begin, go, option_reply, secure, trusting
from zramd.device import Zram
from zramd.errors import BadValue
from zramd.nbd import connection, tls, transmission, wire
from zramd.nbd.address import TcpAddress, UnixAddress
from zramd.nbd.client import negotiate
from zramd.nbd.piecewise import Piecewise
from zramd.nbd.wire import NBD_CMD_DISC, NBD_CMD_READ

MIB = 1 << 20
ROOT = Path(__file__).parents[2]


@pytest.fixture
def directory(certificates, tmp_path):
    """The server's, to be spoilt."""
    return Path(shutil.copytree(certificates / "server", tmp_path / "tls"))


@pytest.fixture
def zram():
    zram = Zram("zram0")
    zram.init(8 * MIB)
    yield zram
    zram.close()


@pytest.fixture
def serve(zram, tmp_path, certificates):
    """Starts the server, `required` or with a client's certificate; where it listens."""
    started = []

    def serve(*, required=True, verify_peer=False, certificates=certificates / "server"):
        made = tls.make(required=required, certificates=certificates, verify_peer=verify_peer)
        started.append(RunningServer(zram, tls=made))
        return started[0].listen(UnixAddress(tmp_path / "nbd.sock"))

    serve.started = started
    yield serve
    for running in started:
        running.close()
        assert running.server.live == set()
    assert zram.statistics().openers == ()


def option(number):
    """One that is well formed."""
    data = {
        wire.NBD_OPT_EXPORT_NAME: b"zram0",
        wire.NBD_OPT_INFO: wire.pack_go("zram0", ()),
        wire.NBD_OPT_GO: wire.pack_go("zram0", ()),
        wire.NBD_OPT_LIST_META_CONTEXT: b"\0\0\0\5zram0\0\0\0\0",
        wire.NBD_OPT_SET_META_CONTEXT: b"\0\0\0\5zram0\0\0\0\0",
    }
    return wire.pack_option(number, data.get(number, b""))


# What is made of files


def refused(**wish):
    with pytest.raises(BadValue) as caught:
        tls.make(required=True, **wish)
    assert "\n" not in caught.value.line()
    return caught.value.line()


def test_good_files_make_a_context_that_begins_at_tls_1_2(directory):
    made = tls.make(required=False, certificates=directory)
    assert not made.required
    assert made.context.minimum_version == ssl.TLSVersion.TLSv1_2
    assert made.context.verify_mode == ssl.CERT_NONE
    for never in (ssl.OP_NO_RENEGOTIATION, ssl.OP_NO_TICKET):
        assert made.context.options & never
    assert made.context.num_tickets == 0
    (directory / "ca-cert.pem").unlink()  # whose own need it is only with --tls-verify-peer
    assert tls.make(required=True, certificates=directory).required


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
def test_a_file_that_is_missing_or_unreadable_or_none_is_named(directory, name):
    file = directory / name
    content = file.read_bytes()
    file.unlink()
    said = refused(certificates=directory, verify_peer=True)
    assert said.startswith(f"{file} is not there")
    assert "docs/nbd.md" in said
    file.mkdir()
    assert f"{file} cannot be read: Is a directory" in refused(
        certificates=directory, verify_peer=True
    )
    file.rmdir()
    for nonsense in (b"", b"nonsense\n", content[: len(content) // 2]):
        file.write_bytes(nonsense)
        said = refused(certificates=directory, verify_peer=True)
        assert said.startswith(f"{file} is not")
        assert "docs/nbd.md" in said


def test_a_file_that_may_not_be_read_is_named(directory, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tls, "open", denied, raising=False)
    assert refused(certificates=directory) == (
        f"{directory}/server-cert.pem cannot be read: Permission denied;"
        " name a file that the server may read"
    )


def test_a_key_of_another_certificate_is_named(directory, certificates):
    shutil.copy(certificates / "client/client-key.pem", directory / "server-key.pem")
    said = refused(certificates=directory)
    assert said.startswith(f"{directory}/server-key.pem is not the key of {directory}/server-cert")


def test_an_encrypted_key_is_refused_and_nobody_is_asked(directory):
    pki.encrypt(directory / "server-key.pem", directory / "encrypted.pem")
    (directory / "encrypted.pem").rename(directory / "server-key.pem")
    said = refused(certificates=directory)
    assert f"{directory}/server-key.pem is encrypted" in said
    assert "openssl pkey" in said


def test_a_certificate_that_no_client_would_accept_is_refused(certificates, directory):
    expired = certificates / "expired"
    said = refused(certificates=expired)
    assert said == f"{expired}/server-cert.pem has expired; renew it; no client would accept it"
    for kind in ("cert", "key"):
        shutil.copy(certificates / f"client/client-{kind}.pem", directory / f"server-{kind}.pem")
    said = refused(certificates=directory)
    assert said.startswith(f"no client would accept {directory}/server-cert.pem: ")
    assert "purpose" in said


def test_a_certificate_of_the_future_is_told_from_an_expired_one(directory):
    error = ssl.SSLCertVerificationError(1, "not yet")
    error.verify_code, error.verify_message = 9, "certificate is not yet valid"
    assert "clock" in tls._not_accepted(directory / "server-cert.pem", error).line()


def test_a_directory_that_is_none_is_named(directory):
    assert refused(certificates=directory / "no").startswith(f"{directory}/no is not a directory")


def test_a_list_of_revoked_certificates_that_is_none_is_named(directory):
    (directory / "ca-crl.pem").write_text("nonsense")
    said = refused(certificates=directory, verify_peer=True)
    assert said.startswith(f"{directory}/ca-crl.pem is not a list of revoked")


# Keys that both sides have beforehand

KEY = "00112233445566778899aabbccddeeff"


def test_psktools_file_is_understood(tmp_path):
    file = tmp_path / "keys"
    file.write_text(f"alice:{KEY}\n\n  bob:b:{KEY.upper()}{KEY}\n#c3a9:{KEY}\n")
    key = bytes.fromhex(KEY)
    assert tls.read_keys(file) == {"alice": key, "bob:b": key + key, "é": key}


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", " has no key"),
        (f"alice:{KEY}\nalice\n", ":2: this is not USER:KEY"),
        (f":{KEY}", ":1: this is not USER:KEY"),
        (f"{'x' * 257}:{KEY}", ":1: this is not USER:KEY"),
        (f"alice:{KEY}1", ":1: the key is not hexadecimal"),
        ("alice:secret", ":1: the key is not hexadecimal"),
        ("alice:0011", ":1: the key has 2 bytes; 16 to 256"),
        (f"alice:{KEY * 17}", ":1: the key has 272 bytes"),
        (f"#zz:{KEY}", ":1: the user's name"),
    ],
)
def test_a_wrong_line_of_keys_is_named_and_the_key_is_not_shown(tmp_path, text, culprit):
    file = tmp_path / "keys"
    file.write_text(text)
    said = refused(psk=file)
    assert f"{file}{culprit}" in said
    assert f"; make it so: psktool -u USER -p {file}" in said
    assert KEY not in said
    assert "secret" not in said


def test_a_file_of_keys_that_cannot_be_read_is_named(tmp_path):
    assert refused(psk=tmp_path / "no").startswith(f"{tmp_path}/no is not there; make it so: psk")
    assert refused(psk=tmp_path).startswith(f"{tmp_path} cannot be read: Is a directory")
    (tmp_path / "keys").write_bytes(b"\xff")
    assert "not UTF-8" in refused(psk=tmp_path / "keys")


class _Context(ssl.SSLContext):
    """What a Python before 3.13 lacks."""

    def set_psk_server_callback(self, callback, _hint=None):
        self.callback = callback


def test_each_user_has_his_key_and_others_have_none(tmp_path, monkeypatch):
    monkeypatch.setattr(tls, "_new_context", lambda: _Context(ssl.PROTOCOL_TLS_SERVER))
    (tmp_path / "keys").write_text(f"alice:{KEY}\n")
    made = tls.make(required=True, psk=tmp_path / "keys")
    assert made.context.callback("alice") == bytes.fromhex(KEY)
    assert made.context.callback("mallory") == b""
    assert made.context.callback(None) == b""


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="this Python has them")
def test_a_python_without_keys_says_what_it_needs(tmp_path):
    (tmp_path / "keys").write_text(f"alice:{KEY}\n")
    said = refused(psk=tmp_path / "keys")
    assert str(tmp_path / "keys") in said
    assert "needs Python 3.13, and this is 3." in said


_BY_KEY = """
import ssl, sys
from pathlib import Path
from zramd.nbd import tls

server_context = tls.make(required=True, psk=Path(sys.argv[1])).context
for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
    for user, key in (("alice", "%s"), ("alice", "%s"[::-1]), ("mallory", "%s")):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.minimum_version = context.maximum_version = version
        context.set_ciphers("PSK")
        context.set_psk_client_callback(lambda _hint: (user, bytes.fromhex(key)))
        there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = context.wrap_bio(back, there)
        server = server_context.wrap_bio(there, back, server_side=True)
        done = set()
        try:
            for end in (client, server) * 4:
                try:
                    end.do_handshake()
                    done.add(end)
                except ssl.SSLWantReadError:
                    pass
        except ssl.SSLError:
            done.clear()
        print(version.name, user, key[:4], len(done) == 2)
""" % ((KEY,) * 3)


def test_a_key_opens_and_another_does_not(tmp_path):
    """With a Python that can, if there is one: Debian 12 has none."""
    for python in (sys.executable, "python3.13", "python3.14"):
        found = shutil.which(python) or ""
        test = "import ssl; ssl.SSLContext.set_psk_server_callback"
        if found and subprocess.run([found, "-c", test], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("no Python 3.13 or later")
    (tmp_path / "keys").write_text(f"alice:{KEY}\n")
    done = subprocess.run(
        [found, "-c", _BY_KEY, tmp_path / "keys"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=True,
    )
    assert done.stdout.splitlines() == [
        f"{version} {user} {key} {accepted}"
        for version in ("TLSv1_2", "TLSv1_3")
        for user, key, accepted in (
            ("alice", KEY[:4], True),
            ("alice", KEY[::-1][:4], False),
            ("mallory", KEY[:4], False),
        )
    ]


# What a client meets


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_a_client_reads_and_writes_through_tls(serve, certificates, version):
    with secure(serve(), trusting(certificates / "anonymous", version=version)) as client:
        assert client.sock.version() == version.name.replace("_", ".")
        go(client)
        client.write(5, b"through tls" * 100_000)
        assert client.read(0, 1_000_005) == (bytes(5) + b"through tls" * 100_000)[:1_000_005]


@pytest.fixture
def turned_away(serve, caplog, monkeypatch):
    """Somebody who cannot get in, and why the server says so: asyncio drops TLS's own alert, so
    that the client only sees the end."""
    caplog.set_level(logging.INFO, "zramd.nbd.server")
    monkeypatch.setattr("zramd.nbd.server._BURST_SECONDS", 0)

    def turned_away(why, address, context):
        caplog.clear()
        with pytest.raises((OSError, EOFError)):  # in TLS 1.3, a client's part is over before
            go(secure(address, context))
        wait_for(lambda: not serve.started[0].server.live)
        (said,) = [record.message for record in caplog.records if "no TLS" in record.message]
        assert re.search(why, said), said

    return turned_away


def test_an_old_tls_is_refused(serve, certificates, turned_away):
    context = trusting(certificates / "anonymous")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
    context.set_ciphers("ALL@SECLEVEL=0")
    turned_away("unsupported protocol|UNSUPPORTED_PROTOCOL", serve(), context)


def test_a_client_that_does_not_trust_the_server_goes_and_leaves_nothing(serve, certificates):
    address = serve()
    for place in ("distrustful", "stranger"):
        with pytest.raises(ssl.SSLCertVerificationError):
            secure(address, trusting(certificates / place))
    server = serve.started[0].server
    wait_for(lambda: not server.live)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_only_a_good_certificate_of_the_client_opens_where_one_is_wanted(
    serve, certificates, turned_away, version
):
    address = serve(verify_peer=True)
    with secure(address, trusting(certificates / "client", version=version)) as client:
        go(client)
    wait_for(lambda: not serve.started[0].server.live)
    for place, why in (
        ("anonymous", "peer did not return a certificate"),
        ("expired", "certificate has expired"),
        ("stranger", "self-signed certificate|unable to get local issuer"),
    ):
        context = trusting(certificates / place, version=version)
        context.load_verify_locations(certificates / "server/ca-cert.pem")
        turned_away(why, address, context)


def test_a_revoked_certificate_does_not_open(serve, certificates, directory, turned_away):
    revoked = certificates / "client/client-cert.pem"
    pki.revoke(certificates / "authority", revoked, directory / "ca-crl.pem")
    address = serve(verify_peer=True, certificates=directory)
    turned_away("certificate revoked", address, trusting(certificates / "client"))


OTHERS = [n for n in range(1, 20) if n not in (wire.NBD_OPT_ABORT, wire.NBD_OPT_STARTTLS)]


@pytest.mark.parametrize("number", OTHERS)
def test_where_it_is_required_nothing_is_answered_before(serve, certificates, zram, number):
    address = serve()
    with RawClient(address, None) as client:
        client.receive(18)
        client.send(wire.CLIENT_FLAGS.pack(3) + option(number))
        if number == wire.NBD_OPT_EXPORT_NAME:  # which has no other way to say no
            assert client.ended()
            return
        assert option_reply(client)[:2] == (number, wire.NBD_REP_ERR_TLS_REQD)
        client.send(option(wire.NBD_OPT_ABORT))
        assert option_reply(client)[:2] == (wire.NBD_OPT_ABORT, wire.NBD_REP_ACK)
        assert client.ended()
    assert zram.statistics().openers == ()


def test_who_says_no_to_tls_is_told_to_by_our_own_client(serve):
    with pytest.raises(Exception, match="TLS"):
        RawClient(serve())


def test_what_was_refused_before_may_be_had_after(serve, certificates):
    with RawClient(serve(), None) as client:
        client.receive(18)
        client.send(wire.CLIENT_FLAGS.pack(3) + option(wire.NBD_OPT_GO))
        assert option_reply(client)[1] == wire.NBD_REP_ERR_TLS_REQD
        client.send(option(wire.NBD_OPT_STARTTLS))
        assert option_reply(client)[1] == wire.NBD_REP_ACK
        context = trusting(certificates / "anonymous")
        client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
        client.send(option(wire.NBD_OPT_STARTTLS))
        assert option_reply(client)[1] == wire.NBD_REP_ERR_INVALID
        go(client)
        assert client.read(0, 4096) == bytes(4096)


def test_where_it_is_offered_both_are_served(serve, certificates):
    address = serve(required=False)
    with RawClient(address) as plain:
        plain.write(0, b"plain")
        with secure(address, trusting(certificates / "anonymous")) as client:
            go(client)
            assert client.read(0, 5) == b"plain"


@pytest.mark.parametrize("apart", [False, True])
def test_what_somebody_slips_in_before_the_tls_handshake_ends_the_connection(serve, zram, apart):
    address = serve(required=False)
    with RawClient(address, None) as client:
        client.receive(18)
        injected = option(wire.NBD_OPT_GO) + request(NBD_CMD_READ, 0, 4096)
        starttls = wire.CLIENT_FLAGS.pack(3) + option(wire.NBD_OPT_STARTTLS)
        if apart:
            client.send(starttls)
            assert option_reply(client)[1] == wire.NBD_REP_ACK
            client.send(injected)
        else:
            client.send(starttls + injected)
            assert option_reply(client)[1] == wire.NBD_REP_ACK
        rest = bytearray()
        try:
            while piece := client.sock.recv(4096):
                rest += piece
        except ConnectionResetError:
            pass
        assert wire.NBD_OPT_REPLY_MAGIC.to_bytes(8, "big") not in rest
        assert len(rest) < 64  # at most TLS's own alert
    wait_for(lambda: not serve.started[0].server.live)
    assert zram.statistics().openers == ()


def test_what_comes_in_one_piece_with_the_end_of_the_tls_handshake_is_answered(serve, certificates):
    """As over a network, where the client's last message and its next option may wait together."""
    context = trusting(certificates / "anonymous", version=ssl.TLSVersion.TLSv1_3)
    for _ in range(20):
        with begin(serve() if not serve.started else serve.started[0].server.addresses[0]) as raw:
            there, back = ssl.MemoryBIO(), ssl.MemoryBIO()
            client = context.wrap_bio(back, there, server_hostname="localhost")
            while True:
                try:
                    client.do_handshake()
                    break
                except ssl.SSLWantReadError:
                    if there.pending:
                        raw.send(there.read())
                    back.write(raw.sock.recv(65536))
            client.write(option(wire.NBD_OPT_LIST))
            raw.send(there.read())  # Finished, and the option
            got = b""
            while len(got) < 20:
                try:
                    got += client.read(65536)
                except ssl.SSLWantReadError:
                    back.write(raw.sock.recv(65536))
            assert wire.OPTION_REPLY.unpack(got[:20])[2] == wire.NBD_REP_SERVER


@pytest.mark.parametrize("sent", ["nothing", "half", "nonsense", "all, and no option"])
@pytest.mark.parametrize("family", ["unix", "tcp"])
def test_who_begins_tls_and_does_not_end_its_handshake_is_dropped(
    serve, certificates, monkeypatch, sent, family, caplog
):
    monkeypatch.setattr(connection, "_HANDSHAKE_SECONDS", 0.3)
    address = serve()
    if family == "tcp":
        address = serve.started[0].listen(TcpAddress("127.0.0.1", 0))
    server = serve.started[0].server
    began = time.monotonic()
    with begin(address) as client:
        if sent == "half":
            there = ssl.MemoryBIO()
            context = trusting(certificates / "anonymous")
            half = context.wrap_bio(ssl.MemoryBIO(), there, server_hostname="localhost")
            with pytest.raises(ssl.SSLWantReadError):
                half.do_handshake()
            client.send(there.read()[:100])
        elif sent == "nonsense":
            client.send(b"x" * 1000)
        elif sent != "nothing":
            context = trusting(certificates / "anonymous")
            client.sock = context.wrap_socket(client.sock, server_hostname="localhost")
        rest = b"-"
        while rest:
            try:
                rest = client.sock.recv(4096)
            except ConnectionResetError:
                break
        wait_for(lambda: not server.live)
        assert time.monotonic() - began < 5
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


@pytest.mark.parametrize("when", ["before TLS", "in its handshake", "after it", "serving"])
def test_a_client_that_goes_whenever_leaves_nothing(serve, certificates, zram, when, caplog):
    address = serve()
    server = serve.started[0].server
    if when == "before TLS":
        with RawClient(address, None) as client:
            client.send(wire.CLIENT_FLAGS.pack(3) + option(wire.NBD_OPT_STARTTLS))
    elif when == "in its handshake":
        with begin(address) as client:
            client.send(b"\x16\x03\x01")
    else:
        client = secure(address, trusting(certificates / "anonymous"))
        if when == "serving":
            go(client)
            client.send(request(NBD_CMD_READ, 0, 4 * MIB))
        client.sock.close()
    wait_for(lambda: not server.live)
    assert zram.statistics().openers == ()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_disc_through_tls_ends_the_connection(serve, certificates, monkeypatch):
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.5)  # the client does not close
    with secure(serve(), trusting(certificates / "anonymous")) as client:
        go(client)
        client.send(request(NBD_CMD_DISC))
        assert client.ended()
        wait_for(lambda: not serve.started[0].server.live)


@pytest.mark.parametrize("leave", [False, True])
def test_a_server_that_ends_answers_what_came_through_tls(serve, certificates, leave):
    address = serve()
    running = serve.started[0]
    with secure(address, trusting(certificates / "anonymous")) as client, begin(address):
        go(client)
        client.send(request(NBD_CMD_READ, 0, 2 * MIB))
        wait_for(lambda: any(c.serving for c in running.server.live))
        closing = running.begin(running.server.close(leave=leave))
        cookie, error = client.reply()
        assert (cookie, error) in ((1, 0), (1, 108))
        if not error:
            assert client.receive(2 * MIB) == bytes(2 * MIB)
        closing.result(DEADLINE_S)


def test_who_does_not_read_what_comes_through_tls_is_not_read_from_either(serve, certificates):
    address = serve()
    server = serve.started[0].server
    with (
        secure(address, trusting(certificates / "anonymous")) as client,
        secure(address, trusting(certificates / "anonymous")) as other,
    ):
        go(client)
        wait_for(lambda: serve.started[0].ask(lambda: server.serving))
        (greedy,) = server.serving
        client.sock.settimeout(1)
        with pytest.raises(TimeoutError):
            client.send(request(NBD_CMD_READ, 0, 128 << 10) * 1_000_000)
        kept = greedy._stream.get_write_buffer_size()
        kept += tls_of(greedy)._transport.get_write_buffer_size()
        assert kept < 8 * MIB
        assert not greedy._reading
        go(other)
        assert other.read(0, 4096) == bytes(4096)
        began = time.monotonic()
        server.zram.reset(force=True)
        assert time.monotonic() - began < 5


def tls_of(connection):
    """asyncio's protocol in between, of a connection that serves."""
    return connection._stream._transport._ssl_protocol


@pytest.fixture
def encrypted(monkeypatch):
    """How many bytes each turn gave to TLS, but for what must go out before the cut."""
    turns = []
    give = Piecewise._give

    def counts(self):
        before, cut = sum(map(len, self._unsent)), self._cut
        give(self)
        if not cut:
            turns.append(before - sum(map(len, self._unsent)))

    monkeypatch.setattr(Piecewise, "_give", counts)
    return turns


@pytest.mark.parametrize("ends", [None, "client", "server"])
def test_long_answers_are_encrypted_as_they_are_read(serve, zram, certificates, encrypted, ends):
    """Not all at once: that would hold up all others, and keep each twice."""
    content = random.Random(1).randbytes(8 * MIB)
    opener = zram.open("test")
    opener.write(0, content)
    opener.close()
    with secure(serve(), trusting(certificates / "anonymous")) as client:
        go(client)
        running = serve.started[0]
        wait_for(lambda: running.ask(lambda: running.server.serving))
        (patient,) = running.server.serving
        ask = [request(NBD_CMD_READ, 0, 8 * MIB, cookie=number) for number in range(4)]
        client.send(b"".join(ask) + (request(NBD_CMD_DISC) if ends == "client" else b""))
        wait_for(lambda: len(patient._stream._unsent) > 4000)
        secured = tls_of(patient)
        kept = secured._get_write_buffer_size() + secured._transport.get_write_buffer_size()
        assert kept < 4 * connection._BATCH
        assert not running.ask(patient._has_room)
        if ends == "server":
            closing = running.begin(running.server.close())
            wait_for(lambda: patient._cut)
        found = set()
        for _ in range(4):
            cookie, error = client.reply()
            assert error == 0
            assert client.receive(8 * MIB) == content
            found.add(cookie)
        assert found == set(range(4))
        if ends:
            assert client.ended()
        else:
            assert client.read(4096, 4096) == content[4096:8192]
        if ends == "server":
            closing.result(DEADLINE_S)
    assert max(encrypted) <= connection._BATCH + transmission.INLINE


def test_who_ends_and_does_not_read_what_is_not_encrypted_yet_is_given_up(
    serve, certificates, monkeypatch
):
    monkeypatch.setattr(connection, "LINGER_SECONDS", 0.1)
    address = serve()
    server = serve.started[0].server
    with secure(address, trusting(certificates / "anonymous")) as client:
        go(client)
        client.send(request(NBD_CMD_READ, 0, 8 * MIB) * 4 + request(NBD_CMD_DISC))
        wait_for(lambda: not server.live)


@pytest.mark.parametrize("cut_off", [False, True])
def test_nothing_stays_of_who_leaves_with_answers_unread(serve, certificates, cut_off):
    """Without a collection of garbage, which a hardened process does not make."""
    address = serve()
    server = serve.started[0].server
    gc.disable()
    try:
        with secure(address, trusting(certificates / "anonymous")) as client:
            go(client)
            wait_for(lambda: serve.started[0].ask(lambda: server.serving))
            (greedy,) = server.serving
            protocol = weakref.ref(tls_of(greedy))  # it has what is unsent
            del greedy
            client.send(request(NBD_CMD_READ, 0, 8 * MIB) * 4)
            wait_for(lambda: protocol()._get_write_buffer_size() > 0)
            wait_for(lambda: not next(iter(server.live))._peer_reads)
            if cut_off:  # and no end of file comes first
                serve.started[0].ask(lambda: next(iter(server.live)).abort())
                wait_for(lambda: not server.live)
        wait_for(lambda: not server.live)
        wait_for(lambda: protocol() is None)
    finally:
        gc.enable()


def test_a_server_does_not_wait_for_an_idle_client_to_end_tls(serve, certificates):
    address = serve()
    running = serve.started[0]
    with secure(address, trusting(certificates / "anonymous")) as client:
        go(client)
        began = time.monotonic()
        running.do(running.server.close())
        assert time.monotonic() - began < 5


def test_a_connection_with_tls_keeps_little(serve, certificates):
    with secure(serve(), trusting(certificates / "anonymous")) as client:
        go(client)
        (connection,) = serve.started[0].server.live
        assert len(tls_of(connection)._ssl_buffer) == 64 << 10


def test_a_private_socket_requires_none(zram, certificates, tmp_path):
    made = tls.make(required=True, certificates=certificates / "server")
    running = RunningServer(zram, tls=made)
    try:
        own, other = UnixAddress(tmp_path / "own"), UnixAddress(tmp_path / "other")
        running.do(running.server.listen(own, private=True))
        running.do(running.server.listen(other))
        with RawClient(own) as client:
            assert client.read(0, 1) == b"\0"
        with secure(own, trusting(certificates / "anonymous")) as client:
            go(client)
        with socket.socket(socket.AF_UNIX) as plain:
            plain.settimeout(DEADLINE_S)
            plain.connect(str(other.path))
            with pytest.raises(Exception, match="TLS"):
                negotiate(plain, "")
    finally:
        running.close()

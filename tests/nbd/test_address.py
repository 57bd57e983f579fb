"""What may stand after --listen."""

import socket
from pathlib import Path

import pytest

from zramd.errors import BadValue
from zramd.nbd.address import TcpAddress, UnixAddress, VsockAddress, parse_listen


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/x.sock", UnixAddress(Path("/run/x.sock"))),
        ("unix:relative:with:colons", UnixAddress(Path("relative:with:colons"))),
        ("unix:" + "x" * 107, UnixAddress(Path("x" * 107))),
        ("tcp:127.0.0.1:10809", TcpAddress("127.0.0.1", 10809)),
        ("tcp:localhost:1", TcpAddress("localhost", 1)),
        ("tcp:[::1]:65535", TcpAddress("::1", 65535)),
        ("vsock:any:10809", VsockAddress(0xFFFFFFFF, 10809)),
        ("vsock:local:1", VsockAddress(1, 1)),
        ("vsock:host:4294967294", VsockAddress(2, 4294967294)),
        ("vsock:3:10809", VsockAddress(3, 10809)),
    ],
)
def test_an_address_is_understood_and_prints_as_it_was_typed(text, address):
    assert parse_listen(text) == address
    assert str(address) == text


@pytest.mark.parametrize(
    ("text", "culprit"),
    [
        ("", "''"),
        ("/run/x.sock", "/run/x.sock"),
        ("udp:localhost:1", "udp:localhost:1"),
        ("unix:", "''"),
        ("unix:a\0b", "a\\x00b"),
        ("unix:" + "x" * 108, "107"),
        ("unix:" + "é" * 54, "107"),
        ("tcp:", "tcp:"),
        ("tcp:localhost", "tcp:localhost"),
        ("tcp::10809", "tcp::10809"),
        ("tcp:[]:10809", "tcp:[]:10809"),
        ("tcp:::1:10809", "brackets"),
        ("tcp:localhost:", "''"),
        ("tcp:localhost:0", "'0'"),
        ("tcp:localhost:" + "9" * 5000, "is not a port"),
        ("tcp:localhost:65536", "65536"),
        ("tcp:localhost:nbd", "nbd"),
        ("tcp:localhost:\N{ARABIC-INDIC DIGIT ONE}", "\N{ARABIC-INDIC DIGIT ONE}"),
        ("tcp:localhost:-1", "-1"),
        ("vsock:", "vsock:"),
        ("vsock:10809", "vsock:10809"),
        ("vsock::10809", "vsock::10809"),
        ("vsock:any:", "''"),
        ("vsock:any:0", "'0'"),
        ("vsock:any:4294967295", "'4294967295'"),
        ("vsock:4294967295:1", "'4294967295'"),
        ("vsock:guest:1", "'guest'"),
        ("vsock:-1:1", "'-1'"),
        ("vsock:" + "1" * 5000 + ":1", "1" * 5000),
        ("vsock:\N{ARABIC-INDIC DIGIT ONE}:1", "\N{ARABIC-INDIC DIGIT ONE}"),
    ],
)
def test_anything_else_is_a_bad_value_that_names_the_culprit(text, culprit):
    with pytest.raises(BadValue) as caught:
        parse_listen(text)
    assert culprit in caught.value.message
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_an_address_knows_its_uri():
    assert UnixAddress(Path("/a b/s")).uri("z 0") == "nbd+unix:///z%200?socket=/a%20b/s"
    assert UnixAddress(Path("/s")).uri(tls=True) == "nbds+unix:///?socket=/s"
    assert TcpAddress("::1", 5).uri() == "nbd://[::1]:5/"
    assert TcpAddress("::1", 5).uri(tls=True) == "nbds://[::1]:5/"
    assert VsockAddress(3, 5).uri("z 0") == "nbd+vsock://3:5/z%200"
    assert VsockAddress(3, 5).uri(tls=True) == "nbds+vsock://3:5/"
    assert VsockAddress(0xFFFFFFFF, 5).uri() == "nbd+vsock://2:5/"  # as a guest sees its host


@pytest.mark.parametrize(
    ("host", "is_loopback"),
    [
        ("127.0.0.1", True),
        ("127.9.8.7", True),
        ("::1", True),
        ("::ffff:127.0.0.1", True),
        ("localhost", True),
        ("127.1", True),  # the resolver knows this one
        ("0.0.0.0", False),
        ("0", False),
        ("::", False),
        ("::ffff:192.0.2.1", False),
        ("192.0.2.1", False),
        ("fe80::1%lo", False),
        ("name.invalid", False),
        ("a" * 300, False),
    ],
)
def test_only_what_no_other_machine_reaches_is_loopback(host, is_loopback):
    assert TcpAddress(host, 10809).is_loopback() is is_loopback


def test_a_name_is_loopback_if_all_that_it_stands_for_is(monkeypatch):
    def both(*_, **__):
        return [(0, 0, 0, "", (host, 1)) for host in ("127.0.0.1", "192.0.2.1")]

    monkeypatch.setattr(socket, "getaddrinfo", both)
    assert not TcpAddress("two", 1).is_loopback()

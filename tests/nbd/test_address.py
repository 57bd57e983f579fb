"""What may stand after --listen."""

from pathlib import Path

import pytest

from zramd.errors import BadValue
from zramd.nbd.address import TcpAddress, UnixAddress, parse_listen


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("unix:/run/x.sock", UnixAddress(Path("/run/x.sock"))),
        ("unix:relative:with:colons", UnixAddress(Path("relative:with:colons"))),
        ("unix:" + "x" * 107, UnixAddress(Path("x" * 107))),
        ("tcp:127.0.0.1:10809", TcpAddress("127.0.0.1", 10809)),
        ("tcp:localhost:1", TcpAddress("localhost", 1)),
        ("tcp:[::1]:65535", TcpAddress("::1", 65535)),
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
        ("tcp:localhost:65536", "65536"),
        ("tcp:localhost:nbd", "nbd"),
        ("tcp:localhost:\N{ARABIC-INDIC DIGIT ONE}", "\N{ARABIC-INDIC DIGIT ONE}"),
        ("tcp:localhost:-1", "-1"),
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
    assert TcpAddress("::1", 5).uri() == "nbd://[::1]:5/"

"""Our client's handshake against servers that follow a script."""

import socket
import struct
import threading

import pytest

from zramd.errors import BadValue, ServerFailed
from zramd.nbd import wire
from zramd.nbd.client import negotiate
from zramd.nbd.wire import ExportInfo

GO, ACK, INFO = wire.NBD_OPT_GO, wire.NBD_REP_ACK, wire.NBD_REP_INFO
FLAGS = struct.pack(">I", 3)
GO_ZRAM0 = wire.pack_option(GO, wire.pack_go("zram0", (wire.NBD_INFO_BLOCK_SIZE,)))
EXPORT_NAME_ZRAM0 = wire.pack_option(wire.NBD_OPT_EXPORT_NAME, b"zram0")
EXPORT = ExportInfo(1 << 30, 0x16D, 512, 8192, 1 << 20)
SIZE_INFO = wire.pack_option_reply(GO, INFO, wire.pack_info_export(EXPORT))
BLOCK_INFO = wire.pack_option_reply(GO, INFO, wire.pack_info_block_size(EXPORT))
NAME_INFO = wire.pack_option_reply(GO, INFO, wire.pack_info_text(wire.NBD_INFO_NAME, "zram0"))
ACKED = wire.pack_option_reply(GO, ACK)
UNSUP = wire.pack_option_reply(GO, wire.NBD_REP_ERR_UNSUP, b"no")
BY_NAME = struct.pack(">QH", EXPORT.size, EXPORT.flags)


def greeting(flags=3):
    return b"NBDMAGICIHAVEOPT" + struct.pack(">H", flags)


@pytest.fixture
def against():
    """negotiate() with a server that says the first, hears the second, says the third, ..."""
    ours, theirs = socket.socketpair()
    for end in (ours, theirs):
        end.settimeout(30)
    heard = []

    def negotiating(*script):
        def play():
            for n, line in enumerate(script):
                if n % 2 == 0:
                    theirs.sendall(line)
                else:
                    heard.append(theirs.recv(len(line), socket.MSG_WAITALL))
            theirs.shutdown(socket.SHUT_WR)

        server = threading.Thread(target=play)
        server.start()
        try:
            return negotiate(ours, "zram0")
        finally:
            ours.shutdown(socket.SHUT_WR)
            server.join()
            assert heard == list(script[1::2])[: len(heard)]

    negotiating.sock = ours
    yield negotiating
    ours.close()
    theirs.close()


def test_go_brings_size_flags_and_block_sizes(against):
    said = SIZE_INFO + BLOCK_INFO + ACKED
    assert against(greeting(), FLAGS, b"", GO_ZRAM0, said) == EXPORT


def test_information_nobody_asked_for_is_passed_over_in_any_order(against):
    said = NAME_INFO + BLOCK_INFO + NAME_INFO + SIZE_INFO + ACKED
    assert against(greeting(), FLAGS, b"", GO_ZRAM0, said) == EXPORT


def test_block_sizes_have_the_defaults_of_the_specification(against):
    info = against(greeting(), FLAGS, b"", GO_ZRAM0, SIZE_INFO + ACKED)
    assert info == ExportInfo(EXPORT.size, EXPORT.flags, 1, 4096, 32 << 20)


def test_a_server_without_go_is_asked_by_export_name(against):
    info = against(greeting(), FLAGS, b"", GO_ZRAM0, UNSUP, EXPORT_NAME_ZRAM0, BY_NAME)
    assert (info.size, info.flags) == (EXPORT.size, EXPORT.flags)


@pytest.mark.parametrize(("offered", "chosen"), [(0, 0), (2, 2)])
def test_a_server_without_fixed_newstyle_is_asked_by_export_name(against, offered, chosen):
    padding = b"" if offered & 2 else bytes(124)
    flags = struct.pack(">I", chosen)
    info = against(greeting(offered), flags, b"", EXPORT_NAME_ZRAM0, BY_NAME + padding)
    assert info.size == EXPORT.size


@pytest.mark.parametrize("way", ["go", "export name"])
def test_what_follows_the_handshake_is_left_to_the_kernel(against, way):
    if way == "go":
        against(greeting(), FLAGS, b"", GO_ZRAM0, SIZE_INFO + ACKED + b"rest")
    else:
        against(
            greeting(0),
            struct.pack(">I", 0),
            b"",
            EXPORT_NAME_ZRAM0,
            BY_NAME + bytes(124) + b"rest",
        )
    assert against.sock.recv(100) == b"rest"


def test_an_unknown_export_is_a_bad_value_with_the_servers_reason(against):
    refusal = wire.pack_option_reply(GO, wire.NBD_REP_ERR_UNKNOWN, b"only zram1 here")
    with pytest.raises(BadValue, match=r"'zram0'.*only zram1 here"):
        against(greeting(), FLAGS, b"", GO_ZRAM0, refusal)


def test_a_server_that_hangs_up_on_export_name_has_no_such_export(against):
    with pytest.raises(BadValue, match="'zram0'"):
        against(greeting(), FLAGS, b"", GO_ZRAM0, UNSUP, EXPORT_NAME_ZRAM0)


@pytest.mark.parametrize(
    ("script", "why"),
    [
        ([b""], "closed the connection"),
        ([b"NBDMAGIC"], "closed the connection"),
        ([b"HTTP/1.1 400 Bad Request\r\n"], "no NBD server"),
        ([b"NBDMAGIC" + struct.pack(">Q", wire.OLDSTYLE_MAGIC) + bytes(136)], "oldstyle"),
        ([greeting(), FLAGS, b"", GO_ZRAM0, b"?" * 20], "no reply"),
        ([greeting(), FLAGS, b"", GO_ZRAM0, wire.pack_option_reply(3, ACK)], "no reply"),
        ([greeting(), FLAGS, b"", GO_ZRAM0, ACKED], "size"),
        ([greeting(), FLAGS, b"", GO_ZRAM0, SIZE_INFO[:-1]], "closed the connection"),
        (
            [greeting(), FLAGS, b"", GO_ZRAM0, wire.pack_option_reply(GO, INFO, b"\0\0short")],
            "NBD_REP_INFO",
        ),
        (
            [
                *[greeting(), FLAGS, b"", GO_ZRAM0],
                wire.OPTION_REPLY.pack(wire.NBD_OPT_REPLY_MAGIC, GO, INFO, 1 << 31),
            ],
            "2147483648 bytes",
        ),
        (
            [
                *[greeting(), FLAGS, b"", GO_ZRAM0],
                wire.pack_option_reply(GO, wire.NBD_REP_ERR_POLICY, b"not you"),
            ],
            "not you",
        ),
        (
            [
                *[greeting(), FLAGS, b"", GO_ZRAM0],
                wire.pack_option_reply(GO, wire.NBD_REP_ERR_SHUTDOWN),
            ],
            "0x80000007",
        ),
    ],
)
def test_a_server_that_fails_says_how(against, script, why):
    with pytest.raises(ServerFailed, match=why):
        against(*script)


def test_a_silent_server_is_given_up_after_the_sockets_time_out():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(0.01)
        with pytest.raises(ServerFailed, match="timed out"):
            negotiate(ours, "zram0")

"""The bytes themselves, written out by hand from doc/proto.md."""

import errno

import pytest

from zramd.nbd import wire
from zramd.nbd.wire import ExportInfo, Malformed


def test_the_greeting_is_fixed_newstyle_without_zeroes():
    assert wire.pack_greeting() == b"NBDMAGICIHAVEOPT\x00\x03"


def test_an_option_has_a_header_of_16_bytes():
    assert wire.pack_option(7, b"data") == b"IHAVEOPT\0\0\0\x07\0\0\0\x04data"


def test_an_option_reply_has_a_header_of_20_bytes():
    expected = bytes.fromhex("0003e889045565a9 00000003 80000001 00000002") + b"no"
    assert wire.pack_option_reply(3, wire.NBD_REP_ERR_UNSUP, b"no") == expected


def test_a_request_has_28_bytes_and_keeps_the_cookie_as_it_is():
    expected = bytes.fromhex("25609513 0001 0006 ffeeddccbbaa0099 0000000000001000 00000200")
    cookie = bytes.fromhex("ffeeddccbbaa0099")
    packed = wire.pack_request(wire.NBD_CMD_WRITE_ZEROES, cookie, 4096, 512, wire.NBD_CMD_FLAG_FUA)
    assert packed == expected
    assert wire.REQUEST.size == len(packed) == 28


def test_a_simple_reply_has_16_bytes():
    assert wire.pack_simple_reply(b"\x01" * 8, 28) == bytes.fromhex(
        "67446698 0000001c 0101010101010101"
    )
    assert wire.pack_simple_reply(b"\x01" * 8, 0) == wire.SIMPLE_REPLY_OK + b"\x01" * 8


def test_the_reply_to_export_name_has_10_bytes_and_124_of_padding():
    assert wire.EXPORT_NAME_REPLY.size == 10
    assert bytes(124) == wire.EXPORT_NAME_ZEROES


def test_go_carries_name_and_information_requests():
    data = bytes.fromhex("00000003") + b"abc" + bytes.fromhex("0002 0001 0003")
    assert wire.pack_go("abc", (1, 3)) == data
    assert wire.parse_go(data) == ("abc", [1, 3])
    assert wire.parse_go(wire.pack_go("")) == ("", [])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        bytes(5),
        bytes.fromhex("00000001 0000"),
        bytes.fromhex("ffffffff 0000"),
        bytes.fromhex("00000000 0001"),
        bytes.fromhex("00000000 0000 00"),
        bytes.fromhex("00000002 ffff 0000"),
        wire.pack_go("x" * 4097),
    ],
    ids=lambda data: data.hex()[:20],
)
def test_go_whose_lengths_do_not_add_up_is_malformed(data):
    with pytest.raises(Malformed):
        wire.parse_go(data)


def test_the_longest_name_is_no_error():
    assert wire.parse_go(wire.pack_go("x" * 4096)) == ("x" * 4096, [])


def test_export_and_block_size_information_round_trip():
    export = ExportInfo(1 << 40, 0x16D, 1, 4096, 32 << 20)
    assert wire.pack_info_export(export) == bytes.fromhex("0000 0000010000000000 016d")
    assert wire.pack_info_block_size(export) == bytes.fromhex("0003 00000001 00001000 02000000")
    assert wire.parse_info(wire.pack_info_export(export)) == (0, (1 << 40, 0x16D))
    assert wire.parse_info(wire.pack_info_block_size(export)) == (3, (1, 4096, 32 << 20))


def test_information_of_another_type_is_passed_over():
    assert wire.parse_info(wire.pack_info_text(wire.NBD_INFO_NAME, "zram0")) == (1, ())
    assert wire.parse_info(b"\xff\xff") == (0xFFFF, ())


@pytest.mark.parametrize("data", [b"", b"\0", bytes(11), bytes(13), b"\0\x03" + bytes(11)])
def test_information_of_a_wrong_length_is_malformed(data):
    with pytest.raises(Malformed):
        wire.parse_info(data)


@pytest.mark.parametrize(
    ("number", "on_the_wire"),
    [
        (errno.EPERM, 1),
        (errno.EROFS, 1),
        (errno.EIO, 5),
        (errno.EINVAL, 22),
        (errno.ENOSPC, 28),
        (errno.EDQUOT, 28),
        (errno.EFBIG, 28),
        (errno.EOVERFLOW, 75),
        (errno.EOPNOTSUPP, 95),
        (errno.ESHUTDOWN, 108),
        (errno.ENOMEM, 5),
        (errno.EBUSY, 5),
        (errno.ENODEV, 5),
        (0, 5),
        (99999, 5),
    ],
)
def test_errors_become_those_the_specification_names(number, on_the_wire):
    assert wire.nbd_error(number) == on_the_wire

"""What the handshake keeps, opens and remembers, without a server around it; what it answers to
each option, tests/nbd/conformance asks. Each conversation is fed whole, byte by byte, and with what
the client may send ahead."""

import struct

import pytest

from tests.nbd.harness import contexts
from zramd.errors import BadValue, DeviceBusy, NotInitialised
from zramd.nbd import wire
from zramd.nbd.negotiation import MAX_KEPT, MAX_OPTION_LENGTH, MAX_OPTIONS, Negotiation, State
from zramd.nbd.replies import SIMPLE, STRUCTURED
from zramd.nbd.wire import ExportInfo

EXPORT = ExportInfo(1 << 30, 0x16D, name="zram0", description="a device")
ACK, UNSUP, INVALID = wire.NBD_REP_ACK, wire.NBD_REP_ERR_UNSUP, wire.NBD_REP_ERR_INVALID
FIXED = struct.pack(">I", 1)


class OneExport:
    """A device `zram0` that remembers who opened it; `trouble` is raised instead, once set."""

    def __init__(self):
        self.opened = []
        self.trouble = None

    def names(self):
        return ["zram0"]

    def describe(self, name):
        if self.trouble:
            raise self.trouble
        if name not in ("", "zram0"):
            raise BadValue(f"there is no export {name!r} here")
        return EXPORT

    def open(self, name):
        export = self.describe(name)
        self.opened.append(name)
        return export


def option(number, data=b""):
    return wire.pack_option(number, data)


BASE = "base:allocation"


def replies(data):
    """[(option, reply type, data)] of what a server sent."""
    found = []
    while data:
        magic, number, reply, length = wire.OPTION_REPLY.unpack_from(data)
        assert magic == 0x3E889045565A9
        found.append((number, reply, data[20 : 20 + length]))
        assert len(data) >= 20 + length
        data = data[20 + length :]
    return found


def kinds(data):
    return [(number, reply) for number, reply, _ in replies(data)]


@pytest.fixture(params=["whole", "byte by byte", "with trailing data"])
def converse(request):
    """Feeds a conversation to a new Negotiation: (negotiation, what it sent)."""

    def feed(conversation, exports=None, negotiation=None):
        negotiation = negotiation or Negotiation(exports or OneExport())
        if request.param == "byte by byte":
            sent = b"".join(negotiation.receive(bytes([byte])) for byte in conversation)
        elif request.param == "with trailing data":
            sent = negotiation.receive(conversation + b"\x25")
            assert not negotiation.done or negotiation.trailing.endswith(b"\x25")
        else:
            sent = negotiation.receive(conversation)
        return negotiation, sent

    return feed


def test_info_tells_the_same_and_opens_nothing(converse):
    exports = OneExport()
    negotiation, sent = converse(FIXED + option(wire.NBD_OPT_INFO, wire.pack_go("zram0")), exports)
    assert kinds(sent) == [(6, wire.NBD_REP_INFO), (6, wire.NBD_REP_INFO), (6, wire.NBD_REP_ACK)]
    assert negotiation.state is State.HAGGLING
    assert not exports.opened


@pytest.mark.parametrize("number", [wire.NBD_OPT_GO, wire.NBD_OPT_INFO])
@pytest.mark.parametrize(
    "trouble",
    [BadValue("no such export"), NotInitialised("no disksize yet"), DeviceBusy("being reset")],
    ids=lambda trouble: trouble.slug,
)
def test_an_export_that_cannot_be_had_is_unknown_with_the_reason(converse, number, trouble):
    exports = OneExport()
    exports.trouble = trouble
    negotiation, sent = converse(FIXED + option(number, wire.pack_go("zram0")), exports)
    assert replies(sent) == [(number, wire.NBD_REP_ERR_UNKNOWN, str(trouble).encode())]
    assert negotiation.state is State.HAGGLING


def test_a_device_that_cannot_be_had_is_listed_without_a_description(converse):
    exports = OneExport()
    exports.trouble = NotInitialised("no disksize yet")
    _, sent = converse(FIXED + option(wire.NBD_OPT_LIST), exports)
    assert replies(sent)[0] == (3, wire.NBD_REP_SERVER, b"\0\0\0\x05zram0")


@pytest.mark.parametrize(
    "conversation",
    [
        struct.pack(">I", 0x80),
        struct.pack(">I", 4),
        struct.pack(">I", 0xFFFFFFFF),
        FIXED + b"IHAVEOPZ" + bytes(8),
        FIXED + b"GET / HTTP/1.1\r\n",
        FIXED + wire.OPTION.pack(wire.IHAVEOPT, 99, 1 << 31),
        FIXED + wire.OPTION.pack(wire.IHAVEOPT, 99, MAX_OPTION_LENGTH + 1),
        FIXED + wire.OPTION.pack(wire.IHAVEOPT, wire.NBD_OPT_EXPORT_NAME, 0xFFFFFFF),
        FIXED + option(wire.NBD_OPT_EXPORT_NAME, bytes(MAX_KEPT + 1)),
        FIXED + option(99) * (MAX_OPTIONS + 1),
    ],
    ids=lambda data: data.hex()[:40],
)
def test_a_peer_that_breaks_the_framing_is_dropped(converse, conversation):
    negotiation, _ = converse(conversation)
    assert negotiation.state is State.ENDED
    assert negotiation.reason
    assert negotiation.receive(option(wire.NBD_OPT_LIST)) == b""


def test_what_the_client_sends_ahead_is_kept_for_the_transmission():
    negotiation = Negotiation(OneExport())
    ahead = wire.pack_request(wire.NBD_CMD_READ, bytes(8), 0, 512) * 3
    negotiation.receive(FIXED + option(wire.NBD_OPT_GO, wire.pack_go("")) + ahead)
    assert negotiation.trailing == ahead


def test_a_long_option_is_not_kept():
    negotiation = Negotiation(OneExport())
    negotiation.receive(FIXED + wire.OPTION.pack(wire.IHAVEOPT, 99, MAX_OPTION_LENGTH))
    for _ in range(MAX_OPTION_LENGTH >> 20):
        negotiation.receive(bytes(1 << 20))
        assert len(negotiation.trailing) == 0
    assert kinds(negotiation.receive(option(98))) == [(98, UNSUP)]


def test_the_description_is_told_to_whoever_asks(converse):
    _, sent = converse(FIXED + option(wire.NBD_OPT_INFO, wire.pack_go("", (2, 1))))
    infos = [data for _, kind, data in replies(sent) if kind == wire.NBD_REP_INFO]
    assert infos[2:] == [b"\0\x01zram0", b"\0\x02a device"]


# TLS

STRUCTURED_REPLY = option(8)
GO = option(wire.NBD_OPT_GO, wire.pack_go("zram0"))


def test_the_text_of_an_error_is_cut_at_the_end_of_a_character(converse):
    exports = OneExport()
    exports.trouble = BadValue("a" + "é" * 4096)
    _, sent = converse(FIXED + option(wire.NBD_OPT_GO, wire.pack_go("zram0")), exports)
    ((_, _, text),) = replies(sent)
    assert text.decode() == "a" + "é" * 2047


def secured(before=b"", **options):
    negotiation = Negotiation(OneExport(), tls_offered=True, **options)
    negotiation.receive(FIXED + before)
    assert kinds(negotiation.receive(option(5))) == [(5, ACK)]
    assert negotiation.state is State.SECURING
    negotiation.secured()
    return negotiation


def test_nothing_but_starttls_and_abort_is_answered_where_tls_is_required(converse):
    options = (3, 6, 7, 8, 9, 10, 11, 99)
    required = wire.NBD_REP_ERR_TLS_REQD
    for data in (b"", wire.pack_go(""), bytes(MAX_KEPT + 1)):
        negotiation = Negotiation(OneExport(), tls_offered=True, tls_required=True)
        conversation = b"".join(option(number, data) for number in options) + option(2)
        if len(data) < MAX_KEPT:
            negotiation, sent = converse(FIXED + conversation, negotiation=negotiation)
        else:
            sent = negotiation.receive(FIXED + conversation)
        assert kinds(sent) == [*((number, required) for number in options), (2, ACK)]


def test_what_was_said_before_tls_counts_for_nothing_after_it():
    before = STRUCTURED_REPLY + option(10, contexts("zram0", BASE))
    negotiation = secured(before)
    sent = negotiation.receive(option(10, contexts("zram0", BASE)) + option(5) + GO)
    assert kinds(sent)[:2] == [(10, INVALID), (5, INVALID)]
    assert (negotiation.form, negotiation.contexts) == (SIMPLE, ())
    assert negotiation.state is State.TRANSMITTING
    again = secured(before)
    again.receive(STRUCTURED_REPLY + GO)
    assert (again.form, again.contexts) == (STRUCTURED, ())


def test_what_is_required_may_be_asked_for_after_tls():
    assert secured(tls_required=True).receive(GO).endswith(wire.pack_option_reply(7, ACK))


@pytest.mark.parametrize("slipped_in", [b"x", GO, option(5), option(2)])
def test_who_slips_something_in_before_the_tls_handshake_is_dropped(slipped_in):
    negotiation = Negotiation(OneExport(), tls_offered=True)
    assert kinds(negotiation.receive(FIXED + option(5) + slipped_in)) == [(5, ACK)]
    assert negotiation.state is State.ENDED

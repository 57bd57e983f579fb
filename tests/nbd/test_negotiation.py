"""The handshake, message by message. Each conversation is fed whole, byte by byte, and with what
the client may send ahead; the replies must be the same."""

import struct

import pytest

from zramd.errors import BadValue, DeviceBusy, NotInitialised
from zramd.nbd import wire
from zramd.nbd.negotiation import MAX_KEPT, MAX_OPTION_LENGTH, MAX_OPTIONS, Negotiation, State
from zramd.nbd.replies import EXTENDED, SIMPLE, STRUCTURED
from zramd.nbd.wire import ExportInfo

EXPORT = ExportInfo(1 << 30, 0x16D, name="zram0", description="a device")
ACK, UNSUP, POLICY = wire.NBD_REP_ACK, wire.NBD_REP_ERR_UNSUP, wire.NBD_REP_ERR_POLICY
INVALID, TOO_BIG = wire.NBD_REP_ERR_INVALID, wire.NBD_REP_ERR_TOO_BIG
FIXED = struct.pack(">I", 1)
FIXED_NO_ZEROES = struct.pack(">I", 3)


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


BASE, STATE = "base:allocation", "zramd:state"


def contexts(export, *queries):
    """The data of LIST_META_CONTEXT and SET_META_CONTEXT."""
    strings = [struct.pack(">I", len(each)) + each.encode() for each in (export, *queries)]
    return strings[0] + struct.pack(">I", len(queries)) + b"".join(strings[1:])


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


def test_it_begins_with_the_greeting():
    assert Negotiation(OneExport()).greeting() == wire.pack_greeting()


@pytest.mark.parametrize("name", ["", "zram0"])
@pytest.mark.parametrize(("flags", "zeroes"), [(FIXED_NO_ZEROES, 0), (FIXED, 124)])
def test_export_name_opens_and_pads_unless_both_sides_agreed_not_to(converse, name, flags, zeroes):
    exports = OneExport()
    conversation = flags + option(wire.NBD_OPT_EXPORT_NAME, name.encode())
    negotiation, sent = converse(conversation, exports)
    assert sent == struct.pack(">QH", EXPORT.size, EXPORT.flags) + bytes(zeroes)
    assert negotiation.state is State.TRANSMITTING
    assert negotiation.export == EXPORT
    assert exports.opened == [name]


@pytest.mark.parametrize("raw", [b"other", b"\xff", b"x" * 4097])
def test_export_name_can_only_drop_the_peer_when_it_fails(converse, raw):
    exports = OneExport()
    negotiation, sent = converse(FIXED + option(wire.NBD_OPT_EXPORT_NAME, raw), exports)
    assert sent == b""
    assert negotiation.state is State.ENDED
    assert negotiation.reason
    assert not exports.opened


@pytest.mark.parametrize("name", ["", "zram0"])
@pytest.mark.parametrize("flags", [FIXED, FIXED_NO_ZEROES])
@pytest.mark.parametrize("wanted", [(), (3,), (0, 3, 99)])
def test_go_tells_size_flags_and_block_sizes_and_never_pads(converse, name, flags, wanted):
    exports = OneExport()
    negotiation, sent = converse(
        flags + option(wire.NBD_OPT_GO, wire.pack_go(name, wanted)), exports
    )
    assert replies(sent) == [
        (7, wire.NBD_REP_INFO, struct.pack(">HQH", 0, EXPORT.size, EXPORT.flags)),
        (7, wire.NBD_REP_INFO, struct.pack(">HIII", 3, 1, 4096, 32 << 20)),
        (7, wire.NBD_REP_ACK, b""),
    ]
    assert negotiation.state is State.TRANSMITTING
    assert exports.opened == [name]


def test_the_canonical_name_is_told_to_whoever_asks(converse):
    _, sent = converse(FIXED + option(wire.NBD_OPT_GO, wire.pack_go("", (1,))))
    assert (7, wire.NBD_REP_INFO, b"\0\x01zram0") in replies(sent)


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


def test_list_names_the_device(converse):
    _, sent = converse(FIXED + option(wire.NBD_OPT_LIST))
    assert replies(sent) == [
        (3, wire.NBD_REP_SERVER, b"\0\0\0\x05zram0"),
        (3, wire.NBD_REP_ACK, b""),
    ]


@pytest.mark.parametrize("data", [b"", b"ignored"])
def test_abort_is_acknowledged_and_ends(converse, data):
    negotiation, sent = converse(FIXED + option(wire.NBD_OPT_ABORT, data))
    assert replies(sent) == [(2, wire.NBD_REP_ACK, b"")]
    assert negotiation.state is State.ENDED


@pytest.mark.parametrize(
    ("number", "data", "error"),
    [
        # What we do not speak; the payload must be consumed.
        (4, b"", UNSUP),
        (5, b"", POLICY),
        (12, bytes(100), UNSUP),
        (99, bytes(64 << 10), UNSUP),
        (0x7654321, b"junk", UNSUP),
        (0, b"", UNSUP),
        (99, bytes(MAX_KEPT + 1), UNSUP),
        # What we speak, misspoken.
        (wire.NBD_OPT_LIST, b"x", INVALID),
        (wire.NBD_OPT_GO, b"", INVALID),
        (wire.NBD_OPT_GO, bytes(5), INVALID),
        (wire.NBD_OPT_GO, struct.pack(">IH", 1, 0), INVALID),
        (wire.NBD_OPT_GO, struct.pack(">IH", 0xFFFFFFFF, 0), INVALID),
        (wire.NBD_OPT_GO, struct.pack(">IH", 0, 1), INVALID),
        (wire.NBD_OPT_INFO, struct.pack(">IHH", 0, 0, 0), INVALID),
        (wire.NBD_OPT_INFO, wire.pack_go("x" * 4097), INVALID),
        (wire.NBD_OPT_GO, struct.pack(">I1sH", 1, b"\xff", 0), INVALID),
        (wire.NBD_OPT_STARTTLS, b"x", INVALID),
        (wire.NBD_OPT_STRUCTURED_REPLY, b"x", INVALID),
        (wire.NBD_OPT_EXTENDED_HEADERS, b"x", INVALID),
        (wire.NBD_OPT_SET_META_CONTEXT, contexts("", BASE), INVALID),  # too early
        (wire.NBD_OPT_LIST_META_CONTEXT, b"", INVALID),
        (wire.NBD_OPT_LIST_META_CONTEXT, bytes(7), INVALID),
        (wire.NBD_OPT_LIST_META_CONTEXT, bytes(9), INVALID),
        (wire.NBD_OPT_LIST_META_CONTEXT, contexts("", BASE)[:-1], INVALID),
        (wire.NBD_OPT_LIST_META_CONTEXT, contexts("", BASE) + b"x", INVALID),
        (wire.NBD_OPT_LIST_META_CONTEXT, struct.pack(">III", 0, 1, 0xFFFFFFFF), INVALID),
        (wire.NBD_OPT_LIST_META_CONTEXT, struct.pack(">II", 0, 0xFFFFFFFF), INVALID),
        (wire.NBD_OPT_LIST_META_CONTEXT, contexts("other"), wire.NBD_REP_ERR_UNKNOWN),
        (wire.NBD_OPT_LIST_META_CONTEXT, contexts("x" * 4097), INVALID),
        (wire.NBD_OPT_LIST, bytes(MAX_KEPT + 1), TOO_BIG),
        (wire.NBD_OPT_GO, bytes(MAX_KEPT + 1), TOO_BIG),
    ],
    ids=lambda value: f"{len(value)} bytes" if isinstance(value, bytes) else f"{value:#x}",
)
def test_a_refused_option_is_answered_consumed_and_leaves_the_two_in_step(number, data, error):
    for pieces in (1, 3, 1000):
        exports = OneExport()
        negotiation = Negotiation(exports)
        conversation = FIXED + option(number, data) + option(wire.NBD_OPT_GO, wire.pack_go(""))
        step = -(-len(conversation) // pieces)
        sent = b"".join(
            negotiation.receive(conversation[at : at + step])
            for at in range(0, len(conversation), step)
        )
        assert kinds(sent)[0] == (number, error)
        assert kinds(sent)[1:] == [(7, 3), (7, 3), (7, 1)]
        assert exports.opened == [""]


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


def test_as_many_options_as_allowed_are_answered(converse):
    negotiation, sent = converse(FIXED + option(99) * MAX_OPTIONS)
    assert kinds(sent) == [(99, UNSUP)] * MAX_OPTIONS
    assert negotiation.state is State.HAGGLING


def test_without_fixed_newstyle_only_export_name_is_legal(converse):
    negotiation, sent = converse(
        struct.pack(">I", 0) + option(wire.NBD_OPT_LIST) + option(wire.NBD_OPT_EXPORT_NAME)
    )
    opened = struct.pack(">QH", EXPORT.size, EXPORT.flags) + bytes(124)
    assert sent.endswith(opened)
    assert kinds(sent.removesuffix(opened)) == [(3, INVALID)]
    assert negotiation.state is State.TRANSMITTING


def test_a_server_that_shuts_down_says_so_except_to_abort(converse):
    negotiation = Negotiation(OneExport())
    negotiation.shutting_down = True
    options = [option(3), option(7, wire.pack_go("")), option(99), option(2)]
    _, sent = converse(FIXED + b"".join(options), negotiation=negotiation)
    shutdown = wire.NBD_REP_ERR_SHUTDOWN
    assert kinds(sent) == [(3, shutdown), (7, shutdown), (99, shutdown), (2, wire.NBD_REP_ACK)]


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


# Structured replies, extended headers, contexts

STRUCTURED_REPLY, EXTENDED_HEADERS = option(8), option(11)
GO = option(wire.NBD_OPT_GO, wire.pack_go("zram0"))


def flags_told(sent):
    return [
        struct.unpack(">HQH", data)[2]
        for _, kind, data in replies(sent)
        if kind == wire.NBD_REP_INFO and len(data) == 12
    ]


@pytest.mark.parametrize(
    ("options", "form", "kinds_of"),
    [
        (GO, SIMPLE, []),
        (STRUCTURED_REPLY + GO, STRUCTURED, [(8, ACK)]),
        (STRUCTURED_REPLY * 2 + GO, STRUCTURED, [(8, ACK), (8, INVALID)]),
        (EXTENDED_HEADERS + GO, EXTENDED, [(11, ACK)]),
        (EXTENDED_HEADERS * 2 + GO, EXTENDED, [(11, ACK), (11, INVALID)]),
        (STRUCTURED_REPLY + EXTENDED_HEADERS + GO, EXTENDED, [(8, ACK), (11, ACK)]),
        (
            EXTENDED_HEADERS + STRUCTURED_REPLY + GO,
            EXTENDED,
            [(11, ACK), (8, wire.NBD_REP_ERR_EXT_HEADER_REQD)],
        ),
    ],
)
def test_the_form_of_replies_is_what_was_negotiated(converse, options, form, kinds_of):
    negotiation, sent = converse(FIXED + options)
    assert kinds(sent)[: len(kinds_of)] == kinds_of
    assert negotiation.form is form
    assert flags_told(sent) == [EXPORT.flags | (0 if form is SIMPLE else wire.NBD_FLAG_SEND_DF)]


def test_export_name_drops_the_peer_after_extended_headers(converse):
    negotiation, _ = converse(FIXED + EXTENDED_HEADERS + option(wire.NBD_OPT_EXPORT_NAME))
    assert negotiation.state is State.ENDED


@pytest.mark.parametrize(
    ("queries", "listed"),
    [
        ((), [BASE, STATE]),
        ((BASE,), [BASE]),
        (("zramd:",), [STATE]),
        (("base:", "qemu:dirty-bitmap:x", "base:allocation", ""), [BASE]),
        (("base", "base:alloc", ":", "base:allocation:"), []),
    ],
)
def test_contexts_are_listed_at_any_time_with_no_number(converse, queries, listed):
    _, sent = converse(FIXED + option(9, contexts("", *queries)))
    assert replies(sent) == [
        *((9, wire.NBD_REP_META_CONTEXT, bytes(4) + name.encode()) for name in listed),
        (9, ACK, b""),
    ]


@pytest.mark.parametrize(
    ("queries", "chosen"),
    [
        ((), []),
        ((BASE,), [1]),
        ((STATE, BASE, STATE), [1, 2]),
        (("base:", "zramd:", "qemu:dirty-bitmap:x"), []),
    ],
)
def test_contexts_are_chosen_by_name(converse, queries, chosen):
    asked = option(10, contexts("zram0", *queries))
    negotiation, sent = converse(FIXED + STRUCTURED_REPLY + asked + GO)
    names = {1: BASE, 2: STATE}
    assert replies(sent)[1 : len(chosen) + 2] == [
        *(
            (10, wire.NBD_REP_META_CONTEXT, struct.pack(">I", n) + names[n].encode())
            for n in chosen
        ),
        (10, ACK, b""),
    ]
    assert negotiation.contexts == tuple(chosen)


@pytest.mark.parametrize(
    "second",
    [
        contexts("zram0"),
        contexts("other", BASE),
        contexts("", BASE),  # the same export, by another name than GO's
        contexts("zram0", BASE)[:-1],
        bytes(MAX_KEPT + 1),
    ],
)
def test_a_choice_of_contexts_replaces_the_one_before_even_where_it_fails(converse, second):
    conversation = STRUCTURED_REPLY + option(10, contexts("zram0", BASE)) + option(10, second) + GO
    negotiation, _ = converse(FIXED + conversation)
    assert negotiation.state is State.TRANSMITTING
    assert negotiation.contexts == ()


def test_the_description_is_told_to_whoever_asks(converse):
    _, sent = converse(FIXED + option(wire.NBD_OPT_INFO, wire.pack_go("", (2, 1))))
    infos = [data for _, kind, data in replies(sent) if kind == wire.NBD_REP_INFO]
    assert infos[2:] == [b"\0\x01zram0", b"\0\x02a device"]


# TLS


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


def test_export_name_drops_the_peer_where_tls_is_required(converse):
    negotiation = Negotiation(OneExport(), tls_offered=True, tls_required=True)
    _, sent = converse(FIXED + option(1), negotiation=negotiation)
    assert (negotiation.state, sent) == (State.ENDED, b"")


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

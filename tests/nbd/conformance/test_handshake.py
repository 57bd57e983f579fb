"""Every row of the specification's handshake: client flags, options, their data, their replies.

A row is one option, sent whole, byte by byte, with the next option behind it in the same piece, and
cut in the middle. After each the two must be in step: LIST is still answered.
"""

import pytest

from tests.nbd.conformance import proto
from tests.nbd.conformance.proto import (
    ABORT,
    ACK,
    C_FIXED_NEWSTYLE,
    C_NO_ZEROES,
    ENTRY,
    ERR_EXT_HEADER_REQD,
    ERR_INVALID,
    ERR_POLICY,
    ERR_TOO_BIG,
    ERR_UNKNOWN,
    ERR_UNSUP,
    EXPORT_NAME,
    EXTENDED,
    EXTENDED_HEADERS,
    GO,
    INFO,
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_NAME,
    LIST,
    LIST_META_CONTEXT,
    MODES,
    PEEK_EXPORT,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    SET_META_CONTEXT,
    SIMPLE,
    STARTTLS,
    STRUCTURED,
    STRUCTURED_REPLY,
    Peer,
    Request,
    option,
    queries,
    string,
    u16,
    u32,
    u64,
    wants,
)

MIB = 1 << 20
KEPT = 64 << 10  # ours: the data of a longer option is thrown away
LONGEST = 32 << 20  # ours: a longer option ends the connection
MOST = 32  # ours: options

FLAGS = (
    proto.HAS_FLAGS
    | proto.SEND_FLUSH
    | proto.SEND_FUA
    | proto.SEND_TRIM
    | proto.SEND_WRITE_ZEROES
    | proto.CAN_MULTI_CONN
    | proto.SEND_CACHE
    | proto.SEND_FAST_ZERO
)
WITH_DF = FLAGS | proto.SEND_DF

ALL_CONTEXTS = [
    (REP_META_CONTEXT, u32(0) + b"base:allocation"),
    (REP_META_CONTEXT, u32(0) + b"zramd:state"),
    (ACK, b""),
]
ALLOCATION = [(REP_META_CONTEXT, u32(1) + b"base:allocation"), (ACK, b"")]
STATE = [(REP_META_CONTEXT, u32(2) + b"zramd:state"), (ACK, b"")]
BOTH = ALLOCATION[:1] + STATE
LISTED = [(REP_SERVER, string("zram0") + b"zramd, 1M, lz4"), (ACK, b"")]
NOTHING = [(ACK, b"")]
INVALID = [(ERR_INVALID, b"")]
UNSUP = [(ERR_UNSUP, b"")]
UNKNOWN = [(ERR_UNKNOWN, b"")]
TOO_BIG = [(ERR_TOO_BIG, b"")]
LOOKS_LIKE_OPTIONS = option(ABORT) + option(GO, wants(""))

# name: (options before, option, data, replies)
OPTIONS = {
    "LIST": ((), LIST, b"", LISTED),
    "LIST with data": ((), LIST, b"x", INVALID),
    "LIST with options in it": ((), LIST, LOOKS_LIKE_OPTIONS, INVALID),
    "LIST with 64 KiB": ((), LIST, bytes(KEPT), INVALID),
    "LIST with more": ((), LIST, bytes(KEPT + 1), TOO_BIG),
    "STARTTLS where there is no TLS": ((), STARTTLS, b"", [(ERR_POLICY, b"")]),
    "STARTTLS with data": ((), STARTTLS, b"x", INVALID),
    "STRUCTURED_REPLY": ((), STRUCTURED_REPLY, b"", NOTHING),
    "STRUCTURED_REPLY with data": ((), STRUCTURED_REPLY, b"x", INVALID),
    # The specification says nothing of asking twice; as qemu.
    "STRUCTURED_REPLY twice": ((STRUCTURED_REPLY,), STRUCTURED_REPLY, b"", INVALID),
    "STRUCTURED_REPLY after EXTENDED_HEADERS": (
        (EXTENDED_HEADERS,),
        STRUCTURED_REPLY,
        b"",
        [(ERR_EXT_HEADER_REQD, b"")],
    ),
    "STRUCTURED_REPLY with more than is kept": ((), STRUCTURED_REPLY, bytes(KEPT + 1), TOO_BIG),
    "EXTENDED_HEADERS": ((), EXTENDED_HEADERS, b"", NOTHING),
    "EXTENDED_HEADERS after STRUCTURED_REPLY": (
        (STRUCTURED_REPLY,),
        EXTENDED_HEADERS,
        b"",
        NOTHING,
    ),
    "EXTENDED_HEADERS with data": ((), EXTENDED_HEADERS, b"x", INVALID),
    "EXTENDED_HEADERS twice": ((EXTENDED_HEADERS,), EXTENDED_HEADERS, b"", INVALID),
    "EXTENDED_HEADERS with more than is kept": ((), EXTENDED_HEADERS, bytes(KEPT + 1), TOO_BIG),
    # Unknown ones: the data is consumed, whatever it is.
    **{
        f"unknown option {number} with {len(data)} bytes": ((), number, data, UNSUP)
        for number in (0, PEEK_EXPORT, 12, 99, 0x7654321, 0x80000000, 0xFFFFFFFF)
        for data in (b"", b"x", LOOKS_LIKE_OPTIONS, bytes(KEPT), bytes(KEPT + 1))
    },
    "the longest option": ((), 99, bytes(LONGEST), UNSUP),
    **{
        f"{what}, {why}": ((), number, data, replies)
        for what, number in (("INFO", INFO), ("GO", GO))
        for why, data, replies in (
            ("empty", b"", INVALID),
            ("shorter than its lengths", bytes(5), INVALID),
            ("a name a byte longer than there is room", u32(1) + u16(0), INVALID),
            ("a name of 2^31", u32(1 << 31) + u16(0), INVALID),
            ("a name of 2^32 - 1", u32(0xFFFFFFFF) + u16(0), INVALID),
            ("a name that ends in the count", u32(2) + b"xy", INVALID),
            ("a request that is missing", u32(0) + u16(1), INVALID),
            ("half a request that is missing", u32(0) + u16(1) + b"\0", INVALID),
            ("a request too many", u32(0) + u16(0, 0), INVALID),
            ("65535 requests that are missing", u32(0) + u16(0xFFFF), INVALID),
            ("a byte too many", wants("", INFO_NAME) + b"\0", INVALID),
            ("another name", wants("zram1"), UNKNOWN),
            ("a name that begins as ours", wants("zram00"), UNKNOWN),
            ("a name that ours begins with", wants("zram"), UNKNOWN),
            ("another name and requests", wants("zram1", 0, 1, 2, 3, 99), UNKNOWN),
            ("the longest name", wants("x" * 4096), UNKNOWN),
            ("too long a name", wants("x" * 4097), INVALID),
            ("a name that is not UTF-8", wants(b"\xff"), INVALID),
            ("a surrogate", wants(b"\xed\xa0\x80"), INVALID),
            # A name MUST NOT have a NUL: there is none such here.
            ("a name with a NUL", wants("zram0\0"), UNKNOWN),
            ("more than is kept", wants("x" * KEPT), TOO_BIG),
        )
    },
    **{
        f"{what}, {why}": ((STRUCTURED_REPLY,), number, data, replies)
        for what, number in (("LIST_META", LIST_META_CONTEXT), ("SET_META", SET_META_CONTEXT))
        for why, data, replies in (
            ("empty", b"", INVALID),
            ("shorter than its lengths", bytes(7), INVALID),
            ("a name a byte longer than there is room", u32(1) + u32(0), INVALID),
            ("a name of 2^32 - 1", u32(0xFFFFFFFF) + u32(0), INVALID),
            ("a name that ends in the count", u32(4) + b"xyz1", INVALID),
            ("a query that is missing", u32(0) + u32(1), INVALID),
            ("2^32 - 1 queries that are missing", u32(0) + u32(0xFFFFFFFF), INVALID),
            ("a query longer than the option", u32(0) + u32(1) + u32(6) + b"base:", INVALID),
            ("a query of 2^32 - 1", u32(0) + u32(1) + u32(0xFFFFFFFF) + b"base:", INVALID),
            ("half a length of a query", u32(0) + u32(1) + b"\0\0", INVALID),
            ("a byte too many", queries("", "base:allocation") + b"\0", INVALID),
            ("another name", queries("zram1", "base:allocation"), UNKNOWN),
            ("the longest name", queries("x" * 4096, "base:allocation"), UNKNOWN),
            ("too long a name", queries("x" * 4097, "base:allocation"), INVALID),
            ("a name that is not UTF-8", queries(b"\xff", "base:allocation"), INVALID),
            ("a name with a NUL", queries("zram0\0", "base:allocation"), UNKNOWN),
            ("more than is kept", queries("", "x" * KEPT), TOO_BIG),
            ("as many queries as there may be", queries("zram1", *[""] * 64), UNKNOWN),
            ("a query more", queries("", *[""] * 65), TOO_BIG),
            ("as many queries as are kept", queries("", *[""] * (KEPT // 4 - 2)), TOO_BIG),
            ("an unknown namespace", queries("", "qemu:dirty-bitmap:x", "x-y:"), NOTHING),
            ("an unknown name", queries("", "base:allocations", "base:allocatio"), NOTHING),
            ("other letters", queries("", "BASE:allocation", "base:Allocation"), NOTHING),
            # Without a colon a query MAY be an error; ours are ignored.
            ("no namespace", queries("", "allocation", "base", "zramd", ":"), NOTHING),
            ("an empty query", queries("", ""), NOTHING),
        )
    },
    "LIST_META, no queries": ((), LIST_META_CONTEXT, queries(""), ALL_CONTEXTS),
    "LIST_META, no queries, by name": ((), LIST_META_CONTEXT, queries("zram0"), ALL_CONTEXTS),
    "LIST_META, one": (
        (),
        LIST_META_CONTEXT,
        queries("", "base:allocation"),
        ALL_CONTEXTS[::2],
    ),
    "LIST_META, base:": ((), LIST_META_CONTEXT, queries("", "base:"), ALL_CONTEXTS[::2]),
    "LIST_META, zramd:": ((), LIST_META_CONTEXT, queries("", "zramd:"), ALL_CONTEXTS[1:]),
    "LIST_META, zramd:state": (
        (EXTENDED_HEADERS,),
        LIST_META_CONTEXT,
        queries("", "x-y:z", "zramd:state"),
        ALL_CONTEXTS[1:],
    ),
    "LIST_META, one thing by two names": (
        (),
        LIST_META_CONTEXT,
        queries("", "base:", "base:allocation", "zramd:"),
        ALL_CONTEXTS,
    ),
    **{
        f"SET_META in {mode} mode, {why}": (ENTRY[mode], SET_META_CONTEXT, data, replies)
        for mode in (STRUCTURED, EXTENDED)
        for why, data, replies in (
            ("no queries", queries(""), NOTHING),
            ("one", queries("", "base:allocation"), ALLOCATION),
            ("the other, by name", queries("zram0", "zramd:state"), STATE),
            ("both", queries("", "base:allocation", "zramd:state"), BOTH),
            ("one twice", queries("", "base:allocation", "base:allocation"), ALLOCATION),
            ("one among strangers", queries("", "x:y", "zramd:state", "base:x"), STATE),
            ("wildcards", queries("", "base:", "zramd:"), NOTHING),
        )
    },
    "SET_META before structured replies": (
        (),
        SET_META_CONTEXT,
        queries("", "base:allocation"),
        INVALID,
    ),
    "SET_META before structured replies, no queries": ((), SET_META_CONTEXT, queries(""), INVALID),
}


def begun(peer, *options):
    """The handshake up to a row."""
    peer.send(u32(C_FIXED_NEWSTYLE | C_NO_ZEROES))
    for number in options:
        assert peer.negotiate(number) == NOTHING
    return peer


@pytest.mark.parametrize("row", OPTIONS)
def test_an_option_is_answered_consumed_and_leaves_the_two_in_step(small, meet, manner, row):
    before, number, data, expected = OPTIONS[row]
    peer = begun(meet(small), *before)
    trailing = option(LIST) if manner == "with trailing data" else b""
    peer.send(option(number, data) + trailing)
    assert peer.option_replies(number) == expected
    if not trailing:
        peer.send(option(LIST))
    assert peer.option_replies(LIST) == LISTED


@pytest.mark.parametrize("row", [row for row in OPTIONS if len(OPTIONS[row][2]) <= KEPT])
def test_half_an_option_is_not_answered(small, row):
    before, number, data, _ = OPTIONS[row]
    message = option(number, data)
    with begun(Peer(small.path), *before) as peer:
        peer.send(message[: len(message) // 2])
        peer.finish()
        assert peer.rest() == b""
    with Peer(small.path) as other:
        other.enter(SIMPLE)


def test_all_options_of_a_handshake_in_one_piece(small):
    data = {INFO: wants("", INFO_NAME), SET_META_CONTEXT: queries("", "zramd:state")}
    numbers = [LIST, STRUCTURED_REPLY, 99, SET_META_CONTEXT, STARTTLS, INFO, EXTENDED_HEADERS]
    with Peer(small.path) as peer:
        peer.send(u32(3) + b"".join(option(number, data.get(number, b"")) for number in numbers))
        last = [peer.option_replies(number)[-1][0] for number in numbers]
    assert last == [ACK, ACK, ERR_UNSUP, ACK, ERR_POLICY, ACK, ACK]


# INFO and GO


def told(peer, number):
    """The information in the replies to INFO or GO, by its type; told once each."""
    *infos, last = peer.option_replies(number)
    assert last == (ACK, b"")
    assert {kind for kind, _ in infos} == {REP_INFO}
    found = {int.from_bytes(data[:2], "big"): data[2:] for _, data in infos}
    assert len(found) == len(infos)
    return found


@pytest.mark.parametrize("flags", [C_FIXED_NEWSTYLE, C_FIXED_NEWSTYLE | C_NO_ZEROES])
@pytest.mark.parametrize("name", ["", "zram0"])
@pytest.mark.parametrize(
    "infos",
    [
        (),
        *((info,) for info in (0, 1, 2, 3, 4, 99, 0xFFFF)),
        (3, 2, 1, 0),
        (99, 1, 100, 2),
        (1, 1, 2, 2, 3, 3, 0, 0),  # a client MUST NOT, a server may not mind
        tuple(range(1000)),
    ],
    ids=lambda infos: f"{len(infos)} from {infos[:1]}",
)
def test_info_and_go_tell_what_was_asked_for_and_the_sizes_in_any_case(
    small, meet, manner, flags, name, infos
):
    for mode in MODES:
        peer = meet(small)
        peer.send(u32(flags))
        for number in ENTRY[mode]:
            assert peer.negotiate(number) == NOTHING
        go = option(GO, wants(name, *infos))
        read = Request(proto.READ, 0, 1)
        ahead = manner == "with trailing data"
        if ahead:  # the next message: GO behind INFO, a request behind GO
            peer.send(option(INFO, wants(name, *infos)) + go + read.packed(mode))
        else:
            peer.send(option(INFO, wants(name, *infos)))
        found = told(peer, INFO)
        assert found.pop(INFO_EXPORT) == u64(small.size) + u16(FLAGS if mode == SIMPLE else WITH_DF)
        assert found.pop(INFO_BLOCK_SIZE) == u32(1, 4096, 32 << 20)
        assert found.get(INFO_NAME, b"zram0") == b"zram0"
        assert found.get(INFO_DESCRIPTION, b"a description").decode()
        assert set(found) == {INFO_NAME, INFO_DESCRIPTION} & set(infos)
        if not ahead:
            peer.send(go)
        assert {**told(peer, GO), **found}.keys() == {INFO_EXPORT, INFO_BLOCK_SIZE, *found}
        peer.mode = mode
        peer.expect(read) if ahead else peer.ask(read)
        assert peer.answer()[0] == read.cookie


def test_a_read_only_export_says_so(read_only):
    for mode in MODES:
        with begun(Peer(read_only.path), *ENTRY[mode]) as peer:
            peer.send(option(GO, wants("")))
            flags = int.from_bytes(told(peer, GO)[INFO_EXPORT][8:], "big")
        # What changes an export is left out of the flags of one that does not change.
        changing = proto.SEND_TRIM | proto.SEND_WRITE_ZEROES | proto.SEND_FAST_ZERO
        expected = (FLAGS if mode == SIMPLE else WITH_DF) | proto.READ_ONLY
        assert flags == expected & ~changing


# EXPORT_NAME


@pytest.mark.parametrize("name", ["", "zram0"])
@pytest.mark.parametrize(
    ("mode", "client_flags"),
    [*((SIMPLE, flags) for flags in range(4)), (STRUCTURED, 1), (STRUCTURED, 3)],
)
def test_export_name_is_answered_with_124_zeroes_unless_both_sides_renounce(
    small, meet, manner, client_flags, name, mode
):
    peer = meet(small)
    peer.send(u32(client_flags))
    for number in ENTRY[mode]:
        assert peer.negotiate(number) == NOTHING
    read = Request(proto.READ, 0, 1)
    ahead = manner == "with trailing data"
    peer.send(option(EXPORT_NAME, name.encode()) + (read.packed(mode) if ahead else b""))
    zeroes = 0 if client_flags & C_NO_ZEROES else 124
    flags = FLAGS if mode == SIMPLE else WITH_DF
    assert peer.receive(10 + zeroes) == u64(small.size) + u16(flags) + bytes(zeroes)
    peer.mode = mode
    peer.expect(read) if ahead else peer.ask(read)
    assert peer.answer()[0] == read.cookie


# What no reply cures. The conversations end there, whatever is sent behind them.

DROPPED = {
    **{f"client flag {bit}": u32(1 << bit | 1) for bit in range(2, 32)},
    "all client flags": u32(0xFFFFFFFF),
    "not an option": u32(3) + b"IHAVEOPZ" + u32(LIST, 0),
    "another byte order": u32(3) + b"TPOEVAHI" + u32(LIST, 0),
    "another protocol": u32(3) + b"GET / HTTP/1.1\r\n\r\n",
    "option of 32 MiB and a byte": u32(3) + option(99)[:12] + u32(LONGEST + 1),
    "option of 2^31": u32(3) + option(99)[:12] + u32(1 << 31),
    "option of 2^32 - 1": u32(3) + option(GO)[:12] + u32(0xFFFFFFFF),
    "LIST of 2^32 - 1": u32(3) + option(LIST)[:12] + u32(0xFFFFFFFF),
    # EXPORT_NAME cannot report errors.
    "EXPORT_NAME, another": u32(3) + option(EXPORT_NAME, b"zram1"),
    "EXPORT_NAME, another, without fixed newstyle": u32(0) + option(EXPORT_NAME, b"zram1"),
    "EXPORT_NAME, the longest": u32(3) + option(EXPORT_NAME, b"x" * 4096),
    "EXPORT_NAME, too long": u32(3) + option(EXPORT_NAME, b"x" * 4097),
    "EXPORT_NAME, more than is kept": u32(3) + option(EXPORT_NAME, b"x" * (KEPT + 1)),
    "EXPORT_NAME, not UTF-8": u32(3) + option(EXPORT_NAME, b"\xff"),
    "EXPORT_NAME, with a NUL": u32(3) + option(EXPORT_NAME, b"zram0\0"),
    "EXPORT_NAME of 2^32 - 1": u32(3) + option(EXPORT_NAME)[:12] + u32(0xFFFFFFFF),
}


@pytest.mark.parametrize("row", DROPPED)
def test_what_no_reply_cures_ends_the_connection_without_one(small, meet, manner, row):
    peer = meet(small)
    peer.send(DROPPED[row] + (option(LIST) if manner == "with trailing data" else b""))
    assert peer.rest() == b""
    with Peer(small.path) as other:
        other.enter(SIMPLE)


def test_export_name_after_extended_headers_ends_the_connection(small, meet, manner):
    peer = begun(meet(small), EXTENDED_HEADERS)
    trailing = option(LIST) if manner == "with trailing data" else b""
    peer.send(option(EXPORT_NAME, b"zram0") + trailing)
    assert peer.rest() == b""


@pytest.mark.parametrize(
    "data", [b"", b"ignored", option(LIST), bytes(KEPT), bytes(KEPT + 1)], ids=len
)
@pytest.mark.parametrize("mode", MODES)
def test_abort_is_acknowledged_and_ends(small, meet, manner, mode, data):
    peer = begun(meet(small), *ENTRY[mode])
    peer.send(option(ABORT, data) + (option(LIST) if manner == "with trailing data" else b""))
    assert peer.option_replies(ABORT) == NOTHING
    assert peer.rest() == b""


@pytest.mark.parametrize("client_flags", [0, C_NO_ZEROES])
@pytest.mark.parametrize("number", [n for n in (*range(12), 99) if n != EXPORT_NAME])
def test_without_fixed_newstyle_all_but_export_name_is_invalid(
    small, meet, manner, client_flags, number
):
    peer = meet(small)
    peer.send(u32(client_flags))
    data = {GO: wants(""), INFO: wants("")}.get(number, b"")
    last = option(EXPORT_NAME)
    peer.send(option(number, data) + (last if manner == "with trailing data" else b""))
    assert peer.option_replies(number) == INVALID  # or drop; we do not
    if manner != "with trailing data":
        peer.send(last)
    zeroes = bytes(0 if client_flags else 124)
    assert peer.receive(10 + len(zeroes)) == u64(small.size) + u16(FLAGS) + zeroes


def test_as_many_options_as_allowed_are_answered_and_one_more_ends(small, meet, manner):
    peer = begun(meet(small))
    if manner == "with trailing data":  # the one more
        peer.send(option(LIST) * (MOST + 1))
    else:
        peer.send(option(LIST) * MOST)
    for _ in range(MOST):
        assert peer.option_replies(LIST) == LISTED
    if manner != "with trailing data":
        peer.send(option(GO, wants("")))
    assert peer.rest() == b""


def test_the_last_option_allowed_may_be_go(small, meet, manner):
    peer = begun(meet(small))
    peer.send(option(99) * (MOST - 1) + option(GO, wants("")))
    for _ in range(MOST - 1):
        assert peer.option_replies(99) == UNSUP
    assert told(peer, GO)


@pytest.mark.parametrize("sent", [b"", b"\0", u32(1), u32(3) + b"IHAVE"])
def test_a_client_that_leaves_in_the_handshake_is_let_go(small, sent):
    with Peer(small.path) as peer:
        peer.send(sent)
        peer.finish()
        assert peer.rest() == b""


# Which contexts count

A, S = "base:allocation", "zramd:state"
SET_A, SET_S = (SET_META_CONTEXT, queries("", A)), (SET_META_CONTEXT, queries("", S))
SET, LIST_META = SET_META_CONTEXT, LIST_META_CONTEXT

# name: (options before GO, the ids that a block status then tells of)
SELECTIONS = {
    "none": ([], set()),
    "one": ([SET_A], {1}),
    "the other": ([SET_S], {2}),
    "both": ([(SET, queries("", S, A))], {1, 2}),
    "the last": ([SET_A, SET_S], {2}),
    "one, and then none": ([SET_A, (SET, queries(""))], set()),
    "one, and then a stranger": ([SET_A, (SET, queries("", "x:y"))], set()),
    "one, and then a wildcard": ([SET_A, (SET, queries("", "base:"))], set()),
    "one, and then an option of no length": ([SET_A, (SET, b"")], set()),
    "one, and then an option too long": ([SET_A, (SET, queries("", A) + b"x")], set()),
    "one, and then more than is kept": ([SET_A, (SET, queries("", A) + bytes(KEPT))], set()),
    "one, and then for no export": ([SET_A, (SET, queries("zram1", A))], set()),
    "one, and then for another name": ([SET_A, (SET, queries("zram0", A))], set()),
    "one after a failure": ([(SET, b""), SET_A], {1}),
    "one, and then LIST_META": ([SET_A, (LIST_META, queries("", S))], {1}),
    "one, and then LIST_META that fails": ([SET_A, (LIST_META, b"")], {1}),
    "one, and then INFO of another name": ([SET_A, (INFO, wants("zram0"))], {1}),
    "one, and then GO of no export": ([SET_A, (GO, wants("zram1"))], {1}),
    "one, and then STARTTLS that is refused": ([SET_A, (STARTTLS, b"")], {1}),
}


def status(peer, mode, name):
    """What a block status tells, after GO."""
    peer.send(option(GO, wants(name)))
    told(peer, GO)
    peer.mode = mode
    return peer.do(Request(proto.BLOCK_STATUS, 0, 4096))


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
@pytest.mark.parametrize("row", SELECTIONS)
def test_a_selection_counts_if_it_is_the_last(small, mode, row):
    options, contexts = SELECTIONS[row]
    with begun(Peer(small.path), *ENTRY[mode]) as peer:
        for number, data in options:
            peer.negotiate(number, data)
        answer = status(peer, mode, "")
    assert answer == proto.EINVAL if not contexts else set(answer) == contexts


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
@pytest.mark.parametrize("name", ["", "zram0"])
@pytest.mark.parametrize("selected_for", ["", "zram0"])
def test_a_selection_counts_for_the_name_it_was_made_for(small, mode, name, selected_for):
    with begun(Peer(small.path), *ENTRY[mode]) as peer:
        peer.negotiate(SET, queries(selected_for, A))
        answer = status(peer, mode, name)
    assert set(answer) == {1} if name == selected_for else answer == proto.EINVAL


@pytest.mark.parametrize(("name", "counts"), [("", True), ("zram0", False)])
def test_a_selection_counts_for_export_name_as_well(small, name, counts):
    with begun(Peer(small.path), STRUCTURED_REPLY) as peer:
        peer.negotiate(SET, queries("", A))
        peer.send(option(EXPORT_NAME, name.encode()))
        peer.receive(10)
        peer.mode = STRUCTURED
        answer = peer.do(Request(proto.BLOCK_STATUS, 0, 4096))
    assert answer != proto.EINVAL if counts else answer == proto.EINVAL


def test_a_selection_stays_when_extended_headers_follow(small):
    with begun(Peer(small.path), STRUCTURED_REPLY) as peer:
        peer.negotiate(SET, queries("", A))
        assert peer.negotiate(EXTENDED_HEADERS) == NOTHING
        assert set(status(peer, EXTENDED, "")) == {1}


@pytest.mark.parametrize("refused", [STRUCTURED_REPLY, EXTENDED_HEADERS])
@pytest.mark.parametrize("data", [b"x", bytes(KEPT + 1)], ids=len)
def test_what_was_refused_is_not_negotiated(small, refused, data):
    with begun(Peer(small.path)) as peer:
        assert peer.negotiate(refused, data) in (INVALID, TOO_BIG)
        assert peer.negotiate(SET, queries("", A)) == INVALID
        peer.send(option(GO, wants("")))
        assert told(peer, GO)[INFO_EXPORT] == u64(small.size) + u16(FLAGS)
        assert peer.do(Request(proto.READ, 0, 1))


@pytest.mark.parametrize("first", [STRUCTURED_REPLY, EXTENDED_HEADERS])
def test_what_is_asked_for_again_stays_negotiated(small, first):
    with begun(Peer(small.path), first) as peer:
        assert peer.negotiate(first) == INVALID
        peer.negotiate(STRUCTURED_REPLY)
        peer.send(option(GO, wants("")))
        told(peer, GO)
        peer.mode = STRUCTURED if first == STRUCTURED_REPLY else EXTENDED
        assert peer.do(Request(proto.READ, 0, 1))


def test_a_selection_made_too_early_does_not_count(small):
    with begun(Peer(small.path)) as peer:
        assert peer.negotiate(SET, queries("", A)) == INVALID
        assert peer.negotiate(STRUCTURED_REPLY) == NOTHING
        assert status(peer, STRUCTURED, "") == proto.EINVAL

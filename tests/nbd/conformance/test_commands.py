"""Every command of the transmission phase in every form of reply: flags, ranges, limits, contents.

`expected` is the rule for the error a request deserves. The client of this suite checks that each
reply has the form that was negotiated, and comes once.
"""

import itertools
import random

import pytest

from tests.nbd.conformance.proto import (
    ACK,
    BLOCK_STATUS,
    CACHE,
    DF,
    DISC,
    EINVAL,
    ENOSPC,
    ENTRY,
    EPERM,
    EXTENDED,
    FAST_ZERO,
    FLUSH,
    FUA,
    GO,
    MODES,
    NO_HOLE,
    PAYLOAD_LEN,
    READ,
    REQ_ONE,
    RESIZE,
    SIMPLE,
    STRUCTURED,
    TRIM,
    WRITE,
    WRITE_ZEROES,
    Peer,
    Request,
    byte_by_byte,
    option,
    u32,
    wants,
    write,
)

MIB = 1 << 20
MAX_PAYLOAD = 32 * MIB
MOST_SKIPPED = 128 * MIB  # ours: what is more ends the connection
CONTEXTS = {SIMPLE: (), STRUCTURED: ("base:allocation",), EXTENDED: ("base:allocation",)}

KNOWN = (READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS)
UNKNOWN = (RESIZE, 9, 255, 256, 0xFFFF)


def expected(mode, size, request):
    """The error that `request` deserves on an export of `size` bytes, or 0."""
    command, offset, length = request.command, request.offset, request.length
    valid = FUA
    if command == WRITE_ZEROES:
        valid |= NO_HOLE | FAST_ZERO
    if command == READ and mode != SIMPLE:
        valid |= DF
    if command == BLOCK_STATUS:
        valid |= REQ_ONE
    if command == WRITE and mode == EXTENDED:
        valid |= PAYLOAD_LEN
        if not request.flags & PAYLOAD_LEN:
            return EINVAL
    if command not in KNOWN or request.flags & ~valid:
        return EINVAL
    if command == FLUSH:
        return EINVAL if offset or length else 0
    if command == BLOCK_STATUS and mode == SIMPLE:
        return EINVAL
    if length == 0:
        return EINVAL  # unspecified; as nbdkit
    if offset + length > size:
        return ENOSPC if command in (WRITE, WRITE_ZEROES) else EINVAL
    if command in (READ, WRITE) and length > MAX_PAYLOAD:
        return EINVAL
    return 0


def error_of(answer):
    """Of what `Peer.do` returned."""
    return answer if isinstance(answer, int) else 0


def enter(peer, mode):
    return peer.enter(mode, *CONTEXTS[mode])


def numbered(requests):
    """Each with a cookie of its own; the first and the last that there are among them."""
    cookies = itertools.chain((0, 2**64 - 1), itertools.count(0x8000_0000_0000_0001))
    for request, request.cookie in zip(requests, cookies, strict=False):
        yield request


def run(peer, manner, requests):
    """[(request, answer)]: one after the other, or, with trailing data, all in one piece."""
    requests = list(numbered(requests))
    if manner == "with trailing data":
        peer.ask(*requests)
        answers = dict(peer.answer() for _ in requests)
    else:
        answers = {request.cookie: peer.do(request) for request in requests}
    return [(request, answers[request.cookie]) for request in requests]


def misjudged(mode, size, answered):
    """The requests whose error is not the one expected, with both."""
    return [
        (request, "expected", error, "got", error_of(answer))
        for request, answer in answered
        if error_of(answer) != (error := expected(mode, size, request))
    ]


# Flags: every command with every bit


def with_flags(mode, command, flags):
    """A request of 16 bytes, or none for FLUSH, with what must come with it."""
    length = 0 if command == FLUSH else 16
    has_payload = command == WRITE or (mode == EXTENDED and flags & PAYLOAD_LEN)
    return Request(command, 0, length, flags, bytes(length) if has_payload else b"")


@pytest.mark.parametrize("command", [*KNOWN, *UNKNOWN])
@pytest.mark.parametrize("mode", MODES)
def test_a_flag_is_refused_unless_it_is_valid_for_the_command(small, meet, manner, mode, command):
    bits = [0, *(1 << bit for bit in range(16))]
    requests = [with_flags(mode, command, flags) for flags in [*bits, 0xFFFF]]
    requests += [with_flags(mode, command, flags | FUA) for flags in bits[2:]]
    requests += [with_flags(mode, command, flags | PAYLOAD_LEN) for flags in bits]
    answered = run(enter(meet(small), mode), manner, requests)
    assert misjudged(mode, small.size, answered) == []


@pytest.mark.parametrize("flags", [0, *(1 << bit for bit in range(16))])
@pytest.mark.parametrize("mode", MODES)
def test_disc_ends_without_a_reply_whatever_its_flags(small, meet, manner, mode, flags):
    peer = enter(meet(small), mode)
    read = Request(READ, 0, 1)
    peer.ask(read)
    assert peer.answer()[0] == read.cookie
    trailing = read.packed(mode) if manner == "with trailing data" else b""
    peer.send(Request(DISC, flags=flags).packed(mode) + trailing)
    assert peer.rest() == b""


# Ranges


def edges(mode, size):
    """(offset, length) at, around and far beyond the end."""
    offsets = [0, 1, size - 1, size, size + 1, 2**63, 2**64 - 256, 2**64 - 1]
    lengths = [0, 1, 256, 512, size - 1, size, size + 1, 2**32 - 4096, 2**32 - 1]
    if mode == EXTENDED:
        lengths += [2**32, 2**63, 2**64 - 256, 2**64 - 1]
    return itertools.product(offsets, lengths)


@pytest.mark.parametrize("command", KNOWN)
@pytest.mark.parametrize("mode", MODES)
def test_a_range_must_lie_within_the_export(small, meet, manner, mode, command):
    size = small.size
    peer = enter(meet(small), mode)
    contents = random.Random(1).randbytes(size)
    assert peer.do(write(mode, 0, contents)) == 0
    requests = [Request(command, offset, length) for offset, length in edges(mode, size)]
    if command == WRITE:
        long = manner == "whole"  # the payloads of the others are short
        lengths = [0, 1, 256, 512, *((size - 1, size, size + 1) if long else ())]
        offsets = sorted({offset for offset, _ in edges(mode, size)})
        requests = [
            write(mode, offset, contents[:length].ljust(length))
            for offset, length in itertools.product(offsets, lengths)
        ]
    wrong = [request for request in requests if expected(mode, size, request)]
    assert misjudged(mode, size, run(peer, manner, wrong)) == []
    assert peer.do(Request(READ, 0, size)) == [(0, contents)], "a request that failed had effects"
    right = [request for request in requests if not expected(mode, size, request)]
    assert misjudged(mode, size, run(peer, manner, right)) == []


@pytest.mark.parametrize("mode", MODES)
def test_flush_has_neither_offset_nor_length(small, meet, manner, mode):
    edges = itertools.product([0, 1, 5, 512, 2**64 - 1], [0, 1, 5, 512, 2**32 - 1])
    requests = [Request(FLUSH, offset, length) for offset, length in edges]
    answered = run(enter(meet(small), mode), manner, requests)
    assert misjudged(mode, small.size, answered) == []


@pytest.mark.parametrize("mode", MODES)
def test_the_longest_payload_is_taken_and_given(vast, mode):
    contents = random.Random(mode).randbytes(MIB) * (MAX_PAYLOAD // MIB)
    with enter(Peer(vast.path), mode) as peer:
        assert peer.do(write(mode, 4097, contents)) == 0
        assert peer.do(Request(READ, 4097, MAX_PAYLOAD)) == [(4097, contents)]
        for length in (MAX_PAYLOAD + 1, 2**32 - 1):
            assert peer.do(Request(READ, 0, length)) == EINVAL
        assert peer.do(Request(TRIM, 0, vast.size if mode == EXTENDED else 2**32 - 1)) == 0


@pytest.mark.parametrize("mode", [SIMPLE, STRUCTURED])
def test_too_long_a_payload_is_consumed_and_refused(vast, small, mode):
    payload = bytes(MAX_PAYLOAD + 1)
    with enter(Peer(vast.path), mode) as peer:
        assert peer.do(write(mode, 0, payload)) == EINVAL
        assert peer.do(write(mode, vast.size - 1, payload)) == ENOSPC
        assert peer.do(write(mode, 0, bytes(MOST_SKIPPED))) == EINVAL
    with enter(Peer(small.path), mode) as peer:
        assert peer.do(write(mode, 0, payload)) == ENOSPC
        assert peer.do(write(mode, 2**64 - 256, payload)) == ENOSPC


@pytest.mark.parametrize("mode", MODES)
def test_a_payload_that_no_client_sends_ends_the_connection(small, meet, manner, mode):
    peer = enter(meet(small), mode)
    # An extended one SHOULD do so beyond the limit that was told.
    length, flags = (MAX_PAYLOAD, PAYLOAD_LEN) if mode == EXTENDED else (MOST_SKIPPED, 0)
    request = Request(WRITE, 0, length + 1, flags)
    trailing = Request(READ, 0, 1).packed(mode) if manner == "with trailing data" else b""
    peer.send(request.packed(mode) + trailing)
    assert peer.rest() == b""


LONG = {
    SIMPLE: (2**32 - 1, 0xFFFFF000),  # the kernel sends TRIMs of 0xFFFFF000 bytes
    STRUCTURED: (2**32 - 1, 0xFFFFF000),
    EXTENDED: (2**32 - 1, 2**32, 2**40, 4 * 2**40),
}


@pytest.mark.parametrize("command", [TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS])
@pytest.mark.parametrize("mode", MODES)
def test_commands_without_payload_may_exceed_its_limit(vast, meet, manner, mode, command):
    peer = enter(meet(vast), mode)
    flags = [0, FUA, *([FAST_ZERO, NO_HOLE] if command == WRITE_ZEROES else [])]
    requests = [Request(command, 0, length, each) for each in flags for length in LONG[mode]]
    assert misjudged(mode, vast.size, run(peer, manner, requests)) == []


# Contents


@pytest.mark.parametrize("mode", MODES)
def test_each_command_does_what_it_says(small, meet, manner, mode):
    peer = enter(meet(small), mode)
    dice = random.Random(mode + manner)
    model = bytearray(dice.randbytes(small.size))
    assert peer.do(write(mode, 0, bytes(model))) == 0
    for _ in range(200):
        offset = dice.randrange(small.size)
        length = dice.choice((1, 100, 4096, 8192, 3 * 4096 + 5, 200_000))
        if dice.randrange(2):
            offset &= ~4095
        length = min(length, small.size - offset)
        command = dice.choice((READ, READ, WRITE, WRITE_ZEROES, TRIM, CACHE, FLUSH))
        if command == READ:
            found = b"".join(
                bytes(content) if isinstance(content, int) else content
                for _, content in peer.do(Request(READ, offset, length, dice.choice((0, FUA))))
            )
            assert found == model[offset : offset + length]
        elif command == WRITE:
            data = dice.choice((dice.randbytes(length), bytes(length), b"\x55" * length))
            assert peer.do(write(mode, offset, data, dice.choice((0, FUA)))) == 0
            model[offset : offset + length] = data
        elif command == WRITE_ZEROES:
            # FAST_ZERO may be ENOTSUP; ours is not: zeroing is quicker than writing.
            flags = dice.choice((0, FUA, NO_HOLE, FAST_ZERO, NO_HOLE | FAST_ZERO | FUA))
            assert peer.do(Request(WRITE_ZEROES, offset, length, flags)) == 0
            model[offset : offset + length] = bytes(length)
        elif command == FLUSH:
            assert peer.do(Request(FLUSH)) == 0
        else:
            assert peer.do(Request(command, offset, length)) == 0
            if command == TRIM:  # what is there now is the server's choice: it is either
                ((_, found),) = peer.do(Request(READ, offset, length, DF if mode != SIMPLE else 0))
                found = bytes(found) if isinstance(found, int) else found
                assert all(new in (0, old) for new, old in zip(found, model[offset:], strict=False))
                model[offset : offset + length] = found


@pytest.mark.parametrize("mode", [STRUCTURED, EXTENDED])
def test_a_read_of_nothing_but_zeros_is_a_hole_and_any_other_one_piece_of_data(
    small, meet, manner, mode
):
    peer = enter(meet(small), mode)
    data = b"data" * 1024
    assert peer.do(Request(TRIM, 0, small.size)) == 0
    assert peer.do(write(mode, 4096, data)) == 0
    assert peer.do(write(mode, 4 * 4096, bytes(4096))) == 0
    asked = {
        (0, 4096): 4096,
        (1, 1): 1,
        (100, 3996): 3996,
        (4096, 4096): data,
        (4097, 2): data[1:3],
        (4095, 2): b"\0d",
        (0, 3 * 4096): bytes(4096) + data + bytes(4096),
        (2 * 4096, 6 * 4096): 6 * 4096,
        (2 * 4096 - 1, 4097): b"a" + bytes(4096),
        (MIB // 2, MIB // 2): MIB // 2,
        (0, MIB): bytes(4096) + data + bytes(MIB - 8192),
    }
    for flags in (0, DF, DF | FUA):
        requests = [Request(READ, offset, length, flags) for offset, length in asked]
        for request, answer in run(peer, manner, requests):
            assert answer == [(request.offset, asked[request.offset, request.length])]


@pytest.mark.parametrize("mode", MODES)
def test_trim_and_zeroes_over_terabytes_free_what_was_stored(vast, mode):
    everywhere = [0, vast.size // 2, vast.size - 4096]
    length = vast.size if mode == EXTENDED else 2**32 - 4096
    for command in (TRIM, WRITE_ZEROES):
        with enter(Peer(vast.path), mode) as peer:
            for offset in everywhere:
                assert peer.do(write(mode, offset, b"stored" * 100)) == 0
            assert vast.zram.statistics().orig_data_size == 3 * 4096
            for offset in [0] if mode == EXTENDED else everywhere:
                within = min(length, vast.size - offset)
                assert peer.do(Request(command, offset, within)) == 0
            assert vast.zram.statistics().orig_data_size == 0


# Read-only


@pytest.mark.parametrize("mode", MODES)
def test_a_read_only_export_refuses_what_would_change_it(read_only, meet, manner, mode):
    peer = enter(meet(read_only), mode)
    refused = [
        *(write(mode, 0, bytes(length)) for length in (1, 512, 128 * 1024 + 1)),
        write(mode, 0, b"fua", FUA),
        *(Request(TRIM, 0, length) for length in (1, 512, MIB)),
        *(Request(WRITE_ZEROES, 0, 512, flags) for flags in (0, FUA, NO_HOLE, FAST_ZERO)),
    ]
    served = [Request(READ, 0, 512), Request(CACHE, 0, 512), Request(FLUSH)]
    answered = run(peer, manner, [*refused, *served])
    assert [error_of(answer) for _, answer in answered] == [EPERM] * len(refused) + [0, 0, 0]
    assert read_only.zram.statistics().orig_data_size == 0


# Payloads of extended requests


@pytest.mark.parametrize("command", [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 8, 99])
@pytest.mark.parametrize("length", [0, 1, 27, 4096, 128 * 1024 + 1, MIB])
def test_a_payload_that_was_not_expected_is_consumed_and_refused(
    small, meet, manner, command, length
):
    request = Request(command, 0, length, PAYLOAD_LEN, random.Random(1).randbytes(length))
    answered = run(enter(meet(small), EXTENDED), manner, [request, Request(READ, 0, 1)])
    assert [error_of(answer) for _, answer in answered] == [EINVAL, 0]


@pytest.mark.parametrize("length", [1, 512, 40_000, 128 * 1024, 200_000])
def test_a_write_without_its_flag_has_its_payload_consumed_and_is_refused(
    small, meet, manner, length
):
    """By the letter such a request has no payload; but every client that sends it sends one, too,
    and qemu even writes it."""
    request = Request(WRITE, 0, length, 0, random.Random(1).randbytes(length))
    answered = run(enter(meet(small), EXTENDED), manner, [request, Request(READ, 0, 1)])
    assert [error_of(answer) for _, answer in answered] == [EINVAL, 0]


@pytest.mark.parametrize(
    "command", [READ, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, 99]
)
@pytest.mark.parametrize("length", [MAX_PAYLOAD + 1, 2**32, 2**63, 2**64 - 1])
def test_an_oversize_payload_ends_the_connection(small, command, length):
    with enter(Peer(small.path), EXTENDED) as peer:
        peer.send(Request(command, 0, length, PAYLOAD_LEN).packed(EXTENDED))
        assert peer.rest() == b""


# Framing


MAGICS = {
    "a request": 0x25609513,
    "an extended request": 0x21E41C71,
    "a simple reply": 0x67446698,
    "a request of Linux 2.1.115": 0x12560953,
    "a reply of it": 0x96744668,
    "nbd-server's log": 0x25609514,
    "an option": 0x49484156,
    "HTTP": 0x47455420,
    "another byte order": 0x13956025,
    "nothing": 0,
}


@pytest.mark.parametrize("magic", MAGICS)
@pytest.mark.parametrize("mode", MODES)
def test_another_magic_number_ends_the_connection(small, meet, manner, mode, magic):
    request = Request(READ, 0, 1).packed(mode)
    if magic == ("an extended request" if mode == EXTENDED else "a request"):
        return
    peer = enter(meet(small), mode)
    flush = Request(FLUSH)
    trailing = request * 3 if manner == "with trailing data" else b""
    peer.ask(flush, then=u32(MAGICS[magic]) + request[4:] + trailing)
    assert peer.answer() == (flush.cookie, 0)
    assert peer.rest() == b""


@pytest.mark.parametrize("command", [*KNOWN, DISC, 8])
@pytest.mark.parametrize("mode", MODES)
def test_half_a_request_is_not_answered_nor_done(small, mode, command):
    with enter(Peer(small.path), mode) as peer:
        assert peer.do(write(mode, 0, b"untouched")) == 0
        request = Request(command, 0, 512)
        if command == WRITE:
            request = write(mode, 0, bytes(512))
        message = request.packed(mode)
        peer.send(message[: len(message) // 2])
        peer.finish()
        assert peer.rest() == b""
    with enter(Peer(small.path), mode) as peer:
        assert peer.do(Request(READ, 0, 9)) == [(0, b"untouched")]


@pytest.mark.parametrize("mode", MODES)
def test_a_long_write_that_breaks_off_is_not_done(small, mode):
    for sent in (0, 1, 100_000, 299_999):
        with enter(Peer(small.path), mode) as peer:
            assert peer.do(write(mode, 0, b"untouched")) == 0
            message = write(mode, 0, bytes(300_000)).packed(mode)
            peer.send(message[: len(message) - 300_000 + sent])
            peer.finish()
            assert peer.rest() == b""
        with enter(Peer(small.path), mode) as peer:
            assert peer.do(Request(READ, 0, 9)) == [(0, b"untouched")]


@pytest.mark.parametrize("mode", MODES)
def test_many_requests_in_one_piece_are_answered_once_each(small, mode):
    dice = random.Random(mode)
    requests = []
    for _ in range(300):
        command = dice.choice((*KNOWN, RESIZE))
        length = 0 if command == FLUSH else dice.choice((1, 512, 4096, 150_000))
        offset = 0 if command == FLUSH else dice.choice((0, 4096, small.size - 4096, small.size))
        if command == WRITE:
            requests.append(write(mode, offset, dice.randbytes(length)))
        else:
            requests.append(Request(command, offset, length))
    with enter(Peer(small.path), mode) as peer:
        requests = list(numbered(requests))
        answers = peer.answers_of(requests)
        assert peer.do(Request(FLUSH)) == 0
    answered = [(request, answers[request.cookie]) for request in requests]
    assert misjudged(mode, small.size, answered) == []


@pytest.mark.parametrize("mode", MODES)
def test_two_clients_whose_bytes_come_in_turns_are_not_mixed_up(small, mode):
    """From their handshakes on."""
    writes = [write(mode, 0, b"one" * 20), write(mode, 4096, b"two" * 20)]
    before = u32(3) + b"".join(map(option, ENTRY[mode])) + option(GO, wants(""))
    with Peer(small.path, byte_by_byte) as one, Peer(small.path, byte_by_byte) as two:
        for both in zip(*(before + request.packed(mode) for request in writes), strict=True):
            for peer, byte in zip((one, two), both, strict=True):
                peer.send(bytes([byte]))
        for peer, request in zip((one, two), writes, strict=True):
            for number in (*ENTRY[mode], GO):
                assert peer.option_replies(number)[-1] == (ACK, b"")
            peer.mode = mode
            peer.expect(request)
            assert peer.answer() == (request.cookie, 0)
            assert peer.do(Request(READ, request.offset, 60)) == [(request.offset, request.payload)]

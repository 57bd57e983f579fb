"""Errors and ends while requests are in flight; what a server that goes, or wants TLS, says."""

import errno
import random
import ssl
import threading
from dataclasses import dataclass, field

import pytest

from tests.nbd.conformance.proto import (
    ABORT,
    ACK,
    BLOCK_STATUS,
    CACHE,
    DISC,
    EINVAL,
    EIO,
    ENOSPC,
    ENOTSUP,
    EOVERFLOW,
    EPERM,
    ERR_INVALID,
    ERR_SHUTDOWN,
    ERR_TLS_REQD,
    ERR_UNSUP,
    ESHUTDOWN,
    EXPORT_NAME,
    FLUSH,
    GO,
    INFO,
    LIST,
    LIST_META_CONTEXT,
    MODES,
    READ,
    SET_META_CONTEXT,
    SIMPLE,
    STARTTLS,
    STRUCTURED_REPLY,
    TRIM,
    WRITE_ZEROES,
    Peer,
    Request,
    option,
    queries,
    u32,
    wants,
    write,
)
from tests.nbd.harness import wait_for
from zramd import attributes
from zramd.errors import ZramdError
from zramd.opener import Opener

MIB = 1 << 20
LONG = 200_000  # bytes; ours: what is so long is served in a thread, and may be overtaken


@pytest.fixture
def held(monkeypatch):
    """Long reads wait for this event; `.inside` tells of one."""
    gate = threading.Event()
    gate.inside = False
    parts = Opener.parts

    def waits(self, offset, length):
        if length >= LONG:
            gate.inside = True
            gate.wait()
        return parts(self, offset, length)

    monkeypatch.setattr(Opener, "parts", waits)
    yield gate
    gate.set()


@pytest.mark.parametrize("end", ["DISC", "end of file", "DISC and end of file"])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_in_flight_is_answered_before_the_end(small, held, mode, end):
    with Peer(small.path).enter(mode) as peer:
        requests = [Request(READ, 0, LONG, cookie=n) for n in range(2)]
        requests += [Request(FLUSH, cookie=2), write(mode, 0, b"x"), Request(READ, 0, 1, cookie=4)]
        disc = Request(DISC).packed(mode) if "DISC" in end else b""
        peer.ask(*requests, then=disc)
        if "end of file" in end:
            peer.finish()
        short = {request.cookie for request in requests[2:]}
        assert {peer.answer()[0] for _ in short} == short
        held.set()
        assert {peer.answer()[0] for _ in range(2)} == {0, 1}
        assert peer.rest() == b""
    wait_for(lambda: small.zram.statistics().openers == ())


@pytest.mark.parametrize("mode", MODES)
def test_a_request_may_be_overtaken_and_a_cookie_used_again(small, held, mode):
    with Peer(small.path).enter(mode) as peer:
        peer.ask(Request(READ, 0, LONG, cookie=1), Request(READ, 0, 8, cookie=2))
        assert peer.answer()[0] == 2
        peer.ask(Request(FLUSH, cookie=2))  # a cookie that is no longer in flight
        assert peer.answer() == (2, 0)
        held.set()
        assert peer.answer()[0] == 1


@pytest.mark.parametrize("mode", MODES)
def test_a_violation_ends_after_what_is_in_flight(small, held, mode):
    with Peer(small.path).enter(mode) as peer:
        peer.ask(Request(READ, 0, LONG), then=b"GET / HTTP/1.1\r\nHost: zram0:10809\r\n\r\n")
        wait_for(lambda: held.inside)
        held.set()
        peer.answer()
        assert peer.rest() == b""


@pytest.mark.parametrize("mode", MODES)
def test_a_full_store_fails_the_writes_it_has_no_room_for_and_nothing_else(serve, mode):
    export = serve(64 * MIB)
    attributes.set(export.zram, "mem_limit", "1M")
    noise = random.Random(1).randbytes(MIB)
    with Peer(export.path).enter(mode) as peer:
        requests = []
        for n in range(8):
            requests += [write(mode, n * MIB, noise), write(mode, n * MIB, bytes(MIB))]
            requests += [Request(READ, 63 * MIB, 512), Request(WRITE_ZEROES, n * MIB, 1)]
        for n, request in enumerate(requests):
            request.cookie = n
        answers = peer.answers_of(requests)
        errors = {request.cookie: answers[request.cookie] for request in requests[::4]}
        assert set(errors.values()) <= {0, ENOSPC}
        assert peer.do(write(mode, 20 * MIB, noise)) == ENOSPC
        assert peer.do(write(mode, 20 * MIB, bytes(MIB))) == 0
        assert peer.do(Request(FLUSH)) == 0


@pytest.mark.parametrize("mode", MODES)
def test_a_device_that_is_reset_answers_eio_and_ends(serve, held, mode):
    export = serve(MIB)
    with Peer(export.path).enter(mode) as peer:
        peer.ask(Request(READ, 0, LONG, cookie=1))
        wait_for(lambda: held.inside)
        export.zram.reset(force=True)
        waiting = [Request(READ, 0, 1), Request(FLUSH), Request(TRIM, 0, 1), Request(CACHE, 0, 1)]
        for n, request in enumerate([*waiting, write(mode, 0, b"x")], 2):
            request.cookie = n
            peer.ask(request)
        held.set()
        assert dict(peer.answer() for _ in range(6)) == dict.fromkeys(range(1, 7), EIO)
        assert peer.rest() == b""


@pytest.mark.parametrize("mode", MODES)
def test_a_fault_of_the_servers_is_eio_and_costs_no_connection(small, monkeypatch, mode):
    with Peer(small.path).enter(mode) as peer:
        with monkeypatch.context() as broken:
            broken.setattr(Opener, "parts", lambda *_: 1 / 0)
            assert peer.do(Request(READ, 0, 1)) == EIO
            assert peer.do(Request(READ, 0, LONG)) == EIO
        assert peer.do(Request(READ, 0, 1)) != EIO


ERRORS = {
    errno.EPERM: EPERM,
    errno.EROFS: EPERM,
    errno.EIO: EIO,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.EOVERFLOW: EOVERFLOW,
    errno.EOPNOTSUPP: ENOTSUP,
    errno.ESHUTDOWN: ESHUTDOWN,
    errno.ENOMEM: EIO,  # a server SHOULD NOT say ENOMEM
    errno.ENODEV: EIO,
    errno.EBUSY: EIO,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("number", ERRORS, ids=errno.errorcode.get)
def test_an_error_of_the_device_becomes_one_of_the_specification(small, monkeypatch, mode, number):
    class Failure(ZramdError):
        errno = number

    def fail(*_args, **_options):
        raise Failure("so it is")

    monkeypatch.setattr(Opener, "write", fail)
    with Peer(small.path).enter(mode) as peer:
        for length in (1, LONG):
            assert peer.do(write(mode, 0, bytes(length))) == ERRORS[number]


# A server that goes


@pytest.mark.parametrize("mode", MODES)
def test_a_server_that_goes_finishes_what_it_began_and_refuses_the_rest(serve, held, mode):
    export = serve(MIB)
    with Peer(export.path).enter(mode) as peer, Peer(export.path) as haggling:
        haggling.send(u32(3))
        peer.ask(Request(READ, 0, LONG, cookie=1))
        wait_for(lambda: held.inside)
        closing = export.running.begin(export.running.server.close())
        wait_for(lambda: export.running.server.closing)
        rest = [
            write(mode, 0, b"x" * 100),
            write(mode, 0, b"x" * LONG),
            Request(READ, 0, 1),
            Request(FLUSH),
            Request(TRIM, 0, 1),
            Request(WRITE_ZEROES, 0, 1),
            Request(CACHE, 0, 1),
            Request(BLOCK_STATUS, 0, 1),
        ]
        for n, request in enumerate(rest, 2):
            request.cookie = n
        peer.ask(*rest)
        for number, data, expected in (
            (LIST, b"", ERR_SHUTDOWN),
            (INFO, wants(""), ERR_SHUTDOWN),
            (GO, wants(""), ERR_SHUTDOWN),
            (STRUCTURED_REPLY, b"", ERR_SHUTDOWN),
            (SET_META_CONTEXT, queries(""), ERR_SHUTDOWN),
            (STARTTLS, b"", ERR_SHUTDOWN),
            (99, b"x", ERR_SHUTDOWN),
            (ABORT, b"", ACK),
        ):
            assert haggling.negotiate(number, data) == [(expected, b"")]
        assert haggling.rest() == b""
        held.set()
        answers = dict(peer.answer() for _ in range(9))
        assert isinstance(answers.pop(1), list)
        assert set(answers.values()) == {ESHUTDOWN}
        assert peer.rest() == b""
        closing.result(30)


def test_a_server_that_goes_cannot_answer_export_name(serve, held):
    export = serve(MIB)
    with Peer(export.path).enter(SIMPLE) as peer, Peer(export.path) as haggling:
        haggling.send(u32(3))
        peer.ask(Request(READ, 0, LONG))
        wait_for(lambda: held.inside)
        closing = export.running.begin(export.running.server.close())
        wait_for(lambda: export.running.server.closing)
        haggling.send(option(EXPORT_NAME))
        assert haggling.rest() == b""
        held.set()
        peer.answer()
        closing.result(30)


# A server that wants TLS. The handshake of TLS itself is not of this suite.

REFUSED = {
    LIST: b"",
    INFO: wants(""),
    GO: wants(""),
    STRUCTURED_REPLY: b"",
    LIST_META_CONTEXT: queries(""),
    SET_META_CONTEXT: queries(""),
    11: b"",
    4: b"",
    99: bytes(65537),
}


TLS_ALERT = b"\x15"


@dataclass
class Tls:
    """As zramd.nbd.tls has it, with no certificate to show."""

    required: bool
    context: ssl.SSLContext = field(default_factory=lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))


@pytest.fixture(scope="module")
def guarded(serve):
    return serve(MIB, tls=Tls(required=True))


@pytest.fixture(scope="module")
def optional(serve):
    return serve(MIB, tls=Tls(required=False))


@pytest.mark.parametrize("number", REFUSED)
def test_where_tls_is_required_every_option_before_it_is_told_so(guarded, meet, manner, number):
    peer = meet(guarded)
    trailing = option(99) if manner == "with trailing data" else b""
    peer.send(u32(3))
    peer.send(option(number, REFUSED[number]) + trailing)
    assert peer.option_replies(number) == [(ERR_TLS_REQD, b"")]
    if not trailing:
        peer.send(option(99))
    assert peer.option_replies(99) == [(ERR_TLS_REQD, b"")]


def test_where_tls_is_required_abort_is_acknowledged(guarded, meet):
    peer = meet(guarded)
    peer.send(u32(3))
    assert peer.negotiate(ABORT) == [(ACK, b"")]
    assert peer.rest() == b""


@pytest.mark.parametrize("flags", [0, 3])
def test_where_tls_is_required_export_name_ends_the_connection(guarded, meet, manner, flags):
    peer = meet(guarded)
    peer.send(u32(flags) + option(EXPORT_NAME, b"zram0"))
    assert peer.rest() == b""


def test_where_tls_is_required_starttls_with_data_is_invalid(guarded, optional, meet, manner):
    for export in (guarded, optional):
        peer = meet(export)
        peer.send(u32(3))
        assert peer.negotiate(STARTTLS, b"x") == [(ERR_INVALID, b"")]
        assert peer.negotiate(STARTTLS) == [(ACK, b"")]


def test_where_tls_is_offered_everything_is_served_without(optional, meet, manner):
    for mode in MODES:
        peer = meet(optional).enter(mode)
        assert peer.do(Request(FLUSH)) == 0
    peer = meet(optional)
    peer.send(u32(3))
    assert peer.negotiate(99) == [(ERR_UNSUP, b"")]


@pytest.mark.parametrize("number", [LIST, STRUCTURED_REPLY, STARTTLS, ABORT, EXPORT_NAME])
def test_what_is_sent_in_clear_behind_starttls_is_not_answered_and_ends_the_connection(
    guarded, optional, meet, manner, number
):
    for export in (guarded, optional):
        peer = meet(export)
        peer.send(u32(3) + option(STARTTLS) + option(number))
        assert peer.option_replies(STARTTLS) == [(ACK, b"")]
        assert peer.rest()[:1] in (b"", TLS_ALERT)

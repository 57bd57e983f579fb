"""Requests out of bytes, whatever pieces they come in and whoever uses the buffer in between, and
what may go wrong with them; what reply each deserves, tests/nbd/conformance asks."""

import errno
import logging
import struct

import pytest

from zramd.errors import Corrupt, NotInitialised, OutOfRange, StoreFull, ZramdError
from zramd.nbd import transmission, wire
from zramd.nbd.replies import EXTENDED, SIMPLE, STRUCTURED
from zramd.nbd.transmission import BUFFER, INLINE, MAX_SKIPPED, OWN, answer

SIZE = 1 << 20
READ, WRITE, DISC, FLUSH = 0, 1, 2, 3
TRIM, CACHE, WRITE_ZEROES = 4, 5, 6
FUA, NO_HOLE, DF, PAYLOAD_LEN = 1, 2, 4, 32
EINVAL, ENOSPC, EIO = 22, 28, 5


class Memory:
    """An Opener over a bytearray; `trouble` is raised instead, once set."""

    def __init__(self):
        self.data = bytearray(b"\xaa") * SIZE
        self.trouble = None

    def _check(self, offset, length):
        if self.trouble:
            raise self.trouble
        if offset + length > len(self.data):
            raise OutOfRange("beyond the end")

    def parts(self, offset, length):
        self._check(offset, length)
        data = bytes(self.data[offset : offset + length])
        return [data[at : at + 100] for at in range(0, length, 100)]

    def write(self, offset, data, *, nowait):
        self._check(offset, len(data))
        self.data[offset : offset + len(data)] = data

    def discard(self, offset, length):
        self._check(offset, length)

    def zero(self, offset, length, *, nowait):
        self._check(offset, length)
        self.data[offset : offset + length] = bytes(length)

    def flush(self):
        self._check(0, 0)

    def cache(self, offset, length):
        self._check(offset, length)


class Receiver(transmission.Receiver):
    """One whose buffer others use as soon as they may."""

    def __init__(self, size=SIZE, form=SIMPLE, **options):
        self.shared = memoryview(bytearray(BUFFER))
        super().__init__(size, self.shared, form, **options)

    def keep(self):
        super().keep()
        self.shared[:] = b"\xee" * BUFFER


def cookie(number):
    return struct.pack(">Q", number)


def request(command, offset=0, length=0, flags=0, number=1, payload=b""):
    return wire.pack_request(command, cookie(number), offset, length, flags) + payload


def write(offset, payload, flags=0, number=1):
    return request(WRITE, offset, len(payload), flags, number, payload)


def plain(request):
    """Without flags, and with what can be compared: (error, command, cookie, offset, length,
    payload)."""
    refusal, *head, _flags, payload = request
    return (refusal[0] if refusal else 0, *head, None if payload is None else bytes(payload))


def pour(receiver, data, step=None):
    """Brings `data` in, `step` bytes at most at a time; the requests, their payloads as bytes."""
    view, found = memoryview(data), []
    while len(view):
        room = receiver.get_buffer()
        assert len(room) > 0
        count = min(len(room), len(view), step or len(view))
        room[:count] = view[:count]
        view = view[count:]
        receiver.received(count)
        found += map(plain, receiver.requests())
        receiver.keep()
        if receiver.ended:
            break
    return found


def served(data, opener=None, form=SIMPLE):
    """The replies' bytes to all requests in `data`."""
    receiver, opener = Receiver(SIZE, form), opener or Memory()
    sent = b""
    view = memoryview(data)
    while len(view):
        room = receiver.get_buffer()
        count = min(len(room), len(view))
        room[:count] = view[:count]
        view = view[count:]
        receiver.received(count)
        for each in receiver.requests():
            sent += b"".join(answer(opener, each, form))
        receiver.keep()
    return sent


def error_of(data, opener=None):
    """The error of the one reply to `data`, which must be followed by nothing but its data."""
    sent = served(data, opener)
    magic, error, of = wire.SIMPLE_REPLY.unpack_from(sent)
    assert (magic, of) == (0x67446698, cookie(1))
    assert len(sent) == 16 or not error
    return error


MESSAGES = {
    "read": (request(READ, 4096, 4096), (0, READ, cookie(1), 4096, 4096, None)),
    "read with FUA": (request(READ, 0, 1, FUA), (0, READ, cookie(1), 0, 1, None)),
    "write": (write(8, b"payload"), (0, WRITE, cookie(1), 8, 7, b"payload")),
    "write with FUA": (write(0, b"x", FUA), (0, WRITE, cookie(1), 0, 1, b"x")),
    "write refused": (write(0, b"xyz", DF), (EINVAL, WRITE, cookie(1), 0, 3, b"xyz")),
    "longest inline write": (
        write(0, b"i" * INLINE),
        (0, WRITE, cookie(1), 0, INLINE, b"i" * INLINE),
    ),
    "shortest long write": (
        write(0, b"l" * (INLINE + 1)),
        (0, WRITE, cookie(1), 0, INLINE + 1, b"l" * (INLINE + 1)),
    ),
    "long write refused": (
        write(0, b"l" * (INLINE + 1), DF),
        (EINVAL, WRITE, cookie(1), 0, INLINE + 1, None),
    ),
    "longest write that waits in the buffer": (
        write(0, b"w" * (OWN - 1)),
        (0, WRITE, cookie(1), 0, OWN - 1, b"w" * (OWN - 1)),
    ),
    "flush": (request(FLUSH), (0, FLUSH, cookie(1), 0, 0, None)),
    "trim": (
        request(TRIM, 0, 0xFFFFF000),
        (0, TRIM, cookie(1), 0, 0xFFFFF000, None),
    ),
    "zeroes": (
        request(WRITE_ZEROES, 0, 512, NO_HOLE),
        (0, WRITE_ZEROES, cookie(1), 0, 512, None),
    ),
    "unknown": (request(99, 1, 2), (EINVAL, 99, cookie(1), 1, 2, None)),
}


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_comes_out_whole(message):
    data, expected = MESSAGES[message]
    assert pour(Receiver(SIZE), data) == [expected]


@pytest.mark.parametrize("message", MESSAGES)
def test_a_message_comes_out_once_its_last_byte_is_in(message):
    data, expected = MESSAGES[message]
    receiver = Receiver(SIZE)
    step = 1 if len(data) < 1000 else 4099
    assert pour(receiver, data[:-1], step) == []
    assert pour(receiver, data[-1:]) == [expected]


@pytest.mark.parametrize("message", MESSAGES)
@pytest.mark.parametrize("trailing", [1, 27])
def test_a_message_comes_out_though_another_has_begun(message, trailing):
    data, expected = MESSAGES[message]
    receiver = Receiver(SIZE)
    following = request(READ, 7, 9, number=2)
    assert pour(receiver, data + following[:trailing]) == [expected]
    assert pour(receiver, following[trailing:]) == [(0, READ, cookie(2), 7, 9, None)]


@pytest.mark.parametrize("step", [None, 1, 7, 28, 4096, 100_003])
def test_many_messages_come_out_in_order_whatever_the_pieces(step):
    stream, expected = b"", []
    for _ in range(1 if step == 1 else 5):
        for data, request_ in MESSAGES.values():
            if step != 1 or len(data) < 1000:
                stream += data
                expected.append(request_)
    assert pour(Receiver(SIZE), stream, step) == expected


@pytest.mark.parametrize("message", MESSAGES)
def test_what_came_with_the_handshake_counts(message):
    data, expected = MESSAGES[message]
    for split in (1, 20, 28, len(data)):
        receiver = Receiver(SIZE, head=data[:split])
        found = list(map(plain, receiver.requests()))
        assert found + pour(receiver, data[split:]) == [expected]


def test_requests_may_be_left_and_asked_again():
    receiver = Receiver(SIZE)
    data = b"".join(write(n, bytes([n]), number=n) for n in range(20))
    receiver.get_buffer()[: len(data)] = data
    receiver.received(len(data))
    found = []
    for _ in range(20):
        for each in receiver.requests():
            found.append((each[2], bytes(each[6])))
            break
        receiver.keep()
    assert found == [(cookie(n), bytes([n])) for n in range(20)]
    assert list(receiver.requests()) == []


def test_a_long_payload_stays_good_while_others_arrive():
    receiver = Receiver(SIZE)
    data = write(0, b"a" * (INLINE + 1)) + write(0, b"b" * (INLINE + 1))
    payloads = []
    view = memoryview(data)
    while len(view):
        room = receiver.get_buffer()
        count = min(len(room), len(view))
        room[:count] = view[:count]
        view = view[count:]
        receiver.received(count)
        payloads += [each[6] for each in receiver.requests()]
        receiver.keep()
    assert [bytes(payload[:1]) for payload in payloads] == [b"a", b"b"]


def test_disc_ends_without_a_reply_and_what_follows_is_not_looked_at():
    receiver = Receiver(SIZE)
    assert len(pour(receiver, request(FLUSH) + request(DISC, flags=0xFFFF) + b"junk" * 9)) == 1
    assert receiver.ended
    assert not receiver.violation
    assert list(receiver.requests()) == []


def test_a_bad_magic_number_ends_after_what_came_before_it():
    receiver = Receiver(SIZE)
    assert len(pour(receiver, request(FLUSH) + b"GET / HTTP/1.1\r\nHost: zram0\r\n\r\n")) == 1
    assert receiver.ended
    assert "0x47455420" in receiver.violation


def test_a_payload_that_no_client_sends_ends_the_connection():
    receiver = Receiver(SIZE)
    assert pour(receiver, request(WRITE, 0, MAX_SKIPPED + 1)) == []
    assert receiver.ended
    assert str(MAX_SKIPPED + 1) in receiver.violation


# Errors


class Oddity(ZramdError):
    errno = errno.ENODEV


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (StoreFull("full"), ENOSPC),
        (NotInitialised("reset"), EIO),
        (Corrupt("bad page"), EIO),
        (Oddity("odd"), EIO),
        (MemoryError(), EIO),
        (ZeroDivisionError(), EIO),
    ],
    ids=lambda value: getattr(value, "slug", repr(value)),
)
@pytest.mark.parametrize("command", [READ, WRITE, TRIM, CACHE, WRITE_ZEROES])
def test_what_goes_wrong_is_answered_with_an_error_of_the_specification(trouble, error, command):
    opener = Memory()
    opener.trouble = trouble
    payload = bytes(512) if command == WRITE else b""
    assert error_of(request(command, 0, 512, payload=payload), opener) == error


@pytest.mark.parametrize("message", [write(0, b"x"), request(WRITE_ZEROES, 0, 1)])
def test_what_may_take_long_is_handed_back_to_who_cannot_wait_and_to_nobody_else(message):
    opener = Memory()
    opener.trouble = BlockingIOError("a compaction")
    receiver = Receiver(SIZE, head=message)
    (asked,) = receiver.requests()
    with pytest.raises(BlockingIOError):
        answer(opener, asked, nowait=True)
    assert error_of(message, opener) == EIO  # a fault: nobody may say so here


def test_a_fault_of_ours_is_logged_once_per_kind(caplog, monkeypatch):
    monkeypatch.setattr(transmission, "_reported", set())
    opener = Memory()
    with caplog.at_level(logging.ERROR):
        for trouble in (ZeroDivisionError("one"), ZeroDivisionError("two"), KeyError("three")):
            opener.trouble = trouble
            assert error_of(request(READ, 0, 1), opener) == EIO
    assert [record.exc_info[0] for record in caplog.records] == [ZeroDivisionError, KeyError]


def test_an_error_of_the_device_is_no_fault_and_not_logged(caplog):
    opener = Memory()
    opener.trouble = StoreFull("full")
    error_of(write(0, b"x"), opener)
    assert not caplog.records


# Chunks


def chunk(kind, data, number=1, done=True):
    return struct.pack(">IHH8sI", 0x668E33EF, done, kind, cookie(number), len(data)) + data


def long_chunk(kind, data, offset=0, number=1, done=True):
    return struct.pack(">IHH8sQQ", 0x6E8A278C, done, kind, cookie(number), offset, len(data)) + data


def long_request(command, offset=0, length=0, flags=0, number=1, payload=b""):
    head = struct.pack(">IHH8sQQ", 0x21E41C71, flags, command, cookie(number), offset, length)
    return head + payload


def test_an_error_is_a_chunk_with_words_and_what_went_well_a_simple_reply():
    message = b"65 bytes"
    asked = request(READ, SIZE, 5) + request(FLUSH)
    opener = Memory()
    opener.trouble = OutOfRange("not there")
    words = struct.pack(">IH", EINVAL, 9) + b"not there"
    assert served(asked, opener, STRUCTURED) == chunk(0x8001, words) * 2
    opener.trouble = None
    assert served(write(0, message), opener, STRUCTURED) == wire.pack_simple_reply(cookie(1), 0)
    extended = long_request(WRITE, 0, 8, PAYLOAD_LEN, payload=message)
    assert served(extended, opener, EXTENDED) == long_chunk(0, b"")


def test_words_end_with_a_whole_character():
    opener = Memory()
    opener.trouble = StoreFull("\u00e4" * 4000)
    sent = served(write(0, b"x"), opener, STRUCTURED)
    assert sent == chunk(0x8001, struct.pack(">IH", ENOSPC, 4096) + "\u00e4".encode() * 2048)


@pytest.mark.parametrize("step", [None, 1, 31])
def test_a_payload_of_another_command_is_consumed_and_refused(step):
    stream = (
        long_request(TRIM, 0, 4096, PAYLOAD_LEN, payload=bytes(4096))
        + long_request(WRITE, 0, 4, payload=b"none")
        + long_request(READ, 0, INLINE + 1, PAYLOAD_LEN, payload=bytes(INLINE + 1))
        + long_request(TRIM, 0, 1 << 40)
    )
    found = pour(Receiver(SIZE, EXTENDED), stream, step and step * 997)
    assert [(each[0], each[1], each[4]) for each in found] == [
        (EINVAL, TRIM, 4096),
        (EINVAL, WRITE, 4),
        (EINVAL, READ, INLINE + 1),
        (0, TRIM, 1 << 40),
    ]

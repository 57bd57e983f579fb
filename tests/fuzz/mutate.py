"""Inputs for tests/fuzz/nbd.py: made of messages, and changed so that most of them stay messages.

A fuzzer that flips bytes seldom gets past a magic number; this one changes fields, lengths with
their payloads, the order of messages and the events of their delivery.
"""

import itertools
import random
import struct
from typing import Final

from tests.fuzz import peer

SIZE: Final = 1 << 20
NAMES: Final = (b"zram0", b"", b"zram", b"\xff", b"z" * 300)
QUERIES: Final = (b"base:allocation", b"zramd:state", b"base:", b"zramd:", b"zram:state", b"")
NUMBERS: Final = (
    *(0, 1, 3, 4, 8, 16, 100, 511, 512, 4095, 4096, 4097, 8191, 8192, 8193, 12288, 16384, 20480),
    *(32767, 32768, 65535, 65536, 65537, 131072, 163840, 163841, SIZE - 4096, SIZE - 1, SIZE),
    *(SIZE + 1, 1 << 25, 0x7FFFFFFF, 0x80000000, 0xFFFFF000, 0xFFFFFFFF),
)
LONG_NUMBERS: Final = (*NUMBERS, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 256, (1 << 64) - 1)
DICTIONARY: Final = (
    *(peer.MAGIC, peer.REPLY_MAGIC, b"\x80\0\0\1", b"\0\0\0\7\0\0\0\1\0\0\0\0"),
    *(peer.IHAVEOPT, peer.REQUEST_MAGIC, peer.LONG_REQUEST_MAGIC, b"zram0"),
    *(b"base:allocation", b"zramd:state", b"\0\0\0\3", b"\0\0\0\0\0\0\x10\0"),
)


def pack(events: bytes, stream: bytes, mode: int = 0) -> bytes:
    return bytes([mode | len(events) // 2]) + events + stream


def unpack(data: bytes) -> tuple[bytes, bytes, int]:
    first = data[0] if data else 0
    count = min(first % 64, (len(data) - 1) // 2)
    return data[1 : 1 + 2 * count], data[1 + 2 * count :], first & 192


def option(number: int, data: bytes = b"") -> bytes:
    return peer.IHAVEOPT + struct.pack(">II", number, len(data)) + data


def go(name: bytes = b"zram0", infos: tuple[int, ...] = ()) -> bytes:
    head = struct.pack(">I", len(name)) + name
    return head + struct.pack(f">H{len(infos)}H", len(infos), *infos)


def meta(name: bytes = b"zram0", queries: tuple[bytes, ...] = ()) -> bytes:
    head = struct.pack(">I", len(name)) + name + struct.pack(">I", len(queries))
    return head + b"".join(struct.pack(">I", len(query)) + query for query in queries)


def request(command: int, offset: int, length: int, flags: int = 0, *, extended: bool) -> bytes:
    if extended:
        magic, layout = 0x21E41C71, ">IHHQQQ"
    else:
        magic, layout, length = 0x25609513, ">IHHQQI", length & 0xFFFFFFFF
    return struct.pack(layout, magic, flags, command, 0x1122334455660000, offset, length)


def pieces(stream: bytes) -> list[bytes]:
    """The stream, cut where messages seem to begin."""
    cuts = {0, len(stream)}
    for magic in (peer.IHAVEOPT, peer.REQUEST_MAGIC, peer.LONG_REQUEST_MAGIC):
        at = stream.find(magic)
        while at >= 0:
            cuts.add(at)
            at = stream.find(magic, at + 4)
    places = sorted(cuts)
    return [stream[a:b] for a, b in itertools.pairwise(places)]


def bytes_changed(data: bytes, rng: random.Random) -> bytes:
    """The same, but for one to four changes of a few bytes, whatever they mean."""
    for _ in range(rng.randrange(1, 5)):
        at, end = sorted(rng.choices(range(len(data) + 1), k=2))
        end = min(end, at + rng.choice((0, 1, 1, 2, 4, 8, 20)))
        new = rng.choice((b"", rng.randbytes(1), rng.randbytes(4), rng.choice(DICTIONARY)))
        data = data[:at] + (data[at:end] if rng.random() < 0.2 else b"") + new + data[end:]
    return data


class Mutator:
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def conversation(self) -> bytes:
        """A new input, of a client that knows the protocol."""
        rng = self.rng
        parts = [rng.choice([b"\0\0\0\3"] * 6 + [b"\0\0\0\1", b"\0\0\0\2", b"\0\0\0\0"])]
        parts += [self.an_option() for _ in range(rng.choice((0, 0, 0, 1, 2)))]
        extended = rng.random() < 0.3
        if extended:
            parts.append(option(peer.EXTENDED_HEADERS))
        elif rng.random() < 0.6:
            parts.append(option(peer.STRUCTURED_REPLY))
        while rng.random() < 0.5:
            name = rng.choice((b"zram0", b"zram0", b"zram0", b"", b"other"))
            queries = QUERIES[:2]  # both that there are
            if rng.random() < 0.5:
                queries = tuple(rng.sample(QUERIES, rng.randrange(4)))
            parts.append(option(peer.SET_META, meta(name, queries)))
        end = go(b"zram0", tuple(rng.choices(range(5), k=rng.randrange(3))))
        parts.append(
            option(peer.GO, end) if rng.random() < 0.8 else option(peer.EXPORT_NAME, b"zram0")
        )
        events = self.some_events(rng.randrange(12))
        flood = rng.random() < 0.1
        mode = rng.choice((0, 128) if flood else (0, 0, 0, 0, 0, 0, 64, 64, 128, 128))
        if mode == 128 and rng.random() < 0.8:
            parts.insert(1, option(peer.STARTTLS))
            if rng.random() < 0.5:  # in vain, as TLS comes after it
                before = option(peer.SET_META, meta(b"zram0", QUERIES[:2]))
                parts[1:1] = [option(peer.STRUCTURED_REPLY), before]
                events = bytes((32, 0, *events))[:126]
        requests = [self.a_request(extended) for _ in range(rng.randrange(1, 14))]
        if rng.random() < 0.5:
            look = request(peer.READ, 0, 1 << 16, extended=extended)
            requests = [each for one in requests for each in (one, look)]
        if flood:
            requests = self.flood(extended)
            events = self.flood_events(sum(map(len, parts)))
        parts += requests
        if rng.random() < 0.5:
            parts.append(request(peer.DISC, 0, 0, extended=extended))
        return pack(events, b"".join(parts), mode)

    def flood(self, extended: bool) -> list[bytes]:
        """Of much to read, for a client that does not."""
        rng = self.rng
        length = rng.choice((8192, 16384))
        write = request(peer.WRITE, 0, length, peer.PAYLOAD_LEN * extended, extended=extended)
        reads = [
            request(peer.READ, 0, rng.choice((1, 4096, 4096, length)), extended=extended)
            for _ in range(rng.choice((5, 40, 40)))
        ]
        return [write + rng.randbytes(length), *reads]

    def flood_events(self, negotiation: int) -> bytes:
        rng = self.rng
        first = (1, min(negotiation // 64, 255))  # so that its replies are read
        events = bytes((*first, 7, 0) if rng.random() < 0.7 else (7, 0))
        for _ in range(rng.randrange(12)):
            events += bytes((rng.choice((3, 3, 5, 6, 8, 15)), rng.choice((1, 8, 64, 255))))
        if rng.random() < 0.4:  # the server ends
            events += bytes((13, rng.randrange(4), 3, 0, 6, 0, 10, 1 << rng.randrange(8)))
        elif rng.random() < 0.5:  # the client does
            events += bytes((rng.choice((11, 12)), 0))
        return events

    def an_option(self) -> bytes:
        rng = self.rng
        number = rng.choice((*range(3, 12), 3, 6, 9, 10, 2, 12, 0x12345678))
        if rng.random() < 0.1:
            return option(number, rng.randbytes(rng.choice((1, 4, 30, 5000, 7000))))
        if number in (peer.INFO, peer.GO):
            infos = tuple(rng.choices(range(5), k=rng.randrange(4)))
            return option(number, go(rng.choice(NAMES), infos))
        if number in (peer.LIST_META, peer.SET_META):
            queries = tuple(rng.sample(QUERIES, rng.randrange(4)))
            return option(number, meta(rng.choice(NAMES), queries))
        return option(number)

    def a_request(self, extended: bool) -> bytes:
        rng = self.rng
        command = rng.choice((0, 0, 0, 1, 1, 1, 1, 3, 4, 5, 6, 6, 7, 7, 8, 0xFFFF))
        flags = rng.choice((0, 0, 0, 0, 1, 2, 4, 8, 16, 18, 32, 64))
        if rng.random() < 0.85:
            length = rng.choice((1, 100, 4096, 4096, 8192, 8193, 12288, 30000, 65536))
            places = (0, 0, 0, 4096, 4096, 8192, 100, 4000, SIZE - length, SIZE - length + 1)
            offset = rng.choice(places)
        else:
            length, offset = rng.choice(LONG_NUMBERS), rng.choice(LONG_NUMBERS)
        payload = b""
        if command == peer.WRITE and length <= 163840:
            payload = self.content(length)
            if extended and rng.random() < 0.9:
                flags |= peer.PAYLOAD_LEN
        elif command == peer.FLUSH and rng.random() < 0.8:
            offset = length = 0
        return request(command, offset, length, flags, extended=extended) + payload

    def content(self, length: int) -> bytes:
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0:
            return bytes(length)
        if kind == 1:
            return rng.randbytes(8) * (length // 8) + bytes(length % 8)
        if kind == 2 and length <= 16384:
            return rng.randbytes(length)
        text = rng.randbytes(40) + b"to be or not to be, that is "
        return (text * (length // len(text) + 1))[:length]

    def some_events(self, count: int) -> bytes:
        rng = self.rng
        return bytes(
            byte
            for _ in range(count)
            for byte in (
                rng.choice((0, 0, 1, 1, 2, 3, 5, 5, 6, 7, 8, 9, 14, 15, rng.randrange(16)))
                | rng.choice((0, 0, 0, 0, 0, 16, 32, 64, 96, 128, 192)),  # see nbd.NO_DESCRIPTOR
                rng.randrange(256),
            )
        )

    def mutate(self, data: bytes) -> bytes:
        """The same, but for one to three changes."""
        rng = self.rng
        for _ in range(rng.choice((1, 1, 2, 3))):
            events, stream, mode = unpack(data)
            if rng.random() < 0.02:
                mode ^= rng.choice((64, 128))
            if rng.random() < 0.25:
                data = pack(self.other_events(events), stream, mode)
            else:
                parts = pieces(stream)
                self.change(parts)
                data = pack(events, b"".join(parts), mode)
        return data

    def other_events(self, events: bytes) -> bytes:
        rng = self.rng
        at = rng.randrange(len(events) // 2 + 1) * 2
        kind = rng.randrange(4)
        if kind == 0:
            return events[: at + 2 * rng.randrange(8)]
        cut = at if kind == 1 else at + 2
        return (events[:at] + self.some_events(1) + events[cut:])[:126]

    def change(self, parts: list[bytes]) -> None:
        rng = self.rng
        at = rng.randrange(len(parts)) if parts else 0
        part = parts[at] if parts else b""
        extended = any(p.startswith(peer.LONG_REQUEST_MAGIC) for p in parts)
        kind = rng.randrange(10)
        if kind == 0 or not parts:
            parts.insert(at + 1, self.a_request(extended))
        elif kind == 1:
            parts.insert(at, self.an_option())
        elif kind == 2:
            del parts[at]
        elif kind == 3:
            place = rng.randrange(len(parts) + 1)
            parts[place:place] = [part] * rng.choice((1, 1, 2, 30 if len(part) < 300 else 3))
        elif kind == 4:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 5 and part:
            place = rng.randrange(len(part))
            parts[at] = part[:place] + bytes([rng.randrange(256)]) + part[place + 1 :]
        elif kind == 6:
            parts[at] = part[: rng.randrange(len(part) + 1)]
        elif kind == 7:
            parts[:] = self.other_mode(parts)
        else:
            parts[at] = self.other_field(part)

    def other_field(self, part: bytes) -> bytes:
        rng = self.rng
        if part.startswith(peer.IHAVEOPT) and len(part) >= 16:
            number, length = struct.unpack(">II", part[8:16])
            if rng.random() < 0.3:
                number = rng.randrange(14)
            elif rng.random() < 0.3:
                length = rng.choice(NUMBERS)
            else:
                return self.an_option()
            return part[:8] + struct.pack(">II", number, length) + part[16:]
        extended = part.startswith(peer.LONG_REQUEST_MAGIC)
        if len(part) < (32 if extended else 28):
            return part + rng.choice(DICTIONARY)
        layout = ">4sHH8sQQ" if extended else ">4sHH8sQI"
        fields = list(struct.unpack_from(layout, part))
        which = rng.randrange(5)
        payload = part[struct.calcsize(layout) :]
        if which == 0:
            fields[1] ^= 1 << rng.randrange(7)
        elif which == 1:
            fields[2] = rng.randrange(9)
        elif which == 2:
            fields[4] = rng.choice(LONG_NUMBERS)
        else:
            fields[5] = rng.choice(NUMBERS)
        if fields[2] == peer.WRITE and rng.random() < 0.9 and fields[5] <= 163840:
            payload = (payload + self.content(max(0, fields[5] - len(payload))))[: fields[5]]
        elif rng.random() < 0.9:
            payload = b""
        return struct.pack(layout, *fields) + payload

    def other_mode(self, parts: list[bytes]) -> list[bytes]:
        """Extended headers instead of simple ones, or the other way."""
        found = []
        for part in parts:
            if part.startswith(peer.REQUEST_MAGIC) and len(part) >= 28:
                _, flags, command, cookie, offset, length = struct.unpack(">4sHH8sQI", part[:28])
                if command == peer.WRITE:
                    flags |= peer.PAYLOAD_LEN
                head = struct.pack(">HH8sQQ", flags, command, cookie, offset, length)
                found.append(peer.LONG_REQUEST_MAGIC + head + part[28:])
            elif part.startswith(peer.LONG_REQUEST_MAGIC) and len(part) >= 32:
                _, flags, command, cookie, offset, length = struct.unpack(">4sHH8sQQ", part[:32])
                flags, length = flags & ~peer.PAYLOAD_LEN, length & 0xFFFFFFFF
                head = struct.pack(">HH8sQI", flags, command, cookie, offset, length)
                found.append(peer.REQUEST_MAGIC + head + part[32:])
            elif part.startswith(peer.IHAVEOPT) and part[8:12] == b"\0\0\0\x08":
                found.append(option(peer.EXTENDED_HEADERS))
            elif part.startswith(peer.IHAVEOPT) and part[8:12] == b"\0\0\0\x0b":
                found.append(option(peer.STRUCTURED_REPLY))
            else:
                found.append(part)
        return found

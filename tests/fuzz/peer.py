"""What a client may believe of a server: both byte streams of one NBD connection, held against the
specification and against what docs/design.md says that zramd does where that leaves a choice.

Nothing of zramd is used here: the numbers are written down a second time on purpose.

`judge` reads the client's stream as a server must, and asks of the server's stream that it is a
greeting, then the replies to the options in the order in which they were sent, then replies to
cookies that were sent, each exactly once, of the right form and length and with an error that fits,
and not a byte more; that no reply stands before the last byte of its request; and that what is read
is what was written, in the order of the replies.
"""

import struct
from dataclasses import dataclass, field

PAGE = 4096
ZEROS = bytes(PAGE)

MAGIC, IHAVEOPT, REPLY_MAGIC = b"NBDMAGIC", b"IHAVEOPT", bytes.fromhex("0003e889045565a9")
REQUEST_MAGIC, LONG_REQUEST_MAGIC = bytes.fromhex("25609513"), bytes.fromhex("21e41c71")
SIMPLE, STRUCTURED, EXTENDED = 0x67446698, 0x668E33EF, 0x6E8A278C

EXPORT_NAME, ABORT, LIST, STARTTLS, INFO, GO = 1, 2, 3, 5, 6, 7
STRUCTURED_REPLY, LIST_META, SET_META, EXTENDED_HEADERS = 8, 9, 10, 11
ACK, SERVER, REP_INFO, META_CONTEXT = 1, 2, 3, 4
UNSUP, POLICY, INVALID, TLS_REQD, UNKNOWN = (0x80000000 + n for n in (1, 2, 3, 5, 6))
SHUTDOWN, TOO_BIG, EXT_HEADER_REQD = (0x80000000 + n for n in (7, 9, 10))
KNOWN = {ABORT, LIST, STARTTLS, INFO, GO, STRUCTURED_REPLY, LIST_META, SET_META, EXTENDED_HEADERS}

READ, WRITE, DISC, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS = range(8)
FUA, NO_HOLE, DF, REQ_ONE, FAST_ZERO, PAYLOAD_LEN = (1 << n for n in range(6))
EPERM, EIO, EINVAL, ENOSPC, ENOTSUP, ESHUTDOWN = 1, 5, 22, 28, 95, 108
NONE, OFFSET_DATA, OFFSET_HOLE, STATUS, STATUS_EXT = 0, 1, 2, 5, 6
ERROR, ERROR_OFFSET = 0x8001, 0x8002
DONE = 1

CONTEXTS = {b"base:allocation": 1, b"zramd:state": 2}
CONTEXT_FLAGS = {1: (0, 2, 3), 2: (0, 1, 2, 3, 4)}


@dataclass(frozen=True)
class Limits:
    """What the server promises; its own constants, or smaller ones that a fuzzer reaches."""

    name: bytes
    size: int
    options: int
    option_length: int
    kept: int
    payload: int
    skipped: int
    read_only: bool = False
    tls_offered: bool = False
    tls_required: bool = False


@dataclass
class Conversation:
    """One connection, as seen from outside."""

    sent: bytes
    """All that reached the server."""
    got: bytes
    marks: list[tuple[int, int]]
    """(bytes of `got` before it, bytes of `sent` that had arrived) of every write of the server."""
    whole: bool = True
    """The client sent its end of file last and read all: every request has its reply."""
    ended_by: set[int] = field(default_factory=set)
    """Errors that requests may get as the server or the device is taken away."""
    refuses: bool = False
    """Options may get ERR_SHUTDOWN, and the export may be gone."""
    ordered: bool = True
    """What is executed at once is answered in the order of its execution."""


@dataclass
class Request:
    command: int
    flags: int
    cookie: bytes
    offset: int
    length: int
    end: int
    """Where in the client's stream its last byte is, plus one."""
    errors: set[int]
    payload: bytes = b""
    covered: list[tuple[int, int]] = field(default_factory=list)
    data: list[tuple[int, bytes]] = field(default_factory=list)
    contexts: set[int] = field(default_factory=set)
    error: int = 0


class Wrong(AssertionError):
    """The server did what no server may."""


def must(fact: object, what: str) -> None:
    if not fact:
        raise Wrong(what)


def judge(said: Conversation, limits: Limits) -> "Judge":
    """Raises Wrong. Tells how far the conversation came, too."""
    judge = Judge(said, limits)
    judge.run()
    return judge


class Judge:
    def __init__(self, said: Conversation, limits: Limits) -> None:
        self.said, self.limits = said, limits
        self.up = self.down = 0
        self.structured = self.extended = self.secure = False
        self.dropped = False
        """The server had to end the connection without the client's end of file."""
        self.transmits = False
        self.requests = self.failed = self.stored = 0
        """Requests sent; those of them that failed, and those that changed the data."""
        self.flags = 0
        self.contexts: set[int] = set()
        self._meta: tuple[bytes, set[int]] = b"", set()
        self._pages: dict[int, tuple[bytes, ...] | None] = {}
        self._mark = 0

    def run(self) -> None:
        said = self.said
        if not said.got and not said.whole:
            return None
        must(said.got[:18] == MAGIC + IHAVEOPT + b"\0\3", "greeting")
        self.down = 18
        if len(said.sent) < 4:
            return self.nothing_more()
        flags = int.from_bytes(said.sent[:4], "big")
        self.up = 4
        if flags & ~3:
            return self.drop()
        self.options(bool(flags & 1), bool(flags & 2))
        if self.transmits:
            self.transmission()
        return None

    def nothing_more(self) -> None:
        must(self.down == len(self.said.got), f"{len(self.said.got) - self.down} bytes too many")

    def drop(self) -> None:
        self.dropped = True
        self.nothing_more()

    def arrived(self, at: int) -> int:
        """Bytes of the client's that had arrived when the server wrote its byte `at`."""
        marks = self.said.marks
        while self._mark + 1 < len(marks) and marks[self._mark + 1][0] <= at:
            self._mark += 1
        return marks[self._mark][1]

    def take(self, count: int) -> bytes | None:
        """The server's next bytes; None where it was cut off before, which must be excusable."""
        got = self.said.got
        if self.down + count > len(got):
            must(not self.said.whole, "the server's last message is cut off")
            return None
        self.down += count
        return got[self.down - count : self.down]

    # Negotiation

    def options(self, fixed: bool, no_zeroes: bool) -> None:
        sent, limits = self.said.sent, self.limits
        count = 0
        while True:
            if len(sent) - self.up < 16:
                return self.nothing_more()
            option, length = struct.unpack_from(">II", sent, self.up + 8)
            if sent[self.up : self.up + 8] != IHAVEOPT or length > limits.option_length:
                return self.drop()
            if count == limits.options:
                return self.drop()
            count += 1
            long = length > limits.kept
            end = self.up + 16 + length
            data = b"" if long else sent[self.up + 16 : end]
            if len(sent) < end and not long:
                return self.nothing_more()
            if option == EXPORT_NAME:
                if long or self.extended or self.must_secure() or not self.is_export(data):
                    return self.drop()
                if self.down == len(self.said.got) and (self.said.refuses or not self.said.whole):
                    return None
                self.up = end
                reply = self.take(10 if no_zeroes else 134)
                if reply is None:
                    return None
                must(self.arrived(self.down - len(reply)) >= end, "an export without its name")
                size, self.flags = struct.unpack(">QH", reply[:10])
                must(size == limits.size and not any(reply[10:]), "EXPORT_NAME's reply")
                self.begin(data)
                return None
            final = self.option(option, data, long, fixed)
            if final is None:
                return None
            self.up = min(end, len(sent))
            if option == ABORT and final == ACK:
                return self.drop()
            if option == STARTTLS and final == ACK:
                if self.arrived(self.down - 20) > end:
                    return self.drop()  # it was slipped in before TLS
                self.begin_tls()
            if option == GO and final == ACK:
                self.begin(data[4 : 4 + int.from_bytes(data[:4], "big")])
                return None
            if len(sent) < end:
                return self.nothing_more()

    def begin_tls(self) -> None:
        """The haggling goes on through TLS, as if no option had been sent before."""
        self.secure = True
        self.structured = self.extended = False
        self._meta = b"", set()

    def must_secure(self) -> bool:
        return self.limits.tls_required and not self.secure

    def is_export(self, name: bytes) -> bool:
        return name in (b"", self.limits.name)

    def begin(self, name: bytes) -> None:
        self.transmits = True
        if name == self._meta[0]:
            self.contexts = self._meta[1]
        must(self.flags & 1, "transmission flags without HAS_FLAGS")
        must(bool(self.flags & 2) is self.limits.read_only, "READ_ONLY")
        df = bool(self.flags & 1 << 7)
        must(df is (self.structured or self.extended), "SEND_DF without structured replies")
        changes = 0x860  # TRIM, WRITE_ZEROES, FAST_ZERO
        offered = 0x50C | (0 if self.limits.read_only else changes)
        must(self.flags & ~(1 << 7) == offered | self.limits.read_only << 1 | 1, "other flags")

    def option(self, option: int, data: bytes, long: bool, fixed: bool) -> int | None:
        """One option's replies up to the last, which is returned; None where there is none."""
        infos: list[bytes] = []
        at = self.down
        while True:
            head = self.take(20)
            if head is None:
                return None
            of, reply, length = struct.unpack(">III", head[8:])
            must(head[:8] == REPLY_MAGIC, "an option reply's magic")
            must(of == option, f"a reply to option {of} instead of {option}")
            body = self.take(length)
            if body is None:
                return None
            if reply in (SERVER, REP_INFO, META_CONTEXT):
                must(option == {SERVER: LIST}.get(reply, option), "a SERVER that nobody asked for")
                must(reply != REP_INFO or option in (INFO, GO), "an INFO that nobody asked for")
                must(reply != META_CONTEXT or option in (LIST_META, SET_META), "a META_CONTEXT")
                infos.append(body)
                continue
            break
        if not long:
            must(self.arrived(at) >= self.up + 16 + len(data), "an option answered early")
        if reply & 0x80000000:
            must(length <= 4096, "a long error message")
            body.decode()
            must(not infos, "an error after information")
        else:
            must(reply == ACK and not body, f"option reply {reply:#x} with {length} bytes")
        allowed = self.allowed(option, data, long, fixed)
        if self.said.refuses and option != ABORT:
            allowed |= {SHUTDOWN, UNKNOWN}
        must(reply in allowed, f"option {option} got {reply:#x}, not {[hex(a) for a in allowed]}")
        if reply == ACK:
            self.acknowledged(option, data, infos)
        elif option == SET_META and reply != SHUTDOWN:
            self._meta = b"", set()
        return int(reply)

    def allowed(self, option: int, data: bytes, long: bool, fixed: bool) -> set[int]:
        if not fixed:
            return {INVALID, TOO_BIG} if long else {INVALID}
        if self.must_secure() and option not in (ABORT, STARTTLS):
            return {TLS_REQD}
        if option == ABORT:
            return {ACK}
        if option not in KNOWN:
            return {UNSUP}
        if long:
            return {TOO_BIG}
        if option == LIST:
            return {INVALID} if data else {ACK}
        if option in (INFO, GO):
            return self.allowed_go(data)
        if option == STARTTLS:
            if data or self.secure:
                return {INVALID}
            return {ACK if self.limits.tls_offered else POLICY}
        if option == STRUCTURED_REPLY:
            if self.extended and not data:
                return {EXT_HEADER_REQD}
            return {INVALID} if data or self.structured else {ACK}
        if option == EXTENDED_HEADERS:
            return {INVALID} if data or self.extended else {ACK}
        parsed = parse_meta(data)
        if parsed is None or (option == SET_META and not (self.structured or self.extended)):
            return {INVALID}
        return {ACK} if self.is_export(parsed[0]) else {UNKNOWN}

    def allowed_go(self, data: bytes) -> set[int]:
        if len(data) < 6:
            return {INVALID}
        length = int.from_bytes(data[:4], "big")
        if length > len(data) - 6 or length > 4096:
            return {INVALID}
        infos = int.from_bytes(data[4 + length : 6 + length], "big")
        if len(data) != 6 + length + 2 * infos or not is_text(data[4 : 4 + length]):
            return {INVALID}
        return {ACK} if self.is_export(data[4 : 4 + length]) else {UNKNOWN}

    def acknowledged(self, option: int, data: bytes, infos: list[bytes]) -> None:
        limits = self.limits
        if option == LIST:
            names = []
            for info in infos:
                length = int.from_bytes(info[:4], "big")
                must(4 + length <= len(info), "a SERVER's length")
                names.append(info[4 : 4 + length])
            must(names == [limits.name], f"LIST says {names}")
        elif option in (INFO, GO):
            told = {int.from_bytes(info[:2], "big"): info[2:] for info in infos}
            must(len(told) == len(infos) and all(len(info) >= 2 for info in infos), "an info twice")
            must(0 in told and len(told[0]) == 10, "no INFO_EXPORT")
            size, self.flags = struct.unpack(">QH", told[0])
            must(size == limits.size, "the export's size")
            minimum, preferred, most = struct.unpack(">III", told[3])
            must((minimum, preferred, most) == (1, 4096, limits.payload), "block sizes")
            at = 6 + int.from_bytes(data[:4], "big")
            wanted = {n for (n,) in struct.iter_unpack(">H", data[at:])}
            must(told.keys() - {0, 3} <= wanted, "information that nobody asked for")
            must(1 not in wanted or told.get(1) == limits.name, "INFO_NAME")
        elif option == STRUCTURED_REPLY:
            self.structured = True
        elif option == EXTENDED_HEADERS:
            self.extended = True
        elif option in (LIST_META, SET_META):
            self.contexts_told(option, data, infos)

    def contexts_told(self, option: int, data: bytes, infos: list[bytes]) -> None:
        parsed = parse_meta(data)
        assert parsed is not None
        name, queries = parsed
        wanted = {context for context in CONTEXTS if context in queries}
        if option == LIST_META:
            wanted |= {c for c in CONTEXTS if not queries or c.split(b":")[0] + b":" in queries}
        told = [(int.from_bytes(info[:4], "big"), info[4:]) for info in infos]
        must(len({c for _, c in told}) == len(told), "a context twice")
        must({c for _, c in told} == wanted, f"contexts {told} for {queries}")
        for number, context in told:
            must(number == (0 if option == LIST_META else CONTEXTS[context]), "a context's id")
        if option == SET_META:
            self._meta = name, {number for number, _ in told}

    # Transmission

    def transmission(self) -> None:
        said = self.said
        requests = self.sent_requests()
        self.requests = len(requests)
        waiting: dict[bytes, Request] = {}
        for request in requests:
            if request.cookie in waiting:
                return  # which no client may do; what it gets is its own fault
            waiting[request.cookie] = request
        got = said.got
        while self.down < len(got):
            before = self.down
            done = self.reply(waiting)
            if done is None:
                return
            if done.end > self.arrived(before):
                raise Wrong(f"cookie {done.cookie.hex()} is answered before it is asked")
        if said.whole:
            must(not waiting, f"{len(waiting)} of {len(requests)} requests got no answer")

    def sent_requests(self) -> list[Request]:
        sent, limits = self.said.sent, self.limits
        found: list[Request] = []
        size = 32 if self.extended else 28
        layout = ">4xHH8sQQ" if self.extended else ">4xHH8sQI"
        magic = LONG_REQUEST_MAGIC if self.extended else REQUEST_MAGIC
        at = self.up
        while at + size <= len(sent):
            if sent[at : at + 4] != magic:
                self.dropped = True
                break
            flags, command, cookie, offset, length = struct.unpack_from(layout, sent, at)
            at += size
            payload = b""
            if command == DISC:
                self.dropped = True
                break
            if command == WRITE or (self.extended and flags & PAYLOAD_LEN):
                if length > (limits.payload if self.extended else limits.skipped):
                    self.dropped = True
                    break
                if at + length > len(sent):
                    break
                payload = sent[at : at + length]
                at += length
            errors = self.errors(command, flags, offset, length)
            found.append(Request(command, flags, cookie, offset, length, at, errors, payload))
        self.up = at
        return found

    def errors(self, command: int, flags: int, offset: int, length: int) -> set[int]:
        """What a request may get; 0 for success."""
        limits = self.limits
        valid = {
            READ: FUA | (DF if self.structured or self.extended else 0),
            WRITE: FUA | (PAYLOAD_LEN if self.extended else 0),
            FLUSH: FUA,
            TRIM: FUA,
            WRITE_ZEROES: FUA | NO_HOLE | FAST_ZERO,
        }
        valid[CACHE] = FUA
        if self.contexts:
            valid[BLOCK_STATUS] = FUA | REQ_ONE
        if command not in valid or flags & ~valid[command]:
            return {EINVAL}
        if command == FLUSH:
            return {EINVAL} if offset or length else {0}
        stores = command in (WRITE, WRITE_ZEROES)
        found = set()
        if limits.read_only and (stores or command == TRIM):
            found.add(EPERM)
        beyond = offset + length > limits.size
        if length == 0 or (command == WRITE and self.extended and not flags & PAYLOAD_LEN):
            found.add(EINVAL)
        elif command in (READ, WRITE) and length > limits.payload:
            found.add(ENOSPC if command == WRITE and beyond else EINVAL)
        elif beyond:
            found.add(ENOSPC if stores else EINVAL)
        if found:
            return found
        return {0, ENOSPC} if stores else {0}

    def reply(self, waiting: dict[bytes, Request]) -> Request | None:
        """One reply or chunk; the request it belongs to."""
        if self.extended:
            head = self.take(32)
            if head is None:
                return None
            magic, flags, kind, cookie, offset, length = struct.unpack(">IHH8sQQ", head)
            must(magic == EXTENDED, f"{magic:#x} where an extended reply should begin")
        else:
            head = self.take(16)
            if head is None:
                return None
            magic = int.from_bytes(head[:4], "big")
            if magic == SIMPLE:
                return self.simple(head, waiting)
            must(self.structured and magic == STRUCTURED, f"{magic:#x} where a reply should begin")
            rest = self.take(4)
            if rest is None:
                return None
            flags, kind, cookie = struct.unpack(">4xHH8s", head)
            length = int.from_bytes(rest, "big")
            offset = None
        request = waiting.get(cookie)
        if request is None:
            raise Wrong(f"a chunk for cookie {cookie.hex()}, which waits for none")
        must(offset is None or offset == request.offset, "the offset of an extended reply")
        must(flags & ~DONE == 0, "a chunk's flags")
        body = self.take(length)
        if body is None:
            return None
        self.chunk(request, kind, body)
        if flags & DONE:
            del waiting[cookie]
            self.finish(request, structured=True)
        return request

    def simple(self, head: bytes, waiting: dict[bytes, Request]) -> Request | None:
        error, cookie = struct.unpack(">4xI8s", head)
        request = waiting.pop(cookie, None)
        if request is None:
            raise Wrong(f"a reply for cookie {cookie.hex()}, which waits for none")
        must(not (self.structured and (request.command == READ or error)), "a simple reply")
        must(request.command != BLOCK_STATUS or error, "a simple reply to BLOCK_STATUS")
        request.error = error
        if request.command == READ and not error:
            data = self.take(request.length)
            if data is None:
                return None
            request.data.append((request.offset, data))
        self.finish(request, structured=False)
        return request

    def chunk(self, request: Request, kind: int, body: bytes) -> None:
        if kind == NONE:
            must(not body, "a chunk of type NONE with data")
        elif kind in (OFFSET_DATA, OFFSET_HOLE):
            must(request.command == READ, "content for what is no READ")
            at = int.from_bytes(body[:8], "big")
            if kind == OFFSET_DATA:
                data = body[8:]
                must(data, "OFFSET_DATA without any")
            else:
                must(len(body) == 12, "OFFSET_HOLE's length")
                data = bytes(int.from_bytes(body[8:], "big"))
                must(data, "an empty hole")
            must(len(data) <= request.length, "more than was asked for")
            request.data.append((at, data))
            must(not request.flags & DF or len(request.data) == 1, "DF in pieces")
        elif kind in (STATUS, STATUS_EXT):
            must(request.command == BLOCK_STATUS, "a status that nobody asked for")
            must((kind == STATUS_EXT) is self.extended, "a status of the other kind")
            self.status(request, body)
        elif kind in (ERROR, ERROR_OFFSET):
            error, length = struct.unpack(">IH", body[:6])
            must(len(body) == 6 + length + (8 if kind == ERROR_OFFSET else 0), "an error's length")
            body[6 : 6 + length].decode()
            must(error and not request.error, "an error without a number, or two")
            request.error = error
        else:
            raise Wrong(f"a chunk of type {kind:#x}")

    def status(self, request: Request, body: bytes) -> None:
        context = int.from_bytes(body[:4], "big")
        must(context in self.contexts and context not in request.contexts, "a status' context")
        request.contexts.add(context)
        if self.extended:
            extents = list(struct.iter_unpack(">QQ", body[8:]))
            must(int.from_bytes(body[4:8], "big") == len(extents), "the number of extents")
        else:
            extents = list(struct.iter_unpack(">II", body[4:]))
        must(extents, "no extents")
        must(len(extents) == 1 or not request.flags & REQ_ONE, "REQ_ONE")
        must(sum(length for length, _ in extents) <= request.length, "extents beyond the request")
        before = None
        at = request.offset
        for length, flags in extents:
            must(length > 0, "an empty extent")
            must(flags in CONTEXT_FLAGS[context] and flags != before, "an extent's flags")
            before = flags
            zero = flags & 2 if context == 1 else flags == 0
            if zero and self.said.ordered:
                self.must_be_zero(at, length)
            at += length

    def finish(self, request: Request, *, structured: bool) -> None:
        error = request.error
        allowed = request.errors | self.said.ended_by
        must(
            error in allowed,
            f"command {request.command} flags {request.flags:#x} of {request.length} at"
            f" {request.offset}: {error}, not {sorted(allowed)}",
        )
        if error:
            self.failed += 1
        elif request.command == READ:
            at = request.offset
            for start, data in sorted(request.data):
                must(start == at, "READ: a gap or an overlap")
                at += len(data)
                if self.said.ordered:
                    self.must_hold(start, data, "READ")
            must(at == request.offset + request.length, "READ: not all")
        elif request.command == BLOCK_STATUS:
            must(request.contexts == self.contexts, "BLOCK_STATUS: not all contexts")
        if structured and not self.extended and request.command not in (READ, BLOCK_STATUS):
            must(error, "a success in chunks")
        if error in (0, ENOSPC) and 0 in request.errors:
            self.stored += request.command in (WRITE, TRIM, WRITE_ZEROES)
            self.store(request, sure=not error)

    # The data

    def store(self, request: Request, *, sure: bool) -> None:
        """What a WRITE, TRIM or WRITE_ZEROES leaves; where not `sure`, perhaps."""
        start, stop = request.offset, request.offset + request.length
        if request.command == WRITE:
            payload = request.payload
        elif request.command == WRITE_ZEROES:
            payload = None
        elif request.command == TRIM:  # pages that lie in it wholly
            payload = None
            start, stop = -(-start // PAGE) * PAGE, stop // PAGE * PAGE
        else:
            return
        pages = self._pages
        for page in range(start // PAGE, -(-stop // PAGE) if stop > start else 0):
            low, high = max(start - page * PAGE, 0), min(stop - page * PAGE, PAGE)
            at = page * PAGE + low - request.offset
            part = bytes(high - low) if payload is None else payload[at : at + high - low]
            before = pages.get(page, (ZEROS,))
            if high - low == PAGE:
                after: tuple[bytes, ...] | None = (part,)
            elif before is None:
                after = None
            else:
                after = tuple(old[:low] + part + old[high:] for old in before)
            if not sure:
                after = None if before is None or after is None else before + after
            pages[page] = None if after is None or len(after) > 16 else after

    def must_be_zero(self, start: int, length: int) -> None:
        stop = start + length
        for page in self._pages:
            low, high = max(start, page * PAGE), min(stop, (page + 1) * PAGE)
            if low < high:
                self.must_hold(low, bytes(high - low), "BLOCK_STATUS")

    def must_hold(self, start: int, data: bytes, what: str) -> None:
        pages = self._pages
        stop = start + len(data)
        if not pages:
            must(data == bytes(len(data)), f"{what}: something where nothing was written")
            return
        for page in range(start // PAGE, -(-stop // PAGE)):
            may = pages.get(page, (ZEROS,))
            if may is None:
                continue
            low, high = max(start - page * PAGE, 0), min(stop - page * PAGE, PAGE)
            part = data[page * PAGE + low - start : page * PAGE + high - start]
            fits = tuple(old for old in may if old[low:high] == part)
            must(fits, f"{what}: page {page} holds {part[:8].hex()}...")
            if len(fits) < len(may):
                pages[page] = fits


def parse_meta(data: bytes) -> tuple[bytes, list[bytes]] | None:
    """Export name and queries of LIST_META_CONTEXT or SET_META_CONTEXT; None if malformed."""
    texts = []
    at = 0
    count = 1
    while count:
        if len(data) < at + 4:
            return None
        length = int.from_bytes(data[at : at + 4], "big")
        at += 4
        if length > len(data) - at or length > 4096:
            return None
        texts.append(data[at : at + length])
        if len(texts) == 1 and not is_text(texts[0]):
            return None
        at += length
        count -= 1
        if len(texts) == 1:
            if len(data) < at + 4:
                return None
            count = int.from_bytes(data[at : at + 4], "big")
            if count > len(data) // 4:
                return None
            at += 4
    return (texts[0], texts[1:]) if at == len(data) else None


def is_text(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True

"""The server's side of the fixed newstyle handshake: bytes in, bytes out, no sockets.

    GREETED --client flags--> HAGGLING --EXPORT_NAME, GO--> TRANSMITTING
                 |             |  ^ |----------ABORT------> ENDED
                 |      STARTTLS  | '-what no reply cures-> ENDED
                 |             v  | secured()                 ^
                 |            SECURING ------more bytes-------|
                 '--------------what no reply cures-----------'

Promises:
1. Every option is answered, in order, with its data consumed, whatever the option is; an unknown
   one with NBD_REP_ERR_UNSUP. The only exceptions are the specification's: EXPORT_NAME cannot
   report errors, and a peer that breaks the framing (magic, flags, absurd lengths) is dropped.
2. Bounded: at most MAX_OPTIONS options of MAX_OPTION_LENGTH bytes, of which at most MAX_KEPT are
   ever held. The time until it is done is the caller's to bound; an option takes microseconds.
3. Once TRANSMITTING, `trailing` is what the client sent ahead; nothing of it was looked at.
4. What was said before TLS counts for nothing after it; and nobody can have slipped in, before the
   TLS handshake, what would be taken for the client's afterwards: such a connection is dropped.
   Where TLS is required, nothing is answered before but that, and STARTTLS and ABORT.

Assumes: the caller sends what `receive` returns before it closes. When SECURING, it begins TLS,
then calls `secured`, and gives us nothing else in between.
"""

import enum
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar, Protocol

from zramd.errors import ZramdError
from zramd.nbd import wire
from zramd.nbd.contexts import CONTEXTS, listed
from zramd.nbd.replies import EXTENDED, SIMPLE, STRUCTURED, Simple
from zramd.nbd.wire import ExportInfo, Malformed, TooBig

MAX_OPTIONS = 32  # as nbdkit (server/protocol-handshake-newstyle.c, MAX_NR_OPTIONS)
MAX_OPTION_LENGTH = 32 << 20  # as qemu (nbd/server.c, NBD_MAX_BUFFER_SIZE)
MAX_KEPT = 64 << 10  # room for the longest name and every info request there is, many times over


class Exports(Protocol):
    """What there is to serve. An export that cannot be had raises ZramdError; the peer sees why."""

    def names(self) -> list[str]:
        """The names to list."""

    def describe(self, name: str) -> ExportInfo:
        """What the export looks like, without opening it."""

    def open(self, name: str) -> ExportInfo:
        """Opens the export for this connection. Called once at most per success."""


class State(enum.Enum):
    GREETED = enum.auto()
    HAGGLING = enum.auto()
    SECURING = enum.auto()
    TRANSMITTING = enum.auto()
    ENDED = enum.auto()


class Negotiation:
    """One handshake. Send `greeting()`, then feed what arrives to `receive` until `done`."""

    def __init__(
        self, exports: Exports, *, tls_offered: bool = False, tls_required: bool = False
    ) -> None:
        self.state = State.GREETED
        self.export: ExportInfo | None = None
        """The export that was opened, once TRANSMITTING."""
        self.form: Simple = SIMPLE
        """Of the replies."""
        self.contexts: tuple[int, ...] = ()
        """Of a block status, once TRANSMITTING."""
        self.reason = ""
        """Why it ENDED."""
        self.shutting_down = False
        """Set by the caller: refuse what still comes with NBD_REP_ERR_SHUTDOWN."""
        self._exports = exports
        self._buffer = bytearray()
        self._skip = 0  # bytes of a long option's data still to be thrown away
        self._options = 0
        self._no_zeroes = False
        self._fixed = False
        self._tls_offered = tls_offered
        self._must_secure = tls_required
        self._secure = False
        self._selected_for = ""  # the export whose contexts were selected
        self._selected: tuple[int, ...] = ()

    @property
    def done(self) -> bool:
        return self.state in (State.TRANSMITTING, State.ENDED)

    def secured(self) -> None:
        """TLS has begun: what arrives from now on came through it."""
        self.state, self._secure, self._must_secure = State.HAGGLING, True, False
        self.form, self._selected = SIMPLE, ()

    @property
    def trailing(self) -> bytes:
        """What arrived after the handshake's last byte."""
        return bytes(self._buffer)

    @staticmethod
    def greeting() -> bytes:
        return wire.pack_greeting()

    def receive(self, data: bytes | memoryview) -> bytes:
        """Takes `data` in, returns what to send now."""
        self._buffer += data
        replies = b""
        while not self.done and self.state is not State.SECURING:
            reply = self._maybe_step()
            if reply is None:
                break
            replies += reply
        if self.state is State.SECURING and self._buffer:
            self._drop("something between STARTTLS and the TLS handshake")
        return replies

    def _maybe_step(self) -> bytes | None:
        """Consumes one message and answers it; None where more bytes are needed first."""
        if self._skip:
            skipped = min(self._skip, len(self._buffer))
            del self._buffer[:skipped]
            self._skip -= skipped
            if self._skip:
                return None
        if self.state is State.GREETED:
            return self._client_flags()
        if len(self._buffer) < wire.OPTION.size:
            return None
        magic, option, length = wire.OPTION.unpack_from(self._buffer)
        if magic != wire.IHAVEOPT:
            return self._drop("not an option")
        if length > MAX_OPTION_LENGTH:
            return self._drop(f"an option of {length} bytes")
        if self._options == MAX_OPTIONS:
            return self._drop(f"more than {MAX_OPTIONS} options")
        if length > MAX_KEPT:
            self._options += 1
            del self._buffer[: wire.OPTION.size]
            self._skip = length
            return self._answer(option, None)
        end = wire.OPTION.size + length
        if len(self._buffer) < end:
            return None
        self._options += 1
        data = bytes(self._buffer[wire.OPTION.size : end])
        del self._buffer[:end]
        return self._answer(option, data)

    def _client_flags(self) -> bytes | None:
        if len(self._buffer) < wire.CLIENT_FLAGS.size:
            return None
        (flags,) = wire.CLIENT_FLAGS.unpack_from(self._buffer)
        del self._buffer[: wire.CLIENT_FLAGS.size]
        if flags & ~(wire.NBD_FLAG_C_FIXED_NEWSTYLE | wire.NBD_FLAG_C_NO_ZEROES):
            return self._drop(f"client flags {flags:#x}")
        self._fixed = bool(flags & wire.NBD_FLAG_C_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & wire.NBD_FLAG_C_NO_ZEROES)
        self.state = State.HAGGLING
        return b""

    def _answer(self, option: int, data: bytes | None) -> bytes:
        """`data` is None where it is too long to be kept."""
        if not self._fixed and option != wire.NBD_OPT_EXPORT_NAME:
            return self._refuse(option, wire.NBD_REP_ERR_INVALID, "needs fixed newstyle")
        if self.shutting_down and option != wire.NBD_OPT_ABORT:
            if option == wire.NBD_OPT_EXPORT_NAME:
                return self._drop("shutting down")
            return self._refuse(option, wire.NBD_REP_ERR_SHUTDOWN, "the server is shutting down")
        if self._must_secure and option not in (wire.NBD_OPT_STARTTLS, wire.NBD_OPT_ABORT):
            if option == wire.NBD_OPT_EXPORT_NAME:
                return self._drop("TLS is required, and was not begun")
            return self._refuse(option, wire.NBD_REP_ERR_TLS_REQD, "begin TLS first")
        handler = self._HANDLERS.get(option)
        if handler is None:
            return self._refuse(option, wire.NBD_REP_ERR_UNSUP, f"option {option} is not supported")
        if data is None and option != wire.NBD_OPT_ABORT:
            if option == wire.NBD_OPT_EXPORT_NAME:
                return self._drop("an endless export name")
            if option == wire.NBD_OPT_SET_META_CONTEXT:
                self._selected = ()
            return self._refuse(option, wire.NBD_REP_ERR_TOO_BIG, f"at most {MAX_KEPT} bytes")
        try:
            return handler(self, option, data or b"")
        except Malformed as error:
            return self._refuse(option, wire.NBD_REP_ERR_INVALID, str(error))
        except TooBig as error:
            return self._refuse(option, wire.NBD_REP_ERR_TOO_BIG, str(error))
        except ZramdError as error:
            return self._refuse(option, wire.NBD_REP_ERR_UNKNOWN, str(error))

    # One method per option

    def _export_name(self, _option: int, data: bytes) -> bytes:
        if self.form.extended:
            return self._drop("NBD_OPT_EXPORT_NAME after extended headers")
        try:
            export = self._open(wire.parse_name(data))
        except (Malformed, ZramdError) as error:
            return self._drop(str(error))  # this option has no way to say no
        reply = wire.EXPORT_NAME_REPLY.pack(export.size, export.flags)
        return reply if self._no_zeroes else reply + wire.EXPORT_NAME_ZEROES

    def _abort(self, option: int, _data: bytes) -> bytes:
        self._drop("the client aborted")
        return wire.pack_option_reply(option, wire.NBD_REP_ACK)

    def _list(self, option: int, data: bytes) -> bytes:
        _must_be_empty(data)
        servers = (
            wire.pack_option_reply(
                option, wire.NBD_REP_SERVER, wire.pack_server(name, self._description(name))
            )
            for name in self._exports.names()
        )
        return b"".join(servers) + wire.pack_option_reply(option, wire.NBD_REP_ACK)

    def _description(self, name: str) -> str:
        try:
            return self._exports.describe(name).description
        except ZramdError:
            return ""  # it is listed all the same; INFO and GO say what is wrong

    def _info(self, option: int, data: bytes) -> bytes:
        """NBD_OPT_INFO, and NBD_OPT_GO, which is the same and then begins the transmission."""
        name, wanted = wire.parse_go(data)
        go = option == wire.NBD_OPT_GO
        export = self._open(name) if go else self._with_flags(self._exports.describe(name))
        # Block sizes unasked too, as qemu sends them: clients must loop until the ACK anyway.
        infos = [wire.pack_info_export(export), wire.pack_info_block_size(export)]
        if wire.NBD_INFO_NAME in wanted:
            infos.append(wire.pack_info_text(wire.NBD_INFO_NAME, export.name))
        if wire.NBD_INFO_DESCRIPTION in wanted:
            infos.append(wire.pack_info_text(wire.NBD_INFO_DESCRIPTION, export.description))
        replies = (wire.pack_option_reply(option, wire.NBD_REP_INFO, info) for info in infos)
        return b"".join(replies) + wire.pack_option_reply(option, wire.NBD_REP_ACK)

    def _open(self, name: str) -> ExportInfo:
        export = self._with_flags(self._exports.open(name))
        self.export, self.state = export, State.TRANSMITTING
        self.contexts = self._selected if self._selected_for == name else ()
        return export

    def _with_flags(self, export: ExportInfo) -> ExportInfo:
        """What may be told only where it was negotiated."""
        if not self.form.chunked:
            return export
        return replace(export, flags=export.flags | wire.NBD_FLAG_SEND_DF)

    def _starttls(self, option: int, data: bytes) -> bytes:
        _must_be_empty(data)
        if self._secure:
            return self._refuse(option, wire.NBD_REP_ERR_INVALID, "TLS has begun already")
        if not self._tls_offered:
            return self._refuse(option, wire.NBD_REP_ERR_POLICY, "there is no TLS here")
        self.state = State.SECURING
        return wire.pack_option_reply(option, wire.NBD_REP_ACK)

    def _structured_reply(self, option: int, data: bytes) -> bytes:
        _must_be_empty(data)
        if self.form.extended:
            why = "extended headers were negotiated"
            return self._refuse(option, wire.NBD_REP_ERR_EXT_HEADER_REQD, why)
        return self._choose(option, STRUCTURED)

    def _extended_headers(self, option: int, data: bytes) -> bytes:
        _must_be_empty(data)
        return self._choose(option, EXTENDED)

    def _choose(self, option: int, form: Simple) -> bytes:
        if self.form is form:
            return self._refuse(option, wire.NBD_REP_ERR_INVALID, "that was negotiated already")
        self.form = form
        return wire.pack_option_reply(option, wire.NBD_REP_ACK)

    def _list_contexts(self, option: int, data: bytes) -> bytes:
        name, queries = wire.parse_contexts(data)
        self._exports.describe(name)
        return self._tell_contexts(option, [(0, context) for context in listed(queries)])

    def _set_contexts(self, option: int, data: bytes) -> bytes:
        self._selected = ()  # whatever comes of it
        if not self.form.chunked:
            raise Malformed("structured replies come first")
        name, queries = wire.parse_contexts(data)
        self._exports.describe(name)
        found = [(number, context) for context, number in CONTEXTS.items() if context in queries]
        self._selected = tuple(number for number, _ in found)
        self._selected_for = name
        return self._tell_contexts(option, found)

    @staticmethod
    def _tell_contexts(option: int, contexts: list[tuple[int, str]]) -> bytes:
        replies = (
            wire.pack_option_reply(option, wire.NBD_REP_META_CONTEXT, wire.pack_context(*context))
            for context in contexts
        )
        return b"".join(replies) + wire.pack_option_reply(option, wire.NBD_REP_ACK)

    # The ways to say no

    @staticmethod
    def _refuse(option: int, error: int, why: str) -> bytes:
        return wire.pack_option_reply(option, error, wire.encoded(why))

    def _drop(self, reason: str) -> bytes:
        self.state, self.reason = State.ENDED, reason
        return b""

    # On the class: bound methods would be a cycle, and keep the buffer until it is collected.
    _HANDLERS: ClassVar[dict[int, Callable[["Negotiation", int, bytes], bytes]]] = {
        wire.NBD_OPT_EXPORT_NAME: _export_name,
        wire.NBD_OPT_ABORT: _abort,
        wire.NBD_OPT_LIST: _list,
        wire.NBD_OPT_STARTTLS: _starttls,
        wire.NBD_OPT_INFO: _info,
        wire.NBD_OPT_GO: _info,
        wire.NBD_OPT_STRUCTURED_REPLY: _structured_reply,
        wire.NBD_OPT_LIST_META_CONTEXT: _list_contexts,
        wire.NBD_OPT_SET_META_CONTEXT: _set_contexts,
        wire.NBD_OPT_EXTENDED_HEADERS: _extended_headers,
    }


def _must_be_empty(data: bytes) -> None:
    if data:
        raise Malformed("this option takes no data")

"""The NBD protocol's numbers and layouts, and nothing else: no state, no sockets.

Names are those of the specification (NetworkBlockDevice/nbd, doc/proto.md), so that a search for
`NBD_OPT_GO` finds the rule as well as our code. They are plain integers, not enums: the
transmission phase compares them for every request, and looking up a member of an enum takes as
long as parsing a request.

Everything is big-endian. `pack_*` returns bytes ready to send; `parse_*` takes the data of one
whole message and raises `Malformed` when its inner lengths do not add up.
"""

import errno
import struct
from dataclasses import dataclass
from typing import Final

# Handshake

NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
NBD_OPT_REPLY_MAGIC: Final = 0x3E889045565A9
OLDSTYLE_MAGIC: Final = 0x420281861253

NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_NO_ZEROES: Final = 1 << 1
NBD_FLAG_C_FIXED_NEWSTYLE: Final = 1 << 0
NBD_FLAG_C_NO_ZEROES: Final = 1 << 1

NBD_OPT_EXPORT_NAME: Final = 1
NBD_OPT_ABORT: Final = 2
NBD_OPT_LIST: Final = 3
NBD_OPT_STARTTLS: Final = 5
NBD_OPT_INFO: Final = 6
NBD_OPT_GO: Final = 7
NBD_OPT_STRUCTURED_REPLY: Final = 8
NBD_OPT_LIST_META_CONTEXT: Final = 9
NBD_OPT_SET_META_CONTEXT: Final = 10
NBD_OPT_EXTENDED_HEADERS: Final = 11

NBD_REP_ACK: Final = 1
NBD_REP_SERVER: Final = 2
NBD_REP_INFO: Final = 3
NBD_REP_META_CONTEXT: Final = 4
NBD_REP_FLAG_ERROR: Final = 1 << 31
NBD_REP_ERR_UNSUP: Final = NBD_REP_FLAG_ERROR | 1
NBD_REP_ERR_POLICY: Final = NBD_REP_FLAG_ERROR | 2
NBD_REP_ERR_INVALID: Final = NBD_REP_FLAG_ERROR | 3
NBD_REP_ERR_TLS_REQD: Final = NBD_REP_FLAG_ERROR | 5
NBD_REP_ERR_UNKNOWN: Final = NBD_REP_FLAG_ERROR | 6
NBD_REP_ERR_SHUTDOWN: Final = NBD_REP_FLAG_ERROR | 7
NBD_REP_ERR_TOO_BIG: Final = NBD_REP_FLAG_ERROR | 9
NBD_REP_ERR_EXT_HEADER_REQD: Final = NBD_REP_FLAG_ERROR | 10

NBD_INFO_EXPORT: Final = 0
NBD_INFO_NAME: Final = 1
NBD_INFO_DESCRIPTION: Final = 2
NBD_INFO_BLOCK_SIZE: Final = 3

NBD_MAX_STRING: Final = 4096
"""Longest export name or description the specification allows, in bytes."""

GREETING: Final = struct.Struct(">QQH")
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")  # IHAVEOPT, option, length
OPTION_REPLY: Final = struct.Struct(">QIII")  # magic, option, reply type, length
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")  # size, transmission flags
EXPORT_NAME_ZEROES: Final = bytes(124)
_INFO_EXPORT = struct.Struct(">HQH")
_INFO_BLOCK_SIZE = struct.Struct(">HIII")
_U16 = struct.Struct(">H")
_U32 = struct.Struct(">I")

# Transmission

NBD_FLAG_HAS_FLAGS: Final = 1 << 0
NBD_FLAG_READ_ONLY: Final = 1 << 1
NBD_FLAG_SEND_FLUSH: Final = 1 << 2
NBD_FLAG_SEND_FUA: Final = 1 << 3
NBD_FLAG_ROTATIONAL: Final = 1 << 4
NBD_FLAG_SEND_TRIM: Final = 1 << 5
NBD_FLAG_SEND_WRITE_ZEROES: Final = 1 << 6
NBD_FLAG_SEND_DF: Final = 1 << 7
NBD_FLAG_CAN_MULTI_CONN: Final = 1 << 8
NBD_FLAG_SEND_CACHE: Final = 1 << 10
NBD_FLAG_SEND_FAST_ZERO: Final = 1 << 11

NBD_CMD_READ: Final = 0
NBD_CMD_WRITE: Final = 1
NBD_CMD_DISC: Final = 2
NBD_CMD_FLUSH: Final = 3
NBD_CMD_TRIM: Final = 4
NBD_CMD_CACHE: Final = 5
NBD_CMD_WRITE_ZEROES: Final = 6
NBD_CMD_BLOCK_STATUS: Final = 7

NBD_CMD_FLAG_FUA: Final = 1 << 0
NBD_CMD_FLAG_NO_HOLE: Final = 1 << 1
NBD_CMD_FLAG_DF: Final = 1 << 2
NBD_CMD_FLAG_REQ_ONE: Final = 1 << 3
NBD_CMD_FLAG_FAST_ZERO: Final = 1 << 4
NBD_CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

NBD_REQUEST_MAGIC: Final = 0x25609513
NBD_EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698
NBD_STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
NBD_EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

NBD_REPLY_FLAG_DONE: Final = 1 << 0

NBD_REPLY_TYPE_NONE: Final = 0
NBD_REPLY_TYPE_OFFSET_DATA: Final = 1
NBD_REPLY_TYPE_OFFSET_HOLE: Final = 2
NBD_REPLY_TYPE_BLOCK_STATUS: Final = 5
NBD_REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
NBD_REPLY_TYPE_ERROR: Final = (1 << 15) + 1

NBD_STATE_HOLE: Final = 1 << 0
NBD_STATE_ZERO: Final = 1 << 1

REQUEST: Final = struct.Struct(">IHH8sQI")
"""magic, flags, command, cookie, offset, length. The cookie stays bytes: it is the client's own."""

EXTENDED_REQUEST: Final = struct.Struct(">IHH8sQQ")  # the same

SIMPLE_REPLY: Final = struct.Struct(">II8s")  # magic, error, cookie
SIMPLE_REPLY_OK: Final = struct.pack(">II", NBD_SIMPLE_REPLY_MAGIC, 0)
"""What stands before the cookie of a request that went well."""

STRUCTURED_REPLY: Final = struct.Struct(">IHH8sI")  # magic, flags, type, cookie, length
EXTENDED_REPLY: Final = struct.Struct(">IHH8sQQ")  # magic, flags, type, cookie, offset, length
REPLY_DATA: Final = struct.Struct(">Q")  # offset; the data follow
REPLY_HOLE: Final = struct.Struct(">QI")  # offset, length
REPLY_ERROR: Final = struct.Struct(">IH")  # error, length of the message that follows
REPLY_STATUS: Final = struct.Struct(">I")  # context; a STATUS for each extent follows
STATUS: Final = struct.Struct(">II")  # length, flags
REPLY_STATUS_EXT: Final = struct.Struct(">II")  # context, number of extents
STATUS_EXT: Final = struct.Struct(">QQ")  # length, flags

# Errors

NBD_ERRORS: Final = {
    # The specification's eight numbers (Linux's own) ...
    errno.EPERM: 1,
    errno.EIO: 5,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EOVERFLOW: 75,
    errno.EOPNOTSUPP: 95,
    errno.ESHUTDOWN: 108,
    # ... but for ENOMEM, which it asks servers to avoid, and the near relations of the eight.
    errno.EROFS: 1,
    errno.EDQUOT: 28,
    errno.EFBIG: 28,
}


def nbd_error(number: int) -> int:
    """The error an NBD client may see for our errno `number`; EIO for all it has no word for."""
    return NBD_ERRORS.get(number, errno.EIO)


# Messages


MOST_QUERIES: Final = 64
"""For metadata contexts, in one option; clients send as many as they want contexts. An option of
64 KiB has room for 16,000, which take 8 ms."""


class Malformed(Exception):
    """A message whose inner lengths or encoding are wrong; the text says which, for the peer."""


class TooBig(Exception):
    """A message that is well formed, so far, and asks for too much; the text says for what."""


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """What a server tells about an export. Sizes are bytes; `flags` are the transmission flags.

    The block sizes default to what a client must assume where a server names none.
    """

    size: int
    flags: int
    minimum_block: int = 1
    preferred_block: int = 4096
    maximum_payload: int = 32 << 20
    name: str = ""
    """The canonical name, where the server told; clients may know the export by another."""
    description: str = ""


def pack_greeting() -> bytes:
    return GREETING.pack(NBDMAGIC, IHAVEOPT, NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES)


def pack_option(option: int, data: bytes = b"") -> bytes:
    return OPTION.pack(IHAVEOPT, option, len(data)) + data


def pack_option_reply(option: int, reply: int, data: bytes = b"") -> bytes:
    return OPTION_REPLY.pack(NBD_OPT_REPLY_MAGIC, option, reply, len(data)) + data


def pack_go(name: str, infos: tuple[int, ...] = ()) -> bytes:
    """The data of NBD_OPT_GO or NBD_OPT_INFO."""
    raw = name.encode()
    requests = b"".join(_U16.pack(info) for info in infos)
    return _U32.pack(len(raw)) + raw + _U16.pack(len(infos)) + requests


def parse_go(data: bytes) -> tuple[str, list[int]]:
    """Export name and information requests of NBD_OPT_GO or NBD_OPT_INFO. Raises Malformed."""
    if len(data) < 6:
        raise Malformed("the option is shorter than its own lengths")
    (name_length,) = _U32.unpack_from(data)
    if name_length > len(data) - 6:
        raise Malformed("the export name is longer than the option")
    (count,) = _U16.unpack_from(data, 4 + name_length)
    if len(data) != 6 + name_length + 2 * count:
        raise Malformed("the number of information requests does not fit the option's length")
    infos = [info for (info,) in _U16.iter_unpack(data[6 + name_length :])]
    return parse_name(data[4 : 4 + name_length]), infos


def parse_name(raw: bytes) -> str:
    """An export name as text. Raises Malformed."""
    if len(raw) > NBD_MAX_STRING:
        raise Malformed(f"the export name is longer than {NBD_MAX_STRING} bytes")
    try:
        return raw.decode()
    except UnicodeDecodeError:
        raise Malformed("the export name is not UTF-8") from None


def parse_contexts(data: bytes) -> tuple[str, list[str]]:
    """Export name and queries of NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT. Raises
    Malformed, TooBig."""
    name, rest = _parse_string(memoryview(data))  # whose slices cost nothing
    if len(rest) < _U32.size:
        raise Malformed("the option ends before the number of its queries")
    (count,) = _U32.unpack_from(rest)
    rest = rest[_U32.size :]
    if MOST_QUERIES < count <= len(rest) // _U32.size:
        raise TooBig(f"at most {MOST_QUERIES} queries")
    queries: list[str] = []
    while rest and len(queries) < count:
        query, rest = _parse_string(rest)
        queries.append(str(query, "utf-8", "replace"))
    if rest or len(queries) < count:
        raise Malformed("the number of queries does not fit the option's length")
    return parse_name(bytes(name)), queries


def _parse_string(data: memoryview) -> tuple[memoryview, memoryview]:
    """What begins with its own length, and what follows it."""
    if len(data) < _U32.size:
        raise Malformed("the option ends before the length of a string")
    (length,) = _U32.unpack_from(data)
    end = _U32.size + length
    if end > len(data):
        raise Malformed("a string is longer than the option")
    return data[_U32.size : end], data[end:]


def encoded(text: str) -> bytes:
    """What a message may have of it: NBD_MAX_STRING bytes, to the end of a character."""
    return text.encode()[:NBD_MAX_STRING].decode(errors="ignore").encode()


def pack_context(identifier: int, name: str) -> bytes:
    """The data of NBD_REP_META_CONTEXT."""
    return _U32.pack(identifier) + name.encode()


def pack_server(name: str, description: str = "") -> bytes:
    """The data of NBD_REP_SERVER: one line of NBD_OPT_LIST."""
    raw = name.encode()
    return _U32.pack(len(raw)) + raw + description.encode()


def pack_info_export(export: ExportInfo) -> bytes:
    return _INFO_EXPORT.pack(NBD_INFO_EXPORT, export.size, export.flags)


def pack_info_block_size(export: ExportInfo) -> bytes:
    sizes = export.minimum_block, export.preferred_block, export.maximum_payload
    return _INFO_BLOCK_SIZE.pack(NBD_INFO_BLOCK_SIZE, *sizes)


def pack_info_text(info: int, text: str) -> bytes:
    """NBD_INFO_NAME or NBD_INFO_DESCRIPTION."""
    return _U16.pack(info) + text.encode()


def parse_info(data: bytes) -> tuple[int, tuple[int, ...]]:
    """Type and numbers of one NBD_REP_INFO; no numbers for types we need not know.

    Raises Malformed.
    """
    if len(data) < 2:
        raise Malformed("an NBD_REP_INFO without a type")
    (info,) = _U16.unpack_from(data)
    layout = {NBD_INFO_EXPORT: _INFO_EXPORT, NBD_INFO_BLOCK_SIZE: _INFO_BLOCK_SIZE}.get(info)
    if layout is None:
        return info, ()
    if len(data) != layout.size:
        raise Malformed(f"an NBD_REP_INFO of type {info} with {len(data)} bytes")
    return info, layout.unpack(data)[1:]


def pack_request(
    command: int, cookie: bytes, offset: int = 0, length: int = 0, flags: int = 0
) -> bytes:
    return REQUEST.pack(NBD_REQUEST_MAGIC, flags, command, cookie, offset, length)


def pack_simple_reply(cookie: bytes, error: int) -> bytes:
    return SIMPLE_REPLY.pack(NBD_SIMPLE_REPLY_MAGIC, error, cookie)

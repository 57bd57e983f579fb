"""What test_libnbd.py has run by the distribution's Python, whose libnbd it is: one check a run.

    /usr/bin/python3 in_libnbd.py CHECK URI KIND

libnbd's own checks are off, so that what it would refuse reaches the server. Its scripts
tests/errors-server-*.c, tests/opt-*.c, tests/meta-base-allocation.c and tests/aio-parallel.c were
the specification. KIND is the server's, where nbdkit's core answers otherwise than we do.
"""

import errno
import random
import sys

import nbd

PAGE = 4096
MIB = 1 << 20
ALLOCATION = nbd.CONTEXT_BASE_ALLOCATION
STATE = "zramd:state"
TEXT = (b"some text, " * PAGE)[:PAGE]
FLAGS = {name: getattr(nbd, f"CMD_FLAG_{name}") for name in ("FUA", "NO_HOLE", "DF", "REQ_ONE")} | {
    "FAST_ZERO": nbd.CMD_FLAG_FAST_ZERO,
    "PAYLOAD_LEN": 1 << 5,
    "UNKNOWN": 1 << 14,
}


def connect(uri, *contexts, structured=True, opt_mode=False):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    h.set_opt_mode(opt_mode)
    for context in contexts:
        h.add_meta_context(context)
    h.connect_uri(uri)
    return h


def equal(got, wanted, what=""):
    if got != wanted:
        sys.exit(f"{what}: got {got!r}, wanted {wanted!r}")


def error(call, *arguments, **named):
    """The errno of what the server answered; 0 where it did as asked."""
    try:
        call(*arguments, **named)
    except nbd.Error as e:
        return e.errnum
    return 0


def refused(h, number, call, *arguments, **named):
    """And the connection is still in step."""
    what = f"{call.__name__}{[a for a in arguments if isinstance(a, int)]}{named}"
    name = errno.errorcode.get(error(call, *arguments, **named), "no error")
    equal(name, errno.errorcode.get(number, "no error"), what)
    lives(h)


def lives(h):
    equal(bytes(h.pread(5, 7 * PAGE - 2)), bytes(5), "a read afterwards")


def commands(h, offset, length):
    """Every command with a range, and its error beyond the end."""
    ignore = lambda *_: 0  # noqa: E731
    yield errno.EINVAL, h.pread, (length, offset)
    yield errno.EINVAL, h.pread_structured, (length, offset, ignore)
    yield errno.ENOSPC, h.pwrite, (bytes(length), offset)
    yield errno.EINVAL, h.trim, (length, offset)
    yield errno.ENOSPC, h.zero, (length, offset)
    yield errno.EINVAL, h.cache, (length, offset)
    yield errno.EINVAL, h.block_status, (length, offset, ignore)


def extents(h, length, offset, flags=0):
    """Context to [(length, flags)] of one reply."""
    found = {}

    def collect(context, start, entries, error):
        equal((start, error.value), (offset, 0))
        assert context not in found, "a context twice"
        found[context] = list(zip(entries[::2], entries[1::2], strict=True))

    h.block_status(length, offset, collect, flags)
    return found


def whole_map(h, context):
    """All extents of a context, asked for as clients do: on from where a reply ended."""
    at, size, found = 0, h.get_size(), []
    while at < size:
        entries = extents(h, size - at, at)[context]
        assert all(length > 0 for length, _ in entries), entries
        at += sum(length for length, _ in entries)
        found += entries
    equal(at, size, "the sum of the extents")
    return merged(found)


def merged(entries):
    joined = []
    for length, flags in entries:
        if joined and joined[-1][1] == flags:
            length += joined.pop()[0]
        joined.append((length, flags))
    return joined


def lay_out(h):
    """Pages of each kind: holes 0 and 1, noise 2, one word 3, text 4, zeros 5; noise at the end."""
    noise = random.Random(1).randbytes(PAGE)
    h.pwrite(noise + b"01234567" * 512 + TEXT + bytes(PAGE), 2 * PAGE)
    h.pwrite(noise, h.get_size() - PAGE)


def allocation_of(h):
    """base:allocation of what `lay_out` wrote."""
    rest = h.get_size() - 7 * PAGE
    return [(2 * PAGE, 3), (3 * PAGE, 0), (PAGE, 2), (rest, 3), (PAGE, 0)]


def state_of(h):
    rest = h.get_size() - 7 * PAGE
    one = [(PAGE, 3), (PAGE, 1), (PAGE, 2), (PAGE, 1)]
    return [(2 * PAGE, 0), *one, (rest, 0), (PAGE, 3)]


# Errors


def check_beyond_the_end(uri, kind):
    h = connect(uri, ALLOCATION)
    size = h.get_size()
    for offset, length in [
        *((size, 512), (size - 512, 1024), (1 << 40, 512), (size + 1, 1)),
        *(((1 << 63) - 512, 1024), ((1 << 64) - 512, 512), ((1 << 64) - 512, 1024)),
    ]:
        for number, call, arguments in commands(h, offset, length):
            refused(h, number, call, *arguments)
    for number, call, arguments in commands(h, size - 512, 512):
        equal(error(call, *arguments), 0, f"{number} at the very end")


def check_trim_and_zero_longer_than_any_payload(uri, kind):
    h = connect(uri, ALLOCATION)
    size = h.get_size()
    for number, call in (errno.EINVAL, h.trim), (errno.ENOSPC, h.zero), (errno.EINVAL, h.cache):
        equal(error(call, size, 0), 0, call.__name__)
        refused(h, number, call, 0xFFFFF000, PAGE)


def check_oversize(uri, kind):
    # nbdkit's core takes 64 MiB, all that libnbd sends, whatever block sizes a plugin tells.
    number = errno.EINVAL if kind == "zramd" else 0
    h = connect(uri)
    length = 32 * MIB + 1
    equal(len(h.pread(32 * MIB, 0)), 32 * MIB)
    equal(error(h.pwrite, bytes(32 * MIB), 0), 0)
    refused(h, number, h.pread, length, 0)
    refused(h, number, h.pwrite, bytes(length), 0)
    refused(h, errno.ENOSPC, h.pwrite, bytes(length), h.get_size() - MIB)
    refused(h, errno.EINVAL, h.pread, length, h.get_size() - MIB)


def check_unaligned(uri, kind):
    h = connect(uri, ALLOCATION)
    for number, call, arguments in commands(h, 4095, 3):
        equal(error(call, *arguments), 0, f"unaligned {call.__name__}, not {number}")
    h.pwrite(b"abcdef" * PAGE, 1)
    h.zero(PAGE, 3)
    wanted = b"\0ab" + bytes(PAGE) + (b"abcdef" * PAGE)[PAGE + 2 :]
    equal(bytes(h.pread(6 * PAGE + 1, 0)), wanted, "what unaligned requests leave")
    h.trim(2 * PAGE, 3 * PAGE - 1)  # whole pages only
    wanted = wanted[: 3 * PAGE] + bytes(PAGE) + wanted[4 * PAGE :]
    equal(bytes(h.pread(6 * PAGE + 1, 0)), wanted, "what an unaligned trim leaves")
    # One byte of a page is asked about: the answer ends with the request, not before it.
    equal(extents(h, 1, 2 * PAGE + 5), {ALLOCATION: [(1, 0)]})
    equal(extents(h, PAGE, 2 * PAGE + 5), {ALLOCATION: [(PAGE - 5, 0), (5, 3)]})


def check_zero_size(uri, kind):
    h = connect(uri, ALLOCATION)
    for number, call, arguments in commands(h, 0, 0):
        # Unspecified. To nbdkit's core an empty range lies beyond the end, and is answered so.
        refused(h, errno.EINVAL if kind == "zramd" else number, call, *arguments)


def check_block_status_that_was_not_negotiated(uri, kind):
    for structured in (True, False):
        h = connect(uri, structured=structured)
        equal(h.get_structured_replies_negotiated(), structured)
        refused(h, errno.EINVAL, h.block_status, PAGE, 0, lambda *_: 0)


def check_foreign_and_unknown_flags(uri, kind):
    h = connect(uri, ALLOCATION)
    allowed = {
        "pread": {"FUA", "DF"},
        "pread_structured": {"FUA", "DF"},
        "pwrite": {"FUA"},
        "flush": {"FUA"},
        "trim": {"FUA"},
        "zero": {"FUA", "NO_HOLE", "FAST_ZERO"},
        "cache": {"FUA"},
        "block_status": {"FUA", "REQ_ONE"},
    }
    for _, call, arguments in [*commands(h, 0, PAGE), (0, h.flush, ())]:
        for name, flag in FLAGS.items():
            if name in allowed[call.__name__]:
                equal(error(call, *arguments, flags=flag), 0, f"{name} on {call.__name__}")
            else:
                refused(h, errno.EINVAL, call, *arguments, flags=flag)


def check_df_without_structured_replies(uri, kind):
    h = connect(uri, structured=False)
    equal(h.can_df(), False)
    refused(h, errno.EINVAL, h.pread, PAGE, 0, flags=nbd.CMD_FLAG_DF)


def check_what_a_read_only_export_refuses(uri, kind):
    h = connect(uri, ALLOCATION)
    equal(h.is_read_only(), True)
    equal([h.can_trim(), h.can_zero(), h.can_fast_zero()], [False] * 3)
    equal([h.can_df(), h.can_cache(), h.can_multi_conn()], [True] * 3)
    # nbdkit's core has no FUA where nothing can be written.
    equal([h.can_flush(), h.can_fua()], [True, kind == "zramd"])
    writing = ("pwrite", "trim", "zero")
    for _, call, arguments in commands(h, 0, PAGE):
        if call.__name__ in writing:
            refused(h, errno.EPERM, call, *arguments)
        else:
            equal(error(call, *arguments), 0, call.__name__)
    refused(h, errno.EPERM, h.pwrite, bytes(MIB), 0)
    equal(whole_map(h, ALLOCATION), [(h.get_size(), 3)])


def check_a_full_store(uri, kind):
    """ENOSPC for what takes room, and the old content stays; there is room again when told so."""
    h = connect(uri)
    h.pwrite(b"kept" * 1024, 0)
    equal(error(h.pwrite, random.Random(2).randbytes(8 * MIB), MIB), errno.ENOSPC)
    equal(bytes(h.pread(PAGE, 0)), b"kept" * 1024)
    equal(error(h.zero, 8 * MIB, MIB, flags=nbd.CMD_FLAG_FAST_ZERO), 0)
    equal(error(h.pwrite, random.Random(3).randbytes(MIB // 2), MIB), 0)


# Data


def check_df_and_the_chunks_of_a_read(uri, kind):
    h = connect(uri)
    lay_out(h)
    plain = bytes(h.pread(MIB, 0))
    for flags in (0, nbd.CMD_FLAG_DF):
        pieces = []

        def collect(data, offset, status, error, pieces=pieces):
            equal(error.value, 0)
            pieces.append((offset, bytes(data), status))

        equal(bytes(h.pread_structured(MIB, 0, collect, flags)), plain)
        if flags:
            equal(len(pieces), 1, "chunks with DF")
        for offset, data, status in pieces:
            if status == nbd.READ_DATA:
                equal(data, plain[offset : offset + len(data)])
            else:
                equal(status, nbd.READ_HOLE)
    kinds = []
    h.pread_structured(MIB, 8 * MIB, lambda _d, _o, status, _e: kinds.append(status) or 0)
    # nbdkit's core sends data only.
    equal(kinds, [nbd.READ_HOLE if kind == "zramd" else nbd.READ_DATA], "a hole")
    h.pread_structured(PAGE, 2 * PAGE, lambda _d, _o, status, _e: kinds.append(status) or 0)
    equal(kinds[1:], [nbd.READ_DATA], "data")


def check_fua_and_flush_are_seen_by_other_connections(uri, kind):
    one, other = connect(uri), connect(uri)
    equal([one.can_fua(), one.can_flush(), one.can_multi_conn()], [True] * 3)
    for n, h, seen in (1, one, other), (2, other, one):
        h.pwrite(bytes([n]) * PAGE, 0, nbd.CMD_FLAG_FUA)
        equal(bytes(seen.pread(PAGE, 0)), bytes([n]) * PAGE)
        h.pwrite(bytes([n + 7]) * PAGE, 0)
        h.flush()
        equal(bytes(seen.pread(PAGE, 0)), bytes([n + 7]) * PAGE)
        h.zero(PAGE, 0, nbd.CMD_FLAG_FUA)
        equal(bytes(seen.pread(PAGE, 0)), bytes(PAGE))
        h.pwrite(b"1" * PAGE, 0)
        h.trim(PAGE, 0, nbd.CMD_FLAG_FUA)
        equal(bytes(seen.pread(PAGE, 0)), bytes(PAGE))


def check_cache_changes_nothing(uri, kind):
    h = connect(uri, ALLOCATION)
    equal(h.can_cache(), True)
    lay_out(h)
    before = bytes(h.pread(MIB, 0))
    equal(error(h.cache, h.get_size(), 0), 0)
    equal(bytes(h.pread(MIB, 0)), before)
    equal(whole_map(h, ALLOCATION), allocation_of(h))


def check_what_the_kinds_of_zeros_leave(uri, kind):
    h = connect(uri, ALLOCATION)
    equal([h.can_zero(), h.can_fast_zero()], [True, True])
    for flags in (0, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_FAST_ZERO, nbd.CMD_FLAG_FUA):
        h.pwrite(TEXT * 4, 0)
        h.zero(2 * PAGE, PAGE, flags)
        equal(bytes(h.pread(4 * PAGE, 0)), TEXT + bytes(2 * PAGE) + TEXT)
        # A compressed store has nothing to set aside for zeros: NO_HOLE makes holes, too.
        wanted = [(PAGE, 0), (2 * PAGE, 3), (PAGE, 0)]
        equal(extents(h, 4 * PAGE, 0), {ALLOCATION: wanted}, f"zeroes with flags {flags}")
    h.pwrite(bytes(2 * PAGE), PAGE)
    wanted = [(PAGE, 0), (2 * PAGE, 2), (PAGE, 0)]
    equal(extents(h, 4 * PAGE, 0), {ALLOCATION: wanted}, "zeros that were written")
    h.trim(2 * PAGE, PAGE)
    wanted = [(PAGE, 0), (2 * PAGE, 3), (PAGE, 0)]
    equal(extents(h, 4 * PAGE, 0), {ALLOCATION: wanted}, "trimmed")


def check_many_requests_in_flight(uri, kind):
    """Four connections, each with 16 requests under way in its own quarter, checked by a model."""
    chance = random.Random(5)
    connections = [connect(uri) for _ in range(4)]
    quarter = connections[0].get_size() // 4
    part = 2 * MIB
    model = [bytearray(part) for _ in connections]

    def one_round(n, h):
        # Disjoint pieces, or their order would be the server's to choose.
        piece = part // 16
        for i in range(16):
            length = chance.randrange(1, piece)
            at = i * piece + chance.randrange(piece - length)
            offset = n * quarter + at
            what = chance.choice(("write", "write", "zero", "read"))
            if what == "write":
                data = chance.randbytes(length // 2 + 1) * 2
                data = data[:length]
                model[n][at : at + length] = data
                buffer = nbd.Buffer.from_bytearray(bytearray(data))
                yield h.aio_pwrite(buffer, offset), None, b""
            elif what == "zero":
                model[n][at : at + length] = bytes(length)
                yield h.aio_zero(length, offset), None, b""
            else:
                buffer = nbd.Buffer(length)
                yield h.aio_pread(buffer, offset), buffer, bytes(model[n][at : at + length])

    for _ in range(25):
        sent = [list(one_round(n, h)) for n, h in enumerate(connections)]
        for h, requests in zip(connections, sent, strict=True):
            for cookie, buffer, wanted in requests:
                while not h.aio_command_completed(cookie):
                    h.poll(-1)
                if buffer is not None:
                    assert bytes(buffer.to_bytearray()) == wanted
    other = connect(uri)
    for n, content in enumerate(model):
        assert bytes(other.pread(part, n * quarter)) == bytes(content), n


# Block status


def check_block_status_of_the_whole_device(uri, kind):
    h = connect(uri, ALLOCATION, STATE)
    contexts = {ALLOCATION, STATE} if kind == "zramd" else {ALLOCATION}
    # nbdkit's core has the one context that its plugins can fill.
    equal({c for c in (ALLOCATION, STATE) if h.can_meta_context(c)}, contexts)
    equal(set(extents(h, h.get_size(), 0)), contexts)
    equal(whole_map(h, ALLOCATION), [(h.get_size(), 3)])
    lay_out(h)
    equal(whole_map(h, ALLOCATION), allocation_of(h))
    if kind == "zramd":
        equal(whole_map(h, STATE), state_of(h))


def check_block_status_of_a_part(uri, kind):
    h = connect(uri, ALLOCATION)
    lay_out(h)
    # Neighbours are merged, and nothing is told beyond what was asked.
    equal(extents(h, 3 * PAGE, PAGE), {ALLOCATION: [(PAGE, 3), (2 * PAGE, 0)]})
    equal(extents(h, PAGE, 3 * PAGE), {ALLOCATION: [(PAGE, 0)]})


def check_block_status_req_one(uri, kind):
    h = connect(uri, ALLOCATION, STATE)
    lay_out(h)
    for at, wanted in (0, (2 * PAGE, 3)), (2 * PAGE, (3 * PAGE, 0)), (5 * PAGE, (PAGE, 2)):
        found = extents(h, 6 * PAGE - at, at, nbd.CMD_FLAG_REQ_ONE)
        equal(found[ALLOCATION], [wanted], f"at {at}")
        if kind == "zramd":
            equal(len(found[STATE]), 1)


def check_block_status_of_a_scattered_device(uri, kind):
    h = connect(uri, ALLOCATION)
    for page in range(0, 4000, 2):
        h.pwrite(b"x" * PAGE, page * PAGE)
    wanted = [(PAGE, 0 if page % 2 == 0 else 3) for page in range(3999)]
    rest = (h.get_size() - 3999 * PAGE, 3)
    equal(whole_map(h, ALLOCATION), [*wanted, rest])


# Options


def contexts_listed(h):
    found = []
    equal(h.opt_list_meta_context(lambda name: found.append(name) or 0), len(found))
    return found


def check_opt_list(uri, kind):
    h = connect(uri, opt_mode=True)
    found = []
    equal(h.opt_list(lambda name, description: found.append((name, description)) or 0), 1)
    ((name, description),) = found
    equal(name, "zram0")
    assert kind == "zramd" or "zramd" in description, description
    # nbdkit's core lists once only.
    again = error(h.opt_list, lambda *_: 0)
    equal(again, 0 if kind == "zramd" else errno.ENOTSUP, "again")
    h.opt_go()
    lives(h)


def check_opt_info(uri, kind):
    h = connect(uri, opt_mode=True)
    h.set_full_info(True)
    h.set_export_name("zram0")
    h.opt_info()
    size = h.get_size()
    equal(h.get_canonical_export_name(), "zram0")
    assert "zramd" in h.get_export_description(), h.get_export_description()
    equal(h.is_read_only(), False)
    sizes = [h.get_block_size(n) for n in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)]
    equal(sizes, [1, PAGE, 32 * MIB])
    h.set_export_name("other")
    equal(error(h.opt_info), errno.ENOENT)
    # An export that is not there leaves nothing that is known of another.
    assert error(h.get_size) != 0
    equal(error(h.opt_go), errno.ENOENT)
    h.set_export_name("")
    h.opt_info()
    equal(h.get_size(), size)
    equal(h.get_canonical_export_name(), "zram0")
    h.opt_go()
    equal(h.get_size(), size)
    lives(h)


def check_opt_list_meta_context(uri, kind):
    h = connect(uri, opt_mode=True)
    wanted = [ALLOCATION, STATE] if kind == "zramd" else [ALLOCATION]
    equal(contexts_listed(h), wanted, "all")
    for query, found in (
        *((ALLOCATION, [ALLOCATION]), ("base:", [ALLOCATION]), ("base:nothing", [])),
        *(("zramd:", wanted[1:]), (STATE, wanted[1:]), ("nobody:", []), ("base", [])),
    ):
        h.clear_meta_contexts()
        h.add_meta_context(query)
        equal(contexts_listed(h), found, query)
    h.clear_meta_contexts()
    h.set_export_name("other")
    # nbdkit's core does not ask the plugin about the name: LIST of any export has its context.
    number = errno.ENOENT if kind == "zramd" else 0
    equal(error(h.opt_list_meta_context, lambda _: 0) == 0, number == 0, "another export")
    h.set_export_name("")
    h.opt_go()
    lives(h)


def check_opt_set_meta_context(uri, kind):
    """libnbd sets the contexts as a part of opt_go; from 1.16 on by itself, too."""
    h = connect(uri, opt_mode=True)
    for context in (ALLOCATION, STATE, "nobody:knows"):
        h.add_meta_context(context)
    if hasattr(h, "opt_set_meta_context"):
        found = []
        h.opt_set_meta_context(lambda name: found.append(name) or 0)
        equal(found, [ALLOCATION, STATE] if kind == "zramd" else [ALLOCATION])
    h.opt_go()
    equal(h.can_meta_context(ALLOCATION), True)
    equal(h.can_meta_context(STATE), kind == "zramd")
    equal(h.can_meta_context("nobody:knows"), False)
    lives(h)


def check_a_wildcard_sets_nothing(uri, kind):
    h = connect(uri, "base:", "zramd:")
    equal([h.can_meta_context(c) for c in (ALLOCATION, STATE, "base:")], [False] * 3)
    refused(h, errno.EINVAL, h.block_status, PAGE, 0, lambda *_: 0)


def check_opt_abort(uri, kind):
    h = connect(uri, opt_mode=True)
    h.opt_abort()
    equal(h.aio_is_closed(), True)


def check_without_structured_replies(uri, kind):
    h = connect(uri, structured=False)
    equal(h.get_structured_replies_negotiated(), False)
    lay_out(h)
    assert bytes(h.pread(PAGE, 3 * PAGE)) == b"01234567" * 512
    refused(h, errno.EINVAL, h.pread, PAGE, h.get_size())


def check_another_handshake(uri, kind):
    """NBD_OPT_EXPORT_NAME, with the 124 zeroes and without."""
    for flags in (0, nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_NO_ZEROES, 3):
        h = nbd.NBD()
        h.set_strict_mode(0)
        h.set_handshake_flags(flags)
        h.connect_uri(uri)
        equal(h.get_size(), 64 * MIB, f"handshake flags {flags}")
        lives(h)


def check_a_shutdown_lets_what_is_in_flight_end(uri, kind):
    h = connect(uri)
    data = bytearray(random.Random(3).randbytes(MIB))
    cookies = [h.aio_pwrite(nbd.Buffer.from_bytearray(data), n * MIB) for n in range(16)]
    h.shutdown()
    for cookie in cookies:
        equal(h.aio_command_completed(cookie), True)
    other = connect(uri)
    for n in range(16):
        assert other.pread(MIB, n * MIB) == data, n


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])

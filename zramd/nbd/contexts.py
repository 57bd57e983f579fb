"""Metadata contexts: what a client can have NBD_CMD_BLOCK_STATUS tell of the pages.

    base:allocation     the specification's: NBD_STATE_HOLE, NBD_STATE_ZERO
    zramd:state         how a page is stored: 0 hole, 1 same-filled, 2 compressed, 3 huge, 4 lost

A page of zeros that were written takes no room, but is no hole: ZERO, and same-filled. Nothing is
promised of what is no hole: in a full store, any write may get ENOSPC.
"""

from collections.abc import Iterable
from typing import Final

from zramd.nbd.wire import NBD_STATE_HOLE, NBD_STATE_ZERO
from zramd.store.table import Kind

_BASE, _STATE = 1, 2  # the numbers that stand for them on the wire

CONTEXTS: Final = {"base:allocation": _BASE, "zramd:state": _STATE}

_FLAGS: Final[dict[int, dict[Kind, int]]] = {
    _BASE: {Kind.HOLE: NBD_STATE_HOLE | NBD_STATE_ZERO, Kind.ZERO: NBD_STATE_ZERO},
    _STATE: {Kind.ZERO: 1, Kind.SAME: 1, Kind.COMPRESSED: 2, Kind.HUGE: 3, Kind.LOST: 4},
}
"""What is not here is 0."""


def listed(queries: list[str]) -> list[str]:
    """The contexts that NBD_OPT_LIST_META_CONTEXT asks for: by name, by the name of all that are of
    one kind (`base:`), or all."""
    names = list(CONTEXTS)
    return [name for name in names if name in queries or _family(name) in queries or not queries]


def _family(name: str) -> str:
    return name[: name.index(":") + 1]


def described(context: int, extents: Iterable[tuple[int, Kind]]) -> list[tuple[int, int]]:
    """(bytes, flags) as this context has them, neighbours merged."""
    flags = _FLAGS[context]
    told: list[tuple[int, int]] = []
    run, status = 0, 0
    for size, kind in extents:  # twice as fast as groupby
        its_status = flags.get(kind, 0)
        if its_status != status and run:
            told.append((run, status))
            run = 0
        run, status = run + size, its_status
    return [*told, (run, status)] if run else told

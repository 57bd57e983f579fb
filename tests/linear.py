"""Whether an order of their operations explains what several clients saw of one register.

A history is linearizable when every operation can be given a moment between its start and its end
so that each read returns what the last write before it wrote. `fault` looks for such an order as
Wing and Gong do: of the operations that may come next, those that started before any other ended,
try each. As Lowe does, it goes on only once from a state, which is the set of operations that are
behind and the value they have left: what comes after depends on nothing else.

Two things make it fast. A history is cut where nothing is under way, and all that the first part
hands to the next is the set of values that it may have left. And a read that may come next and sees
the present value is taken at once: it changes nothing, so no order is lost by it.

The worst case is exponential in the number of writes that are under way at one time.
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple


class Op(NamedTuple):
    """A write of `value`, or a read that returned it. One that ends at the moment at which another
    starts may come before or after it."""

    start: int
    end: int
    is_write: bool
    value: Hashable


def fault(history: Iterable[Op], initial: Hashable) -> list[Op]:
    """The first part of the history that no order explains; empty where it is linearizable."""
    values = {initial}
    for part in _parts(sorted(history, key=attrgetter("start"))):
        values = _left_by(part, values)
        if not values:
            return part
    return []


def _parts(ops: Sequence[Op]) -> Iterator[list[Op]]:
    """Cut at the moments when nothing is under way; `ops` are in the order of their starts."""
    part: list[Op] = []
    end = 0
    for op in ops:
        if part and op.start > end:
            yield part
            part = []
        end = max(end, op.end) if part else op.end
        part.append(op)
    if part:
        yield part


def _left_by(ops: list[Op], values: set[Hashable]) -> set[Hashable]:
    """Every value that some order of all of `ops` may leave, from one of `values`."""
    left: set[Hashable] = set()
    todo = [(0, value) for value in values]
    seen = set(todo)
    while todo:
        behind, value = todo.pop()  # `behind` has bit i set where ops[i] is
        behind, writes = _writes_next(ops, behind, value)
        if behind + 1 == 1 << len(ops):
            left.add(value)
        for i in writes:
            state = behind | 1 << i, ops[i].value
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return left


def _writes_next(ops: list[Op], behind: int, value: Hashable) -> tuple[int, list[int]]:
    """Take the reads that see `value` now; what is behind then, and the writes that may follow."""
    while True:
        writes, taken = [], 0
        first_end = None
        at = (~behind & behind + 1).bit_length() - 1  # the first that is not behind
        for i in range(at, len(ops)):
            op = ops[i]
            if first_end is not None and op.start > first_end:
                break  # it, and all later ones, must come after one that is not behind
            if behind >> i & 1:
                continue
            if first_end is None or op.end < first_end:
                first_end = op.end
            if op.is_write:
                writes.append(i)
            elif op.value == value:
                taken |= 1 << i
        if not taken:
            return behind, writes
        behind |= taken

"""The checker finds what it is for, and agrees with trying every order."""

import random
from itertools import permutations

import pytest

from tests.linear import Op, fault


def write(start: int, end: int, value: int) -> Op:
    return Op(start, end, True, value)


def read(start: int, end: int, value: int) -> Op:
    return Op(start, end, False, value)


def some_order_explains(history: list[Op]) -> bool:
    """By trying them all."""
    return any(explains(order) for order in permutations(history))


def explains(order: tuple[Op, ...]) -> bool:
    value = 0
    latest_start = -1
    for op in order:
        if op.end < latest_start:
            return False  # it had ended before one that comes earlier in this order started
        latest_start = max(latest_start, op.start)
        if op.is_write:
            value = op.value
        elif op.value != value:
            return False
    return True


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([], id="nothing"),
        pytest.param([read(0, 1, 0)], id="a read of the initial value"),
        pytest.param([write(0, 1, 1), read(2, 3, 1)], id="a read of what was written"),
        pytest.param([write(0, 9, 1), read(1, 2, 0), read(3, 4, 1)], id="during a write: old, new"),
        pytest.param([write(0, 9, 1), read(1, 5, 1), read(2, 6, 0)], id="two reads at once"),
        pytest.param([write(0, 5, 1), write(1, 6, 2), read(7, 8, 1)], id="writes at once: first"),
        pytest.param([write(0, 5, 1), write(1, 6, 2), read(7, 8, 2)], id="writes at once: second"),
        pytest.param(
            [write(0, 1, 1), write(2, 9, 0), read(3, 4, 1), read(5, 6, 0), read(10, 11, 0)],
            id="a discard takes effect between two reads",
        ),
        pytest.param(
            [write(0, 9, 1), write(0, 9, 0), read(10, 11, 1), read(12, 13, 1)],
            id="a discard before the write beside it",
        ),
        pytest.param([write(0, 1, 1), read(1, 2, 0)], id="an end at a start orders nothing"),
        pytest.param(
            [write(0, 9, 1), write(0, 9, 2), read(1, 2, 1), read(3, 4, 2), read(10, 11, 2)],
            id="reads that order two writes",
        ),
    ],
)
def test_what_some_order_explains_is_no_fault(history):
    assert some_order_explains(history)
    assert fault(history, 0) == []


@pytest.mark.parametrize(
    "history",
    [
        pytest.param([write(0, 1, 1), read(2, 3, 0)], id="stale read"),
        pytest.param([write(0, 1, 1), read(2, 3, 7)], id="never written"),
        pytest.param([read(0, 1, 1), write(2, 3, 1)], id="from the future"),
        pytest.param([write(0, 9, 1), read(1, 2, 1), read(3, 4, 0)], id="new, then old"),
        pytest.param([write(0, 1, 1), write(2, 3, 2), read(4, 5, 1)], id="lost write"),
        pytest.param([write(0, 1, 1), write(2, 3, 0), read(4, 5, 1)], id="lost discard"),
        pytest.param([write(0, 1, 0), write(2, 3, 1), read(4, 5, 0)], id="a discard come late"),
        pytest.param(
            [write(0, 9, 1), write(0, 9, 2), read(10, 11, 1), read(12, 13, 2)],
            id="two writes at once, both last",
        ),
        pytest.param(
            [write(0, 9, 1), write(0, 9, 2), read(1, 2, 1), read(3, 4, 2), read(10, 11, 1)],
            id="against the order that reads have seen",
        ),
        pytest.param(
            [write(0, 1, 1), write(2, 9, 0), read(3, 4, 0), read(5, 6, 1)],
            id="a discard that comes and goes",
        ),
    ],
)
def test_what_no_order_explains_is_a_fault(history):
    assert not some_order_explains(history)
    assert fault(history, 0)


def test_the_part_that_no_order_explains_is_told():
    before = [write(10 * i, 10 * i + 5, i) for i in range(50)]
    wrong = [write(500, 505, 50), read(501, 506, 48)]
    after = [read(600, 605, 50)]
    assert fault(after + wrong + before, 0) == wrong


def test_it_agrees_with_trying_every_order():
    chance = random.Random(1)
    outcomes = {True: 0, False: 0}
    for _ in range(3000):
        history = []
        for _ in range(chance.randint(1, 6)):
            start = chance.randrange(12)
            end = start + chance.randint(1, 6)
            history.append(Op(start, end, chance.random() < 0.5, chance.randrange(3)))
        expected = some_order_explains(history)
        assert (fault(history, 0) == []) == expected, history
        outcomes[expected] += 1
    assert min(outcomes.values()) > 500


def of_a_right_register(chance: random.Random, length: int, at_once: int) -> list[Op]:
    """A history of a register that does each operation at one moment of its time."""
    history = []
    value = 0
    for moment in range(length):
        start = moment * 10 - chance.randrange(10 * at_once)
        end = moment * 10 + chance.randrange(10 * at_once)
        is_write = chance.random() < 0.5
        if is_write:
            value = 0 if chance.random() < 0.2 else moment + 1
        history.append(Op(start, end, is_write, value))
    chance.shuffle(history)
    return history


@pytest.mark.parametrize("at_once", [1, 3, 6])
def test_what_a_right_register_did_is_no_fault(at_once):
    assert fault(of_a_right_register(random.Random(at_once), 5000, at_once), 0) == []


def test_one_wrong_read_is_a_fault_where_no_order_explains_it():
    chance = random.Random(2)
    faults = 0
    for _ in range(500):
        history = of_a_right_register(chance, 6, 2)
        assert fault(history, 0) == []
        at = chance.randrange(len(history))
        history[at] = history[at]._replace(is_write=False, value=chance.randrange(7))
        expected = some_order_explains(history)
        assert (fault(history, 0) == []) == expected, history
        faults += not expected
    assert faults > 100


def test_one_lost_write_among_thousands_is_found():
    history = [write(10 * i, 10 * i + 12, i) for i in range(3000)]
    history += [read(10 * i + 8, 10 * i + 9, i) for i in range(3000)]
    assert fault(history, -1) == []
    history[3000 + 1234] = read(12348, 12349, 1232)
    assert read(12348, 12349, 1232) in fault(history, -1)

"""The scheduler: by its reduction it leaves out no result that brute force finds."""

import random

import pytest

from tests import schedules
from tests.schedules import Deadlock, Endless, Event, Lock, explore


class Box:
    def __init__(self) -> None:
        self.a = self.b = 0


def program(dice: random.Random) -> list[tuple[str, str]]:
    """What a thread does: looks and changes, some of them in a lock, or a kick between them."""
    steps = [
        (dice.choice(["look", "change", "change"]), dice.choice("ab"))
        for _ in range(dice.randrange(2, 4))
    ]
    kind = dice.random()
    if kind < 0.6:
        first = dice.randrange(len(steps))
        steps.insert(dice.randrange(first, len(steps)) + 1, ("give", ""))
        steps.insert(first, (dice.choice(["take", "take", "try"]), ""))
    elif kind < 0.8:
        steps.insert(dice.randrange(len(steps) + 1), ("kick", ""))
    return steps


def outcomes(programs: list[list[tuple[str, str]]], weak: bool, reduce: bool) -> tuple[set, int]:
    """All that can come of these programs, and in how many runs that was found."""
    found = set()
    state = {}

    def run(me: int, steps: list[tuple[str, str]]) -> None:
        box, lock, seen = state["box"], state["lock"], state["seen"][me]
        held = True
        for number, (step, what) in enumerate(steps):
            if step == "look":
                seen.append(getattr(box, what))
            elif step == "change":
                setattr(box, what, (me, number))
            elif step == "kick":
                schedules.kick()
            elif step == "give":
                if held:
                    lock.release()
            else:
                held = lock.acquire(blocking=step == "take")
                seen.append(held)

    def make():
        state.update(box=Box(), lock=Lock(), seen=[[] for _ in programs])
        return [lambda me=me, steps=steps: run(me, steps) for me, steps in enumerate(programs)]

    def check() -> None:
        box = state["box"].__dict__
        found.add((box["a"], box["b"], tuple(map(tuple, state["seen"]))))

    runs = explore([Box], make, check=check, weak=weak, reduce=reduce)
    return found, runs


@pytest.mark.parametrize("weak", [False, True], ids=["one memory", "store buffers"])
def test_the_reduction_loses_no_outcome(weak):
    reduced_runs = all_runs = tried = 0
    for seed in range(1000):
        dice = random.Random(seed)
        programs = [program(dice) for _ in range(2 if weak else dice.choice([2, 3]))]
        if sum(map(len, programs)) > (5 if weak else 7):
            continue
        reduced, few = outcomes(programs, weak, reduce=True)
        everything, many = outcomes(programs, weak, reduce=False)
        assert reduced == everything, f"seed {seed}: {programs}"
        reduced_runs, all_runs, tried = reduced_runs + few, all_runs + many, tried + 1
        if all_runs > 50_000:
            break
    assert tried > 10
    assert reduced_runs < all_runs / 20


def test_threads_that_do_not_meet_need_one_run():
    def make():
        boxes = [Box(), Box(), Box()]
        return [lambda box=box: setattr(box, "a", box.a + 1) for box in boxes]

    assert explore([Box], make) == 1


def test_a_store_buffer_shows_what_one_memory_cannot():
    """Two that each change one thing and then look at the other: Dekker's trap."""
    one = [("change", "a"), ("look", "b")]
    other = [("change", "b"), ("look", "a")]
    unseen = ((0,), (0,))
    assert unseen not in {seen for _, _, seen in outcomes([one, other], False, True)[0]}
    assert unseen in {seen for _, _, seen in outcomes([one, other], True, True)[0]}
    kicked = [one[0], ("kick", ""), one[1]]
    assert unseen not in {seen for _, _, seen in outcomes([kicked, other], True, True)[0]}


def test_two_locks_taken_in_two_orders_are_a_deadlock():
    def make():
        one, other = Lock(), Lock()

        def both(first: Lock, second: Lock) -> None:
            with first, second:
                pass

        return [lambda: both(one, other), lambda: both(other, one)]

    with pytest.raises(Deadlock):
        explore([], make)


def test_an_event_that_nobody_sets_is_a_deadlock():
    with pytest.raises(Deadlock):
        explore([], lambda: [Event().wait])


def test_a_thread_that_waits_in_circles_is_endless():
    def make():
        box = Box()

        def wait() -> None:
            while not box.a:
                pass

        return [lambda: setattr(box, "a", 1), wait]

    with pytest.raises(Endless):
        explore([Box], make)


def test_a_failure_tells_the_order_of_its_steps_and_the_classes_are_as_before():
    def make():
        box = Box()

        def look() -> None:
            assert box.a == 0

        return [look, lambda: setattr(box, "a", 1)]

    with pytest.raises(AssertionError) as found:
        explore([Box], make)
    assert "1:change" in found.value.__notes__[0]
    box = Box()
    box.a = 5
    assert box.__dict__ == {"a": 5, "b": 0}
    assert "a" not in vars(Box)

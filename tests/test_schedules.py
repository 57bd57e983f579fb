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


MEMORY = 4


def crashes(programs: list[list[tuple]], reduce: bool) -> tuple[set, set, int]:
    """What threads can leave in a memory if they are stopped at any moment; what there is in the
    end, with what each has seen; and in how many runs that was found."""
    found, ends = set(), set()
    state = {}

    def run(me: int, steps: list[tuple]) -> None:
        for number, (step, *part) in enumerate(steps):
            if step == "take":
                state["lock"].acquire()
            elif step == "give":
                state["lock"].release()
            elif step == "mark":
                state["stores"][schedules.mark()] = me, number, 0, 0
            else:
                at = state["shared"].touch(change=step == "change", part=tuple(part))
                if step == "change":
                    state["stores"][at] = me, number, *part
                    state["memory"][slice(*part)] = [(me, number)] * (part[1] - part[0])
                else:
                    state["seen"][me].append(tuple(state["memory"][slice(*part)]))

    def make():
        state.update(shared=schedules.Shared(), lock=Lock(), stores={})
        state.update(memory=[None] * MEMORY, seen=[[] for _ in programs])
        return [lambda me=me, steps=steps: run(me, steps) for me, steps in enumerate(programs)]

    def after(memory: tuple, store: tuple) -> tuple:
        """The bytes, each with who wrote it, and the last step of each thread."""
        me, number, start, stop = store
        content, done = memory
        content = content[:start] + ((me, number),) * (stop - start) + content[stop:]
        return content, (*done[:me], number, *done[me + 1 :])

    def check() -> None:
        stores = state["stores"]
        ends.add((*state["memory"], *map(tuple, state["seen"])))
        memory = (None,) * MEMORY, (-1,) * len(programs)
        if reduce:
            at = {}
            for cut, before, step in schedules.cuts(stores):
                at[cut] = memory if before is None else after(at[before], stores[step])
            found.update(at.values())
        else:
            found.add(memory)
            for store in stores.values():
                memory = after(memory, store)
                found.add(memory)

    runs = explore([], make, check=check, reduce=reduce)
    return found, ends, runs


def stores(dice: random.Random) -> list[tuple]:
    """What a thread does to parts of a memory, a piece of it under a lock."""
    steps = []
    for _ in range(dice.randrange(1, 4)):
        start = dice.randrange(MEMORY)
        kind = dice.choice(["change", "change", "look", "mark"])
        steps.append((kind, start, dice.randrange(start, MEMORY) + 1))
    if dice.random() < 0.7:
        first = dice.randrange(len(steps))
        steps.insert(dice.randrange(first, len(steps)) + 1, ("give",))
        steps.insert(first, ("take",))
    return steps


def test_the_moments_of_the_runs_are_all_that_brute_force_passes_through():
    few_runs = all_runs = 0
    for seed in range(300):
        dice = random.Random(seed)
        programs = [stores(dice) for _ in range(dice.choice([2, 3]))]
        if sum(map(len, programs)) > 8 or not any("change" in s for p in programs for s in p):
            continue
        *reduced, few = crashes(programs, reduce=True)
        *everything, many = crashes(programs, reduce=False)
        assert reduced == everything, f"seed {seed}: {programs}"
        few_runs, all_runs = few_runs + few, all_runs + many
        if all_runs > 10_000:
            break
    assert few_runs < all_runs / 50


def test_the_threads_of_a_run_that_is_broken_off_are_unwound_at_once():
    """Not when their garbage is collected, in the middle of another run."""
    inside = []

    def make():
        assert not inside
        one, other = Lock(), Lock()

        def both(first: Lock, second: Lock) -> None:
            inside.append(None)
            try:
                with first, second:
                    pass
            finally:
                inside.pop()

        return [lambda: both(one, other), lambda: both(other, one)]

    with pytest.raises(Deadlock):
        explore([], make)
    assert not inside

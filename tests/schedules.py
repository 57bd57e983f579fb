"""Every order in which a few threads can take their steps, one run for each that differs.

`explore` runs functions, each as a thread of a world in which only one thing happens at a time: a
scheduler lets one thread go on until just before its next step, then chooses anew. A step is what
another thread can notice: a look at a watched attribute or a change of it, taking a lock or giving
it back, setting an event or waiting for it, a thread's death. So a thread can be preempted before
and after each of them, and there is no sleeping and no chance in it. Two that wait for each other
are a Deadlock, and a run that does not end is Endless.

Two orders differ when two steps that conflict (one attribute, and one of them a change; one lock)
come in another order. All others give the same result, and one run of each such class is enough:
dynamic partial order reduction with source sets and sleep sets (Abdulla, Aronis, Jonsson, Sagonas:
Optimal dynamic partial order reduction, POPL 2014). With `reduce=False` all orders are run.

With `weak`, a thread's changes wait in a store buffer, in their order, and reach the others at any
later moment; its own looks see them at once. That is x86's memory, and all that release stores and
acquire loads promise: attributes in Python without the GIL. Locks and events empty the buffer of
the thread that uses them, `kick` (for membarrier(2)) the buffers of all.

What a thread does between two steps nobody can notice but who looks at all of memory at once, as
a crash does: to him two steps that do not conflict are two moments more. `cuts` has these moments,
all that lie in the present run and in those it stands for.

What is watched finds itself: an attribute, of the classes named, that a thread changes once the
object has been made. When a run comes upon a new one, all begins anew. Containers may be changed in
place only under a lock: that is not seen. Threads are greenlets; a real one is never waited for.
"""

import functools
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple

import greenlet

Op = tuple[str, Any]
"""What a thread does next, and to what."""

_MOST_STEPS = 2000
"""In one run. The longest here have 150."""


class Part(NamedTuple):
    """What a step is on, where that is a part of a thing: it conflicts with what overlaps it."""

    of: Any
    start: int
    stop: int


class Deadlock(AssertionError):
    """Some threads wait, and no other can go on."""


class Endless(AssertionError):
    """A run goes on and on."""


class _Unwatched(BaseException):
    """A thread has changed an attribute that is not watched yet."""


def explore(
    classes: Iterable[type],
    make: Callable[[], list[Callable[[], object]]],
    *,
    check: Callable[[], object] = lambda: None,
    weak: bool = False,
    reduce: bool = True,
) -> int:
    """Run the threads that `make` makes anew for each run in all orders; returns how many runs.

    `check` is called after each run, when all threads have ended. What a thread or `check` raises
    is raised here, with the run's steps in a note.
    """
    global _run
    conflict = _conflict if reduce else lambda _one, _other: True
    with _Instruments(classes) as instruments:
        while True:
            nodes: list[_Node] = []
            runs = 0
            try:
                while True:
                    runs += 1
                    _run = _Run(nodes, weak, conflict, instruments.watched)
                    try:
                        _run.go(make())
                        if not _run.redundant:
                            check()
                    except BaseException as error:
                        error.add_note(f"the order, THREAD:STEP: {_run.story()}")
                        raise
                    finally:
                        _run.end()
                    if not _back(nodes):
                        return runs
            except _Unwatched as unwatched:
                instruments.watch(*unwatched.args)


def _back(nodes: list["_Node"]) -> bool:
    """Go back to the last state from which there is another way to try, and choose that."""
    while nodes:
        node = nodes[-1]
        node.sleep.add(node.chosen)
        left = node.ways - node.sleep
        if left:
            node.chosen = min(left)
            return True
        nodes.pop()
    return False


class _Node:
    """A state on the way of the present run, and the step that was chosen there."""

    __slots__ = ("chosen", "clock", "ops", "sleep", "ways")

    def __init__(self, ops: dict[int, Op], sleep: set[int], chosen: int) -> None:
        self.ops = ops
        """By thread, the steps that can be taken."""
        self.sleep = sleep
        """Who need not be tried: what it leads to has been seen elsewhere, or is done here."""
        self.chosen = chosen
        self.ways = {chosen}
        """Who is to be tried, in the end."""
        self.clock: tuple[int, ...] = ()
        """By thread, the last of its steps, as an index of nodes, that caused this one."""


class _Thread:
    def __init__(self, run: "_Run", index: int, body: Callable[[], object]) -> None:
        self.index = index
        self.op: Op = ("begin", None)
        self.ready: Callable[[], bool] = lambda: True
        self.done = False
        self.locals: dict[int, dict[str, Any]] = {}
        self.held: list[Lock] = []
        self.taken: set[tuple[int, int]] = set()
        self.stores: list[tuple[Any, ...]] = []  # not seen by others yet; `weak` only
        self.stored = self.flushed = 0
        self.greenlet = greenlet.greenlet(functools.partial(self._live, run, body))

    def _live(self, run: "_Run", body: Callable[[], object]) -> None:
        body()
        run.step(("die", frozenset(self.taken)), self.has_no_stores)
        self.locals.clear()
        self.done = True

    def has_no_stores(self) -> bool:
        return not self.stores


class _Run:
    """One run: first the way that `nodes` tells, then a new one."""

    def __init__(
        self,
        nodes: list[_Node],
        weak: bool,
        conflict: Callable[[Op, Op], bool],
        watched: set[tuple[type, str]],
    ) -> None:
        self.nodes = nodes
        self.weak = weak
        self.conflict = conflict
        self.watched = watched
        self.active = False
        self.redundant = False
        self.threads: list[_Thread] = []
        self.current: _Thread
        self.building: set[int] = set()  # ids of objects whose __init__ is under way
        self.outside: dict[int, dict[str, Any]] = {}  # thread-local, before the threads begin
        self._main = greenlet.getcurrent()
        self._depth = 0
        self._steps_on: dict[Any, list[int]] = defaultdict(list)  # nodes, by what their step is on
        self._names: dict[int, tuple[int, int]] = {}
        self._made: dict[int, int] = defaultdict(int)

    def go(self, bodies: list[Callable[[], object]]) -> None:
        self.threads = [_Thread(self, index, body) for index, body in enumerate(bodies)]
        self.active = True
        while self._choose():
            self.current.greenlet.switch()
        self.active = False

    def end(self) -> None:
        """Unwind the threads of a run that was broken off, while it still is the present one."""
        self.active = False
        for thread in self.threads:
            thread.greenlet.throw()

    def step(self, op: Op, ready: Callable[[], bool] = lambda: True) -> None:
        """The present thread can be preempted here. On return it is to do `op`, and is `ready`."""
        if not self.active:
            return
        me = self.current
        me.op, me.ready = op, ready
        if not self._choose():
            self._main.switch()
        elif self.current is not me:
            self.current.greenlet.switch()

    def christen(self, thing: object) -> None:
        """Name a new object after its maker and its number there: the same in every run."""
        maker = self.current.index if self.active else -1
        self._made[maker] += 1
        self._names[id(thing)] = maker, self._made[maker]

    def number(self) -> int:
        """Of the step that is under way."""
        return self._depth - 1

    def name(self, thing: object) -> tuple[int, int]:
        return self._names[id(thing)]

    def story(self) -> str:
        return " ".join(f"{n.chosen}:{n.ops[n.chosen][0]}" for n in self.nodes[: self._depth])

    # Choosing

    def _choose(self) -> bool:
        """Who goes on becomes `current`. False when this run is over."""
        count = len(self.threads)
        while self.active:
            if self._depth == len(self.nodes):
                node = self._new_node()
                if node is None:
                    self.active = False
                    break
                self.nodes.append(node)
            node = self.nodes[self._depth]
            chosen = node.chosen
            if self._depth == len(self.nodes) - 1:  # new, or another way than in the last run
                self._look_back(node)
            op = node.ops[chosen]
            self._steps_on[_thing(op)].append(self._depth)
            self._depth += 1
            if chosen < count:
                self.current = self.threads[chosen]
                return True
            self._flush(self.threads[chosen - count])
        return False

    def _new_node(self) -> _Node | None:
        ops = {t.index: t.op for t in self.threads if not t.done and t.ready()}
        if self.weak:
            # A store buffer counts as one more thread; its next step is its oldest change.
            ops |= {
                t.index + len(self.threads): ("change", t.stores[0][0])
                for t in self.threads
                if t.stores
            }
        if not ops:
            waiting = {t.index: t.op for t in self.threads if not t.done}
            if waiting:
                raise Deadlock(f"nobody can go on: {waiting}")
            return None
        if self._depth >= _MOST_STEPS:
            raise Endless(f"{_MOST_STEPS} steps, and no end")
        sleep: set[int] = set()
        if self.nodes:
            last = self.nodes[-1]
            step = last.ops[last.chosen]
            sleep = {who for who in last.sleep if not self.conflict(last.ops[who], step)}
        awake = [who for who in ops if who not in sleep]
        if not awake:
            self.redundant = True
            return None
        on = self.current.index if self.nodes else -1
        return _Node(ops, sleep, on if on in awake else awake[0])

    def _flush(self, thread: _Thread) -> None:
        _cell, _clock, watched, thing, value = thread.stores.pop(0)
        thread.flushed += 1
        watched.put(thing, value)

    # Causes and races

    def _look_back(self, node: _Node) -> None:
        """Find what has caused the step that is chosen now, and what it could have preceded."""
        nodes, me, op = self.nodes, node.chosen, node.ops[node.chosen]
        count = len(self.threads)
        clock = [-1] * (2 * count)
        for earlier in reversed(nodes[: self._depth]):
            if earlier.chosen == me:
                _join(clock, earlier.clock)
                break
        if me >= count:
            _join(clock, self.threads[me - count].stores[0][1])
        known = tuple(clock)
        for index in self._related(op):
            earlier = nodes[index]
            if earlier.chosen == me:
                continue
            step = earlier.ops[earlier.chosen]
            if self.conflict(step, op):
                if known[earlier.chosen] < index:
                    self._race(index, known)
                _join(clock, earlier.clock)
            elif (step[0], op[0]) in _ENABLES:
                _join(clock, earlier.clock)
        clock[me] = self._depth
        node.clock = tuple(clock)

    def _related(self, op: Op) -> Iterable[int]:
        """Earlier steps that may conflict with this one or have enabled it."""
        if self.conflict is not _conflict or (op[0] == "kick" and self.weak):
            return range(self._depth)
        if op[0] == "die":
            return [index for lock in op[1] for index in self._steps_on[lock]]
        return self._steps_on[_thing(op)] + self._steps_on[None]

    def _race(self, first: int, known: tuple[int, ...]) -> None:
        """See that from `nodes[first]` a way is tried on which the present step comes before that
        one's. `known` are the causes of the present step before it looked."""
        nodes, node = self.nodes, self.nodes[first]
        me, op = nodes[self._depth].chosen, nodes[self._depth].ops[nodes[self._depth].chosen]
        # What came after that step and was not caused by it, and the present step, could come in
        # its place: to begin with, any of these that none of the others has caused.
        free: list[int] = []
        firsts: dict[int, bool] = {}
        for index in range(first + 1, self._depth):
            who, clock = nodes[index].chosen, nodes[index].clock
            if clock[node.chosen] < first:
                firsts.setdefault(who, all(clock[nodes[f].chosen] < f for f in free))
                free.append(index)
        if me not in firsts:
            firsts[me] = not any(
                known[nodes[f].chosen] >= f or self.conflict(nodes[f].ops[nodes[f].chosen], op)
                for f in free
            )
        initials = [who for who, is_first in firsts.items() if is_first]
        if node.ways.isdisjoint(initials):
            possible = [who for who in initials if who in node.ops]
            node.ways.update(possible[:1] or node.ops)


_TAKES = ("take", "try")
_ENABLES = {("give", "take"), ("set", "wait")}


def _conflict(one: Op, other: Op) -> bool:
    """Whether the order of two steps, of different threads, matters."""
    (a, on), (b, other_on) = one, other
    if a == "die" or b == "die":
        # Weak references to what a thread keeps are walked under the lock under which it made them
        # known.
        return (b in _TAKES and other_on in on) if a == "die" else (a in _TAKES and on in other_on)
    if a == "kick" or b == "kick":
        return a == "store" or b == "store"  # it waits for what has been stored by then
    if on is None or not _meet(on, other_on):
        return False
    if a in _TAKES or b in _TAKES:
        # To give a lock back and then to take it cannot be swapped, but to try it can.
        return (a in _TAKES and b in _TAKES) or a == "try" or b == "try"
    return a == "change" or b == "change"


def _meet(one: Any, other: Any) -> bool:
    if isinstance(one, Part) and isinstance(other, Part):
        return one.of == other.of and one.start < other.stop and other.start < one.stop
    return bool(one == other)


def _thing(op: Op) -> Any:
    """Steps on different things do not conflict."""
    step, on = op
    if step == "die":
        return None
    return on.of if isinstance(on, Part) else on


def _join(clock: list[int], other: tuple[int, ...]) -> None:
    for who, index in enumerate(other):
        if index > clock[who]:
            clock[who] = index


_run: Any = None
"""The present run; outside of `explore` nothing of the rest of this page is used."""


# Watching


class _Watched:
    """In a class: an attribute whose every look and change is a step."""

    def __init__(self, name: str, slot: Any) -> None:
        self._name, self._slot = name, slot

    def __get__(self, thing: Any, _owner: type) -> Any:
        run = _run
        if not run.active or id(thing) in run.building:
            return self._take(thing)
        cell = run.name(thing), self._name
        run.step(("look", cell))
        if run.active:
            for store in reversed(run.current.stores):
                if store[0] == cell:
                    return store[-1]
        return self._take(thing)

    def __set__(self, thing: Any, value: Any) -> None:
        run = _run
        if not run.active or id(thing) in run.building:
            self.put(thing, value)
            return
        cell = run.name(thing), self._name
        run.step(("store" if run.weak else "change", cell))
        if run.weak and run.active:
            clock = run.nodes[run._depth - 1].clock
            run.current.stores.append((cell, clock, self, thing, value))
            run.current.stored += 1
        else:
            self.put(thing, value)

    def _take(self, thing: Any) -> Any:
        return thing.__dict__[self._name] if self._slot is None else self._slot.__get__(thing)

    def put(self, thing: Any, value: Any) -> None:
        if self._slot is None:
            thing.__dict__[self._name] = value
        else:
            self._slot.__set__(thing, value)


class _Instruments:
    """What is changed in the classes under test, and changed back at the end."""

    def __init__(self, classes: Iterable[type]) -> None:
        self.watched: set[tuple[type, str]] = set()
        self._saved: list[tuple[type, str, Any]] = []
        self._classes = classes

    def __enter__(self) -> "_Instruments":
        for cls in self._classes:
            self._replace(cls, "__init__", self._init(cls, cls.__init__))
            self._replace(cls, "__setattr__", self._setattr(cls, cls.__setattr__))
        return self

    def __exit__(self, *_: object) -> None:
        for cls, name, original in reversed(self._saved):
            if original is None:
                delattr(cls, name)
            else:
                setattr(cls, name, original)

    def watch(self, cls: type, name: str) -> None:
        self.watched.add((cls, name))
        self._replace(cls, name, _Watched(name, cls.__dict__.get(name)))

    def _replace(self, cls: type, name: str, new: Any) -> None:
        self._saved.append((cls, name, cls.__dict__.get(name)))
        setattr(cls, name, new)

    def _init(self, cls: type, original: Callable[..., None]) -> Callable[..., None]:
        def __init__(thing: Any, *args: Any, **more: Any) -> None:
            run = _run
            run.christen(thing)
            run.building.add(id(thing))
            try:
                original(thing, *args, **more)
            finally:
                run.building.discard(id(thing))

        return __init__

    def _setattr(self, cls: type, original: Callable[..., None]) -> Callable[..., None]:
        watched = self.watched

        def __setattr__(thing: Any, name: str, value: Any) -> None:
            run = _run
            if run.active and (cls, name) not in watched and id(thing) not in run.building:
                raise _Unwatched(cls, name)
            original(thing, name, value)

        return __setattr__


# In the place of the module threading


class Lock:
    def __init__(self) -> None:
        self._held = False
        _run.christen(self)

    def acquire(self, blocking: bool = True) -> bool:
        run = _run
        if run.active:
            me, name = run.current, run.name(self)
            if blocking:
                run.step(("take", name), lambda: not self._held and not me.stores)
            else:
                run.step(("try", name), me.has_no_stores)
                if run.active and self._held:
                    return False
            me.held.append(self)
            me.taken.add(name)
        self._held = True
        return True

    def release(self) -> None:
        run = _run
        if run.active:
            run.step(("give", run.name(self)), run.current.has_no_stores)
            run.current.held.remove(self)
        self._held = False

    def locked(self) -> bool:
        return self._held

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


class Event:
    def __init__(self) -> None:
        self._flag = False
        _run.christen(self)

    def set(self) -> None:
        _run.step(("set", _run.name(self)), _run.current.has_no_stores)
        self._flag = True

    def wait(self) -> None:
        me = _run.current
        _run.step(("wait", _run.name(self)), lambda: self._flag and not me.stores)


class Local:
    """threading.local: gone with its thread, at a step of its own."""

    def _mine(self) -> dict[str, Any]:
        places = _run.current.locals if _run.active else _run.outside
        return places.setdefault(id(self), {})

    def __getattr__(self, name: str) -> Any:
        try:
            return self._mine()[name]
        except KeyError:
            raise AttributeError(name) from None

    def __setattr__(self, name: str, value: Any) -> None:
        self._mine()[name] = value


threading = SimpleNamespace(Lock=Lock, Event=Event, local=Local)


def kick() -> None:
    """membarrier(2): what any thread has changed before this call all see when it returns."""
    if not _run.active:
        return
    _run.step(("kick", None), _run.current.has_no_stores)
    due = [(thread, thread.stored) for thread in _run.threads]
    _run.step(("kicked", None), lambda: all(thread.flushed >= n for thread, n in due))


class Shared:
    """Something that all see alike at every moment; who looks at it or changes it touches it."""

    def __init__(self) -> None:
        _run.christen(self)

    def touch(self, *, change: bool = False, part: tuple[int, int] | None = None) -> int:
        """Returns the step's number; `part` is (start, stop) of what is touched."""
        name = _run.name(self)
        _run.step(("change" if change else "look", Part(name, *part) if part else name))
        return _run.number()


def held() -> list[Lock]:
    """The locks that the present thread holds."""
    return list(_run.current.held)


# Moments


Cut = tuple[int, ...]
"""A moment: by thread, the number of its last step by then, -1 for none."""


def mark() -> int:
    """A step that is nothing to others; returns its number."""
    _run.step(("mark", None))
    return _run.number()


def running() -> bool:
    return bool(_run.active)


def steps() -> int:
    """How many the run that has just ended has had."""
    return len(_run.nodes)


def is_done(step: int, cut: Cut) -> bool:
    return step <= cut[_run.nodes[step].chosen]


def caused(one: int, other: int) -> bool:
    """Whether step `one` of the run that has just ended precedes `other` in all it stands for."""
    nodes = _run.nodes
    return bool(nodes[other].clock[nodes[one].chosen] >= one)


def cuts(among: Iterable[int]) -> Iterator[tuple[Cut, Cut | None, int]]:
    """All moments of the run that has just ended and of those it stands for, told apart by which of
    these steps have been done: each with one that came just before, and the step between the two.

    The first, at which none has been done, comes with None. Not for runs with `weak`.
    """
    nodes, threads = _run.nodes, range(len(_run.threads))
    following: dict[tuple[int, int], int] = {}
    last = [-1 for _ in threads]
    for step in sorted(among):
        who = nodes[step].chosen
        following[who, last[who]] = step
        last[who] = step
    none = (-1,) * len(threads)
    seen, found = {none}, deque([none])
    yield none, None, -1
    while found:
        cut = found.popleft()
        after = {who: following.get((who, cut[who])) for who in threads}
        for who, step in after.items():
            # Nothing that is still to come has caused it.
            if step is None or any(
                other is not None and other != step and caused(other, step)
                for other in after.values()
            ):
                continue
            later = (*cut[:who], step, *cut[who + 1 :])
            if later not in seen:
                seen.add(later)
                found.append(later)
                yield later, cut, step

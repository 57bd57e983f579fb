"""Two threads in chosen orders: every way in which one can be stopped in the other's middle.

`explore` runs two functions, each in its own thread, one at a time. It counts the bytecode
instructions that look at or change an object (attributes and subscripts: local steps need no order)
in the files asked for and, before a chosen one, stops a thread and lets the other go on. A schedule
is (who begins, after how many steps to switch, after how many to switch back); from there each runs
until it ends or waits for the other. All schedules are tried, so what two stops can break, breaks
every time.

`Event`, `Lock` and `Condition` take the place of threading's inside the code under test: who waits
for one hands over, and two that wait for each other are a deadlock.
"""

import dis
import functools
import itertools
import sys
import threading
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any


class Deadlock(AssertionError):
    """Both threads wait, or one waits and the other has ended."""


class _Ended(BaseException):
    """Unwinds a thread of a run that has failed."""


class _Run:
    def __init__(self, files: set[str], functions: list[Callable[[], object]], stops: list[int]):
        self.files = files
        self.stops = stops  # steps until the next switch, and so on
        self.failure: BaseException | None = None
        self.turn = 0
        self.done = [False, False]
        self.condition = threading.Condition()
        self.left = stops.pop(0) if stops else -1
        self.threads = [
            threading.Thread(target=self._body, args=(me, function))
            for me, function in enumerate(functions)
        ]

    def go(self) -> None:
        for thread in self.threads:
            thread.start()
        for thread in self.threads:
            thread.join()
        if self.failure is not None:
            raise self.failure

    def _body(self, me: int, function: Callable[[], object]) -> None:
        _here.run, _here.me = self, me
        try:
            self._wait_for_turn(me)
            sys.settrace(self._on_call)
            function()
        except _Ended:
            pass
        except BaseException as error:
            self.failure = self.failure or error
        finally:
            sys.settrace(None)
            with self.condition:
                self.done[me] = True
                self.turn = 1 - me
                self.condition.notify_all()

    def _on_call(self, frame: FrameType, event: str, arg: Any) -> Any:
        if frame.f_code.co_filename in self.files:
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
            return self._on_opcode
        return None

    def _on_opcode(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode" and self.left >= 0 and frame.f_lasti in _steps(frame.f_code):
            self.left -= 1
            if self.left < 0:
                self.left = self.stops.pop(0) if self.stops else -1
                self.hand_over(_here.me)
        return self._on_opcode

    def hand_over(self, me: int) -> None:
        with self.condition:
            if self.done[1 - me]:
                return
            self.turn = 1 - me
            self.condition.notify_all()
        self._wait_for_turn(me)

    def _wait_for_turn(self, me: int) -> None:
        with self.condition:
            self.condition.wait_for(lambda: self.turn == me or self.failure is not None)
        if self.failure is not None:
            raise _Ended

    def wait(self, me: int, ready: Callable[[], bool]) -> None:
        for _ in range(1000):
            if ready():
                return
            if self.done[1 - me]:
                break
            self.hand_over(me)
        if not ready():
            raise Deadlock


_here = threading.local()


@functools.cache
def _steps(code: CodeType) -> frozenset[int]:
    """Where in `code` the instructions are before which a switch can matter."""
    return frozenset(
        instruction.offset
        for instruction in dis.get_instructions(code)
        if any(part in instruction.opname for part in ("ATTR", "METHOD", "SUBSCR"))
    )


class Event:
    def __init__(self) -> None:
        self.is_set = False

    def set(self) -> None:
        self.is_set = True

    def wait(self) -> None:
        _here.run.wait(_here.me, lambda: self.is_set)


class Lock:
    def __init__(self) -> None:
        self.held = False

    def __enter__(self) -> None:
        if hasattr(_here, "run"):
            _here.run.wait(_here.me, lambda: not self.held)
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False


class Condition(Lock):
    def wait_for(self, fact: Callable[[], bool], _timeout: float | None = None) -> None:
        self.held = False
        _here.run.wait(_here.me, lambda: fact() and not self.held)
        self.held = True

    def notify_all(self) -> None:
        """Who waits looks again whenever it is his turn."""


def explore(
    files: set[str], make: Callable[[], list[Callable[[], object]]], *, stride: int = 1
) -> int:
    """Try the schedules of the two functions that `make` makes anew for each; returns how many.

    What `make` returns beyond these two is called when both have ended. With a `stride`, the place
    of the second switch goes in steps of so many; that of the first is always tried everywhere.
    """
    tried = 0

    def reaches(begins: int, *stops: int) -> bool:
        """Run this schedule; False where both ended before its last switch."""
        nonlocal tried
        tried += 1
        one, other, *checks = make()
        left = list(stops)
        run = _Run(files, [one, other] if begins == 0 else [other, one], left)
        try:
            run.go()
            for check in checks:
                check()
        except BaseException as error:
            error.add_note(f"schedule: {begins} begins, switches after {stops} steps")
            raise
        return run.left < 0 and not left

    for begins in (0, 1):
        for first in itertools.count():
            if not reaches(begins, first):
                break
            for second in itertools.count(step=stride):
                if not reaches(begins, first, second):
                    break
    return tried

"""Kill an attach at every line of its steps, one after the other."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from zramd.kernel import attach, loop, nbd

_SOURCES = {module.__file__ for module in (attach, loop, nbd)}
_STEPS = ("attach", "_start_nbdfuse")
"""The functions that take more than one step; what these call does one thing each."""


def killed_at_each_line(attaching: Callable[[], object]) -> Iterator[str]:
    """Run `attaching` in a child that is killed (SIGKILL) before the nth line it comes to for the
    first time, for n = 1, 2, ..., and yield "FILE:LINE" after each, until it comes to its end."""
    n = 0
    while True:
        n += 1
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            _attach_and_die(attaching, n, writer)
        os.close(writer)
        with open(reader) as told:
            line = told.read()
        _pid, status = os.waitpid(child, 0)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0, "the attach failed by itself"
            return
        yield line


def _attach_and_die(attaching: Callable[[], object], n: int, told: int) -> None:
    """In the child; does not return."""
    seen: set[tuple[str, int]] = set()

    def trace(frame: FrameType, event: str, _argument: object) -> Callable | None:
        code = frame.f_code
        if code.co_filename not in _SOURCES or code.co_name not in _STEPS:
            return None
        if event == "line":
            seen.add((code.co_filename, frame.f_lineno))
            if len(seen) == n:
                os.write(told, f"{Path(code.co_filename).name}:{frame.f_lineno}".encode())
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    status = 1
    try:
        sys.settrace(trace)
        attaching()
        status = 0
    finally:
        os._exit(status)

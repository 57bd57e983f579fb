"""Faults planted in the real code, to see that a checker finds them."""

import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import pytest


def plant(
    monkeypatch: pytest.MonkeyPatch, function: Callable[..., Any], *changes: tuple[str, str]
) -> None:
    """Replace pieces of the source of a function, or of a method where its class defines it, and in
    the tables there that have it, each of which stands there once."""
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in changes:
        assert source.count(old) == 1, f"the fault has lost its place: {old!r}"
        source = source.replace(old, new)
    space: dict[str, Any] = {}
    exec(source, function.__globals__, space)
    owner: Any = sys.modules[function.__module__]
    for name in function.__qualname__.split(".")[:-1]:
        owner = getattr(owner, name)
    changed = space[function.__name__]
    monkeypatch.setattr(owner, function.__name__, changed)
    for table in [value for value in vars(owner).values() if isinstance(value, dict)]:
        for key in [key for key, value in table.items() if value is function]:
            monkeypatch.setitem(table, key, changed)

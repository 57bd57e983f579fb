"""A device's attributes as text, with zram's names and formats: what the files in /sys/block/zramN
give and take.
"""

import re
from collections.abc import Callable
from typing import Final

from zramd import sizes
from zramd.device import Zram
from zramd.errors import BadValue, NotSupported
from zramd.store.zcomp import NAMES, Algorithm


def get(zram: Zram, attribute: str) -> str:
    """The text that reading the file gives, without its newline. Raises BadValue for an attribute
    that does not exist or cannot be read."""
    if attribute not in _GETTERS:
        problem = "can only be set" if attribute in _SETTERS else "is not an attribute"
        raise BadValue(f"{attribute!r} {problem}", hint=f"get one of {', '.join(READABLE)}")
    return _GETTERS[attribute](zram)


def set(zram: Zram, attribute: str, value: str) -> None:
    """What writing `value` to the file does. Raises BadValue, DeviceBusy, NoMemory, NotSupported;
    nothing has changed then."""
    if attribute not in _SETTERS:
        problem = "is read-only" if attribute in _GETTERS else "is not an attribute"
        raise BadValue(f"{attribute!r} {problem}", hint=f"set one of {', '.join(WRITABLE)}")
    _SETTERS[attribute](zram, value.strip())


def _get_comp_algorithm(zram: Zram) -> str:
    chosen = zram.algorithm.name
    return " ".join(f"[{name}]" if name == chosen else name for name in NAMES)


def _set_comp_algorithm(zram: Zram, value: str) -> None:
    algorithm = Algorithm.parse(value)
    zram.choose("comp_algorithm", lambda _: algorithm)


def _set_algorithm_params(zram: Zram, value: str) -> None:
    pairs = dict(_pair(word) for word in value.split())
    unknown = pairs.keys() - {"algo", "priority", "level", "dict"}
    if unknown or not pairs:
        raise BadValue(
            f"algorithm_params does not know {sorted(unknown) or 'an empty value'}",
            hint="write level=N, optionally with algo=NAME or priority=0",
        )
    priority = _integer("priority", pairs.get("priority", "0"))
    if priority not in range(4):
        raise BadValue(f"priority is 0 to 3, not {priority}")
    if "dict" in pairs or priority:
        raise NotSupported("dictionaries and secondary algorithms are not built yet")
    zram.choose("algorithm_params", lambda chosen: _with_params(chosen, pairs))


def _with_params(chosen: Algorithm, pairs: dict[str, str]) -> Algorithm:
    if pairs.get("algo", chosen.name) != chosen.name:
        raise BadValue(
            f"{pairs['algo']} is not the chosen algorithm, {chosen.name} is",
            hint="choose it in comp_algorithm first",
        )
    return Algorithm(chosen.name, _integer("level", pairs["level"]) if "level" in pairs else None)


def _set_prealloc(zram: Zram, value: str) -> None:
    if value not in ("0", "1"):
        raise BadValue(f"prealloc takes 0 or 1, not {value!r}")
    zram.prealloc = value == "1"


def _set_mem_used_max(zram: Zram, value: str) -> None:
    if _integer("mem_used_max", value) != 0:
        raise BadValue("mem_used_max takes only 0", hint="0 sets it to what is used now")
    zram.forget_used_max()


def _set_reset(zram: Zram, value: str) -> None:
    if not 0 < _integer("reset", value) < 65536:
        raise BadValue(f"reset takes 1, not {value}")
    zram.reset()


def _set_max_comp_streams(_: Zram, value: str) -> None:
    if _integer("max_comp_streams", value) < 1:
        raise BadValue(f"max_comp_streams must be at least 1, not {value}")


_GETTERS: Final[dict[str, Callable[[Zram], str]]] = {
    "disksize": lambda zram: str(zram.disksize),
    "initstate": lambda zram: "1" if zram.disksize else "0",
    "comp_algorithm": _get_comp_algorithm,
    "max_comp_streams": lambda zram: str(zram.statistics().streams),
    "mem_limit": lambda zram: str(zram.statistics().mem_limit),
    "mem_used_max": lambda zram: str(zram.statistics().mem_used_max),
    "prealloc": lambda zram: str(int(zram.prealloc)),
    "mm_stat": lambda zram: zram.statistics().mm_stat(),
    "io_stat": lambda zram: zram.statistics().io_stat(),
}
_SETTERS: Final[dict[str, Callable[[Zram, str], None]]] = {
    "disksize": lambda zram, value: zram.init(sizes.parse(value)),
    "reset": _set_reset,
    "comp_algorithm": _set_comp_algorithm,
    "algorithm_params": _set_algorithm_params,
    "max_comp_streams": _set_max_comp_streams,
    "mem_limit": lambda zram, value: zram.limit(sizes.parse(value)),
    "prealloc": _set_prealloc,
    "mem_used_max": _set_mem_used_max,
    "compact": lambda zram, _: zram.compact(),
}
READABLE: Final = tuple(sorted(_GETTERS))
WRITABLE: Final = tuple(sorted(_SETTERS))


def _pair(word: str) -> tuple[str, str]:
    key, equals, value = word.partition("=")
    if not equals or not value:
        raise BadValue(f"{word!r} is not KEY=VALUE", hint="write level=N")
    return key, value


def _integer(what: str, text: str) -> int:
    if not re.fullmatch(r"[+-]?\d{1,18}", text, re.ASCII):
        raise BadValue(f"{what} takes a whole number, not {text!r}")
    return int(text)

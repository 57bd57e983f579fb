"""The columns of `zramd list`, each defined once: name, meaning, value.

Names and meanings are those of util-linux's zramctl (sys-utils/zramctl.c, infos[]); those that
zramctl does not have are DEVICE, SAME-PAGES, HUGE-PAGES, CLIENTS and STATE. The same table makes
the help, the JSON and the completion.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal, TypeAlias

from zramd import sizes
from zramd.control.client import State, look
from zramd.kernel.attach import Attachment, attached
from zramd.kernel.use import users
from zramd.service.runtime import Paths
from zramd.statistics import Statistics

Value: TypeAlias = int | float | str | None


@dataclass(frozen=True, slots=True)
class Device:
    """One device as far as it can be seen; `now` is None where its server tells nothing."""

    name: str
    state: State
    now: Statistics | None
    attachment: Attachment | None

    @classmethod
    def look(cls, name: str) -> "Device":
        """Ask server and kernel. A server that is dead, or does not answer, is a state."""
        state, now = look(Paths(name).control_socket)
        return cls(name, state, now, attached(name))


@dataclass(frozen=True, slots=True)
class Column:
    """`value` gives bytes for a size, None for what is not known."""

    name: str
    meaning: str
    kind: Literal["size", "number", "text"]
    value: Callable[[Device], Value]

    @property
    def key(self) -> str:
        """The column in JSON."""
        return self.name.lower().replace("-", "_")

    def text(self, device: Device, *, in_bytes: bool) -> str:
        """As the table shows it; empty where it is not known."""
        value = self.value(device)
        if value is None:
            return ""
        if self.kind == "size" and isinstance(value, int) and not in_bytes:
            return sizes.human(value)
        return f"{value:.4f}" if isinstance(value, float) else str(value)


def _of(figure: Callable[[Statistics], Value]) -> Callable[[Device], Value]:
    return lambda device: None if device.now is None else figure(device.now)


def _ratio(now: Statistics) -> float | None:
    return now.orig_data_size / now.mem_used_total if now.orig_data_size else None


def _node(device: Device) -> str | None:
    return None if device.attachment is None else device.attachment.node


def _used_on(device: Device) -> str | None:
    if device.attachment is None:
        return None
    return ",".join(user.where for user in users(device.attachment.node)) or None


_SAME = "pages of one repeated word, which take no memory"
_STATE = "serving, idle (no disksize), silent (no answer) or dead (`zramd down` clears it)"

# fmt: off
COLUMNS: Final = tuple(Column(*row) for row in (
    ("NAME", "device name", "text", lambda device: device.name),
    ("DISKSIZE", "limit on the uncompressed amount of data", "size", _of(lambda s: s.disksize)),
    ("DATA", "uncompressed size of stored data", "size", _of(lambda s: s.orig_data_size)),
    ("COMPR", "compressed size of stored data", "size", _of(lambda s: s.compr_data_size)),
    ("ALGORITHM", "the selected compression algorithm", "text", _of(lambda s: s.algorithm)),
    ("STREAMS", "number of concurrent compress operations", "number", _of(lambda s: s.streams)),
    ("ZERO-PAGES", f"{_SAME}; zramctl's name", "number", _of(lambda s: s.same_pages)),
    ("TOTAL", "all RAM taken, the slot table included", "size", _of(lambda s: s.mem_used_total)),
    ("MEM-LIMIT", "limit on TOTAL; 0 is none", "size", _of(lambda s: s.mem_limit)),
    ("MEM-USED", "the highest TOTAL so far", "size", _of(lambda s: s.mem_used_max)),
    ("MIGRATED", "pages given back by compaction", "number", _of(lambda s: s.pages_compacted)),
    ("COMP-RATIO", "compression ratio: DATA/TOTAL", "number", _of(_ratio)),
    ("MOUNTPOINT", "where the device is mounted, or [SWAP]", "text", _used_on),
    ("DEVICE", "the kernel's block device node", "text", _node),
    ("SAME-PAGES", _SAME, "number", _of(lambda s: s.same_pages)),
    ("HUGE-PAGES", "pages stored uncompressed, being huge", "number", _of(lambda s: s.huge_pages)),
    ("CLIENTS", "connections that hold it open", "number", _of(lambda s: len(s.openers))),
    ("STATE", _STATE, "text", lambda device: device.state),
))
# fmt: on

DEFAULT: Final = (
    *("NAME", "ALGORITHM", "DISKSIZE", "DATA", "COMPR", "TOTAL", "COMP-RATIO"),
    *("DEVICE", "MOUNTPOINT"),
)

"""What a server's process leaves to the program that is executed in it, or in a child of it: the
descriptors, and what else cannot be asked of the kernel.

1. `execute`: the descriptors are made inheritable, and all of it is written into one variable of
   the environment of the program.
2. `received`, the first thing that the program does: the variable is read and removed, and the
   descriptors are made its own; no other program inherits either.

Two versions of zramd understand each other where FORMAT is one. A candidate, which reads what its
supervisor will leave to the same program, has found that out before anything depends on it.
"""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal, NoReturn

from zramd import __version__
from zramd.errors import ServerFailed
from zramd.service import systemd
from zramd.service.runtime import Claim, Paths

_VARIABLE: Final = "ZRAMD_HANDOVER"
FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Handover:
    """Numbers of descriptors, processes and signals."""

    role: Literal["supervisor", "candidate"]
    """What the program is to be."""
    claim: int
    """The descriptor of the claim's lock."""
    link: int
    """The socket to the worker, or to the supervisor."""
    descriptors: dict[str, int]
    """What a supervisor keeps, by its name; of a candidate, what it looks at."""
    worker: int = 0
    told: list[int] = field(default_factory=list)
    """Signals that each worker is told."""
    deaths: list[float] = field(default_factory=list)
    """When workers have died, by the monotonic clock."""
    version: str = __version__
    """Of who hands over."""

    def execute(self, program: Sequence[str]) -> NoReturn:
        """Become `program`, with the arguments that we were called with. Raises OSError, ValueError
        for a program that is none; all is as before then."""
        inherited = (self.claim, self.link, *self.descriptors.values())
        state = json.dumps({"format": FORMAT, **asdict(self)})
        try:
            for descriptor in inherited:
                os.set_inheritable(descriptor, True)
            arguments = [*program, *sys.argv[1:]]
            os.execve(program[0], arguments, {**os.environ, _VARIABLE: state})
        except BaseException:
            for descriptor in inherited:
                os.set_inheritable(descriptor, False)
            raise

    def claimed(self, name: str) -> Claim:
        """The claim that comes with it, which a candidate leaves to its supervisor."""
        held = Claim.inherited(Paths(name), self.claim)
        if self.role == "candidate":
            held.disown()
        return held


def received() -> Handover | None:
    """What was left to this process; None where it was started by itself. Raises ServerFailed."""
    text = os.environ.pop(_VARIABLE, None)
    if text is None:
        return None
    with systemd.restarted(lambda: '"role": "supervisor"' in text):
        return _understood(json.loads(text))


def _understood(state: dict[str, Any]) -> Handover:
    if (their_format := state.pop("format")) != FORMAT:
        raise ServerFailed(
            f"zramd {state.get('version')} hands over in format {their_format}, and zramd"
            f" {__version__} knows format {FORMAT}",
            hint="take the device down, and start it anew",
        )
    handed = Handover(**state)
    for descriptor in (handed.claim, handed.link, *handed.descriptors.values()):
        os.set_inheritable(descriptor, False)
    return handed

"""A real kernel's nbd against both servers, in user-mode Linux.

One boot per server runs every check of in_guest.py, one those of in_clients.py, which is about what
others attach, and one those of in_killed.py, about what only `zramd serve` does; here each is a
test of its own. A guest that hangs is killed at its time limit, and the checks that it did not come
to fail.
"""

import os
import re
import sys
from functools import cache
from pathlib import Path

import pytest

from tests.conftest import require
from tests.kernel import uml
from tests.kernel.servers import ROOT, SERVERS

_KILLS = int(os.environ.get("ZRAMD_TEST_KILLS", "20"))
_LIMIT_S = {"in_guest": 900, "in_killed": 300 + 60 * _KILLS, "in_clients": 900}
_CHECK_S = {"in_guest": 120, "in_killed": 120 + 24 * _KILLS, "in_clients": 120}

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(max(_LIMIT_S.values()) + 60)]

_GUESTS = [
    ("in_killed", "zramd"),
    *((module, server) for module in ("in_guest", "in_clients") for server in SERVERS),
]
_PROGRAMS = (
    *("nbdkit", "nbd-client", "nbdcopy", "nbdinfo", "qemu-io", "qemu-nbd"),
    *("fio", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"),
)
_RESULT = re.compile(r"in_\w+\.py::(\w+)\S* .*?\b(PASSED|FAILED|ERROR|SKIPPED)\b")


def _checks(module: str) -> list[str]:
    text = Path(__file__).with_name(f"{module}.py").read_text()
    return re.findall(r"^def (test_\w+)", text, re.MULTILINE)


_ALL = [(*guest, check) for guest in _GUESTS for check in _checks(guest[0])]


@cache
def _boot(module: str, server: str) -> uml.Finished:
    """What the one boot of a module with a server printed."""
    for program in _PROGRAMS:
        require.program(program)
    return uml.run(
        *(sys.executable, "-m", "pytest", "-v", "--tb=short", "--color=no"),
        *("-p", "no:cacheprovider", "-p", "no:hypothesispytest"),
        *("-o", f"timeout={_CHECK_S[module]}", f"tests/kernel/{module}.py"),
        limit_s=_LIMIT_S[module],
        environment={
            "CI": "true",  # there is no reason to skip in there
            "PYTHONPATH": os.fspath(ROOT),
            "ZRAMD_RUNTIME_DIR": "/run/z",
            "ZRAMD_TEST_SERVER": server,
            "ZRAMD_TEST_KILLS": str(_KILLS),
        },
        directory=ROOT,
    )


@pytest.mark.parametrize(("module", "server", "check"), _ALL)
def test_in_guest(module: str, server: str, check: str) -> None:
    guest = _boot(module, server)
    results = [result for name, result in _RESULT.findall(guest.output) if name == check]
    assert results, f"the guest did not come to this check:\n{guest.output}"
    if set(results) != {"PASSED"}:
        pytest.fail(_report(guest.output, check), pytrace=False)


@pytest.mark.parametrize(("module", "server"), _GUESTS)
def test_the_guest_came_to_its_end(module: str, server: str) -> None:
    guest = _boot(module, server)
    assert guest.status is not None, f"killed at its time limit, or died:\n{guest.output}"


def _report(output: str, check: str) -> str:
    """The part of pytest's report that is about this check; all of it where that is not found."""
    parts = re.split(r"^(?=_{3,} .* _{3,}$)", output, flags=re.MULTILINE)
    about = [part for part in parts if re.match(rf"_+ (ERROR at \w+ of )?{check}\b", part)]
    return "\n".join(about) or output

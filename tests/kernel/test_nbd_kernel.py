"""A real kernel's nbd against both servers, in user-mode Linux.

One boot per server runs every check of in_guest.py; here each is a test of its own. A guest that
hangs is killed at its time limit, and the checks that it did not come to fail.
"""

import os
import re
import sys
from pathlib import Path

import pytest

from tests.conftest import require
from tests.kernel import uml
from tests.kernel.servers import ROOT, SERVERS

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(660)]

_LIMIT_S = 600
_IN_GUEST = Path(__file__).with_name("in_guest.py")
_CHECKS = re.findall(r"^def (test_\w+)", _IN_GUEST.read_text(), re.MULTILINE)
_RESULT = re.compile(r"in_guest\.py::(\w+)\S* .*?\b(PASSED|FAILED|ERROR|SKIPPED)\b")


@pytest.fixture(scope="module", params=SERVERS)
def guest(request: pytest.FixtureRequest) -> uml.Finished:
    """What one boot with this server printed."""
    for program in ("nbdkit", "nbd-client", "fio", "mkfs.ext4", "mkfs.xfs", "mkfs.btrfs"):
        require.program(program)
    return uml.run(
        *(sys.executable, "-m", "pytest", "-v", "--tb=short", "--color=no"),
        *("-p", "no:cacheprovider", "-p", "no:hypothesispytest"),
        *("-o", "timeout=60", os.fspath(_IN_GUEST.relative_to(ROOT))),
        limit_s=_LIMIT_S,
        environment={
            "CI": "true",  # there is no reason to skip in there
            "PYTHONPATH": os.fspath(ROOT),
            "ZRAMD_RUNTIME_DIR": "/run/z",
            "ZRAMD_TEST_SERVER": request.param,
        },
        directory=ROOT,
    )


@pytest.mark.parametrize("check", _CHECKS)
def test_in_guest(guest: uml.Finished, check: str) -> None:
    results = [result for name, result in _RESULT.findall(guest.output) if name == check]
    assert results, f"the guest did not come to this check:\n{guest.output}"
    if set(results) != {"PASSED"}:
        pytest.fail(_report(guest.output, check), pytrace=False)


def test_the_guest_came_to_its_end(guest: uml.Finished) -> None:
    assert guest.status is not None, f"killed at its time limit, or died:\n{guest.output}"


def _report(output: str, check: str) -> str:
    """The part of pytest's report that is about this check; all of it where that is not found."""
    parts = re.split(r"^(?=_{3,} .* _{3,}$)", output, flags=re.MULTILINE)
    about = [part for part in parts if re.match(rf"_+ (ERROR at \w+ of )?{check}\b", part)]
    return "\n".join(about) or output

"""vsock, in a guest whose kernel can connect it to itself, as few machines' can."""

import sys

import pytest

from tests.conftest import require
from tests.kernel import uml
from tests.kernel.servers import ROOT

pytestmark = pytest.mark.kernel


def test_clients_are_served_over_vsock() -> None:
    require.that(
        next(uml.MODULES.glob("*/kernel/net/vmw_vsock/vsock_loopback.ko"), None) is not None,
        f"no vsock_loopback.ko under {uml.MODULES}",
    )
    command = [sys.executable, "-m", "tests.kernel.in_vsock"]
    done = uml.run(*command, limit_s=120, directory=ROOT)
    assert done.status == 0, done.output
    assert "served over vsock" in done.output

"""Swap that cannot deadlock: guests short of memory, with our device as their only swap.

Each guest runs under_pressure.py; one that hangs is killed at its time limit and has no result.
scripts/pressure runs more of them, and the peers too, for docs/performance.md.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import require
from tests.kernel import uml
from tests.kernel.pressure_guests import FULL, KILLED, QUARTER_MORE, TWICE, result_of
from tests.kernel.servers import SERVERS
from tests.kernel.under_pressure import Result

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(1500)]

GUESTS = {
    **{f"a quarter more than RAM, {server}": (QUARTER_MORE, server) for server in SERVERS},
    **{f"full, {server}": (FULL, server) for server in SERVERS},
    **{f"twice the RAM, {server}": (TWICE, server) for server in SERVERS},
}
WHILE_KILLED = "a quarter more than RAM, zramd, its worker killed"
FITS = [name for name in GUESTS if not name.startswith("full")]
GUESTS[WHILE_KILLED] = (KILLED, "zramd")
IS_FULL = [name for name in GUESTS if name.startswith("full")]


@pytest.fixture(scope="module")
def pressed(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Result]]:
    """The result of a guest. All that are asked for run, two at a time, as soon as one is."""
    require.program("nbdkit")
    uml.program()
    wanted = [
        item.callspec.params["name"]
        for item in request.session.items
        if item.path == Path(__file__) and "name" in item.callspec.params
    ]
    running: dict[str, Future[uml.Finished]] = {}
    with ThreadPoolExecutor(2) as pool:
        for name in dict.fromkeys(wanted):
            guest, server = GUESTS[name]
            running[name] = pool.submit(guest.run, server)
        yield lambda name: result_of(running[name].result())
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", FITS)
def test_a_program_that_needs_more_than_the_ram_comes_to_its_end_and_nobody_is_killed(
    pressed, name
):
    result = pressed(name)
    assert result.program == 0  # it has found all of its memory right
    assert result.killed == 0
    assert (result.write_errors, result.io_stat.split()[:3]) == (0, ["0", "0", "0"])
    assert result.mib_per_s


@pytest.mark.parametrize("name", FITS)
def test_afterwards_the_guest_responds_and_its_swap_can_be_turned_off(pressed, name):
    result = pressed(name)
    assert result.responds_s >= 0
    assert result.swapoff_s >= 0


@pytest.mark.parametrize("name", [WHILE_KILLED])
def test_a_worker_that_is_killed_when_there_is_no_memory_is_replaced(pressed, name):
    """Its successor needs memory, and so may whoever has to write down that it has come."""
    result = pressed(name)
    assert result.kills >= 1
    assert result.program == 0  # it has found all of its memory right
    assert result.killed == 0
    assert result.swapoff_s >= 0


@pytest.mark.parametrize("name", IS_FULL)
def test_at_the_limit_writes_fail_and_the_kernel_kills_the_program_and_goes_on(pressed, name):
    """What others have on swap is right all the same: under_pressure.py has verified it."""
    result = pressed(name)
    assert result.write_errors > 0
    assert int(result.io_stat.split()[1]) > 0  # failed_writes
    assert (result.program, result.killed) == (-9, 1)
    assert result.responds_s >= 0
    assert result.swapoff_s >= 0

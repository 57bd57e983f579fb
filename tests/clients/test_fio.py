"""fio: what it wrote at random it reads back and verifies."""

import pytest

from tests.clients.serving import run
from tests.conftest import require


def fio(server, report, *options: str) -> None:
    require.that("nbd" in run("fio", "--enghelp"), "fio has no nbd engine")
    run(
        *("fio", "--name=verify", "--ioengine=nbd", f"--uri={server.uri}", "--iodepth=16"),
        *(*options, f"--output={report}"),
    )
    assert "err= 0" in report.read_text()


VERIFY = ("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0")


@pytest.mark.parametrize("pattern", ["randwrite", "randtrimwrite"])
def test_fio_verifies_what_it_wrote(server, tmp_path, pattern):
    verify = VERIFY if pattern == "randwrite" else ()
    options = ("--bsrange=512-64k", "--blockalign=512", "--size=32m", *verify)
    fio(server, tmp_path / "report", f"--rw={pattern}", *options)


def test_fio_verifies_with_several_jobs_that_read_and_write(server, tmp_path):
    """Each its own part, through its own connection; some of it is read back soon, all at last."""
    fio(
        *(server, tmp_path / "report", "--rw=randrw", "--rwmixread=30", *VERIFY),
        *("--numjobs=4", "--thread", "--size=8m", "--offset_increment=16m", "--group_reporting"),
        *("--bs=4k", "--verify_backlog=256", "--fsync=128", "--buffer_compress_percentage=50"),
    )

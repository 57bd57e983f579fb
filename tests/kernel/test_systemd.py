"""The units of systemd/, in a systemd that really boots and shuts down, in user-mode Linux.

One boot runs every check of in_systemd.py, then powers off with the swap and the file system in
use; here each check is a test of its own, and the console tells of the shutdown.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import require
from tests.kernel import systemd_root
from tests.kernel.servers import zramd

_UPGRADES = int(os.environ.get("ZRAMD_TEST_UPGRADES", "30"))
_LIMIT_S = 420 + 15 * _UPGRADES

pytestmark = [pytest.mark.kernel, pytest.mark.timeout(_LIMIT_S + 220)]

_SHUTDOWN_S = 30
_CHECKS = re.findall(
    r"^def (test_\w+)", Path(__file__).with_name("in_systemd.py").read_text(), re.MULTILINE
)
_RESULT = re.compile(r"in_systemd\.py::(\w+)\S* .*?\b(PASSED|FAILED|ERROR|SKIPPED)\b")

_PREPARE = f"""
zramd install-units --program {systemd_root.PROGRAM}
cd /etc/systemd/system
cp /usr/share/doc/zramd/examples/dev-nbd0.swap /usr/share/doc/zramd/examples/srv-files.mount .
cp /mnt/*.service .
# The program is on a file system of its own, as it may be elsewhere too.
mkdir zramd@.service.d
printf '[Unit]\\nRequiresMountsFor=/opt/zramd\\n' >zramd@.service.d/program.conf
mkdir -p /etc/zramd /srv/files
cp /mnt/*.toml /etc/zramd
systemctl enable dev-nbd0.swap srv-files.mount checks.service
"""
_FILES = {
    "prepare": _PREPARE,
    "swap0.toml": 'disksize = "256M"\nmem_limit = "96M"\nuse = "swap"\nnode = "/dev/nbd0"\n',
    "files.toml": """
disksize = "64M"
use = "mount"
mount_point = "/srv/files"
node = "/dev/nbd1"
""",
    "vm.toml": 'disksize = "16M"\n',
    "checks.service": f"""
[Service]
Type=exec
WorkingDirectory=/opt/zramd
Environment=PYTHONPATH=/opt/zramd PYTHONDONTWRITEBYTECODE=1 CI=true
Environment=ZRAMD_TEST_UPGRADES={_UPGRADES}
ExecStart=/bin/sh /mnt/checks
SuccessExitStatus=SIGTERM
[Install]
WantedBy=multi-user.target
""",
    "checks": """
.venv/bin/python -m pytest -v --tb=short --color=no -p no:cacheprovider -p no:hypothesispytest \\
    -o timeout=60 tests/kernel/in_systemd.py
systemctl start holder
echo "poweroff after $(cut -d' ' -f1 /proc/uptime) s"
systemctl --no-block poweroff
""",
    # Nothing stops it but the end of the shutdown.
    "holder.service": """
[Unit]
DefaultDependencies=no
[Service]
Type=notify
WorkingDirectory=/opt/zramd
Environment=PYTHONPATH=/opt/zramd PYTHONDONTWRITEBYTECODE=1
ExecStart=/opt/zramd/.venv/bin/python -m tests.kernel.in_systemd hold
""",
}


@pytest.fixture(scope="module")
def units(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all units and examples, as `zramd install-units` writes them."""
    root = tmp_path_factory.mktemp("installed")
    zramd("install-units", "--destdir", str(root), "--program", sys.executable)
    directory = tmp_path_factory.mktemp("units")
    for kind in ("service", "socket", "swap", "mount"):
        for unit in root.rglob(f"*.{kind}"):
            shutil.copy(unit, directory)
    return directory


def test_systemd_finds_nothing_to_say_about_the_units(units: Path) -> None:
    analyze = require.program("systemd-analyze")
    names = [unit.name.replace("@.", "@swap0.") for unit in units.iterdir()]
    assert len(names) == 5
    done = subprocess.run(
        [analyze, "--man=no", "verify", *(f"./{name}" for name in names)],
        cwd=units,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_server_is_exposed_little(units: Path) -> None:
    analyze = require.program("systemd-analyze")
    done = subprocess.run(
        [analyze, "--offline=true", "--threshold=30", "--no-pager", "security", "zramd@.service"],
        cwd=units,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Overall exposure level" in done.stdout


@pytest.fixture(scope="module")
def console(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What one boot printed."""
    files = tmp_path_factory.mktemp("guest")
    for name, text in _FILES.items():
        (files / name).write_text(text)
    return systemd_root.boot(files, limit_s=_LIMIT_S)


@pytest.mark.parametrize("check", _CHECKS)
def test_in_guest(console: str, check: str) -> None:
    results = [result for name, result in _RESULT.findall(console) if name == check]
    assert results, f"the guest did not come to this check:\n{console}"
    if set(results) != {"PASSED"}:
        pytest.fail(_report(console, check), pytrace=False)


def test_the_shutdown_takes_its_steps_in_order(console: str) -> None:
    """The server's end before the swap's would be the end of the pages on it."""
    shutdown = _shutdown(console)
    for steps in (
        ("Deactivated swap dev-nbd0.swap", "zramd-attach@swap0.service", "zramd@swap0.service"),
        ("Unmounted srv-files.mount", "zramd-attach@files.service", "zramd@files.service"),
    ):
        places = [shutdown.find(step if " " in step else f"Stopped {step}") for step in steps]
        assert -1 not in places, shutdown
        assert places == sorted(places), shutdown


def test_memory_that_was_on_the_swap_comes_through_the_shutdown(console: str) -> None:
    assert "holder: the swap is off, the memory right" in _shutdown(console), console


def test_the_shutdown_is_quick(console: str) -> None:
    began = re.search(r"poweroff after ([\d.]+) s", console)
    ended = re.search(r"\[ *([\d.]+)\] reboot: System halted", console)
    assert began is not None, console
    assert ended is not None, console
    assert float(ended[1]) - float(began[1]) < _SHUTDOWN_S, console


def test_nothing_failed_or_waited_in_vain_at_the_shutdown(console: str) -> None:
    shutdown = _shutdown(console)
    bad = re.compile(r".*(?:zramd|nbd|srv-files|opt-).*(?:FAILED|[Ff]ailed|timed out).*")
    assert bad.findall(shutdown) == []
    assert "timed out" not in shutdown


def test_no_ordering_cycle_was_found_at_boot_or_shutdown(console: str) -> None:
    assert "systemd[1]: Reached target" in console, console
    assert re.findall(r".*(?:ordering cycle|deleted to break).*", console) == []


def _report(console: str, check: str) -> str:
    """What pytest in the guest says about this check; all of the console where that is missing."""
    said = "\n".join(re.findall(r"^\[ *[\d.]+\] sh\[\d+\]: (.*)", console, re.MULTILINE))
    parts = re.split(r"^(?=_+ .* _+$)", said, flags=re.MULTILINE)
    about = [part for part in parts if re.match(rf"_+ (ERROR at \w+ of )?{check}\b", part)]
    return "\n".join(about) or console


def _shutdown(console: str) -> str:
    _, found, after = console.partition("poweroff after ")
    assert found, console
    return after

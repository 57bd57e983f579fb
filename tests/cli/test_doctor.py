"""`zramd doctor` on the machine that runs the tests, whatever that is; docs/doctor.md against the
table. tests/kernel/test_doctor.py has each check on machines that are made for it."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.conftest import wait_for
from tests.conftest import require
from zramd.cli import doctor as verb
from zramd.cli import main
from zramd.kernel import doctor
from zramd.kernel.doctor import CHECKS, Machine, Report
from zramd.kernel.doctor.verdict import ok, problem, unknown, warning

PAGE = Path(__file__).parents[2] / "docs" / "doctor.md"
NUMBERS = {check.slug: check.exit_status for check in CHECKS}


def checks(said: str) -> list[dict]:
    told = json.loads(said)
    assert told.keys() == {"schema", "checks"}
    assert told["schema"] == 1
    return told["checks"]


def of(device: str | None, told: list[dict]) -> dict[str, dict]:
    return {check["check"]: check for check in told if check["device"] == device}


def first_problem(told: list[dict]) -> int:
    """The exit code that goes with these checks."""
    return next((c["exit_status"] for c in told if c["status"] == "problem"), 0)


def test_the_page_lists_every_check_with_its_exit_status_and_meaning():
    rows = re.findall(r"^\| (\d+) \| ([\w-]+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    assert rows == [(str(c.exit_status), c.slug, c.meaning) for c in CHECKS]


def test_the_report_is_a_line_for_each_check_and_its_exit_code_is_the_first_problems(zramd):
    done = zramd.run("doctor")
    lines = [line.split(None, 2) for line in done.stdout.splitlines()]
    assert {status for status, *_ in lines} <= {"ok", "warning", "problem", "unknown"}
    of_machine = [slug for slug in NUMBERS if slug in {slug for _, slug, _ in lines}]
    assert [slug for _, slug, _ in lines] == of_machine
    assert of_machine[:3] == ["kernel", "nbd", "nbd-nodes"]
    problems = [slug for status, slug, _ in lines if status == "problem"]
    assert done.returncode == (NUMBERS[problems[0]] if problems else 0)
    assert "Traceback" not in done.stderr
    assert done.stderr.count("\n") == bool(problems)


def test_json_has_the_same_with_the_number_of_each_check(zramd):
    done = zramd.run("doctor", "--json")
    told = checks(done.stdout)
    for check in told:
        keys = {"check", "device", "status", "exit_status", "finding", "advice"}
        assert check.keys() == keys
        assert check["exit_status"] == NUMBERS[check["check"]]
        assert check["finding"]
        assert (check["advice"] is None) == (check["status"] == "ok") or check[
            "status"
        ] == "unknown"
    assert done.returncode == first_problem(told)
    lines = zramd.run("doctor").stdout.splitlines()
    assert len(lines) == len(told)


def test_what_it_tells_of_this_machine_is_so(zramd):
    told = of(None, checks(zramd.run("doctor", "--json").stdout))
    assert os.uname().release in told["kernel"]["finding"]
    free = Path("/proc/sys/vm/min_free_kbytes").read_text().strip()
    assert f"vm.min_free_kbytes is {free}" in told["min-free"]["finding"]
    zswap = Path("/sys/module/zswap/parameters/enabled")
    on = zswap.exists() and zswap.read_text() == "Y\n"
    assert told["zswap"]["status"] == ("warning" if on else "ok")


def test_a_running_device_is_looked_at_and_one_that_is_named_alone(zramd):
    for name in ("zram0", "zram1"):
        zramd.serve(name)
    both = checks(zramd.run("doctor", "--json").stdout)
    assert of("zram0", both)["server"]["status"] == of("zram1", both)["server"]["status"] == "ok"
    assert "zram0, zram1" in of(None, both)["devices"]["finding"]
    one = checks(zramd.run("doctor", "zram1", "--json").stdout)
    assert of("zram0", one) == {}
    assert of("zram1", one)["server"]["status"] == "ok"
    assert of(None, one).keys() == of(None, both).keys()


def test_a_name_that_nothing_has_is_told(zramd):
    assert "there is no device zram7" in zramd.fails(20, "doctor", "zram7")
    zramd.fails(2, "doctor", "a/b")
    zramd.fails(2, "doctor", "--colour")


def test_a_name_that_only_has_a_file_is_no_error(zramd, tmp_path):
    (tmp_path / "files.toml").write_text('disksize = "16M"\n')
    zramd.environment["ZRAMD_CONFIG_DIR"] = str(tmp_path)
    told = checks(zramd.run("doctor", "files", "--json").stdout)
    assert of(None, told)["config"]["status"] == "ok"
    assert "1" in of(None, told)["config"]["finding"]


def test_a_fault_in_a_file_is_a_problem_with_the_line_of_it(zramd, tmp_path):
    (tmp_path / "files.toml").write_text('disksize = "16M"\ncolour = "red"\n')
    zramd.environment["ZRAMD_CONFIG_DIR"] = str(tmp_path)
    done = zramd.run("doctor", "--json")
    told = checks(done.stdout)
    assert f"{tmp_path}/files.toml:2: colour" in of(None, told)["config"]["finding"]
    assert done.returncode == first_problem(told) != 0


def test_a_server_that_is_dead_is_a_problem_only_where_something_is_attached(zramd):
    zramd.serve("zram0")
    zramd.kill("zram0")
    server = of("zram0", checks(zramd.run("doctor", "--json").stdout))["server"]
    assert (server["status"], server["advice"]) == ("warning", "zramd down zram0")


def test_a_dead_attachment_is_a_problem_and_its_node_is_not_opened(zramd):
    require.root()
    require.path("/dev/fuse")
    require.path("/dev/loop-control")
    require.program("nbdfuse")
    require.program("losetup")
    node = zramd.ok("up", "zram0", "--disksize=16M", "--via=loop").strip()
    zramd.kill("zram0")
    script = """if True:
        import sys
        opened = lambda event, args: event == "open" and print("opened", args[0], file=sys.stderr)
        sys.addaudithook(opened)
        from zramd.cli import main
        main(["doctor", "--json"])"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=zramd.environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = checks(done.stdout)
    server = of("zram0", told)["server"]
    assert server["status"] == "problem"
    assert node in server["finding"]
    assert done.returncode == first_problem(told) != 0
    assert "opened /proc/swaps" in done.stderr
    assert "opened /dev/loop" not in done.stderr
    assert "opened /dev/nbd" not in done.stderr


def test_a_server_that_is_stopped_is_a_problem_and_not_waited_for_long(zramd, monkeypatch, capsys):
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(zramd.runtime))
    monkeypatch.setattr("zramd.control.client.ANSWER_S", 0.05)
    zramd.serve("zram0")
    worker = zramd.worker("zram0")
    os.kill(worker, signal.SIGSTOP)
    try:
        with pytest.raises(SystemExit) as ended:
            main(["doctor", "--json"])
        told = checks(capsys.readouterr().out)
    finally:
        os.kill(worker, signal.SIGCONT)
    assert f"process {worker}" in of("zram0", told)["server"]["advice"]
    assert ended.value.code == first_problem(told) != 0
    wait_for(lambda: zramd.devices()["zram0"]["state"] == "serving")


@pytest.mark.parametrize("runtime", [None, "/proc/self/mem"], ids=["none", "unusable"])
def test_where_there_are_no_devices_to_be_seen_the_rest_is_told(zramd, runtime):
    for variable in ("ZRAMD_RUNTIME_DIR", "XDG_RUNTIME_DIR"):
        zramd.environment.pop(variable, None)
    if runtime is not None:
        zramd.environment["ZRAMD_RUNTIME_DIR"] = runtime
        assert "runtime directory" in zramd.fails(22, "doctor", "zram0")
    told = of(None, checks(zramd.run("doctor", "--json").stdout))
    assert told["devices"]["status"] == (
        "ok" if runtime is None and os.geteuid() == 0 else "unknown"
    )
    assert told["kernel"]["status"] in ("ok", "warning", "problem")


def test_nobody_gets_a_report_too(zramd):
    require.root()
    as_nobody = [require.program("setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups"]
    environment = {**zramd.environment, "ZRAMD_RUNTIME_DIR": "", "XDG_RUNTIME_DIR": ""}
    tries = [*as_nobody, sys.executable, "-c", "import click, asyncvarlink, zramd.cli"]
    may = subprocess.run(tries, env=environment, capture_output=True, check=False)
    require.that(may.returncode == 0, "nobody may not read this checkout")
    done = subprocess.run(
        [*as_nobody, *zramd.argv("doctor", "--json")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    told = checks(done.stdout)
    assert done.returncode == first_problem(told)
    assert "Traceback" not in done.stderr
    assert of(None, told)["devices"]["status"] == "unknown"
    assert of(None, told)["swappiness"]["status"] != "unknown"


def test_a_look_loads_no_compressor(zramd):
    zramd.serve("zram0")
    script = """if True:
        import sys
        from zramd.kernel import doctor
        doctor.examine(doctor.look())
        sys.exit(any(m.split(".")[0] in ("lz4", "zstandard") for m in sys.modules))"""
    done = subprocess.run([sys.executable, "-c", script], env=zramd.environment, check=False)
    assert done.returncode == 0


MADE = [
    Report(CHECKS[0], None, ok("all is well")),
    Report(CHECKS[1], None, warning("it may  hurt", "mend\nit")),
    Report(CHECKS[2], None, unknown("nobody knows")),
]
ILL = [
    *MADE,
    Report(CHECKS[4], "a", problem("it hurts", "help")),
    Report(CHECKS[5], "b", problem("it", "x")),
]


@pytest.fixture
def made(monkeypatch):
    """What `zramd doctor` finds, instead of a machine."""

    def be(reports):
        monkeypatch.setattr(verb, "look", Machine)
        monkeypatch.setattr(verb, "examine", lambda machine, name: reports)

    return be


def test_warnings_and_the_unknown_end_in_0_and_nothing_is_said_on_stderr(made, capsys):
    made(MADE)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == 0
    said = capsys.readouterr()
    assert said.err == ""
    assert said.out.splitlines() == [
        "ok      kernel            all is well",
        "warning nbd               it may hurt; mend it",
        "unknown nbd-nodes         nobody knows",
    ]


def test_the_first_of_several_problems_gives_the_exit_code(made, capsys):
    made(ILL)
    with pytest.raises(SystemExit) as ended:
        main(["doctor"])
    assert ended.value.code == NUMBERS["io-flusher"] == 64
    assert capsys.readouterr().err == (
        "zramd: problems: 2, warnings: 1; the first problem is io-flusher\n"
    )
    with pytest.raises(SystemExit) as ended:
        main(["doctor", "--json"])
    assert ended.value.code == 64
    assert of("a", checks(capsys.readouterr().out))["io-flusher"]["advice"] == "help"


@pytest.mark.parametrize(
    ("more", "coloured"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)],
    ids=["terminal", "NO_COLOR", "dumb"],
)
def test_there_are_colours_on_a_terminal_alone(zramd, more, coloured):
    zramd.environment.pop("NO_COLOR", None)
    environment = {**zramd.environment, "TERM": "xterm", **more}
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        zramd.argv("doctor"),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.DEVNULL,
    )
    os.close(theirs)
    said = b""
    try:
        while chunk := os.read(ours, 65536):
            said += chunk
    except OSError:  # how a terminal's end is told
        os.close(ours)
    assert process.wait() in (0, *NUMBERS.values())
    assert said.count(b"\n") >= 20
    assert (b"\x1b[" in said) == coloured
    assert b"\x1b[" not in zramd.run("doctor").stdout.encode()


def test_doctor_of_the_kernels_names_finds_what_has_lost_its_directory(
    zramd, monkeypatch, tmp_path
):
    """As the kernel's nbd has it of a server that was told to end while it was attached."""
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(zramd.runtime))
    for node, backend in (
        ("nbd0", f"zramd:{zramd.runtime}/lost#17\n"),
        ("nbd1", "zramd:/another/place/theirs#18\n"),
        ("nbd2", "somebody else's\n"),
    ):
        (tmp_path / node).mkdir()
        (tmp_path / node / "backend").write_text(backend)
    monkeypatch.setattr(doctor.machine, "SYS_BLOCK", tmp_path)
    (zramd.runtime / "there").mkdir()
    assert doctor.machine.device_names() == ["there", "lost"]
    (zramd.runtime / "there").rmdir()

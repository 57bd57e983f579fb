"""`zramd upgrade`, of real processes: what runs the server changes, what it serves does not."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.nbd.harness import RawClient, wait_for
from tests.service.server import CONTENTS, ROOT, Server, check, instead, lives, write
from zramd import __version__
from zramd.cli import upgrade
from zramd.errors import DeviceBusy, ServerFailed, ZramdError
from zramd.kernel import attach
from zramd.nbd.address import UnixAddress
from zramd.service import handover
from zramd.store import PAGE

MIB = 1 << 20


def program(before: str = "", after: str = "") -> list[str]:
    """Ours, with more code before and after it is imported."""
    code = f"{before}\nimport sys; sys.path.insert(0, {str(ROOT)!r})\n"
    code += f"from zramd.cli import main; import zramd.cli.serving\n{after}\nmain()"
    return [sys.executable, "-P", "-c", code]


AT_ITS_TURN = """import os, signal, time
from zramd.service import worker
MARK = os.environ["ZRAMD_RUNTIME_DIR"] + "/turn"
worker._take_over = """
DIES_AT_ITS_TURN = program(after=AT_ITS_TURN + "lambda *_: os.kill(os.getpid(), signal.SIGKILL)")
SLEEPS_AT_ITS_TURN = program(after=AT_ITS_TURN + "lambda *_: (open(MARK, 'x'), time.sleep(1000))")
SAYS_THAT_IT_HAS_LOADED = program(
    before="import time; time.sleep(0.5)",
    after="""import os
from zramd.service import link
receive = link.receive
def say_it(*arguments):
    open(os.environ["ZRAMD_RUNTIME_DIR"] + "/loaded", "x")
    return receive(*arguments)
link.receive = say_it
""",
)
SLEEPS_AS_CANDIDATE = program("import time; time.sleep(1000)")


def say(server: Server, *arguments: str, root: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """The command line of the zramd that is in `root`."""
    return subprocess.run(
        [sys.executable, "-m", "zramd.cli", *arguments],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )


def ask(server: Server, program: list[str]) -> int:
    """Have it upgraded to this; the candidate's process when that has loaded."""
    with server.control() as control:
        return control.upgrade(program)


def ask_beside(server: Server, program: list[str]) -> tuple[threading.Thread, list[str]]:
    """The same in a thread, and what it fails with; returns when the candidate runs."""
    failed: list[str] = []

    def run() -> None:
        try:
            ask(server, program)
        except (ServerFailed, DeviceBusy) as error:
            failed.append(error.line())

    thread = threading.Thread(target=run)
    thread.start()
    wait_for(lambda: candidates(server))
    return thread, failed


def children(process: int) -> set[int]:
    path = Path(f"/proc/{process}/task/{process}/children")
    return {int(child) for child in path.read_text().split()}


def candidates(server: Server) -> set[int]:
    return {c for c in children(server.process.pid) - {server.worker} if lives(c)}


def is_as_before(server: Server, worker: int) -> None:
    """Nothing has changed, and an upgrade goes well now."""
    assert server.worker == worker
    wait_for(lambda: not candidates(server))
    check(server)
    upgrades(server)


def upgrades(server: Server) -> None:
    before = server.worker
    upgrade.command.callback("s0")
    assert server.worker not in (before, server.process.pid)
    assert runs_our_command(server.process.pid)
    check(server)


def runs_our_command(process: int) -> bool:
    return upgrade._program()[-1].encode() in Path(f"/proc/{process}/cmdline").read_bytes()


@pytest.fixture
def newer(tmp_path) -> Path:
    """A directory with a zramd 99."""
    shutil.copytree(
        ROOT / "zramd", tmp_path / "zramd", ignore=shutil.ignore_patterns("__pycache__", "units")
    )
    init = tmp_path / "zramd/__init__.py"
    init.write_text(init.read_text().replace(f'"{__version__}"', '"99"'))
    return tmp_path


@pytest.mark.parametrize("more", [[], ["--for=mount"]], ids=["", "hardened"])
def test_the_zramd_that_is_typed_serves_what_the_old_one_did_and_back(start, newer, more):
    server = start("--disksize=64M", "--mem-limit=9M", *more)
    write(server)
    inodes = [p.stat().st_ino for p in (server.paths.nbd_socket, server.paths.control_socket)]
    for root, now, was in ((newer, "99", __version__), (ROOT, __version__, "99")):
        done = say(server, "upgrade", "s0", root=root)
        told = f"zramd: s0 is served by zramd {now} now (was {was})\n"
        assert (done.returncode, done.stdout, done.stderr) == (0, "", told)
        assert server.paths.server() == server.process.pid
        check(server)
        server.kill_worker()  # another is a fork of the new code
        with server.control() as control:
            assert control.version() == now
            assert control.statistics().mem_limit == 9 * MIB
        check(server)
    assert [
        p.stat().st_ino for p in (server.paths.nbd_socket, server.paths.control_socket)
    ] == inodes
    assert server.said("Traceback") == 0
    assert server.end(signal.SIGINT) == 0
    assert not server.paths.dir.exists()


def test_nothing_is_left_of_an_upgrade_in_the_processes_that_go_on(start):
    server = start()
    write(server)
    upgrades(server)
    first = opened(server.process.pid)
    assert "pipe" not in opened(server.worker)
    links = [os.readlink(link) for link in Path(f"/proc/{server.worker}/fd").iterdir()]
    sockets = [link for link in links if link.startswith("socket:")]
    assert len(sockets) == len(set(sockets))  # or it has inherited what it is handed anyway
    for _ in range(2):
        upgrades(server)
        assert opened(server.process.pid) == first
    assert children(server.process.pid) == {server.worker}


def opened(process: int) -> list[str]:
    """What it has open, by kind."""
    links = Path(f"/proc/{process}/fd").iterdir()
    return sorted(os.readlink(link).partition(":")[0] for link in links)


def test_what_is_handed_over_leaves_the_environment(monkeypatch):
    reader, writer = os.pipe()
    for descriptor in (reader, writer):
        os.set_inheritable(descriptor, True)
    state = {"role": "candidate", "claim": reader, "link": writer, "descriptors": {}}
    monkeypatch.setenv("ZRAMD_HANDOVER", json.dumps({"format": handover.FORMAT, **state}))
    handed = handover.received()
    assert handed is not None
    assert (handed.claim, handed.link) == (reader, writer)
    assert "ZRAMD_HANDOVER" not in os.environ
    assert handover.received() is None
    assert not any(map(os.get_inheritable, (reader, writer)))
    os.close(reader)
    os.close(writer)


def test_what_cannot_be_understood_is_refused(monkeypatch):
    monkeypatch.setenv("ZRAMD_HANDOVER", json.dumps({"format": 1000, "version": "99"}))
    with pytest.raises(ServerFailed, match="zramd 99 hands over in format 1000"):
        handover.received()


@pytest.mark.parametrize(
    ("what", "why"),
    [
        (["/no/such/program"], "cannot run ['/no/such/program']: [Errno 2]"),
        ([], "cannot run []"),
        (["/bin/false"], "it ended with status 1"),
        (program("import os; os.kill(os.getpid(), 11)"), "it was ended by signal 11"),
        (program("raise SystemExit('zramd: no; try another')"), "no; try another"),
        (program("import nowhere"), "No module named 'nowhere'"),
        (program(after="from zramd.store import header; header.VERSION = 99"), "version 2 of the"),
        (program(after="from zramd.service import handover; handover.FORMAT = 9"), "format 9"),
        (["/bin/sh", "-c", "seq 100000 >&2; echo zramd: full >&2; exit 3"], "full"),
        ([sys.executable, "-c", "import time; time.sleep(1000)"], "not loaded within"),
    ],
)
def test_a_program_that_cannot_take_over_changes_nothing(start, monkeypatch, what, why):
    monkeypatch.setenv("LOAD_S", "1" if "within" in why else "30")
    server = start(module="tests.unlimited")
    write(server)
    worker = server.worker
    with pytest.raises(ServerFailed) as failed:
        ask(server, what)
    assert why in failed.value.message
    assert f"zramd {__version__} serves on" in failed.value.hint
    is_as_before(server, worker)


def test_who_dies_at_its_turn_is_followed_by_a_worker_of_the_old_code(start, monkeypatch):
    server = start()
    write(server)
    before = server.worker
    monkeypatch.setattr(upgrade, "_program", lambda: DIES_AT_ITS_TURN)
    with pytest.raises(ServerFailed, match="died before it was ready: s0 is served by"):
        upgrade.command.callback("s0")
    monkeypatch.undo()
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(server.paths.dir.parent))
    assert server.worker != before
    assert not runs_our_command(server.process.pid)
    assert server.said(f"zramd {__version__} has not taken over")
    is_as_before(server, server.worker)


@pytest.mark.parametrize("when", ["loading", "loaded", "leaving", "at its turn"])
def test_a_worker_that_is_killed_meanwhile_costs_no_page(start, when):
    server = start()
    supervisor = server.process.pid
    write(server)
    before = server.worker
    if when == "at its turn":
        candidate = ask(server, SLEEPS_AT_ITS_TURN)
        wait_for(lambda: not lives(before))
        os.kill(candidate, signal.SIGKILL)
    else:
        what = SLEEPS_AS_CANDIDATE if when == "loading" else SAYS_THAT_IT_HAS_LOADED
        thread, failed = ask_beside(server, what)
        (candidate,) = candidates(server)
        if when == "loaded":  # the supervisor, which waits for either, hears of both at once
            wait_for(lambda: " S " in Path(f"/proc/{supervisor}/stat").read_text())
            os.kill(supervisor, signal.SIGSTOP)
        elif when == "leaving":  # the worker learns that it is to leave, and cannot
            os.kill(before, signal.SIGSTOP)
        if when != "loading":
            wait_for((server.paths.dir.parent / "loaded").exists)
        os.kill(before, signal.SIGKILL)
        if when == "loaded":
            wait_for(lambda: not lives(before))
            os.kill(supervisor, signal.SIGCONT)
        thread.join()
        assert failed
    wait_for(lambda: server.worker not in (before, supervisor))
    assert (server.worker == candidate) == (when in ("loaded", "leaving"))
    is_as_before(server, server.worker)


def test_a_worker_that_does_not_leave_is_killed(start, monkeypatch):
    monkeypatch.setenv("LEAVE_S", "0.2")
    server = start(module="tests.unlimited")
    write(server)
    before = server.worker
    thread, _failed = ask_beside(server, SAYS_THAT_IT_HAS_LOADED)
    (candidate,) = candidates(server)
    os.kill(before, signal.SIGSTOP)
    wait_for(lambda: server.worker == candidate)
    thread.join()
    assert not lives(before)
    is_as_before(server, candidate)


def test_a_candidate_that_is_killed_while_it_waits_is_followed_by_the_old_code(start):
    server = start()
    write(server)
    before = server.worker
    thread, _failed = ask_beside(server, SAYS_THAT_IT_HAS_LOADED)
    (candidate,) = candidates(server)
    os.kill(before, signal.SIGSTOP)
    wait_for((server.paths.dir.parent / "loaded").exists)
    os.kill(candidate, signal.SIGKILL)
    wait_for(lambda: not lives(candidate))
    os.kill(before, signal.SIGCONT)
    thread.join()
    wait_for(lambda: server.worker not in (before, server.process.pid))
    is_as_before(server, server.worker)


IN_ITS_BECOMING = """import os, time
if '"supervisor"' in os.environ['ZRAMD_HANDOVER']: time.sleep(1)
"""


@pytest.mark.parametrize("what", ["the supervisor", "its worker"])
def test_what_happens_while_the_supervisor_becomes_the_program_is_not_lost(start, what):
    server = start()
    write(server)
    candidate = ask(server, program(IN_ITS_BECOMING))
    wait_for(lambda: b"sleep(1)" in Path(f"/proc/{server.process.pid}/cmdline").read_bytes())
    if what == "the supervisor":
        assert server.end() == 0
        assert not lives(candidate)
        assert not server.paths.dir.exists()
        return
    os.kill(candidate, signal.SIGKILL)
    wait_for(lambda: server.worker not in (candidate, server.process.pid) and lives(server.worker))
    is_as_before(server, server.worker)


@pytest.mark.parametrize("what", [SLEEPS_AS_CANDIDATE, SLEEPS_AT_ITS_TURN], ids=["early", "late"])
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_meanwhile_ends(start, what, how):
    server = start()
    if what is SLEEPS_AS_CANDIDATE:
        thread, failed = ask_beside(server, what)
        (candidate,) = candidates(server)
    else:
        candidate = ask(server, what)
        wait_for((server.paths.dir.parent / "turn").exists)
        # One that has always something to do has nobody else come to run on one processor.
        wait_for(lambda: " S " in Path(f"/proc/{server.process.pid}/stat").read_text())
    assert server.end(how) == 0
    assert not lives(candidate)
    assert not server.paths.dir.exists()
    if what is SLEEPS_AS_CANDIDATE:
        thread.join()
        assert failed


@pytest.mark.parametrize("when", ["loading", "at its turn", "serving"])
def test_a_candidate_dies_with_its_supervisor(start, when):
    server = start()
    thread = None
    if when == "loading":
        thread, _failed = ask_beside(server, SLEEPS_AS_CANDIDATE)
        (candidate,) = candidates(server)
    elif when == "at its turn":
        candidate = ask(server, SLEEPS_AT_ITS_TURN)
        wait_for((server.paths.dir.parent / "turn").exists)
    else:
        candidate = ask(server, program())
        wait_for(lambda: server.worker == candidate)
    server.process.kill()
    server.process.wait()
    wait_for(lambda: not lives(candidate))
    if thread is not None:
        thread.join()


def test_one_upgrade_at_a_time(start):
    server = start()
    write(server)
    thread, failed = ask_beside(server, SLEEPS_AS_CANDIDATE)
    with pytest.raises(DeviceBusy, match="another upgrade is under way"):
        ask(server, program())
    (candidate,) = candidates(server)
    os.kill(candidate, signal.SIGKILL)
    thread.join()
    assert "signal 9" in failed[0]
    is_as_before(server, server.worker)


def test_a_candidate_that_hangs_at_its_turn_is_followed_by_the_old_code(start, monkeypatch):
    monkeypatch.setenv("READY_S", "0.5")
    server = start(module="tests.unlimited")
    write(server)
    before = server.worker
    candidate = ask(server, SLEEPS_AT_ITS_TURN)
    wait_for(lambda: server.worker not in (before, candidate, server.process.pid))
    wait_for(lambda: server.said("it was not ready in time"))
    check(server)


def test_a_worker_that_ends_is_not_killed_for_not_leaving(start, monkeypatch):
    monkeypatch.setenv("LEAVE_S", "0.1")
    code = """import time
from tests.unlimited import main
from zramd.device import Zram
close, times = Zram.close, []
def slow_at_last(self, **how):
    times.append(time.sleep(3 * len(times)))
    close(self, **how)
Zram.close = slow_at_last
main()"""
    server = start(starter=instead(code))
    thread, failed = ask_beside(server, program("import time; time.sleep(0.5)"))
    with server.control() as control:
        control.stop()
    assert server.process.wait(30) == 0
    thread.join()
    assert failed


def test_a_server_that_is_told_to_end_and_in_use_is_not_upgraded(start):
    server = start("--disksize=64M", "--for=mount")
    with server.client() as client:
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.said("serving on until the last client has left"))
        with pytest.raises(DeviceBusy, match="it has been told to end"):
            ask(server, program())
        assert client.read(0, PAGE) == bytes(PAGE)
    assert server.process.wait(30) == 0


@pytest.mark.parametrize("root", ["checkout", "site-packages"])
def test_the_program_takes_nothing_but_zramd_from_where_that_is(tmp_path, monkeypatch, root):
    """Where it is installed there may be modules with the names of Python's own."""
    where = tmp_path / root
    shutil.copytree(ROOT / "zramd", where / "zramd", ignore=shutil.ignore_patterns("__pycache__"))
    (where / "decimal.py").write_text("raise RuntimeError('this is not Python')")
    monkeypatch.setattr(upgrade.zramd, "__file__", str(where / "zramd/__init__.py"))
    *start, code = upgrade._program()
    looks = "; import decimal; print(zramd.cli.__file__)"
    said = subprocess.run(
        [*start, code.removesuffix("; main()") + looks], capture_output=True, text=True, check=True
    )
    assert said.stdout == f"{where}/zramd/cli/__init__.py\n"


def test_a_device_whose_connection_would_not_be_made_again_is_not_upgraded(start, monkeypatch):
    server = start()
    write(server)
    worker = server.worker
    attachment = attach.Attachment("s0", "/dev/loop0", "loop")
    with monkeypatch.context() as patch:
        patch.setattr(attach, "attached", lambda _: attachment)
        with pytest.raises(DeviceBusy, match="attached as /dev/loop0 through loop"):
            upgrade.command.callback("s0")
    attachment = attach.Attachment("s0", "/dev/nbd0", "nbd")
    with monkeypatch.context() as patch:
        patch.setattr(attach, "attached", lambda _: attachment)
        patch.setattr(attach, "may_connect", lambda _: False)
        with pytest.raises(DeviceBusy, match="may not connect /dev/nbd0 again"):
            upgrade.command.callback("s0")
    with server.client() as client, monkeypatch.context() as patch:
        patch.setattr(attach, "others", lambda: {os.getpid(): "/dev/nbd7"})
        with pytest.raises(DeviceBusy, match="/dev/nbd7 is connected to it"):
            upgrade.command.callback("s0")
        assert client.read(0, PAGE) == CONTENTS[0]
    is_as_before(server, worker)


def test_a_server_without_a_worker_says_so(start):
    server = start()
    server.wear_out()
    with pytest.raises(ServerFailed, match="s0 has no worker now"):
        upgrade.command.callback("s0")
    server.begin_again()
    upgrades_with_no_pages(server)


def upgrades_with_no_pages(server: Server) -> None:
    upgrade.command.callback("s0")
    assert runs_our_command(server.process.pid)


def test_who_serves_is_found_at_once_and_after_a_death(start):
    """Though the supervisor is slow to write it down."""
    code = """import time
from zramd.cli import main
from zramd.service.runtime import Claim
serve_by = Claim.serve_by
def slow(self, worker):
    time.sleep(0.5)
    serve_by(self, worker)
Claim.serve_by = slow
main()"""
    server = start(starter=instead(code))
    before = server.worker
    assert before != server.process.pid
    write(server)
    os.kill(before, signal.SIGKILL)
    wait_for(lambda: server.said(" is served on ") == 2)
    assert server.worker == before  # not written down yet
    upgrade.command.callback("s0")
    check(server)


def test_a_reserved_arena_stays_locked_by_the_supervisor(start):
    server = start("--disksize=64M", "--mem-limit=16M", "--prealloc")
    write(server)
    upgrades(server)
    status = Path(f"/proc/{server.process.pid}/status").read_text()
    assert int(status.partition("VmLck:")[2].split()[0]) >= 15 * 1024
    server.kill_worker()
    check(server)
    with server.control() as control:
        assert control.statistics().mem_reserved >= 15 * MIB


def test_where_it_listens_is_read_again(start, tmp_path):
    old, new, file = tmp_path / "old.sock", tmp_path / "new.sock", tmp_path / "s0.toml"
    text = f'disksize = "64M"\nlisten = ["unix:{old}"]\n'
    file.write_text(text)
    server = start("--config", str(file))
    write(server)
    file.write_text(text.replace("old", "new"))
    upgrades(server)
    with RawClient(UnixAddress(new)) as client:
        assert client.read(0, PAGE) == CONTENTS[0]
    with pytest.raises(ConnectionRefusedError):
        RawClient(UnixAddress(old))
    worker = server.worker
    file.write_text(text.replace("disksize", "disk"))
    with pytest.raises(ServerFailed, match="disk"):
        ask(server, upgrade._program())
    file.write_text(text)
    is_as_before(server, worker)


def test_an_address_that_cannot_be_had_at_its_turn_leaves_the_pages_to_the_old_code(
    start, tmp_path
):
    file, taken = tmp_path / "s0.toml", tmp_path / "none/more.sock"
    text = 'disksize = "64M"\n'
    file.write_text(text)
    server = start("--config", str(file))
    write(server)
    before = server.worker
    file.write_text(f'{text}listen = ["unix:{taken}"]\n')
    with pytest.raises(ServerFailed, match="died before it was ready"):
        upgrade.command.callback("s0")
    wait_for(lambda: server.said(f"(cannot listen on unix:{taken}"))
    assert server.worker != before
    file.write_text(text)
    is_as_before(server, server.worker)


def test_a_program_too_long_to_be_told_is_refused(start):
    server = start()
    write(server)
    worker = server.worker
    for program in (["x" * 70_000], ["/bin/sh", "\N{EURO SIGN}" * 22_000], ["\ud800"], []):
        with pytest.raises(ZramdError):
            ask(server, program)
    is_as_before(server, worker)


def test_a_program_that_fails_as_supervisor_ends_by_a_signal(start):
    server = start()
    write(server)
    fails = """
from zramd.service import supervisor
def fail(*_): raise RuntimeError("nobody foresaw this")
supervisor._Supervisor._resume = fail
"""
    ask(server, program(after=fails))
    assert server.process.wait(30) == -signal.SIGKILL
    assert server.said("nobody foresaw this")


def test_what_the_program_could_not_take_as_supervisor_fails_while_the_old_one_serves(start):
    server = start()
    write(server)
    server.kill_worker()  # there is something to leave
    worker = server.worker
    fails = """
from zramd.service import supervisor
def fail(*_): raise RuntimeError("this is not what I know")
supervisor._Supervisor.learn = fail
"""
    with pytest.raises(ServerFailed, match="this is not what I know"):
        ask(server, program(after=fails))
    is_as_before(server, worker)


def test_a_configuration_that_is_bad_by_the_time_that_it_is_read_again_costs_no_page(
    start, tmp_path
):
    file = tmp_path / "s0.toml"
    file.write_text('disksize = "64M"\n')
    server = start("--config", str(file))
    write(server)
    spoil = f"open({str(file)!r}, 'w').write('nonsense')"
    ask(
        server,
        program(f"""import os
if '"supervisor"' in os.environ['ZRAMD_HANDOVER']: {spoil}
"""),
    )
    wait_for(lambda: server.said("has taken over from"))
    check(server)
    server.wear_out_at_once()
    file.write_text('disksize = "64M"\n')
    server.begin_again()
    check(server)


def test_a_device_that_was_reset_stays_so(start):
    server = start()
    with server.control() as control:
        control.reset()
    upgrade.command.callback("s0")
    with server.control() as control:
        assert control.statistics().disksize == 0
        control.set("disksize", "64M")
    write(server)
    upgrades(server)


_PASS = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_a_socket_that_systemd_has_passed_outlives_workers_upgrades_and_rest(start, tmp_path):
    path = tmp_path / "passed"
    with socket.socket(socket.AF_UNIX) as passed:
        passed.bind(str(path))
        passed.listen()
        os.set_inheritable(passed.fileno(), True)
        starter = (sys.executable, "-c", _PASS, str(passed.fileno()))
        server = start("--disksize=64M", starter=starter, pass_fds=[passed.fileno()])

    def is_served() -> None:
        with RawClient(UnixAddress(path)) as client:
            assert client.read(0, PAGE) == CONTENTS[0]

    write(server)
    is_served()
    upgrades(server)
    is_served()
    server.wear_out()
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.connect(str(path))  # and is not refused
        server.begin_again()
        assert waiting.recv(8) == b"NBDMAGIC"
    server.kill_worker()
    is_served()
    assert server.end() == 0
    assert path.exists()

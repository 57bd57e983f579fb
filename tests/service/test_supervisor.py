"""A server whose worker dies goes on with the same pages; seen from outside, over its sockets."""

import contextlib
import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest

import zramd.store.image
from tests.nbd.harness import RawClient, request, wait_for
from tests.service.server import CONTENTS, ROOT, Server, check, instead, lives, write
from zramd.cli import upgrade
from zramd.device import Zram
from zramd.errors import BadValue, DeviceBusy, NoServer, ServerFailed, ZramdError
from zramd.nbd.address import TcpAddress, UnixAddress
from zramd.nbd.wire import NBD_CMD_READ, NBD_CMD_TRIM, NBD_CMD_WRITE
from zramd.statistics import Statistics
from zramd.store import PAGE

MIB = 1 << 20


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSEGV])
def test_the_pages_of_a_worker_that_died_are_there_and_can_be_written(start, how):
    server = start()
    write(server)
    for _ in range(3):
        before = server.worker
        server.kill_worker(how)
        assert server.worker != before
        assert server.process.poll() is None
        check(server)
        write(server)
    assert server.said("page ") == 0
    assert server.end() == 0


def test_attributes_limits_algorithm_and_statistics_survive(start):
    server = start("--disksize=64M", "--algorithm=zstd(level=3)")
    write(server)
    with server.client() as client, server.control() as control:
        control.set("mem_limit", "9M")
        assert client.error(_beyond()) != 0
        control.get("mm_stat")
        before = control.statistics()
    assert before.invalid_io == 1
    server.kill_worker()
    with server.control() as control:
        after = control.statistics()
        assert control.get("comp_algorithm") == "lz4 lz4hc [zstd] deflate"
    assert after.mem_limit == 9 * MIB
    # Free objects beside what is stored may be counted otherwise, by parts of spans.
    assert _but_memory(after) == _but_memory(before)
    assert server.end() == 0


def _beyond() -> bytes:
    return request(NBD_CMD_TRIM, 1 << 40, PAGE)


def _but_memory(statistics: Statistics) -> Statistics:
    return replace(statistics, mem_used_total=0, mem_used_max=0, openers=())


def test_the_sockets_stay_and_who_connects_meanwhile_waits_and_is_not_refused(start, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = start(
        "--disksize=64M", f"--listen=unix:{tmp_path}/more.sock", f"--listen=tcp:127.0.0.1:{port}"
    )
    inode = server.paths.nbd_socket.stat().st_ino
    write(server)
    for _ in range(3):
        before = server.worker
        os.kill(before, signal.SIGKILL)
        check(server)  # at once
        for address in (UnixAddress(tmp_path / "more.sock"), TcpAddress("127.0.0.1", port)):
            with RawClient(address) as client:
                assert client.read(0, PAGE) == CONTENTS[0]
        with server.control() as control:
            assert control.statistics().disksize == 64 * MIB
        wait_for(lambda: server.worker != before)  # noqa: B023 (it waits here)
    assert server.paths.nbd_socket.stat().st_ino == inode
    assert server.end() == 0
    assert list(tmp_path.iterdir()) == []
    assert not server.paths.dir.exists()


def test_what_was_reset_stays_reset_and_what_is_made_then_survives(start):
    server = start()
    write(server)
    with server.control() as control:
        control.reset()
    server.kill_worker()
    with server.control() as control:
        assert control.statistics().disksize == 0
        control.set("disksize", "8M")
    write(server)
    server.kill_worker()
    check(server)
    with server.control() as control:
        assert control.statistics().disksize == 8 * MIB


def test_what_was_set_since_a_reset_survives(start):
    server = start("--disksize=64M", "--algorithm=zstd", "--mem-limit=32M")
    with server.control() as control:
        control.reset()
        control.set("comp_algorithm", "lz4hc(level=3)")
        control.set("mem_limit", "9M")
        control.set("prealloc", "1")
    for _ in range(2):
        server.kill_worker()
    with server.control() as control:
        control.set("disksize", "16M")
        now = control.statistics()
        assert (now.algorithm, now.mem_limit) == ("lz4hc(level=3)", 9 * MIB)
        assert now.mem_reserved > 0
        control.reset()
    server.kill_worker()
    with server.control() as control:
        assert control.get("prealloc") == "0"
        control.set("disksize", "16M")
        now = control.statistics()
        assert (now.algorithm, now.mem_limit) == ("lz4", 0)


def test_a_reserved_arena_is_locked_by_the_supervisor_too_while_it_is_there(start):
    server = start("--disksize=64M", "--mem-limit=16M", "--prealloc")
    assert _locked(server.process.pid) >= 15 * 1024
    write(server)
    server.kill_worker()
    check(server)
    with server.control() as control:
        assert control.statistics().mem_reserved >= 15 * MIB
        control.reset()
    assert _locked(server.process.pid) == 0


def _locked(process: int) -> int:
    status = Path(f"/proc/{process}/status").read_text()
    return int(status.partition("VmLck:")[2].split()[0])


def test_a_worker_that_dies_again_and_again_is_not_replaced_until_somebody_says_so(start):
    server = start()
    write(server)
    server.wear_out()
    assert server.said(f"kill -HUP {server.process.pid}")
    wait_for(lambda: _refused(server))
    with pytest.raises(NoServer):
        server.control()
    server.begin_again()
    check(server)
    assert server.end() == 0


def test_pages_that_are_kept_without_a_worker_are_given_up_on_demand(start):
    server = start()
    server.wear_out()
    assert server.end() == ServerFailed.exit_code
    assert server.said("its pages are given up")
    assert not server.paths.dir.exists()


def test_down_ends_a_server_that_has_no_worker_any_more(start):
    server = start()
    server.wear_out()
    down = [sys.executable, "-m", "zramd.cli", "down", "s0"]
    subprocess.run(down, cwd=ROOT, check=True, capture_output=True)
    assert server.process.wait(30) == ServerFailed.exit_code
    assert not server.paths.dir.exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, 40], ids=str)
@pytest.mark.parametrize("more", [[], ["--for=mount"]], ids=["", "hardened"])
def test_a_worker_is_replaced_though_nobody_reads_what_its_server_says(start, how, more):
    server = start("--disksize=64M", *more, reader_leaves=True)
    write(server)
    for _ in range(2):
        before = server.worker
        os.kill(before, how)
        wait_for(lambda before=before: server.worker not in (0, before))
        check(server)
    assert server.end() == 0


def test_a_socket_file_that_was_removed_is_made_again(start):
    server = start()
    write(server)
    server.paths.nbd_socket.unlink()
    server.paths.control_socket.unlink()
    server.kill_worker()
    check(server)
    with server.control() as control:
        assert control.statistics().disksize == 64 * MIB


def test_a_reset_device_is_not_made_again_by_who_begins_after_a_loop(start):
    server = start()
    with server.control() as control:
        control.reset()
    server.wear_out()
    server.begin_again()
    with server.control() as control:
        assert control.statistics().disksize == 0


def _refused(server: Server) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(server.paths.nbd_socket)) != 0


def test_a_worker_dies_with_its_supervisor(start):
    server = start()
    worker = server.worker
    server.process.kill()
    server.process.wait()
    wait_for(lambda: not lives(worker))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_server_that_is_told_to_end_ends_with_its_worker_also_the_second(start, how):
    server = start()
    server.kill_worker()
    worker = server.worker
    assert server.end(how) == 0
    assert not lives(worker)
    assert not server.paths.dir.exists()


def test_a_worker_that_cannot_begin_ends_its_server_with_its_error_and_status(start):
    server = start("--disksize=1P")
    assert server.process.wait(30) == BadValue.exit_code
    assert server.said("too large") == 1
    assert not server.paths.dir.exists()


def test_a_server_in_use_that_was_told_to_end_serves_on_after_a_death_and_ends_when_left(start):
    server = start("--disksize=64M", "--for=mount")
    write(server)
    with server.client() as first:
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.said("serving on until the last client has left"))
        assert first.read(0, PAGE) == CONTENTS[0]
        os.kill(server.worker, signal.SIGKILL)
        with server.client() as second:  # waits until it is served
            assert second.read(0, PAGE) == CONTENTS[0]
    assert server.process.wait(30) == 0


def test_what_is_kept_without_a_worker_can_be_saved_and_restored(start, tmp_path):
    server = start("--disksize=64M", "--algorithm=zstd")
    write(server)
    server.wear_out()
    file = tmp_path / "saved"
    save = [sys.executable, "-m", "zramd.cli", "save", "s0", str(file)]
    assert subprocess.run(save, cwd=ROOT, check=False).returncode == 0
    assert server.end() == ServerFailed.exit_code
    assert subprocess.run(save, cwd=ROOT, check=False).returncode == NoServer.exit_code
    restored = start(f"--restore={file}")
    check(restored)
    assert restored.end() == 0


def test_a_lost_page_is_named_in_the_log_and_an_io_error_until_it_is_written_as_a_whole(start):
    server = start()
    write(server)
    spoil(server, page=1)
    server.kill_worker()
    lost = "page 1 of s0 is lost: reading it is an I/O error"
    wait_for(lambda: server.said(lost))
    assert server.said("is lost") == 1
    with server.client() as client:
        for asked in (request(NBD_CMD_READ, PAGE, PAGE), request(NBD_CMD_READ, 0, 4 * PAGE)):
            assert client.error(asked) == errno.EIO
        part = request(NBD_CMD_WRITE, PAGE + 1, 4) + b"part"
        assert client.error(part) == errno.EIO
        for page, content in CONTENTS.items():
            if page != 1:
                assert client.read(page * PAGE, PAGE) == content
    server.kill_worker()  # it stays lost, and is named again
    wait_for(lambda: server.said(lost) == 2)
    with server.client() as client:
        assert client.error(request(NBD_CMD_READ, PAGE, PAGE)) == errno.EIO
        client.write(PAGE, CONTENTS[1])
    check(server)
    server.kill_worker()
    check(server)
    assert server.end() == 0
    assert server.said("is lost") == 2


def spoil(server: Server, page: int) -> None:
    """Have the slot's word name what is no object, in the arena that the supervisor keeps."""
    for entry in Path(f"/proc/{server.process.pid}/fd").iterdir():
        if os.readlink(entry).startswith("/memfd:zramd-arena"):
            with entry.open("r+b") as arena:
                arena.seek(PAGE + page * 8)
                assert arena.read(8) != bytes(8)
                arena.seek(-8, os.SEEK_CUR)
                arena.write(b"\0" + b"\xff" * 7)
            return
    raise AssertionError("the supervisor has no arena")


def test_a_worker_that_fails_when_it_has_taken_over_leaves_the_pages_to_the_next(start, tmp_path):
    place = tmp_path / "gone"
    place.mkdir()
    server = start("--disksize=64M", f"--listen=unix:{place}/more.sock")
    write(server)
    shutil.rmtree(place)
    server.wear_out_at_once()
    assert server.said("(cannot listen on ") >= 1
    place.mkdir()
    server.begin_again()
    check(server)
    assert server.end() == 0


@pytest.mark.parametrize("form", ["--config {}", "--config={}"])
def test_relative_paths_are_what_they_were_when_the_server_has_left_its_directory(
    start, tmp_path, form
):
    runtime, file = os.environ["ZRAMD_RUNTIME_DIR"], tmp_path / "s0.toml"
    file.write_text('disksize = "64M"\n')
    os.environ["ZRAMD_RUNTIME_DIR"] = os.path.relpath(runtime, ROOT)
    config = form.format(os.path.relpath(file, ROOT)).split()
    try:
        server = start(*config, "--background", reader_leaves=True)
    finally:
        os.environ["ZRAMD_RUNTIME_DIR"] = runtime
    write(server)
    wait_for(lambda: os.readlink(f"/proc/{server.process.pid}/cwd") == "/")
    before = server.worker
    upgrade.command.callback("s0")
    assert server.worker != before
    check(server)
    assert server.end() == 0


@pytest.mark.parametrize(
    "message", [b"keep\0\xff\xc3", b"drop", b"failing", b"nonsense\0x", b"upgrade\0\xe2\x82"]
)
def test_nothing_that_a_worker_says_ends_its_supervisor(start, message):
    code = f"""import os
from zramd.cli import main
from zramd.service import link
ready = link.Link.ready
def say_it_first(self):
    self._socket.send({message!r})
    self._socket.recv(1000)
    ready(self)
link.Link.ready = say_it_first
main()"""
    server = start(starter=instead(code))
    write(server)
    server.kill_worker()
    check(server)
    assert server.end() == 0


def test_a_supervisor_that_fails_unforeseen_with_pages_ends_by_a_signal_and_without_by_none(start):
    code = """import os
from zramd.cli import main
from zramd.service import supervisor
def fail(self): raise RuntimeError("nobody foresaw this")
supervisor._Supervisor.WHEN = fail
main()"""
    with_pages = code.replace("WHEN", "_begin")
    server = start(starter=instead(with_pages))
    assert server.process.wait(30) == -signal.SIGKILL
    assert server.said("nobody foresaw this")
    without = code.replace("WHEN", "_fork")
    server = start(starter=instead(without))
    assert server.process.wait(30) == ZramdError.exit_code


@pytest.mark.parametrize("more", [[], ["--for=mount"]], ids=["", "mount"])
def test_who_is_told_to_end_again_and_again_seals_its_file_all_the_same(
    start, tmp_path, monkeypatch, more
):
    file, mark, told = tmp_path / "arena", tmp_path / "mark", tmp_path / "told"
    code = f"""import os, time
from zramd.cli import main
from zramd.device import Zram
close = Zram.close
def slow(self, **how):
    open({str(mark)!r}, "x")
    while not os.path.exists({str(told)!r}):
        time.sleep(0.01)
    close(self, **how)
Zram.close = slow
main()"""
    server = start("--disksize=64M", f"--arena={file}", *more, starter=instead(code))
    write(server)
    server.process.send_signal(signal.SIGTERM)
    wait_for(mark.exists)
    for number in (signal.SIGTERM, signal.SIGINT):
        server.process.send_signal(number)
        os.kill(server.worker, number)
    told.touch()
    assert server.process.wait(30) == 0
    monkeypatch.setattr(zramd.store.image, "run_of", lambda _: b"another boot id!")
    device = Zram("s0", file)
    assert device.load() == []
    opener = device.open("test")
    for page, content in CONTENTS.items():
        assert bytes(opener.read(page * PAGE, PAGE)) == content
    opener.close()
    device.close()


def test_a_server_that_is_being_saved_is_not_upgraded_and_ends_at_once(start, tmp_path):
    mark = tmp_path / "mark"
    code = f"""import threading
from zramd.cli import main
from zramd.device import Zram
ended = threading.Event()
def save(self, fd, must_go_on=None):
    open({str(mark)!r}, "x")
    ended.wait(60)
Zram.save = save
Zram.end_saving = lambda self, why: ended.set()
main()"""
    server = start(starter=instead(code))
    write(server)

    def save() -> None:
        with (
            open(tmp_path / "saved", "wb") as file,
            server.control() as control,
            contextlib.suppress(ServerFailed),  # it has ended before it could say so
        ):
            control.save(file.fileno())

    thread = threading.Thread(target=save)
    thread.start()
    wait_for(mark.exists)
    with server.control() as control, pytest.raises(DeviceBusy, match="s0 is being saved"):
        control.upgrade([sys.executable])
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(20) == 0
    thread.join()


def test_what_waits_for_an_earlier_server_gets_errors_when_one_starts_without_its_pages(start):
    code = """from zramd.cli import main
from zramd.kernel import attach
attach.cut_if_dead = lambda name: attach.Attachment(name, "/dev/nbd7", "nbd")
main()"""
    server = start(starter=instead(code))
    assert server.said("/dev/nbd7 was cut off") == 1
    server.kill_worker()
    assert server.said("/dev/nbd7 was cut off") == 1

"""What is the plugin's own under nbdkit: parameters, interpreters, errors, its place and its end.

What it shares with `zramd serve` is in tests/clients and tests/kernel.
"""

import errno
import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests import places
from tests.conftest import require
from tests.kernel.servers import wait_for

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "nbd_plugin.py"
DEADLINE_S = 60


class Nbdkit:
    """nbdkit with our plugin, in a runtime directory of its own."""

    def __init__(self, runtime: Path) -> None:
        self.runtime = runtime
        self.program = require.program("nbdkit")
        self.socket = runtime / "zram0" / "nbd.sock"
        self.environment = {
            **os.environ,
            "ZRAMD_RUNTIME_DIR": str(runtime),
            "VIRTUAL_ENV": sys.prefix,
            "PYTHONPATH": "",
        }

    def run(self, *words: str, **more) -> subprocess.CompletedProcess[str]:
        """nbdkit to its end, which must come by itself."""
        return subprocess.run(
            [self.program, "-U", str(self.socket), *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
            **more,
        )

    def fails(self, *parameters: str) -> str:
        """What it says, in one line, of parameters that it must refuse."""
        done = self.run("-f", "python", str(PLUGIN), *parameters)
        assert done.returncode == 1
        assert list(self.runtime.iterdir()) == []
        (line,) = done.stderr.splitlines()
        return line

    def zramd(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "zramd.cli", *arguments]
        return subprocess.run(
            command, env=self.environment, cwd=ROOT, capture_output=True, text=True, check=False
        )

    def libnbd(self, script: str) -> str:
        """What a script says with python3-libnbd in the distribution's Python; `h` is connected."""
        require.path("/usr/lib/python3/dist-packages/nbd.py")
        head = f"import nbd\nh = nbd.NBD()\nh.connect_unix({str(self.socket)!r})\n"
        done = subprocess.run(
            ["/usr/bin/python3", "-c", head + script],
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture
def nbdkit():
    with places.place(places.RUNTIME) as runtime:
        yield Nbdkit(runtime)


@pytest.fixture
def serving(nbdkit):
    """In the background, as a user would start it."""
    started = nbdkit.run("python", str(PLUGIN), "name=zram0", "disksize=16M", "mem_limit=1M")
    assert (started.returncode, started.stderr) == (0, "")
    try:
        # The control socket comes when the child of nbdkit's fork has written its number down.
        wait_for((nbdkit.runtime / "zram0" / "control").is_socket, "the control socket")
        process = int((nbdkit.runtime / "zram0" / "lock").read_text())
        yield nbdkit
        nbdkit.zramd("reset", "--force", "zram0")
        try:
            os.kill(process, signal.SIGTERM)
        except ProcessLookupError:
            pass
        wait_for(lambda: not Path(f"/proc/{process}").exists(), "nbdkit to end")
    finally:
        places.kill_servers(nbdkit.runtime)


@pytest.mark.parametrize(
    ("parameters", "culprit"),
    [
        ([], "parameter name is missing"),
        (["name=zram0"], "parameter disksize is missing"),
        (["name=../zram0", "disksize=1M"], "'../zram0' is not a device name"),
        (["name=zram0", "disksize=lots"], "'lots' is not a size"),
        (["name=zram0", "disksize=0"], "disksize of 0 is senseless"),
        (["name=zram0", "disksize=1000T"], "disksize of 1000T is too large"),
        (["name=zram0", "disksize=1M", "algorithm=lzo"], "no algorithm 'lzo'"),
        (["name=zram0", "disksize=1M", "algorithm=zstd(level=99)"], "zstd has no level 99"),
        (["name=zram0", "disksize=1M", "mem_limit=some"], "'some' is not a size"),
        (["name=zram0", "size=1M"], "there is no parameter 'size'"),
    ],
)
def test_a_wrong_parameter_is_told_in_one_line_and_leaves_nothing(nbdkit, parameters, culprit):
    assert culprit in nbdkit.fails(*parameters)


def test_the_name_of_a_live_server_is_refused_and_that_server_goes_on(serving):
    again = serving.run("-f", "python", str(PLUGIN), "name=zram0", "disksize=1M")
    assert again.returncode == 1
    assert "a server for zram0 is running already" in again.stderr
    assert serving.zramd("get", "zram0", "disksize").stdout == f"{16 << 20}\n"
    assert serving.libnbd("print(h.get_size())") == f"{16 << 20}\n"


def test_an_environment_for_another_python_is_told_with_the_interpreter_that_nbdkit_embeds(
    nbdkit, tmp_path
):
    alone = tmp_path / "nbd_plugin.py"
    alone.write_text(PLUGIN.read_text())
    (tmp_path / ".venv" / "lib" / "python2.7" / "site-packages").mkdir(parents=True)
    (tmp_path / ".venv" / "pyvenv.cfg").touch()
    # Python takes the environment, too, whose python3 it finds first on PATH.
    nbdkit.environment["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    nbdkit.environment.pop("VIRTUAL_ENV", None)
    done = nbdkit.run("-f", "python", str(alone), "name=zram0", "disksize=1M", cwd=tmp_path)
    assert done.returncode == 1
    assert re.match(r"nbdkit embeds Python 3\.\d+, and zramd cannot be imported", done.stderr)
    assert f"{tmp_path}/.venv is for another version" in done.stderr
    assert "; make an environment for that version" in done.stderr
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr


def test_dump_plugin_tells_version_algorithms_and_python(nbdkit):
    done = nbdkit.run("--dump-plugin", "python", str(PLUGIN))
    assert "zramd_version=" in done.stdout
    assert "zramd_algorithms=lz4 lz4hc zstd deflate" in done.stdout
    assert re.search(r"^zramd_python=3\.", done.stdout, re.MULTILINE)


def test_its_device_is_saved_and_restored_like_any_other(serving, tmp_path):
    serving.libnbd("h.pwrite(b'a' * 4095 + b'b', 0)")
    file = str(tmp_path / "snapshot")
    for arguments in (["save", "zram0", file], ["reset", "zram0"], ["restore", "zram0", file]):
        done = serving.zramd(*arguments)
        assert done.returncode == 0, done.stderr
    assert serving.libnbd("print(h.pread(4096, 0)[-2:])").strip() == "bytearray(b'ab')"


@pytest.fixture
def unlocked(nbdkit, tmp_path) -> str:
    """The plugin, with its memory locked where it starts and not to be locked after the fork."""
    spy = tmp_path / "spy.py"
    spy.write_text(f"""
import builtins
__file__ = {str(PLUGIN)!r}
exec(builtins.open(__file__).read())
hardening.prepare = lambda: []
refusals = iter([[], ["mlockall: refused"]])
hardening.lock = lambda: next(refusals)
""")
    return str(spy)


@pytest.mark.parametrize("foreground", [["-f"], []], ids=["foreground", "background"])
def test_swap_whose_server_cannot_be_locked_after_the_fork_is_not_served(
    nbdkit, unlocked, foreground
):
    done = nbdkit.run(*foreground, "python", unlocked, "name=zram0", "disksize=16M", "for=swap")
    if foreground:
        assert done.returncode == 1
        (line,) = done.stderr.splitlines()
        assert "swap on zram0 could deadlock: after the fork there is no mlockall: refused" in line
        assert "allow_deadlock=1" in line
    wait_for(lambda: list(nbdkit.runtime.iterdir()) == [], "nbdkit to end")


@pytest.mark.parametrize("more", [["for=mount"], ["for=swap", "allow_deadlock=1"]])
def test_what_cannot_be_locked_after_the_fork_is_said_where_that_may_be(nbdkit, unlocked, more):
    done = nbdkit.run(
        *("python", unlocked, "name=zram0", "disksize=16M", *more),
        *("--run", "nbdinfo --size $uri"),
    )
    assert done.stdout == f"{16 << 20}\n"
    assert done.stderr == "zramd: zram0 can do without, but had better have, mlockall: refused\n"


def test_a_full_store_is_enospc_and_the_old_content_stays(serving):
    script = """
import os
h.pwrite(b"kept" * 1024, 0)
try:
    h.pwrite(os.urandom(8 << 20), 1 << 20)
except nbd.Error as error:
    print(error.errnum)
print(h.pread(4096, 0) == b"kept" * 1024)
"""
    assert serving.libnbd(script) == f"{errno.ENOSPC}\nTrue\n"


def test_a_forced_reset_answers_what_was_sent_and_ends_the_connections(serving):
    """Of two clients one has requests on their way, the other is idle. The next one finds another
    device."""
    reset = [sys.executable, "-m", "zramd.cli", "reset", "--force", "zram0"]
    script = f"""
import subprocess
idle = nbd.NBD()
idle.connect_unix({str(serving.socket)!r})
h.pwrite(b"old!" * 1024, 0)
sent = [(nbd.Buffer(4096)) for _ in range(300)]
sent = [(buffer, h.aio_pread(buffer, 0)) for buffer in sent]
environment = {serving.environment!r}
assert subprocess.run({reset!r}, env=environment, cwd={str(ROOT)!r}).returncode == 0
init = {[*reset[:3], "set", "zram0", "disksize", "32M"]!r}
assert subprocess.run(init, env=environment, cwd={str(ROOT)!r}).returncode == 0
told = set()
for buffer, cookie in sent:
    try:
        while not h.aio_command_completed(cookie):
            assert h.poll(-1) == 1
        told.add(bytes(buffer.to_bytearray()) == b"old!" * 1024)
    except nbd.Error as error:
        # ENOTCONN: libnbd had not sent it yet.
        told.add(error.errno)
print(told <= {{True, "EIO", "ENOTCONN"}}, "EIO" in told, told)
for connection in (h, idle):
    while connection.aio_is_ready():
        connection.poll(-1)
    print(connection.aio_is_closed() or connection.aio_is_dead())
"""
    assert re.fullmatch(r"True True \{.*\}\nTrue\nTrue\n", serving.libnbd(script))
    assert serving.libnbd("print(h.get_size(), h.pread(2, 0).hex())") == f"{32 << 20} 0000\n"
    assert serving.zramd("reset", "zram0").returncode == 0


def test_a_connection_has_one_record_in_the_gate_and_one_compressor_for_all_its_requests(
    nbdkit, tmp_path
):
    """And a refused request leaves nothing but the last one's exception: nbdkit never drops any."""
    told = tmp_path / "told"
    spy = tmp_path / "spy.py"
    spy.write_text(f"""
import builtins
__file__ = {str(PLUGIN)!r}
exec(builtins.open(__file__).read())
def flush(opener, flags):
    import gc, types
    held = [o for o in gc.get_objects() if isinstance(o, (StoreFull, types.TracebackType))]
    now = _plugin.zram._gate._records, streams, held
    with builtins.open({str(told)!r}, "w") as file:
        file.write(repr([len(o) for o in now]))
from zramd.errors import StoreFull
from zramd.store.zcomp import Comp
streams = []
_make = Comp.stream
def stream(self):
    if not hasattr(self._local, "stream"):
        streams.append(1)
    return _make(self)
Comp.stream = stream
""")
    script = tmp_path / "script.py"
    script.write_text(f"""
import nbd, os
h = nbd.NBD()
h.connect_unix({str(nbdkit.socket)!r})
refused = 0
for n in range(300):
    try:
        h.pwrite(os.urandom(4096), n * 4096)
    except nbd.Error as error:
        assert error.errnum == {errno.ENOSPC}
        refused += 1
    h.pread(4096, n * 4096)
assert refused > 200
h.flush()
""")
    done = nbdkit.run(
        *("python", str(spy), "name=zram0", "disksize=16M", "mem_limit=128K"),
        *("--run", f"/usr/bin/python3 {script}"),
    )
    assert done.returncode == 0, done.stderr
    records, made, held = json.loads(told.read_text())
    assert (records, made) == (1, 2)  # a stream of the main thread's, too, from init
    assert held <= 2


def test_a_strange_export_is_refused(serving):
    done = subprocess.run(
        [require.program("nbdinfo"), f"nbd+unix:///strange?socket={serving.socket}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "listen" not in done.stderr


def test_holes_are_told_as_they_are(serving):
    serving.libnbd("h.pwrite(b'data' * 1024, 8192)\nh.pwrite(bytes(4096), 65536)")
    uri = f"nbd+unix:///?socket={serving.socket}"
    done = subprocess.run(
        [require.program("nbdinfo"), "--map", "--json", uri], capture_output=True, check=True
    )
    found = [(e["offset"], e["length"], e["type"]) for e in json.loads(done.stdout)]
    assert found == [
        (0, 8192, 3),
        (8192, 4096, 0),
        (12288, 53248, 3),
        (65536, 4096, 2),
        (69632, (16 << 20) - 69632, 3),
    ]


def test_what_is_told_of_an_export(serving):
    uri = f"nbd+unix:///?socket={serving.socket}"
    for words in ([], ["--list"]):
        done = subprocess.run(
            [require.program("nbdinfo"), *words, uri], capture_output=True, check=True, text=True
        )
        assert "description: zramd, 16M, lz4\n" in done.stdout


def test_one_extent_is_told_with_all_that_it_merges_with(serving):
    """Data stored in three ways is one extent of data, also where a client asks for one only."""
    serving.libnbd("import os\nh.pwrite(os.urandom(4096) + b'12345678' * 512 + b'text' * 1024, 0)")
    script = f"""
one = nbd.NBD()
one.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
one.connect_unix({str(serving.socket)!r})
one.block_status(1 << 20, 0, lambda _c, _o, entries, _e: print(entries) or 0, nbd.CMD_FLAG_REQ_ONE)
"""
    assert serving.libnbd(script) == "[12288, 0]\n"


def test_a_client_that_halts_in_its_handshake_halts_nobody_else(serving):
    with socket.socket(socket.AF_UNIX) as halted:
        halted.connect(str(serving.socket))
        assert halted.recv(18, socket.MSG_WAITALL).startswith(b"NBDMAGIC")
        script = f"""
h.pwrite(b"data", 0)
import socket
with socket.socket(socket.AF_UNIX) as halted:
    halted.connect({str(serving.socket)!r})
    halted.recv(18, socket.MSG_WAITALL)
    print(bytes(h.pread(4, 0)).decode())
"""
        assert serving.libnbd(script) == "data\n"


def test_the_map_of_a_scattered_device_is_told_in_pieces(serving):
    script = """
for page in range(0, 200, 2):
    h.pwrite(bytes(4096), page * 4096)
"""
    serving.libnbd(script)
    uri = f"nbd+unix:///?socket={serving.socket}"
    done = subprocess.run(
        [require.program("qemu-img"), "map", "--output=json", uri], capture_output=True, check=True
    )
    found = [(e["start"], e["length"]) for e in json.loads(done.stdout)]
    assert found[:200] == [(page * 4096, 4096) for page in range(199)] + [
        (199 * 4096, (16 << 20) - 199 * 4096)
    ]


def test_down_ends_it_and_leaves_nothing(serving):
    process = int((serving.runtime / "zram0" / "lock").read_text())
    assert serving.zramd("down", "zram0").returncode == 0
    wait_for(lambda: not Path(f"/proc/{process}").exists(), "nbdkit to end")
    assert list(serving.runtime.iterdir()) == []


def test_sigterm_ends_it_and_leaves_nothing(serving):
    process = int((serving.runtime / "zram0" / "lock").read_text())
    os.kill(process, signal.SIGTERM)
    wait_for(lambda: not Path(f"/proc/{process}").exists(), "nbdkit to end")
    assert list(serving.runtime.iterdir()) == []


def test_after_a_kill_the_same_command_starts_it_again(serving):
    process = int((serving.runtime / "zram0" / "lock").read_text())
    os.kill(process, signal.SIGKILL)
    wait_for(lambda: not Path(f"/proc/{process}").exists(), "nbdkit to end")
    again = serving.run(
        *("-f", "python", str(PLUGIN), "name=zram0", "disksize=1M"),
        *("--run", "nbdinfo --size $uri"),
    )
    assert again.stdout == f"{1 << 20}\n", again.stderr

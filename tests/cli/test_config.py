"""A device's file through the command line: check-config, serve --config, up, attach --config."""

import subprocess
import sys

import pytest

from tests.cli.conftest import DEADLINE_S


@pytest.fixture
def configured(zramd, tmp_path):
    """The directory of the configuration files."""
    zramd.environment["ZRAMD_CONFIG_DIR"] = str(tmp_path)
    return tmp_path


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    assert done.stdout == ""
    return [line.removeprefix("zramd: ") for line in done.stderr.splitlines()]


def test_a_good_file_is_called_good(zramd, configured):
    file = configured / "zram0.toml"
    file.write_text("disksize = 4096")
    for arguments in (["zram0"], [str(file)], []):
        done = zramd.run("check-config", *arguments)
        assert (done.returncode, said(done)) == (0, [f"{file} is good"])


def test_all_that_is_wrong_in_all_files_is_told_in_a_line_each(zramd, configured):
    (configured / "a.toml").write_text('disksize = "x"\ncolour = 1\n')
    (configured / "b.toml").write_text("disksize = 4096")
    (configured / "not a name.toml").write_text("disksize = 4096")
    (configured / "c.toml.old").write_text("nobody's")
    done = zramd.run("check-config")
    assert done.returncode == 2
    lines = said(done)
    assert lines[0].startswith(f"{configured}/a.toml:1: disksize: 'x' is not a size; ")
    assert lines[1].startswith(f"{configured}/a.toml:2: colour: there is no such key; ")
    assert lines[2] == f"{configured}/b.toml is good"
    assert lines[3].startswith(f"{configured}/not a name.toml: 'not a name' is not a device name; ")
    assert len(lines) == 4


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ('disksize = "1G"\nuse = "swap"\nmem_limit = "1M"\n', 3),
        ('use = "swap"\ndisksize = "64K"\nmem_limit = 0\n', 2),
    ],
)
def test_a_reserve_that_the_table_alone_would_fill_is_told_with_its_line_as_serve_does(
    zramd, configured, text, line
):
    file = configured / "zram0.toml"
    file.write_text(text)
    told = zramd.fails(2, "check-config")
    assert told.startswith(f"zramd: {file}:{line}: a mem_limit of ")
    assert " cannot be reserved for a device of " in told
    file.write_text(text.replace("swap", "mount") + 'mount_point = "/mnt"\n')
    assert zramd.run("check-config").returncode == 0


def test_two_files_that_want_one_node_are_told(zramd, configured):
    for name in ("a", "b"):
        (configured / f"{name}.toml").write_text('disksize = 4096\nnode = "/dev/nbd1"\n')
    done = zramd.run("check-config")
    assert done.returncode == 2
    assert said(done)[1] == (
        f"{configured}/b.toml: {configured}/a.toml has node /dev/nbd1 too;"
        " choose another for one of them"
    )
    assert zramd.run("check-config", "a", "a").returncode == 0


def test_a_file_that_is_not_there_is_told_and_a_directory_without_files_is_no_error(
    zramd, configured
):
    assert f"{configured}/zram0.toml cannot be read" in zramd.fails(2, "check-config", "zram0")
    assert "'..' is not a device name" in zramd.fails(2, "check-config", "..")
    done = zramd.run("check-config")
    assert (done.returncode, said(done)) == (0, [f"there is no file in {configured}"])
    configured.rmdir()
    assert zramd.run("check-config").returncode == 0
    configured.mkdir()


def test_serve_takes_all_from_the_file(zramd, configured):
    file = configured / "any.toml"
    file.write_text(
        f"""
        disksize = "1.5M"
        comp_algorithm = "zstd(level=5)"
        mem_limit = "1M"
        listen = ["unix:{zramd.runtime}/more.sock"]
        """
    )
    zramd.serve("zram0", "--config", str(file))
    told = zramd.devices()["zram0"]
    assert (told["disksize"], told["mem_limit"]) == (1572864, 1 << 20)
    assert told["algorithm"] == "zstd(level=5)"
    assert (zramd.runtime / "more.sock").is_socket()


def test_serve_with_a_wrong_file_tells_the_first_fault_and_how_to_see_the_others(zramd, configured):
    file = configured / "zram0.toml"
    file.write_text('disksize = "1M"\ncolour = 1\nprealoc = true\n')
    line = zramd.fails(2, "serve", "zram0", "--config", str(file))
    assert f"{file}:2: colour: there is no such key" in line
    assert line.endswith(f"; and 1 more: zramd check-config {file}")
    assert zramd.left() == []


@pytest.mark.parametrize(
    "option",
    [
        *("--disksize=1M", "--mem-limit=1M", "--algorithm=zstd", "--prealloc", "--no-prealloc"),
        *("--listen=unix:/a", "--allow-deadlock", "--for=swap"),
    ],
)
def test_serve_takes_nothing_from_options_where_there_is_a_file(zramd, configured, option):
    file = configured / "zram0.toml"
    file.write_text("disksize = 4096")
    line = zramd.fails(2, "serve", "zram0", "--config", str(file), option)
    assert f"{file} says what the device is" in line
    assert f"leave {option.split('=')[0].replace('--no-', '--')} out" in line
    assert zramd.left() == []


def test_serve_without_file_and_disksize_names_both(zramd):
    line = zramd.fails(2, "serve", "zram0")
    assert "--disksize" in line
    assert "--config" in line


def test_up_without_a_disksize_wants_the_file(zramd, configured):
    file = configured / "zram0.toml"
    line = zramd.fails(2, "up", "zram0", "--swap")
    assert f"neither --disksize nor a file {file}" in line
    file.write_text('disksize = "1M"\nuse = "mount"\nmount_point = "/no/such/place"\n')
    assert "/no/such/place is not a directory; mkdir" in zramd.fails(2, "up", "zram0")
    for option in ("--swap", "--priority=5", "--mount=/mnt", "--fs=xfs", "--mem-limit=1M"):
        line = zramd.fails(2, "up", "zram0", option)
        assert f"leave {option.split('=')[0]} out" in line
    assert zramd.left() == []


def test_attach_takes_no_node_beside_the_file(zramd, configured):
    file = configured / "zram0.toml"
    file.write_text("disksize = 4096")
    line = zramd.fails(2, "attach", "zram0", "--config", str(file), "--node=/dev/nbd1")
    assert "leave --node out" in line


def test_a_node_is_one_of_nbds(zramd):
    zramd.serve("zram0")
    line = zramd.fails(2, "attach", "zram0", "--node=/dev/loop1")
    assert "--node: '/dev/loop1' is not an nbd device" in line
    line = zramd.fails(2, "attach", "zram0", "--node=/dev/nbd1", "--via=loop")
    assert "through loop it cannot be /dev/nbd1" in line


@pytest.mark.parametrize(
    ("verb", "needless"),
    [
        (["check-config", "zram0"], {"lz4", "zramd.nbd.server", "zramd.kernel.attach", "asyncio"}),
        (["attach", "zram0"], {"lz4", "tomllib", "difflib", "zramd.nbd.server"}),
        (["install-units", "--destdir=x"], {"lz4", "tomllib", "zramd.kernel.attach", "asyncio"}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_verb_loads_no_more_than_it_needs(zramd, configured, verb, needless):
    (configured / "zram0.toml").write_text("disksize = 4096")
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys, atexit; from zramd.cli import main\n"
            "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
            f"main({verb})",
        ],
        env=zramd.environment,
        cwd=configured,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    loaded = set(done.stderr.split())
    assert f"zramd.cli.{verb[0].replace('-', '_')}" in loaded
    assert not loaded & needless

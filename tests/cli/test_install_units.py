"""`zramd install-units`: what stands where afterwards, from a checkout and when installed."""

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from zramd.cli import main
from zramd.service import config

ROOT = Path(__file__).parents[2]
UNITS = "usr/lib/systemd/system"
EXAMPLES = "usr/share/doc/zramd/examples"


def below(directory: Path) -> list[str]:
    return sorted(str(p.relative_to(directory)) for p in directory.rglob("*") if not p.is_dir())


def wanted() -> list[str]:
    """What of systemd/ goes where."""
    files = [p.name for p in (ROOT / "systemd").glob("*.*") if p.suffix != ".md"]
    return sorted(f"{UNITS if n.startswith('zramd') else EXAMPLES}/{n}" for n in files)


def test_units_and_examples_stand_where_a_package_puts_them(zramd, tmp_path):
    printed = zramd.ok("install-units", "--destdir", str(tmp_path)).splitlines()
    assert f"{UNITS}/zramd@.service" in wanted()
    assert f"{EXAMPLES}/dev-nbd0.swap" in wanted()
    assert below(tmp_path) == wanted()
    assert sorted(printed) == sorted(str(tmp_path / p) for p in [*wanted(), "etc/zramd"])
    assert (tmp_path / "etc/zramd").is_dir()


def test_whatever_the_umask_all_can_read_the_files(zramd, tmp_path):
    zramd.run("install-units", "--destdir", str(tmp_path), umask=0o077)
    modes = {stat.S_IMODE((tmp_path / path).stat().st_mode) for path in below(tmp_path)}
    assert modes == {0o644}
    for directory in (UNITS, EXAMPLES, "etc/zramd"):
        assert stat.S_IMODE((tmp_path / directory).stat().st_mode) == 0o755


def test_the_units_run_the_program_that_they_are_told(zramd, tmp_path):
    def program(*arguments: str) -> set[str]:
        zramd.ok("install-units", "--destdir", str(tmp_path), *arguments)
        text = "".join(p.read_text() for p in tmp_path.rglob("*.service"))
        assert "@ZRAMD@" not in text
        return set(re.findall(r"[^\s='\"]+/zramd(?= (?:serve|attach|detach|down) )", text))

    assert program() == {"/usr/bin/zramd"}
    assert program("--program=/opt/zramd/bin/zramd") == {"/opt/zramd/bin/zramd"}
    assert program("--prefix=/usr/local") >= {"/usr/local/bin/zramd"}
    assert (tmp_path / "usr/local/lib/systemd/system/zramd@.service").exists()


def test_the_second_time_nothing_is_written(zramd, tmp_path):
    zramd.ok("install-units", "--destdir", str(tmp_path))
    before = {p: (tmp_path / p).stat().st_mtime_ns for p in below(tmp_path)}
    assert zramd.ok("install-units", "--destdir", str(tmp_path)) == ""
    assert {p: (tmp_path / p).stat().st_mtime_ns for p in below(tmp_path)} == before


def test_what_an_earlier_one_wrote_is_replaced_and_named(zramd, tmp_path):
    zramd.ok("install-units", "--destdir", str(tmp_path))
    unit = tmp_path / UNITS / "zramd@.service"
    now = unit.read_text()
    unit.write_text(now.replace("Type=notify", "Type=simple"))
    assert zramd.ok("install-units", "--destdir", str(tmp_path)) == f"{unit}\n"
    assert unit.read_text() == now


@pytest.mark.parametrize("place", [f"{UNITS}/zramd@.service", f"{EXAMPLES}/dev-nbd0.swap"])
def test_a_file_of_somebody_else_stays_and_nothing_is_written(zramd, tmp_path, place):
    theirs = tmp_path / place
    theirs.parent.mkdir(parents=True)
    theirs.write_text("[Unit]\nDescription=another zramd\n")
    line = zramd.fails(2, "install-units", "--destdir", str(tmp_path))
    assert f"{theirs} is there and not from `zramd install-units`" in line
    assert "remove it" in line
    assert below(tmp_path) == [place]
    assert theirs.read_text() == "[Unit]\nDescription=another zramd\n"


@pytest.mark.parametrize(
    ("arguments", "culprit", "step"),
    [
        (["--program=/a b/zramd"], "--program: '/a b/zramd'", "/"),
        (["--program=zramd"], "--program: 'zramd'", "begins with /"),
        (["--program=/a/%n"], "--program: '/a/%n'", "letters"),
        (["--program=/a\n"], "--program: '/a\\n'", "letters"),
        (["--prefix=usr"], "--prefix: 'usr' is relative", "/usr"),
    ],
)
def test_a_path_that_cannot_stand_in_a_unit_is_refused(zramd, tmp_path, arguments, culprit, step):
    line = zramd.fails(2, "install-units", "--destdir", str(tmp_path), *arguments)
    assert culprit in line
    assert step in line.partition(culprit)[2]
    assert below(tmp_path) == []


def test_on_the_machine_itself_the_units_run_this_program_and_the_next_steps_are_told(
    tmp_path, monkeypatch, capsys
):
    etc = tmp_path / "etc/zramd"
    monkeypatch.setattr("zramd.cli.install_units._CONFIGURATION", etc)
    program = tmp_path / "venv/bin/zramd"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    monkeypatch.setattr("sys.argv", [str(program)])
    for expected in ("systemctl daemon-reload", "there already"):
        with pytest.raises(SystemExit) as ended:
            main(["install-units", "--prefix", str(tmp_path / "usr")])
        assert ended.value.code == 0
        said = capsys.readouterr().err
        assert expected in said
        assert "systemctl enable --now zramd-attach@NAME" in said
    assert f"ExecStart={program} serve" in (tmp_path / UNITS / "zramd@.service").read_text()
    assert etc.is_dir()
    program.unlink()
    monkeypatch.setattr("sysconfig.get_path", lambda _name: str(program.parent))
    with pytest.raises(SystemExit) as ended:
        main(["install-units", "--prefix", str(tmp_path / "usr")])
    assert ended.value.code == 2
    assert f"no program zramd in {program.parent}; say which" in capsys.readouterr().err


def test_a_directory_that_cannot_be_made_is_told(zramd, tmp_path):
    (tmp_path / "usr").write_text("a file")
    line = zramd.fails(2, "install-units", "--destdir", str(tmp_path))
    assert f"{tmp_path}/usr" in line


def test_a_program_that_the_sandbox_hides_is_told(zramd, tmp_path):
    done = zramd.run("install-units", f"--destdir={tmp_path}", "--program=/home/me/bin/zramd")
    assert done.returncode == 0
    assert "do not see /home" in done.stderr
    sandbox = (ROOT / "systemd/zramd@.service").read_text()
    assert "\nProtectHome=yes\n" in sandbox
    assert re.search(r"^InaccessiblePaths=-/tmp -/var/tmp$", sandbox, re.MULTILINE)


def test_a_python_that_the_sandbox_hides_is_told_through_links_and_environments(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("zramd.cli.install_units._CONFIGURATION", tmp_path / "etc/zramd")
    program = tmp_path / "venv/bin/zramd"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    monkeypatch.setattr("sys.argv", [str(program)])
    python, prefix = tmp_path / "venv/bin/python", tmp_path / "link"
    python.symlink_to("/root/.local/python/bin/python3")
    prefix.symlink_to("/home/me/venv")

    def told() -> str:
        with pytest.raises(SystemExit) as ended:
            main(["install-units", "--prefix", str(tmp_path / "usr")])
        assert ended.value.code == 0
        return capsys.readouterr().err

    with monkeypatch.context() as patch:
        patch.setattr("sys.executable", str(python))
        line = f"do not see /root, and so cannot run {program}, which needs {python}: install it"
        assert line in told()
    with monkeypatch.context() as patch:
        patch.setattr("sys.prefix", str(prefix))
        assert f"do not see /home, and so cannot run {program}, which needs {prefix}" in told()


def test_each_example_is_good_and_has_the_node_that_its_unit_uses():
    for file, unit in (("swap0.toml", "dev-nbd0.swap"), ("files.toml", "srv-files.mount")):
        path = ROOT / "systemd" / file
        assert config.faults(path) == []
        text = (ROOT / "systemd" / unit).read_text()
        assert f"\nWhat={config.read(path).node}\n" in text
        assert f"zramd-attach@{path.stem}.service" in text
    assert f"\nWhere={config.read(path).mount_point}\n" in text


def test_an_installed_zramd_brings_the_units(tmp_path):
    pytest.importorskip("setuptools")
    for name in ("zramd", "systemd"):
        shutil.copytree(
            ROOT / name,
            tmp_path / name,
            symlinks=True,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    built = tmp_path / "built"
    subprocess.run(
        [
            *(sys.executable, "-c", "import setuptools; setuptools.setup()"),
            *("-q", "build_py", "--build-lib", built),
        ],
        cwd=tmp_path,
        check=True,
        capture_output=True,
    )
    shutil.rmtree(tmp_path / "systemd")
    done = subprocess.run(
        [
            *(sys.executable, "-c", "from zramd.cli import main; main()"),
            *("install-units", "--destdir", tmp_path / "dest"),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(built), *sys.path])},
        cwd=built,
        check=True,
        capture_output=True,
    )
    assert done.stderr == b""
    assert below(tmp_path / "dest") == wanted()

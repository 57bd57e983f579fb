"""zramd install-units: systemd's units, with the examples, where a package would put them.

Promises
1. A file that another has put there is never replaced; that is found before anything is written.
   Ours begin with a line that says whose they are, and are replaced as in a package's upgrade:
   what an administrator changes stands in drop-ins (`systemctl edit`) and in copies.
2. Given twice, it writes nothing the second time.
"""

import os
import re
import sys
import sysconfig
from pathlib import Path
from typing import Final

import click

import zramd
from zramd.cli.options import talk
from zramd.errors import BadValue, NeedsRoot

_MARK: Final = "# Written by `zramd install-units`"
_HEAD: Final = f"{_MARK}, which may replace it: change a copy, or use `systemctl edit`.\n"

_HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""What the sandbox of zramd@.service keeps from the server."""

_CONFIGURATION: Final = Path("/etc/zramd")
"""As the units have it."""

_SOURCE: Final = Path(zramd.__file__).with_name("units")
"""The checkout's systemd/, in which zramd*.* are units and the others examples."""


@click.command()
@click.option(
    "--destdir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write below DIR what is for /; for those who build a package.",
)
@click.option(
    "--prefix",
    type=click.Path(path_type=Path),
    default=Path("/usr"),
    metavar="DIR",
    help="The units go to lib/systemd/system below it. The default is /usr.",
)
@click.option(
    "--program",
    metavar="PATH",
    help="The zramd that the units run. The default is this one; with --destdir, PREFIX/bin/zramd.",
)
def command(destdir: Path | None, prefix: Path, program: str | None) -> None:
    """Install the systemd units, the examples, and the directory /etc/zramd.

    Prints what it makes, and nothing where all is as it should be. Files of the same name that
    are not its own stop it before it writes.
    """
    if not prefix.is_absolute():
        raise BadValue(f"--prefix: {str(prefix)!r} is relative", hint="give one such as /usr")
    needs: tuple[str, ...] = ()
    if program is None and destdir is not None:
        program = str(prefix / "bin/zramd")
    elif program is None:
        program, needs = _this_program(), (sys.executable, sys.prefix, sys.base_prefix)
    _check_program(program, needs)
    root = Path("/") if destdir is None else destdir
    units = _below(root, prefix / "lib/systemd/system")
    examples = _below(root, prefix / "share/doc/zramd/examples")
    configuration = _below(root, _CONFIGURATION)
    wanted = {
        (units if source.name.startswith("zramd") else examples) / source.name: (
            _HEAD + source.read_text().replace("@ZRAMD@", program)
        )
        for source in sorted(_SOURCE.glob("*.*"))
        if source.suffix != ".md"
    }
    os.umask(0o022)
    try:
        written = [file for file, text in wanted.items() if _differs(file, text)]
        for file in written:
            _write(file, wanted[file])
            click.echo(file)
        if not configuration.is_dir():
            configuration.mkdir(parents=True)
            click.echo(configuration)
    except OSError as error:
        message = f"{error.filename} cannot be written: {error.strerror}"
        if isinstance(error, PermissionError):
            raise NeedsRoot(message, hint="run it with sudo, or with --destdir") from error
        raise BadValue(message) from error
    if destdir is None:
        _say_what_is_next(examples, written)


def _this_program() -> str:
    """The program that runs, or where `python -m zramd.cli` does, the one beside that Python."""
    for path in (os.path.abspath(sys.argv[0]), f"{sysconfig.get_path('scripts')}/zramd"):
        if os.path.basename(path) == "zramd" and os.access(path, os.X_OK):
            return path
    raise BadValue(
        f"there is no program zramd in {sysconfig.get_path('scripts')}",
        hint="say which one the units are to run: --program PATH",
    )


def _check_program(program: str, needs: tuple[str, ...]) -> None:
    """BadValue for what cannot stand in a unit. Where the sandbox hides it, or the Python that it
    needs, whatever the links on the way, that is said."""
    # In a unit a space ends a word, % and $ begin something else.
    if re.fullmatch(r"/[\w/.+@:~-]+", program, re.ASCII) is None:
        raise BadValue(
            f"--program: {program!r} cannot stand in a unit",
            hint="give a path that begins with / and has only letters, digits and ._+@:~-",
        )
    for path in _HIDDEN:
        for needed in (program, *needs):
            if any(p.startswith(f"{path}/") for p in (needed, os.path.realpath(needed))):
                what = program if needed == program else f"{program}, which needs {needed}"
                talk(f"the units do not see {path}, and so cannot run {what}: install it elsewhere")
                break


def _below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _differs(file: Path, text: str) -> bool:
    """Whether it must be written. BadValue where it is there and not ours."""
    try:
        there = file.read_text(errors="replace")
    except FileNotFoundError:
        return True
    if there != text and not there.startswith(_MARK):
        raise BadValue(
            f"{file} is there and not from `zramd install-units`; nothing was written",
            hint=f"remove it, or keep yours in /etc/systemd/system/{file.name}",
        )
    return there != text


def _write(file: Path, text: str) -> None:
    """Replace it whole, so that systemd never reads a half."""
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_name(f".{file.name}.new")
    new.write_text(text)
    new.replace(file)


def _say_what_is_next(examples: Path, written: list[Path]) -> None:
    if written:
        talk("systemd knows the units after: systemctl daemon-reload")
    else:
        talk("the units are there already, as they should be")
    talk(f"a device NAME: write /etc/zramd/NAME.toml, as in {examples}; zramd check-config NAME")
    talk("its node, now and at every boot: systemctl enable --now zramd-attach@NAME")
    talk(f"swap on it: a unit as {examples}/dev-nbd0.swap, in /etc/systemd/system, enabled too")

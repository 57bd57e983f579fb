"""The command `zramd`. One module per verb, loaded when the verb is used.

stdout is data, stderr is talk. A failure is one line on stderr, `zramd: MESSAGE; NEXT STEP`,
and the exit code of its class in zramd.errors; wrong usage looks the same, with exit code 2.
zramd.service.background reads that form.
"""

import importlib
import sys
import traceback
from typing import Any, Final, NoReturn

import click

from zramd import __version__
from zramd.errors import BadValue, ZramdError

VERBS: Final = (
    *("list", "up", "down", "serve", "attach", "detach", "get", "set", "reset"),
    *("save", "restore", "upgrade"),
    *("doctor", "check-config", "install-units"),
)
_INTERRUPTED: Final = 130


class _Verbs(click.Group):
    """`zramd` alone, and `zramd` with options only, is `zramd list`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        module = f"zramd.cli.{cmd_name.replace('-', '_')}"
        command: click.Command = importlib.import_module(module).command
        return command

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        own = (*ctx.help_option_names, "--version")
        bare = not args and not ctx.resilient_parsing  # in a completion, the verb is what is asked
        if bare or (args and args[0].startswith("-") and args[0] not in own):
            args = ["list", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_Verbs, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="zramd %(version)s")
def cli() -> None:
    """zram in user space: RAM disks of compressed pages, for swap, file systems and VMs.

    Without a verb: `zramd list`.
    """


def main(args: list[str] | None = None) -> NoReturn:
    """Run one command and exit with its code; `args` default to those of the process."""
    sys.exit(_run(args))


def _run(args: list[str] | None) -> int:
    try:
        status: Any = cli.main(args, prog_name="zramd", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except ZramdError as error:
        return _fail(error)
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx is not None else "zramd"
        return _fail(BadValue(error.format_message(), hint=f"see `{verb} --help`"))
    except (click.Abort, KeyboardInterrupt):
        return _INTERRUPTED
    except Exception as error:
        traceback.print_exc()
        return _fail(ZramdError(f"unforeseen: {type(error).__name__}: {error}"))


def _fail(error: ZramdError) -> int:
    click.echo(f"zramd: {error.line()}", err=True)
    return error.exit_code

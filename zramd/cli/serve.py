"""zramd serve: one device in the foreground, until SIGTERM, SIGINT or `zramd down`."""

from pathlib import Path
from typing import Any

import click

from zramd.cli.options import FILE, config_of, device_options, name_argument
from zramd.errors import ZramdError
from zramd.service.config import Config


@click.command()
@name_argument
@device_options
@click.option(
    *("--for", "use"),
    type=click.Choice(["swap", "mount"]),
    help="What it will carry: the server is hardened for that. For swap it must succeed.",
)
@click.option(
    "--restore",
    type=FILE,
    metavar="FILE",
    help="Begin with what the snapshot FILE has; see `zramd save`.",
)
@click.option(
    "--stdio",
    is_flag=True,
    help="Serve the client on stdin and stdout too, as inetd has it, and end with it.",
)
@click.option("--background", is_flag=True, hidden=True, help="How `zramd up` starts it.")
def command(
    name: str,
    file: Path | None,
    restore: Path | None,
    background: bool,
    stdio: bool,
    **options: Any,
) -> None:
    """Serve the device NAME over NBD, in the foreground.

    It listens on NAME/nbd.sock in the runtime directory: $ZRAMD_RUNTIME_DIR, else /run/zramd for
    root, else $XDG_RUNTIME_DIR/zramd. Export names are NAME and the empty one. SIGTERM and SIGINT
    end it, and its pages with it, even while clients are connected; `zramd down` asks first.
    """
    config = _maybe_config(file, options, restore)
    if config is not None and config.tls == "off":
        from zramd import without_ssl  # noqa: F401 - it is what it does that counts
    from zramd.cli.serving import serve  # which imports asyncio

    serve(name, file, restore, options, config, background=background, stdio=stdio)


def _maybe_config(
    file: Path | None, options: dict[str, Any], restore: Path | None
) -> Config | None:
    """None where something is wrong: it will be said later, or be put right while somebody goes on
    with the pages of another."""
    try:
        return config_of(file, options, found=restore is not None)
    except ZramdError:
        return None

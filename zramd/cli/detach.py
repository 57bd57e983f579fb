"""zramd detach: take the block device node away; the device goes on being served."""

import click

from zramd.cli.options import name_argument, talk
from zramd.errors import NoServer
from zramd.kernel import attach
from zramd.service.runtime import Paths


@click.command()
@name_argument
def command(name: str) -> None:
    """Detach the device NAME. Refused while its node is in use; its pages stay.

    What a killed server or a killed attachment has left is cleared too.
    """
    attachment = find(name)
    attach.detach(name)
    if attachment is None:
        talk(f"{name} was not attached")


def find(name: str) -> attach.Attachment | None:
    """The attachment of `name`, where it is attached; NoServer where nothing of it is there."""
    attachment = attach.attached(name)
    if attachment is None and not Paths(name).dir.exists():
        raise NoServer(f"there is no device {name}", hint="`zramd list` shows what there is")
    return attachment

"""zramd check-config: what is wrong in the devices' files, before anything relies on them."""

from pathlib import Path

import click

from zramd.cli.options import CONFIG, make_tls, talk
from zramd.errors import BadValue
from zramd.service import config
from zramd.service.runtime import check_name


@click.command()
@click.argument("which", type=CONFIG, nargs=-1, metavar="[FILE|NAME]...")
def command(which: tuple[Path, ...]) -> int:
    """Check configuration files; of all devices, if none is given.

    FILE has a / in it or ends in .toml; NAME is that of a device, whose file is
    /etc/zramd/NAME.toml. Exit code 2 says that something is wrong, and stderr what, a line each.
    """
    files = which or sorted(config.directory().glob("*.toml"))
    if not files:
        talk(f"there is no file in {config.directory()}")
    nodes: dict[str, Path] = {}
    status = 0
    for file in files:
        wrong = _name_faults(file) + config.faults(file)
        if not wrong:
            device = config.read(file)
            node, wrong = device.node, _tls_faults(file, device)
            if node is not None and nodes.setdefault(node, file) != file:
                hint = "choose another for one of them"
                wrong.append(BadValue(f"{file}: {nodes[node]} has node {node} too", hint=hint))
        for fault in wrong:
            talk(fault.line())
            status = fault.exit_code
        if not wrong:
            talk(f"{file} is good")
    return status


def _tls_faults(file: Path, device: config.Config) -> list[BadValue]:
    try:
        make_tls(device)
    except BadValue as fault:
        return [BadValue(f"{file}: {fault.message}", hint=fault.hint)]
    return []


def _name_faults(file: Path) -> list[BadValue]:
    try:
        check_name(file.stem)
    except BadValue as fault:
        return [BadValue(f"{file}: {fault.message}", hint=fault.hint)]
    return []

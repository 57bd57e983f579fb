"""nbdkit's nbd plugin, our client, with filters that change what it asks for; and other clients in
front of it."""

import shlex

import pytest

from tests.clients.serving import run, served

SIZE = 16 << 20

FILTERS = {
    "alone": ["shared=true"],
    "blocksize": ["--filter=blocksize", "minblock=4096", "maxdata=64k", "maxlen=1M"],
    "small blocks": ["--filter=blocksize", "minblock=1", "maxdata=4k"],
    "cache": ["--filter=cache", "cache=writethrough"],
    "cache, written back": ["--filter=cache", "cache=writeback"],
    "readahead": ["--filter=readahead"],
    "nozero": ["--filter=nozero"],
    "zeros in vain": ["--filter=nozero", "zeromode=notrim", "fastzeromode=slow"],
    "noextents": ["--filter=noextents"],
    "no FUA": ["--filter=fua", "fuamode=emulate"],
    "forced FUA": ["--filter=fua", "fuamode=force"],
}
QEMU_IO = (
    "qemu-io -f raw -c 'write -P 3 512 513' -c 'write -z -u 64k 128k' -c 'write -z 1 4097'"
    " -c 'discard 1M 1M' -c 'write -P 5 1M 1M' -c 'write -f -P 4 3M 1M' -c flush"
    " -c 'read -P 0 64k 128k' -c 'read -P 0 1 4097' -c 'read -P 4 3M 1M' \"$uri\""
)
"""What a discard leaves is overwritten: a cache need not hear of it."""


@pytest.fixture
def server(kind):
    with served(kind, size=SIZE) as server:
        yield server


@pytest.fixture(scope="module")
def data(real_data, tmp_path_factory):
    """A quarter of the real data, some of each sort."""
    path = tmp_path_factory.mktemp("quarter") / "data"
    content = real_data.read_bytes()
    path.write_bytes(
        content[: 6 << 20] + content[46 << 20 : 54 << 20] + content[57 << 20 : 59 << 20]
    )
    return path


def through(server, options: list[str], script: str) -> str:
    """Runs a shell script with `uri` of an nbdkit whose plugin is a client of ours."""
    filters = [option for option in options if option.startswith("--")]
    parameters = [option for option in options if not option.startswith("--")]
    return run(
        *("nbdkit", "-U", "-", *filters, "nbd", f"uri={server.uri}", *parameters),
        *("--run", f"set -e\n{script}"),
    )


@pytest.mark.parametrize("options", FILTERS.values(), ids=FILTERS)
def test_through_nbdkit_as_client(server, data, tmp_path, options):
    there, copy = shlex.quote(str(data)), shlex.quote(str(tmp_path / "copy"))
    said = through(
        *(server, options),
        f'nbdcopy --flush {there} "$uri"\nnbdcopy "$uri" {copy}\ncmp {there} {copy}\n'
        f'{QEMU_IO}\nnbdcopy "$uri" {copy}',
    )
    assert "failed" not in said, said
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(tmp_path / "copy"), server.uri)
    content = (tmp_path / "copy").read_bytes()
    assert content[3 << 20 : 4 << 20] == b"\4" * (1 << 20)
    assert content[4 << 20 :] == data.read_bytes()[4 << 20 :]


def test_through_a_copy_on_write_layer_nothing_reaches_us(server, data, tmp_path):
    copy = tmp_path / "copy"
    run("nbdcopy", str(data), server.uri)
    said = through(
        *(server, ["--filter=cow", "cow-block-size=64k"]),
        f'{QEMU_IO}\nnbdcopy "$uri" {shlex.quote(str(copy))}',
    )
    assert "failed" not in said, said
    assert copy.read_bytes()[3 << 20 : 4 << 20] == b"\4" * (1 << 20)
    run("nbdcopy", server.uri, str(copy))
    assert copy.read_bytes() == data.read_bytes()

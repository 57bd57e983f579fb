"""nbd-client without a kernel; with one it is in tests/kernel/in_clients.py."""

import re

from tests.clients.serving import run


def test_nbd_client_lists_the_device_over_tcp(tcp_server):
    said = run("nbd-client", "-l", "127.0.0.1", str(tcp_server.port))
    assert re.search(r"^zram0\b", said, re.MULTILINE)


def test_other_clients_over_tcp(tcp_server, real_data, tmp_path):
    run("nbdcopy", "--connections=4", str(real_data), tcp_server.uri)
    run("nbdcopy", "--connections=4", tcp_server.uri, str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == real_data.read_bytes()
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(real_data), tcp_server.uri)

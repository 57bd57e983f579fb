"""nbdcopy, with several connections and many requests on each."""

import json

from tests.clients.serving import KINDS, SIZE, run, served


def test_nbdcopy_brings_real_data_in_and_out(server, real_data, tmp_path):
    copy = tmp_path / "copy"
    many = ["--connections=4", "--requests=64"]
    run("nbdcopy", *many, "--flush", str(real_data), server.uri)
    run("nbdcopy", *many, server.uri, str(copy))
    assert copy.read_bytes() == real_data.read_bytes()
    run("nbdcopy", "--synchronous", server.uri, str(copy))
    assert copy.read_bytes() == real_data.read_bytes()
    run("nbdcopy", "--no-extents", *many, server.uri, str(copy))
    assert copy.read_bytes() == real_data.read_bytes()


def test_nbdcopy_with_the_longest_requests(server, real_data, tmp_path):
    copy = tmp_path / "copy"
    run("nbdcopy", f"--request-size={32 << 20}", str(real_data), server.uri)
    run("nbdcopy", f"--request-size={32 << 20}", server.uri, str(copy))
    assert copy.read_bytes() == real_data.read_bytes()


def test_nbdcopy_leaves_holes_where_there_were_some(server, real_data, tmp_path):
    """In: zeros are found and not sent. Out: holes are not read, and the file has them too."""
    copy = tmp_path / "copy"
    run("nbdcopy", "--sparse=4096", str(real_data), server.uri)
    totals = json.loads(run("nbdinfo", "--map", "--totals", "--json", server.uri))
    holes = {entry["type"]: entry["size"] for entry in totals}[3]
    assert holes >= 12 << 20
    run("nbdcopy", "--connections=4", server.uri, str(copy))
    assert copy.read_bytes() == real_data.read_bytes()
    assert copy.stat().st_blocks * 512 <= SIZE - holes + (1 << 20)


def test_nbdcopy_overwrites_what_was_there(server, real_data):
    run("qemu-io", "-f", "raw", "-c", f"write -P 9 0 {SIZE}", server.uri)
    run("nbdcopy", "--allocated", str(real_data), server.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(real_data), server.uri)
    run("qemu-io", "-f", "raw", "-c", f"discard 0 {SIZE}", server.uri)
    run("nbdcopy", "--destination-is-zero", str(real_data), server.uri)
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(real_data), server.uri)


def test_nbdcopy_from_one_of_ours_to_another(server, real_data, tmp_path):
    copy = tmp_path / "copy"
    run("nbdcopy", str(real_data), server.uri)
    for kind in KINDS:
        with served(kind) as other:
            run("nbdcopy", "--connections=4", server.uri, other.uri)
            maps = [
                run("nbdinfo", "--map", "--totals", uri).splitlines()
                for uri in (server.uri, other.uri)
            ]
            # The pages of written zeros have become holes.
            assert maps[0][0].split()[0] == maps[1][0].split()[0]
            run("nbdcopy", other.uri, str(copy))
            assert copy.read_bytes() == real_data.read_bytes()

"""nbdinfo: what a server says about itself, its map, and socket activation."""

import json

from tests import places
from tests.clients.serving import (
    PAGE,
    SIZE,
    environment,
    finished,
    plugin_command,
    run,
    uri_of,
    zramd_command,
)
from tests.kernel.servers import wait_for

CAN = {
    *("connect", "read", "write", "flush", "fua", "trim", "zero", "fast-zero", "cache", "df"),
    *("multi-conn", "structured-reply"),
}


def test_nbdinfo_sees_the_size(server):
    assert run("nbdinfo", "--size", server.uri) == f"{SIZE}\n"


def test_nbdinfo_sees_what_we_are(server):
    said = json.loads(run("nbdinfo", "--json", server.uri))
    assert said["protocol"] == "newstyle-fixed"
    assert said["TLS"] is False
    assert said["structured"] is True
    (export,) = said["exports"]
    assert export["export-size"] == SIZE
    sizes = [export[f"block_size_{which}"] for which in ("minimum", "preferred", "maximum")]
    assert sizes == [1, PAGE, 32 << 20]
    assert "zramd" in export["description"]
    assert (export["is_read_only"], export["is_rotational"]) == (False, False)
    said_no = {name for name, can in export.items() if name.startswith("can_") and can is not True}
    assert said_no == set()
    wanted = ["base:allocation", "zramd:state"] if server.kind == "zramd" else ["base:allocation"]
    assert export["contexts"] == wanted


def test_nbdinfo_says_what_can_and_is(server):
    for what in sorted(CAN):
        run("nbdinfo", "--can", what, server.uri)
    for what in ("read-only", "rotational", "tls"):
        run("nbdinfo", "--is", what, server.uri, status=2)


def test_nbdinfo_on_a_read_only_export(read_only_server):
    run("nbdinfo", "--is", "read-only", read_only_server.uri)
    cannot = {"write", "trim", "zero", "fast-zero"}
    if read_only_server.kind == "nbdkit":  # its core has no FUA where nothing can be written
        cannot.add("fua")
    for what in sorted(CAN):
        status = 2 if what in cannot else 0
        run("nbdinfo", "--can", what, read_only_server.uri, status=status)


def test_nbdinfo_lists_the_device(server):
    (export,) = json.loads(run("nbdinfo", "--list", "--json", server.uri))["exports"]
    assert (export["export-name"], export["export-size"]) == ("zram0", SIZE)
    assert "zramd" in export["description"]
    assert 'export="zram0":\n' in run("nbdinfo", "--list", server.uri)


def test_nbdinfo_is_told_of_another_name(server):
    done = finished("nbdinfo", uri_of(server.path, "other"))
    assert done.returncode == 1
    assert "other" in done.stderr


def write_pages(server):
    """Holes 0 and 1, two pages of data, a page of zeros, holes, a page of data at the end."""
    run(
        *("qemu-io", "-f", "raw", "-c", "write -P 7 8k 8k", "-c", "write -P 0 16k 4k"),
        *("-c", f"write -P 8 {SIZE - PAGE} 4k", server.uri),
    )
    return [
        {"offset": 0, "length": 8192, "type": 3, "description": "hole,zero"},
        {"offset": 8192, "length": 8192, "type": 0, "description": "data"},
        {"offset": 16384, "length": PAGE, "type": 2, "description": "zero"},
        {"offset": 20480, "length": SIZE - 24576, "type": 3, "description": "hole,zero"},
        {"offset": SIZE - PAGE, "length": PAGE, "type": 0, "description": "data"},
    ]


def test_nbdinfo_maps(server):
    wanted = write_pages(server)
    assert json.loads(run("nbdinfo", "--map", "--json", server.uri)) == wanted
    lines = [line.split() for line in run("nbdinfo", "--map", server.uri).splitlines()]
    assert lines == [
        [str(e["offset"]), str(e["length"]), str(e["type"]), e["description"]] for e in wanted
    ]


def test_nbdinfo_adds_up(server):
    write_pages(server)
    totals = json.loads(run("nbdinfo", "--map", "--totals", "--json", server.uri))
    assert {entry["type"]: entry["size"] for entry in totals} == {
        0: 3 * PAGE,
        2: PAGE,
        3: SIZE - 4 * PAGE,
    }


def test_nbdinfo_maps_our_own_context(server):
    write_pages(server)
    if server.kind == "nbdkit":  # nbdkit's core has none but base:allocation
        done = finished("nbdinfo", "--map=zramd:state", server.uri)
        assert done.returncode == 1
        assert "zramd:state" in done.stderr
        return
    said = json.loads(run("nbdinfo", "--map=zramd:state", "--json", server.uri))
    assert [(e["offset"], e["length"], e["type"]) for e in said] == [
        (0, 8192, 0),
        (8192, 12288, 1),
        (20480, SIZE - 24576, 0),
        (SIZE - PAGE, PAGE, 1),
    ]


def test_nbdinfo_starts_the_server_itself(kind):
    """By LISTEN_FDS, as systemd would. It ends it, too, and nothing is left."""
    with places.place(places.RUNTIME) as directory:
        command = zramd_command() if kind == "zramd" else ["nbdkit", "-f", *plugin_command()]
        words = ("nbdinfo", "--json", "--", "[", *command, "]")
        (export,) = json.loads(run(*words, environment=environment(directory)))["exports"]
        assert export["export-size"] == SIZE
        wait_for(lambda: list(directory.iterdir()) == [], "the server to end")

"""qemu-io, qemu-img, and qemu-nbd, which is our client and another's server."""

import json
import random
import subprocess
from contextlib import contextmanager

import pytest

from tests.clients.serving import PAGE, SIZE, run, uri_of
from tests.conftest import require
from tests.kernel.servers import wait_for

RAW = ("-f", "raw")


def qemu_io(uri: str, *script: str) -> None:
    """Runs all the lines; a pattern that is not found fails too."""
    said = run("qemu-io", *RAW, *(f"-c{line}" for line in script), uri)
    assert "failed" not in said, said


def compare(path: str, uri: str, status: int = 0) -> None:
    run("qemu-img", "compare", *RAW, "-F", "raw", path, uri, status=status)


def test_qemu_io_writes_zeroes_discards_and_reads_back(server):
    qemu_io(
        server.uri,
        *["write -P 1 0 64k", "read -P 1 0 64k"],
        *["write -z 4k 4k", "read -P 0 4k 4k", "read -P 1 8k 56k"],
        *["write -z -u 16k 4k", "read -P 0 16k 4k"],
        *["write -z -n 20k 4k", "read -P 0 20k 4k"],
        *["write -z -f 24k 4k", "read -P 0 24k 4k"],
        *["discard 32k 8k", "read -P 0 32k 8k", "read -P 1 40k 24k"],
        *["write -f -P 2 0 4k", "flush", "read -P 2 0 4k"],
        *["write -P 3 512 513", "read -P 3 512 513", "read -P 2 0 512", "read -P 2 1025 3071"],
        *["write -P 4 1M 20M", "read -P 4 1M 20M", "discard 0 64M", "read -P 0 0 64M"],
        *["aio_write -P 5 0 64k", "aio_write -P 6 64k 64k", "aio_flush"],
        *["read -P 5 0 64k", "read -P 6 64k 64k"],
        *["writev -P 7 0 4k 8k 512", "readv -P 7 0 12k 512"],
    )


@pytest.mark.parametrize("seed", [1, 2])
def test_qemu_io_with_many_operations_reads_what_the_model_has(server, seed):
    """In units of 512 bytes, which pages are not: so pages are written, zeroed in parts."""
    chance = random.Random(seed)
    unit, page, units = 512, 8, 1024
    model = bytearray(units)
    script = []

    def read(at: int, length: int) -> None:
        """As many reads as there are runs of a pattern."""
        end = at + length
        while at < end:
            stop = at + 1
            while stop < end and model[stop] == model[at]:
                stop += 1
            script.append(f"read -P {model[at]} {at * unit} {(stop - at) * unit}")
            at = stop

    for n in range(300):
        at = chance.randrange(units)
        length = min(chance.choice((1, 3, 8, 16, 100)), units - at)
        what = chance.choice(("write", "write", "zero", "discard", "read"))
        if what == "write":
            pattern = n % 255 + 1
            flag = chance.choice(("", "-f "))
            script.append(f"write {flag}-P {pattern} {at * unit} {length * unit}")
            model[at : at + length] = bytes([pattern]) * length
        elif what == "zero":
            flags = chance.choice(("", "-u ", "-f ", "-n ", "-u -n "))
            script.append(f"write -z {flags}{at * unit} {length * unit}")
            model[at : at + length] = bytes(length)
        elif what == "discard":
            script.append(f"discard {at * unit} {length * unit}")
            first, last = -(-at // page) * page, (at + length) // page * page
            if first < last:  # whole pages only
                model[first:last] = bytes(last - first)
        else:
            read(at, length)
    read(0, units)
    qemu_io(server.uri, *script)


def write_pages(server) -> list[tuple[int, int, bool, bool]]:
    """(start, length, zero, data), as qemu tells of holes, of data, and of zeros that are kept."""
    qemu_io(server.uri, "write -P 7 8k 8k", "write -P 0 16k 4k", f"write -P 8 {SIZE - PAGE} 4k")
    return [
        (0, 8192, True, False),
        (8192, 8192, False, True),
        (16384, PAGE, True, True),
        (20480, SIZE - 24576, True, False),
        (SIZE - PAGE, PAGE, False, True),
    ]


def test_qemu_img_maps(server):
    wanted = write_pages(server)
    said = json.loads(run("qemu-img", "map", "--output=json", *RAW, server.uri))
    assert [(e["start"], e["length"], e["zero"], e["data"]) for e in said] == wanted


def test_qemu_img_maps_a_context_of_ours(server):
    """What its option for dirty bitmaps is good for: 0 is hole here, and "data" is no state."""
    write_pages(server)
    if server.kind == "nbdkit":  # nbdkit's core has none but base:allocation
        return
    image = f"driver=nbd,server.type=unix,server.path={server.path},export=zram0"
    context = "x-dirty-bitmap=zramd:state"
    said = json.loads(run("qemu-img", "map", "--output=json", "--image-opts", f"{image},{context}"))
    assert sum(e["length"] for e in said) == SIZE


def test_qemu_img_converts_in_and_out_and_compares(server, real_data, tmp_path):
    data, copy = str(real_data), str(tmp_path / "copy")
    run("qemu-img", "convert", "-n", *RAW, "-O", "raw", data, server.uri)
    compare(data, server.uri)
    run("qemu-img", "convert", "-W", "-m", "8", *RAW, "-O", "raw", server.uri, copy)
    assert (tmp_path / "copy").read_bytes() == real_data.read_bytes()
    # The holes are ours, and stay theirs.
    assert (tmp_path / "copy").stat().st_blocks * 512 < SIZE - (8 << 20)
    run("qemu-img", "convert", *RAW, "-O", "qcow2", server.uri, f"{copy}.qcow2")
    run("qemu-img", "compare", *RAW, "-F", "qcow2", server.uri, f"{copy}.qcow2")
    qemu_io(server.uri, "write -P 9 33M 1")
    compare(data, server.uri, status=1)


def test_qemu_img_converts_over_what_was_there(server, real_data):
    qemu_io(server.uri, f"write -P 9 0 {SIZE}")
    run("qemu-img", "convert", "-n", "-W", "-m", "8", *RAW, "-O", "raw", str(real_data), server.uri)
    compare(str(real_data), server.uri)


@pytest.mark.parametrize("how", [[], ["-w"], ["-w", "--flush-interval=100", "--no-drain"]])
def test_qemu_img_bench_comes_to_its_end(server, how):
    said = run("qemu-img", "bench", *RAW, "-c", "2000", "-d", "16", "-s", "4096", *how, server.uri)
    assert "Run completed" in said


def test_qemu_io_is_refused_on_a_read_only_export(read_only_server):
    said = run("qemu-io", *RAW, "-r", "-c", "read -P 0 0 64M", read_only_server.uri)
    assert "failed" not in said
    run("qemu-io", *RAW, "-c", "write 0 4k", read_only_server.uri, status=1)


def test_qemu_io_hears_of_a_full_store(small_server):
    said = run(
        *("qemu-io", *RAW, "-c", "write -P 1 0 4k", "-c", "write -s /usr/bin/qemu-io 1M 4M"),
        *("-c", "read -P 1 0 4k", small_server.uri),
        status=1,
    )
    assert "verification failed" not in said


@contextmanager
def qemu_nbd(server, path, *options):
    """It opens our export, and serves it in its turn."""
    command = [require.program("qemu-nbd"), *RAW, "-k", str(path), "-t", "-e", "4", *options]
    process = subprocess.Popen([*command, server.uri], stderr=subprocess.PIPE)
    try:
        wait_for(lambda: path.is_socket() or process.poll() is not None, "qemu-nbd")
        yield uri_of(path, "again")
    finally:
        process.terminate()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors


def test_qemu_nbd_serves_ours_to_others(server, real_data, tmp_path):
    copy = tmp_path / "copy"
    with qemu_nbd(server, tmp_path / "sock", "-x", "again", "--discard=unmap") as uri:
        run("nbdcopy", "--connections=4", "--requests=64", "--flush", str(real_data), uri)
        run("nbdcopy", "--connections=4", uri, str(copy))
        assert copy.read_bytes() == real_data.read_bytes()
        compare(str(real_data), server.uri)
        # What is a hole there is one here, and the other way round.
        holes = [
            run("nbdinfo", "--map", "--totals", "--json", where) for where in (uri, server.uri)
        ]
        assert holes[0] == holes[1]
        qemu_io(uri, "discard 0 1M", "write -z -u 1M 1M", "write -f -P 5 2M 64k", "flush")
    qemu_io(server.uri, "read -P 0 0 2M", "read -P 5 2M 64k")

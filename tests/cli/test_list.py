"""`zramd list`: the table, its sentence, raw, JSON, and devices that are not well."""

import json
import os
import signal
import socket
import subprocess
import sys

import pytest

from zramd import sizes
from zramd.cli.columns import COLUMNS, DEFAULT, Column, Device
from zramd.cli.list import _sentence
from zramd.statistics import Statistics

ZRAMCTL = [
    *("NAME", "DISKSIZE", "DATA", "COMPR", "ALGORITHM", "STREAMS", "ZERO-PAGES", "TOTAL"),
    *("MEM-LIMIT", "MEM-USED", "MIGRATED", "COMP-RATIO", "MOUNTPOINT"),
]


def statistics(**figures) -> Statistics:
    kinds = {f.name: f.type for f in Statistics.__dataclass_fields__.values()}
    blank = {name: "" if kind is str else 0 for name, kind in kinds.items()} | {"openers": ()}
    return Statistics(**blank | figures)


def device(name="zram0", **figures) -> Device:
    return Device(name, "serving", statistics(name=name, **figures), None)


def column(name: str) -> Column:
    return next(c for c in COLUMNS if c.name == name)


def test_no_devices_is_told_on_stderr_and_stdout_stays_empty(zramd):
    done = zramd.run()
    assert (done.returncode, done.stdout) == (0, "")
    assert "no devices" in done.stderr
    assert zramd.devices() == {}
    assert zramd.left() == []


def test_the_bare_command_is_the_list_and_takes_its_options(zramd):
    zramd.serve("zram0")
    assert zramd.ok() == zramd.ok("list")
    assert zramd.ok("-n", "--raw", "-o", "NAME") == "zram0\n"
    assert zramd.ok("--json") == zramd.ok("list", "-J")


def test_the_table_has_headings_a_row_per_device_and_a_last_sentence(zramd):
    zramd.serve("zram0")
    zramd.serve("zram1", "--disksize=1G", "--algorithm=zstd(level=3)")
    headings, first, second, sentence = zramd.ok().splitlines()
    assert tuple(headings.split()) == DEFAULT
    assert first.split()[:3] == ["zram0", "lz4", "16M"]
    assert second.split()[:3] == ["zram1", "zstd(level=3)", "1G"]
    assert sentence.startswith("0B of pages are stored in ")
    assert sentence.endswith(" of RAM; the devices can hold 1G.")


def test_numbers_stand_to_the_right_and_words_to_the_left(zramd):
    zramd.serve("zram0")
    zramd.serve("a-long-name-of-a-device", "--disksize=1.5G")
    headings, *rows, _ = zramd.ok("list", "-o", "NAME,DISKSIZE,STATE").splitlines()
    assert headings == "NAME                    DISKSIZE STATE"
    assert rows == [
        "a-long-name-of-a-device     1.5G serving",
        "zram0                        16M serving",
    ]


def test_without_headings_there_is_no_sentence_either(zramd):
    zramd.serve("zram0")
    assert zramd.ok("list", "-n", "-o", "NAME,ALGORITHM") == "zram0 lz4\n"


def test_raw_has_one_space_between_columns_and_escapes_those_inside(zramd):
    zramd.serve("zram0")
    assert zramd.ok("list", "--raw", "-b", "-o", "NAME,DEVICE,DISKSIZE").splitlines() == [
        "NAME DEVICE DISKSIZE",
        "zram0  16777216",
    ]


def test_bytes_are_numbers_without_letters(zramd):
    zramd.serve("zram0", "--disksize=1G")
    assert zramd.ok("list", "-bn", "-o", "DISKSIZE,MEM-LIMIT").split() == ["1073741824", "0"]


def test_columns_are_chosen_in_any_case_and_added_with_a_plus(zramd):
    zramd.serve("zram0")
    assert zramd.ok("list", "-o", "state,Name").splitlines()[0].split() == ["STATE", "NAME"]
    headings = zramd.ok("list", "-o", "+STATE,CLIENTS").splitlines()[0].split()
    assert tuple(headings) == (*DEFAULT, "STATE", "CLIENTS")


def test_all_columns_are_zramctl_s_and_five_more(zramd):
    zramd.serve("zram0")
    headings = zramd.ok("list", "--output-all").splitlines()[0].split()
    assert headings == [c.name for c in COLUMNS]
    assert headings[: len(ZRAMCTL)] == ZRAMCTL
    assert set(headings[len(ZRAMCTL) :]) == {
        *("DEVICE", "SAME-PAGES", "HUGE-PAGES", "CLIENTS", "STATE")
    }


def test_json_has_a_schema_every_column_and_integers_in_bytes(zramd):
    zramd.serve("zram0", "--disksize=1G")
    told = json.loads(zramd.ok("list", "--json"))
    assert told["schema"] == 1
    [row] = told["devices"]
    assert list(row) == [c.name.lower().replace("-", "_") for c in COLUMNS]
    assert row["disksize"] == 1 << 30
    assert all(isinstance(row[c.key], int) for c in COLUMNS if c.kind == "size")
    assert (row["mountpoint"], row["device"], row["state"]) == (None, None, "serving")


def test_json_takes_a_choice_of_columns(zramd):
    zramd.serve("zram0")
    assert zramd.devices("-o", "NAME,STATE") == {"zram0": {"name": "zram0", "state": "serving"}}


def test_a_dead_server_is_a_state_and_the_others_are_still_listed(zramd):
    zramd.serve("zram0")
    zramd.serve("zram1")
    zramd.kill("zram0")
    told = zramd.devices()
    assert (told["zram0"]["state"], told["zram1"]["state"]) == ("dead", "serving")
    assert told["zram0"]["disksize"] is None
    _, dead, well, sentence = zramd.ok("list", "-o", "NAME,DISKSIZE,STATE").splitlines()
    assert dead.split() == ["zram0", "dead"]
    assert well.split() == ["zram1", "16M", "serving"]
    assert sentence.endswith("the device can hold 16M.")


def test_a_server_that_is_stopped_is_a_state_too(zramd, monkeypatch):
    monkeypatch.setenv("ZRAMD_RUNTIME_DIR", str(zramd.runtime))
    monkeypatch.setattr("zramd.control.client.ANSWER_S", 0.05)
    zramd.serve("zram0")
    worker = zramd.worker("zram0")
    os.kill(worker, signal.SIGSTOP)
    try:
        assert Device.look("zram0") == Device("zram0", "silent", None, None)
    finally:
        os.kill(worker, signal.SIGCONT)


def test_a_device_without_disksize_is_idle(zramd):
    zramd.serve("zram0")
    zramd.ok("reset", "zram0")
    told = zramd.devices()["zram0"]
    assert (told["state"], told["disksize"], told["comp_ratio"]) == ("idle", 0, None)


def test_clients_are_counted(zramd):
    zramd.serve("zram0")
    with zramd.connect("zram0"), zramd.connect("zram0"):
        assert zramd.devices()["zram0"]["clients"] == 2


def test_what_was_written_shows_in_the_figures(zramd):
    zramd.serve("zram0")
    with zramd.connect("zram0") as client:
        pages = os.urandom(4096) + b"text " * 1638 + b"12"  # one huge, two compressible
        request = b"\x25\x60\x95\x13" + b"\0\0" + b"\0\1" + b"12345678" + bytes(8)
        client.sendall(request + len(pages).to_bytes(4, "big") + pages)
        assert client.recv(16, socket.MSG_WAITALL) == b"\x67\x44\x66\x98\0\0\0\x0012345678"
    told = zramd.devices()["zram0"]
    assert (told["data"], told["huge_pages"], told["zero_pages"]) == (12288, 1, 0)
    assert 4096 < told["compr"] < 12288
    assert told["compr"] <= told["total"] <= told["mem_used"]
    assert told["comp_ratio"] == pytest.approx(told["data"] / told["total"])


def test_the_list_loads_no_compressor(zramd):
    zramd.serve("zram0")
    done = subprocess.run(
        [
            *(sys.executable, "-c"),
            "import sys, atexit; from zramd.cli import main\n"
            "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
            "main(['list', '-n', '--raw'])",
        ],
        env=zramd.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("zram0 lz4 ")
    loaded = set(done.stderr.split())
    assert "zramd.cli.list" in loaded
    assert not loaded & {"lz4", "zstandard", "zramd.device", "zramd.nbd.server", "zramd.cli.up"}


def test_a_reader_that_goes_early_is_not_told_about_it(zramd):
    zramd.serve("zram0")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        zramd.argv("list"), env=zramd.environment, stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (1, b"")


def test_the_sentence_tells_what_is_saved():
    of_one = device(
        orig_data_size=sizes.parse("2.3G"), mem_used_total=sizes.parse("904M"), disksize=8 << 30
    )
    assert _sentence([of_one.now]) == (
        "2.3G of pages are stored in 904M of RAM (saving 1.4G); the device can hold 8G."
    )
    assert _sentence([of_one.now, of_one.now]).endswith("(saving 2.8G); the devices can hold 16G.")


def test_the_sentence_claims_no_saving_where_there_is_none():
    empty = device(mem_used_total=4096, disksize=1 << 30)
    assert _sentence([empty.now]) == (
        "0B of pages are stored in 4K of RAM; the device can hold 1G."
    )


def test_the_ratio_is_that_of_data_to_all_memory():
    now = device(orig_data_size=30000, compr_data_size=5000, mem_used_total=10000)
    assert column("COMP-RATIO").value(now) == 3.0
    assert column("COMP-RATIO").text(now, in_bytes=False) == "3.0000"


def test_columns_explain_themselves_in_the_help(zramd):
    said = zramd.ok("list", "--help")
    for c in COLUMNS:
        assert f"    {c.name:10}  {c.meaning}\n" in said


def test_names_columns_attributes_and_algorithms_are_completed(zramd):
    def complete(*words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-m", "zramd.cli"],
            env=zramd.environment
            | {
                "_ZRAMD_COMPLETE": "bash_complete",
                "COMP_WORDS": " ".join(["zramd", *words]),
                "COMP_CWORD": str(len(words)),
            },
            capture_output=True,
            text=True,
            check=False,
        )
        return [line.partition(",")[2] for line in done.stdout.splitlines()]

    zramd.serve("zram7")
    assert complete("a") == ["attach"]
    assert complete("get", "z") == ["zram7"]
    assert complete("get", "zram7", "mm") == ["mm_stat"]
    assert complete("set", "zram7", "mem_l") == ["mem_limit"]
    assert complete("serve", "x", "--algorithm", "z") == ["zstd"]
    assert complete("list", "-o", "NAME,ME") == ["NAME,MEM-LIMIT", "NAME,MEM-USED"]


def test_a_device_that_lost_its_server_is_told_with_what_to_do(zramd):
    zramd.serve("zram0")
    zramd.kill("zram0")
    told = zramd.run("list")
    assert told.returncode == 0
    assert "RAM" not in told.stdout, "no figures are known"
    assert (
        told.stderr == "zramd: zram0 has lost its server; `zramd down zram0` clears what is left\n"
    )

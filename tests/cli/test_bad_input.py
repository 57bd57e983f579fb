"""Wrong input: one line that names the culprit and what is allowed, a next step, nothing made."""

import pytest

from zramd.cli import VERBS

WRONG = [
    # (arguments, exit code, what the line must name, and what to do)
    (("serve", "zram0"), 2, "--disksize", "serve --help"),
    (("serve",), 2, "NAME", "serve --help"),
    (("serve", "zram0", "--disksize=12x"), 2, "--disksize: '12x'", "512M"),
    (("serve", "zram0", "--disksize=-1"), 2, "--disksize: '-1'", "512M"),
    (("serve", "zram0", "--disksize="), 2, "--disksize: ''", "512M"),
    (("serve", "zram0", "--disksize=0"), 2, "disksize of 0", "1G"),
    (("serve", "zram0", "--disksize=1M", "--mem-limit=lots"), 2, "--mem-limit: 'lots'", "512M"),
    (("serve", "zram0", "--disksize=1M", "--algorithm=lzo9"), 2, "'lzo9'", "lz4hc, zstd"),
    (("serve", "zram0", "--disksize=1M", "--algorithm=zstd(level=99)"), 2, "99", "22"),
    (("serve", "zram0", "--disksize=1M", "--algorithm="), 2, "''", "lz4"),
    (("serve", "a/b", "--disksize=1M"), 2, "'a/b'", "letters"),
    (("serve", "..", "--disksize=1M"), 2, "'..'", "letters"),
    (("serve", "x" * 33, "--disksize=1M"), 2, "x" * 33, "32"),
    (("serve", "zram0", "--disksize=1M", "--listen=here"), 2, "--listen: 'here'", "unix:PATH"),
    (("serve", "zram0", "--disksize=1M", "--listen=tcp:h:0"), 2, "'0'", "tcp:HOST:PORT"),
    (("serve", "zram0", "--disksize=1M", "--listen=unix:" + "x/" * 99), 2, "107", "shorter"),
    (("serve", "zram0", "--disksize=1M", "--listen=unix:/no/such/dir/s"), 2, "/no/such/dir/s", ""),
    (("serve", "zram0", "--disksize=1M", "--listen=vsock:x:1"), 2, "'x'", "vsock:any:10809"),
    (("serve", "zram0", "-s1M", "--listen=tcp:0.0.0.0:9"), 2, "tcp:0.0.0.0:9", "--allow-plain-tcp"),
    (("serve", "zram0", "-s1M", "--tls=on"), 2, "tls on", "--tls-certificates DIR"),
    (("serve", "zram0", "-s1M", "--tls-psk=/no/such"), 2, "--tls-psk", "--tls require"),
    (
        ("serve", "zram0", "-s1M", "--tls=on", "--tls-certificates=/no/such"),
        *(2, "/no/such is not a directory", "server-cert.pem"),
    ),
    (("serve", "zram0", "-s1M", "--tls=on", "--tls-psk=/no/such"), 2, "/no/such", "psktool"),
    (("serve", "zram0", "-s1M", "--max-connections=0"), 2, "--max-connections", "serve --help"),
    (("serve", "zram0", "zram1", "--disksize=1M"), 2, "zram1", "serve --help"),
    (("serve", "zram0", "--disk=1M"), 2, "--disk", "serve --help"),
    (("fly",), 2, "'fly'", "zramd --help"),
    (("list", "--output=NAME,COLOUR"), 2, "'COLOUR'", "MOUNTPOINT"),
    (("-o", "+"), 2, "''", "MOUNTPOINT"),
    (("-x",), 2, "-x", "list --help"),
    (("get", "zram0", "disksize"), 20, "zram0", "zramd up"),
    (("get", "zram0"), 2, "ATTRIBUTE", "get --help"),
    (("set", "zram0", "mem_limit"), 2, "VALUE", "set --help"),
    (("set", "zram0", "mem_limit", "1M"), 20, "zram0", "zramd up"),
    (("reset", "zram0"), 20, "zram0", "zramd up"),
    (("down", "zram0"), 20, "zram0", "zramd list"),
    (("detach", "zram0"), 20, "zram0", "zramd list"),
    (("attach", "zram0", "--via=usb"), 2, "usb", "attach --help"),
    (("attach", "zram0", "--node=nbd0"), 2, "--node: 'nbd0'", "/dev/nbd0"),
    (("attach", "zram0", "--config=/no/such"), 2, "/no/such cannot be read", "No such file"),
    (("serve", "zram0", "--config=/no/such"), 2, "/no/such cannot be read", "No such file"),
    (("up", "zram0", "--config=/no/such"), 2, "/no/such cannot be read", "No such file"),
    (("check-config", "a b"), 2, "'a b'", "letters"),
    (("up", "zram0", "--disksize=12x"), 2, "--disksize: '12x'", "512M"),
    (("up", "zram0", "--disksize=0"), 2, "disksize of 0", "1G"),
    (("up", "zram0", "--disksize=1M", "--algorithm=lzo9"), 2, "'lzo9'", "zstd"),
    (("up", "zram0", "--disksize=1M", "--swap", "--mount=/mnt"), 2, "--swap and --mount", "one"),
    (("up", "zram0", "--disksize=1M", "--priority=5"), 2, "--priority", "--swap"),
    (("up", "zram0", "--disksize=1M", "--swap", "--priority=99999"), 2, "--priority", "up --help"),
    (("up", "zram0", "--disksize=1M", "--fs=xfs"), 2, "--fs", "--mount"),
    (("up", "zram0", "-s1M", "--listen=tcp:0.0.0.0:9"), 2, "tcp:0.0.0.0:9", "--allow-plain-tcp"),
    (("up", "zram0", "-s1M", "--swap", "--read-only"), 2, "read-only", "leave one"),
]


@pytest.mark.parametrize(
    ("arguments", "exit_code", "culprit", "step"),
    WRONG,
    ids=lambda v: " ".join(v)[:60] if isinstance(v, tuple) else "",
)
def test_wrong_input_is_told_in_one_line_and_nothing_is_made(
    zramd, arguments, exit_code, culprit, step
):
    line = zramd.fails(exit_code, *arguments)
    assert culprit in line
    assert step in line.partition(culprit)[2]
    assert zramd.left() == []


@pytest.mark.parametrize(
    ("arguments", "exit_code", "culprit", "step"),
    [
        (("get", "zram0", "colour"), 2, "'colour' is not an attribute", "mm_stat"),
        (("get", "zram0", "compact"), 2, "'compact' can only be set", "mm_stat"),
        (("set", "zram0", "mm_stat", "1"), 2, "'mm_stat' is read-only", "mem_limit"),
        (("set", "zram0", "mem_limit", "lots"), 2, "'lots' is not a size", "512M"),
        (("set", "zram0", "disksize", "1M"), 30, "initialised already", "zramd reset zram0"),
        (("set", "zram0", "comp_algorithm", "zstd"), 30, "comp_algorithm", "zramd reset zram0"),
        (("set", "zram0", "algorithm_params", "dict=x"), 36, "dictionaries", ""),
        (("set", "zram0", "prealloc", "1"), 30, "prealloc cannot change", "zramd reset zram0"),
        (("set", "zram0", "prealloc", "yes"), 2, "prealloc takes 0 or 1", "'yes'"),
        (("up", "zram0", "--disksize=1M"), 30, "up already, with 16M, lz4", "zramd down zram0"),
        (("up", "zram0", "--disksize=16M", "--algorithm=zstd"), 30, "up already", "zramd down"),
    ],
)
def test_wrong_input_for_a_running_device_leaves_it_as_it_is(
    zramd, arguments, exit_code, culprit, step
):
    zramd.serve("zram0")
    before = zramd.devices()
    line = zramd.fails(exit_code, *arguments)
    assert culprit in line
    assert step in line.partition(culprit)[2]
    assert zramd.devices() == before


def test_no_runtime_directory_is_told_by_every_verb(zramd):
    zramd.environment["ZRAMD_RUNTIME_DIR"] = f"{zramd.runtime}/not/there"
    said = zramd.fails(22, "serve", "zram0", "--disksize=1M")
    assert "/not" in said
    assert "ZRAMD_RUNTIME_DIR" in said
    assert zramd.left() == []


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_with_an_explanation_of_each_option(zramd, verb):
    said = zramd.ok(verb, "--help")
    assert said.startswith(f"Usage: zramd {verb} ")
    options = said.split("Options:\n")[1].split("\n\n")[0].splitlines()
    assert all(len(line.split("  ")) > 2 or line.startswith(" " * 8) for line in options)


def test_the_help_lists_every_verb(zramd):
    said = zramd.ok("--help")
    assert all(f"\n  {verb} " in said for verb in VERBS)

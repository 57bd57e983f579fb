"""A device's file: what it may say, and how it is told what is wrong with it."""

from dataclasses import fields
from pathlib import Path

import pytest

from zramd.errors import BadValue
from zramd.nbd.address import TcpAddress, UnixAddress, VsockAddress
from zramd.service import config
from zramd.service.config import Config

MIB = 1 << 20


@pytest.fixture
def file(tmp_path):
    return tmp_path / "zram0.toml"


def told(file: Path, text: str | bytes) -> list[str]:
    """What is wrong, each as LINE: MESSAGE; HINT."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    lines = [fault.line() for fault in config.faults(file)]
    assert all(line.startswith(f"{file}:") and "\n" not in line for line in lines)
    return [line.removeprefix(f"{file}:") for line in lines]


def test_every_key_is_a_field_of_the_configuration(file):
    file.write_text(
        """
        disksize = "1G"
        comp_algorithm = "zstd(level=3)"
        mem_limit = 1048576
        prealloc = false
        listen = ["unix:/run/a b.sock", "tcp:[::1]:10809", "vsock:any:10809"]
        tls = "require"
        tls_certificates = "/etc/zramd/tls"
        tls_verify_peer = true
        allow_plain_tcp = true
        read_only = true
        max_connections = 8
        node = "/dev/nbd0"
        use = "mount"
        mount_point = "/mnt"
        fs_type = "xfs"
        allow_deadlock = true
        """
    )
    assert config.faults(file) == []
    assert config.read(file) == Config(
        disksize=1024 * MIB,
        comp_algorithm="zstd(level=3)",
        mem_limit=MIB,
        prealloc=False,
        listen=(
            UnixAddress(Path("/run/a b.sock")),
            TcpAddress("::1", 10809),
            VsockAddress(0xFFFFFFFF, 10809),
        ),
        tls="require",
        tls_certificates=Path("/etc/zramd/tls"),
        tls_verify_peer=True,
        allow_plain_tcp=True,
        read_only=True,
        max_connections=8,
        node="/dev/nbd0",
        use="mount",
        mount_point=Path("/mnt"),
        fs_type="xfs",
        allow_deadlock=True,
    )


def test_there_is_a_parser_for_each_field_and_no_other():
    assert list(config._PARSERS) == [field.name for field in fields(Config)]


def test_a_disksize_is_all_that_a_file_needs(file):
    file.write_text("disksize = 4096")
    assert config.read(file) == Config(disksize=4096)


def test_swap_has_a_priority_of_its_own(file):
    file.write_text('disksize = "1M"\nuse = "swap"\nswap_priority = -1\n')
    assert config.read(file) == Config(disksize=MIB, use="swap", swap_priority=-1)


@pytest.mark.parametrize(
    ("line", "culprit", "step"),
    [
        ('disksize = "12x"', "disksize: '12x' is not a size", "512M"),
        ("disksize = -1", "disksize: '-1' is not a size", "512M"),
        ("disksize = 0", "disksize: a disksize of 0", "1G"),
        ('disksize = "0"', "disksize: a disksize of 0", "1G"),
        ("disksize = 1.5", "disksize: 1.5 is not allowed", '"1G"'),
        ("disksize = true", "disksize: true is not allowed", '"1G"'),
        ('disksize = ["1G"]', "disksize: a list is not allowed", '"1G"'),
        ("disksize.x = 1", "disksize: a table is not allowed", '"1G"'),
        ('mem_limit = "lots"', "mem_limit: 'lots' is not a size", "512M"),
        ('comp_algorithm = "lzo9"', "comp_algorithm: there is no algorithm 'lzo9'", "lz4hc, zstd"),
        ('comp_algorithm = "zstd(level=99)"', "zstd has no level 99", "22"),
        ("comp_algorithm = 3", "comp_algorithm: 3 is not allowed", '"zstd'),
        ('prealloc = "yes"', "prealloc: 'yes' is not allowed", "true or false"),
        ("prealloc = 1", "prealloc: 1 is not allowed", "true or false"),
        ('listen = "unix:/a"', "listen: 'unix:/a' is not allowed", '["unix:'),
        ("listen = [1]", "listen: 1 is not allowed", '"unix:'),
        ('listen = ["here"]', "listen: 'here' is not an address", "unix:PATH"),
        ('listen = ["unix:a.sock"]', "listen: unix:a.sock is relative", "from /"),
        ('node = "nbd0"', "node: 'nbd0' is not an nbd device", "/dev/nbd0"),
        ('node = "/dev/nbd0p1"', "node: '/dev/nbd0p1' is not", "/dev/nbd0"),
        ('node = "/dev/nbd0\\n"', "node: '/dev/nbd0", "/dev/nbd0"),
        ("node = 0", "node: 0 is not allowed", "/dev/nbd0"),
        ('use = "disk"', "use: 'disk' is not allowed", '"swap" or "mount"'),
        ("use = false", "use: false is not allowed", '"swap" or "mount"'),
        ('swap_priority = "high"', "swap_priority: 'high' is not allowed", "-1 to 32767"),
        ("swap_priority = 32768", "swap_priority: 32768 is not allowed", "-1 to 32767"),
        ("swap_priority = true", "swap_priority: true is not allowed", "-1 to 32767"),
        ('mount_point = "mnt"', "mount_point: 'mnt' is relative", "from /"),
        ("mount_point = 2024-01-01", "mount_point: 2024-01-01 is not allowed", '"/mnt"'),
        ('fs_type = "ext4/../sh"', "fs_type: 'ext4/../sh' is not a file system", "xfs"),
        ("allow_deadlock = 0", "allow_deadlock: 0 is not allowed", "true or false"),
        ("tls = true", "tls: true is not allowed", '"off", "on" or "require"'),
        ('tls = "yes"', "tls: 'yes' is not allowed", '"off", "on" or "require"'),
        ('tls_certificates = "pki"', "tls_certificates: 'pki' is relative", "from / on"),
        ('tls_verify_peer = "yes"', "tls_verify_peer: 'yes' is not allowed", "true or false"),
        ('tls_psk = "keys"', "tls_psk: 'keys' is relative", "from / on"),
        ("allow_plain_tcp = 1", "allow_plain_tcp: 1 is not allowed", "true or false"),
        ("read_only = 1", "read_only: 1 is not allowed", "true or false"),
        ("max_connections = 0", "max_connections: 0 is not allowed", "1 to 1048576"),
        ("max_connections = true", "max_connections: true is not allowed", "1 to 1048576"),
        ('max_connections = "9"', "max_connections: '9' is not allowed", "1 to 1048576"),
        ("prealoc = true", "prealoc: there is no such key", "prealloc?"),
        ("colour = 1", "colour: there is no such key", "disksize, comp_algorithm"),
        ("[export.swap0]", "export: there is no such key", "disksize, comp_algorithm"),
        ("[[export]]", "export: there is no such key", "disksize, comp_algorithm"),
    ],
)
def test_a_wrong_line_is_told_with_its_number_and_what_is_allowed(file, line, culprit, step):
    first = "" if line.startswith("disksize") else 'disksize = "1G"'
    kind = {"s": 'use = "swap"', "f": 'use = "mount"\nmount_point = "/mnt"', "m": 'use = "mount"'}
    use = kind[line[0]] if line.startswith(("swap_", "fs_", "mount_")) else "# nothing"
    [fault] = told(file, f"{first}\n{use}\n{line}\n")
    number = 3 + use.count("\n")
    assert fault.startswith(f"{number}: ")
    assert culprit in fault
    assert step in fault.partition(culprit)[2]
    with pytest.raises(BadValue) as refused:
        config.read(file)
    assert refused.value.line() == f"{file}:{fault}"


@pytest.mark.parametrize(
    ("text", "number", "culprit", "step"),
    [
        ("swap_priority = 5", 2, 'swap_priority goes with use = "swap"', "leave it out, or add"),
        ('mount_point = "/mnt"', 2, 'mount_point goes with use = "mount"', "leave it out, or add"),
        ('use = "swap"\nfs_type = "xfs"', 3, 'fs_type goes with use = "mount"', "leave it out"),
        ('use = "mount"', 2, 'use = "mount" needs a mount_point', 'mount_point = "/mnt"'),
        (
            'use = "swap"\nmem_limit = "1M"',
            *(3, "a mem_limit of 1M cannot be reserved for a device of 1G", "table alone takes 2M"),
        ),
        (
            'prealloc = true\nmem_limit = "1M"',
            *(3, "a mem_limit of 1M cannot be reserved for a device of 1G", "table alone takes 2M"),
        ),
        (
            'listen = ["unix:/a", "tcp:h:1"]\nuse = "swap"',
            *(2, "swap is not served on tcp:h:1: over TCP it can deadlock", "unix:PATH only"),
        ),
        (
            'use = "swap"\nlisten = ["vsock:any:1"]',
            *(3, "swap is not served on vsock:any:1: over vsock it can", "unix:PATH only"),
        ),
        ('use = "swap"\nread_only = true', 3, "swap cannot be read-only", "leave one"),
        (
            'listen = ["tcp:127.0.0.1:1", "tcp:192.0.2.1:1"]',
            *(2, "whoever reaches tcp:192.0.2.1:1 could read and write", "allow_plain_tcp"),
        ),
        (
            'listen = ["tcp:[::]:1"]\ntls = "on"\ntls_certificates = "/p"',
            *(2, "whoever reaches tcp:[::]:1 could read and write", "--tls require"),
        ),
        ('tls_psk = "/keys"', 2, "--tls-psk says how", "add --tls require"),
        ('tls_certificates = "/p"', 2, "--tls-certificates says how", "add --tls require"),
        ("tls_verify_peer = true", 2, "--tls-verify-peer says how", "add --tls require"),
        ('tls = "on"', 2, "tls on needs certificates", "tls_certificates"),
        (
            'tls = "on"\ntls_psk = "/k"\ntls_certificates = "/p"',
            *(3, "--tls-psk and --tls-certificates exclude each other", "one"),
        ),
        (
            'tls = "on"\ntls_psk = "/k"\ntls_verify_peer = true',
            *(3, "--tls-psk and --tls-verify-peer exclude each other", "one"),
        ),
        (
            'tls = "on"\ntls_certificates = "/p"\ntls_verify_peer = true',
            *(4, "--tls-verify-peer keeps nobody out", "--tls require"),
        ),
        ('tls_certificates = "/p"\ntls = "yes"', 3, "tls: 'yes' is not allowed", "require"),
    ],
)
def test_keys_that_do_not_go_together_are_told(file, text, number, culprit, step):
    [fault] = told(file, f'disksize = "1G"\n{text}\n')
    assert fault.startswith(f"{number}: {culprit}")
    assert step in fault


def test_swap_over_tcp_is_refused_wherever_it_is_said():
    with pytest.raises(BadValue, match="deadlock"):
        Config(disksize=MIB, use="swap", listen=(TcpAddress("h", 1),))


def test_a_wrong_use_brings_no_complaints_about_what_goes_with_it(file):
    [fault] = told(file, 'disksize = 1\nuse = "swp"\nswap_priority = 1\nmount_point = "/mnt"\n')
    assert fault.startswith("2: use: ")


def test_a_missing_disksize_is_told_after_what_may_be_its_misspelling(file):
    misspelt, missing = told(file, '# a device\ndisk_size = "1G"\nuse = "swap"\n\n')
    assert misspelt == "2: disk_size: there is no such key; do you mean disksize?"
    assert missing == '3: a disksize is missing; add a line such as disksize = "1G"'
    assert told(file, "") == ['1: a disksize is missing; add a line such as disksize = "1G"']


def test_all_that_is_wrong_is_told_in_the_order_of_the_lines(file):
    faults = told(
        file,
        """# first
listen = [
  "unix:relative",  # disksize = 1
]
use = "swap"
text = '''
disksize = "x"
"disksize" = 2
[[
'''
"disksize" = "12x"\r
mount_point = 5

[export.swap0]
fs_type = "of a table, and not of ours"
[other]
""",
    )
    assert [fault.split(": ")[0] for fault in faults] == ["2", "6", "11", "12", "12", "14", "16"]
    with pytest.raises(BadValue) as refused:
        config.read(file)
    assert refused.value.line() == (
        f"{file}:2: listen: unix:relative is relative; write the path from / on;"
        f" and 6 more: zramd check-config {file}"
    )


@pytest.mark.parametrize(
    ("text", "number", "message"),
    [
        ('disksize = "1G"\nmem_limit = 1G\n', 2, "after a statement; a line is as in disksize ="),
        ('disksize = "1G"\ndisksize = "2G"\n', 2, "Cannot overwrite a value"),
        ('use = """\nswap\n', 2, "Unterminated"),
        ("disksize = " + "1" * 5000, 1, "limit"),
        ("a = " + "[" * 50000, 1, "too deep"),
        (b'disksize = "1G"\n# caf\xe9\n', 2, "not UTF-8; save it in UTF-8"),
    ],
    ids=["unquoted", "twice", "open", "digits", "deep", "latin"],
)
def test_what_is_no_toml_is_told_with_the_line(file, text, number, message):
    [fault] = told(file, text)
    assert fault.startswith(f"{number}: ")
    assert message in fault


def test_a_file_that_cannot_be_read_is_told(file):
    for path, why in ((file, "No such file"), (file.parent, "Is a directory")):
        [fault] = config.faults(path)
        assert fault.line().startswith(f"{path} cannot be read: {why}")
        with pytest.raises(BadValue, match=why):
            config.read(path)


def test_the_file_of_a_device_lies_in_etc_zramd_unless_another_place_is_set(monkeypatch):
    monkeypatch.delenv("ZRAMD_CONFIG_DIR", raising=False)
    assert config.path_of("zram0") == Path("/etc/zramd/zram0.toml")
    monkeypatch.setenv("ZRAMD_CONFIG_DIR", "/else/where")
    assert config.path_of("zram0") == Path("/else/where/zram0.toml")
    with pytest.raises(BadValue, match="device name"):
        config.path_of("../zram0")


def test_what_a_node_is_to_hold_is_told_by_the_use():
    assert Config(disksize=1).content is None
    assert Config(disksize=1, use="swap").content == "swap"
    assert Config(disksize=1, use="mount", mount_point=Path("/mnt")).content == "ext4"
    assert Config(disksize=1, use="mount", fs_type="xfs").content == "xfs"

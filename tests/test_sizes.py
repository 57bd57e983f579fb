"""Sizes as people type them and as zramctl prints them."""

import shutil
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import require
from zramd.errors import BadValue
from zramd.sizes import human, parse


@pytest.mark.parametrize(
    ("text", "size"),
    [
        *(("0", 0), ("1", 1), ("4096", 4096), ("007", 7), ("12B", 12), ("12b", 12), ("0.9", 0)),
        *(("1K", 1 << 10), ("1M", 1 << 20), ("1G", 1 << 30), ("1T", 1 << 40), ("1P", 1 << 50)),
        *(("1E", 1 << 60), ("1k", 1 << 10), ("1m", 1 << 20), ("1g", 1 << 30)),
        *(("1KiB", 1 << 10), ("1MiB", 1 << 20), ("1kib", 1 << 10), ("1GIB", 1 << 30)),
        *(("1KB", 1000), ("1MB", 10**6), ("1GB", 10**9), ("1TB", 10**12), ("1kb", 1000)),
        *(
            ("1.5K", 1536),
            ("0.5M", 1 << 19),
            ("1.5KB", 1500),
            ("1.0001K", 1024),
            ("2.25G", 9 << 28),
        ),
        *((" 1 K ", 1024), ("1K\n", 1024), ("\t512 MiB", 512 << 20)),
    ],
)
def test_what_util_linux_takes_is_taken(text, size):
    assert parse(text) == size


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "K", "x", "-1", "+1", "1X", "1KK", "1iB", "1Ki", "1 1", "1K 1", "1.", ".5"),
        *("1,5", "1e3", "0x10", "1_000", "\u0661", "\uff11", "nan", "inf", "1K\0", "1Z", "1KiB/s"),
    ],
)
def test_what_is_no_size_is_a_bad_value_that_says_what_is(text):
    with pytest.raises(BadValue) as caught:
        parse(text)
    assert repr(text) in caught.value.message
    assert "such as" in caught.value.hint


@pytest.mark.parametrize("text", ["4E", "16E", "4611686018427387904", "9" * 20, "9" * 16 + "K"])
def test_what_no_machine_has_is_too_large(text):
    with pytest.raises(BadValue, match="too large"):
        parse(text)


@pytest.mark.parametrize("text", ["9" * 21, "9" * 5000, "9" * 5000 + "E", "0." + "9" * 5000])
def test_a_number_longer_than_any_size_is_no_size(text):
    with pytest.raises(BadValue, match="is not a size"):
        parse(text)


@given(st.integers(0, (1 << 62) - 1))
def test_digits_alone_are_bytes(size):
    assert parse(str(size)) == size


@pytest.mark.parametrize(
    ("size", "text"),
    [
        *((0, "0B"), (1, "1B"), (1023, "1023B"), (1024, "1K"), (4096, "4K"), (1536, "1.5K")),
        *((1280, "1.3K"), (1792, "1.8K")),
        *((1 << 20, "1M"), (1 << 30, "1G"), (3 << 29, "1.5G"), (5 << 40, "5T"), (1 << 60, "1E")),
        *((1023 << 10, "1023K"), (1690, "1.7K"), (1126, "1.1K"), (1076, "1.1K"), (1 << 50, "1P")),
    ],
)
def test_a_size_is_shown_with_one_letter_and_at_most_one_decimal(size, text):
    assert human(size) == text


@given(st.integers(0, 51), st.integers(1, 1023))
def test_what_is_shown_can_be_typed_and_is_within_a_twentieth_of_a_unit(shift, number):
    size = number << shift
    assert abs(parse(human(size)) - size) <= (1 << (size.bit_length() - 1) // 10 * 10) // 20 + 1


def test_util_linux_shows_the_same(tmp_path):
    require.that(shutil.which("fincore") is not None, "fincore of util-linux is not installed")
    file = tmp_path / "file"
    file.touch()
    sizes = [0, 1, 1023, 1024, 1280, 1300, 1792, 1690, 1153, 1048524, 1048525, 1048575, 9 << 20]
    for size in sizes:
        with file.open("r+b") as opened:
            opened.truncate(size)
        shown = subprocess.run(
            ["fincore", "--noheadings", "--raw", "--output", "SIZE", str(file)],
            capture_output=True,
            text=True,
            check=True,
        )
        assert human(size) == shown.stdout.strip()

"""Sizes as people type and read them, the way zramctl does it.

`parse` takes what util-linux takes: digits with an optional fraction, then B, or K M G T P E alone
or with iB (powers of 1024), or with B (powers of 1000); either case. `human` writes what
zramctl prints: powers of 1024, at most one decimal, one letter.
"""

import re
from decimal import Decimal

from zramd.errors import BadValue

_LETTERS = "KMGTPE"
_TOO_LARGE = 1 << 62  # leaves room to round up and to add in a signed 64-bit integer
_SIZE = re.compile(
    r"(\d{1,20}(?:\.\d{1,20})?)\s*(?:([KMGTPE])(iB|B)?|B)?", re.IGNORECASE | re.ASCII
)


def parse(text: str) -> int:
    """Bytes meant by `text`; a fraction of a byte is dropped. Raises BadValue, from 4E on too."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadValue(
            f"{text!r} is not a size",
            hint="give bytes, or a number with K, M, G or T (powers of 1024) or KB, MB, GB"
            " (powers of 1000), such as 512M",
        )
    number, letter, unit = match.groups()
    base = 1000 if unit is not None and unit.upper() == "B" else 1024
    power = 0 if letter is None else _LETTERS.index(letter.upper()) + 1
    size = int(Decimal(number) * base**power)
    if size >= _TOO_LARGE:
        raise BadValue(f"{text!r} is too large", hint="give a size below 4E, such as 512M")
    return size


def human(size: int) -> str:
    """`size` bytes with one letter, as zramctl prints it: 0B, 4K, 1.5G."""
    power = min(max(0, size.bit_length() - 1) // 10, len(_LETTERS))
    whole, rest = divmod(size, 1 << 10 * power)
    # Half up, from three decimals: size_to_human_string of util-linux, lib/strutils.c.
    tenths = ((rest * 1000 >> 10 * power) + 50) // 100
    whole, tenths = whole + tenths // 10, tenths % 10
    letter = "B" if power == 0 else _LETTERS[power - 1]
    return f"{whole}.{tenths}{letter}" if tenths else f"{whole}{letter}"

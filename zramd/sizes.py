"""Sizes as people type and read them, the way zramctl does it.

`parse` takes what util-linux takes: digits with an optional fraction, then B, or K M G T P E alone
or with iB (powers of 1024), or with B (powers of 1000); either case. `human` writes what
zramctl prints: powers of 1024, at most one decimal, one letter.
"""

import re
from decimal import Decimal

from zramd.errors import BadValue

_LETTERS = "KMGTPE"
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGTPE])(iB|B)?|B)?", re.IGNORECASE | re.ASCII)


def parse(text: str) -> int:
    """Bytes meant by `text`; a fraction of a byte is dropped. Raises BadValue."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise BadValue(
            f"{text!r} is not a size",
            hint="give bytes, or a number with K, M, G or T (powers of 1024) or KB, MB, GB"
            " (powers of 1000), such as 512M",
        )
    number, letter, unit = match.groups()
    if letter is None:
        return int(Decimal(number))
    base = 1000 if unit is not None and unit.upper() == "B" else 1024
    return int(Decimal(number) * base ** (_LETTERS.index(letter.upper()) + 1))


def human(size: int) -> str:
    """`size` bytes with one letter, as zramctl prints it: 0B, 4K, 1.5G."""
    value, letter = Decimal(size), "B"
    for larger in _LETTERS:
        if value < 1024:
            break
        value, letter = value / 1024, larger
    shown = f"{value:.1f}".removesuffix(".0")
    return f"{shown}{letter}"

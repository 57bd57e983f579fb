"""docs/errors.md against the classes."""

import re
from pathlib import Path

from zramd.errors import KINDS

PAGE = Path(__file__).parents[2] / "docs" / "errors.md"


def test_the_page_lists_every_error_with_its_code_slug_and_meaning():
    rows = re.findall(r"^\| (\d+) \| ([\w-]+) \| (.+) \|$", PAGE.read_text(), re.MULTILINE)
    told = [(str(k.exit_code), k.slug, k.__doc__) for k in KINDS]
    assert rows == sorted(told, key=lambda row: int(row[0]))


def test_every_error_has_a_slug_and_an_exit_code_of_its_own():
    assert len({k.slug for k in KINDS}) == len({k.exit_code for k in KINDS}) == len(KINDS)

"""The README's list of what zramd depends on, against pyproject.toml and the packages installed."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEPENDENCIES = [
    re.split(r"[<>=]", requirement)[0]
    for requirement in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "dependencies"
    ]
]
LISTED = dict(
    re.findall(r"^\| (\w+) \| ([\w.-]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
)


def licence(package: str) -> str:
    """What the package says of itself, as an SPDX expression."""
    told = metadata.metadata(package)
    for name in (told["License-Expression"], told["License"]):
        if name and re.fullmatch(r"[A-Z][\w.+]*(-[\w.+]+)+", name):
            return name
    classifiers = told.get_all("Classifier") or []
    text = " ".join([told["License"] or "", *(c for c in classifiers if "License" in c)])
    assert "BSD" in text, f"{package}: {text}"
    return "BSD-3-Clause"


@pytest.mark.parametrize("package", DEPENDENCIES)
def test_the_readme_tells_the_licence_of_each_dependency(package):
    assert LISTED[package] == licence(package)

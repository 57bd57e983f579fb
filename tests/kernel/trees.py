"""A directory tree of real files, and what is in a tree."""

import hashlib
import shutil
import sysconfig
from pathlib import Path

_LEFT_OUT = ("site-packages", "dist-packages", "__pycache__", "test*", "config-*", "ensurepip")
SOURCE = Path(sysconfig.get_path("stdlib"))


def copy_tree(target: Path) -> int:
    """Copy Python's library, or most of it; bytes copied."""
    shutil.copytree(
        SOURCE,
        target,
        symlinks=True,
        ignore=shutil.ignore_patterns(*_LEFT_OUT),
    )
    return sum(len(path.read_bytes()) for path in target.rglob("*") if path.is_file())


def contents(tree: Path) -> dict[str, tuple[int, str]]:
    """Mode and digest of every file, mode of every directory, by path."""
    found = {}
    for path in tree.rglob("*"):
        digest = ""
        if path.is_symlink():
            digest = str(path.readlink())
        elif path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        found[str(path.relative_to(tree))] = (path.lstat().st_mode, digest)
    return found

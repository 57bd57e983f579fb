"""What the lock of a device's name and an arena in a file both ask of a path."""

import os
from pathlib import Path


def stands_at(path: Path, descriptor: int) -> bool:
    """Whether the file that the descriptor is open on is found there, and not removed or
    replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False

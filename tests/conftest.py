"""Fixtures and the one rule about prerequisites: a user's machine skips, CI fails."""

import os
import shutil
from pathlib import Path

import pytest

from tests import places


class require:
    """Say what a test needs. Missing: skipped with its reason, but failed where CI=true."""

    @staticmethod
    def that(fact: bool, reason: str) -> None:
        if fact:
            return
        if os.environ.get("CI") == "true":
            pytest.fail(f"prerequisite missing in CI: {reason}", pytrace=False)
        pytest.skip(reason)

    @staticmethod
    def program(name: str) -> str:
        found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
        require.that(found is not None, f"{name} is not installed")
        return str(found)

    @staticmethod
    def root() -> None:
        require.that(os.geteuid() == 0, "needs root")

    @staticmethod
    def path(path: str) -> Path:
        require.that(Path(path).exists(), f"{path} is not there")
        return Path(path)


@pytest.fixture(scope="session", autouse=True)
def _swept() -> None:
    places.sweep()


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Those of tests/nbd/pki.py."""
    from tests.nbd import pki  # which needs `require`

    return pki.make(tmp_path_factory.mktemp("pki"))

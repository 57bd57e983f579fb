"""A real systemd to try units in: a small Debian, made once per machine, booted in user-mode Linux.

    boot(files, limit_s=240) -> str     # the console

The root file system is an image that mmdebstrap makes with this machine's own package sources
(half a minute, 350 MB; it needs root), kept in the user's cache directory under a name that depends
on what it is made of. No boot writes to it: what a guest writes goes to a copy-on-write file that
is removed with the guest.

A guest gets what it needs from directories of the host, read-only: this checkout as /opt/zramd with
its Python packages, so /usr/bin/python3 has to be the same on both sides, which one release sees
to; and a directory of the caller's as /mnt.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Final

from tests.conftest import require
from tests.kernel import uml
from tests.kernel.servers import ROOT

PROGRAM: Final = "/usr/local/bin/zramd"
"""zramd in the guest."""

_PACKAGES: Final = (
    *("systemd", "systemd-sysv", "udev", "kmod", "util-linux", "mount", "e2fsprogs"),
    "python3",
)
_SOURCES: Final = (
    "/etc/apt/sources.list",
    "/etc/apt/sources.list.d/debian.sources",
    "/etc/apt/sources.list.d/ubuntu.sources",
)

_INIT: Final = f"""#!/bin/sh
# The first program of the guest: gets the host's directories, has them prepare it, runs systemd.
set -e
mount -t proc proc /proc
mkdir -p /opt/zramd /usr/lib/modules
mount -t hostfs -o "ro,$checkout" none /opt/zramd
mount -t hostfs -o "ro,$modules" none /usr/lib/modules
mount -t hostfs -o "ro,$files" none /mnt
cat >{PROGRAM} <<'END'
#!/bin/sh
PYTHONPATH=/opt/zramd PYTHONDONTWRITEBYTECODE=1 exec /opt/zramd/.venv/bin/python -m zramd.cli "$@"
END
chmod 755 {PROGRAM}
sh -e /mnt/prepare
exec /sbin/init
"""
_UNWANTED: Final = (
    *("apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "fstrim.timer"),
    *("e2scrub_all.timer", "e2scrub_reap.service", "getty-static.service", "getty@tty1.service"),
)
"""What the guest need not start; some of it fails when it is stopped soon after."""


def boot(files: Path, *, limit_s: float) -> str:
    """Boot; `files`/prepare is run by sh before systemd is, with `files` as /mnt. The console.

    Everything that the journal gets is on the console, after its time in seconds since boot.
    """
    base = _image()
    with uml.guest_place() as place:
        return uml.boot(
            place,
            *(f"ubd0={place}/written,{base}", "root=/dev/ubda", "rw", "init=/zramd-test-init"),
            *(f"checkout={ROOT}", f"modules={uml.MODULES}", f"files={files}"),
            *("quiet", "loglevel=5", "printk.time=1", "systemd.journald.forward_to_console=1"),
            limit_s=limit_s,
        )


def _image() -> Path:
    """The root file system, made if this machine has none."""
    uml.program()
    sources = [source for source in _SOURCES if Path(source).exists()]
    key = hashlib.sha256(repr((_PACKAGES, _INIT, _UNWANTED)).encode())
    for source in sources:
        key.update(Path(source).read_bytes())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "zramd-tests"
    image = cache / f"root-{key.hexdigest()[:16]}.img"
    if image.exists():
        return image
    require.root()
    mmdebstrap, mkfs = require.program("mmdebstrap"), require.program("mkfs.ext4")
    require.that(bool(sources), "no package sources of Debian or Ubuntu in /etc/apt")
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / "lock", "w") as lock, tempfile.TemporaryDirectory() as temporary:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if image.exists():  # another run has just made it
            return image
        for old in cache.glob("root-*"):
            old.unlink()
        root, new = Path(temporary, "root"), image.with_suffix(".new")
        include = f"--include={','.join(_PACKAGES)}"
        _run(mmdebstrap, "--quiet", "--variant=minbase", include, "", os.fspath(root), *sources)
        (root / "zramd-test-init").write_text(_INIT)
        (root / "zramd-test-init").chmod(0o755)
        for unit in _UNWANTED:
            (root / "etc/systemd/system" / unit).symlink_to("/dev/null")
        with open(new, "wb") as file:
            file.truncate(2 << 30)
        _run(mkfs, "-q", "-d", os.fspath(root), os.fspath(new))
        shutil.rmtree(root)
        new.rename(image)
    return image


def _run(*argv: str) -> None:
    done = subprocess.run(
        argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    require.that(done.returncode == 0, f"{Path(argv[0]).name} failed: {done.stderr[-2000:]}")

"""What test_vsock.py runs in a guest: a server that listens on vsock, and clients of it."""

import subprocess
import sys
from pathlib import Path

from tests.nbd.harness import DEADLINE_S, RawClient
from zramd.nbd.address import VsockAddress

MODULES = Path(f"/usr/lib/uml/modules/{Path('/proc/sys/kernel/osrelease').read_text().strip()}")
PORTS = 10809, 10810


def main() -> None:
    for module in ("vsock", "vmw_vsock_virtio_transport_common", "vsock_loopback"):
        path = MODULES / f"kernel/net/vmw_vsock/{module}.ko"
        subprocess.run(["insmod", path], check=True)
    zramd = [sys.executable, "-m", "zramd.cli"]
    listen = [f"--listen=vsock:local:{PORTS[0]}", f"--listen=vsock:any:{PORTS[1]}"]
    server = subprocess.Popen(
        [*zramd, "serve", "v0", "--disksize=16M", *listen], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    line = server.stderr.readline()
    assert line.endswith(", vsock:local:10809, vsock:any:10810\n"), line
    for port in PORTS:
        with RawClient(VsockAddress(1, port), "v0") as client:
            client.write(port, b"over vsock" * 1000)
            assert client.read(port, 10_000) == b"over vsock" * 1000
            said = subprocess.run(
                [*zramd, "reset", "v0"], stderr=subprocess.PIPE, text=True, check=False
            ).stderr
            assert "nbd connection from vsock:local:" in said, said
        uri = VsockAddress(1, port).uri("v0")
        size = subprocess.run(["nbdinfo", "--size", uri], stdout=subprocess.PIPE, check=True).stdout
        assert size == b"16777216\n", size
    server.terminate()
    assert server.wait(DEADLINE_S) == 0
    print("served over vsock")


if __name__ == "__main__":
    main()

"""python -m tests.fuzz.record: what real clients say, as seeds in tests/fuzz/seeds/nbd.

Each client talks through a proxy to a server of 1 MiB. What it sends is kept, of long payloads as
much as the fuzzer's limits leave: a seed is a few KiB. Not part of any test; run it again where a
new client or a new option is worth a seed. The seeds unread and tls-unread-* are no records: a
client that reads little of its answers, or none, and then ends or is ended.
"""

import socket
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.fuzz import peer
from tests.fuzz.mutate import SIZE, pack, pieces
from tests.fuzz.nbd import EARLY, STARTTLS, TLS_OPTIONAL, TLS_REQUIRED
from tests.nbd.harness import RunningServer
from zramd.device import Zram
from zramd.nbd.address import UnixAddress

SEEDS = Path(__file__).parent / "seeds" / "nbd"
MOST = 4 << 10
MOST_PIECE = 300

CLIENTS = {
    "nbdinfo": "nbdinfo {uri}",
    "nbdinfo-map": "nbdinfo --map {uri}",
    "nbdinfo-list": "nbdinfo --list {uri}",
    "nbdinfo-can": "nbdinfo --can multi-conn {uri}",
    "nbdcopy-to": "nbdcopy {file} {uri}",
    "nbdcopy-from": "nbdcopy {uri} {other}",
    "qemu-img-map": "qemu-img map --output=json {uri}",
    "qemu-img-to": "qemu-img convert -n -f raw -O raw {file} {uri}",
    "qemu-img-from": "qemu-img convert -f raw -O raw {uri} {other}",
    "qemu-io": "qemu-io -f raw {uri} -c 'write -P 7 4k 9k' -c 'write -z 0 64k' -c 'discard 8k 64k'"
    " -c 'read -P 0 0 4k' -c 'write -f -P 3 100k 1k' -c flush -c 'aio_read 0 64k' -c aio_flush",
    "nbd-client-list": "nbd-client -l -unix {socket}",
    "fio": "fio --name=x --ioengine=nbd --uri={uri} --rw=randrw --bs=512-12k --size=256k"
    " --iodepth=8 --randseed=1",
    "nbdsh": 'PATH=/usr/bin nbdsh -c "h.set_strict_mode(0)" -c "h.connect_uri(\'{uri}\')"'
    ' -c "h.pread(4096, 0)"'
    ' -c "h.zero(5000, 100, nbd.CMD_FLAG_NO_HOLE)" -c "h.trim(9000, 0)"'
    ' -c "h.pwrite(bytes(range(200)), 50, nbd.CMD_FLAG_FUA)" -c "h.flush()"',
}

IN_TLS = {"nbdinfo-map": 0, "nbdsh": EARLY, "qemu-io": TLS_OPTIONAL}
"""Those whose seeds are there with TLS too, and how."""


def main() -> None:
    SEEDS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file, other = folder / "file", folder / "other"
        file.write_bytes(b"seed" * 1024 + bytes(SIZE // 2) + b"x" * (SIZE // 2 - 4096))
        zram = Zram("zram0")
        zram.init(SIZE)
        running = RunningServer(zram)
        running.listen(UnixAddress(folder / "server"))
        for client, command in CLIENTS.items():
            with recorded(folder / "proxy", folder / "server") as streams:
                socket_path = folder / "proxy"
                uri = f"nbd+unix:///zram0?socket={socket_path}"
                words = command.format(uri=uri, socket=socket_path, file=file, other=other)
                done = subprocess.run(words, shell=True, capture_output=True, timeout=60)
            print(f"{client}: {done.returncode}, {[len(s) for s in streams]} bytes, {done.stderr}")
            longest = max(streams, key=len, default=bytearray())
            (SEEDS / client).write_bytes(b"\0" + cut(bytes(longest)))
        running.close()
        zram.close()
    for client, way in IN_TLS.items():
        stream = (SEEDS / client).read_bytes()[1:]
        (SEEDS / f"tls-{client}").write_bytes(in_tls(stream, way))


def cut(stream: bytes) -> bytes:
    """Its messages, a WRITE with as little payload as it then says, up to MOST bytes."""
    kept = b""
    for piece in pieces(stream):
        head = 28 if piece.startswith(peer.REQUEST_MAGIC) else 32
        if piece.startswith((peer.REQUEST_MAGIC, peer.LONG_REQUEST_MAGIC)) and len(piece) > head:
            piece = piece[: head + MOST_PIECE]
            size = head - (4 if head == 28 else 8)
            piece = piece[:size] + (len(piece) - head).to_bytes(head - size, "big") + piece[head:]
        if len(kept) + len(piece) <= MOST:
            kept += piece
    return kept


def in_tls(stream: bytes, way: int) -> bytes:
    """What the client would say there; where TLS is `TLS_OPTIONAL`, in vain before that, too."""
    flags, *rest = pieces(stream)
    before = [piece for piece in rest if piece.startswith(peer.IHAVEOPT)][:-1]
    said = [flags, *(before if way & TLS_OPTIONAL else ()), STARTTLS, *rest]
    return pack(bytes((way | 14, 0)), b"".join(said), TLS_REQUIRED)


@contextmanager
def recorded(path: Path, server: Path) -> Iterator[list[bytearray]]:
    """A proxy; what the clients said, one stream a connection."""
    streams: list[bytearray] = []
    threads: list[threading.Thread] = []

    def pump(source: socket.socket, sink: socket.socket, record: bytearray | None) -> None:
        try:
            while data := source.recv(1 << 16):
                if record is not None:
                    record += data
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def accept() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            behind = socket.socket(socket.AF_UNIX)
            behind.connect(str(server))
            streams.append(bytearray())
            for one in ((client, behind, streams[-1]), (behind, client, None)):
                threads.append(threading.Thread(target=pump, args=one))
                threads[-1].start()

    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        accepting = threading.Thread(target=accept)
        accepting.start()
        yield streams
        listener.shutdown(socket.SHUT_RDWR)
    accepting.join()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()

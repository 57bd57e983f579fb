"""A device in a file of the user's, and its snapshots, as the device sees them."""

import os
import threading

import pytest

from tests.nbd.harness import wait_for
from tests.store.contents import noise
from zramd.device import Zram
from zramd.errors import BadValue, DeviceBusy, NotInitialised
from zramd.store import PAGE

MIB = 1 << 20


@pytest.fixture
def path(tmp_path):
    return tmp_path / "arena"


def write(device: Zram, content: bytes) -> None:
    opener = device.open("a test")
    opener.write(0, content)
    opener.close()


def read(device: Zram) -> bytes:
    opener = device.open("a test")
    try:
        return opener.read(0, PAGE)
    finally:
        opener.close()


def test_a_reset_removes_the_file_and_an_init_makes_it_anew(path):
    device = Zram("zram0", path)
    assert device.load() is None
    device.init(MIB)
    write(device, noise(1))
    first = path.stat().st_ino
    held = path.open("rb")  # so that its number does not come again
    device.reset()
    assert not path.exists()
    device.init(MIB)
    assert path.stat().st_ino != first
    assert read(device) == bytes(PAGE)
    held.close()
    device.reset()


def test_a_close_keeps_the_file_for_another_device(path):
    device = Zram("zram0", path)
    device.init(MIB)
    write(device, noise(1))
    told = []
    device.on_arena = told.append
    device.close()
    assert told == [None]
    with pytest.raises(BadValue, match="exists already"):
        device.init(MIB)
    other = Zram("zram1", path)
    other.on_arena = told.append
    assert other.load() == []
    assert len(told) == 2
    assert read(other) == noise(1)
    with pytest.raises(DeviceBusy, match="initialised already"):
        other.load()
    other.reset()


def test_who_takes_over_from_a_process_that_died_goes_on_in_the_file(path):
    """As a worker does, with the descriptor that its supervisor holds, and the lock with it."""
    kept = []
    device = Zram("zram0", path)
    device.on_arena = lambda fd: kept.append(os.dup(fd)) if fd is not None else None
    device.init(MIB)
    write(device, noise(1))
    device._meta.arena.close(keep=True)  # what a death leaves
    with pytest.raises(DeviceBusy):
        Zram("zram1", path).load()
    successor = Zram("zram0", path)
    assert successor.adopt(kept.pop()) == []
    assert read(successor) == noise(1)
    successor.close()
    assert path.stat().st_size > 0
    successor.load()
    successor.reset()
    assert not path.exists()


def test_a_snapshot_is_not_restored_over_pages_and_not_saved_of_none():
    device = Zram("zram0")
    file = os.memfd_create("snapshot")
    with pytest.raises(BadValue, match="nothing to save"):
        device.save(file)
    device.init(MIB)
    write(device, noise(1))
    device.save(file)
    with pytest.raises(DeviceBusy, match="initialised already"):
        device.restore(file)
    device.reset()
    assert device.restore(file) == []
    assert read(device) == noise(1)
    device.reset()
    os.close(file)


def test_a_forced_reset_ends_a_save_and_waits_for_no_other(path):
    """At its next checkpoint; and then the device is as new."""
    device = Zram("zram0", path)
    device.init(MIB)
    write(device, noise(1))
    meta, go, reached, raised = device._meta, threading.Event(), threading.Event(), []
    checkpoint = meta.checkpoint

    def wait() -> None:
        reached.set()
        go.wait()
        checkpoint()

    def save() -> None:
        file = os.memfd_create("snapshot")
        try:
            device.save(file)
        except BaseException as error:
            raised.append(error)
        os.close(file)

    meta.checkpoint = wait
    saving = threading.Thread(target=save)
    saving.start()
    reached.wait()
    assert device.statistics().in_flight == ("save",)
    resetting = threading.Thread(target=device.reset, kwargs={"force": True})
    resetting.start()
    wait_for(lambda: not device._gate.init_done)
    go.set()
    saving.join()
    resetting.join()
    assert isinstance(raised[0], NotInitialised)
    assert (device.disksize, path.exists()) == (0, False)
    device.init(MIB)
    file = os.memfd_create("snapshot")
    device.save(file)
    os.close(file)
    device.reset()

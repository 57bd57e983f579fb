"""An nbdkit plugin whose callbacks do nothing: what nbdkit and Python take of each request.

    nbdkit python ./idle_plugin.py size=1048576 [keep=1]

Its thread model and its answers about what it can do are those of nbd_plugin.py. Like most plugins
it lets nbdkit drop the Python state of its thread after each call; with `keep` it keeps it, as
nbd_plugin.py does.
"""

import ctypes

import nbdkit

API_VERSION = 2

_size = 0
_keeps = False


def config(key, value):
    global _size, _keeps
    if key == "size":
        _size = int(value)
    else:
        assert key == "keep"
        _keeps = value == "1"


def thread_model():
    return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS


def open(readonly):
    if _keeps:
        ctypes.pythonapi.PyGILState_Ensure()
    return 1


def close(handle):
    if _keeps:
        ctypes.pythonapi.PyGILState_Release(0)


def get_size(handle):
    return _size


def can_multi_conn(handle):
    return True


def can_fua(handle):
    return nbdkit.FUA_NATIVE


def block_size(handle):
    return 1, 4096, 32 << 20


def pread(handle, buffer, offset, flags):
    pass


def pwrite(handle, buffer, offset, flags):
    pass


def flush(handle, flags):
    pass


def trim(handle, count, offset, flags):
    pass


def zero(handle, count, offset, flags):
    pass

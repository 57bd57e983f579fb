"""What is kept of the heap is not asked for again, and what is not kept goes back."""

import subprocess
import sys

import pytest

_MEASURE = """
import resource, sys
from zramd import heap

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def work():
    buffers = [bytes(200_000 + n) for n in range(10)]
    objects = [str(n) * 40 for n in range(20_000)]

heap.use_one_arena()
if sys.argv[1] == "kept":
    heap.keep(16 << 20)
before = faults()
work()
first = faults() - before
for _ in range(20):
    work()
print(first, (faults() - before - first) / 20)
"""


@pytest.mark.parametrize("kept", [True, False])
def test_what_is_kept_is_not_asked_for_again(kept):
    command = [sys.executable, "-c", _MEASURE, "kept" if kept else "not"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    first, later = map(float, said.split())
    print(said)
    if kept:
        assert first < 200, "it was not there at once"
        assert later < 2
    else:
        assert first > 500, "this work needs none"
        assert later > 100, "this work leaves nothing to give back"

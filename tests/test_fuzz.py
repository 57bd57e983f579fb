"""What the fuzzers of tests/fuzz have found and begun with, again, and a few thousand inputs more.

Without atheris, and the same in every run. `scripts/fuzz` is the real thing.
"""

import importlib
import random
from pathlib import Path

import pytest

from tests.fuzz import nbd, peer
from tests.fuzz.mutate import Mutator, go, option, pack, request

HERE = Path(__file__).parent / "fuzz"
TARGETS = ("nbd",)
MUTATIONS = 3000


@pytest.fixture(scope="module", params=TARGETS)
def target(request):
    module = importlib.import_module(f"tests.fuzz.{request.param}")
    with module.small():
        world = module.World()
        yield request.param, world
        world.close()


@pytest.fixture(scope="module")
def world():
    with nbd.small():
        world = nbd.World()
        yield world
        world.close()


def inputs(name: str) -> list[bytes]:
    folders = (HERE / kind / name for kind in ("seeds", "cases"))
    return [path.read_bytes() for folder in folders for path in sorted(folder.glob("*"))]


def test_seeds_and_findings(target):
    name, world = target
    assert inputs(name)
    for data in inputs(name):
        world.run(data)


def test_mutations_of_them(target):
    name, world = target
    rng = random.Random(name)
    mutator = Mutator(rng)
    corpus = inputs(name)
    for number in range(MUTATIONS):
        data = mutator.mutate(rng.choice(corpus))
        if number % 4 == 0:
            data = mutator.conversation()
        if number % 10 == 0:
            corpus.append(data)
        try:
            world.run(data)
        except BaseException as error:
            error.add_note(f"the input, for tests/fuzz/cases/{name}: {data.hex()}")
            raise


# What the inputs reach: a fuzzer that stops at the first magic number finds nothing.

HELLO = b"\0\0\0\3" + option(peer.GO, go())


def test_the_seeds_come_to_the_transmission(world):
    outcomes = [world.run(data) for data in inputs("nbd")]
    assert sum(outcome.transmits for outcome in outcomes) > len(outcomes) / 2
    assert sum(outcome.requests for outcome in outcomes) > 40


def test_most_new_conversations_have_requests_that_succeed(world):
    mutator = Mutator(random.Random(1))
    outcomes = [world.run(mutator.conversation()) for _ in range(200)]
    assert sum(outcome.transmits for outcome in outcomes) > 80
    assert sum(outcome.requests - outcome.failed for outcome in outcomes) > 150
    assert sum(outcome.stored for outcome in outcomes) > 50


def test_a_full_device_and_a_peer_that_does_not_read_are_reached(world):
    filled = b"".join(
        request(peer.WRITE, at, 16384, extended=False) + random.Random(at).randbytes(16384)
        for at in range(0, 1 << 19, 16384)
    )
    outcome = world.run(pack(b"\x07\x00", HELLO + filled))
    assert outcome.failed > 0
    reads = request(peer.READ, 0, 65536, extended=False) * 40
    assert world.run(pack(b"\x07\x00\x03\x00", HELLO + reads)).got > 40 * 65536

"""python -m tests.fuzz.explore TARGET SECONDS [-runs=N] [FOLDER]: atheris on one of the targets.

    nbd      the server's side of a connection: tests/fuzz/nbd.py
    client   zramd.nbd.client against a hostile server: tests/fuzz/client.py

Begins with tests/fuzz/seeds/TARGET and tests/fuzz/cases/TARGET, keeps what reaches new code in
FOLDER (.cache/fuzz/TARGET), and ends at the first finding, with status 77 and the input in a file
`crash-...` there, to be put into tests/fuzz/cases/TARGET once it is understood.

`scripts/fuzz` runs this in a virtual environment that has atheris.
"""

import importlib
import random
import sys
import time
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["zramd.nbd", "zramd.opener"]):
    import zramd.nbd.client
    import zramd.nbd.connection
    import zramd.nbd.server  # noqa: F401 - loaded so that they are instrumented

from tests.fuzz.mutate import DICTIONARY, Mutator

HERE = Path(__file__).parent
MOST = 24 << 10


def main() -> None:
    target, seconds, *more = sys.argv[1:]
    flags = [argument for argument in more if argument.startswith("-")]
    folders = [argument for argument in more if not argument.startswith("-")]
    folder = Path(folders[0] if folders else HERE.parents[1] / ".cache" / "fuzz" / target)
    folder.mkdir(parents=True, exist_ok=True)
    words = folder.parent / f"{target}.dictionary"
    words.write_text("".join(f'"{escaped(word)}"\n' for word in DICTIONARY))
    module = importlib.import_module(f"tests.fuzz.{target}")
    seeds = [HERE / kind / target for kind in ("seeds", "cases") if (HERE / kind / target).exists()]

    with module.small():
        world = module.World()
        started = time.monotonic()

        def one(data: bytes) -> None:
            world.run(data)
            if world.executions % 10000 == 0:
                speed = world.executions / (time.monotonic() - started)
                print(f"{target}: {world.executions} executions, {speed:.0f}/s", file=sys.stderr)

        def mutated(data: bytes, most: int, seed: int) -> bytes:
            rng = random.Random(seed)
            if target != "nbd" or rng.random() < 0.2:
                return bytes(atheris.Mutate(data, most))
            mutator = Mutator(rng)
            if rng.random() < 0.02:
                return mutator.conversation()[:most]
            return mutator.mutate(data)[:most]

        arguments = [
            *("fuzz", f"-max_total_time={seconds}", f"-max_len={MOST}", f"-dict={words}"),
            *(f"-artifact_prefix={folder}/", "-timeout=20", "-rss_limit_mb=1024", "-len_control=0"),
            *("-print_final_stats=1", "-verbosity=0", *flags, str(folder), *map(str, seeds)),
        ]
        atheris.Setup(arguments, one, custom_mutator=mutated)
        atheris.Fuzz()


def escaped(word: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in word)


if __name__ == "__main__":
    main()

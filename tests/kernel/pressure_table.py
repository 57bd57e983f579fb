"""What scripts/pressure prints: what each server did in guests that are short of memory."""

import sys
from dataclasses import replace

from tests.kernel.pressure_guests import FULL, QUARTER_MORE, TWICE, Guest, result_of
from tests.kernel.servers import SERVERS
from tests.kernel.under_pressure import PEERS, Result

_LIMIT_S = 900
_PASSES = 3
_HEADINGS = ("guest", "touched", "swap on", "came to its end", "MiB/s, phase by phase", "killed")


def main() -> None:
    wanted = [int(word) for word in sys.argv[1:]] or [256, 512]
    print("|".join(("", *_HEADINGS, "")))
    print("|---" * len(_HEADINGS) + "|")
    for guest in (replace(QUARTER_MORE, passes=_PASSES), replace(TWICE, passes=_PASSES), FULL):
        if guest.ram in wanted:
            for server in SERVERS if guest is FULL else (*SERVERS, *PEERS):
                print("|".join(("", *_row(guest, server), "")), flush=True)


def _row(guest: Guest, server: str) -> tuple[str, ...]:
    where = (f"{guest.ram} MiB", f"{guest.touched} MiB", f"{server}, {guest.disksize} MiB")
    finished = guest.run(server, _LIMIT_S)
    try:
        result = result_of(finished)
    except AssertionError:
        said = [line for line in finished.output.splitlines() if line.startswith("[")]
        how = "hung" if finished.status is None else "failed"
        return (*where, how, f"last: {said[-1] if said else 'nothing'}", "")
    return (*where, _end(result), _speeds(result), str(result.killed))


def _end(result: Result) -> str:
    if result.program == 0:
        return "yes, all data right"
    return f"no ({result.program}); the guest lives" if result.killed else f"no ({result.program})"


def _speeds(result: Result) -> str:
    return ", ".join(f"{phase} {speed:.1f}" for phase, speed in result.mib_per_s.items())


if __name__ == "__main__":
    main()

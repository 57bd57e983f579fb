"""Measures zramd and what people would use instead, on real data, side by side on this machine.

Shared machines are noisy, so nothing is quoted alone: in each round every peer has its turn with
the same work, what is compared is compared within a round, and the report shows medians with the
least and the most. What fails is reported as failed, and the rest goes on. Ctrl-C ends it, with a
report of what there is; nothing is left of it, however it ends.
"""

import argparse
import importlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scripts.benches import (
    connections,
    corpus,
    inside,
    machine,
    peers,
    report,
    served,
    sweep,
    targets,
)
from scripts.benches.workloads import Scale, Workload, plan

MIB = 1 << 20

PARTS = {
    "store": inside.measure_store,
    "overhead": inside.measure_overhead,
    "reset": inside.measure_reset,
    "recovery": inside.measure_recovery,
    "saving": inside.measure_saving,
    "pauses": served.measure_pauses,
    "idle": served.measure_idle,
    "connections": connections.measure_connections,
}


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    mib: int
    """Of the corpus that peers are filled with."""
    rounds: int
    """Twice as many of what is measured beside other work, and of commands."""
    seconds: float
    """Of each fio job."""
    parts: tuple[int, float, int]
    """Rounds, seconds and MiB of the rows of zramd's parts."""


_SHARES = 24
"""Into which the free RAM is divided: each peer gets one, and a few are left."""

FULL = Size(256, 3, 1.2, (5, 4, 512))
QUICK = Size(32, 1, 0.25, (1, 1, 32))


def main() -> int:
    options = _options()
    size = _size(options)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _interrupt)
    began = time.strftime("%Y-%m-%d %H:%M", time.gmtime()) + " UTC"
    started = time.monotonic()
    with sweep.workplace() as work:
        run = Run(work, size, options.only, quick=options.quick)
        try:
            run.measure()
        except KeyboardInterrupt:
            run.interrupted = True
            say("interrupted")
        told = {
            "began": began,
            "minutes": round((time.monotonic() - started) / 60, 1),
            "rounds": size.rounds,
            "quick": options.quick,
            **run.told(),
        }
    if not run.interrupted and not (run.results.told() or run.parts or run.failed_parts):
        say(f"--only {options.only.pattern!r} names no row; a run of --quick names them all")
        return 2
    pictures = []
    if options.charts:
        from scripts.benches import charts  # which needs a library that nothing else does

        beside = options.markdown.parent if options.markdown else Path()
        pictures = [
            f"![{title}]({os.path.relpath(file, beside)})"
            for title, file in charts.draw(run.results, options.charts)
        ]
    judged = [target.judged(run.results) for target in targets.TARGETS]
    text = report.markdown(told, run.results, targets.table(judged), pictures)
    if options.json:
        whole = told | {"targets": judged, "rows": run.results.told()}
        options.json.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    if options.markdown:
        options.markdown.write_text(text)
    print(text, end="")
    return 130 if run.interrupted else 0


def _options() -> argparse.Namespace:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="scripts/bench", description=lines[0])
    parser.add_argument("--quick", action="store_true", help="each kind once, in two minutes")
    parser.add_argument(
        "--only",
        type=_regex,
        default=re.compile(""),
        metavar="REGEX",
        help="only rows that this is found in, as `MEASURE: PEER` or `part: NAME`",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all rounds to this file")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the report to this")
    parser.add_argument("--charts", type=Path, metavar="DIR", help="write SVG charts to it")
    parser.add_argument(
        "--rounds", type=_count, help="how many of each row (else 3, and 5 of zramd's own parts)"
    )
    # For the test of this: sizes at which figures mean nothing.
    parser.add_argument("--mib", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    # What cannot be written is said now, and not when all has been measured.
    try:
        for path in (options.json, options.markdown):
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.open("a").close()
        if options.charts:
            options.charts.mkdir(parents=True, exist_ok=True)
            importlib.import_module("scripts.benches.charts")  # which needs a library of its own
    except OSError as error:
        parser.error(f"{error.filename} cannot be written: {error.strerror}")
    except ImportError as error:
        parser.error(f"no charts without {error.name}: pip install 'zramd[bench]'")
    return options


def _regex(text: str) -> "re.Pattern[str]":
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from error


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 on")
    return int(text)


def _size(options: argparse.Namespace) -> Size:
    size = QUICK if options.quick else FULL
    rounds, seconds, mib = size.parts
    filled = min(options.mib or size.mib, machine.available() // MIB // _SHARES)
    if options.mib:
        mib = min(mib, options.mib)
    return Size(
        max(1, filled),
        options.rounds or size.rounds,
        options.seconds or size.seconds,
        (options.rounds or rounds, seconds, mib),
    )


_told_to_end: list[int] = []
"""The signals that have come. What one raises may be lost to what clearing up raises."""


def _interrupt(number: int, _frame: object) -> None:
    _told_to_end.append(number)
    raise KeyboardInterrupt


def say(what: str) -> None:
    print(f"bench: {what}", file=sys.stderr, flush=True)


@dataclass
class Run:
    """One run: its data, its peers, and what it has found so far."""

    work: Path
    size: Size
    only: "re.Pattern[str]"
    quick: bool
    interrupted: bool = False
    results: report.Results = field(default_factory=report.Results)
    parts: dict[str, Any] = field(default_factory=dict)
    failed_parts: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    mix: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.noise = machine.Noise()

    def measure(self) -> None:
        say(f"reading a corpus; {machine.pinning()}")
        mib = max(self.size.mib, self.size.parts[2])
        data, shares = corpus.make_corpus(mib * MIB)
        left = corpus.compressed_share(data)
        self.mix = {
            "MiB": f"{self.size.mib} for peers, {self.size.parts[2]} for parts",
            **{f"{kind}, %": share for kind, share in shares.items()},
            "what lz4 leaves of a page, %": round(100 * left, 1),
        }
        image = self.work / "corpus"
        image.write_bytes(data[: self.size.mib * MIB])
        percent = max(0, min(100, round(100 * (1 - left))))
        everyone = self._peers(image)
        try:
            for group, times in plan(self.quick):
                self._alternate(group, everyone, times, Scale(self.size.seconds, percent))
        finally:
            for peer in everyone:
                _end(peer)
        for name, measure in PARTS.items():
            if self.only.search(f"part: {name}"):
                self._measure_part(name, measure, data[: self.size.parts[2] * MIB])

    def _peers(self, image: Path) -> list[peers.Peer]:
        found = []
        for peer in peers.all_peers(self.work, image):
            if self.quick and not peer.quick:
                self.left_out[peer.name] = "this is a quick run"
            elif why := peer.missing():
                self.left_out[peer.name] = why
            else:
                found.append(peer)
        return found

    def _alternate(
        self, group: list[Workload], everyone: list[peers.Peer], times: int, scale: Scale
    ) -> None:
        """All rounds of some workloads; what is added for the targets is for their peers only."""
        for number in range(self.size.rounds * times):
            turns = [
                (workload, peer)
                for peer in everyone
                if number < self.size.rounds or peer.quick
                for workload in group
                if workload.fits(peer) and self.only.search(f"{workload.measure}: {peer.name}")
            ]
            if turns:
                self.noise.sample()
                also = f", and {len(group) - 1} more" if len(group) > 1 else ""
                say(f"{group[0].measure}{also}: round {number + 1}")
            for workload, peer in turns:
                self._once(workload, peer, scale)

    def _once(self, workload: Workload, peer: peers.Peer, scale: Scale) -> None:
        failed = ""
        figures: dict[str, float] = {}
        try:
            peer.ready(workload.needs)
            figures = workload.run(peer, scale)
        except Exception as error:
            failed = machine.last_line(str(error)) or repr(error)
            say(f"{workload.measure}: {peer.name}: failed: {failed}")
            _end(peer)  # the next finds a new one
        if _told_to_end:
            raise KeyboardInterrupt
        self.results.add(workload.measure, peer.name, figures, failed)

    def _measure_part(self, name: str, measure: Callable[..., Any], data: bytes) -> None:
        rounds, seconds, _ = self.size.parts
        say(f"part: {name}")
        try:
            for row, target, ratios in measure(data, rounds, seconds):
                self.parts[row] = {"target": target, "ratios": ratios}
        except (Exception, SystemExit) as error:
            if _told_to_end:
                raise KeyboardInterrupt from None
            self.failed_parts[name] = machine.last_line(str(error)) or repr(error)
            say(f"part: {name}: failed: {self.failed_parts[name]}")

    def told(self) -> dict[str, Any]:
        return {
            "interrupted": self.interrupted,
            "machine": machine.told(),
            "noise": self.noise.told(),
            "corpus": self.mix,
            "left out": self.left_out,
            "parts": self.parts,
            "failed parts": self.failed_parts,
        }


def _end(peer: peers.Peer) -> None:
    try:
        peer.stop()
    except Exception as error:
        say(f"{peer.name}: {error}")
        peer.kill()


if __name__ == "__main__":
    sys.exit(main())

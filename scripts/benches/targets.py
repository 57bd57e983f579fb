"""The figures to reach, all of them: each compares two figures round by round, as far as both have
one, and wants the median on one side of a bound."""

import operator
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from scripts.benches import report
from scripts.benches import workloads as w
from scripts.benches.report import Results, figure

KIB = 1 << 10
MIB = 1 << 20

Cell = tuple[str, str, str]
"""Measure, peer, and which of its figures."""


@dataclass(frozen=True)
class Target:
    what: str
    against: str
    one: Cell
    other: Cell
    at_least: float | None = None
    at_most: float | None = None
    compare: Callable[[float, float], float] = operator.truediv
    unit: str = ""

    def judged(self, results: Results) -> dict[str, Any]:
        """What was got, round by round."""
        rounds = [
            self.compare(one, other)
            for one, other in zip(results.get(*self.one), results.get(*self.other), strict=False)
            if one is not None and other is not None
        ]
        wanted = self.at_least if self.at_least is not None else self.at_most
        sign = "≥" if self.at_least is not None else "≤"
        told: dict[str, Any] = {
            "of": self.one[1],
            "measure": self.what,
            "against": self.against,
            "wanted": f"{sign} {wanted:g}{self.unit}",
            "rounds": rounds,
            "reached": None,
        }
        if rounds:
            got = statistics.median(rounds)
            reached = got >= wanted if self.at_least is not None else got <= wanted  # type: ignore[operator]
            told |= {"median": got, "min": min(rounds), "max": max(rounds), "reached": reached}
        return told


_LZ4, _ZSTD_1, _PLUGIN = "zramd serve lz4", "zramd serve zstd(level=1)", "nbd_plugin.py lz4"
_MEMORY, _MEMORY_ZSTD = "nbdkit memory", "nbdkit memory zstd"
_IN, _OUT = (w.Bulk(way, 128 * KIB, 1).measure for way in ("in", "out"))
_WEIGHT = w.Weight().measure
_FIXED_MIB = 40


def _random(way: str, depth: int) -> str:
    return w.Random(way, depth, 1).measure


def _versus(measure: str, unit: str, one: str, other: str, **bound: float) -> Target:
    return Target(measure, other, (measure, one, unit), (measure, other, unit), **bound)  # type: ignore[arg-type]


def _added(way: str, depth: int, what: str, baseline: str) -> Target:
    one, other = (f"4 KiB random {way}, {depth} in flight, {how}" for how in (what, baseline))
    return Target(
        what=f"added to the 99th percentile: {one}",
        against=baseline,
        one=(one, _LZ4, w.P99),
        other=(other, _LZ4, w.P99),
        at_most=2,
        compare=lambda a, b: (a - b) / 1000,
        unit=" ms",
    )


TARGETS = [
    _versus(_IN, w.RATE, _LZ4, _MEMORY_ZSTD, at_least=2.5),
    _versus(_IN, w.RATE, _LZ4, "kernel zram lz4", at_least=0.7),
    _versus(_OUT, w.RATE, _LZ4, _MEMORY_ZSTD, at_least=2.0),
    _versus(_IN, w.RATE, _ZSTD_1, _MEMORY_ZSTD, at_least=1.0),
    _versus(_WEIGHT, w.RAM, _ZSTD_1, _MEMORY_ZSTD, at_most=1.2),
    Target(
        what="what the whole server grew by when it was filled",
        against=_MEMORY_ZSTD,
        one=(_WEIGHT, _ZSTD_1, w.PER_BYTE),
        other=(_WEIGHT, _MEMORY_ZSTD, w.PER_BYTE),
        at_most=1.2,
    ),
    _versus(_random("write", 16), w.IOPS, _LZ4, _MEMORY_ZSTD, at_least=4.0),
    _versus(_random("write", 16), w.IOPS, _LZ4, _MEMORY, at_least=1.0),
    _versus(_random("read", 16), w.IOPS, _LZ4, _MEMORY, at_least=1.2),
    _versus(_random("read", 1), w.IOPS, _LZ4, _MEMORY, at_least=1.5),
    _versus(_random("read", 16), w.IOPS, _PLUGIN, "idle Python plugin", at_least=0.6),
    _versus(_random("write", 16), w.IOPS, _PLUGIN, "idle Python plugin", at_least=0.6),
    Target(
        what=f"RAM of the whole server without a fixed {_FIXED_MIB} MiB",
        against="bytes stored compressed",
        one=(_WEIGHT, _LZ4, w.RAM),
        other=(_WEIGHT, _LZ4, w.COMPRESSED),
        at_most=1.08,
        compare=lambda ram, compressed: (ram - _FIXED_MIB) / compressed,
    ),
    Target(
        what=w.LIST.measure,
        against="`python -c pass`",
        one=(w.LIST.measure, _LZ4, w.SECONDS),
        other=(w.PASS.measure, _LZ4, w.SECONDS),
        at_most=8,
    ),
    *(
        _added(way, depth, what, baseline)
        for way in ("read", "write")
        for depth in (1, 16)
        for what, baseline in (
            ("during snapshots", "alone"),
            ("with `zramd list` asking it", "with `zramd list` asking elsewhere"),
            ("during a compaction", "sparse"),
        )
    ),
]


def table(judged: list[dict[str, Any]]) -> list[str]:
    """As Markdown; what has not been measured is said."""
    rows = []
    for told in judged:
        got = [figure(told[key]) if key in told else "" for key in ("median", "min", "max")]
        reached = {True: "yes", False: "**no**", None: "not measured"}[told["reached"]]
        what = (told[key] for key in ("of", "measure", "against", "wanted"))
        rows.append([*what, *got, reached])
    header = ["of", "measure", "against", "wanted", "got (median)", "min", "max", "reached"]
    return report.table(header, rows)

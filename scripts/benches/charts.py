"""Pictures of what was measured, for docs/: SVG files that read on white and on black, and that are
the same for the same figures.

A bar is a median, and the line across its end goes from the least to the most of the rounds. The
axis is as long as the servers need; the bar of a block device of the kernel's may be cut off, and
tells its length.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scripts.benches import workloads as w
from scripts.benches.report import Results, figure

_SHADES = ("#4c84b8", "#e08a3c", "#5f9f62")
_GREY = "#808890"  # reads on both
_BAR = 0.18
_MAY_BE_CUT = ("kernel zram lz4",)

matplotlib.rcParams |= {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "zramd",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 11,
    **{f"{what}.color": _GREY for what in ("text", "xtick", "ytick", "grid")},
    **{f"axes.{what}color": _GREY for what in ("label", "edge", "title")},
}

_Cell = tuple[str, str, str]
"""What it is called, the measure, and which of its figures."""


@dataclass(frozen=True)
class _Chart:
    file: str
    title: str
    cells: Sequence[_Cell]
    scale: float = 1
    stacked: bool = False


def _random(way: str) -> _Chart:
    cells = [(f"{depth} in flight", w.Random(way, depth, 1).measure, w.IOPS) for depth in (1, 16)]
    cells.append(("64 in flight on each of 4", w.Random(way, 64, 4).measure, w.IOPS))
    return _Chart(f"random-{way}", f"4 KiB random {way}s, thousand a second", cells, 1000)


_IN, _OUT = (w.Bulk(way, 128 << 10, 1).measure for way in ("in", "out"))

CHARTS = (
    _Chart(
        "bulk",
        "Bulk, 128 KiB requests on one connection, MiB/s",
        (("in", _IN, w.RATE), ("out", _OUT, w.RATE)),
    ),
    _random("read"),
    _random("write"),
    _Chart(
        "ram",
        "RAM that the server has grown by, of each byte stored",
        (("", w.Weight().measure, w.PER_BYTE),),
    ),
    _Chart(
        "cpu",
        "CPU seconds for a GiB in, 128 KiB requests on one connection",
        (("server", _IN, w.SERVER_CPU), ("client", _IN, w.CLIENT_CPU)),
        stacked=True,
    ),
    _Chart(
        "latency",
        "99th percentile of 4 KiB random reads, 16 in flight, µs",
        (("", w.Random("read", 16, 1).measure, w.P99),),
    ),
)


def draw(results: Results, folder: Path) -> list[tuple[str, Path]]:
    """Write a file of each chart of which anything was measured; their titles and files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for chart in CHARTS:
        cells = [cell for cell in chart.cells if _peers(results, [cell])]
        peers = _peers(results, cells)
        if peers:
            drawn = _drawn(chart, cells, peers, results)
            file = folder / f"{chart.file}.svg"
            drawn.savefig(file, transparent=True, metadata={"Date": None})
            made.append((chart.title, file))
    return made


def _peers(results: Results, cells: Sequence[_Cell]) -> list[str]:
    return [p for p in results.peers if any(_rounds(results, cell, p) for cell in cells)]


def _rounds(results: Results, cell: _Cell, peer: str) -> list[float]:
    _, measure, name = cell
    return [value for value in results.get(measure, peer, name) if value is not None]


def _drawn(chart: _Chart, cells: Sequence[_Cell], peers: list[str], results: Results) -> Figure:
    beside = 1 if chart.stacked else len(cells)
    height = 0.9 + _BAR * len(peers) * (beside + 0.6)
    drawn = Figure(figsize=(8.4, height), layout="constrained")
    axes = drawn.subplots()
    thick = 1 / (beside + 0.6)
    ends = dict.fromkeys(peers, 0.0)
    bars = []
    for number, cell in enumerate(cells):
        aside = 0.0 if chart.stacked else (number - (beside - 1) / 2) * thick
        for row, peer in enumerate(peers):
            found = [value / chart.scale for value in _rounds(results, cell, peer)]
            if not found:
                continue
            middle, start = statistics.median(found), ends[peer]
            low, high = (start + end(found) for end in (min, max))
            label = cell[0] if row == 0 else "_"
            shade = _SHADES[number]
            axes.barh(row + aside, middle, 0.92 * thick, left=start, color=shade, label=label)
            if chart.stacked:
                ends[peer] = start + middle
            elif len(found) > 1:
                axes.plot((low, high), (row + aside,) * 2, color=_GREY, linewidth=1.5, marker="|")
            bars.append((row + aside, start + middle, high, figure(middle), peer))
    limit = 1.1 * max(
        [high for _, _, high, _, peer in bars if peer not in _MAY_BE_CUT]
        or [high for _, _, high, _, _ in bars]
    )
    if chart.stacked:  # the sum, at the end of each
        bars = [(row, ends[p], ends[p], figure(ends[p]), p) for row, p in enumerate(peers)]
    for at, _, high, said, _ in bars:
        cut = high > limit
        place, side = (limit, "right") if cut else (high + limit / 120, "left")
        shade = "white" if cut else _GREY
        said = f"{said} →" if cut else said
        axes.text(place, at, said, ha=side, va="center", fontsize=8, color=shade)
    _dress(axes, chart, peers, limit)
    if len(cells) > 1:
        drawn.legend(loc="outside lower center", ncols=len(cells), frameon=False)
    return drawn


def _dress(axes: Axes, chart: _Chart, peers: list[str], limit: float) -> None:
    axes.set_title(chart.title)
    axes.set_yticks(range(len(peers)), peers)
    axes.set_ylim(len(peers) - 0.5, -0.5)  # the first on top
    axes.set_xlim(0, limit)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)

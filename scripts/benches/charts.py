"""Pictures of what was measured, for docs/: SVG files that read on white and on black, and that are
the same for the same figures.

A bar is a median, and the line across its end goes from the least to the most of the rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pygal
from pygal.style import Style

from scripts.benches import workloads as w
from scripts.benches.report import Results, figure

_SHADES = ("#4878a8", "#e08a3c", "#6aa56a", "#b0629e")
_GREY = "#808890"  # is read on both
_STYLE = Style(
    background="transparent",
    plot_background="transparent",
    foreground=_GREY,
    foreground_strong=_GREY,
    foreground_subtle="#8088904d",
    value_colors=(_GREY,) * len(_SHADES),
    ci_colors=(_GREY,) * len(_SHADES),
    colors=_SHADES,
    opacity="0.9",
    transition="0",
    font_family="sans-serif",
    title_font_size=17,
    legend_font_size=13,
    label_font_size=13,
    major_label_font_size=13,
    value_font_size=11,
)
_ROW = 17
"""Pixels of one bar."""


@dataclass(frozen=True)
class _Chart:
    file: str
    title: str
    series: Sequence[tuple[str, str, str]]
    """Each: its name, the measure and the figure."""
    scale: float = 1
    stacked: bool = False


def _random(way: str) -> _Chart:
    cells = [
        (f"{depth} in flight", w.Random(way, depth, 1).measure, w.IOPS) for depth in (1, 16, 64)
    ]
    return _Chart(f"random-{way}", f"4 KiB random {way}s, thousand a second", cells, 1000)


_SMALL = 128 << 10
_IN, _OUT = (w.Bulk(way, _SMALL, 1).measure for way in ("in", "out"))

CHARTS = (
    _Chart(
        "bulk",
        "Bulk, 128 KiB requests, one connection, MiB/s",
        (("in", _IN, w.RATE), ("out", _OUT, w.RATE)),
    ),
    _random("read"),
    _random("write"),
    _Chart(
        "ram",
        "RAM of the whole server, of each byte stored",
        (("beyond the empty server's", w.Weight().measure, w.PER_BYTE),),
    ),
    _Chart(
        "cpu",
        "CPU seconds for each GiB in, 128 KiB requests, one connection",
        (("server", _IN, w.SERVER_CPU), ("client", _IN, w.CLIENT_CPU)),
        stacked=True,
    ),
    _Chart(
        "latency",
        "99th percentile of 4 KiB random reads, 16 in flight, µs",
        (("", w.Random("read", 16, 1).measure, w.P99),),
    ),
)


def draw(results: Results, folder: Path) -> None:
    """One file of each chart of which anything was measured."""
    folder.mkdir(parents=True, exist_ok=True)
    for chart in CHARTS:
        series = [
            cell
            for cell in chart.series
            if any(results.get(m, p, cell[2]) for m, p in results.rows if m == cell[1])
        ]
        peers = [
            peer
            for peer in results.peers
            if any(results.median(measure, peer, name) for _, measure, name in series)
        ]
        if peers:
            text = _drawn(chart, series, peers, results)
            (folder / f"{chart.file}.svg").write_text(text)


def _drawn(
    chart: _Chart, series: Sequence[tuple[str, str, str]], peers: list[str], results: Results
) -> str:
    kind = pygal.HorizontalStackedBar if chart.stacked else pygal.HorizontalBar
    bars = len(peers) * (1 if chart.stacked else len(series))
    drawn = kind(
        style=_STYLE,
        title=chart.title,
        js=(),
        no_prefix=True,
        disable_xml_declaration=True,
        explicit_size=True,
        width=820,
        height=110 + _ROW * bars + 12 * len(peers),
        show_legend=len(series) > 1,
        legend_at_bottom=True,
        legend_at_bottom_columns=len(series),
        print_values=True,
        print_values_position="top",
        value_formatter=lambda value: "" if value is None else figure(value),
        show_y_guides=True,
        x_labels_major_count=6,
        margin=12,
        spacing=8,
    )
    # Horizontal bars are drawn from the bottom up.
    drawn.x_labels = peers[::-1]
    for title, measure, name in series[:: 1 if chart.stacked else -1]:
        drawn.add(title, [_bar(results, measure, peer, name, chart) for peer in peers[::-1]])
    return str(drawn.render(is_unicode=True)) + "\n"


def _bar(results: Results, measure: str, peer: str, name: str, chart: _Chart) -> object:
    found = [v / chart.scale for v in results.get(measure, peer, name) if v is not None]
    middle = results.median(measure, peer, name)
    if middle is None:
        return None
    bar: dict[str, object] = {"value": middle / chart.scale}
    if len(found) > 1 and not chart.stacked:
        bar["ci"] = {"low": min(found), "high": max(found)}
    return bar

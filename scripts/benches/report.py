"""What was measured, and how it is told: as JSON with every round, and as Markdown with medians."""

import statistics
from collections.abc import Iterable
from typing import Any

from scripts.benches import workloads as w

Rounds = list[float | None]


class Results:
    """Figures by measure, peer and name, one for each round; None for a round that failed."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], dict[str, Rounds]] = {}
        self.failed: dict[tuple[str, str], str] = {}
        self._rounds: dict[tuple[str, str], int] = {}

    def add(self, measure: str, peer: str, figures: w.Figures, failed: str = "") -> None:
        key = (measure, peer)
        row = self.rows.setdefault(key, {})
        number = self._rounds.get(key, 0)
        for name, value in figures.items():
            row.setdefault(name, [None] * number).append(value)
        self._rounds[key] = number + 1
        for values in row.values():
            values += [None] * (number + 1 - len(values))
        if failed:
            self.failed[key] = failed

    def get(self, measure: str, peer: str, name: str) -> Rounds:
        return self.rows.get((measure, peer), {}).get(name, [])

    def median(self, measure: str, peer: str, name: str) -> float | None:
        found = [value for value in self.get(measure, peer, name) if value is not None]
        return statistics.median(found) if found else None

    @property
    def measures(self) -> list[str]:
        return list(dict.fromkeys(measure for measure, _ in self.rows))

    @property
    def peers(self) -> list[str]:
        return list(dict.fromkeys(peer for _, peer in self.rows))

    def told(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [
            {
                "measure": measure,
                "peer": peer,
                "figures": row,
                "failed": self.failed.get((measure, peer), ""),
            }
            for (measure, peer), row in self.rows.items()
        ]


def figure(value: float) -> str:
    """With three digits that count."""
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) >= 10:
        return f"{value:.1f}"
    return f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"


def spread(values: Rounds, scale: float = 1) -> str:
    """Median, and in brackets the least and the most."""
    found = [value / scale for value in values if value is not None]
    if not found:
        return ""
    middle = figure(statistics.median(found))
    if len(found) == 1:
        return middle
    return f"{middle} ({figure(min(found))} to {figure(max(found))})"


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return lines + [f"| {' | '.join(row)} |" for row in rows]


def _by_peer(
    results: Results, measures: list[str], names: dict[str, str], prefix: str, scale: float = 1
) -> list[str]:
    """A row for each peer; a column for each of the measures and each of their figures, by the
    title that stands in `names`."""
    columns = [(m, name, title) for m in measures for name, title in names.items()]
    rows = []
    for peer in results.peers:
        cells = [spread(results.get(m, peer, name), scale) for m, name, _ in columns]
        cells = [
            "failed" if not cell and (m, peer) in results.failed else cell
            for cell, (m, _, _) in zip(cells, columns, strict=True)
        ]
        if any(cells):
            rows.append([peer, *cells])
    titles = [f"{m.removeprefix(prefix)} {title}".strip() for m, _, title in columns]
    return table(["", *titles], rows) if rows else []


def markdown(
    told: dict[str, Any], results: Results, targets: list[str], pictures: list[str]
) -> str:
    """The whole report. `told` is what the JSON holds beside the rows; the rest are lines of it."""
    measures = results.measures

    def those(prefix: str, *, of: list[str] = measures) -> list[str]:
        return [measure for measure in of if measure.startswith(prefix)]

    bulk, read, write = (
        those("bulk "),
        those("4 KiB random read, "),
        those("4 KiB random write, "),
    )
    mixed = [m for m in (*read, *write) if not m.endswith(("connection", "connections"))]
    read, write = ([m for m in of if m not in mixed] for of in (read, write))
    single = [m for m in (*read, *write) if m.endswith("flight, 1 connection")]
    weight = w.Weight().measure
    percentiles = {w.P50: "p50", w.P99: "p99", w.P999: "p99.9"}
    cpu = {w.SERVER_CPU: "server", w.CLIENT_CPU: "client"}
    request_cpu = {w.SERVER_REQUEST: "server", w.CLIENT_REQUEST: "client"}
    weights = {
        w.EMPTY: "empty, MiB",
        w.RAM: "filled, MiB",
        w.PER_BYTE: "grown / bytes stored",
        w.COMPRESSED: "of it compressed pages, MiB",
    }
    mixed_rows = [
        [measure, *(spread(results.get(measure, peer, name)) for name in percentiles)]
        for measure in mixed
        for peer in results.peers
        if (measure, peer) in results.rows
    ]
    sections = {
        "Bulk, MiB/s": _by_peer(results, bulk, {w.RATE: ""}, "bulk "),
        "Bulk, CPU seconds per GiB": _by_peer(
            results, [m for m in bulk if m.endswith(" 1 connection")], cpu, "bulk "
        ),
        "4 KiB random reads, thousand a second": _by_peer(
            results, read, {w.IOPS: ""}, "4 KiB random read, ", 1000
        ),
        "4 KiB random writes, thousand a second": _by_peer(
            results, write, {w.IOPS: ""}, "4 KiB random write, ", 1000
        ),
        "4 KiB, CPU, µs a request": _by_peer(results, single, request_cpu, "4 KiB random "),
        **{
            f"4 KiB random {way}s, latency, µs": _by_peer(
                results, [m for m in single if m in of], percentiles, f"4 KiB random {way}, "
            )
            for way, of in (("read", read), ("write", write))
        },
        "RAM of the whole server": _by_peer(
            results, [weight] if weight in measures else [], weights, weight
        ),
        "Latency beside other work, µs": (
            table(["zramd serve lz4", *percentiles.values()], mixed_rows) if mixed_rows else []
        ),
        "Commands, seconds": _by_peer(results, those("time of "), {w.SECONDS: ""}, "time of "),
        "Parts of zramd": _parts(told["parts"]),
        "Failed": [f"- {measure}, {peer}: {why}" for (measure, peer), why in results.failed.items()]
        + [f"- {group}: {why}" for group, why in told["failed parts"].items()],
        "Left out": [f"- {peer}: {why}" for peer, why in told["left out"].items()],
        "The machine and its noise": _list(told["machine"]) + _list(told["noise"]),
        "The corpus": _list(told["corpus"]),
    }
    body = [_head(told)]
    sections = {"Figures to reach": targets, "Pictures": pictures} | sections
    for title, lines in sections.items():
        if lines:
            body += [f"## {title}", "\n".join(lines)]
    return "\n\n".join(body) + "\n"


def _head(told: dict[str, Any]) -> str:
    trouble = told["noise"]["too loaded to trust"]
    lines = [
        "# zramd and its peers, measured side by side",
        f"{told['began']}, {told['minutes']} minutes, {told['rounds']} rounds or more of each, all"
        " peers in turn in each round. Figures are medians, with the least and the most in"
        f" brackets; {told['machine']['pinned']}.",
    ]
    if told["interrupted"]:
        lines.append("**It was interrupted: these are the rounds until then.**")
    if told["quick"]:
        lines.append("**A quick run: one or few short rounds, good to see that all works.**")
    if trouble:
        lines.append(f"**This machine was too loaded to trust the figures: {'; '.join(trouble)}.**")
    return "\n\n".join(lines)


def _parts(parts: dict[str, dict[str, Any]]) -> list[str]:
    rows = [
        [name, part["target"], *(figure(f(part["ratios"])) for f in (statistics.median, min, max))]
        for name, part in parts.items()
    ]
    return table(["measure", "wanted", "median", "min", "max"], rows) if rows else []


def _list(told: dict[str, Any]) -> list[str]:
    return [f"- {name}: {value}" for name, value in told.items() if value != []]

"""zramd doctor: what on this machine would hurt, and what to do about it."""

import json
import os
from collections import Counter
from typing import Final

import click

from zramd.cli.options import NAME, talk
from zramd.kernel.doctor import CHECKS, Report, Status, examine, look, sick

_COLOURS: Final[dict[Status, str]] = {
    "ok": "green",
    "warning": "yellow",
    "problem": "red",
    "unknown": "cyan",
}
_WIDTH: Final = max(len(check.slug) for check in CHECKS)


@click.command()
@click.argument("name", type=NAME, required=False)
@click.option("--json", "as_json", is_flag=True, help="JSON, with the number of each check.")
def command(name: str | None, as_json: bool) -> None:
    """Tell what on this machine would hurt, and what to do: of the device NAME, or of all.

    A line for each check: ok, warning, problem or unknown; the check; what it found, and the next
    step. What only matters for swap is a problem where there is swap, or is to be, on a device.

    The exit code is 0 without a problem, else the number of the first: docs/doctor.md lists them.
    Nothing is changed.
    """
    reports = examine(look(), name)
    if as_json:
        click.echo(_json(reports))
    else:
        for report in reports:
            click.echo(_line(report), color=None if _may_colour() else False)
    first = sick(reports)
    if first is None:
        return
    count = Counter(report.verdict.status for report in reports)
    talk(
        f"problems: {count['problem']}, warnings: {count['warning']};"
        f" the first problem is {first.check.slug}"
    )
    click.get_current_context().exit(first.check.exit_status)


def _line(report: Report) -> str:
    verdict = report.verdict
    status = click.style(verdict.status.ljust(7), fg=_COLOURS[verdict.status])
    told = f"{verdict.finding}; {verdict.advice}" if verdict.advice else verdict.finding
    return f"{status} {report.check.slug.ljust(_WIDTH)} {' '.join(told.split())}"


def _may_colour() -> bool:
    """On a terminal, that is: click takes colours out of anything else."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def _json(reports: list[Report]) -> str:
    checks = [
        {
            "check": report.check.slug,
            "device": report.device,
            "status": report.verdict.status,
            "exit_status": report.check.exit_status,
            "finding": report.verdict.finding,
            "advice": report.verdict.advice or None,
        }
        for report in reports
    ]
    return json.dumps({"schema": 1, "checks": checks}, indent=2)

"""What a check finds."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

Status: TypeAlias = Literal["ok", "warning", "problem", "unknown"]


@dataclass(frozen=True, slots=True)
class Verdict:
    """`finding` is a sentence that names the culprit; `advice` the next step, or nothing."""

    status: Status
    finding: str
    advice: str = ""


def ok(finding: str) -> Verdict:
    return Verdict("ok", finding)


def warning(finding: str, advice: str) -> Verdict:
    """It costs something, or may come to hurt."""
    return Verdict("warning", finding, advice)


def problem(finding: str, advice: str) -> Verdict:
    """It does not work, or ends in lost data or a machine that hangs."""
    return Verdict("problem", finding, advice)


def unknown(finding: str, advice: str = "") -> Verdict:
    return Verdict("unknown", finding, advice)

"""One line of what the doctor has to say."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Line:
    """`name` is stable, for scripts; `fix` says what to do, over several lines where files must change."""

    name: str
    status: Status
    detail: str
    fix: str = ""


def ok(name: str, detail: str) -> Line:
    """All is well here."""
    return Line(name, "ok", detail)


def warning(name: str, detail: str, fix: str) -> Line:
    """Works, and is not as it should be."""
    return Line(name, "warning", detail, fix)


def error(name: str, detail: str, fix: str) -> Line:
    """Does not work, or is open to strangers."""
    return Line(name, "error", detail, fix)

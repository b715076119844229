"""Lines of the log: one per record, as text or JSON, control characters escaped, known secrets taken out."""

import json
import logging
import re
import sys
import time
from collections.abc import Iterable
from typing import Any, TextIO

from mogine.settings import Settings, variables

ACCESS_FIELDS = ("server", "method", "path", "status", "duration_ms", "request_id", "reason")
REDACTED = "[redacted]"
MIN_SECRET_CHARS = 6

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def configure(settings: Settings, stream: TextIO | None = None, *, verbose: bool = False) -> None:
    """Send the process's log to `stream` (stderr) in the form that MOGINE_LOG_FORMAT asks for."""
    handler = logging.StreamHandler(stream or sys.stderr)
    secrets = known_secrets(settings)
    handler.setFormatter(JsonLines(secrets) if settings.log_format == "json" else TextLines(secrets))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("mogine").setLevel(logging.DEBUG if verbose else logging.INFO)


def known_secrets(settings: Settings) -> tuple[str, ...]:
    """Every secret that the settings hold, longest first."""
    found: set[str] = set()
    for variable in variables():
        if variable.secret:
            value = getattr(
                getattr(settings, variable.section) if variable.section else settings, variable.name
            )
            found.update((value,) if isinstance(value, str) else value)
    return tuple(sorted((s for s in found if len(s) >= MIN_SECRET_CHARS), key=len, reverse=True))


def one_line(text: str) -> str:
    """`text` with everything escaped that could start a new line or steer a terminal."""
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), text)


class TextLines(logging.Formatter):
    """`2026-11-23T08:00:00Z INFO mogine.access: proxy POST /api/chat 200 ...`"""

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime
        self._secrets = tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        return one_line(redact(super().format(record), self._secrets))


class JsonLines(logging.Formatter):
    """One JSON object per record; lines of requests have their parts as fields."""

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        self._secrets = tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{at}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        if (
            record.name == "mogine.access"
            and isinstance(record.args, tuple)
            and len(record.args) == len(ACCESS_FIELDS)
        ):
            line |= dict(zip(ACCESS_FIELDS, record.args, strict=True))
            line["reason"] = str(line["reason"]).strip()
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return redact(json.dumps(line, ensure_ascii=True, default=str), self._secrets)


def redact(text: str, secrets: Iterable[str]) -> str:
    """`text` without any of `secrets`."""
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, REDACTED)
    return text

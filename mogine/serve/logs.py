"""Lines of the log: one per record, as text or JSON, control characters escaped, known secrets taken out."""

import asyncio
import json
import logging
import re
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, TextIO
from urllib.parse import unquote

from mogine.settings import Settings, variables

ACCESS_FIELDS = ("server", "method", "path", "status", "duration_ms", "request_id", "reason")
REQUEST_FORMAT = "%s %s %s %d %.1fms %s%s"
FLUSH_S = 0.1
REDACTED = "[redacted]"
MIN_SECRET_CHARS = 6

# When it ended (seconds since 1970), then ACCESS_FIELDS, then the trace it belongs to.
RequestLine = tuple[float, str, str, str, int, float, str, str, str]

_PASSWORD = re.compile(r"://[^:@/]*:([^/]+)@")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def configure(settings: Settings, stream: TextIO | None = None, *, verbose: bool = False) -> None:
    """Send the process's log to `stream` (stderr) in the form that MOGINE_LOG_FORMAT asks for."""
    secrets = known_secrets(settings)
    formatter = JsonLines(secrets) if settings.log_format == "json" else TextLines(secrets)
    handler = Lines(stream or sys.stderr, formatter)
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
    # The password of an address may stand alone in what a library says.
    passwords = {match[1] for secret in found if (match := _PASSWORD.search(secret))}
    found |= passwords | set(map(unquote, passwords))
    return longest_first(s for s in found if len(s) >= MIN_SECRET_CHARS)


def longest_first(secrets: Iterable[str]) -> tuple[str, ...]:
    """Each once; a secret that holds another comes before it."""
    return tuple(sorted(set(secrets), key=len, reverse=True))


def redact_also(settings: Settings) -> None:
    """From here on the secrets of `settings` are taken out, too."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler.formatter, TextLines | JsonLines):
            handler.formatter.learn(known_secrets(settings))


def one_line(text: str) -> str:
    """`text` with everything escaped that could start a new line or steer a terminal."""
    return _CONTROL.sub(lambda m: m[0].encode("unicode_escape").decode("ascii"), text)


def _end(reason: str, trace: str) -> str:
    """What only some lines have."""
    return (f" {reason}" if reason else "") + (f" trace={trace}" if trace else "")


class RequestLog:
    """The line of each request: noted in a microsecond, and written with its neighbours a moment later.

    Line by line the log would cost more than all checks of a request together. What waits is at most
    FLUSH_S old; it is lost only with the process.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self._logger = logging.getLogger("mogine.access")
        self._waiting: list[RequestLine] = []
        self._timer: asyncio.TimerHandle | None = None

    def note(
        self, method: str, path: str, status: int, duration_ms: float, id: str, reason: str, trace: str = ""
    ) -> None:
        """One request has ended."""
        line = (time.time(), self._server, method, path, status, duration_ms, id, reason, trace)
        self._waiting.append(line)
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(FLUSH_S, self.flush)

    def flush(self) -> None:
        """Write what waits."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        lines, self._waiting = self._waiting, []
        if not lines or not self._logger.isEnabledFor(logging.INFO):
            return
        handlers = logging.getLogger().handlers
        ours = [h for h in handlers if isinstance(h, Lines)] if not self._logger.handlers else []
        for handler in ours:
            handler.write_requests(lines)
        if len(ours) < len(handlers) + len(self._logger.handlers):
            for line in lines:
                self._emit(line, ours)

    def _emit(self, line: RequestLine, done: Sequence[logging.Handler]) -> None:
        """The line as an ordinary record, for handlers that are not ours."""
        created, *fields, reason, trace = line
        args = (*fields, _end(reason, trace))
        record = self._logger.makeRecord(
            self._logger.name, logging.INFO, __file__, 0, REQUEST_FORMAT, args, None
        )
        record.created, record.msecs = created, created % 1 * 1000
        for handler in (*self._logger.handlers, *logging.getLogger().handlers):
            if handler not in done and record.levelno >= handler.level:
                handler.handle(record)


class Lines(logging.StreamHandler[TextIO]):
    """Our own handler, which knows the short way for lines of requests."""

    def __init__(self, stream: TextIO, formatter: "TextLines | JsonLines") -> None:
        super().__init__(stream)
        self.setFormatter(formatter)
        self._lines = formatter.request_lines

    def write_requests(self, lines: Sequence[RequestLine]) -> None:
        """Write all of `lines` at once."""
        self.acquire()
        try:
            self.stream.write(self._lines(lines))
            self.flush()
        except (OSError, ValueError):
            self.handleError(logging.makeLogRecord({"name": "mogine.access"}))
        finally:
            self.release()


class TextLines(logging.Formatter):
    """`2026-11-23T08:00:00Z INFO mogine.access: proxy POST /api/chat 200 ...`"""

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self.converter = time.gmtime
        self._secrets = tuple(secrets)

    def learn(self, secrets: Iterable[str]) -> None:
        """Take these out, too."""
        self._secrets = longest_first((*self._secrets, *secrets))

    def format(self, record: logging.LogRecord) -> str:
        return one_line(redact(super().format(record), self._secrets))

    def request_lines(self, lines: Sequence[RequestLine]) -> str:
        """The same text as `format` gives for each."""
        second, stamp = 0, ""
        texts: list[str] = []
        for created, server, method, path, status, duration_ms, id, reason, trace in lines:
            if int(created) != second:
                second = int(created)
                stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(second))
            shown = path if path.isascii() and path.isprintable() else one_line(path)
            texts.append(
                f"{stamp} INFO mogine.access: {server} {method} {shown} {status}"
                f" {duration_ms:.1f}ms {id}{_end(reason, trace)}\n"
            )
        return redact("".join(texts), self._secrets)


class JsonLines(logging.Formatter):
    """One JSON object per record; lines of requests have their parts as fields."""

    def __init__(self, secrets: Iterable[str]) -> None:
        super().__init__()
        self._secrets = tuple(secrets)

    def learn(self, secrets: Iterable[str]) -> None:
        """Take these out, too."""
        self._secrets = longest_first((*self._secrets, *secrets))

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

    def request_lines(self, lines: Sequence[RequestLine]) -> str:
        """The same objects as `format` gives for each."""
        second, stamp = 0, ""
        texts: list[str] = []
        for created, *fields, trace in lines:
            if int(created) != second:
                second = int(created)
                stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            line: dict[str, Any] = {
                "time": f"{stamp}.{int(created % 1 * 1000):03d}Z",
                "level": "info",
                "logger": "mogine.access",
            }
            line.update(zip(ACCESS_FIELDS, fields, strict=True))
            if trace:
                line["trace_id"] = trace
            texts.append(json.dumps(line, ensure_ascii=True) + "\n")
        return redact("".join(texts), self._secrets)


def redact(text: str, secrets: Iterable[str]) -> str:
    """`text` without any of `secrets`."""
    for secret in secrets:
        if secret in text:
            text = text.replace(secret, REDACTED)
    return text

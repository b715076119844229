"""The log: one line a record, nothing that steers a terminal, no secret."""

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from mogine.serve import logs
from mogine.settings import load_settings

ENV = {
    "DOUBAO_API_KEY": "test-key-one,test-key-one-longer",
    "MOGINE_ADMIN_TOKEN": "test-admin-token-" * 3,
}


@pytest.fixture
def kept() -> Iterator[None]:
    """The root logger as it was, afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("mogine")
    handlers, level, our_level = root.handlers[:], root.level, ours.level
    root.handlers = []
    yield
    root.handlers, root.level, ours.level = handlers, level, our_level


def lines(home: Path, log_format: str, write: object) -> list[str]:
    stream = io.StringIO()
    logs.configure(load_settings({**ENV, "MOGINE_LOG_FORMAT": log_format}, home), stream)
    assert callable(write)
    write(logging.getLogger("mogine.test"))
    return stream.getvalue().splitlines()


def fail(logger: logging.Logger) -> None:
    try:
        raise ValueError("key test-key-one-longer\nforged line\x1b[31m")
    except ValueError:
        logger.exception("it failed for %s", "visitor\r\nINFO mogine.access: forged")


@pytest.mark.parametrize("log_format", ["text", "json"])
@pytest.mark.usefixtures("kept")
def test_one_record_is_one_line_without_secrets_or_control_characters(home: Path, log_format: str) -> None:
    (line,) = lines(home, log_format, fail)
    assert "test-key" not in line and "longer" not in line
    assert "[redacted]" in line
    assert "ValueError" in line
    assert line.isprintable()


@pytest.mark.usefixtures("kept")
def test_a_request_is_a_json_object_with_its_parts(home: Path) -> None:
    def write(_: logging.Logger) -> None:
        logging.getLogger("mogine.access").info(
            "%s %s %s %d %.1fms %s%s", "proxy", "POST", "/api/chat", 429, 1.25, "id", " rate_limited"
        )

    (line,) = lines(home, "json", write)
    record = json.loads(line)
    assert record.pop("time").endswith("Z")
    assert record == {
        "level": "info",
        "logger": "mogine.access",
        "server": "proxy",
        "method": "POST",
        "path": "/api/chat",
        "status": 429,
        "duration_ms": 1.25,
        "request_id": "id",
        "reason": "rate_limited",
    }


@pytest.mark.usefixtures("kept")
def test_other_libraries_speak_up_only_from_warnings_on(home: Path) -> None:
    def write(logger: logging.Logger) -> None:
        logging.getLogger("other").info("chatter")
        logging.getLogger("other").warning("matter")
        logger.info("ours")
        logger.debug("detail")

    assert [line.rpartition(": ")[2] for line in lines(home, "text", write)] == ["matter", "ours"]


# --- lines of requests, written in groups -----------------------------------------------------------


def note_two(home: Path, log_format: str) -> list[str]:
    stream = io.StringIO()
    logs.configure(load_settings({**ENV, "MOGINE_LOG_FORMAT": log_format}, home), stream)
    requests = logs.RequestLog("proxy")

    async def note() -> None:
        requests.note("POST", "/api/chat", 429, 1.25, "id-1", "rate_limited")
        requests.note("GET", "/\r\n\x1b[31m\u2028test-key-one", 404, 0.5, "id-2", "")
        assert stream.getvalue() == "", "nothing is written while questions wait"

    asyncio.run(note())
    requests.flush()
    return stream.getvalue().splitlines()


@pytest.mark.usefixtures("kept")
def test_lines_of_requests_are_those_that_single_records_give(home: Path) -> None:
    def write(_: logging.Logger) -> None:
        access = logging.getLogger("mogine.access")
        access.info(logs.REQUEST_FORMAT, "proxy", "POST", "/api/chat", 429, 1.25, "id-1", " rate_limited")
        path = "/\r\n\x1b[31m\u2028test-key-one"
        access.info(logs.REQUEST_FORMAT, "proxy", "GET", path, 404, 0.5, "id-2", "")

    for log_format in ("text", "json"):
        single = lines(home, log_format, write)
        grouped = note_two(home, log_format)
        assert len(grouped) == 2 and all(line.isprintable() for line in grouped)
        if log_format == "text":
            assert [line.split(" ", 1)[1] for line in grouped] == [line.split(" ", 1)[1] for line in single]
        else:
            found = [[json.loads(line) for line in group] for group in (grouped, single)]
            for record in (*found[0], *found[1]):
                record.pop("time")
            assert found[0] == found[1]


async def test_lines_of_requests_are_written_a_moment_later(kept: None) -> None:
    """And handlers that are not ours get them as ordinary records."""
    told: asyncio.Queue[str] = asyncio.Queue()

    class Other(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told.put_nowait(record.getMessage())

    logging.getLogger().addHandler(Other())
    logging.getLogger("mogine").setLevel(logging.INFO)
    requests = logs.RequestLog("proxy")
    requests.note("GET", "/x", 200, 1.0, "id", "")
    assert told.empty()
    async with asyncio.timeout(2):
        assert await told.get() == "proxy GET /x 200 1.0ms id"

"""The log: one line a record, nothing that steers a terminal, no secret."""

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

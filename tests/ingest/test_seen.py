"""A file that looks the same is not read again; anything else is."""

import os
from pathlib import Path

import pytest

from mogine.ingest.load import digest_of
from mogine.ingest.seen import Seen

DAY_NS = 86_400 * 10**9


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.md"
    path.write_text("one")
    os.utime(path, ns=(DAY_NS, DAY_NS))
    return path


def seen(tmp_path: Path, now_ns: int = 2 * DAY_NS) -> Seen:
    return Seen(tmp_path / "files.db", clock_ns=lambda: now_ns)


def test_a_file_of_the_same_size_and_time_is_not_hashed_again(tmp_path: Path, file: Path) -> None:
    first = seen(tmp_path)
    assert first.digest("a.md", file) == digest_of(b"one")
    first.save()
    second = seen(tmp_path)
    assert second.digest("a.md", file) == digest_of(b"one")
    assert (first.hashed, second.hashed) == (1, 0)


@pytest.mark.parametrize(("text", "time_ns"), [("one!", DAY_NS), ("two", DAY_NS + 1), ("two", DAY_NS - 1)])
def test_another_size_or_time_is_a_reason_to_look(
    tmp_path: Path, file: Path, text: str, time_ns: int
) -> None:
    first = seen(tmp_path)
    first.digest("a.md", file)
    first.save()
    file.write_text(text)
    os.utime(file, ns=(time_ns, time_ns))
    assert seen(tmp_path).digest("a.md", file) == digest_of(text.encode())


def test_a_file_as_young_as_the_clock_is_coarse_is_hashed_again(tmp_path: Path, file: Path) -> None:
    first = seen(tmp_path, now_ns=DAY_NS + 10**9)
    first.digest("a.md", file)
    first.save()
    again = seen(tmp_path)
    again.digest("a.md", file)
    assert again.hashed == 1


def test_what_is_gone_is_forgotten(tmp_path: Path, file: Path) -> None:
    first = seen(tmp_path)
    first.digest("a.md", file)
    first.save()
    second = seen(tmp_path)
    second.save(gone=["a.md", "never.md"])
    third = seen(tmp_path)
    third.digest("a.md", file)
    assert third.hashed == 1


def test_a_damaged_memory_costs_time_alone(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "files.db").write_bytes(b"x" * 5000)
    damaged = seen(tmp_path)
    assert damaged.digest("a.md", file) == digest_of(b"one")
    damaged.save()
    assert "hashed again" in caplog.text
    healed = seen(tmp_path)
    healed.digest("a.md", file)
    assert healed.hashed == 0


def test_a_memory_that_cannot_be_written_is_told_and_no_failure(
    tmp_path: Path, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nowhere = Seen(tmp_path / "no folder" / "files.db", clock_ns=lambda: 2 * DAY_NS)
    assert nowhere.digest("a.md", file) == digest_of(b"one")
    nowhere.save()
    assert "cannot be written" in caplog.text

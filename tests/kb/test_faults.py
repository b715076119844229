"""Writes and syncs that fail while documents are taken in: what served stays, and the reason is told."""

import shutil
from pathlib import Path

import pytest

from benchmarks.kb.inject import DRAFT, prepare, run

pytestmark = pytest.mark.skipif(
    not shutil.which("strace"), reason="strace is not installed: scripts/test-system"
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("inject") / "home"
    prepare(home)
    return home


@pytest.mark.parametrize(
    ("call", "number", "error", "only"),
    [
        ("pwrite64", 1, "EIO", ""),
        ("pwrite64", 9, "ENOSPC", f"{DRAFT}/texts.db"),
        ("write", 1, "ENOSPC", f"{DRAFT}/manifest.json"),
        ("sendfile", 3, "ENOSPC", ""),
        ("fsync", 1, "EIO", f"{DRAFT}/texts.db"),
        ("fsync", 1, "EIO", "current.new"),
        ("fsync", 1, "EIO", "."),
        ("rename", 2, "EIO", ""),
    ],
)
def test_an_ingest_whose_write_or_sync_fails_is_told_and_the_old_generation_serves(
    prepared: Path, call: str, number: int, error: str, only: str
) -> None:
    """F17"""
    assert run(prepared, call, number, error, only) == ""

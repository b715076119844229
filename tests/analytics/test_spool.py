"""Rows that wait in files: whole or counted, taken up by whoever comes first."""

import os
from pathlib import Path

import pytest

from mogine.analytics.records import QueryRecord
from mogine.analytics.spool import Spool
from mogine.errors import StoreError
from tests.analytics.rows import cite, row


def taken(spool: Spool) -> tuple[list[QueryRecord], int]:
    batches = list(spool.take_up(2))
    return [r for batch in batches for r in batch.records], sum(batch.damaged for batch in batches)


def test_rows_come_back_exactly(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    rows = [
        row(),
        row(question='line\nbreak "quoted" \u2028 \ud800', citations=(cite("a"), cite("b", number=2))),
    ]
    rows += [row(citations=(), cost_cny=None) for _ in range(3)]
    spool.append(rows[:2])
    spool.append(rows[2:])
    assert spool.count() == 5
    spool.release()
    assert taken(spool) == (rows, 0)
    assert spool.files() == []


def test_a_file_being_written_is_left_to_its_writer(tmp_path: Path) -> None:
    writer, other = Spool(tmp_path), Spool(tmp_path)
    writer.append([row()])
    assert taken(other) == ([], 0)
    writer.release()
    assert len(taken(other)[0]) == 1


def test_a_taker_that_gives_up_leaves_the_file(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append([row() for _ in range(5)])
    spool.release()
    taking = spool.take_up(2)
    next(taking)
    assert taken(Spool(tmp_path)) == ([], 0)  # nobody else takes it meanwhile
    taking.close()
    assert len(taken(spool)[0]) == 5


@pytest.mark.parametrize("damage", ["torn", "flipped", "foreign"])
def test_damaged_lines_are_counted_and_the_others_kept(tmp_path: Path, damage: str) -> None:
    spool = Spool(tmp_path)
    rows = [row() for _ in range(3)]
    spool.append(rows)
    spool.release()
    (file,) = spool.files()
    lines = file.read_bytes().splitlines(keepends=True)
    if damage == "torn":
        lines[2] = lines[2][:50]
    elif damage == "flipped":
        lines[2] = lines[2].replace(b"doubao", b"doubap")
    else:
        lines[2] = b"00000000 {}\n"
    file.write_bytes(b"".join(lines))
    assert taken(spool) == (rows[:2], 1)
    assert spool.files() == []


def test_a_full_spool_refuses_instead_of_filling_the_disk(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=2000)
    spool.append([row()])
    with pytest.raises(StoreError, match="limit of 2000 bytes"):
        spool.append([row() for _ in range(5)])
    spool.release()
    assert len(taken(spool)[0]) == 1


def test_a_folder_that_cannot_be_is_told(tmp_path: Path) -> None:
    (tmp_path / "spool").write_text("a file stands here")
    with pytest.raises(StoreError, match="cannot be written"):
        Spool(tmp_path / "spool").append([row()])


def test_files_are_for_their_owner_alone(tmp_path: Path) -> None:
    spool = Spool(tmp_path / "spool")
    spool.append([row()])
    (file,) = spool.files()
    assert os.stat(file).st_mode & 0o077 == os.stat(tmp_path / "spool").st_mode & 0o077 == 0
    spool.release()

"""A home in one file and back: nothing is lost, nothing secret goes along, nothing is replaced unchecked."""

import gzip
import io
import json
import sqlite3
import tarfile
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from mogine import backup
from mogine.analytics.schema import STEPS
from mogine.analytics.store import AnalyticsStore
from mogine.backup import CONTENTS
from mogine.errors import NotFound, StoreError
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from mogine.settings import Settings, load_settings
from tests.analytics.rows import row
from tests.kb.conftest import make_document, take_in

KEY = "test-key-doubao"
TOKEN = "test-admin-token-" * 3


@pytest.fixture
def full(home: Path) -> Settings:
    """A home with something of everything."""
    (home / ".env").write_text(
        f"MOGINE_PROXY_PORT=9001\nDOUBAO_API_KEY={KEY}\nexport MOGINE_ADMIN_TOKEN={TOKEN}\n"
    )
    (home / "site.toml").write_text('[company]\nname = "松涧"\n')
    (home / "kb-tests.jsonl").write_text('{"question": "退款"}\n')
    (home / "docs").mkdir()
    (home / "docs/a.md").write_text("# 退款\n三天到账\n")
    settings = load_settings({}, home)
    take_in(Generations(settings.kb_path), NoEmbedder(), make_document("docs/a.md", "退款 三天到账"))
    store = AnalyticsStore(settings.analytics_path)
    store.prepare()
    store.insert([row(question="退款多久到账")])
    store.close()
    (home / "data/admin_token").write_text(TOKEN)
    (home / "data/spool").mkdir()
    (home / "data/spool/1.jsonl").write_text("{}\n")
    return settings


def tree(home: Path) -> dict[str, bytes]:
    """Every file of a home but the databases' own side files."""
    return {
        path.relative_to(home).as_posix(): path.read_bytes()
        for path in sorted(home.rglob("*"))
        if path.is_file() and not path.name.endswith(("-wal", "-shm", ".lock"))
    }


def questions(home: Path) -> int:
    return AnalyticsStore(home / "data/analytics.db").summary().rows


# --- there and back --------------------------------------------------------------------------------


def test_an_empty_home_gets_everything_but_secrets(full: Settings, tmp_path: Path) -> None:
    file, there = tmp_path / "b.tar.gz", tmp_path / "there"
    contents = backup.backup(full, file)
    assert file.stat().st_mode & 0o777 == 0o600
    assert (contents.rows, contents.generation, contents.secrets) == (1, "g000001", False)
    done = backup.restore(file, there)
    assert (done.kept_in, done.kept_env) == (None, False)
    assert questions(there) == 1
    assert Generations(there / "data/kb").sources() == Generations(full.kb_path).sources()
    for name in ("site.toml", "kb-tests.jsonl", "docs/a.md", "data/spool/1.jsonl"):
        assert (there / name).read_bytes() == (full.home / name).read_bytes()
    assert not (there / "data/admin_token").exists()
    assert load_settings({}, there).proxy.port == 9001
    assert (there / ".env").stat().st_mode & 0o777 == 0o600
    assert (there / "data").stat().st_mode & 0o777 == 0o700
    assert not list(there.glob(".restore-*")) and not list((full.home / "data").glob(".backup-*"))


@pytest.mark.parametrize("secret", [KEY, TOKEN])
def test_a_secret_is_in_the_file_only_when_asked_for(full: Settings, tmp_path: Path, secret: str) -> None:
    for with_secrets in (False, True):
        file = tmp_path / f"{with_secrets}.tar.gz"
        backup.backup(full, file, with_secrets=with_secrets)
        assert (secret.encode() in gzip.decompress(file.read_bytes())) is with_secrets
    backup.restore(file, tmp_path / "there")
    settings = load_settings({}, tmp_path / "there")
    assert (settings.doubao.keys, settings.access.admin_token) == ((KEY,), TOKEN)
    assert (tmp_path / "there/data/admin_token").read_text() == TOKEN


def test_what_was_in_the_home_moves_aside_and_its_keys_and_backups_stay(
    full: Settings, tmp_path: Path
) -> None:
    file = backup.default_target(full)
    backup.backup(full, file)
    before = tree(full.home)
    (full.home / "site.toml").write_text("# changed\n")
    store = AnalyticsStore(full.analytics_path)
    store.insert([row(question="later")])
    store.close()
    done = backup.restore(file, full.home)
    assert done.kept_in is not None and done.kept_env
    assert questions(full.home) == 1 and questions(done.kept_in) == 2
    assert (done.kept_in / "site.toml").read_text() == "# changed\n"
    assert (full.home / "site.toml").read_bytes() == before["site.toml"]
    assert load_settings({}, full.home).doubao.keys == (KEY,)
    assert (full.home / "data/admin_token").read_text() == TOKEN
    assert file.exists(), "the archives stay where cron looks for them"


def test_a_backup_while_rows_are_written_is_the_record_of_one_moment(full: Settings, tmp_path: Path) -> None:
    store = AnalyticsStore(full.analytics_path)
    stop, written = threading.Event(), [1]

    def write() -> None:
        while not stop.is_set():
            store.insert([row(), row()])
            written[0] += 2

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for number in range(3):
            low = written[0]
            file = tmp_path / f"{number}.tar.gz"
            backup.backup(full, file, docs=False)
            assert low <= backup.check(file).rows <= written[0] + 2
            assert backup.check(file).rows % 2 == 1, "a transaction is in it whole or not at all"
    finally:
        stop.set()
        writer.join()
        store.close()
    backup.restore(file, tmp_path / "there")
    with closing(sqlite3.connect(tmp_path / "there/data/analytics.db")) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_home_that_has_nothing_yet_can_be_kept_too(settings: Settings, tmp_path: Path) -> None:
    contents = backup.backup(settings, tmp_path / "b.tar.gz")
    assert (contents.rows, contents.generation) == (0, "")
    backup.restore(tmp_path / "b.tar.gz", tmp_path / "there")
    assert (tmp_path / "there/data").is_dir()


def test_tables_of_an_older_mogine_are_brought_to_this_version(full: Settings, tmp_path: Path) -> None:
    full.analytics_path.unlink()
    old = AnalyticsStore(full.analytics_path, steps=STEPS[:1])
    old.prepare()
    old.close()
    backup.backup(full, tmp_path / "b.tar.gz")
    backup.restore(tmp_path / "b.tar.gz", tmp_path / "there")
    with closing(sqlite3.connect(tmp_path / "there/data/analytics.db")) as database:
        assert database.execute("SELECT count(*) FROM rollups").fetchone() == (0,)


def test_only_archives_of_ours_are_dropped_and_the_newest_stay(full: Settings) -> None:
    folder = full.data_path / "backups"
    folder.mkdir()
    names = [f"mogine-2026112{day}T031000Z.tar.gz" for day in range(1, 6)]
    for name in (*names, "my-own.tar.gz", "mogine-notes.txt"):
        (folder / name).touch()
    assert [path.name for path in backup.drop_old(full, 2)] == names[:3]
    assert sorted(path.name for path in folder.iterdir()) == [
        "mogine-20261124T031000Z.tar.gz",
        *names[4:],
        "mogine-notes.txt",
        "my-own.tar.gz",
    ]


# --- what is refused -------------------------------------------------------------------------------


def repack(file: Path, change: Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]) -> None:
    """The archive with its members as `change` leaves them."""
    with tarfile.open(file) as archive:
        members = [(info, (archive.extractfile(info) or io.BytesIO()).read()) for info in archive]
    change(members)
    with tarfile.open(file, "w:gz") as archive:
        for info, content in members:
            info.size = len(content) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(content))


def contents_with(**fields: Any) -> Callable[[list[tuple[tarfile.TarInfo, bytes]]], None]:
    def change(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
        assert members[0][0].name == CONTENTS
        told = {**json.loads(members[0][1]), **fields}
        members[0] = (members[0][0], json.dumps(told).encode())

    return change


def changed_byte(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    place = next(p for p, (info, _) in enumerate(members) if info.name == "data/analytics.db")
    info, content = members[place]
    members[place] = (info, content[:5000] + bytes([content[5000] ^ 1]) + content[5001:])


def one_missing(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.pop()


def one_more(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    members.append((tarfile.TarInfo("data/extra"), b"x"))


def a_link(members: list[tuple[tarfile.TarInfo, bytes]]) -> None:
    info = members[-1][0]
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (changed_byte, "not as it was written"),
        (one_missing, "missing"),
        (one_more, "do not speak"),
        (a_link, "do not speak"),
        (contents_with(format=2, mogine="9.0"), "mogine 9.0"),
        (contents_with(files={"../../etc/passwd": ["0", 1]}), "no file of a home"),
        (contents_with(files={"/etc/passwd": ["0", 1]}), "no file of a home"),
        (contents_with(files={"mogine/evil.py": ["0", 1]}), "no file of a home"),
        (contents_with(files=7), "damaged"),
        (contents_with(files={"data/x": ["0", 10**18]}), "make room|missing|do not speak"),
    ],
)
def test_an_archive_that_is_not_right_changes_nothing(
    full: Settings, tmp_path: Path, change: Any, words: str
) -> None:
    file = tmp_path / "b.tar.gz"
    backup.backup(full, file)
    repack(file, change)
    before = tree(full.home)
    with pytest.raises(StoreError, match=words):
        backup.check(file)
    with pytest.raises(StoreError, match=words):
        backup.restore(file, full.home)
    assert tree(full.home) == before
    assert not list(full.home.glob(".restore-*")) and not list(full.home.glob("before-*"))


@pytest.mark.parametrize("length", [0, 100, 3000])
def test_a_file_that_was_cut_off_is_refused(full: Settings, tmp_path: Path, length: int) -> None:
    file = tmp_path / "b.tar.gz"
    backup.backup(full, file)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(StoreError, match=r"no backup|damaged"):
        backup.restore(file, tmp_path / "there")


def test_a_file_that_is_something_else_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.tar.gz").write_text("hello")
    with pytest.raises(StoreError, match=r"x\.tar\.gz"):
        backup.check(tmp_path / "x.tar.gz")
    with pytest.raises(NotFound, match=r"y\.tar\.gz"):
        backup.check(tmp_path / "y.tar.gz")
    assert not backup.is_readable(tmp_path / "x.tar.gz")


def test_a_record_of_a_newer_mogine_is_refused_before_anything_moves(full: Settings, tmp_path: Path) -> None:
    full.analytics_path.unlink()
    newer = AnalyticsStore(full.analytics_path, steps=(*STEPS, ("999_later", "CREATE TABLE later (x)")))
    newer.prepare()
    newer.close()
    with sqlite3.connect(full.analytics_path) as database:
        assert database.execute("SELECT count(*) FROM later").fetchone() == (0,)
    database.close()
    file = tmp_path / "b.tar.gz"
    backup.backup(full, file)
    with pytest.raises(StoreError, match="newer mogine"):
        backup.restore(file, tmp_path / "there")
    assert not (tmp_path / "there/data").exists()

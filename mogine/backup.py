"""A home in one file and back: consistent while it serves, checked before anything is replaced."""

import gzip
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import IO, Any

from mogine.analytics.store import AnalyticsStore
from mogine.errors import MogineError, NotFound, SettingsError, StoreError
from mogine.kb.generations import Generations
from mogine.kb.manifest import MANIFEST_NAME, Generation, copy_files
from mogine.kb.texts import copy_database
from mogine.settings import Settings, load_site, variables

FORMAT = 1
CONTENTS = "mogine-backup.json"
MAX_CONTENTS_BYTES = 16 * 1024**2
BLOCK_BYTES = 1024 * 1024
PLAIN = ("site.toml", "kb-tests.jsonl")
# What only `--with-secrets` takes along. The salt of the day is no secret to keep: it is made to be lost.
SECRETS = ("data/admin_token", "data/question_salt")
BACKUPS = "backups"
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
NAME = re.compile(r"mogine-\d{8}T\d{6}Z\.tar\.gz")
TRIES = 3


@dataclass(frozen=True, slots=True)
class Contents:
    """What an archive says about itself. `files`: name to (sha256, bytes)."""

    created_at: str
    mogine: str
    secrets: bool
    rows: int
    generation: str
    files: dict[str, tuple[str, int]]

    @property
    def bytes(self) -> int:
        """How much is in it, unpacked."""
        return sum(size for _, size in self.files.values())


# --- out -----------------------------------------------------------------------------------------


def backup(settings: Settings, target: Path, *, with_secrets: bool = False, docs: bool = True) -> Contents:
    """Write the home into `target`, mode 0600, all at once. Raises StoreError, Locked."""
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        settings.data_path.mkdir(mode=0o700, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".backup-", dir=settings.data_path) as folder:
            stage = Path(folder)
            rows, generation = _gather(settings, stage, with_secrets=with_secrets, docs=docs)
            files = {name: _digest(path) for name, path in _files(stage)}
            contents = Contents(
                f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}",
                version("mogine"),
                with_secrets,
                rows,
                generation,
                files,
            )
            _pack(stage, contents, target)
            return contents
    except OSError as error:
        raise StoreError(f"the backup cannot be written to {target} ({error.strerror or error})") from error


def default_target(settings: Settings, now: datetime | None = None) -> Path:
    """A name of its own in data/backups."""
    return settings.data_path / BACKUPS / f"mogine-{now or datetime.now(UTC):%Y%m%dT%H%M%SZ}.tar.gz"


def drop_old(settings: Settings, keep: int) -> list[Path]:
    """Remove all but the newest `keep` of the archives in data/backups that have a name of ours."""
    folder = settings.data_path / BACKUPS
    ours = sorted(path for path in folder.iterdir() if NAME.fullmatch(path.name)) if folder.is_dir() else []
    old = ours[:-keep]
    for path in old:
        path.unlink(missing_ok=True)
    return old


def newest(settings: Settings) -> Path | None:
    """The newest archive in data/backups."""
    folder = settings.data_path / BACKUPS
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    return max(files, key=lambda path: path.stat().st_mtime, default=None)


def _gather(settings: Settings, stage: Path, *, with_secrets: bool, docs: bool) -> tuple[int, str]:
    home, data = settings.home, settings.data_path
    (stage / "data").mkdir(mode=0o700)
    for name in (*PLAIN, *(SECRETS if with_secrets else ())):
        if (home / name).is_file():
            shutil.copyfile(home / name, stage / name)
    if (home / ".env").is_file():
        text = (home / ".env").read_text("utf-8-sig")
        (stage / ".env").write_text(text if with_secrets else without_secrets(text), "utf-8")
    if picture := _picture(home):
        (stage / picture).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.copyfile(home / picture, stage / picture)
    if docs and (home / "docs").is_dir():
        shutil.copytree(home / "docs", stage / "docs", ignore_dangling_symlinks=True)
    for path in sorted(data.glob("*.db")):
        copy_database(path, stage / "data" / path.name)
    if (data / "spool").is_dir():
        shutil.copytree(data / "spool", stage / "data/spool", ignore=shutil.ignore_patterns("*.lock"))
    generation = _copy_generation(settings, stage / "data/kb")
    return _rows(stage / "data/analytics.db"), generation


def _rows(path: Path) -> int:
    """How many questions are recorded, in tables of any version."""
    if not path.exists():
        return 0
    try:
        with closing(sqlite3.connect(path)) as database:
            return int(database.execute("SELECT count(*) FROM queries").fetchone()[0])
    except sqlite3.Error:
        return 0


def _picture(home: Path) -> str:
    """The file that `handoff_wechat_qr` of site.toml names, when it is a picture in the home; else ""."""
    try:
        name = str(load_site(home / "site.toml").assistant.get("handoff_wechat_qr") or "")
    except SettingsError:
        return ""
    path = (home / name).resolve()
    return name if name and _is_ours(name) and path.is_file() and path.is_relative_to(home.resolve()) else ""


def without_secrets(text: str) -> str:
    """The lines of an `.env` with the value of every secret taken out."""
    names = "|".join(re.escape(v.env) for v in variables() if v.secret)
    return re.sub(rf"(?m)^(\s*(?:export\s+)?(?:{names})\s*)=.*$", r"# \1= was left out of the backup", text)


def _copy_generation(settings: Settings, target: Path) -> str:
    """The one that serves; its name, "" for none. An ingest may take it away in between: then the next."""
    generations = Generations.of(settings)
    for left in reversed(range(TRIES)):
        generation = generations.current()
        if generation is None:
            return ""
        try:
            _copy_files(generation, target / "generations" / generation.name)
        except (StoreError, OSError):
            shutil.rmtree(target, ignore_errors=True)
            if not left or generations.current_name() == generation.name:
                raise
            continue
        pointer = {"current": generation.name, "kept": [generation.name], "leaving": []}
        (target / "current.json").write_text(json.dumps(pointer), "utf-8")
        return generation.name
    return ""


def _copy_files(generation: Generation, folder: Path) -> None:
    folder.mkdir(mode=0o700, parents=True)
    copy_files(generation, folder)
    # Chroma notes each opening in its database, so of all files this one may change while it serves.
    for path in generation.path.rglob("*.sqlite3"):
        copy = folder / path.relative_to(generation.path)
        copy.unlink(missing_ok=True)
        copy_database(path, copy)
    shutil.copyfile(generation.path / MANIFEST_NAME, folder / MANIFEST_NAME)


def _files(stage: Path) -> Iterator[tuple[str, Path]]:
    for path in sorted(stage.rglob("*")):
        if path.is_file() and not path.is_symlink():
            yield path.relative_to(stage).as_posix(), path


def _digest(path: Path) -> tuple[str, int]:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest(), path.stat().st_size


def _pack(stage: Path, contents: Contents, target: Path) -> None:
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with (
            open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file,
            gzip.GzipFile("", "wb", compresslevel=5, fileobj=file) as packed,
            tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as archive,
        ):
            text = json.dumps({"format": FORMAT, **_fields(contents)}, ensure_ascii=False).encode()
            _add(archive, CONTENTS, io.BytesIO(text), len(text))
            for name, (_, size) in contents.files.items():
                with (stage / name).open("rb") as content:
                    _add(archive, name, content, size)
        with draft.open("rb") as written:
            os.fsync(written.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _fields(contents: Contents) -> dict[str, Any]:
    return {name: getattr(contents, name) for name in Contents.__slots__}


def _add(archive: tarfile.TarFile, name: str, content: IO[bytes], size: int) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o600, int(datetime.now(UTC).timestamp())
    archive.addfile(info, content)


# --- in ------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Restored:
    """`kept_in` is where what was there before lies now; None for an empty home."""

    contents: Contents
    kept_in: Path | None
    kept_env: bool


def check(source: Path) -> Contents:
    """Read the whole archive and compare every file with its checksum. Raises StoreError, NotFound."""
    with _reading(source) as (archive, contents):
        for _ in _members(archive, contents, source):
            pass
        return contents


def restore(source: Path, home: Path) -> Restored:
    """Put an archive into `home`. What is there moves aside, into a folder beside it in the home.

    Everything is unpacked, compared and brought to this version first. Raises StoreError, NotFound; then
    the home is as it was.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".restore-", dir=home))
    except OSError as error:
        raise StoreError(f"{home} cannot be written ({error.strerror})") from error
    try:
        contents = _unpack(source, stage)
        _bring_up_to_date(stage)
        kept_env = not contents.secrets and (home / ".env").exists()
        if kept_env:
            (stage / ".env").unlink(missing_ok=True)
        return Restored(contents, _swap(stage, home, keep_secrets=not contents.secrets), kept_env)
    except OSError as error:
        raise StoreError(f"{source} cannot be restored into {home} ({error.strerror or error})") from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


@contextmanager
def _reading(source: Path) -> Iterator[tuple[tarfile.TarFile, Contents]]:
    try:
        with source.open("rb") as file, tarfile.open(fileobj=file, mode="r|gz") as archive:
            first = archive.next()
            content = archive.extractfile(first) if first and first.name == CONTENTS else None
            if first is None or content is None or first.size > MAX_CONTENTS_BYTES:
                raise StoreError(f"{source} is no backup of mogine")
            yield archive, _contents(json.loads(content.read()), source)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {source}") from error
    except (
        tarfile.TarError,
        EOFError,
        gzip.BadGzipFile,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as error:
        raise StoreError(f"{source} is damaged or no backup of mogine ({type(error).__name__})") from error
    except OSError as error:
        raise StoreError(f"{source} cannot be read ({error.strerror or error})") from error


def _contents(fields: dict[str, Any], source: Path) -> Contents:
    if fields["format"] > FORMAT:
        raise StoreError(
            f"{source} was made by mogine {fields['mogine']}, which writes another format: "
            "upgrade mogine, then restore it"
        )
    files = {str(name): (str(digest), int(size)) for name, (digest, size) in fields["files"].items()}
    if bad := next((name for name in files if not _is_ours(name)), None):
        raise StoreError(f"{source} holds {bad!r}, which is no file of a home")
    return Contents(**{**{name: fields[name] for name in Contents.__slots__}, "files": files})


def _is_ours(name: str) -> bool:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\0" in name or "\\" in name:
        return False
    if name in (*PLAIN, ".env") or (len(parts) > 1 and parts[0] in ("data", "docs")):
        return True
    return PurePosixPath(name).suffix.lower() in PICTURES and not name.startswith(".")


def _members(
    archive: tarfile.TarFile, contents: Contents, source: Path
) -> Iterator[tuple[str, Iterator[bytes]]]:
    """Each file with its bytes, which raise StoreError at their end when they are not what was written."""
    missing = dict(contents.files)
    while (info := archive.next()) is not None:
        content = archive.extractfile(info) if info.isreg() else None
        if info.name not in missing or content is None:
            raise StoreError(f"{source} holds {info.name!r}, of which its contents do not speak")
        blocks = _checked(content, info.name, *missing.pop(info.name), source)
        yield info.name, blocks
        for _ in blocks:
            pass
    if missing:
        raise StoreError(
            f"{source} is damaged: {next(iter(missing))} and {len(missing) - 1} more are missing"
        )


def _checked(content: IO[bytes], name: str, digest: str, size: int, source: Path) -> Iterator[bytes]:
    found, length = hashlib.sha256(), 0
    while block := content.read(BLOCK_BYTES):
        found.update(block)
        length += len(block)
        yield block
    if (found.hexdigest(), length) != (digest, size):
        raise StoreError(f"{source} is damaged: {name} is not as it was written")


def _unpack(source: Path, stage: Path) -> Contents:
    with _reading(source) as (archive, contents):
        free = shutil.disk_usage(stage).free
        if contents.bytes > free:
            raise StoreError(
                f"{source} holds {contents.bytes:,} bytes and the disk of the home has {free:,}: make room"
            )
        for name, blocks in _members(archive, contents, source):
            path = stage / name
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            mode = 0o644 if name.partition("/")[0] in ("docs", *PLAIN) else 0o600
            with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
                for block in blocks:
                    file.write(block)
                file.flush()
                os.fsync(file.fileno())
        (stage / "data").mkdir(mode=0o700, exist_ok=True)
        if (stage / "docs").exists():
            (stage / "docs").chmod(0o755)
        return contents


def _bring_up_to_date(stage: Path) -> None:
    """Older tables are brought to this version in the copy; what is too new is refused."""
    store = AnalyticsStore(stage / "data/analytics.db")
    try:
        if store.exists():
            store.prepare()
    finally:
        store.close()
    Generations(stage / "data/kb").current()


def _swap(stage: Path, home: Path, *, keep_secrets: bool) -> Path | None:
    """Every entry of `stage` takes the place of its namesake; all of them, or none."""
    stamp = f"{datetime.now(UTC):%Y%m%dT%H%M%S}"
    aside = home / f"before-restore-{stamp}-{secrets.token_hex(2)}"
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        source.rename(target)
        moved.append((source, target))

    try:
        for new in sorted(stage.iterdir()):
            old = home / new.name
            if old.exists() or old.is_symlink():
                aside.mkdir(mode=0o700, exist_ok=True)
                move(old, aside / new.name)
            move(new, old)
        for name in SECRETS if keep_secrets else ():
            if (aside / name).is_file() and not (home / name).exists():
                shutil.copy2(aside / name, home / name)
        backups = aside / "data" / BACKUPS
        if backups.is_dir():
            move(backups, home / "data" / BACKUPS)
    except BaseException:
        for source, target in reversed(moved):
            target.rename(source)
        if aside.is_dir() and not any(aside.iterdir()):
            aside.rmdir()
        raise
    return aside if aside.exists() else None


def is_readable(path: Path) -> bool:
    """Whether `path` begins like a backup of ours; a quick look, no proof."""
    try:
        with _reading(path):
            return True
    except MogineError:
        return False

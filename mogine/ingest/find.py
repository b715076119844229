"""What there is to take: files below the given paths and pages, their names, what is passed over and why."""

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from mogine.errors import RequestError, TooLarge, UnreadableDocument
from mogine.ingest.load import MAX_BYTES, SUFFIXES, suffix_of, unread_suffix


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file that was not taken, and why: the reason is said of the file ("is empty")."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Page:
    """What was found at an address; `name` is what a file of it would be called."""

    url: str
    name: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Gone:
    """The site says that there is no such page (any more)."""

    url: str
    reason: str


@dataclass(frozen=True, slots=True)
class Found:
    """Files to take, by source, and those passed over.

    `roots` are the given paths, made absolute, and `empty_roots` the others, in which there was nothing to
    take: rather folders that are not mounted than folders whose documents shall be forgotten.
    """

    roots: tuple[Path, ...]
    empty_roots: tuple[Path, ...]
    files: dict[str, Path]
    skipped: tuple[Skipped, ...]


def find(paths: Sequence[Path], base: Path, own: Sequence[Path] = ()) -> Found:
    """Walk `paths`; a source is its path seen from `base`. `own` folders are mogine's and never entered.

    Raises RequestError for a path that is not there.
    """
    roots = tuple(Path(os.path.abspath(path)) for path in paths)
    missing = [str(path) for path, root in zip(paths, roots, strict=True) if not root.exists()]
    if missing:
        raise RequestError(
            f"no such file or folder: {', '.join(missing)}; "
            "documents that are gone are taken out with `mogine kb remove`"
        )
    closed = {Path(os.path.abspath(path)) for path in own}
    files: dict[str, Path] = {}
    skipped: dict[str, Skipped] = {}
    full: set[Path] = set()
    for root in roots:
        for path, reason in _walk(root, closed) if root.is_dir() else [(root, "")]:
            source = source_of(path, base)
            if not reason and not _is_utf8(source):
                reason = "has a name that is not UTF-8; rename it"
            if reason:
                shown = source.encode("utf-8", "replace").decode()
                skipped.setdefault(shown, Skipped(shown, reason))
            else:
                # Only a path that was named may be a link; read() does not follow any.
                files.setdefault(source, path.resolve() if path == root else path)
                full.add(root)
    return Found(
        roots=tuple(root for root in roots if root in full),
        empty_roots=tuple(root for root in roots if root not in full),
        files=files,
        skipped=tuple(entry for entry in skipped.values() if entry.source not in files),
    )


def source_of(path: Path, base: Path) -> str:
    """The name under which a file is known: its path seen from `base`, the same from every folder."""
    return Path(os.path.relpath(path, base)).as_posix()


def is_below(source: str, base: Path, roots: Iterable[Path]) -> bool:
    """Whether a source is one of `roots` or lies in one of them."""
    path = Path(os.path.abspath(base / source))
    return any(path == root or root in path.parents for root in roots)


def is_address(text: str) -> bool:
    """Whether what was named is an address and no path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def read(path: Path) -> bytes:
    """The bytes of a regular file. Raises UnreadableDocument, TooLarge."""
    try:
        # A pipe must not make us wait, and a link put there since the walk must not lead us away.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableDocument("is no regular file")
            if status.st_size > MAX_BYTES:
                raise TooLarge(f"is larger than {MAX_BYTES // 1024**2} MiB; split it")
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UnreadableDocument(f"cannot be read ({error.strerror})") from error


def _walk(root: Path, closed: set[Path]) -> Iterator[tuple[Path, str]]:
    """(file or folder, "" or why it is passed over), in the order of names."""
    pending = [root]
    while pending:
        folder = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError as error:
            yield folder, f"cannot be read ({error.strerror})"
            continue
        folders = []
        for entry in entries:
            path = Path(entry.path)
            if entry.is_symlink():
                yield path, "is a symbolic link; name its target itself"
            elif entry.name.startswith("."):
                yield path, "is hidden"
            elif entry.is_dir():
                if path in closed:
                    yield path, "is mogine's own data"
                else:
                    folders.append(path)
            else:
                yield path, _why_not(entry)
        pending.extend(reversed(folders))


def _why_not(entry: "os.DirEntry[str]") -> str:
    if not entry.is_file():
        return "is no regular file"
    if entry.name.startswith("~$"):
        return "is a lock file of Office"
    suffix = suffix_of(entry.name)
    return "" if suffix in SUFFIXES else unread_suffix(suffix)


def _is_utf8(source: str) -> bool:
    try:
        source.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True

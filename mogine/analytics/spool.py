"""Where rows wait while the database cannot take them: checksummed lines in files, one per outage."""

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO
from zlib import crc32

from mogine.analytics.records import QueryRecord, new_id
from mogine.chat import Citation
from mogine.errors import StoreError

MAX_SPOOL_BYTES = 64 * 1024**2
SUFFIX = ".jsonl"


@dataclass(frozen=True, slots=True)
class Batch:
    """Some rows of one file; `damaged` lines of it are told once, with its last batch."""

    records: tuple[QueryRecord, ...]
    damaged: int = 0


class Spool:
    """The folder `path`. Several processes may share it: each writes a file of its own, under a lock
    that ends with the process, and any of them takes up what nobody holds any more."""

    def __init__(self, path: Path, *, max_bytes: int = MAX_SPOOL_BYTES) -> None:
        self.path = path
        self._max_bytes = max_bytes
        self._descriptor = -1

    def append(self, records: Sequence[QueryRecord]) -> None:
        """Writes `records` and waits until they are on the disk. Raises StoreError."""
        data = b"".join(_line(record) for record in records)
        try:
            if self.size_bytes() + len(data) > self._max_bytes:
                raise StoreError(f"{self.path.name} has reached its limit of {self._max_bytes} bytes")
            self._write(data)
        except OSError as error:
            self.release()
            raise StoreError(f"{self.path.name} cannot be written: {error.strerror or error}") from error

    def _write(self, data: bytes) -> None:
        if self._descriptor < 0:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            name = self.path / f"{new_id()}{SUFFIX}"
            self._descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            folder = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(folder)  # the new name, too, must survive a power cut
            finally:
                os.close(folder)
        start = os.fstat(self._descriptor).st_size
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(self._descriptor, view) :]
            os.fsync(self._descriptor)
        except OSError:
            # Half a line would spoil the next one. If even this fails, its checksum tells.
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, start)
            raise

    def release(self) -> None:
        """Ends the file being written, so that it can be taken up."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def files(self) -> list[Path]:
        """What lies there, oldest first."""
        try:
            return sorted(p for p in self.path.iterdir() if p.suffix == SUFFIX)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def size_bytes(self) -> int:
        """How much lies there."""
        size = 0
        for path in self.files():
            with contextlib.suppress(FileNotFoundError):
                size += path.stat().st_size
        return size

    def count(self) -> int:
        """How many rows lie there."""
        rows = 0
        for path in self.files():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                rows += sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
        return rows

    def erase(self, is_meant: Callable[[QueryRecord], bool]) -> int:
        """Takes the rows that are meant out of every file that nobody writes to; how many.

        A damaged line may hold anything: it goes too, when there is something to erase in its file.
        """
        erased = 0
        for path in self.files():
            with contextlib.suppress(FileNotFoundError), path.open("r+b") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # a running server writes it; the scan of the folder tells what is in it
                records: list[QueryRecord] = []
                for batch in _batches(file, 1000):
                    records += batch.records
                kept = [record for record in records if not is_meant(record)]
                if len(kept) < len(records):
                    data = b"".join(_line(record) for record in kept)
                    old = file.seek(0, os.SEEK_END)
                    file.seek(0)
                    # Overwritten first: what is cut off could be read from the disk for a while.
                    file.write(data + bytes(max(0, old - len(data))))
                    file.flush()
                    os.fsync(file.fileno())
                    file.truncate(len(data))
                    erased += len(records) - len(kept)
        return erased

    def take_up(self, size: int) -> Generator[Batch, None, None]:
        """All files that nobody writes to, in batches of at most `size`; a file is deleted when the
        caller comes back after the last batch of it.

        A caller that closes the generator early keeps the file. Taking rows up twice does no harm:
        the store knows their ids.
        """
        for path in self.files():
            try:
                descriptor = os.open(path, os.O_RDONLY)
            except FileNotFoundError:
                continue
            with os.fdopen(descriptor, "rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue  # somebody writes it, or takes it up
                damaged = yield from _batches(file, size)
                path.unlink(missing_ok=True)
            if damaged:
                yield Batch((), damaged)


def _batches(file: BinaryIO, size: int) -> Generator[Batch, None, int]:
    records: list[QueryRecord] = []
    damaged = 0
    for line in file:
        try:
            records.append(_parse(line))
        except (ValueError, TypeError, KeyError):
            damaged += 1
        if len(records) >= size:
            yield Batch(tuple(records))
            records = []
    if records:
        yield Batch(tuple(records))
    return damaged


def _line(record: QueryRecord) -> bytes:
    values = {f.name: getattr(record, f.name) for f in fields(record)}
    values["started_at"] = record.started_at.isoformat()
    values["citations"] = [{f.name: getattr(c, f.name) for f in fields(c)} for c in record.citations]
    body = json.dumps(
        values, default=float
    ).encode()  # plain ASCII: lone surrogates survive, line breaks are escaped
    return b"%08x %s\n" % (crc32(body), body)


def _parse(line: bytes) -> QueryRecord:
    checksum, _, body = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or int(checksum, 16) != crc32(body):
        raise ValueError("damaged line")
    values: dict[str, Any] = json.loads(body)
    values["started_at"] = datetime.fromisoformat(values["started_at"])
    values["citations"] = tuple(Citation(**c) for c in values["citations"])
    values["signals"] = tuple(values.get("signals", ()))  # lines of an older mogine have none
    return QueryRecord(**values)

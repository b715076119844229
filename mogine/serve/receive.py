"""Files that come in over HTTP: streamed to names of our own, counted, and gone when they have been read."""

import asyncio
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar

from aiohttp import BodyPartReader, MultipartReader, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError

from mogine.errors import RequestError, RequestTimeout, StoreError, TooLarge, UnsupportedMedia
from mogine.ingest.load import clean
from mogine.ingest.loaders.parsed import one_line
from mogine.serve.app import BODY_IDLE_S

MAX_FILES = 20
MAX_NAME_CHARS = 200
_OVERHEAD_BYTES = 64 * 1024
_BLOCK_BYTES = 256 * 1024
_STALE_S = 24 * 3600.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Received:
    """A file that was sent: the name it was given, which is data, and where its bytes are."""

    name: str
    path: Path


@asynccontextmanager
async def received(request: web.Request, folder: Path, max_bytes: int) -> AsyncIterator[list[Received]]:
    """The files of a multipart body, for as long as the context lasts.

    Raises UnsupportedMedia, TooLarge (for a file, or for all of them together), RequestTimeout, RequestError.
    """
    if request.content_type != "multipart/form-data":
        raise UnsupportedMedia("send the documents as multipart/form-data, as `curl -F file=@a.pdf` does")
    if request.headers.get(hdrs.CONTENT_ENCODING, "identity") != "identity":
        raise UnsupportedMedia("send the body uncompressed, without Content-Encoding")
    if (request.content_length or 0) > max_bytes + _OVERHEAD_BYTES:
        raise _too_large(max_bytes)
    own = folder / secrets.token_hex(8)
    try:
        await asyncio.to_thread(_make, own)
        yield await _read_files(request, own, max_bytes)
    except OSError as error:
        if isinstance(error, ConnectionError):
            raise
        raise StoreError(f"{own} cannot be written ({error.strerror})") from error
    finally:
        await asyncio.shield(asyncio.to_thread(shutil.rmtree, own, ignore_errors=True))


def sweep(folder: Path) -> None:
    """Removes what a server that was killed has left behind."""
    if not folder.is_dir():
        return
    for path in folder.iterdir():
        if time.time() - path.stat().st_mtime > _STALE_S:
            shutil.rmtree(path, ignore_errors=True)


async def _read_files(request: web.Request, folder: Path, max_bytes: int) -> list[Received]:
    files: list[Received] = []
    rest = max_bytes
    try:
        reader = await request.multipart()
        while (part := await _soon(reader.next())) is not None:
            name = _checked(part, len(files))
            if name in {file.name for file in files}:
                raise RequestError("two files have the same name; send them one by one", param="filename")
            path = folder / f"{len(files)}"
            rest -= await _save(part, path, rest, max_bytes)
            files.append(Received(name, path))
    except web.HTTPException:
        raise
    except (HttpProcessingError, ValueError, AssertionError, RuntimeError, LookupError) as error:
        # What aiohttp's reader raises for a body that is no multipart one.
        raise RequestError("the body is broken multipart/form-data") from error
    if not files:
        raise RequestError("no file was sent; name it as `curl -F file=@a.pdf` does", param="file")
    return files


def _checked(part: MultipartReader | BodyPartReader, count: int) -> str:
    """The name of a file's part."""
    if isinstance(part, MultipartReader) or not part.filename:
        raise RequestError("each part of the body must be a file with its filename", param="file")
    if count >= MAX_FILES:
        raise TooLarge(f"more than {MAX_FILES} files were sent at once; send them in turns")
    encoding = part.headers.get(hdrs.CONTENT_TRANSFER_ENCODING, "binary").lower()
    if hdrs.CONTENT_ENCODING in part.headers or encoding not in ("binary", "8bit", "7bit"):
        raise UnsupportedMedia("send files as they are, without a content or transfer encoding")
    return file_name(part.filename)


def file_name(given: str) -> str:
    """The last part of a file's name, on one line, without what steers a terminal. Raises RequestError."""
    name = one_line(clean(re.split(r"[/\\]", given)[-1]))
    if not name.strip(". "):
        raise RequestError("the file has no usable name", param="filename")
    suffix = PurePosixPath(name).suffix[:20]
    return name if len(name) <= MAX_NAME_CHARS else name[: MAX_NAME_CHARS - len(suffix)] + suffix


async def _save(part: MultipartReader | BodyPartReader, path: Path, rest: int, max_bytes: int) -> int:
    """The number of bytes."""
    if isinstance(part, MultipartReader):
        raise AssertionError("was checked")
    size = 0
    with await asyncio.to_thread(_create, path) as file:
        while block := await _soon(part.read_chunk(_BLOCK_BYTES)):
            size += len(block)
            if size > rest:
                raise _too_large(max_bytes)
            await asyncio.to_thread(file.write, block)
    return size


async def _soon(coming: Awaitable[T]) -> T:
    try:
        async with asyncio.timeout(BODY_IDLE_S):
            return await coming
    except TimeoutError as error:
        raise RequestTimeout(f"no part of the body came for {BODY_IDLE_S:g} s") from error


def _make(folder: Path) -> None:
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.mkdir(mode=0o700)


def _create(path: Path) -> BinaryIO:
    return path.open("xb")


def _too_large(max_bytes: int) -> TooLarge:
    return TooLarge(f"more than {max_bytes} bytes were sent at once (MOGINE_MAX_UPLOAD_BYTES)")

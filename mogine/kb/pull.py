"""A generation of another machine comes in: what is missing is fetched, checked, and swapped in."""

import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import httpx

from mogine.errors import (
    NotFound,
    SettingsError,
    StoreError,
    UpstreamBadResponse,
    UpstreamRefused,
    UpstreamUnreachable,
)
from mogine.kb.generations import Arrival, Generations, read_manifest
from mogine.kb.manifest import MANIFEST_NAME, Manifest
from mogine.kb.publication import (
    BLOCK_BYTES,
    FileParts,
    Publication,
    block_path,
    blocks_of,
    digest_of,
    keys_of,
)

_AT_ONCE = 4
_CONNECT_S, _SILENCE_S = 5.0, 20.0


# --- where generations come from -----------------------------------------------------------------


class Source(Protocol):
    """Where generations are pulled from; `name` for people."""

    name: str

    def publication(self) -> Publication:
        """What there is to pull now. Raises NotFound, StoreError, UpstreamError."""
        ...

    def block(self, publication: Publication, file: FileParts, number: int) -> bytes:
        """From any thread. Raises NotFound, StoreError, UpstreamError."""
        ...

    def close(self) -> None: ...


class FolderSource:
    """A folder that `publish` writes into, shared or copied."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path

    def publication(self) -> Publication:
        keys = keys_of(self._path)
        if not keys:
            raise NotFound(f"{self.name} holds no generation; `mogine kb publish {self.name}` puts one there")
        try:
            data = (self._path / f"{keys[-1]}.json").read_bytes()
        except OSError as error:
            raise StoreError(
                f"{self.name} is not complete ({error.strerror}); let the copy finish, then pull again"
            ) from error
        return Publication.from_json(data, self.name)

    def block(self, publication: Publication, file: FileParts, number: int) -> bytes:
        try:
            return block_path(self._path, file.blocks[number]).read_bytes()
        except OSError as error:
            raise StoreError(
                f"a block of {file.name} is not in {self.name} ({error.strerror}); nothing was changed. "
                "Let the copy finish, or publish again"
            ) from error

    def close(self) -> None:
        """Nothing is open."""


class ServerSource:
    """The knowledge base server of the machine that writes."""

    def __init__(self, url: str, token: str) -> None:
        self.name = url
        self._client = httpx.Client(
            base_url=url.rstrip("/"),
            timeout=httpx.Timeout(_SILENCE_S, connect=_CONNECT_S),
            headers={"Authorization": f"Bearer {token}"},
            follow_redirects=False,
            trust_env=False,
        )

    def publication(self) -> Publication:
        return Publication.from_json(self._get("/api/kb/publication", {}), self.name)

    def block(self, publication: Publication, file: FileParts, number: int) -> bytes:
        asked: dict[str, str | int] = {
            "generation": publication.generation,
            "file": file.name,
            "number": number,
        }
        return self._get("/api/kb/publication/block", asked)

    def close(self) -> None:
        self._client.close()

    def _get(self, path: str, parameters: Mapping[str, str | int]) -> bytes:
        try:
            response = self._client.get(path, params=parameters)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UpstreamUnreachable(
                f"{self.name} does not answer ({type(error).__name__}); does `mogine serve kb` run there?"
            ) from error
        if response.is_success:
            return response.content
        told = _told(response)
        match response.status_code:
            case 401 | 403:
                raise UpstreamRefused(
                    f"{self.name} refused: {told}; MOGINE_ADMIN_TOKEN here, or --token-file, must be the "
                    "admin token of the machine that writes, and MOGINE_ALLOWED_HOSTS there must name "
                    "its host"
                )
            case 404 if told:
                raise NotFound(f"{self.name}: {told}")
            case status:
                missing = (
                    "does `mogine serve kb` run there?"
                    if status >= 500
                    else "is it mogine's, of this version?"
                )
                said = told or missing
                raise UpstreamBadResponse(f"{self.name} answered {status}: {said}")


def _told(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])[:500]
    except (ValueError, KeyError, TypeError):
        return ""


# --- pulling -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Pulled:
    """What `pull` did: which generation serves, and how much of it came over the wire."""

    generation: str
    manifest: Manifest | None
    size_bytes: int
    fetched_bytes: int

    @property
    def is_new(self) -> bool:
        return self.manifest is not None


def pull(generations: Generations, source: Source, *, embedder: str, is_forced: bool = False) -> Pulled:
    """The generation that `source` offers serves here; nothing is fetched when it does already.

    `embedder` is the name of the one that questions have here, "none" for a search by words. Whatever
    happens on the way, the old generation serves. Raises StoreError (damaged, does not fit), SettingsError
    (this machine cannot search it, or has documents of its own), Locked, NotFound, UpstreamError.
    """
    publication = source.publication()
    if _serves(generations, publication):
        return Pulled(generations.current_name() or "", None, publication.size_bytes, 0)
    if generations.is_own() and not is_forced:
        raise SettingsError(
            f"the documents of generation {generations.current_name()} were taken in on this machine, and "
            "would be replaced: take documents in on one machine only, or say --force"
        )
    with generations.receive() as arrival:
        fetch = _Fetch(source, publication, arrival)
        manifest = fetch.manifest()
        _check_fit(manifest, generations, embedder)
        kept = generations.kept_as(publication.identity)
        if kept is not None:
            arrival.serve(kept)
            return Pulled(kept, manifest, publication.size_bytes, fetch.fetched_bytes)
        try:
            current = generations.current_name()
            fetch.all(generations.folder_of(current) if current else None)
            return Pulled(
                arrival.adopt(publication.generation), manifest, publication.size_bytes, fetch.fetched_bytes
            )
        except OSError as error:
            raise StoreError(
                f"{arrival.folder} cannot be written ({error.strerror or error}); look at the disk's "
                "free space. The knowledge base is as it was before"
            ) from error


def _serves(generations: Generations, publication: Publication) -> bool:
    name = generations.current_name()
    return name is not None and generations.kept_as(publication.identity) == name


def _check_fit(manifest: Manifest, generations: Generations, embedder: str) -> None:
    if manifest.dimensions and embedder not in (manifest.embedder, "none"):
        raise SettingsError(
            f"what was published was made with the embedder {manifest.embedder}, and MOGINE_EMBEDDER here "
            f"means {embedder}: set the same on both machines"
        )
    if manifest.collection and generations.chroma is None:
        raise SettingsError(
            "the vectors of what was published are in a Chroma server: set MOGINE_CHROMA_URL here as on the "
            "machine that writes"
        )


class _Fetch:
    """One generation on its way. Blocks that a file here has are taken from it, the others are fetched."""

    def __init__(self, source: Source, publication: Publication, arrival: Arrival) -> None:
        self._source = source
        self._publication = publication
        self._folder = arrival.folder
        self._rest = arrival.rest
        self._guard = threading.Lock()
        self.fetched_bytes = 0

    def manifest(self) -> Manifest:
        """Comes first, so that nothing else is fetched when it does not fit."""
        file = next(f for f in self._publication.files if f.name == MANIFEST_NAME)
        data = self._block(file, 0)
        try:
            manifest = read_manifest(self._publication.generation, data)
        except (ValueError, TypeError, AttributeError) as error:
            raise StoreError(f"{self._source.name} offers no manifest that can be read ({error})") from error
        (self._folder / MANIFEST_NAME).write_bytes(data)
        return manifest

    def all(self, current: Path | None) -> None:
        """Every other file, whole and checked."""
        known = self._here([folder for folder in (self._rest, current) if folder and folder.is_dir()])
        work = []
        for file in self._publication.files:
            if file.name != MANIFEST_NAME:
                path = self._folder / file.name
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                with path.open("wb") as opened:
                    opened.truncate(file.size_bytes)
                work += [(file, path, number) for number in range(len(file.blocks))]
        pool = ThreadPoolExecutor(_AT_ONCE, "kb-pull")
        try:
            for _ in pool.map(partial(self._place, known), work):
                pass
        finally:
            pool.shutdown(cancel_futures=True)

    def _here(self, folders: Iterable[Path]) -> dict[str, tuple[Path, int]]:
        """Where the wanted blocks are on this machine already: file and offset."""
        wanted = {digest for file in self._publication.files for digest in file.blocks}
        found: dict[str, tuple[Path, int]] = {}
        for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
            with path.open("rb") as file:
                for number, block in enumerate(blocks_of(file.read)):
                    if (digest := digest_of(block)) in wanted:
                        found[digest] = path, number * BLOCK_BYTES
        return found

    def _place(self, known: Mapping[str, tuple[Path, int]], part: tuple[FileParts, Path, int]) -> None:
        file, path, number = part
        digest = file.blocks[number]
        block = _read_at(*known[digest]) if digest in known else b""
        if digest_of(block) != digest:  # not here, or changed since: Chroma writes into its database
            block = self._block(file, number)
        with path.open("r+b") as opened:
            opened.seek(number * BLOCK_BYTES)
            opened.write(block)

    def _block(self, file: FileParts, number: int) -> bytes:
        block = self._source.block(self._publication, file, number)
        if len(block) != file.size_of(number) or digest_of(block) != file.blocks[number]:
            raise StoreError(
                f"{file.name} came damaged from {self._source.name} (block {number}: its SHA-256 is not the "
                "published one); nothing was changed. Pull again; if it stays so, `mogine kb verify` on the "
                "machine that writes, and publish into an empty folder"
            )
        with self._guard:
            self.fetched_bytes += len(block)
        return block


def _read_at(path: Path, offset: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(BLOCK_BYTES)

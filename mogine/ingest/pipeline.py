"""Documents in: find, skip what has not changed, parse, chunk, embed, and let all of it serve at once."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from mogine.errors import MogineError, TooLarge, UnreadableDocument, UnsupportedMedia
from mogine.ingest.chunk import chunk
from mogine.ingest.find import Found, Skipped, find, is_below, read
from mogine.ingest.load import digest_of, kinds
from mogine.ingest.worker import Parser
from mogine.kb.embedders import Embedder, Vectors
from mogine.kb.generations import Draft, Generations
from mogine.kb.passages import Document, Passage

MAX_PASSAGES = 50_000
_EMBED_AT_ONCE = 32
_NOT_TAKEN = (UnreadableDocument, UnsupportedMedia, TooLarge)


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` files are through; `source` is the one that comes next."""

    done: int
    total: int
    source: str
    passages: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did. `generation` is "" where there is none; `passages` counts those written anew.

    `notes` tell of documents that were taken though something in them could not be read; `re_embedded` is
    set when the embedder is another one than last time, so that every passage was embedded again.
    """

    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    unchanged: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    notes: tuple[Skipped, ...] = ()
    passages: int = 0
    generation: str = ""
    documents_in_all: int = 0
    passages_in_all: int = 0
    seconds: float = 0.0
    re_embedded: bool = False

    @property
    def took_anything(self) -> bool:
        """Whether anything that was named is in the knowledge base now, or has left it."""
        return bool(self.added or self.changed or self.unchanged or self.removed)


def ingest(
    paths: Sequence[Path],
    generations: Generations,
    embedder: Embedder,
    *,
    base: Path,
    own: Sequence[Path] = (),
    parser: Parser | None = None,
    on_embedded: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[Progress | Summary, None, None]:
    """Take in all documents below `paths`; the last value is the Summary.

    All or nothing: the new generation serves when every file is through, and a run that is stopped leaves
    the knowledge base as it was. A file that cannot be read is reported, and what was known of it stays.
    Files below `paths` that are gone are taken out. `base` is what sources are relative to, `own` are folders
    of mogine's. `on_embedded` hears how many passages have just been embedded.
    Raises RequestError for a path that is not there, Locked, StoreError, UpstreamError (embedder).
    """
    started = clock()
    found = find(paths, base, own)
    if not found.files:
        skipped = (*_empty_roots(found), *found.skipped)
        yield Summary(skipped=skipped, seconds=clock() - started)
        return
    with (
        parser or Parser() as reader,
        generations.begin(_Batched(embedder, on_embedded or _unheard)) as draft,
    ):
        run = _Run(draft, found, base, reader)
        yield from run.files()
        run.take_out()
        summary = run.summary
        if summary.added or summary.changed or summary.removed or draft.re_embeds:
            summary = replace(summary, re_embedded=draft.re_embeds)
            draft.commit()
        current = generations.current()
        if current is not None:
            summary = replace(
                summary,
                generation=current.name,
                documents_in_all=current.manifest.documents,
                passages_in_all=current.manifest.passages,
            )
    yield replace(summary, seconds=clock() - started)


def _empty_roots(found: Found) -> tuple[Skipped, ...]:
    return tuple(
        Skipped(str(root), f"holds no document ({kinds()}); what was taken from it before stays")
        for root in found.empty_roots
    )


@dataclass
class _Tally:
    """The lists of a Summary while they grow."""

    added: list[str] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    unchanged: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[Skipped] = field(default_factory=list)
    passages: int = 0


class _Run:
    """One ingest into one draft."""

    def __init__(self, draft: Draft, found: Found, base: Path, parser: Parser) -> None:
        self._draft = draft
        self._files = found.files
        self._parser = parser
        self._known = draft.sources()
        self._tally = _Tally(skipped=[*_empty_roots(found), *found.skipped])
        below = [
            source for source in self._known if is_file_source(source) and is_below(source, base, found.roots)
        ]
        self._gone = [source for source in below if not (base / source).is_file()]

    @property
    def summary(self) -> Summary:
        tally = self._tally
        return Summary(
            added=tuple(tally.added),
            changed=tuple(tally.changed),
            unchanged=tuple(tally.unchanged),
            removed=tuple(tally.removed),
            skipped=tuple(sorted(tally.skipped, key=lambda entry: entry.source)),
            notes=tuple(tally.notes),
            passages=tally.passages,
        )

    def files(self) -> Iterator[Progress]:
        """Take file after file."""
        digests = self._digests()
        owners = self._owners(digests)
        for done, (source, digest) in enumerate(digests.items()):
            yield Progress(done, len(digests), source, self._tally.passages)
            if self._known.get(source) == digest:
                self._tally.unchanged.append(source)
            elif owners[digest] != source:
                self._pass_over_copy(source, owners[digest])
            else:
                self._take(source)
        yield Progress(len(digests), len(digests), "", self._tally.passages)

    def take_out(self) -> None:
        """Remove what is gone from the disk."""
        for source in self._gone:
            if self._draft.remove(source):
                self._tally.removed.append(source)

    def _digests(self) -> dict[str, str]:
        digests = {}
        for source, path in self._files.items():
            try:
                digests[source] = digest_of(read(path))
            except _NOT_TAKEN as error:
                self._skip(source, error)
        return digests

    def _owners(self, digests: Mapping[str, str]) -> dict[str, str]:
        """Digest to the one source that stands for it; documents that are known already and stay come first.

        The same text twice would take two places among the passages of an answer.
        """
        gone = set(self._gone)
        staying = {s: d for s, d in self._known.items() if s not in gone and digests.get(s, d) == d}
        owners: dict[str, str] = {}
        for source, digest in (*staying.items(), *digests.items()):
            owners.setdefault(digest, source)
        return owners

    def _pass_over_copy(self, source: str, owner: str) -> None:
        self._tally.skipped.append(Skipped(source, f"has the same content as {owner}"))
        if self._draft.remove(source):
            self._tally.removed.append(source)

    def _take(self, source: str) -> None:
        try:
            document, passages, notes = load(source, read(self._files[source]), self._parser)
        except _NOT_TAKEN as error:
            self._skip(source, error)
            return
        self._draft.replace(document, passages)
        (self._tally.changed if source in self._known else self._tally.added).append(source)
        self._tally.passages += len(passages)
        self._tally.notes += [Skipped(source, note) for note in notes]

    def _skip(self, source: str, error: MogineError) -> None:
        stays = "; the version taken in before stays" if source in self._known else ""
        self._tally.skipped.append(Skipped(source, error.message + stays))


def load(source: str, data: bytes, parser: Parser) -> tuple[Document, list[Passage], tuple[str, ...]]:
    """One document's bytes as Document, passages and notes.

    Raises UnreadableDocument, UnsupportedMedia or TooLarge; messages are said of the document ("is empty").
    """
    parsed = parser.parse(source, data)
    document = Document(source, parsed.title, parsed.text, digest_of(data), parsed.url, parsed.updated)
    passages = chunk(document)
    if not passages:
        raise UnreadableDocument("holds no text")
    if len(passages) > MAX_PASSAGES:
        raise TooLarge(f"gives more than {MAX_PASSAGES:,} passages; split it")
    return document, passages, parsed.notes


def is_file_source(source: str) -> bool:
    """Whether a source is a file's path; uploads and addresses have names of their own (`upload:...`)."""
    return not source.startswith(("upload:", "http://", "https://"))


class _Batched:
    """An embedder that is asked for a little at a time, so that progress shows and Ctrl-C loses little."""

    def __init__(self, inner: Embedder, heard: Callable[[int], None]) -> None:
        self._inner = inner
        self._heard = heard

    @property
    def name(self) -> str:
        return self._inner.name

    @property
    def dimensions(self) -> int:
        return self._inner.dimensions

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        rows = []
        for start in range(0, len(texts), _EMBED_AT_ONCE):
            batch = texts[start : start + _EMBED_AT_ONCE]
            rows.append(self._inner.embed_passages(batch))
            self._heard(len(batch))
        return np.concatenate(rows) if rows else self._inner.embed_passages([])

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        return self._inner.embed_questions(texts)

    def warm(self) -> None:
        self._inner.warm()

    def close(self) -> None:
        self._inner.close()


def _unheard(count: int) -> None:
    """Nobody wants to know."""

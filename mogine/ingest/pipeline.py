"""Documents in: find, skip what has not changed, parse, chunk, embed, test, and let all of it serve."""

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mogine.errors import MogineError, NotFound, UnreadableDocument
from mogine.ingest.find import Found, Gone, Page, Skipped, find, is_below, read
from mogine.ingest.load import digest_of, kinds
from mogine.ingest.readahead import NOT_TAKEN, Item, Loaded, Readers
from mogine.ingest.seen import Seen
from mogine.ingest.worker import Parser
from mogine.kb.draft import Draft
from mogine.kb.embedders import Embedder, Vectors
from mogine.kb.gate import GateMode, KbTest, Verdict, weigh
from mogine.kb.generations import Generations
from mogine.kb.passages import Document, Passage

if TYPE_CHECKING:
    from mogine.ingest.web import Web

_EMBED_AT_ONCE = 32
SEEN_NAME = "files.db"


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` are through; `source` is the one that comes next."""

    done: int
    total: int
    source: str
    passages: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What a run did. `generation` is "" where there is none; `passages` counts those written anew.

    `notes` tell of documents that were taken though something in them could not be read; `re_embedded` is
    set when the embedder is another one than last time, so that every passage was embedded again. `verdict`
    is what the tests said, None when none were asked.
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
    verdict: Verdict | None = None

    @property
    def took_anything(self) -> bool:
        """Whether anything that was named is in the knowledge base now, or has left it."""
        return bool(self.added or self.changed or self.unchanged or self.removed)

    @property
    def changes_anything(self) -> bool:
        return bool(self.added or self.changed or self.removed or self.re_embedded)

    @property
    def is_held_back(self) -> bool:
        """Whether the gate kept the old generation in place."""
        return self.verdict is not None and not self.verdict.may_serve


@dataclass(frozen=True, slots=True)
class Gate:
    """The tests that a new generation is asked before it serves, and how much they may say."""

    tests: tuple[KbTest, ...]
    mode: GateMode = "warn"


def ingest(
    paths: Sequence[Path],
    generations: Generations,
    embedder: Embedder,
    *,
    base: Path,
    own: Sequence[Path] = (),
    urls: Sequence[str] = (),
    web: "Web | None" = None,
    gate: Gate | None = None,
    jobs: int = 1,
    is_dry_run: bool = False,
    seen_path: Path | None = None,
    parser: Parser | None = None,
    on_embedded: Callable[[int], None] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Generator[Progress | Summary, None, None]:
    """Take in all documents below `paths` and at `urls`; the last value is the Summary.

    All or nothing: the new generation serves when everything is through, and a run that is stopped leaves
    the knowledge base as it was. A file that cannot be read is reported, and what was known of it stays.
    Files below `paths` that are gone are taken out. `base` is what sources are relative to, `own` are folders
    of mogine's. `seen_path` is where it is remembered which files have been hashed. `on_embedded` hears how
    many passages have just been embedded. A dry run reads and cuts, and writes nothing at all.
    Raises RequestError for a path that is not there, Locked, StoreError, UpstreamError (embedder).
    """
    started = clock()
    found = find(paths, base, own)
    if not found.files and not urls:
        skipped = (*_empty_roots(found), *found.skipped)
        yield Summary(skipped=skipped, seconds=clock() - started)
        return
    seen = Seen(seen_path) if seen_path else None
    with Readers(jobs, parser) as readers:
        if is_dry_run:
            current = generations.current()
            run = _Run(_Pretence(generations), found, base, readers, seen)
            yield from run.all(urls, web)
            summary = replace(run.summary, generation=current.name if current else "")
        else:
            with generations.begin(_Batched(embedder, on_embedded or _unheard)) as draft:
                run = _Run(draft, found, base, readers, seen)
                yield from run.all(urls, web)
                if seen:
                    seen.save(run.summary.removed)
                summary = publish(run.summary, draft, generations, embedder, gate)
    yield replace(summary, seconds=clock() - started)


def publish(
    summary: Summary, draft: Draft, generations: Generations, embedder: Embedder, gate: Gate | None
) -> Summary:
    """Lets the draft serve when anything has changed and the tests agree; tells what came of it."""
    if summary.added or summary.changed or summary.removed or draft.renews:
        summary = replace(summary, re_embedded=draft.re_embeds)
        if gate and gate.tests and gate.mode != "off" and (candidate := draft.finish()):
            current = generations.current()
            summary = replace(summary, verdict=weigh(current, candidate, embedder, gate.tests, gate.mode))
        if not summary.is_held_back:
            draft.commit()
    current = generations.current()
    if current is None:
        return summary
    return replace(
        summary,
        generation=current.name,
        documents_in_all=current.manifest.documents,
        passages_in_all=current.manifest.passages,
    )


def _empty_roots(found: Found) -> tuple[Skipped, ...]:
    return tuple(
        Skipped(str(root), f"holds no document ({kinds()}); what was taken from it before stays")
        for root in found.empty_roots
    )


class _Target(Protocol):
    """What a run changes: a draft, or in a dry run nothing."""

    def sources(self) -> dict[str, str]: ...

    def replace(self, document: Document, passages: Sequence[Passage]) -> None: ...

    def remove(self, source: str) -> bool: ...


class _Pretence:
    """Takes changes and forgets them."""

    def __init__(self, generations: Generations) -> None:
        self._known = generations.sources()

    def sources(self) -> dict[str, str]:
        return dict(self._known)

    def replace(self, document: Document, passages: Sequence[Passage]) -> None:
        self._known[document.source] = document.digest

    def remove(self, source: str) -> bool:
        return self._known.pop(source, None) is not None


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

    def take(self, given: Loaded, *, is_new: bool) -> None:
        """Counts a document that was written."""
        source = given.document.source
        (self.added if is_new else self.changed).append(source)
        self.passages += len(given.passages)
        self.notes += [Skipped(source, note) for note in given.notes]

    @property
    def summary(self) -> Summary:
        return Summary(
            added=tuple(self.added),
            changed=tuple(self.changed),
            unchanged=tuple(self.unchanged),
            removed=tuple(self.removed),
            skipped=tuple(sorted(self.skipped, key=lambda entry: entry.source)),
            notes=tuple(self.notes),
            passages=self.passages,
        )


class _Run:
    """One ingest into one target."""

    def __init__(
        self, target: _Target, found: Found, base: Path, readers: Readers, seen: Seen | None
    ) -> None:
        self._target = target
        self._files = found.files
        self._readers = readers
        self._seen = seen
        self._known = target.sources()
        self._tally = _Tally(skipped=[*_empty_roots(found), *found.skipped])
        below = [
            source for source in self._known if is_file_source(source) and is_below(source, base, found.roots)
        ]
        self._gone = [source for source in below if not (base / source).is_file()]

    @property
    def summary(self) -> Summary:
        return self._tally.summary

    def all(self, urls: Sequence[str], web: "Web | None") -> Iterator[Progress]:
        """Files, then addresses, then what is gone."""
        yield from self.files()
        if urls and web:
            yield from self.pages(urls, web)
        for source in self._gone:
            self._remove(source)

    def files(self) -> Iterator[Progress]:
        """Take file after file."""
        digests = self._digests()
        owners = self._owners(digests)
        to_read: list[Item] = []
        for source, digest in digests.items():
            if self._known.get(source) == digest:
                self._tally.unchanged.append(source)
            elif owners[digest] != source:
                self._pass_over_copy(source, owners[digest])
            else:
                to_read.append(Item(source, source, partial(read, self._files[source])))
        through = len(digests) - len(to_read)
        if to_read:
            yield Progress(through, len(digests), to_read[0].source, self._tally.passages)
        for number, (item, given) in enumerate(self._readers.read(to_read), start=1):
            self._take(item, given)
            ahead = to_read[number].source if number < len(to_read) else ""
            yield Progress(through + number, len(digests), ahead, self._tally.passages)
        if not to_read:
            yield Progress(through, len(digests), "", self._tally.passages)

    def pages(self, urls: Sequence[str], web: "Web") -> Iterator[Progress]:
        """Take page after page, as the site's rules allow."""
        for done, (total, came) in enumerate(web.pages(urls)):
            at = came.source if isinstance(came, Skipped) else came.url
            yield Progress(done, total, at, self._tally.passages)
            match came:
                case Page():
                    self._take_page(came)
                case Gone():
                    self._tally.skipped.append(Skipped(came.url, came.reason))
                    self._remove(came.url)
                case Skipped():
                    stays = "; the version taken in before stays" if came.source in self._known else ""
                    self._tally.skipped.append(Skipped(came.source, came.reason + stays))

    def _take_page(self, page: Page) -> None:
        digest = digest_of(page.data)
        twin = next((s for s, d in self._target.sources().items() if d == digest and s != page.url), None)
        if self._known.get(page.url) == digest:
            self._tally.unchanged.append(page.url)
        elif twin is not None:
            self._pass_over_copy(page.url, twin)
        else:
            item = Item(page.url, page.name, lambda: page.data, page.url)
            for _, given in self._readers.read([item]):
                self._take(item, given)

    def _digests(self) -> dict[str, str]:
        digests = {}
        for source, path in self._files.items():
            try:
                digests[source] = self._seen.digest(source, path) if self._seen else digest_of(read(path))
            except NOT_TAKEN as error:
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
        self._remove(source)

    def _take(self, item: Item, given: Loaded | MogineError) -> None:
        if isinstance(given, MogineError):
            self._skip(item.source, given)
            return
        self._target.replace(given.document, given.passages)
        self._tally.take(given, is_new=item.source not in self._known)

    def _remove(self, source: str) -> None:
        if self._target.remove(source):
            self._tally.removed.append(source)

    def _skip(self, source: str, error: MogineError) -> None:
        stays = "; the version taken in before stays" if source in self._known else ""
        self._tally.skipped.append(Skipped(source, error.message + stays))


# --- one by one, for the server ------------------------------------------------------------------


def take_uploads(
    items: Sequence[Item], generations: Generations, embedder: Embedder, *, gate: Gate | None = None
) -> Summary:
    """Take in what was sent: all of it or, when one of it cannot be read, nothing.

    Raises UnreadableDocument, UnsupportedMedia or TooLarge that name the document, Locked, StoreError.
    """
    tally = _Tally()
    with Readers() as readers, generations.begin(embedder) as draft:
        known = draft.sources()
        by_digest = {digest: source for source, digest in known.items()}
        for item, given in readers.read(items):
            name = item.name
            if isinstance(given, MogineError):
                raise type(given)(f"{name} {given.message}")
            digest = given.document.digest
            if known.get(item.source) == digest:
                tally.unchanged.append(item.source)
                continue
            if (owner := by_digest.setdefault(digest, item.source)) != item.source:
                raise UnreadableDocument(f"{name} has the same content as {owner}; remove that one first")
            draft.replace(given.document, given.passages)
            tally.take(given, is_new=item.source not in known)
        return publish(tally.summary, draft, generations, embedder, gate)


def take_out(
    sources: Sequence[str], generations: Generations, embedder: Embedder, *, gate: Gate | None = None
) -> Summary:
    """Take documents out. Raises NotFound when none of `sources` is there, Locked, StoreError."""
    with generations.begin(embedder) as draft:
        removed = tuple(source for source in dict.fromkeys(sources) if draft.remove(source))
        if not removed:
            raise NotFound("there is no such document any more")
        return publish(Summary(removed=removed), draft, generations, embedder, gate)


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

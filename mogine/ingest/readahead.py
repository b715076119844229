"""Documents parsed ahead of their turn, in a few child processes, while those before them are embedded."""

import queue
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from mogine.errors import MogineError, TooLarge, UnreadableDocument, UnsupportedMedia
from mogine.ingest.chunk import chunk
from mogine.ingest.load import digest_of
from mogine.ingest.worker import Parser
from mogine.kb.passages import Document, Passage

MAX_PASSAGES = 50_000
NOT_TAKEN = (UnreadableDocument, UnsupportedMedia, TooLarge)


@dataclass(frozen=True, slots=True)
class Item:
    """Something to take in: under which source, by which name, and how to get its bytes.

    `url` is where it was fetched from; it wins over what the document says of itself.
    """

    source: str
    name: str
    read: Callable[[], bytes]
    url: str = ""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A document, cut; `notes` tell what of it could not be read."""

    document: Document
    passages: list[Passage]
    notes: tuple[str, ...]


class Readers:
    """`jobs` parsers, each with a thread; the children start when there is work for them."""

    def __init__(self, jobs: int = 1, parser: Parser | None = None) -> None:
        self._parsers = [parser or Parser(), *(Parser() for _ in range(jobs - 1))]
        self._idle: queue.LifoQueue[Parser] = queue.LifoQueue()
        for each in reversed(self._parsers):
            self._idle.put(each)
        self._threads = ThreadPoolExecutor(jobs, "read-ahead")
        self._ahead = 2 * jobs
        self._is_ending = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_ending = True
        for parser in self._parsers:
            parser.abort()
        self._threads.shutdown(cancel_futures=True)
        for parser in self._parsers:
            parser.close()

    def read(self, items: Iterable[Item]) -> Iterator[tuple[Item, Loaded | MogineError]]:
        """Each item with what it gave, or with why it gives nothing; in their order."""
        waiting: deque[tuple[Item, Future[Loaded | MogineError]]] = deque()
        for item in items:
            waiting.append((item, self._threads.submit(self._load, item)))
            if len(waiting) > self._ahead:
                first, future = waiting.popleft()
                yield first, future.result()
        while waiting:
            first, future = waiting.popleft()
            yield first, future.result()

    def _load(self, item: Item) -> Loaded | MogineError:
        parser = self._idle.get()
        try:
            if self._is_ending:
                return UnreadableDocument("was not read, because the run is ending")
            return load(item.source, item.read(), parser, name=item.name, url=item.url)
        except NOT_TAKEN as error:
            return error
        finally:
            self._idle.put(parser)


def load(source: str, data: bytes, parser: Parser, *, name: str = "", url: str = "") -> Loaded:
    """One document's bytes, parsed and cut.

    Raises UnreadableDocument, UnsupportedMedia or TooLarge; messages are said of the document ("is empty").
    """
    parsed = parser.parse(name or source, data)
    document = Document(source, parsed.title, parsed.text, digest_of(data), url or parsed.url, parsed.updated)
    passages = chunk(document)
    if not passages:
        raise UnreadableDocument("holds no text")
    if len(passages) > MAX_PASSAGES:
        raise TooLarge(f"gives more than {MAX_PASSAGES:,} passages; split it")
    return Loaded(document, passages, parsed.notes)

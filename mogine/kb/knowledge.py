"""The read side of one generation: finds passages by meaning and by words, and adds both up."""

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import replace
from typing import Literal, get_args

from mogine.errors import RequestError, Unavailable
from mogine.kb.catalogue import Catalogue
from mogine.kb.chroma import Collection
from mogine.kb.embedders import Embedder, NoEmbedder
from mogine.kb.lexical import LexicalIndex, shares_of_words
from mogine.kb.manifest import Generation
from mogine.kb.passages import Hit, Language, Passage, StoredDocument, language
from mogine.kb.rounded import RoundedVectors
from mogine.kb.texts import MAX_READERS, Readers

Mode = Literal["hybrid", "vector", "keyword"]
MODES: tuple[Mode, ...] = get_args(Mode)

# Of each index. With more, nothing gets better; with 20, answers in the other language get lost.
_CANDIDATES = 50
# A share counts by its root, so that a few words in common already say something, times this.
_LEXICAL_WEIGHT = 0.6
# The share that a passage in the other language is lent at most, for words that it cannot have in common
# with the question: as much as the best of the others, while none of them has many of the question's words.
_LENT_AT_MOST = 0.15
# And it is lent only to one whose cosine comes that near to the best of the question's own language: to what
# may be the answer, not to everything that is written in the other language.
_LENT_WITHIN = 0.1
# The best are looked at once more: which of them has those of the question's words that tell them apart.
_LOOKED_AT_AGAIN = 20
_WORDS_WEIGHT = 0.1
# So much a passage in the other language must be ahead to come before one in the question's language: what is
# lent is a guess, and of two equals a visitor wants the one that he can read.
_OTHER_LANGUAGE_BEHIND = 0.005


def _always() -> bool:
    return True


def _go_on(is_wanted: Callable[[], bool]) -> None:
    if not is_wanted():
        raise CancelledError


class KnowledgeBase:
    """One generation, open for reading by any number of threads until `close`.

    Raises Unavailable (kb_unavailable) when the generation's vectors are another embedder's.
    """

    def __init__(self, generation: Generation, embedder: Embedder, *, readers: int = MAX_READERS) -> None:
        manifest = generation.manifest
        if embedder.name not in (manifest.embedder, NoEmbedder.name):
            raise Unavailable(
                f"the knowledge base was made with the embedder {manifest.embedder}, and MOGINE_EMBEDDER now "
                f"means {embedder.name}: run `mogine kb ingest` to embed it anew, or set it back",
                reason="kb_unavailable",
            )
        self.generation = generation
        self._embedder = embedder
        self._readers = Readers(generation.path, readers)
        try:
            has_vectors = manifest.dimensions > 0 and embedder.name != NoEmbedder.name
            self._vectors = generation.open_vectors() if has_vectors else None
        except BaseException:
            self._readers.close()
            raise
        self._catalogue = Catalogue(self._readers)
        self._lexical = LexicalIndex(self._readers, manifest.passages)
        self._rounded = RoundedVectors(self._readers)

    @property
    def name(self) -> str:
        """The generation's."""
        return self.generation.name

    @property
    def problem(self) -> str:
        """Why the vectors cannot be asked, when a Chroma server has them; "" when they can."""
        return self._vectors.problem if isinstance(self._vectors, Collection) else ""

    def look_again(self) -> None:
        """Finds out whether a Chroma server that failed is back. Raises Unavailable when it is not."""
        if isinstance(self._vectors, Collection):
            self._vectors.look_again()

    def warm(self) -> None:
        """Pays now what the first search would pay: the index is read from disk. Raises Unavailable when a
        Chroma server has it and does not answer; searches by words work all the same.
        """
        self._lexical.search("mogine", 1)
        if self._vectors:
            self._vectors.warm(self.generation.manifest.dimensions)

    def search(
        self, query: str, top_k: int = 3, mode: Mode = "hybrid", *, is_wanted: Callable[[], bool] = _always
    ) -> list[Hit]:
        """The best passages, best first; scores lie in 0-1 and compare within a mode.

        Ends with CancelledError as soon as `is_wanted` says no; it is asked between the steps.
        Without vectors `hybrid` is `keyword`, and `vector` is refused. Raises RequestError, StoreError,
        UpstreamError when an embedder elsewhere fails, Unavailable when a Chroma server does.
        """
        _go_on(is_wanted)
        languages: Mapping[int, Language] | None = None
        if mode == "vector" and self._vectors is None:
            raise RequestError("this knowledge base has no vectors (MOGINE_EMBEDDER=none)", param="mode")
        if mode == "keyword" or self._vectors is None:
            scores = self._lexical.search(query, top_k)
        else:
            vector = self._embedder.embed_questions([query])[0]
            _go_on(is_wanted)
            nearest = self._vectors.search(vector, max(top_k, _CANDIDATES))
            if mode == "vector":
                scores = {number: max(0.0, cosine) for number, cosine in nearest.items()}
            else:
                _go_on(is_wanted)
                shares = self._lexical.search(query, max(top_k, _CANDIDATES))
                _go_on(is_wanted)
                missing = [number for number in shares if number not in nearest]
                known = self._rounded if self._rounded.exist else self._vectors
                cosines = {**nearest, **known.cosines(vector, missing)}
                languages = self._catalogue.languages(list(cosines))
                scores = _fuse(query, cosines, shares, languages)
        best = sorted(scores, key=lambda number: (-scores[number], number))
        best = best[: top_k if languages is None else max(top_k, _LOOKED_AT_AGAIN)]
        passages = self._catalogue.passages(best)
        hits = [Hit(passages[number], min(1.0, max(0.0, scores[number]))) for number in best]
        if languages is not None:
            hits = _told_apart(query, hits, [languages[number] for number in best])
        return hits[:top_k]

    def documents(self) -> list[StoredDocument]:
        return self._catalogue.documents()

    def document(self, id: str) -> StoredDocument:
        """Raises NotFound."""
        return self._catalogue.document(id)

    def passages_of(self, id: str) -> list[Passage]:
        """A document's passages in their order. Raises NotFound."""
        return self._catalogue.passages_of(id)

    def close(self) -> None:
        """Only after the last search has ended."""
        self._readers.close()
        if self._vectors:
            self._vectors.close()


def _fuse(
    query: str, cosines: Mapping[int, float], shares: Mapping[int, float], languages: Mapping[int, Language]
) -> dict[int, float]:
    """Cosine and the root of the lexical share, weighted; a perfect match has 1.

    By score and not by rank: reciprocal rank fusion loses 9 points of nDCG and nearly all answers in
    the other language. Those share no words with the question, so they are lent what the best has, but
    only so much that a passage that clearly matches in the question's own language comes first.
    """
    asked = language(query)
    lent = min(_LENT_AT_MOST, max(shares.values(), default=0.0))
    own = (cosine for number, cosine in cosines.items() if languages[number] == asked)
    near = max(own, default=-1.0) - _LENT_WITHIN
    return {
        number: (cosine + _LEXICAL_WEIGHT * math.sqrt(share)) / (1 + _LEXICAL_WEIGHT)
        for number, cosine in cosines.items()
        for is_lent in [languages[number] != asked and cosine >= near]
        for share in [max(shares.get(number, 0.0), lent if is_lent else 0.0)]
    }


def _told_apart(query: str, hits: Sequence[Hit], languages: Sequence[Language]) -> list[Hit]:
    """The hits in a better order. The scores stay where they are: what is noise was measured on them."""
    first = hits[:_LOOKED_AT_AGAIN]
    asked = language(query)
    is_own = [written == asked for written in languages[: len(first)]]
    shares = shares_of_words(query, [hit.passage.searchable for hit in first])
    of_own = [share for share, own in zip(shares, is_own, strict=True) if own]
    # It cannot have the question's words: it keeps its distance to the others on average.
    lent = sum(of_own) / len(of_own) if of_own else 0.0
    weighed = [
        hit.score
        + (_WORDS_WEIGHT * share if own else _WORDS_WEIGHT * max(share, lent) - _OTHER_LANGUAGE_BEHIND)
        for hit, share, own in zip(first, shares, is_own, strict=True)
    ]
    order = sorted(range(len(first)), key=lambda index: -weighed[index])
    return [
        *(replace(hit, passage=first[index].passage) for hit, index in zip(first, order, strict=True)),
        *hits[_LOOKED_AT_AGAIN:],
    ]

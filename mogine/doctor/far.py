"""What other machines keep for this one, and whether they do."""

from collections.abc import Iterator
from contextlib import closing

from mogine.doctor.line import Line, error, ok
from mogine.errors import MogineError, Unavailable
from mogine.kb.chroma import Chroma, ChromaServer, Collection
from mogine.kb.generations import Generations
from mogine.settings import Settings

PATIENCE_S = 5.0


def chroma(s: Settings) -> Iterator[Line]:
    """The Chroma server answers, and has the vectors of the generation that serves."""
    server = Chroma.of(s.kb)
    if server is None:
        return
    try:
        with closing(ChromaServer(server, PATIENCE_S)) as asked:
            words = f"{s.kb.chroma_url} answers (version {asked.version()})"
    except Unavailable as problem:
        start = (
            "start it (`chroma run --path FOLDER`) or correct MOGINE_CHROMA_URL; words are searched meanwhile"
        )
        yield error("chroma", f"{s.kb.chroma_url}: {problem.message}", start)
        return
    try:
        generation = Generations.of(s).current()
    except MogineError:
        generation = None  # told by the line about the knowledge base
    if generation is None or not generation.manifest.collection:
        fix = "" if generation is None else "; the next `mogine kb ingest` moves the vectors there"
        yield ok("chroma", words + fix)
        return
    wanted = generation.manifest.passages
    fill = "`mogine kb ingest ./docs` fills it again from the cache, on the machine that writes"
    try:
        with closing(Collection(server, generation.manifest.collection, timeout_s=PATIENCE_S)) as collection:
            count = collection.count()
    except Unavailable as problem:
        yield error("chroma", f"{words}: {problem.message}", fill)
        return
    if count != wanted:
        yield error("chroma", f"{words}, and has {count} of {wanted} vectors of {generation.name}", fill)
    else:
        yield ok("chroma", f"{words}: {count} of {wanted} vectors of {generation.name}")

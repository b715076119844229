"""Answers without a model: the best passages, quoted with their numbers, or a plain word of regret."""

import re
from collections.abc import AsyncGenerator

from mogine.chat import ChatEvent, ChatRequest, Chunk, Citation, Delta, Finish, Usage

MAX_QUOTED = 3
MAX_QUOTE_CHARS = 360
WORTH_QUOTING = 0.6  # of the best passage's score
# A passage in the reader's own language is quoted before others with up to this much more of the score.
OWN_LANGUAGE = 0.75

HAN = re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
OTHER_WORD = re.compile(r"[A-Za-z\u00c0-\u024f]+")
SENTENCE = re.compile(r"[^\n。！？!?；;]*?(?:[。！？!?；;]+[”’」』）)\"']*|\.(?=\s|$)|\n|$)")

WORDS = {
    "zh": {
        "head": "以下是资料中与您的问题最相关的原文（直接引用，未经模型加工）：",
        "none": "资料中没有找到与这个问题相关的内容。请换一种说法再试，或直接联系我们。",
        "from": "—— 《{title}》",
    },
    "en": {
        "head": "The passages of our documents closest to your question (quoted, without a language model):",
        "none": (
            "Nothing about this was found in our documents. Please try other words, or contact us directly."
        ),
        "from": "— {title}",
    },
}


class ExtractProvider:
    """The provider `extract`: needs no key and no network."""

    @property
    def name(self) -> str:
        return "extract"

    @property
    def default_model(self) -> str:
        return "extract"

    @property
    def dialect(self) -> str:
        return ""

    async def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        """The answer paragraph by paragraph; see `mogine.chat.Provider`."""
        pieces: list[ChatEvent] = [Delta(text) for text in paragraphs(request.question, request.citations)]
        events = (*pieces, Usage(prompt_tokens=0, completion_tokens=0), Finish("stop", "extract"))
        if not request.stream:
            yield Chunk(events=events)
            return
        for event in events:
            yield Chunk(events=(event,))


def paragraphs(question: str, citations: tuple[Citation, ...]) -> list[str]:
    """The answer to `question` out of `citations`, in the question's language."""
    words = WORDS["zh" if HAN.search(question) else "en"]
    quoted = _best(question, citations)
    if not quoted:
        return [words["none"]]
    wanted = _terms(question)
    return [words["head"], *(_quote(citation, wanted, words["from"]) for citation in quoted)]


def _best(question: str, citations: tuple[Citation, ...]) -> list[Citation]:
    """The few that are worth quoting; none in another language when the question's own has the answer too."""
    usable = sorted((c for c in citations if c.excerpt.strip()), key=lambda c: (-c.score, c.number))
    if not usable:
        return []
    own = [c for c in usable if _is_chinese(c.excerpt) == _is_chinese(question)]
    if own and own[0].score >= usable[0].score * OWN_LANGUAGE:
        usable = own
    least = usable[0].score * WORTH_QUOTING
    return [c for c in usable if c.score >= least][:MAX_QUOTED]


def _is_chinese(text: str) -> bool:
    """At least as many Han characters as words of other scripts."""
    han = sum(1 for _ in HAN.finditer(text))
    return bool(han) and han >= sum(1 for _ in OTHER_WORD.finditer(text))


def _quote(citation: Citation, wanted: frozenset[str], source: str) -> str:
    lines = [line.strip() for line in _window(citation.excerpt, wanted).splitlines() if line.strip()]
    title = citation.title or citation.source
    if citation.heading and citation.heading != title:
        title = f"{title} · {citation.heading}" if title else citation.heading
    lines[-1] += f" [{citation.number}]"
    if title:
        lines.append(source.format(title=" ".join(title.split())))
    return "\n\n" + "\n".join(f"> {line}" for line in lines)


def _window(text: str, wanted: frozenset[str]) -> str:
    """`text` if it is short, else its sentences around the one that shares most with the question."""
    text = text.strip()
    if len(text) <= MAX_QUOTE_CHARS:
        return text
    sentences = [match[0] for match in SENTENCE.finditer(text) if match[0]]
    shares = [len(wanted & _terms(sentence)) for sentence in sentences]
    begin = shares.index(max(shares))
    end = begin + 1
    size = len(sentences[begin])
    while end < len(sentences) and size + len(sentences[end]) <= MAX_QUOTE_CHARS:
        size += len(sentences[end])
        end += 1
    while begin and size + len(sentences[begin - 1]) <= MAX_QUOTE_CHARS:
        begin -= 1
        size += len(sentences[begin])
    window = "".join(sentences[begin:end]).strip()
    cut = window[:MAX_QUOTE_CHARS].rstrip()
    before = "…" if begin else ""
    after = "…" if end < len(sentences) or len(cut) < len(window) else ""
    return f"{before}{cut}{after}"


def _terms(text: str) -> frozenset[str]:
    """Words of letters and digits, and pairs of Chinese characters."""
    lowered = text.lower()
    words = re.findall(r"[a-z0-9]{2,}", lowered)
    runs = re.findall(rf"(?:{HAN.pattern})+", lowered)
    pairs = [run[i : i + 2] for run in runs for i in range(max(1, len(run) - 1))]
    return frozenset((*words, *pairs))

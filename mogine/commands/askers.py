"""Whom `mogine chat` asks: a provider directly, after a search in the home's own knowledge base."""

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mogine.answer import AnswerEvent, Manner, Retriever, answer
from mogine.chat import ChatMessage, ChatRequest, Provider
from mogine.commands.console import safe_line
from mogine.errors import MogineError, SettingsError
from mogine.kb.passages import Hit
from mogine.providers.registry import open_providers
from mogine.settings import PROVIDER_NAMES, Settings, load_site

if TYPE_CHECKING:
    from mogine.kb.knowledge import KnowledgeBase

MISSING = {
    "doubao": "DOUBAO_API_KEY is not set",
    "dashscope": "DASHSCOPE_API_KEY and DASHSCOPE_APP_ID must both be set",
    "openai": "OPENAI_BASE_URL and OPENAI_MODEL must both be set",
}


class Asker(Protocol):
    """Whoever answers.

    `label` says who that is, `notes` gathers what the owner should know, `session_id` is what a server
    knows the conversation by.
    """

    label: str
    notes: list[str]
    session_id: str

    def ask(self, messages: Sequence[ChatMessage]) -> AsyncGenerator[AnswerEvent, None]:
        """The answer to the last message, as it comes."""
        ...

    def choose(self, provider: str) -> None:
        """From now on `provider` answers. Raises SettingsError."""
        ...

    def forget(self) -> None:
        """A new conversation begins."""
        ...


@dataclass(frozen=True, slots=True)
class _Found:
    hits: Sequence[Hit]


class LocalKnowledge:
    """The home's knowledge base, read in this process; notes what goes wrong, which `answer` skips."""

    def __init__(self, base: "KnowledgeBase", notes: list[str]) -> None:
        self._base = base
        self._notes = notes
        self._lock = threading.Lock()

    async def search(self, query: str, top_k: int) -> _Found:
        """In a thread: the first search loads the model, and Ctrl-C must not wait for it."""
        try:
            return _Found(await asyncio.to_thread(self._search, query, top_k))
        except MogineError as error:
            self._notes.append(f"answered without the knowledge base: {error.message}")
            raise

    def close(self) -> None:
        """Waits for a search that Ctrl-C left behind: what it reads must stay open until then."""
        with self._lock:
            self._base.close()

    def _search(self, query: str, top_k: int) -> list[Hit]:
        with self._lock:
            return self._base.search(query, top_k)


class DirectAsker:
    """Asks one provider after searching the knowledge base here."""

    def __init__(
        self,
        settings: Settings,
        providers: Mapping[str, Provider],
        knowledge: Retriever | None,
        provider: str,
        model: str | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self._settings = settings
        self._providers = providers
        self._knowledge = knowledge
        site = load_site(settings.home / "site.toml")
        self._manner = Manner.of(site, top_k=settings.proxy.kb_top_k)
        self.notes = [] if notes is None else notes
        self.session_id = ""
        self.choose(provider, model)

    def choose(self, provider: str, model: str | None = None) -> None:
        require_credentials(self._settings, provider)
        if model and provider == "extract":
            raise SettingsError("--model says nothing to extract: it answers without a model")
        self._provider = self._providers[provider]
        self._model = model or self._provider.default_model
        named = f" ({self._model})" if self._model not in ("", provider) else ""
        self.label = f"{provider}{named}"

    def forget(self) -> None:
        """Nothing is remembered here: every question brings its conversation along."""

    async def ask(self, messages: Sequence[ChatMessage]) -> AsyncGenerator[AnswerEvent, None]:
        request = ChatRequest(
            tuple(messages),
            self._provider.name,
            self._model,
            max_tokens=self._settings.proxy.max_output_tokens,
        )
        async with aclosing(answer(request, [self._provider], self._knowledge, self._manner)) as events:
            async for event in events:
                yield event


def require_known(provider: str) -> None:
    """Raises SettingsError that names the providers there are."""
    if provider not in PROVIDER_NAMES:
        known = ", ".join(PROVIDER_NAMES)
        raise SettingsError(f"there is no provider {safe_line(provider, 60)}; there are {known}")


def require_credentials(settings: Settings, provider: str) -> None:
    """Raises SettingsError that names what is missing and how to try without it."""
    require_known(provider)
    if not settings.has_credentials(provider):
        raise SettingsError(
            f"{provider} cannot be asked: {MISSING[provider]}. Put it into {settings.home / '.env'}, "
            "or try without a key: mogine chat --provider extract"
        )


@asynccontextmanager
async def open_direct(
    settings: Settings, provider: str, model: str | None, *, kb: bool
) -> AsyncIterator[DirectAsker]:
    """A DirectAsker; without a knowledge base that can be read it answers without, and says so."""
    require_credentials(settings, provider)
    async with AsyncExitStack() as stack:
        providers = await stack.enter_async_context(open_providers(settings))
        knowledge: LocalKnowledge | None = None
        notes: list[str] = []
        if kb:
            try:
                if base := _open_knowledge(settings):
                    knowledge = LocalKnowledge(base, notes)
                    stack.callback(knowledge.close)
                else:
                    notes.append("there is no knowledge base yet: `mogine kb ingest ./docs` makes one")
            except MogineError as error:
                notes.append(f"answering without the knowledge base: {error.message}")
        yield DirectAsker(settings, providers, knowledge, provider, model, notes)


def _open_knowledge(settings: Settings) -> "KnowledgeBase | None":
    # Imported here: a chat without a knowledge base shall not wait for numpy and what else it brings.
    from mogine.kb.embedders import open_embedder
    from mogine.kb.generations import Generations
    from mogine.kb.knowledge import KnowledgeBase

    generation = Generations.of(settings).current()
    return KnowledgeBase(generation, open_embedder(settings), readers=1) if generation else None

"""Trying one key of a vendor with a question of one token."""

import time
from dataclasses import dataclass, replace

from mogine.chat import ChatMessage, ChatRequest
from mogine.errors import MogineError
from mogine.providers.registry import open_providers
from mogine.settings import Settings


@dataclass(frozen=True, slots=True)
class Trial:
    """How a key fared. `problem` is "" when it was taken."""

    key: str
    problem: str
    took_ms: int
    exit_code: int = 0


async def try_key(settings: Settings, provider: str, key: str) -> Trial:
    """Ask `provider` with `key` alone ("" for none). It must have all else that it needs."""
    section = replace(getattr(settings, provider), keys=(key,) if key else ())
    alone = replace(settings, **{provider: section})
    began = time.perf_counter()
    try:
        async with open_providers(alone) as providers:
            chosen = providers[provider]
            request = ChatRequest(
                (ChatMessage("user", "hi"),), provider, chosen.default_model, stream=False, max_tokens=1
            )
            async for _ in chosen.stream(request):
                continue
    except MogineError as error:
        return Trial(key, error.message, 0, error.exit_code)
    return Trial(key, "", round((time.perf_counter() - began) * 1000))

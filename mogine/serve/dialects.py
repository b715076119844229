"""A visitor's body as a ChatRequest: only words and harmless knobs get through, whatever else it holds."""

import base64
import binascii
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from mogine.chat import ChatMessage, ChatRequest, ImagePart, Provider
from mogine.errors import Forbidden, RequestError
from mogine.serve.traces import trace_of
from mogine.settings import ProxySettings
from mogine.values import value

MAX_MESSAGES = 40
MAX_STOPS = 4
MAX_STOP_CHARS = 100
MAX_SESSION_ID_CHARS = 128
IMAGE_SIGNATURES = {
    "image/png": (b"\x89PNG\r\n\x1a\n",),
    "image/jpeg": (b"\xff\xd8\xff",),
    "image/webp": (b"RIFF",),
}

# What an OpenAI-style body may say beside its messages, model and whether to stream.
KNOBS = frozenset(("max_completion_tokens", "max_tokens", "stop", "stream_options", "temperature", "top_p"))

Dialect = Literal["openai", "dashscope"]


@value(frozen=True, slots=True)
class Asked:
    """What a visitor wants, and in which dialect the answer has to be."""

    request: ChatRequest
    dialect: Dialect
    include_usage: bool = False


def parse(
    body: Mapping[str, Any], headers: Mapping[str, str], provider: Provider, limits: ProxySettings
) -> Asked:
    """The body of `POST /api/llm/{provider}`, in either dialect. Raises RequestError that names the field."""
    if "messages" in body:
        return _openai(body, headers, provider, limits)
    if "input" in body or "prompt" in body:
        if provider.dialect != "dashscope":
            raise RequestError(
                f'{provider.name} takes an OpenAI-style body: {{"messages": [{{"role": "user", '
                f'"content": "..."}}]}}; "input" and "prompt" are for dashscope',
                param="input" if "input" in body else "prompt",
            )
        return _dashscope(body, headers, provider, limits)
    raise RequestError(
        'the body needs "messages": a list of turns, the last one the question', param="messages"
    )


def question_text(value: Any, limits: ProxySettings, param: str) -> str:
    """A question: text that is not blank and not too long."""
    if not isinstance(value, str):
        raise RequestError(f'"{param}" must be a text', param=param)
    text = value.replace("\0", "")
    if not text.strip():
        raise RequestError("the question is empty", param=param)
    if len(text) > limits.max_question_chars:
        raise RequestError(
            f"the question has {len(text)} characters; at most {limits.max_question_chars} are allowed",
            reason="question_too_long",
            param=param,
        )
    return text


def session_id(value: Any, param: str = "session_id") -> str:
    """An id of a conversation: short printable ASCII; "" when there is none."""
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > MAX_SESSION_ID_CHARS or not value.isascii():
        raise RequestError(f'"{param}" is no session id', param=param)
    return value if value.isprintable() else ""


def max_body_bytes(limits: ProxySettings) -> int:
    """How large a body may be: a picture in base64 takes a third more than it is."""
    pictures = limits.max_image_bytes * 4 // 3 + 1024 if limits.allow_images else 0
    return limits.max_body_bytes + pictures


# --- OpenAI ------------------------------------------------------------------------------------------


def _openai(
    body: Mapping[str, Any], headers: Mapping[str, str], provider: Provider, limits: ProxySettings
) -> Asked:
    turns = messages(body["messages"], limits)
    model = allowed_model(body.get("model"), provider, limits)
    stream, trace = _flag(body, "stream"), trace_of(headers)
    if KNOBS.isdisjoint(body):  # as most bodies
        plain = ChatRequest(
            turns, provider.name, model, stream, max_tokens=limits.max_output_tokens, traceparent=trace
        )
        return Asked(plain, "openai")
    options = body.get("stream_options")
    stop = body.get("stop")
    request = ChatRequest(
        messages=turns,
        provider=provider.name,
        model=model,
        stream=stream,
        temperature=_number(body, "temperature", 2.0),
        top_p=_number(body, "top_p", 1.0),
        stop=_stops([stop] if isinstance(stop, str) else stop),
        max_tokens=_max_tokens(body, limits),
        traceparent=trace,
    )
    include_usage = isinstance(options, dict) and options.get("include_usage") is True
    return Asked(request, "openai", include_usage=include_usage)


def messages(value: Any, limits: ProxySettings, param: str = "messages") -> tuple[ChatMessage, ...]:
    """The turns of a conversation: of user and assistant alone, the question last."""
    if not isinstance(value, list) or not value:
        raise RequestError(f'"{param}" must be a list with at least one turn', param=param)
    if len(value) > MAX_MESSAGES:
        raise RequestError(
            f'"{param}" has {len(value)} turns; at most {MAX_MESSAGES} are allowed', param=param
        )
    turns = tuple(_message(item, f"{param}[{index}]", limits) for index, item in enumerate(value))
    last = turns[-1]
    if last.role != "user" or not (last.text.strip() or last.images):
        raise RequestError("the last turn must be the user's question, and not empty", param=param)
    return turns


def _message(item: Any, param: str, limits: ProxySettings) -> ChatMessage:
    if not isinstance(item, dict):
        raise RequestError(f'{param} must be an object with "role" and "content"', param=param)
    role = item.get("role")
    if role not in ("user", "assistant"):
        raise RequestError(
            f'{param}: the role must be "user" or "assistant"; instructions to the model are the server\'s',
            param=f"{param}.role",
        )
    content = item.get("content")
    if isinstance(content, list):
        text, images = _parts(content, f"{param}.content", limits)
    else:
        text, images = content or "", ()
    if not isinstance(text, str):
        raise RequestError(f'{param}: "content" must be a text', param=f"{param}.content")
    if role == "user":
        if images and not limits.allow_images:
            raise RequestError(
                "pictures are switched off here; the server's owner can allow them by MOGINE_ALLOW_IMAGES",
                param=f"{param}.content",
            )
        if text.strip():
            text = question_text(text, limits, f"{param}.content")
        return ChatMessage("user", text, images)
    if images:
        raise RequestError("pictures belong into turns of the user", param=f"{param}.content")
    return ChatMessage("assistant", text.replace("\0", ""))


def _parts(content: Sequence[Any], param: str, limits: ProxySettings) -> tuple[str, tuple[ImagePart, ...]]:
    texts: list[str] = []
    images: list[ImagePart] = []
    for part in content:
        match part:
            case {"type": "text", "text": str(text)}:
                texts.append(text)
            case {"type": "image_url", "image_url": {"url": str(url)} | str(url)}:
                images.append(image(url, limits, param))
            case _:
                raise RequestError(
                    f'{param}: a part must be {{"type": "text"}} or {{"type": "image_url"}}', param=param
                )
    return "\n".join(texts), tuple(images)


def image(url: str, limits: ProxySettings, param: str) -> ImagePart:
    """A picture inside its own address; of an address elsewhere somebody would have to fetch it."""
    head, comma, data = url.partition(",")
    kind = head.removeprefix("data:").removesuffix(";base64")
    if not comma or head != f"data:{kind};base64":
        raise Forbidden(
            "send the picture itself as data:image/png;base64,...; addresses are not fetched",
            reason="url_not_allowed",
            param=param,
        )
    signatures = IMAGE_SIGNATURES.get(kind)
    if signatures is None:
        raise RequestError("a picture must be PNG, JPEG or WebP", param=param)
    if len(data) * 3 // 4 > limits.max_image_bytes:
        raise RequestError(f"a picture may have at most {limits.max_image_bytes} bytes", param=param)
    try:
        pixels = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError("the picture is no valid base64", param=param) from error
    if not pixels.startswith(signatures) or (kind == "image/webp" and pixels[8:12] != b"WEBP"):
        raise RequestError(f"the picture is no {kind.removeprefix('image/').upper()} file", param=param)
    return ImagePart(url)


def allowed_model(value: Any, provider: Provider, limits: ProxySettings) -> str:
    """The model to ask: the provider's own unless the visitor names another that the owner allows."""
    if not provider.default_model or value in (None, "", "auto", provider.name):
        return provider.default_model
    if not isinstance(value, str):
        raise RequestError('"model" must be a text', param="model")
    name = value.removeprefix(f"{provider.name}/")
    if name == provider.default_model or name in limits.allowed_models:
        return name
    allowed = ", ".join(dict.fromkeys((provider.default_model, *limits.allowed_models)))
    raise RequestError(
        f"that model is not allowed here; leave it out, or take one of: {allowed}", param="model"
    )


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f'"{name}" must be true or false', param=name)
    return bool(value)


def _number(body: Mapping[str, Any], name: str, high: float) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
        raise RequestError(f'"{name}" must be a number from 0 to {high:g}', param=name)
    return value


def _max_tokens(body: Mapping[str, Any], limits: ProxySettings) -> int:
    for name in ("max_completion_tokens", "max_tokens"):
        value = body.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 1:
            raise RequestError(f'"{name}" must be a whole number above 0', param=name)
        return int(min(value, limits.max_output_tokens))
    return limits.max_output_tokens


def _stops(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if (
        not isinstance(value, list)
        or len(value) > MAX_STOPS
        or not all(isinstance(item, str) and 0 < len(item) <= MAX_STOP_CHARS for item in value)
    ):
        raise RequestError(
            f'"stop" must be up to {MAX_STOPS} texts of at most {MAX_STOP_CHARS} characters', param="stop"
        )
    return tuple(value)


# --- DashScope ---------------------------------------------------------------------------------------


def _dashscope(
    body: Mapping[str, Any], headers: Mapping[str, str], provider: Provider, limits: ProxySettings
) -> Asked:
    given = body.get("input", body)
    parameters = body.get("parameters") or {}
    if not isinstance(given, dict) or not isinstance(parameters, dict):
        raise RequestError('"input" and "parameters" must be objects', param="input")
    if given.get("messages") is not None:
        turns = messages(given["messages"], limits, "input.messages")
        if given.get("prompt") is not None:
            turns = (*turns, ChatMessage("user", question_text(given["prompt"], limits, "input.prompt")))
    else:
        turns = (ChatMessage("user", question_text(given.get("prompt"), limits, "prompt")),)
    request = ChatRequest(
        messages=turns,
        provider=provider.name,
        model=provider.default_model,
        stream=_wants_stream(headers) or _flag(body, "stream"),
        temperature=_number(parameters, "temperature", 2.0),
        top_p=_number(parameters, "top_p", 1.0),
        session_id=session_id(given.get("session_id")) or None,
        incremental=_flag(parameters, "incremental_output"),
        thoughts=_flag(parameters, "has_thoughts"),
        traceparent=trace_of(headers),
    )
    return Asked(request, "dashscope")


def _wants_stream(headers: Mapping[str, str]) -> bool:
    return headers.get("X-DashScope-SSE", "").lower() == "enable" or "text/event-stream" in headers.get(
        "Accept", ""
    )

"""What all vendors called over HTTP share: keys in turn, the way of one answer, refusals in our words."""

import json
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Protocol

import orjson

from mogine.chat import ChatRequest, Chunk, Delta, ImagePart, Reasoning
from mogine.errors import (
    AnswerTooLong,
    ContentFiltered,
    MogineError,
    RequestError,
    UpstreamBadResponse,
    UpstreamBusy,
    UpstreamCut,
    UpstreamError,
    UpstreamRefused,
)
from mogine.providers.care import Care, Turn
from mogine.providers.pattern import Pattern
from mogine.upstream import (
    MAX_ERROR_BYTES,
    Answer,
    Call,
    Client,
    Frame,
    FrameDecoder,
    Retries,
    retry_after_s,
)

MAX_BODY_BYTES = 4 * 1024 * 1024
MAX_TEXT_BYTES = 64 * 1024
MAX_REASONING_BYTES = 256 * 1024

# What the codes of Ark, DashScope and OpenAI-compatible servers mean for us. A frame under HTTP 200
# bears no true status, so a code counts more than the status it came with.
MODERATION = re.compile(
    r"(Input|Output)?(Text|Image|Video|Audio)?(SensitiveContentDetected|RiskDetection)(\..*)?"
    r"|DataInspectionFailed|data_inspection_failed|FaqRuleBlocked|CustomRoleBlocked|IPInfringementSuspect"
    r"|content_filter|content_policy_violation"
)
TOO_LONG = re.compile(
    r"OutofContextError|context_length_exceeded|BadRequest\.TooLarge|string_above_max_length"
)
KEY = re.compile(r"AuthenticationError|InvalidApiKey|invalid_api_key|IncorrectApiKey|Unauthorized")
MODEL = re.compile(
    r"InvalidEndpointOrModel\..*|InvalidEndpoint\.ClosedEndpoint|ModelNotOpen|UnsupportedModel|ModelNotFound"
    r"|model_not_found|model_not_supported"
)
ACCOUNT = re.compile(r"AccountOverdueError|InvalidAccountStatus|Arrearage|AllocationQuota\.FreeTierOnly")
DENIED = re.compile(r"(.*\.)?AccessDenied(\..*)?|OperationDenied(\..*)?|access_denied|WorkSpaceNotFound")
BUSY = re.compile(
    r".*RateLimit.*|Throttling(\..*)?|RequestBurstTooFast|ServerOverloaded|InflightBatchsizeExceeded"
    r"|limit_requests|limit_burst_rate|rate_limit.*|upstream_rate_limited|TooManyRequests"
)
NEVER_HEALS = frozenset(
    (
        "SetLimitExceeded",
        "QuotaExceeded",
        "AccountQuotaExceeded",
        "insufficient_quota",
        "CommodityNotPurchased",
        "PrepaidBillOverdue",
        "PostpaidBillOverdue",
    )
)
BROKEN = re.compile(
    r"Internal.*|SystemError|ModelServiceFailed|RequestTimeOut|ResponseTimeout|InvokePluginFailed|server_error"
    r"|AppProcessFailed|RewriteFailed|RetrievalFailed|ModelUnavailable|ModelServingError"
)


@dataclass(frozen=True, slots=True)
class Vendor:
    """How a vendor is named in messages, and which settings cure its refusals."""

    label: str
    key_setting: str
    model_setting: str
    url_setting: str
    retired: Mapping[str, str]  # models that are gone, and what to set instead


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a vendor said instead of an answer; `status` 0: not told. `message` is read, never repeated."""

    status: int
    code: str = ""
    message: str = ""


class Taker(Protocol):
    """Whoever an answer is pushed to; the vendor waits for an awaitable that it returns."""

    def take(self, chunks: Sequence[Chunk]) -> Awaitable[None] | None:
        """Chunks that came together."""
        ...

    def take_text(self, raw: bytes, text: str) -> Awaitable[None] | None:
        """A chunk whose one event is `Delta(text)`, as nearly all are."""
        ...


class Parser(Protocol):
    """One answer of one dialect: frames or a whole body in, chunks out."""

    finished: bool  # the answer's finish reason was seen
    done: bool  # nothing more is expected, not even usage

    def frame(self, frame: Frame) -> Chunk | None:
        """What `frame` means; raises `Refused` when it is an error."""
        ...

    def text_alone(self, frame: bytes) -> str | None:
        """The text of a frame that says nothing else, whatever came before it; None for any other frame."""
        ...

    def whole(self, body: bytes, *, as_stream: bool) -> Chunk:
        """A body that is no stream; with `as_stream` its raw bytes are composed as frames."""
        ...

    def held(self) -> Chunk | None:
        """Text that was held back, to be handed on before an error."""
        ...

    def end(self) -> Chunk | None:
        """What is left to say when the stream has ended after its finish reason."""
        ...


class Dialect(Protocol):
    """How requests of one vendor look on the wire."""

    @property
    def name(self) -> str: ...

    def call(self, request: ChatRequest, model: str) -> tuple[str, bytes]:
        """Address and body."""
        ...

    def parser(self, request: ChatRequest) -> Parser: ...

    def headers(self, request: ChatRequest, key: str) -> dict[str, str]: ...


class Refused(Exception):
    """An error where an answer was expected; becomes a MogineError before it leaves this room."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.code)
        self.refusal = refusal


class VendorProvider:
    """A `Provider` that asks one vendor over HTTP."""

    def __init__(
        self,
        name: str,
        default_model: str,
        vendor: Vendor,
        dialect: Dialect,
        client: Client,
        keys: tuple[str, ...],
        retries: Retries | None = None,
        now: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.default_model = default_model
        self.dialect = dialect.name
        self._vendor = vendor
        self._dialect = dialect
        self._client = client
        self.care = Care(vendor.label, vendor.key_setting, keys, quota_codes=NEVER_HEALS, clock=clock)
        self.retries = retries or Retries(never=NEVER_HEALS)
        self._now = now

    def stream(self, request: ChatRequest) -> AsyncGenerator[Chunk, None]:
        """The vendor's answer; see `mogine.chat.Provider`."""
        turn = self.care.turn()
        return self.retries.run(lambda: self._attempt(request, turn), turn)

    async def whole(self, request: ChatRequest) -> Chunk:
        """The vendor's answer to a request that asks for no stream: what `stream` would yield."""
        turn = self.care.turn()
        return await self.retries.call(lambda: self._attempt_whole(request, turn), lambda: False, turn)

    async def push(self, request: ChatRequest, taker: Taker) -> None:
        """The vendor's streamed answer, to `taker` the moment it arrives; ends and fails as `stream`."""
        hand = _Hand(taker)
        turn = self.care.turn()
        await self.retries.call(lambda: self._attempt_push(request, hand, turn), lambda: hand.begun, turn)

    def _call(self, request: ChatRequest, turn: Turn) -> Call:
        url, body = self._dialect.call(request, self._model(request))
        headers = self._dialect.headers(request, turn.key())
        if request.traceparent:
            headers["traceparent"] = request.traceparent
        return Call(url, headers, body, self._vendor.label, self._vendor.url_setting)

    def _model(self, request: ChatRequest) -> str:
        return request.model or self.default_model

    async def _attempt_whole(self, request: ChatRequest, turn: Turn) -> Chunk:
        async with self._client.post(self._call(request, turn)) as answer:
            try:
                await self._expect_answer(answer, turn)
                body = await answer.read_all(MAX_BODY_BYTES)
                chunk = self._dialect.parser(request).whole(body, as_stream=False)
                _Budget().spend(chunk)
                return chunk
            except Refused as refused:
                raise self._error(refused.refusal, answer, request) from None

    async def _attempt_push(self, request: ChatRequest, hand: "_Hand", turn: Turn) -> None:
        async with self._client.post(self._call(request, turn)) as answer:
            try:
                await self._expect_answer(answer, turn)
                parser = self._dialect.parser(request)
                if _looks_like_json(await answer.peek()):
                    chunk = parser.whole(await answer.read_all(MAX_BODY_BYTES), as_stream=True)
                    _Budget().spend(chunk)
                    await hand.over(chunk)
                else:
                    await _pushed(answer, parser, hand)
            except Refused as refused:
                raise self._error(refused.refusal, answer, request) from None

    async def _attempt(self, request: ChatRequest, turn: Turn) -> AsyncGenerator[Chunk, None]:
        budget = _Budget()
        async with self._client.post(self._call(request, turn)) as answer:
            try:
                await self._expect_answer(answer, turn)
                parser = self._dialect.parser(request)
                block = await answer.read()
                if not request.stream or _looks_like_json(block):
                    chunks = _whole(answer, parser, block, as_stream=request.stream)
                else:
                    chunks = _framed(answer, parser, block)
                async with aclosing(chunks):
                    async for chunk in chunks:
                        budget.spend(chunk)
                        yield chunk
            except Refused as refused:
                raise self._error(refused.refusal, answer, request) from None

    async def _expect_answer(self, answer: Answer, turn: Turn) -> None:
        if answer.status != 200:
            raise Refused(parse_refusal(await answer.read_some(MAX_ERROR_BYTES), answer.status))
        if _is_web_page(answer):
            raise UpstreamBadResponse(
                f"API proxy error: {self._vendor.label} answered with a web page; check"
                f" {self._vendor.url_setting}",
                upstream_status=200,
            )
        turn.taken()

    def _error(self, refusal: Refusal, answer: Answer, request: ChatRequest) -> MogineError:
        """To be raised `from None`: its cause would hold the vendor's own words."""
        code = safe_code(refusal.code, self.care.keys.all)
        asked = retry_after_s(answer.header("Retry-After"), self._now())
        cls, message = explain(self._vendor, refusal, code or "", self._model(request))
        return cls(message, retry_after_s=asked, upstream_status=refusal.status or None, upstream_code=code)


async def _whole(
    answer: Answer, parser: Parser, block: bytes, *, as_stream: bool
) -> AsyncGenerator[Chunk, None]:
    """The one chunk of an answer that is one JSON object."""
    yield parser.whole(block + await answer.read_all(MAX_BODY_BYTES), as_stream=as_stream)


async def _framed(answer: Answer, parser: Parser, block: bytes) -> AsyncGenerator[Chunk, None]:
    """The chunks of an answer that is an event stream; `block` are its first bytes."""
    decoder = FrameDecoder()
    try:
        while block:
            for frame in decoder.feed(block):
                if (chunk := parser.frame(frame)) is not None:
                    yield chunk
                if parser.done:
                    await answer.finish()
                    return
            block = await answer.read()
        if not parser.finished:
            raise UpstreamCut("API proxy error: the upstream stream ended early, the answer was cut")
    except (Refused, UpstreamError) as error:
        if not (parser.finished and isinstance(error, UpstreamCut)):
            if (held := parser.held()) is not None:
                yield held
            raise
    if (last := parser.end()) is not None:
        yield last


class _Hand:
    """Hands chunks on, and knows whether any were."""

    __slots__ = ("begun", "taker")

    def __init__(self, taker: Taker) -> None:
        self.begun = False
        self.taker = taker

    async def over(self, chunk: Chunk) -> None:
        self.begun = True
        if (wait := self.taker.take((chunk,))) is not None:
            await wait


class _Push:
    """Takes a stream's bytes where they arrive, and hands on the chunks that they complete."""

    __slots__ = ("_budget", "_decoder", "_hand", "_parser", "_pattern")

    def __init__(self, parser: Parser, hand: _Hand) -> None:
        self._parser = parser
        self._hand = hand
        self._decoder = FrameDecoder()
        self._budget = _Budget()
        self._pattern = Pattern()

    def __call__(self, block: bytes) -> Awaitable[bool | None] | bool | None:
        text = self._pattern.text_of(block)
        if text is None or not self._decoder.skip(len(block)):
            return self._parse(block)
        self._budget.spend_text(text)
        self._hand.begun = True
        wait = self._hand.taker.take_text(block, text)
        return None if wait is None else self._after(wait, None)

    def _parse(self, block: bytes) -> Awaitable[bool | None] | bool | None:
        parser = self._parser
        chunks: list[Chunk] = []
        error: Exception | None = None
        try:
            for frame in self._decoder.feed(block):
                if (chunk := parser.frame(frame)) is not None:
                    self._budget.spend(chunk)
                    chunks.append(chunk)
                if parser.done:
                    break
        except (Refused, UpstreamError) as problem:
            error = problem
        wait: Awaitable[None] | None = None
        if chunks:
            self._hand.begun = True
            wait = self._hand.taker.take(chunks)
            self._learn(block, chunks)
        if wait is not None:
            return self._after(wait, error)
        if error is not None:
            raise error
        return parser.done

    def _learn(self, block: bytes, chunks: Sequence[Chunk]) -> None:
        events = chunks[0].events
        pattern = self._pattern
        if not pattern.wants_more:
            return
        if len(chunks) == len(events) == 1 and type(events[0]) is Delta and chunks[0].raw == block:
            pattern.learn(block, events[0].text, self._parser.text_alone)

    async def _after(self, wait: Awaitable[None], error: Exception | None) -> bool:
        """What came before an error is handed on before it is raised."""
        await wait
        if error is not None:
            raise error
        return self._parser.done


async def _pushed(answer: Answer, parser: Parser, hand: _Hand) -> None:
    """`_framed`, pushed."""
    try:
        await answer.pump(_Push(parser, hand))
        if not parser.finished:
            raise UpstreamCut("API proxy error: the upstream stream ended early, the answer was cut")
    except (Refused, UpstreamError) as error:
        if not (parser.finished and isinstance(error, UpstreamCut)):
            if (held := parser.held()) is not None:
                await hand.over(held)
            raise
    if (last := parser.end()) is not None:
        await hand.over(last)


def _looks_like_json(block: bytes) -> bool:
    """Whether a whole JSON object comes where a stream was asked for; no event stream begins like this."""
    return block[:64].removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


class _Budget:
    """An answer may not grow without end."""

    __slots__ = ("reasoning", "text")

    def __init__(self) -> None:
        self.text = 0
        self.reasoning = 0

    def spend(self, chunk: Chunk) -> None:
        for event in chunk.events:
            if type(event) is Delta:
                self.text += _size(event.text)
            elif type(event) is Reasoning:
                self.reasoning += _size(event.text)
        self._check()

    def spend_text(self, text: str) -> None:
        """A piece of the answer."""
        self.text += _size(text)
        if self.text > MAX_TEXT_BYTES:
            self._check()

    def _check(self) -> None:
        if self.text > MAX_TEXT_BYTES or self.reasoning > MAX_REASONING_BYTES:
            raise AnswerTooLong("API proxy error: the answer grew too long and was ended")


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _is_web_page(answer: Answer) -> bool:
    return answer.header("Content-Type").strip()[:9].lower() == "text/html"


# --- reading what vendors send ----------------------------------------------------------------------


def load_object(data: bytes) -> dict[str, Any]:
    """A JSON object out of strict UTF-8; raises UpstreamBadResponse."""
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError:
        value = _tolerant(data)
    if not isinstance(value, dict):
        raise UpstreamBadResponse("API proxy error: the upstream sent something that is no JSON object")
    return value


def _tolerant(data: bytes) -> Any:
    """What Python's own parser makes of it: it takes lone surrogates, which vendors have sent."""
    try:
        return json.loads(str(data, "utf-8"))
    except (ValueError, RecursionError):
        return None


def checked_raw(raw: bytes) -> bytes:
    """`raw`, which must be valid UTF-8 to be handed on."""
    if not raw.isascii():
        try:
            str(raw, "utf-8")
        except UnicodeDecodeError:
            raise UpstreamBadResponse("API proxy error: the upstream sent text that is not UTF-8") from None
    return raw


def text_of(value: Any) -> str:
    """`value` if it is text, without the lone surrogates that JSON escapes can smuggle in; else ""."""
    if type(value) is not str:
        return ""
    if value.isascii():
        return value
    try:
        value.encode()
    except UnicodeEncodeError:
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def count_of(value: Any) -> int:
    """`value` if it is a sensible number of tokens, else 0."""
    return value if type(value) is int and 0 <= value < 2**53 else 0


def parse_refusal(body: bytes, status: int) -> Refusal:
    """The code in an error's body: JSON in either envelope, or an event stream, whatever its content type."""
    body = body.removeprefix(b"\xef\xbb\xbf").strip()
    candidates: list[tuple[bytes, int | None]] = [(body, None)] if body[:1] == b"{" else []
    if not candidates:
        try:
            frames = FrameDecoder().feed(body + b"\n\n")
        except UpstreamBadResponse:
            frames = []
        candidates = [(frame.data, frame.http_status) for frame in frames]
    for data, frame_status in candidates:
        try:
            refusal = refusal_in(load_object(data), frame_status or status)
        except UpstreamBadResponse:
            continue
        if refusal is not None:
            return refusal
    return Refusal(status)


def refusal_in(payload: dict[str, Any], status: int) -> Refusal | None:
    """The error that `payload` tells of, if it does: `{"error": {...}}` or DashScope's flat object."""
    error = payload.get("error")
    if not error:
        if "code" not in payload or "output" in payload or "choices" in payload:
            return None
        error = payload
    if not isinstance(error, dict):
        return Refusal(status, message=text_of(error))
    code = error.get("code")
    if type(code) is int and 400 <= code <= 599:  # vLLM and llama.cpp repeat the status here
        status, code = code, error.get("type")
    return Refusal(status, text_of(code) or text_of(error.get("type")), text_of(error.get("message")))


def safe_code(code: str, keys: tuple[str, ...]) -> str | None:
    """A vendor's code if it is a plain identifier; it goes to visitors, so it must not echo a key."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_.-]{0,79}", code) or any(key in code for key in keys):
        return None
    return code


def refuse_images(images: tuple[ImagePart, ...], label: str) -> None:
    """For dialects without pictures."""
    if images:
        raise RequestError(f"{label} takes no pictures in a question; ask in words", param="messages")


# --- refusals in our words --------------------------------------------------------------------------


def explain(vendor: Vendor, refusal: Refusal, code: str, model: str) -> tuple[type[MogineError], str]:
    """The error class and message for `refusal`: what happened and which setting to look at."""
    if MODERATION.fullmatch(code):
        return ContentFiltered, (
            "The provider's content filter declined this conversation; please put the question differently"
        )
    if TOO_LONG.fullmatch(code) or refusal.status == 413:
        return (
            RequestError,
            "The conversation is too long for the model; ask a shorter question or start anew",
        )
    if code.startswith("InvalidImageURL"):
        return RequestError, "The provider could not read the picture; send a PNG, JPEG or WebP file"
    what = f"API proxy error: upstream {vendor.label} answered {_status_text(refusal.status)}"
    if code:
        what += f" ({code})"
    cls, advice = _fault(vendor, refusal.status, code)
    if cls is not UpstreamBusy and (cure := _cure(vendor, refusal, code, model)):
        cls, advice = UpstreamRefused, cure
    return cls, f"{what}; {advice}"


def _fault(vendor: Vendor, status: int, code: str) -> tuple[type[UpstreamError], str]:
    """What kind of failure this is, when it is not a refusal."""
    if code in NEVER_HEALS:
        return UpstreamBusy, "its quota is used up or a bill is open: look into the vendor's console"
    if status == 429 or BUSY.fullmatch(code):
        return UpstreamBusy, "it is busy, try again later"
    if status >= 500 or BROKEN.fullmatch(code):
        return UpstreamError, "the vendor has a fault, try again later"
    if 0 < status < 400:
        return UpstreamBadResponse, f"an answer was expected; check {vendor.url_setting}"
    return UpstreamError, f"check {vendor.model_setting} and look into the vendor's console"


def _cure(vendor: Vendor, refusal: Refusal, code: str, model: str) -> str:
    """What the owner should do about a refusal of key, model, account or rights; "" when it is none."""
    if ACCOUNT.fullmatch(code):
        return f"the account behind {vendor.key_setting} is overdue or closed: look into the vendor's console"
    if KEY.fullmatch(code):
        return f"check {vendor.key_setting}"
    if MODEL.fullmatch(code):
        return _model_cure(vendor, code, model)
    if DENIED.fullmatch(code):
        return f"check that {vendor.key_setting} may use {vendor.model_setting}"
    if code == "InvalidParameter" and "appid" in refusal.message.lower():
        return f"check {vendor.model_setting}"
    suspects = {
        401: vendor.key_setting,
        403: f"{vendor.key_setting} and {vendor.model_setting}",
        404: f"{vendor.model_setting} and {vendor.url_setting}",
    }
    return f"check {suspects[refusal.status]}" if refusal.status in suspects else ""


def _model_cure(vendor: Vendor, code: str, model: str) -> str:
    if code == "ModelNotOpen":
        return f"activate the model in the vendor's console or set another {vendor.model_setting}"
    if successor := vendor.retired.get(model):
        return f"the model {model} is no longer offered, set {vendor.model_setting}, e.g. to {successor}"
    return f"check {vendor.model_setting}"


def _status_text(status: int) -> str:
    if not status:
        return "with an error"
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)

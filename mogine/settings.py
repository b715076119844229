"""Everything a user can set: read once from the environment and `.env`, checked, passed down."""

import difflib
import ipaddress
import re
import tomllib
import zoneinfo
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from io import StringIO
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from dotenv import dotenv_values

from mogine.errors import SettingsError

VENDOR_PREFIXES = ("DOUBAO_", "DASHSCOPE_", "OPENAI_")
VENDOR_SECTIONS = ("doubao", "dashscope", "openai")
SAMPLERS = (
    *("always_on", "always_off", "traceidratio"),
    *("parentbased_always_on", "parentbased_always_off", "parentbased_traceidratio"),
)
PROVIDER_NAMES = ("doubao", "dashscope", "openai", "extract")
MAX_ENV_BYTES = 1024 * 1024

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True)
class RateLimit:
    """At most `count` in every `window_s` seconds; written as `20/minute`."""

    count: int
    window_s: int

    def __str__(self) -> str:
        names = {1: "second", 60: "minute", 3600: "hour", 86400: "day"}
        return f"{self.count}/{names[self.window_s]}"


# --- parsers: text in, value out, ValueError with the remedy ------------------------------------


def _text(value: str) -> str:
    return value


def _words(value: str) -> tuple[str, ...]:
    return tuple(word for part in value.split(",") if (word := part.strip()))


def parse_keys(value: str) -> tuple[str, ...]:
    """Keys, comma separated. Raises ValueError."""
    keys = _words(value)
    if any(not key.isascii() or not key.isprintable() or " " in key for key in keys):
        raise ValueError("a key is plain ASCII without spaces; paste it again")
    return keys


def _address(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("expected an address such as https://host/path")
    if parts.username or parts.query or parts.fragment:
        raise ValueError("an address here has no user, no ? and no #")
    return value.rstrip("/")


REDIS_OPTIONS = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "db")


def _redis_url(value: str) -> str:
    try:
        parts = urlsplit(value)
        where = parts.path if parts.scheme == "unix" else parts.port != 0 and parts.hostname
        options = parse_qs(parts.query, strict_parsing=bool(parts.query))
    except ValueError:  # its text may show a part of the password
        raise ValueError(
            "the port is no number; a / ? # or @ in the password is written as %2F %3F %23 %40"
        ) from None
    scheme = {"valkey": "redis", "valkeys": "rediss"}.get(parts.scheme, parts.scheme)
    if scheme not in ("redis", "rediss", "unix") or not where:
        raise ValueError("expected redis://host:6379/0, rediss://... for TLS, or unix:///path/of/socket")
    if scheme != "unix" and not re.fullmatch(r"/?[0-9]{0,4}", parts.path):
        raise ValueError("after the host comes the number of a database, such as /0")
    if parts.fragment or not options.keys() <= set(REDIS_OPTIONS):
        raise ValueError(
            f"behind ? it takes {', '.join(REDIS_OPTIONS)}; a ? or # in a password is %3F or %23"
        )
    if not "".join(options.get("db", "0")).isdecimal():
        raise ValueError("db is the number of a database")
    return scheme + value[len(parts.scheme) :]


def database_url(value: str) -> str:
    parts = urlsplit(value)
    shape = "postgresql://user:password@host:5432/database"
    if parts.scheme not in ("postgresql", "postgres"):
        raise ValueError(f"expected {shape}; empty means SQLite in the data folder")
    if not re.fullmatch(r"/[^/]+", parts.path) or parts.fragment:
        raise ValueError(f"expected the name of one database after the host: {shape}")
    try:
        _ = parts.port
    except ValueError:
        raise ValueError(
            f"the port is no number; special signs in a password are written as %40 for @ and so on: {shape}"
        ) from None
    return value


def _origins(value: str) -> tuple[str, ...]:
    origins = _words(value)
    for origin in origins:
        parts = urlsplit(origin)
        if origin != "*" and (
            parts.scheme not in ("http", "https") or f"{parts.scheme}://{parts.netloc}" != origin
        ):
            raise ValueError(f"{origin!r} is no origin; write https://host or https://host:port, no path")
    return origins


def _networks(value: str) -> tuple[Network, ...]:
    return tuple(ipaddress.ip_network(word, strict=False) for word in _words(value))


def _flag(value: str) -> bool:
    lowered = value.lower()
    if lowered in ("1", "true", "yes", "on"):
        return True
    if lowered in ("0", "false", "no", "off"):
        return False
    raise ValueError("expected true or false")


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        if not re.fullmatch(r"[+-]?[0-9]{1,18}", value) or not low <= int(value) <= high:
            raise ValueError(f"expected a whole number from {low} to {high}")
        return int(value)

    return parse


def _seconds(low: float, high: float) -> Callable[[str], float]:
    def parse(value: str) -> float:
        if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", value) or not low <= float(value) <= high:
            raise ValueError(f"expected seconds from {low:g} to {high:g}")
        return float(value)

    return parse


def _bytes(low: int, high: int) -> Callable[[str], int]:
    def parse(value: str) -> int:
        match = re.fullmatch(r"([0-9]{1,12})\s*(?:([KMG])i?B?|B)?", value, re.IGNORECASE)
        if not match:
            raise ValueError("expected bytes such as 262144, 256KiB or 4MiB")
        size: int = int(match[1]) * 1024 ** " KMG".index((match[2] or " ").upper())
        if not low <= size <= high:
            raise ValueError(f"expected {low} to {high} bytes")
        return size

    return parse


def _rate(value: str) -> RateLimit:
    match = re.fullmatch(r"([0-9]{1,9})\s*/\s*(second|minute|hour|day)", value.lower())
    if not match or int(match[1]) < 1:
        raise ValueError("expected a rate such as 20/minute (second, minute, hour or day)")
    return RateLimit(int(match[1]), {"second": 1, "minute": 60, "hour": 3600, "day": 86400}[match[2]])


def _share(value: str) -> float:
    if not re.fullmatch(r"[01](\.[0-9]{1,9})?", value) or float(value) > 1:
        raise ValueError("expected a share from 0 to 1 such as 0.1")
    return float(value)


def _rates(value: str) -> tuple[RateLimit, ...]:
    return tuple(_rate(word) for word in _words(value)) or (_rate(value),)


def _money(value: str) -> float:
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,6})?", value):
        raise ValueError("expected an amount in CNY such as 20 or 99.50")
    return float(value)


def parse_base_path(value: str) -> str:
    """A public prefix, with a slash at both ends. Raises ValueError."""
    if not value.startswith("/") or not re.fullmatch(r"[A-Za-z0-9/_.~-]+", value) or ".." in value:
        raise ValueError("expected a path such as / or /~temp/mogine_agent/")
    return value.rstrip("/") + "/"


def _folder(value: str) -> str:
    if not value.startswith("/"):
        raise ValueError("expected a whole path such as /var/log/mogine")
    return value.rstrip("/") or "/"


def _zone(value: str) -> str:
    try:
        zoneinfo.ZoneInfo(value)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise ValueError("expected a time zone such as Asia/Shanghai") from error
    return value


def _one_of(*allowed: str) -> Callable[[str], str]:
    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return value

    return parse


def _providers(value: str) -> tuple[str, ...]:
    names = _words(value.lower())
    for name in names:
        if name not in PROVIDER_NAMES:
            raise ValueError(f"{name!r} is no provider; there are {', '.join(PROVIDER_NAMES)}")
    if len(set(names)) != len(names):
        raise ValueError("a provider stands there twice")
    return names


def _setting(env: str, default: Any, parse: Callable[[str], Any], help: str, *, secret: bool = False) -> Any:
    return field(
        default=default,
        repr=not secret,
        metadata={"env": env, "parse": parse, "help": help, "secret": secret},
    )


# --- the tree ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class DoubaoSettings:
    """Volcengine Ark."""

    keys: tuple[str, ...] = _setting(
        "DOUBAO_API_KEY",
        (),
        parse_keys,
        "Key of Volcengine Ark; several, comma separated, rotate",
        secret=True,
    )
    base_url: str = _setting(
        "DOUBAO_BASE_URL", "https://ark.cn-beijing.volces.com/api/v3", _address, "Address of Ark"
    )
    model: str = _setting(
        "DOUBAO_MODEL", "doubao-1-5-thinking-vision-pro-250428", _text, "Model or endpoint id (ep-...)"
    )
    cheap_model: str = _setting(
        "DOUBAO_CHEAP_MODEL", "", _text, "Model of the assistant once 80 % of a budget is spent"
    )


@dataclass(frozen=True, slots=True)
class DashScopeSettings:
    """Alibaba Cloud Model Studio, application completion."""

    keys: tuple[str, ...] = _setting(
        "DASHSCOPE_API_KEY", (), parse_keys, "Key of DashScope; several, comma separated, rotate", secret=True
    )
    app_id: str = _setting("DASHSCOPE_APP_ID", "", _text, "Id of the application")
    base_url: str = _setting(
        "DASHSCOPE_BASE_URL", "https://dashscope.aliyuncs.com/api/v1", _address, "Address of DashScope"
    )


@dataclass(frozen=True, slots=True)
class OpenAISettings:
    """Any OpenAI-compatible server: vLLM, Ollama, llama.cpp, DeepSeek and others."""

    keys: tuple[str, ...] = _setting(
        "OPENAI_API_KEY",
        (),
        parse_keys,
        "Key of the OpenAI-compatible server; may stay empty for a local one",
        secret=True,
    )
    base_url: str = _setting("OPENAI_BASE_URL", "", _address, "Its address, ending in /v1 as a rule")
    model: str = _setting("OPENAI_MODEL", "", _text, "The model it shall use")


@dataclass(frozen=True, slots=True)
class AccessSettings:
    """Who may call, from where, and how often."""

    allowed_origins: tuple[str, ...] = _setting(
        "MOGINE_ALLOWED_ORIGINS",
        (),
        _origins,
        "Browser origins that may call cross-origin; * must be written out",
    )
    allowed_hosts: tuple[str, ...] = _setting(
        "MOGINE_ALLOWED_HOSTS",
        (),
        _words,
        "Host names the servers answer to, beside loopback and the hosts of MOGINE_ALLOWED_ORIGINS",
    )
    trusted_proxies: tuple[Network, ...] = _setting(
        "MOGINE_TRUSTED_PROXIES",
        _networks("127.0.0.1/32,::1/128"),
        _networks,
        "Whose X-Forwarded-For is believed",
    )
    rate_limit: tuple[RateLimit, ...] = _setting(
        "MOGINE_RATE_LIMIT",
        (RateLimit(20, 60), RateLimit(200, 3600)),
        _rates,
        "Questions per visitor; all of several rates must be kept",
    )
    site_rate_limit: tuple[RateLimit, ...] = _setting(
        "MOGINE_SITE_RATE_LIMIT", (RateLimit(600, 60),), _rates, "Questions of the whole site"
    )
    max_streams_per_visitor: int = _setting(
        "MOGINE_MAX_STREAMS_PER_VISITOR", 3, _whole(1, 10_000), "Answers open at once per visitor"
    )
    max_streams: int = _setting("MOGINE_MAX_STREAMS", 1000, _whole(1, 100_000), "Answers open at once in all")
    daily_budget_cny: float | None = _setting(
        "MOGINE_DAILY_BUDGET_CNY", None, _money, "What answers may cost in a day; empty: no budget"
    )
    monthly_budget_cny: float | None = _setting(
        "MOGINE_MONTHLY_BUDGET_CNY", None, _money, "What answers may cost in a calendar month"
    )
    redis_url: str = _setting(
        "MOGINE_REDIS_URL",
        "",
        _redis_url,
        "Redis or Valkey in which several machines share limits and budgets, such as redis://host:6379/0",
        secret=True,
    )
    admin_token: str = _setting(
        "MOGINE_ADMIN_TOKEN",
        "",
        _text,
        "For everything marked admin; made at first start in data/admin_token when empty",
        secret=True,
    )


@dataclass(frozen=True, slots=True)
class ProxySettings:
    """The LLM proxy: what a visitor may ask for, and how long a vendor may take."""

    port: int = _setting("MOGINE_PROXY_PORT", 8741, _whole(0, 65535), "Port of the LLM proxy")
    base_path: str = _setting(
        "MOGINE_BASE_PATH", "/", parse_base_path, "Public path prefix, such as /~temp/mogine_agent/"
    )
    providers: tuple[str, ...] = _setting(
        "MOGINE_PROVIDERS", (), _providers, "Order of preference; empty: those with a key, then extract"
    )
    max_body_bytes: int = _setting(
        "MOGINE_MAX_BODY_BYTES", 256 * 1024, _bytes(1024, 64 * 1024**2), "Largest request body"
    )
    max_question_chars: int = _setting(
        "MOGINE_MAX_QUESTION_CHARS", 8000, _whole(1, 1_000_000), "Longest question, in characters"
    )
    max_output_tokens: int = _setting(
        "MOGINE_MAX_OUTPUT_TOKENS", 2048, _whole(1, 65536), "Most tokens of an answer"
    )
    allowed_models: tuple[str, ...] = _setting(
        "MOGINE_ALLOWED_MODELS", (), _words, "Models a visitor may name; empty: the configured one"
    )
    allow_images: bool = _setting(
        "MOGINE_ALLOW_IMAGES", False, _flag, "Let visitors send pictures (PNG, JPEG, WebP)"
    )
    max_image_bytes: int = _setting(
        "MOGINE_MAX_IMAGE_BYTES", 4 * 1024**2, _bytes(1024, 32 * 1024**2), "Largest picture"
    )
    connect_timeout_s: float = _setting(
        "MOGINE_CONNECT_TIMEOUT", 5.0, _seconds(0.05, 60), "Seconds to reach a vendor"
    )
    first_byte_timeout_s: float = _setting(
        "MOGINE_FIRST_BYTE_TIMEOUT", 30.0, _seconds(0.05, 1800), "Seconds until a vendor's first byte"
    )
    idle_timeout_s: float = _setting(
        "MOGINE_IDLE_TIMEOUT", 30.0, _seconds(0.05, 1800), "Seconds of silence within an answer"
    )
    answer_timeout_s: float = _setting(
        "MOGINE_ANSWER_TIMEOUT", 300.0, _seconds(0.1, 7200), "Seconds a whole answer may take"
    )
    ping_s: float = _setting(
        "MOGINE_PING_INTERVAL",
        15.0,
        _seconds(0.05, 300),
        "Seconds of silence after which a comment line is sent",
    )
    reader_timeout_s: float = _setting(
        "MOGINE_READER_TIMEOUT",
        60.0,
        _seconds(0.05, 3600),
        "Seconds after which a visitor who reads nothing of an answer is disconnected",
    )
    resume_grace_s: float = _setting(
        "MOGINE_RESUME_GRACE",
        15.0,
        _seconds(0, 120),
        "Seconds an answer of the widget goes on when the visitor's page is gone, to be read on the next one",
    )
    shutdown_grace_s: float = _setting(
        "MOGINE_SHUTDOWN_GRACE", 15.0, _seconds(0, 7200), "Seconds running answers get when the server stops"
    )
    rolling_restart: bool = _setting(
        "MOGINE_ROLLING_RESTART",
        False,
        _flag,
        "For one of several proxies behind nginx: on a stop close the port at once, so that another is asked",
    )
    kb_url: str = _setting(
        "MOGINE_KB_URL",
        "",
        _address,
        "Where the proxy finds the knowledge base; empty: the kb port on this machine",
    )
    kb_top_k: int = _setting("MOGINE_KB_TOP_K", 4, _whole(1, 20), "Passages given to the model")
    kb_timeout_s: float = _setting(
        "MOGINE_KB_TIMEOUT", 3.0, _seconds(0.05, 60), "Seconds the proxy waits for the knowledge base"
    )
    kb_required: bool = _setting(
        "MOGINE_KB_REQUIRED",
        False,
        _flag,
        "true: without its whole knowledge base the assistant says 503 kb_unavailable instead of answering",
    )


@dataclass(frozen=True, slots=True)
class KnowledgeSettings:
    """The knowledge base."""

    port: int = _setting("MOGINE_KB_PORT", 8739, _whole(0, 65535), "Port of the knowledge base")
    embedder: str = _setting(
        "MOGINE_EMBEDDER",
        "e5",
        _one_of("e5", "http", "none"),
        "e5 (bundled, offline), http (OpenAI-compatible endpoint) or none (keyword search only)",
    )
    embed_base_url: str = _setting(
        "MOGINE_EMBED_BASE_URL",
        "",
        _address,
        "Embeddings endpoint for MOGINE_EMBEDDER=http, without /embeddings",
    )
    embed_model: str = _setting("MOGINE_EMBED_MODEL", "", _text, "Model of that endpoint")
    embed_key: str = _setting("MOGINE_EMBED_API_KEY", "", _text, "Key of that endpoint", secret=True)
    ingest_hosts: tuple[str, ...] = _setting(
        "MOGINE_INGEST_HOSTS",
        (),
        _words,
        "Hosts of yours that `kb ingest` may read from though they are private or speak plain http",
    )
    max_upload_bytes: int = _setting(
        "MOGINE_MAX_UPLOAD_BYTES", 32 * 1024**2, _bytes(1024, 1024**3), "Largest uploaded document"
    )
    chroma_url: str = _setting(
        "MOGINE_CHROMA_URL",
        "",
        _address,
        "Chroma server that keeps the vectors for several machines, such as http://host:8000; "
        "empty: a folder of this home",
    )
    chroma_token: str = _setting(
        "MOGINE_CHROMA_TOKEN", "", _text, "Bearer token for what guards the Chroma server", secret=True
    )
    chroma_timeout_s: float = _setting(
        "MOGINE_CHROMA_TIMEOUT",
        1.0,
        _seconds(0.05, 60),
        "Seconds a search waits for the Chroma server before it goes by words alone",
    )
    share: str = _setting(
        "MOGINE_KB_SHARE",
        "",
        _text,
        "Where `kb publish` puts generations and `kb pull` finds them: a folder, or the address of the "
        "knowledge base server of the machine that writes",
    )


@dataclass(frozen=True, slots=True)
class AnalyticsSettings:
    """The record of questions."""

    port: int = _setting("MOGINE_ANALYTICS_PORT", 8742, _whole(0, 65535), "Port of analytics")
    retention_days: int = _setting(
        "MOGINE_RETENTION_DAYS", 180, _whole(1, 36500), "Rows older than this are deleted by cleanup"
    )
    timezone: str = _setting("MOGINE_TIMEZONE", "Asia/Shanghai", _zone, "What a day is")
    database_url: str = _setting(
        "MOGINE_DATABASE_URL",
        "",
        database_url,
        "PostgreSQL that keeps the record for several machines, such as postgresql://user:password@host/db; "
        "empty: SQLite in the data folder",
        secret=True,
    )
    store_answers: bool = _setting("MOGINE_STORE_ANSWERS", True, _flag, "Keep the text of answers")
    store_questions: str = _setting(
        "MOGINE_STORE_QUESTIONS",
        "text",
        _one_of("text", "hash", "none"),
        "Keep questions as text, as a hash, or not at all",
    )


@dataclass(frozen=True, slots=True)
class OtelSettings:
    """Traces for OpenTelemetry (docs/tracing.md); nothing is sent while no address is set."""

    endpoint: str = _setting(
        "OTEL_EXPORTER_OTLP_ENDPOINT",
        "",
        _address,
        "Where traces go, by OTLP over HTTP, such as http://127.0.0.1:4318; /v1/traces is added to it",
    )
    traces_endpoint: str = _setting(
        "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "", _address, "The same, taken as it is; wins over the other"
    )
    headers: str = _setting(
        "OTEL_EXPORTER_OTLP_HEADERS",
        "",
        _text,
        "Headers for that address, as name=value, comma separated; a space is written %20",
        secret=True,
    )
    service_name: str = _setting(
        "OTEL_SERVICE_NAME",
        "",
        _text,
        "What the servers are called there; empty: mogine-proxy, mogine-kb and mogine-analytics",
    )
    sampler: str = _setting(
        "OTEL_TRACES_SAMPLER",
        "parentbased_always_on",
        _one_of(*SAMPLERS),
        "Which requests are traced; parentbased: as a caller's traceparent says, if it sends one",
    )
    sampler_share: float = _setting(
        "OTEL_TRACES_SAMPLER_ARG", 1.0, _share, "The share that traceidratio takes, from 0 to 1"
    )
    is_disabled: bool = _setting("OTEL_SDK_DISABLED", False, _flag, "Send nothing, whatever else is set")
    content: bool = _setting(
        "MOGINE_OTEL_CONTENT",
        False,
        _flag,
        "Put questions and answers into traces, masked and kept out as in the record",
    )

    @property
    def target(self) -> str:
        """The address that spans are sent to; "": none are made."""
        if self.is_disabled:
            return ""
        return self.traces_endpoint or (self.endpoint and f"{self.endpoint}/v1/traces")

    @property
    def asked_by(self) -> str:
        """The variable that has the address."""
        return f"OTEL_EXPORTER_OTLP_{'TRACES_' if self.traces_endpoint else ''}ENDPOINT"


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of one home; `sources` tells for each variable where its value came from."""

    home: Path
    host: str = _setting("MOGINE_HOST", "127.0.0.1", _text, "Address the servers listen on")
    log_format: str = _setting("MOGINE_LOG_FORMAT", "text", _one_of("text", "json"), "Lines of the log")
    log_dir: str = _setting(
        "MOGINE_LOG_DIR",
        "/var/log/mogine",
        _folder,
        "Where nginx and PM2 write logs, as `mogine deploy` sets them up; such as /www/wwwlogs",
    )
    doubao: DoubaoSettings = DoubaoSettings()
    dashscope: DashScopeSettings = DashScopeSettings()
    openai: OpenAISettings = OpenAISettings()
    proxy: ProxySettings = ProxySettings()
    kb: KnowledgeSettings = KnowledgeSettings()
    analytics: AnalyticsSettings = AnalyticsSettings()
    access: AccessSettings = AccessSettings()
    otel: OtelSettings = OtelSettings()
    sources: Mapping[str, str] = field(default_factory=dict, repr=False)
    warnings: tuple[str, ...] = ()

    @property
    def data_path(self) -> Path:
        """Everything mogine writes."""
        return self.home / "data"

    @property
    def analytics_path(self) -> Path:
        return self.data_path / "analytics.db"

    @property
    def kb_path(self) -> Path:
        return self.data_path / "kb"

    @property
    def provider_order(self) -> tuple[str, ...]:
        """`MOGINE_PROVIDERS`, else every provider that could answer, then `extract`."""
        return self.proxy.providers or (
            *(n for n in PROVIDER_NAMES[:-1] if self.has_credentials(n)),
            "extract",
        )

    def has_credentials(self, provider: str) -> bool:
        """Whether `provider` has what it needs to be asked."""
        match provider:
            case "doubao":
                return bool(self.doubao.keys)
            case "dashscope":
                return bool(self.dashscope.keys and self.dashscope.app_id)
            case "openai":
                return bool(self.openai.base_url and self.openai.model)
            case _:
                return provider == "extract"

    def server_url(self, name: str) -> str:
        """Where this machine reaches one of its own servers: `proxy`, `kb` or `analytics`."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)  # noqa: S104 - where to call
        port = {"proxy": self.proxy.port, "kb": self.kb.port, "analytics": self.analytics.port}[name]
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


@dataclass(frozen=True, slots=True)
class Variable:
    """One setting as documentation and `config show` need it."""

    env: str
    section: str
    name: str
    default: Any
    parse: Callable[[str], Any]
    help: str
    secret: bool


def _sections() -> dict[str, type]:
    return {
        f.name: f.type
        for f in fields(Settings)
        if isinstance(f.type, type) and f.name != "home" and f.type.__name__.endswith("Settings")
    }


def variables() -> Iterator[Variable]:
    """Every setting there is, in the order of the tree."""
    for section, cls in {"": Settings, **_sections()}.items():
        for f in fields(cls):
            if "env" in f.metadata:
                m = f.metadata
                yield Variable(m["env"], section, f.name, f.default, m["parse"], m["help"], m["secret"])


def load_settings(environ: Mapping[str, str], home: Path) -> Settings:
    """The settings of `home`: process environment over `home/.env` over defaults.

    Raises SettingsError that lists every wrong value at once, never the value of a secret.
    """
    problems: list[str] = []
    warnings: list[str] = []
    file_values = _read_env_file(home / ".env", problems)
    known = {v.env: v for v in variables()}
    for name in file_values:
        if name not in known and name.startswith(("MOGINE_", *VENDOR_PREFIXES)):
            problems.append(f"{name} in {home / '.env'} is no setting{_nearest(name, known)}")
    warnings += _without_effect(environ, file_values, known, home / ".env")
    sources: dict[str, str] = {}
    values: dict[str, dict[str, Any]] = {}
    for variable in known.values():
        for origin, mapping in (("environment", environ), (".env", file_values)):
            raw = mapping.get(variable.env)
            if raw is None or not raw.strip():
                continue
            try:
                value = variable.parse(raw.strip())
            except ValueError as error:
                shown = "its value" if variable.secret else repr(raw.strip()[:80])
                told = f"{variable.env} ({origin}): {shown}: {error}"
                if origin == "environment" and variable.env.startswith("OTEL_"):
                    # Those names are everybody's: what is meant for others must not keep mogine from serving.
                    warnings.append(f"{told}; it is not heeded")
                    continue
                problems.append(told)
                break
            values.setdefault(variable.section, {})[variable.name] = value
            sources[variable.env] = origin
            break
        else:
            sources[variable.env] = "default"
    if problems:
        raise SettingsError("\n".join(["these settings are wrong:", *(f"  - {p}" for p in problems)]))
    sections = {name: cls(**values.get(name, {})) for name, cls in _sections().items()}
    return Settings(home=home, sources=sources, warnings=tuple(warnings), **sections, **values.get("", {}))


def with_fresh_vendors(settings: Settings) -> Settings:
    """`settings` with what the `.env` says of the vendors now; what came from the process environment stays.

    Raises SettingsError, as `load_settings` does, when anything in the file is wrong.
    """
    fresh = load_settings({}, settings.home)
    sections: dict[str, Any] = {}
    for name in VENDOR_SECTIONS:
        old, new = getattr(settings, name), getattr(fresh, name)
        kept = {
            f.name: getattr(old, f.name)
            for f in fields(old)
            if settings.sources.get(f.metadata["env"]) == "environment"
        }
        sections[name] = replace(new, **kept)
    return replace(settings, **sections)


def _without_effect(
    environ: Mapping[str, str], file_values: Mapping[str, str], known: Mapping[str, Any], path: Path
) -> Iterator[str]:
    """What is set and says nothing to us; OpenTelemetry's own library reads more names, and no file."""
    for name in file_values:
        if name.startswith("OTEL_") and name not in known:
            yield f"{name} is not read from {path}: set it in the process environment"
    for name in environ:
        if name.startswith("MOGINE_") and name != "MOGINE_HOME" and name not in known:
            yield f"{name} in the environment is no setting{_nearest(name, known)}"


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close else "; see `mogine config show` for all of them"


def _read_env_file(path: Path, problems: list[str]) -> dict[str, str]:
    if not path.exists():
        return {}
    try:
        if path.stat().st_size > MAX_ENV_BYTES:
            raise ValueError("larger than 1 MiB; that is no settings file")
        text = path.read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as error:
        reason = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        problems.append(f"{path} cannot be read: {reason}")
        return {}
    for number, line in enumerate(text.splitlines(), start=1):
        stripped = line.strip()
        if (
            stripped
            and not stripped.startswith("#")
            and not re.match(r"(export\s+)?[A-Za-z_][A-Za-z0-9_]*\s*=", stripped)
        ):
            problems.append(f"{path}, line {number}: expected NAME=value")
    return {k: v for k, v in dotenv_values(stream=StringIO(text), interpolate=False).items() if v is not None}


# --- site.toml -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Site:
    """What `site.toml` says for people: free tables, read once and when it changes."""

    company: Mapping[str, Any] = field(default_factory=dict)
    assistant: Mapping[str, Any] = field(default_factory=dict)
    widget: Mapping[str, Any] = field(default_factory=dict)
    prices: Mapping[str, Any] = field(default_factory=dict)


def load_site(path: Path) -> Site:
    """`site.toml` of a home; an absent file is an empty site. Raises SettingsError."""
    try:
        data = tomllib.loads(path.read_text("utf-8-sig")) if path.exists() else {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from error
    tables = {name: data.get(name, {}) for name in ("company", "assistant", "widget", "prices")}
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise SettingsError(f"{path}: [{name}] must be a table")
    return Site(**tables)

"""The owner's way in: the admin token as it stands now, and links that work once and become a cookie."""

import asyncio
import hashlib
import hmac
import importlib
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from aiohttp import hdrs, web

from mogine.errors import Forbidden, MogineError, NotFound, SettingsError, StoreError
from mogine.serve.access import (
    ADMIN_TOKEN_FILE,
    FORWARDED,
    Gate,
    admin_token,
    is_trusted,
    publish_once,
    without_redis,
)
from mogine.serve.requests import peer_of
from mogine.settings import Settings, load_settings

COOKIE = "mogine_admin"
FOLDER = "admin"
LINK_S = 30 * 60.0
SESSION_S = 12 * 3600.0
LOOK_S = 0.3
CLOCK_S = 3600.0  # what ends later than a session can was written under a wrong clock
SAFE_METHODS = (hdrs.METH_GET, hdrs.METH_HEAD)
VARIABLE = "MOGINE_ADMIN_TOKEN"
_SECRET = re.compile(r"[0-9A-Za-z_-]{43}")

log = logging.getLogger(__name__)


class AdminToken:
    """Called, it gives the token that is in force: a change of `.env` or of `data/admin_token` counts
    within a second, and so ends what the old one had opened."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._settings = settings
        self._clock = clock
        self._token = admin_token(settings)
        # Values given by the process environment, or by a test, stay what they are.
        self._is_fixed = bool(settings.access.admin_token) and settings.sources.get(VARIABLE) != ".env"
        self._paths = (settings.home / ".env", settings.data_path / ADMIN_TOKEN_FILE)
        self._marks = self._look()
        self._looked_at = self._clock()
        self._lock = threading.Lock()

    def __call__(self) -> str:
        if not self._is_fixed and self._clock() - self._looked_at >= LOOK_S:
            with self._lock:
                self._looked_at = self._clock()
                self._renew()
        return self._token

    def _renew(self) -> None:
        marks = self._look()
        newest = max(written_ns for _, written_ns, _ in marks) / 1e9
        # An editor may write a file piece by piece, and half of one is not to be believed.
        if marks == self._marks or 0 <= time.time() - newest < LOOK_S:
            return
        self._marks = marks
        try:
            written = load_settings({}, self._settings.home).access.admin_token
            access = replace(self._settings.access, admin_token=written)
            token = admin_token(replace(self._settings, access=access))
        except SettingsError as error:
            log.error("the admin token stays as it was: %s", error.message)
            return
        self._marks = self._look()
        if token != self._token:
            self._token = token
            log.warning("a new admin token is in force")

    def _look(self) -> tuple[tuple[int, int, int], ...]:
        marks = []
        for path in self._paths:
            try:
                found = path.stat()
                marks.append((found.st_ino, found.st_mtime_ns, found.st_size))
            except OSError:
                marks.append((0, 0, 0))
        return tuple(marks)


@dataclass(frozen=True, slots=True)
class Session:
    """One browser of the owner."""

    value: str
    expires_at: datetime


SESSION: web.RequestKey[Session | None] = web.RequestKey("SESSION")


class Shelf(Protocol):
    """Where links and sessions lie, by names that give no secret away."""

    is_alone: bool  # whether what was put last lies on this machine, though it should be known to all

    def put(self, name: str, expires_at: int, lasts_s: float) -> None:
        """Keep when `name` ends, at least for `lasts_s`. Raises StoreError."""

    def find(self, name: str) -> str | None:
        """What was kept of `name`."""

    def take(self, name: str) -> bool:
        """Let `name` go; of several that do so at once one is told that it was there."""

    def clear(self) -> None:
        """Let everything go."""


class Files:
    """A `Shelf` in a folder, for all servers of a home."""

    is_alone = False

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock

    def put(self, name: str, expires_at: int, lasts_s: float) -> None:
        """See `Shelf.put`."""
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for path in self._paths():
                if not _is_good(self.find(path.name), self._clock()):
                    path.unlink(missing_ok=True)
            # Whole when it appears: who sweeps takes an empty one for one that has ended.
            publish_once(self._folder / name, f"{expires_at}\n")
        except OSError as error:
            raise StoreError(
                f"data/{FOLDER} cannot be written: {error.strerror or error}; is the disk full?"
            ) from error

    def find(self, name: str) -> str | None:
        """See `Shelf.find`."""
        try:
            return (self._folder / name).read_text("ascii")
        except (OSError, ValueError):
            return None

    def take(self, name: str) -> bool:
        """See `Shelf.take`. Raises StoreError."""
        try:
            (self._folder / name).unlink()
        except FileNotFoundError:
            return False
        except OSError as error:
            raise StoreError(f"data/{FOLDER} cannot be changed: {error.strerror or error}") from error
        return True

    def clear(self) -> None:
        """See `Shelf.clear`."""
        for path in self._paths():
            path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return [*self._folder.glob("link-*"), *self._folder.glob("session-*")]


class AdminSessions:
    """Links and sessions on a shelf, so that all servers that use it know the same.

    A name there is made of the secret and the admin token: the shelf gives no secret away, and with another
    token everything on it is void. What is kept says when it ends.
    """

    def __init__(
        self, shelf: Shelf, token: Callable[[], str], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._shelf = shelf
        self._token = token
        self._clock = clock

    @property
    def is_alone(self) -> bool:
        """Whether the last link is good on this machine only, though it should be on all."""
        return self._shelf.is_alone

    def new_link(self) -> str:
        """A secret that `redeem` takes once within LINK_S. Raises StoreError."""
        return self._make("link", LINK_S)[0]

    def redeem(self, link: str) -> Session:
        """A new session for a link. Raises NotFound for one that is used up, too old or made up."""
        name = self._name("link", link)
        if name is None or self._end_of(name) is None:
            raise _no_link()
        # The session first: on a full disk the link is good for another try.
        value, expires_at = self._make("session", SESSION_S)
        try:
            is_first = self._shelf.take(name)
        except MogineError:
            self.end(value)
            raise
        if not is_first:
            self.end(value)
            raise _no_link()
        return Session(value, datetime.fromtimestamp(expires_at, UTC))

    def find(self, value: str) -> Session | None:
        """The session of a cookie, while it lasts."""
        name = self._name("session", value)
        expires_at = self._end_of(name) if name else None
        return None if expires_at is None else Session(value, datetime.fromtimestamp(expires_at, UTC))

    def end(self, value: str) -> None:
        """Nobody gets in by this session any more."""
        if name := self._name("session", value):
            self._shelf.take(name)

    def _make(self, kind: str, lasts_s: float) -> tuple[str, float]:
        value = secrets.token_urlsafe(32)
        name = self._name(kind, value)
        expires_at = round(self._clock() + lasts_s)
        if name is None:
            raise AssertionError("a secret of ours has the form of one")
        self._shelf.put(name, expires_at, lasts_s)
        return value, expires_at

    def _name(self, kind: str, value: str) -> str | None:
        if not _SECRET.fullmatch(value):
            return None
        words = f"{kind}:{value}".encode()
        return f"{kind}-{hmac.new(self._token().encode(), words, hashlib.sha256).hexdigest()}"

    def _end_of(self, name: str) -> float | None:
        """When what is called `name` ends; None when it has ended or never was."""
        text = self._shelf.find(name)
        return float(text) if text is not None and _is_good(text, self._clock()) else None


def _is_good(text: str | None, now: float) -> bool:
    """Whether something that ends at `text` has not ended."""
    try:
        return now < float(text or 0) <= now + SESSION_S + CLOCK_S
    except ValueError:
        return False


class Doorkeeper:
    """Whether the cookie of a request opens admin routes; and the cookies of a server.

    A browser sends a cookie whoever made it ask. So it counts for nothing that another site, or another port
    of this machine, has begun; and what changes something must say that it comes from a page of this server.
    """

    def __init__(self, settings: Settings, sessions: AdminSessions) -> None:
        self._trusted = settings.access.trusted_proxies
        self._base_path = settings.proxy.base_path
        self._sessions = sessions

    async def recognise(self, request: web.Request) -> None:
        """Look for the session that the request's cookie names, for whoever asks afterwards."""
        if value := request.cookies.get(COOKIE, ""):
            request[SESSION] = await asyncio.to_thread(self._sessions.find, value)

    def session(self, request: web.Request) -> Session | None:
        """The session of a request that was recognised."""
        return request.get(SESSION)

    def admits(self, request: web.Request) -> bool:
        """Whether the cookie is good. Raises Forbidden when it is, but not for this request."""
        if COOKIE not in request.cookies or self.session(request) is None:
            return False
        self.check_page(request)
        return True

    def check_page(self, request: web.Request) -> None:
        """Raises Forbidden unless a page of this very server asks, as far as a browser tells."""
        origin = request.headers.get(hdrs.ORIGIN)
        is_read = request.method in SAFE_METHODS
        if request.headers.get("Sec-Fetch-Site", "same-origin") not in ("same-origin", "none"):
            raise _other_page()
        if (origin is None and not is_read) or (origin is not None and not Gate.is_own(origin, request)):
            raise _other_page()

    def let_in(self, request: web.Request, response: web.StreamResponse, session: Session) -> None:
        """Sets the cookie, for scripts unreadable and for other sites unusable."""
        response.set_cookie(
            COOKIE,
            session.value,
            max_age=int(SESSION_S),
            path=self._path(request),
            secure=self._is_secure(request),
            httponly=True,
            samesite="Strict",
        )

    async def show_out(self, request: web.Request, response: web.StreamResponse) -> None:
        """Ends the session and takes the cookie back."""
        await asyncio.to_thread(self._sessions.end, request.cookies.get(COOKIE, ""))
        response.del_cookie(
            COOKIE,
            path=self._path(request),
            secure=self._is_secure(request),
            httponly=True,
            samesite="Strict",
        )

    def redeem(self, link: str) -> Session:
        """See AdminSessions.redeem."""
        return self._sessions.redeem(link)

    def _path(self, request: web.Request) -> str:
        """The public prefix; whoever comes without a proxy sees the server at its root."""
        return self._base_path if any(name in request.headers for name in FORWARDED) else "/"

    def _is_secure(self, request: web.Request) -> bool:
        is_proxy = is_trusted(peer_of(request), self._trusted)
        told = request.headers.get("X-Forwarded-Proto", "").rpartition(",")[2].strip().lower()
        return request.secure or (is_proxy and told == "https")


def open_sessions(settings: Settings, token: Callable[[], str] | None = None) -> AdminSessions:
    """The links and sessions of a home, or of all homes that use its Redis."""
    return AdminSessions(_shelf(settings), token or AdminToken(settings))


def end_all(settings: Settings) -> None:
    """Every link and session is void, also if the token should be put back one day."""
    _shelf(settings).clear()


def _shelf(settings: Settings) -> Shelf:
    files = Files(settings.data_path / FOLDER)
    if not settings.access.redis_url:
        return files
    try:
        shared = importlib.import_module("mogine.serve.admin_redis")
    except ImportError as error:
        raise without_redis() from error
    shelf: Shelf = shared.RedisShelf(settings.access.redis_url, files)
    return shelf


def _no_link() -> MogineError:
    return NotFound(
        "this link was used, or is older than 30 minutes; `mogine admin link` on the server makes a new one"
    )


def _other_page() -> Forbidden:
    return Forbidden("only pages of this server may do that with your session", reason="origin_not_allowed")

"""The owner's way in: the admin token as it stands now, and links that work once and become a cookie."""

import contextlib
import hashlib
import hmac
import logging
import re
import secrets
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from aiohttp import hdrs, web

from mogine.errors import Forbidden, MogineError, NotFound, SettingsError, StoreError
from mogine.serve.access import ADMIN_TOKEN_FILE, FORWARDED, Gate, admin_token, is_trusted, publish_once
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


class AdminSessions:
    """Links and sessions as files of `data/admin/`, so that all servers of a home know the same.

    A file's name is made of the secret and the admin token: the folder gives no secret away, and with another
    token everything in it is void. Its text says when it ends.
    """

    def __init__(
        self, folder: Path, token: Callable[[], str], *, clock: Callable[[], float] = time.time
    ) -> None:
        self._folder = folder
        self._token = token
        self._clock = clock

    def new_link(self) -> str:
        """A secret that `redeem` takes once within LINK_S. Raises StoreError."""
        return self._make("link", LINK_S)[0]

    def redeem(self, link: str) -> Session:
        """A new session for a link. Raises NotFound for one that is used up, too old or made up."""
        path = self._path("link", link)
        if path is None or self._end_of(path) is None:
            raise _no_link()
        # The session first: on a full disk the link is good for another try.
        value, expires_at = self._make("session", SESSION_S)
        try:
            path.unlink()  # of several that redeem at once one succeeds
        except FileNotFoundError:
            self.end(value)
            raise _no_link() from None
        except OSError as error:
            self.end(value)
            raise StoreError(f"the link cannot be used up: {error.strerror or error}") from error
        return Session(value, datetime.fromtimestamp(expires_at, UTC))

    def find(self, value: str) -> Session | None:
        """The session of a cookie, while it lasts."""
        path = self._path("session", value)
        expires_at = self._end_of(path) if path else None
        return None if expires_at is None else Session(value, datetime.fromtimestamp(expires_at, UTC))

    def end(self, value: str) -> None:
        """Nobody gets in by this session any more."""
        if path := self._path("session", value):
            path.unlink(missing_ok=True)

    def _make(self, kind: str, lasts_s: float) -> tuple[str, float]:
        value = secrets.token_urlsafe(32)
        path = self._path(kind, value)
        expires_at = round(self._clock() + lasts_s)
        if path is None:
            raise AssertionError("a secret of ours has the form of one")
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._sweep()
            # Whole when it appears: who sweeps takes an empty one for one that has ended.
            publish_once(path, f"{expires_at}\n")
        except OSError as error:
            raise StoreError(
                f"data/{FOLDER} cannot be written: {error.strerror or error}; is the disk full?"
            ) from error
        return value, expires_at

    def _path(self, kind: str, value: str) -> Path | None:
        if not _SECRET.fullmatch(value):
            return None
        words = f"{kind}:{value}".encode()
        return self._folder / f"{kind}-{hmac.new(self._token().encode(), words, hashlib.sha256).hexdigest()}"

    def _end_of(self, path: Path) -> float | None:
        """When what `path` stands for ends; None when it has ended or never was."""
        try:
            expires_at = float(path.read_text("ascii"))
        except (OSError, ValueError):
            return None
        return expires_at if self._clock() < expires_at <= self._clock() + SESSION_S + CLOCK_S else None

    def _sweep(self) -> None:
        for path in self._folder.iterdir():
            if path.name.startswith(("link-", "session-")) and self._end_of(path) is None:
                path.unlink(missing_ok=True)


class Doorkeeper:
    """Whether the cookie of a request opens admin routes; and the cookies of a server.

    A browser sends a cookie whoever made it ask. So it counts for nothing that another site, or another port
    of this machine, has begun; and what changes something must say that it comes from a page of this server.
    """

    def __init__(self, settings: Settings, sessions: AdminSessions) -> None:
        self._trusted = settings.access.trusted_proxies
        self._base_path = settings.proxy.base_path
        self._sessions = sessions

    def session(self, request: web.Request) -> Session | None:
        """The session that the request's cookie names."""
        return self._sessions.find(request.cookies.get(COOKIE, ""))

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

    def show_out(self, request: web.Request, response: web.StreamResponse) -> None:
        """Ends the session and takes the cookie back."""
        self._sessions.end(request.cookies.get(COOKIE, ""))
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
    """The links and sessions of a home."""
    return AdminSessions(settings.data_path / FOLDER, token or AdminToken(settings))


def end_all(settings: Settings) -> None:
    """Every link and session is void, also if the token should be put back one day."""
    for path in (settings.data_path / FOLDER).glob("*-*"):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _no_link() -> MogineError:
    return NotFound(
        "this link was used, or is older than 30 minutes; `mogine admin link` on the server makes a new one"
    )


def _other_page() -> Forbidden:
    return Forbidden("only pages of this server may do that with your session", reason="origin_not_allowed")

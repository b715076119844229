"""Who asked, without knowing who: a hash of the visitor's address under a salt that lives for one day."""

import contextlib
import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, time, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

SALT_BYTES = 32
MAX_KNOWN = 10_000
KEPT_LONGER_S = 3_600  # an answer that began before midnight may end after it
SALT_NAME = re.compile(r"visitor_salt\.\d{4}-\d{2}-\d{2}")

log = logging.getLogger(__name__)


def utc_now() -> datetime:
    """The time now, aware."""
    return datetime.now(UTC)


class Visitors:
    """Hashes of addresses: equal within a day, unrelated between days, and nobody can compute them later.

    The salt of a day is a file in `folder`, so that several servers agree on it; the salts of other
    days are removed when it is made or first read. Several machines agree by `proposals` and `agree`.
    """

    def __init__(self, folder: Path, timezone: ZoneInfo, now: Callable[[], datetime] = utc_now) -> None:
        self._folder = folder
        self._timezone = timezone
        self._now = now
        self._day = ""
        self._salt = b""
        self._day_ends_at = self._checked_at = datetime.min.replace(tzinfo=UTC)
        self._hashes: dict[str, str] = {}
        self._agreed: dict[str, bytes] = {}

    def proposals(self) -> list[tuple[str, str, int]]:
        """Of today and tomorrow what is not agreed on yet: the day, a salt in hex digits, and for how many
        seconds it is needed."""
        now = self._now().astimezone(self._timezone)
        wanted = []
        for day in (now.date(), now.date() + timedelta(days=1)):
            name = day.isoformat()
            if name not in self._agreed:
                ends_at = datetime.combine(day + timedelta(days=1), time(), self._timezone)
                salt = self._salt_of(name) if day == now.date() else secrets.token_bytes(SALT_BYTES)
                wanted.append((name, salt.hex(), round((ends_at - now).total_seconds()) + KEPT_LONGER_S))
        return wanted

    def agree(self, day: str, salt: str) -> None:
        """From now on the hashes of `day` are made with this salt, in hex digits, as on all machines."""
        today = self._now().astimezone(self._timezone).date().isoformat()
        self._agreed = {known: kept for known, kept in self._agreed.items() if known >= today}
        self._agreed[day] = bytes.fromhex(salt)
        if day == self._day and self._agreed[day] != self._salt:
            self._checked_at, self._day = datetime.max.replace(tzinfo=UTC), ""

    def hash(self, bucket: str) -> str:
        """16 hex digits for the visitor who is counted under `bucket` (an address or its /64)."""
        now = self._now()
        if not self._checked_at <= now < self._day_ends_at:
            self._begin_day(now)
        known = self._hashes.get(bucket)
        if known is None:
            if len(self._hashes) >= MAX_KNOWN:
                self._hashes.clear()
            words = bucket.encode("utf-8", "replace")
            known = hmac.new(self._salt, words, hashlib.sha256).hexdigest()[:16]
            self._hashes[bucket] = known
        return known

    def _begin_day(self, now: datetime) -> None:
        local = now.astimezone(self._timezone)
        day = local.date().isoformat()
        if day != self._day:
            self._hashes.clear()
            self._salt, self._day = self._salt_of(day), day
        # A clock that was set is noticed: backwards at once, forwards at the day's end.
        self._checked_at = now
        midnight = datetime.combine(local.date() + timedelta(days=1), time(), self._timezone)
        self._day_ends_at = midnight.astimezone(UTC)

    def _salt_of(self, day: str) -> bytes:
        path = self._folder / f"visitor_salt.{day}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            for old in self._folder.glob("visitor_salt.*"):
                if old != path and SALT_NAME.fullmatch(old.name):
                    old.unlink(missing_ok=True)
            agreed = self._agreed.get(day)
            if agreed is not None:
                self._publish(path, agreed)
                return agreed
            if not path.exists():
                self._publish(path)
            salt = bytes.fromhex(path.read_text("ascii"))
            if len(salt) == SALT_BYTES:
                return salt
            log.warning("%s holds no salt; visitors are counted anew until it is deleted", path.name)
        except (OSError, ValueError) as error:
            # An answer must not fail because a visitor cannot be counted.
            log.warning("%s cannot be kept (%s); visitors are counted anew", path.name, type(error).__name__)
        return self._agreed.get(day) or secrets.token_bytes(SALT_BYTES)

    def _publish(self, path: Path, agreed: bytes | None = None) -> None:
        # Written under another name and linked: of several servers that start at once, one wins. What all
        # machines have agreed on takes the place of what was there.
        draft = self._folder / f".salt.{secrets.token_hex(8)}"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write((agreed or secrets.token_bytes(SALT_BYTES)).hex())
            if agreed is not None:
                os.replace(draft, path)
            else:
                with contextlib.suppress(FileExistsError):
                    os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)

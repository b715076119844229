"""`site.toml` as it is now: read again when the file changes, kept as it was while it holds a mistake."""

import logging
import os
import time
from pathlib import Path

from mogine.errors import SettingsError
from mogine.settings import Site, load_site

WINDOW_S = 0.05
MAX_LOOKS = 5  # within a window: a busy server need not look for each question

log = logging.getLogger(__name__)


class SiteFile:
    """Asked for each question; a look costs one `stat`, and a change is seen within WINDOW_S."""

    def __init__(self, path: Path, site: Site) -> None:
        self._path = path
        self._name = str(path)  # once: this is the cheaper half of the look
        self._site = site
        self._mark = self._look()
        self._window_ends_at = 0.0
        self._looks = 0

    def now(self) -> Site:
        """The site; a file that cannot be read leaves the last good one in place and is told in the log."""
        now = time.monotonic()
        if now >= self._window_ends_at:
            self._window_ends_at, self._looks = now + WINDOW_S, 0
        if self._looks >= MAX_LOOKS:
            return self._site
        self._looks += 1
        if self._look() != self._mark:
            self.read_again()
        return self._site

    def read_again(self) -> Site:
        """The site as the file has it in this moment, changed or not."""
        self._mark = self._look()
        try:
            self._site = load_site(self._path)
        except SettingsError as error:
            log.error("%s", error.message)
        return self._site

    def _look(self) -> tuple[int, int, int]:
        try:
            found = os.stat(self._name)
        except OSError:
            return (0, 0, 0)
        return (found.st_ino, found.st_mtime_ns, found.st_size)

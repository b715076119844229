"""Telling who started us how we are: systemd by its socket, PM2 by Node's channel."""

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from typing import Self

from mogine.errors import SettingsError

PM2_READY = b'"ready"\n'
BEATS_PER_LIMIT = 3


class Herald:
    """Says ready, alive, reloading and stopping; silent where nobody has asked to be told.

    systemd: NOTIFY_SOCKET and WATCHDOG_USEC (sd_notify(3)). PM2 with `wait_ready`: NODE_CHANNEL_FD, on which
    Node reads one JSON value per line.
    """

    def __init__(self, *, address: str = "", watchdog_s: float = 0.0, channel: int | None = None) -> None:
        self._address = address
        self._watchdog_s = watchdog_s
        self._channel = channel

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> Self:
        """As the environment asks. Raises SettingsError when what it says cannot be."""
        try:
            for_us = int(environ.get("WATCHDOG_PID") or os.getpid()) == os.getpid()
            watchdog_s = int(environ.get("WATCHDOG_USEC") or 0) / 1e6 if for_us else 0.0
            channel = int(environ["NODE_CHANNEL_FD"]) if environ.get("NODE_CHANNEL_FD") else None
        except ValueError as error:
            raise SettingsError(
                "WATCHDOG_USEC, WATCHDOG_PID and NODE_CHANNEL_FD of the environment must be numbers"
            ) from error
        return cls(address=environ.get("NOTIFY_SOCKET", ""), watchdog_s=watchdog_s, channel=channel)

    @property
    def beat_s(self) -> float:
        """Seconds between two `alive`; 0 when nobody watches."""
        return self._watchdog_s / BEATS_PER_LIMIT

    def ready(self, words: str) -> None:
        """All servers answer; `words` is what `systemctl status` shows."""
        self._tell("READY=1", f"STATUS={words}")
        if self._channel is not None:
            with contextlib.suppress(OSError):  # a supervisor that is gone needs no news
                os.write(self._channel, PM2_READY)

    def alive(self) -> None:
        """The loop turns. Who is stuck does not get to say this."""
        self._tell("WATCHDOG=1")

    def reloading(self) -> None:
        """Settings are being read again; `ready` follows."""
        self._tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """No new questions from now on."""
        self._tell("STOPPING=1", "STATUS=waiting for running answers")

    def _tell(self, *lines: str) -> None:
        if not self._address:
            return
        name = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto("\n".join(lines).encode(), name)

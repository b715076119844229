"""Who listens on a port of this machine, as far as the kernel tells this user."""

import contextlib
import os
import socket
import struct
from pathlib import Path

PROC = Path("/proc")
LISTEN = "0A"


def holder(port: int, proc: Path = PROC) -> str:
    """Such as `process 4711 (mogine serve all)`; "" when that cannot be seen (another user's, no /proc)."""
    inodes = {inode for table in ("tcp", "tcp6") for inode in _listening(proc / "net" / table, port)}
    if not inodes:
        return ""
    for folder in proc.iterdir():
        if folder.name.isdigit() and _holds(folder, inodes):
            return f"process {folder.name} ({_command(folder)})"
    return ""


def listening_addresses(port: int, proc: Path = PROC) -> list[str]:
    """The addresses on which something listens on `port`, such as 127.0.0.1 or ::."""
    found = []
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for fields in _lines(proc / "net" / table):
            address, _, number = fields[1].partition(":")
            if fields[3] == LISTEN and int(number, 16) == port:
                words = [int(address[place : place + 8], 16) for place in range(0, len(address), 8)]
                found.append(socket.inet_ntop(family, struct.pack(f"={len(words)}I", *words)))
    return found


def _listening(table: Path, port: int) -> list[str]:
    return [
        fields[9]
        for fields in _lines(table)
        if fields[3] == LISTEN and int(fields[1].partition(":")[2], 16) == port
    ]


def _lines(table: Path) -> list[list[str]]:
    try:
        return [line.split() for line in table.read_text("ascii").splitlines()[1:]]
    except OSError:
        return []


def _holds(folder: Path, inodes: set[str]) -> bool:
    try:
        entries = list((folder / "fd").iterdir())
    except OSError:
        return False
    for entry in entries:
        with contextlib.suppress(OSError):  # closed since it was listed
            link = os.readlink(entry)
            if link.startswith("socket:[") and link[8:-1] in inodes:
                return True
    return False


def _command(folder: Path) -> str:
    """Our own command as it was called; of another program only its name, for its arguments may be secret."""
    try:
        words = (folder / "cmdline").read_bytes().decode("utf-8", "replace").split("\0")
    except OSError:
        return "?"
    names = [Path(word).name for word in words]
    if "mogine" in names[:3]:
        place = names.index("mogine")
        text = " ".join(["mogine", *words[place + 1 :]]).strip()[:200]
    else:
        text = names[0][:40]
    return "".join(char if char.isprintable() else "?" for char in text) or "?"

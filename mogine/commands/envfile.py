"""Changing one line of an `.env`: the rest stays as it stands, and a crash leaves the old file or the new."""

import os
import re
import secrets
from pathlib import Path

from mogine.errors import SettingsError
from mogine.settings import MAX_ENV_BYTES


def read(path: Path) -> str:
    """The text of the file; "" when there is none. Raises SettingsError."""
    try:
        if not path.exists():
            return ""
        if path.stat().st_size > MAX_ENV_BYTES:
            raise SettingsError(f"{path} is larger than 1 MiB; that is no settings file")
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read ({type(error).__name__})") from error


def with_value(text: str, name: str, value: str) -> str:
    """`text` with `name` set to `value`: in its last line, else under its remark, else at the end."""
    end = "\r\n" if "\r\n" in text else "\n"
    lines = text.splitlines(keepends=True)
    written = f"{name}={value}{end}"
    is_set = re.compile(rf"\s*(export\s+)?{re.escape(name)}\s*=")
    places = [place for place, line in enumerate(lines) if is_set.match(line)]
    if places:
        # dotenv takes the last one; another above it would only mislead.
        lines[places[-1]] = written
        return "".join(line for place, line in enumerate(lines) if place not in places[:-1])
    remark = re.compile(rf"#\s*{re.escape(name)}\s*=")
    for place, line in enumerate(lines):
        if remark.match(line):
            return "".join((*lines[:place], written, *lines[place + 1 :]))
    if lines and not lines[-1].endswith(("\n", "\r")):
        lines[-1] += end
    return "".join((*lines, written))


def write(path: Path, text: str) -> None:
    """Put `text` in the place of the file, mode 0600, all at once. Raises SettingsError."""
    target = path.resolve()  # a link stays a link
    draft = target.with_name(f".{target.name}.{secrets.token_hex(6)}")
    try:
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(file.fileno())
            os.rename(draft, target)
        except BaseException:
            draft.unlink(missing_ok=True)
            raise
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise SettingsError(f"{path} cannot be written: {error.strerror or type(error).__name__}") from error

"""What a new home is made of: `.env`, `site.toml`, `docs/` and `data/`; what exists is never touched."""

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from mogine.errors import SettingsError
from mogine.settings import Settings, variables

ENV_HEAD = """\
# The settings of this mogine home.
#
# Take the # away in front of a name to set it. What stands in the process environment wins over this file,
# and this file wins over the default, which is shown behind the =. `mogine config show` tells every value and
# where it came from. Keep this file to yourself: it holds keys.
"""


def env_template() -> str:
    """The `.env` of a new home: every setting with its meaning and its default, commented out."""
    defaults = Settings(home=Path())
    parts, section = [ENV_HEAD], None
    for variable in variables():
        if variable.section != section:
            section = variable.section
            tree = type(getattr(defaults, section)) if section else None
            title = (tree.__doc__ if tree else None) or "All servers."
            parts.append(f"\n# --- {title.strip().rstrip('.')}\n")
        parts.append(f"\n# {variable.help}\n# {variable.env}={_written(variable.default)}\n")
    return "".join(parts)


def make_home(home: Path, *, samples: bool) -> Iterator[tuple[str, bool]]:
    """Make what is missing of a home, and tell for each part whether it was made or already there.

    Nothing that exists is touched, and each part appears whole or not at all.
    """
    shipped = resources.files("mogine") / "samples"
    try:
        home.mkdir(parents=True, exist_ok=True)
        yield ".env", _write_new(home / ".env", env_template().encode(), mode=0o600)
        site = (shipped / "site.toml").read_bytes() if samples else _bare_site().encode()
        yield "site.toml", _write_new(home / "site.toml", site, mode=0o644)
        with resources.as_file(shipped / "docs") as documents:
            copied = _copy_new(documents if samples else None, home / "docs")
        yield "docs", copied
        data = home / "data"
        made = not data.exists()
        data.mkdir(mode=0o700, exist_ok=True)
        if samples and copied:
            # The samples' vectors come along: taking the samples in need not wait for the model.
            (data / "kb").mkdir(mode=0o700, exist_ok=True)
            _write_new(data / "kb" / "vectors.db", (shipped / "vectors.db").read_bytes(), mode=0o600)
        yield "data", made
    except OSError as error:
        raise SettingsError(
            f"{home} cannot be made a mogine home: {error.strerror or error} ({error.filename}). "
            "Choose a folder that you may write to: `mogine init DIR`"
        ) from error


def _written(value: Any) -> str:
    """A value as it would be written into `.env`."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(str(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _bare_site() -> str:
    return (
        "# What your assistant knows about you; `mogine init` in an empty folder shows a filled one.\n\n"
        '[company]\nname = ""\n\n[assistant]\n\n[widget]\n'
    )


def _write_new(path: Path, content: bytes, *, mode: int) -> bool:
    """Write `path` whole, or leave what is there; the name appears only when the content is on disk."""
    if path.is_symlink() or path.exists():
        return False
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # A link, unlike a rename, never replaces what another run has put there meanwhile.
        os.link(draft, path)
    except FileExistsError:
        return False
    finally:
        draft.unlink(missing_ok=True)
    return True


def _copy_new(source: Path | None, target: Path) -> bool:
    """Copy a folder (or make an empty one) under a name of its own, then give it the real one."""
    if target.is_symlink() or target.exists():
        return False
    draft = Path(tempfile.mkdtemp(prefix=".docs-", dir=target.parent))
    try:
        if source:
            shutil.copytree(source, draft, dirs_exist_ok=True)
        draft.chmod(0o755)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return True

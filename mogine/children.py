"""What every child process of ours needs to find mogine."""

import sys
from pathlib import Path


def import_path() -> list[str]:
    """Where the child finds mogine and its libraries: never the current folder by accident."""
    own = str(Path(__file__).resolve().parents[1])
    return list(dict.fromkeys([own, *(entry for entry in sys.path if entry and Path(entry).is_absolute())]))

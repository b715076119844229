"""A look for gaps in a process of its own: a server that is asked for them must not carry a model for it."""

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mogine.errors import MogineError
from mogine.gaps.loop import open_gaps
from mogine.settings import AnalyticsSettings, KnowledgeSettings, Settings

START = "import sys; sys.path[:] = sys.argv[1:]; from mogine.gaps.look import main; main()"


def job(settings: Settings) -> bytes:
    """What the child reads; nothing of it stands on its command line."""
    fields = {
        "home": str(settings.home),
        "kb": asdict(settings.kb),
        "analytics": asdict(settings.analytics),
    }
    return json.dumps(fields).encode()


def main() -> None:
    """In the child: one `Gaps.refresh`, told as JSON."""
    os.nice(10)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # a library that prints must not speak into the answer
    fields = json.loads(sys.stdin.buffer.read())
    kb: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in fields["kb"].items()}
    settings = Settings(
        home=Path(fields["home"]),
        kb=KnowledgeSettings(**kb),
        analytics=AnalyticsSettings(**fields["analytics"]),
    )
    try:
        answer: Mapping[str, Any] = asdict(open_gaps(settings).refresh())
    except MogineError as error:
        answer = {"problem": error.message}
    replies.write(json.dumps(answer).encode())
    replies.close()

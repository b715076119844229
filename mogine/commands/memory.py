"""What `mogine chat` keeps in `data/`: the last conversation and the questions typed, for the owner alone."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mogine.chat import ChatMessage
from mogine.errors import SettingsError, StoreError

MAX_MESSAGES = 40
MAX_CONVERSATION_CHARS = 24_000
MAX_HISTORY_BYTES = 512 * 1024


@dataclass
class Conversation:
    """Turns so far, oldest first; `session_id` is what a server knows them by."""

    messages: list[ChatMessage] = field(default_factory=list)
    session_id: str = ""

    def asking(self, question: str) -> list[ChatMessage]:
        """The turns that go out with `question`: the latest that fit, beginning with one of the user's."""
        turns = [*self.messages, ChatMessage("user", question)][-MAX_MESSAGES:]
        while len(turns) > 1 and sum(len(turn.text) for turn in turns) > MAX_CONVERSATION_CHARS:
            del turns[0]
        while turns[0].role != "user":
            del turns[0]
        return turns

    def add(self, question: str, answer: str) -> None:
        """Remember one turn; the oldest are forgotten."""
        turn = [ChatMessage("user", question), ChatMessage("assistant", answer)]
        self.messages = [*self.messages, *turn][-MAX_MESSAGES:]

    def clear(self) -> None:
        self.messages = []
        self.session_id = ""


class Memory:
    """The two files. Without a home (`folder` None) nothing is kept."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder

    def load(self) -> Conversation:
        """The last conversation. Raises SettingsError when there is none, StoreError when it is damaged."""
        path = self._path("chat_last.json")
        if path is None or not path.exists():
            raise SettingsError("there is no conversation to continue here; `mogine chat` begins one")
        try:
            value = json.loads(path.read_text("utf-8"))
            messages = [ChatMessage(_role(m["role"]), str(m["text"])) for m in value["messages"]]
            return Conversation(messages, str(value.get("session_id", "")))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path} cannot be read ({error}); remove it to begin anew") from error

    def save(self, conversation: Conversation) -> None:
        """Replaces the file in one step. Raises StoreError."""
        path = self._path("chat_last.json")
        if path is None:
            return
        value: dict[str, Any] = {
            "messages": [{"role": m.role, "text": m.text} for m in conversation.messages],
            "session_id": conversation.session_id,
        }
        draft = path.with_suffix(f".{os.getpid()}.new")
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(value, file)
            draft.replace(path)
        except OSError as error:
            raise StoreError(f"{path} cannot be written ({error.strerror}); the chat goes on") from error

    def history_path(self) -> Path | None:
        """The file of typed questions, made if need be and cut to its later half when it is large."""
        path = self._path("chat_history")
        if path is None:
            return None
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            with os.fdopen(descriptor, "rb+") as file:
                os.fchmod(descriptor, 0o600)
                if os.fstat(descriptor).st_size > MAX_HISTORY_BYTES:
                    file.seek(-MAX_HISTORY_BYTES // 2, os.SEEK_END)
                    kept = _whole_entries(file.read())
                    file.seek(0)
                    file.write(kept)
                    file.truncate()
        except OSError:
            return None  # typed questions are then remembered for this run only
        return path

    def _path(self, name: str) -> Path | None:
        return self._folder / name if self._folder else None


def _whole_entries(data: bytes) -> bytes:
    start = data.find(b"\n\n#")  # an entry begins with a comment line after a blank one
    return data[start + 1 :] if start >= 0 else b""


def _role(value: Any) -> Any:
    if value not in ("user", "assistant"):
        raise ValueError(f"{value!r} is no role")
    return value


def said(messages: Sequence[ChatMessage]) -> int:
    """How many questions a conversation holds."""
    return sum(message.role == "user" for message in messages)

"""What the chat keeps in `data/`: bounded, private, replaced in one step."""

import stat
from pathlib import Path

import pytest

from mogine.chat import ChatMessage
from mogine.commands.memory import MAX_HISTORY_BYTES, Conversation, Memory
from mogine.errors import SettingsError, StoreError


def test_saved_conversation_is_loaded_again(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "data")
    conversation = Conversation(session_id="s1")
    conversation.add("问", "答 😀")
    memory.save(conversation)
    assert memory.load() == conversation
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["chat_last.json"]


def test_long_conversation_sends_its_latest_turns_beginning_with_the_user() -> None:
    conversation = Conversation()
    for number in range(50):
        conversation.add(f"q{number} " + "x" * 1000, f"a{number}")
    sent = conversation.asking("last")
    assert sent[-1] == ChatMessage("user", "last")
    assert sent[0].role == "user"
    assert 20 < len(sent) <= 40
    assert sum(len(turn.text) for turn in sent) <= 24_000
    assert len(conversation.messages) == 40


def test_one_giant_turn_before_is_left_out() -> None:
    conversation = Conversation()
    conversation.add("q", "a" * 30_000)
    assert conversation.asking("next") == [ChatMessage("user", "next")]


def test_without_a_home_nothing_is_kept(tmp_path: Path) -> None:
    memory = Memory(None)
    memory.save(Conversation([ChatMessage("user", "q")]))
    assert memory.history_path() is None
    with pytest.raises(SettingsError):
        memory.load()


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"messages": 1}', '{"messages": [{}]}', "\udcff"])
def test_damaged_file_names_itself(tmp_path: Path, text: str) -> None:
    (tmp_path / "chat_last.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(StoreError, match=r"chat_last\.json"):
        Memory(tmp_path).load()


def test_file_of_questions_is_private_and_bounded(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "data")
    path = memory.history_path()
    assert path is not None
    assert path.read_bytes() == b""
    path.chmod(0o644)
    entries = [f"\n# 2026-01-01 00:00:{n % 60:02}\n+question {n}\n" for n in range(30_000)]
    path.write_text("".join(entries))
    assert path.stat().st_size > MAX_HISTORY_BYTES
    assert memory.history_path() == path
    kept = path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(kept) <= MAX_HISTORY_BYTES // 2
    assert kept.startswith("\n# 2026")
    assert "".join(entries).endswith(kept)

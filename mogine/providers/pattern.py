"""Frames that differ from one already parsed in nothing but a piece of text: read without parsing them."""

from collections.abc import Callable

PROBE = "\u6d4b probe 1"
MAX_TRIES = 5


class Pattern:
    """What stands before and after the text of a stream's frames.

    JSON around a string means the same whatever the string holds, as long as nothing in it ends or escapes
    it. So a frame whose bytes before and after the text are those of a frame that was parsed is not parsed:
    with most vendors, every frame between the first and the last. Any other is told by `text_of` giving None.
    """

    __slots__ = ("_head", "_tail", "_tries")

    def __init__(self) -> None:
        self._head = b""
        self._tail = b""
        self._tries = 0

    @property
    def wants_more(self) -> bool:
        """Whether a frame should be shown to `learn`: none is known, or the last one no longer fits."""
        return self._tries < MAX_TRIES

    def learn(self, frame: bytes, text: str, read: Callable[[bytes], str | None]) -> None:
        """Take `frame`, which says `text` and nothing else, as the pattern. `read` tells what a frame says.

        Whether the text really stands where it seems to is tried out with another one in its place.
        """
        self._tries += 1
        quoted = b'"%b"' % text.encode("utf-8", "replace")
        if not text.isprintable() or b"\\" in quoted or frame.count(quoted) != 1:
            return
        place = frame.find(quoted) + 1
        head, tail = frame[:place], frame[place + len(quoted) - 2 :]
        if read(head + PROBE.encode() + tail) == PROBE:
            self._head, self._tail = head, tail

    def text_of(self, block: bytes) -> str | None:
        """What `block` says if it is whole frames of the pattern; None when it has to be parsed."""
        head, tail = self._head, self._tail
        if not head or not block.startswith(head) or not block.endswith(tail):
            return None
        inner = block[len(head) : -len(tail)]
        if b'"' in inner:
            texts = inner.split(tail + head)
            if any(b'"' in text for text in texts):
                return None
            inner = b"".join(texts)
        if not inner or b"\\" in inner:
            return None
        try:
            text = str(inner, "utf-8")
        except UnicodeDecodeError:
            return None
        # Control characters are not allowed in JSON, and some others end lines for some readers.
        return text if text.isprintable() else None

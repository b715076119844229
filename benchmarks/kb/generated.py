"""A knowledge base of any size in little time: texts of common words, vectors drawn by lot from the text."""

import hashlib
import random
from collections.abc import Iterator, Sequence

import numpy as np

from mogine.kb.embedders import Vectors, unit
from mogine.kb.generations import Generations
from mogine.kb.passages import Document, Passage

DIMENSIONS = 384
_TOPICS = 500
_HAN = (
    "退款运费保修安装价格门店电话订单发票积分会员售后质量检测系统"
    "设备温度湿度压力传感网络数据平台接口文档用户帐户"
)
_TEXT = (
    "refund shipping warranty install price store phone order invoice member quality sensor network data "
    "platform interface document user account module cable voltage pump filter valve report update release"
)
_WORDS = _TEXT.split()


class GeneratedEmbedder:
    """Vectors that lie in clouds as those of a real model do; the same text always gets the same one."""

    name = "generated"
    dimensions = DIMENSIONS

    def __init__(self) -> None:
        self._centres = np.random.default_rng(7).standard_normal((_TOPICS, DIMENSIONS))

    def embed_passages(self, texts: Sequence[str]) -> Vectors:
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) for text in texts]
        rows = [
            self._centres[seed % _TOPICS] + np.random.default_rng(seed).standard_normal(DIMENSIONS)
            for seed in seeds
        ]
        return unit(np.array(rows, dtype=np.float32).reshape(len(texts), DIMENSIONS))

    def embed_questions(self, texts: Sequence[str]) -> Vectors:
        return self.embed_passages(texts)

    def warm(self) -> None:
        """There is no model."""

    def close(self) -> None:
        """There is no connection."""


def document(number: int, passages: int, version: int = 0) -> tuple[Document, list[Passage]]:
    """A document of Chinese and English passages of about 400 characters."""
    source = f"docs/{number:06d}.md"
    digest = hashlib.sha256(f"{number}.{version}".encode()).hexdigest()
    chance = random.Random(digest)
    cut = []
    for position in range(passages):
        if number % 2:
            text = " ".join(chance.choice(_WORDS) + str(chance.randrange(40)) for _ in range(50))
        else:
            text = "".join(chance.choice(_HAN) for _ in range(400))
        cut.append(Passage(f"{digest}:{position}", source, f"Document {number}", "", position, text))
    return Document(source, f"Document {number}", "", digest), cut


def documents(count: int, passages_each: int) -> Iterator[tuple[Document, list[Passage]]]:
    """`count` documents."""
    for number in range(count):
        yield document(number, passages_each)


def build(generations: Generations, passages: int, passages_each: int = 10) -> str:
    """A base of `passages` passages; the name of its generation."""
    with generations.begin(GeneratedEmbedder()) as draft:
        for each, cut in documents(passages // passages_each, passages_each):
            draft.replace(each, cut)
        return draft.commit()

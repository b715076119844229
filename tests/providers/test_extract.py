"""The provider without a model: what it quotes, in which language, and what it says when there is nothing."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogine.chat import ChatRequest, Citation, Finish, Usage
from mogine.providers.extract import MAX_QUOTE_CHARS, ExtractProvider, paragraphs
from tests.providers.outcome import ask, question


def cited(
    number: int, excerpt: str, score: float = 0.8, title: str = "退货政策", heading: str = ""
) -> Citation:
    return Citation(number, title, "returns.md", heading, "", excerpt, score)


def request(text: str, *citations: Citation, stream: bool = True) -> ChatRequest:
    return question(text, provider="extract", citations=citations, stream=stream)


async def test_the_best_passages_are_quoted_with_their_numbers() -> None:
    outcome = await ask(
        ExtractProvider(),
        request(
            "怎么退货？",
            cited(1, "七天内可以无理由退货。"),
            cited(2, "运费由买家承担。", 0.7, heading="运费"),
        ),
    )
    assert outcome.text == (
        "以下是资料中与您的问题最相关的原文（直接引用，未经模型加工）：\n\n"
        "> 七天内可以无理由退货。 [1]\n> —— 《退货政策》\n\n"
        "> 运费由买家承担。 [2]\n> —— 《退货政策 · 运费》"
    )
    assert outcome.finish == Finish("stop", "extract")
    assert outcome.usage == Usage(0, 0)
    assert outcome.raw == b""


async def test_the_answer_is_in_the_language_of_the_question() -> None:
    outcome = await ask(ExtractProvider(), request("How do I return it?", cited(1, "七天内可以退货。")))
    assert "without a language model" in outcome.text and "> 七天内可以退货。 [1]" in outcome.text


@pytest.mark.parametrize(
    ("asked", "says"),
    [("有没有冰箱？", "没有找到"), ("Do you sell fridges?", "Nothing about this was found")],
)
async def test_nothing_found_is_said_plainly(asked: str, says: str) -> None:
    outcome = await ask(ExtractProvider(), request(asked))
    assert says in outcome.text and "[1]" not in outcome.text
    assert outcome.finish == Finish("stop", "extract")


async def test_without_a_stream_there_is_one_chunk() -> None:
    streamed = await ask(ExtractProvider(), request("退货", cited(1, "七天。")))
    once = await ask(ExtractProvider(), request("退货", cited(1, "七天。"), stream=False))
    assert (once.chunks, once.events) == (1, streamed.events)
    assert streamed.chunks > 1


def test_only_passages_near_the_best_are_quoted_and_at_most_three() -> None:
    citations = tuple(
        cited(n, f"第{n}条。", score) for n, score in enumerate([0.3, 0.9, 0.8, 0.2, 0.7, 0.6], 1)
    )
    numbers = [text[text.rindex("[") + 1] for text in paragraphs("第几条", citations)[1:]]
    assert numbers == ["2", "3", "5"]


def quoted_numbers(asked: str, *citations: Citation) -> list[str]:
    return [text[text.rindex("[") + 1] for text in paragraphs(asked, citations)[1:]]


@pytest.mark.parametrize(
    ("asked", "numbers"), [("怎么退货？", ["1", "3"]), ("How do I return goods?", ["2", "4"])]
)
def test_passages_in_the_language_of_the_question_come_alone_when_they_answer(
    asked: str, numbers: list[str]
) -> None:
    passages = (
        cited(1, "七天内可以退货。", 0.6),
        cited(2, "Goods can be returned within seven days.", 0.62),
        cited(3, "退货请先联系客服。", 0.5),
        cited(4, "Please contact us first (客服).", 0.45),
    )
    assert quoted_numbers(asked, *passages) == numbers


def test_an_answer_that_stands_only_in_the_other_language_is_quoted() -> None:
    passages = (cited(1, "Goods can be returned within seven days.", 0.6), cited(2, "我们的历史。", 0.3))
    assert quoted_numbers("怎么退货？", *passages) == ["1"]


def test_blank_passages_are_not_quoted() -> None:
    assert len(paragraphs("退货", (cited(1, " \n "), cited(2, "七天。", 0.1)))) == 2
    assert "没有找到" in paragraphs("退货", (cited(1, " \n "),))[0]


def test_a_long_passage_is_cut_to_the_sentences_about_the_question() -> None:
    filler = "本公司成立于一九九八年，总部位于杭州。" * 30
    text = filler + "大件商品的退货运费由买家承担。" + filler
    quoted = paragraphs("大件商品退货运费谁出", (cited(1, text),))[1]
    assert "大件商品的退货运费由买家承担。" in quoted
    assert quoted.startswith("\n\n> …") and "… [1]" in quoted
    assert len(quoted) < MAX_QUOTE_CHARS + 60


def test_an_english_passage_is_cut_at_its_sentences() -> None:
    text = "We were founded in 1998. " * 30 + "Version 2.5 ships with a charger. " + "Call us. " * 30
    quoted = paragraphs("Is a charger included?", (cited(1, text, title="Box"),))[1]
    assert "Version 2.5 ships with a charger." in quoted and quoted.endswith("> — Box")


def test_one_endless_sentence_is_cut() -> None:
    quoted = paragraphs("甲", (cited(1, "甲" * 5000),))[1]
    assert "甲… [1]" in quoted and len(quoted) < MAX_QUOTE_CHARS + 60


def test_every_line_of_a_passage_is_quoted() -> None:
    quoted = paragraphs("价格", (cited(1, "| 型号 | 价格 |\n|---|---|\n\n| X1 | 99 |"),))[1]
    assert quoted.strip().splitlines()[:3] == ["> | 型号 | 价格 |", "> |---|---|", "> | X1 | 99 | [1]"]


def test_a_title_cannot_break_out_of_its_line() -> None:
    quoted = paragraphs("x", (cited(1, "text", title="a\n\n# b"),))[1]
    assert quoted == "\n\n> text [1]\n> — a # b"


@given(st.text(max_size=40), st.lists(st.tuples(st.text(max_size=900), st.floats(0, 1)), max_size=5))
def test_any_passages_give_an_answer(asked: str, passages: list[tuple[str, float]]) -> None:
    citations = tuple(cited(n, text, score) for n, (text, score) in enumerate(passages, 1))
    texts = paragraphs(asked, citations)
    assert texts[0] and len(texts) <= 4
    assert all("\n\n> " in text and len(text) < MAX_QUOTE_CHARS * 3 + 60 for text in texts[1:])

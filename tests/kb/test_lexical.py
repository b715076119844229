"""Terms, and the keyword index over them."""

import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogine.kb.lexical import LexicalIndex, LexicalWriter, question_terms, shares_of_words, terms
from mogine.kb.texts import Readers, create_texts, open_for_writing


@contextmanager
def index_of(folder: Path, *texts: str) -> Iterator[LexicalIndex]:
    """An index with the numbers 1, 2, ... for `texts`."""
    create_texts(folder)
    with closing(open_for_writing(folder)) as db:
        writer = LexicalWriter(db)
        for number, text in enumerate(texts, start=1):
            writer.add(number, text)
        writer.finish()
    readers = Readers(folder, 1)
    yield LexicalIndex(readers, len(texts))
    readers.close()


def first(index: LexicalIndex, question: str) -> int | None:
    return next(iter(index.search(question, 10)), None)


def test_chinese_is_cut_into_characters_and_pairs() -> None:
    assert list(terms("退款吗")) == ["退", "款", "吗", "退款", "款吗"]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("申請退款裡面", "申请退款里面"),  # Traditional
        ("ＡＢＣ１２３", "abc123"),  # full width
        ("Refunds refunded", "refund refunding"),
        ("café", "cafe"),
        ("company’s", "company's"),
        ("ｶﾞｽ", "ガス"),
    ],
)
def test_spellings_of_one_word_are_one_term(one: str, other: str) -> None:
    assert list(terms(one)) == list(terms(other))


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("XJ200", "型号 XJ-200 的价格"),
        ("XJ-200 多少钱", "型号XJ200"),
        ("iphone 15", "支持 iPhone15 和更新的手机"),
        ("7200", "it costs 7,200 yuan"),
        ("100 ml", "每瓶100ml"),
        ("your email", "write an e-mail"),
        ("wi-fi", "Wifi setup"),
        ("v2.0.1", "since V201"),
    ],
)
def test_codes_and_numbers_are_found_however_they_are_written(
    tmp_path: Path, question: str, text: str
) -> None:
    with index_of(tmp_path, "nothing of it", text, "something else") as index:
        assert first(index, question) == 2


def test_a_single_letter_of_a_code_is_no_word() -> None:
    assert list(terms("A4")) == ["a4"]
    assert list(terms("state-of-the-art")) == ["state", "of", "the", "art"]


@pytest.mark.parametrize(
    ("question", "text"),
    [
        ("这个多少钱", "售价见下表"),
        ("我想退錢", "退款政策"),
        ("What's your phone number?", "Hotline: 400"),
        ("Are you hiring", "Open positions and careers"),
    ],
)
def test_what_visitors_say_finds_what_documents_say(tmp_path: Path, question: str, text: str) -> None:
    with index_of(tmp_path, "完全无关的一段话", text, "nothing of it") as index:
        assert first(index, question) == 2


def test_words_that_a_phrase_stands_for_count_as_one(tmp_path: Path) -> None:
    """A text with one of them answers as well as one that has all."""
    with index_of(tmp_path, "价格", "其他的内容") as index:
        assert index.search("多少钱", 5) == pytest.approx(index.search("价格", 5))


def test_documents_may_say_it_like_the_visitor(tmp_path: Path) -> None:
    with index_of(tmp_path, "the guarantee lasts two years", "快递三天送达", "nothing of it") as index:
        assert first(index, "guarantee") == 1
        assert first(index, "发什么快递") == 2


@pytest.mark.parametrize("slip", ["waranty", "warrranty", "warrenty", "warratny"])
def test_a_slip_of_the_hand_finds_the_word_that_was_meant(tmp_path: Path, slip: str) -> None:
    with index_of(tmp_path, "the warranty lasts two years", "nothing of it") as index:
        assert first(index, f"how long is the {slip}") == 1


def test_a_word_that_is_there_or_short_is_no_slip(tmp_path: Path) -> None:
    with index_of(tmp_path, "filters", "fillers", "care", "nothing of it") as index:
        assert list(index.search("fillers", 5)) == [2]
        assert index.search("card", 5) == {}


def test_question_is_asked_without_stop_words_but_never_with_nothing() -> None:
    assert question_terms("Who is the president of France?") == ["presid", "franc"]
    assert "什么" not in question_terms("退款需要什么")
    assert question_terms("the who") == ["the", "who"]
    assert question_terms("?!") == []


@given(st.text())
def test_any_text_gives_terms_that_the_index_can_hold(text: str) -> None:
    for term in terms(text):
        assert '"' not in term
        assert " " not in term


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LexicalIndex]:
    with index_of(tmp_path_factory.mktemp("hostile"), "refund AND return", "OR NOT near(x)") as index:
        yield index


@given(
    st.text(max_size=80) | st.sampled_from(['" OR "', "a*", "NEAR(a b)", "terms:x", "^a", "a AND", "{a}:b"])
)
def test_any_question_is_answered(hostile: LexicalIndex, question: str) -> None:
    assert all(0 <= share <= 1 for share in hostile.search(question, 5).values())


def test_two_character_word_is_found(tmp_path: Path) -> None:
    with index_of(
        tmp_path, "发票在订单页面下载。", "如何申请退款？七天内可以退回。", "门店营业时间"
    ) as index:
        assert first(index, "退款") == 2
        assert first(index, "怎么退款呢") == 2


def test_traditional_question_finds_simplified_text_and_the_reverse(tmp_path: Path) -> None:
    with index_of(tmp_path, "发票在订单页面下载", "營業時間：上午九點") as index:
        assert first(index, "發票下載") == 1
        assert first(index, "营业时间") == 2


def test_share_is_a_part_of_a_perfect_match(tmp_path: Path) -> None:
    """FTS5's own BM25 reckons the same idf: a text that holds nothing but the asked word comes near 1."""
    with index_of(
        tmp_path, "warranty " * 40, "warranty and many other words " * 20, "nothing of it"
    ) as index:
        shares = index.search("warranty", 10)
        absent = index.search("warranty zebra", 10)
    assert list(shares) == [1, 2]
    assert 0.9 < shares[1] <= 1
    assert absent[1] < shares[1], "a word of the question that is missing lowers the share"


def test_words_that_every_passage_has_still_count_in_a_tiny_base(tmp_path: Path) -> None:
    with index_of(tmp_path, "refund policy", "refund form") as index:
        assert all(share > 0.3 for share in index.search("refund", 10).values())


def test_words_that_are_everywhere_are_not_asked_for_in_a_large_base(tmp_path: Path) -> None:
    texts = [f"common word number{i}" for i in range(1200)]
    with index_of(tmp_path, *texts) as index:
        assert list(index.search("common number77", 50)) == [78]
        assert len(index.search("common", 50)) == 50, "unless there is nothing else to ask for"


def test_long_question_costs_no_more_than_its_rarest_terms(tmp_path: Path) -> None:
    with index_of(tmp_path, "needle in the text", "hay") as index:
        asked = " ".join(f"filler{i}" for i in range(3000)) + " needle"
        assert first(index, asked) == 1, "terms that stand nowhere take no place"


def test_only_the_rarest_terms_of_a_question_are_asked_for(tmp_path: Path) -> None:
    words = ["qz" + chr(ord("a") + i) * 3 for i in range(20)]
    texts = [" ".join(words[i:]) for i in range(20)]
    with index_of(tmp_path, *texts, words[19]) as index:
        found = index.search(" ".join(words), 50)
        assert 21 not in found and len(found) == 12, "the twelve rarest stand in the first twelve passages"


def test_words_that_stand_nowhere_lessen_the_share(tmp_path: Path) -> None:
    with index_of(tmp_path, "needle in the text", "hay") as index:
        assert index.search("needle absent", 1)[1] < index.search("needle", 1)[1]


def test_removed_text_is_found_no_more_and_its_counts_are_gone(tmp_path: Path) -> None:
    create_texts(tmp_path)
    with closing(open_for_writing(tmp_path)) as db:
        writer = LexicalWriter(db)
        writer.add(1, "退款 refund")
        writer.add(2, "发票 invoice refund")
        writer.finish()
        writer = LexicalWriter(db)
        writer.remove(1, "退款 refund")
        writer.finish()
        assert term_counts(db) == {"发": 1, "票": 1, "发票": 1, "invoic": 1, "refund": 1}
        db.execute("INSERT INTO keywords (keywords) VALUES ('integrity-check')")
    readers = Readers(tmp_path, 1)
    index = LexicalIndex(readers, 1)
    assert first(index, "退款") is None
    assert first(index, "refund") == 2
    readers.close()


def term_counts(db: sqlite3.Connection) -> dict[str, int]:
    return dict(db.execute("SELECT term, passages FROM term_counts"))


def test_shares_are_finite_in_an_empty_base(tmp_path: Path) -> None:
    with index_of(tmp_path) as index:
        assert index.search("退款", 10) == {}
        assert all(math.isfinite(share) for share in index.search("a", 10).values())


def test_words_that_all_texts_have_tell_none_of_them_apart() -> None:
    texts = ["S600 filters last a year", "the S600 makes 42 dB of noise", "S600: free installation"]
    shares = shares_of_words("how noisy is the S600, what noise", texts)
    assert shares[1] > 0 and (shares[0], shares[2]) == (0.0, 0.0)


def test_words_are_found_in_every_form_that_documents_write_them_in() -> None:
    texts = ["退貨運費由公司承擔", "companies and their Filters", "education"]
    assert shares_of_words("退货运费", texts) == [1.0, 0.0, 0.0]
    assert shares_of_words("company filter", texts) == [0.0, 1.0, 0.0]
    assert shares_of_words("cat", texts) == [0.0, 0.0, 0.0], "cat is no beginning of a word in education"


def test_shares_of_nothing_are_nothing() -> None:
    assert shares_of_words("？", ["a", "b"]) == [0.0, 0.0]
    assert shares_of_words("words", []) == []

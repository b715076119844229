"""Numbers and addresses of persons are gone before a row is written; other numbers stay."""

import random
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mogine.analytics.masking import BANK_CARD, EMAIL, ID_CARD, PHONE, TextPolicy, bare_url, load_salt, mask
from mogine.analytics.records import QueryRecord


def id_card(random: random.Random) -> str:
    body = f"{random.randint(110000, 659999)}{random.randint(1940, 2015)}{random.randint(1, 12):02d}"
    body += f"{random.randint(1, 28):02d}{random.randint(0, 999):03d}"
    weights = [2 ** (17 - place) % 11 for place in range(17)]
    total = sum(int(digit) * weight for digit, weight in zip(body, weights, strict=True))
    return body + "10X98765432"[total % 11]


def bank_card(random: random.Random) -> str:
    prefix, length = random.choice([("62", 16), ("62", 19), ("62", 18), ("4", 16), ("53", 16), ("37", 15)])
    body = prefix + "".join(random.choices("0123456789", k=length - len(prefix) - 1))
    for last in "0123456789":
        digits = [int(d) for d in reversed(body + last)]
        if sum(digits[::2] + [sum(divmod(2 * d, 10)) for d in digits[1::2]]) % 10 == 0:
            return body + last
    raise AssertionError("one of ten digits must fit")


def mobile(random: random.Random) -> str:
    number = f"1{random.randint(30, 99)}{random.randint(0, 99999999):08d}"
    form = random.choice(["{}", "+86{}", "+86 {}", "86-{}", "0086{}"])
    if random.random() < 0.3:
        number = f"{number[:3]}{random.choice(' -')}{number[3:7]}{random.choice(' -')}{number[7:]}"
    return form.format(number)


def test_nearly_every_number_of_a_person_is_found_in_a_thousand_sentences() -> None:
    dice = random.Random(7)
    missed = []
    for _ in range(1000):
        make, kind = dice.choice([(id_card, ID_CARD), (bank_card, BANK_CARD), (mobile, PHONE)])
        number = make(dice)
        sentence = dice.choice(
            ["我的号码是{}，请联系", "{}", "call me at {} please", "卡号:{}。", "电话{}谢谢"]
        )
        if mask(sentence.format(number)) not in (sentence.format(kind), sentence.format("+" + kind)):
            missed.append(number)
    assert len(missed) <= 10, missed


def test_hardly_any_other_number_is_taken_for_one() -> None:
    dice = random.Random(8)
    makers = [
        lambda: f"订单 {dice.randint(2020, 2029)}{dice.randint(1, 12):02d}{dice.randint(0, 10**11):011d}",
        lambda: f"¥{dice.randint(1, 999999)}.{dice.randint(0, 99):02d}",
        lambda: f"2026-{dice.randint(1, 12):02d}-{dice.randint(1, 28):02d} 12:30:{dice.randint(10, 59)}",
        lambda: f"model X{dice.randint(1000, 99999)}, serial {dice.randint(0, 10**9)}",
        lambda: f"π = 3.{dice.randint(10**13, 10**14)}",
        lambda: f"010-{dice.randint(10**7, 10**8 - 1)}",
        lambda: f"{dice.randint(10**19, 10**25)}",
    ]
    texts = [dice.choice(makers)() for _ in range(1000)]
    assert len([text for text in texts if mask(text) != text]) <= 10


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("打13812345678吧", f"打{PHONE}吧"),
        ("１３８１２３４５６７８", PHONE),
        ("13812345678 13912345678", f"{PHONE} {PHONE}"),
        ("138 1234 5678 或 139-1234-5678", f"{PHONE} 或 {PHONE}"),
        ("身份证11010519491231002X", f"身份证{ID_CARD}"),
        ("身份证11010519491231002x。", f"身份证{ID_CARD}。"),
        ("110105194912310021", "110105194912310021"),
        ("6222 0212 3456 7890", "6222 0212 3456 7890"),
        ("4111 1111 1111 1111", BANK_CARD),
        ("4111111111111111 13812345678", f"{BANK_CARD} {PHONE}"),
        ("mail a.b+c@example.co.uk!", f"mail {EMAIL}!"),
        ("我的邮箱是zhang_san@example.com，谢谢", f"我的邮箱是{EMAIL}，谢谢"),
        ("ＡＢＣ＠ｅｘａｍｐｌｅ．ｃｏｍ", EMAIL),
        ("a@b", "a@b"),
        ("", ""),
    ],
)
def test_examples(text: str, masked: str) -> None:
    assert mask(text) == masked


@given(st.text(max_size=200))
def test_masking_twice_is_masking_once(text: str) -> None:
    assert mask(mask(text)) == mask(text)


@given(st.text(alphabet="0123456789 -Xx@.a", max_size=400))
def test_text_made_of_digits_never_breaks_it(text: str) -> None:
    mask(text)


def test_a_page_address_keeps_neither_query_nor_user() -> None:
    assert (
        bare_url("https://me:secret@example.com/a/13812345678?token=x#y") == f"https://example.com/a/{PHONE}"
    )
    assert bare_url("https://[broken") == ""
    assert bare_url("") == ""


def record() -> QueryRecord:
    return QueryRecord(
        started_at=datetime(2026, 3, 10, tzinfo=UTC),
        kind="chat",
        provider="extract",
        status="ok",
        question="我是 13812345678",
        answer="您好 13812345678",
    )


def test_questions_are_kept_as_text_hash_or_not_at_all() -> None:
    assert TextPolicy().apply(record()).question == f"我是 {PHONE}"
    assert TextPolicy(questions="none").apply(record()).question == ""
    hashed = TextPolicy(questions="hash", salt=b"a").apply(record()).question
    assert hashed.startswith("hmac:")
    assert hashed == TextPolicy(questions="hash", salt=b"a").apply(record()).question
    assert hashed != TextPolicy(questions="hash", salt=b"b").apply(record()).question


def test_answers_are_masked_or_not_kept() -> None:
    assert TextPolicy().apply(record()).answer == f"您好 {PHONE}"
    assert TextPolicy(answers=False).apply(record()).answer == ""


def test_the_salt_is_made_once_and_only_for_its_owner(tmp_path: Path) -> None:
    path = tmp_path / "data" / "question_salt"
    salt = load_salt(path)
    assert len(salt) == 32
    assert load_salt(path) == salt
    assert path.stat().st_mode & 0o777 == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["question_salt"]

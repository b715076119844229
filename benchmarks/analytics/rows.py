"""Rows as a website's assistant leaves them: by time of day, with pages and questions that repeat."""

import random
import re
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import mogine
from mogine.analytics.records import QueryRecord, Status
from mogine.chat import Citation

HOURS = (2, 1, 1, 1, 1, 2, 4, 8, 14, 18, 20, 18, 14, 16, 19, 20, 18, 14, 12, 13, 14, 12, 8, 4)
MODELS = (
    ("doubao", "doubao-1-5-thinking-vision-pro-250428"),
    ("dashscope", "qwen-plus"),
    ("openai", "deepseek-chat"),
    ("extract", "extract"),
)
ERRORS = ("upstream_timeout", "upstream_busy", "upstream_error", "kb_unavailable")
THINGS = (
    "S800",
    "S900 Pro",
    "滤芯",
    "净水器",
    "充电器",
    "遥控器",
    "battery",
    "filter",
    "发票",
    "押金",
    "会员卡",
    "礼品卡",
)
ASKS = (
    "{}多少钱？", "{}坏了怎么办", "{}保修多久？", "怎么退{}", "{}什么时候发货？", "如何更换{}？",
    "{}可以开发票吗", "退款多久到账？", "How long is the warranty of the {}?", "Where can I buy a {}?",
    "Can I return my {}?",
    "{}和{}有什么区别？", "你们的客服电话是多少", "{}不能用了，灯一直闪红色，已经试过重启，请问还能退换吗？",
)  # fmt: skip


def sentences() -> list[str]:
    """What answers are made of: the sentences of the sample documents."""
    found: list[str] = []
    for path in sorted((Path(mogine.__file__).parent / "samples" / "docs").rglob("*.md")):
        text = re.sub(r"[#*|`>\[\]-]+", " ", path.read_text("utf-8"))
        found += [" ".join(s.split()) for s in re.findall(r"[^。！？.!?\n]{8,}[。！？.!?]", text)]
    return found


def rows(count: int, days: int, until: datetime, seed: int = 7) -> Iterator[QueryRecord]:
    """`count` rows over the `days` before `until`, oldest first."""
    rng = random.Random(seed)
    words = sentences()
    documents = [f"docs/{name}-{n}.md" for n in range(20) for name in ("refund", "shipping", "manual")]
    pages = [f"https://www.example.com/products/{n}.html" for n in range(120)]
    weights = [1 / (n + 1) for n in range(len(pages))]
    page_of = rng.choices(pages, weights, k=4096)
    cited = [
        tuple(
            Citation(
                k + 1,
                f"{source} 的标题",
                source,
                "常见问题",
                f"https://www.example.com/{source}",
                "",
                round(0.4 + rng.random() / 2, 4),  # as answer.cite rounds them
            )
            for k, source in enumerate(rng.sample(documents, 3))
        )
        for _ in range(2000)
    ]
    common = [rng.choice(ASKS).format(rng.choice(THINGS), rng.choice(THINGS)) for _ in range(400)]
    per_day = count / days
    begin = until - timedelta(days=days)
    shares = [share / sum(HOURS) for share in HOURS]
    made = 0
    for hour in range(days * 24):
        at_hour = begin + timedelta(hours=hour)
        goal = count if hour == days * 24 - 1 else None
        # The hours are those of Shanghai.
        due = per_day * shares[(at_hour.hour + 8) % 24]
        here = (goal - made) if goal is not None else min(count - made, int(due + rng.random()))
        visitors = max(1, int(per_day / 2.5))
        for step in range(here):
            yield _row(
                rng,
                at_hour + timedelta(milliseconds=3_600_000 * (step + rng.random()) / here),
                visitors,
                words,
                common,
                page_of,
                cited,
            )
        made += here


def _row(
    rng: random.Random,
    at: datetime,
    visitors: int,
    words: list[str],
    common: list[str],
    pages: list[str],
    cited: list[tuple[Citation, ...]],
) -> QueryRecord:
    dice = rng.random()
    status: Status = (
        "ok" if dice < 0.94 else "error" if dice < 0.96 else "aborted" if dice < 0.98 else "refused"
    )
    provider, model = MODELS[0 if dice < 0.7 else 1 if dice < 0.9 else 2 if dice < 0.97 else 3]
    day = (at + timedelta(hours=8)).toordinal()
    number = rng.randrange(visitors)
    visitor = f"{(number * 2654435761 + day * 40503) & 0xFFFFFFFFFFFFFFFF:016x}"
    if dice < 0.6 or rng.random() < 0.2:
        question = rng.choice(common)
    else:
        question = f"{rng.choice(ASKS).format(rng.choice(THINGS), rng.choice(THINGS))} {rng.randrange(10**6)}"
    asked = status != "refused"
    return QueryRecord(
        started_at=at,
        kind="chat" if dice > 0.05 else "v1",
        provider=provider,
        status=status,
        session=f"{number:08x}{day:08x}{'5e' * 8}",
        visitor=visitor,
        page_url=pages[rng.randrange(4096)],
        model=model,
        question=question,
        answer="".join(rng.choices(words, k=rng.randrange(2, 7))) if asked else "",
        error_type=rng.choice(ERRORS) if status == "error" else "rate_limited" if status == "refused" else "",
        answered=("yes" if rng.random() < 0.8 else "no") if status == "ok" else "unknown",
        citations=cited[rng.randrange(2000)] if asked else (),
        top_score=0.7 if asked else None,
        prompt_tokens=1200 + rng.randrange(900) if asked else None,
        completion_tokens=80 + rng.randrange(300) if asked else None,
        reasoning_tokens=rng.randrange(200) if asked else None,
        cost_cny=0.002 + rng.random() / 200 if asked else None,
        first_token_ms=int(rng.lognormvariate(6.6, 0.6)) if asked else None,
        duration_ms=int(rng.lognormvariate(8.3, 0.5)),
        feedback="up" if dice < 0.03 else "down" if dice > 0.925 and status == "ok" else "",
        bot=rng.random() < 0.01,
    )

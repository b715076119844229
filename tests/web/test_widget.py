"""The widget on a company's page in a real Chromium: small, apart from the page, going on across pages."""

import asyncio
import re

import pytest
from playwright.async_api import Browser, expect

from mogine.serve.colours import palette
from tests.web.axe import violations
from tests.web.conftest import PHONE, Exchange, PageServer, Visit, visit
from tests.web.test_chat_page import CITATIONS, HOSTILE

pytestmark = pytest.mark.asyncio(loop_scope="session")

HOST = "/company/1"
START = {"request_id": "r" * 44, "session_id": "s" * 32}


async def opened(v: Visit) -> None:
    await v.page.locator(".bubble").click()
    await expect(v.page.locator(".panel")).to_be_visible()


async def ask(v: Visit, server: PageServer, text: str = "怎么退货?") -> Exchange:
    await v.page.fill("#question", text)
    await v.page.press("#question", "Enter")
    return await server.next()


async def answered(exchange: Exchange, text: str, answered: str = "yes") -> None:
    await exchange.send("start", START)
    await exchange.delta(text)
    await exchange.done("stop", answered)


# --- small and apart -------------------------------------------------------------------------------


@pytest.mark.parametrize("server", ["/", "/~temp/mogine_agent/"], indirect=True)
async def test_idle_widget_costs_one_request_and_an_opened_one_works_under_any_prefix(
    browser: Browser, server: PageServer
) -> None:
    async with visit(browser, server, HOST) as v:
        asked: list[str] = []
        v.page.on("request", lambda request: asked.append(request.url))
        await v.page.goto(server.origin + HOST)
        await expect(v.page.locator(".bubble")).to_be_visible()
        await v.page.wait_for_load_state("networkidle")
        ours = [url for url in asked if "company" not in url and "favicon" not in url]
        assert ours == [f"{server.origin}{server.prefix}widget.js"]
        await opened(v)
        await expect(v.page.locator("#title")).to_have_text("晨星助手")
        await expect(v.page.locator("#question")).to_be_focused()
        exchange = await ask(v, server)
        assert exchange.body["page_url"] == server.origin + HOST
        await answered(exchange, "**七天**")
        await expect(v.page.locator(".prose strong")).to_have_text("七天")


async def test_rules_of_the_page_and_of_the_widget_do_not_mix(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, HOST) as v:
        before = await v.page.locator("h1").first.evaluate("(e) => getComputedStyle(e).cssText + e.outerHTML")
        await opened(v)
        await answered(await ask(v, server), "text")
        style = """(e) => {
          const style = getComputedStyle(e);
          return [style.textTransform, style.letterSpacing, style.borderStyle];
        }"""
        for selector in (".prose p", "#send", "#title", "#question"):
            shown = await v.page.locator(selector).evaluate(style)
            assert shown[:2] == ["none", "normal"] and "dashed" not in shown[2], selector
        assert await v.page.locator(".assistant").evaluate("(e) => getComputedStyle(e).fontSize") == "15px"
        await v.page.locator("#close").click()
        after = await v.page.locator("h1").first.evaluate("(e) => getComputedStyle(e).cssText + e.outerHTML")
        assert before == after


async def test_second_tag_adds_no_second_bubble(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, HOST) as v:
        await expect(v.page.locator(".bubble")).to_be_visible()
        await v.page.add_script_tag(url=f"{server.origin}/widget.js")
        await expect(v.page.locator("mogine-widget")).to_have_count(1)


async def test_look_comes_from_the_site_and_the_tag(browser: Browser, server: PageServer) -> None:
    server.setup = {"titles": {"zh": "客服", "en": "Help"}, "colours": palette("#e60012"), "position": "left"}
    server.lang = "zh-CN"
    async with visit(browser, server, HOST) as v:
        bubble = v.page.get_by_role("button", name="打开对话：客服")
        await expect(bubble).to_have_class(re.compile("left"))
        colour = await bubble.evaluate("(e) => getComputedStyle(e).backgroundColor")
        assert colour == "rgb(212, 0, 17)", "a little darker than the site's own, so that it is seen well"
        await bubble.click()
        await expect(v.page.get_by_role("dialog", name="晨星助手")).to_be_visible()
        await expect(v.page.get_by_placeholder("请输入您的问题")).to_be_focused()


# --- conversation ----------------------------------------------------------------------------------


async def test_conversation_and_open_panel_survive_a_change_of_page(
    browser: Browser, server: PageServer
) -> None:
    async with visit(browser, server, HOST) as v:
        await opened(v)
        first = await ask(v, server)
        await answered(first, "七天 [1]")
        await expect(v.page.locator(".actions")).to_be_visible()
        await v.page.goto(f"{server.origin}/company/2")
        await expect(v.page.locator(".prose")).to_have_text("七天 [1]")
        again = await ask(v, server, "and then?")
        assert again.body["session_id"] == START["session_id"]
        await answered(again, "x")
        await v.page.locator("#close").click()
        await v.page.reload()
        await expect(v.page.locator(".bubble")).to_be_visible()
        await expect(v.page.locator(".panel")).to_have_count(0)


async def test_answer_that_was_running_goes_on_where_it_was(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, HOST) as v:
        await opened(v)
        first = await ask(v, server)
        assert first.body["resume"] is True
        await first.send("start", START)
        await first.send("citations", CITATIONS)
        await first.delta("one ")
        await expect(v.page.locator(".prose")).to_have_text("one")
        await v.page.goto(f"{server.origin}/company/2")
        await asyncio.wait_for(first.left.wait(), 5)
        resumed = await server.next()
        assert resumed.request.path == "/api/chat/resume"
        assert resumed.body == START
        assert resumed.request.headers["Last-Event-ID"] == "3"
        await expect(v.page.locator(".prose")).to_have_text("one")
        await resumed.delta("two [1]")
        await resumed.done("stop", "yes")
        await expect(v.page.locator(".prose p")).to_have_text("one two 1")
        await expect(v.page.locator(".sources details")).to_have_count(2)
        assert server.stops == [], "nobody has pressed Stop"


async def test_connection_that_breaks_is_taken_up_again(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, HOST) as v:
        v.expected = ("net::ERR",)
        await opened(v)
        first = await ask(v, server)
        await first.send("start", START)
        await first.delta("one ")
        await expect(v.page.locator(".prose")).to_have_text("one")
        first.cut()
        resumed = await server.next()
        assert resumed.request.headers["Last-Event-ID"] == "2"
        await resumed.delta("two")
        await resumed.done()
        await expect(v.page.locator(".prose")).to_have_text("one two")
        await expect(v.page.locator(".problem")).to_have_count(0)


async def test_answer_that_is_gone_is_told_and_can_be_asked_again(
    browser: Browser, server: PageServer
) -> None:
    async with visit(browser, server, HOST) as v:
        v.expected = ("404",)
        await opened(v)
        first = await ask(v, server)
        await first.send("start", START)
        await first.delta("one ")
        await expect(v.page.locator(".prose")).to_have_text("one")
        await v.page.reload()
        await (await server.next()).refuse(404, "not_found")
        await expect(v.page.locator(".problem p")).to_contain_text("broke off")
        await expect(v.page.locator(".prose")).to_have_text("one")
        await v.page.locator(".problem button").click()
        await answered(await server.next(), "whole")
        await expect(v.page.locator(".prose")).to_have_text("whole")
        await expect(v.page.locator(".answer")).to_have_count(1)


async def test_stop_tells_the_server(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, HOST) as v:
        await opened(v)
        exchange = await ask(v, server)
        await exchange.send("start", START)
        await exchange.delta("half")
        await expect(v.page.locator(".prose")).to_have_text("half")
        await v.page.get_by_role("button", name="Stop").click()
        await asyncio.wait_for(exchange.left.wait(), 5)
        await expect(v.page.locator(".ending")).to_have_text("Stopped.")
        await v.page.reload()
        await expect(v.page.locator(".ending")).to_have_text("Stopped.")
        assert server.stops == [START]
        assert server.waiting == 0


async def test_conversation_is_deleted_and_saved_by_the_visitor(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, HOST) as v:
        await opened(v)
        await answered(await ask(v, server, "问?"), "答")
        await v.page.get_by_role("button", name="More").click()
        async with v.page.expect_download() as download:
            await v.page.get_by_role("button", name="Save this conversation").click()
        file = await (await download.value).path()
        text = file.read_text("utf-8")
        assert "## 问?" in text and "\n答\n" in text
        await v.page.get_by_role("button", name="More").click()
        await v.page.get_by_role("button", name="Delete this conversation").click()
        await expect(v.page.locator(".turn")).to_have_count(0)
        assert "答" not in await v.page.evaluate("JSON.stringify({ ...localStorage })")
        await v.page.reload()
        await expect(v.page.locator("#greeting")).to_be_visible()


@pytest.mark.parametrize("missing", ["body", "storage"])
async def test_it_works_where_a_browser_lacks_something(
    browser: Browser, server: PageServer, missing: str
) -> None:
    scripts = {
        "body": "delete Response.prototype.body;",
        "storage": "for (const n of ['localStorage', 'sessionStorage']) "
        "Object.defineProperty(window, n, { get() { throw new Error('forbidden'); } });",
    }
    async with visit(browser, server, HOST) as v:
        v.expected = ("429",)
        await v.page.add_init_script(scripts[missing])
        await v.page.reload()
        await opened(v)
        exchange = await ask(v, server)
        await exchange.send("start", START)
        await exchange.send_bytes('id: 2\nevent: delta\ndata: {"text": "退'.encode())
        await exchange.send_bytes('款"}\n\n'.encode())
        await expect(v.page.locator(".prose")).to_have_text("退款")
        await exchange.done()
        await expect(v.page.locator(".actions")).to_be_visible()
        await (await ask(v, server)).refuse(429, "rate_limited", {"Retry-After": "7"})
        await expect(v.page.locator(".problem button")).to_have_text(re.compile(r"Ask again in \d s"))
        third = await ask(v, server)
        await third.send("start", START)
        await third.delta("x")
        await expect(v.page.locator(".prose").last).to_have_text("x")
        await v.page.get_by_role("button", name="Stop").click()
        await asyncio.wait_for(third.left.wait(), 5)


# --- what can be done with an answer ---------------------------------------------------------------


async def test_thumbs_are_sent_with_a_reason(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, HOST) as v:
        await opened(v)
        await answered(await ask(v, server), "x")
        server.take_thumbs.clear()
        await v.page.get_by_role("button", name="Not helpful").click()
        await v.page.get_by_role("radio", name="Something is missing").check()
        await v.page.get_by_label("Tell us more (optional)").fill("the price")
        await v.page.locator(".rating").get_by_role("button", name="Send").click()
        assert server.thumbs == [], "why can be told before the thumb has arrived"
        server.take_thumbs.set()
        await expect(v.page.locator(".actions [role=status]")).to_have_text("Thank you, that helps us.")
        assert server.thumbs[0] == {
            "request_id": "r1",
            "session_id": START["session_id"],
            "rating": "down",
            "reason": "",
            "comment": "",
        }
        assert (server.thumbs[1]["reason"], server.thumbs[1]["comment"]) == ("incomplete", "the price")
        await expect(v.page.locator(".handoff")).to_be_visible()
        await v.page.get_by_role("button", name="Helpful", exact=True).click()
        await expect(v.page.get_by_role("button", name="Helpful", exact=True)).to_have_attribute(
            "aria-pressed", "true"
        )
        await v.page.reload()
        await expect(v.page.get_by_role("button", name="Helpful", exact=True)).to_have_attribute(
            "aria-pressed", "true"
        )


async def test_copy_takes_the_answer_as_it_was_written(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, HOST, permissions=["clipboard-read", "clipboard-write"]) as v:
        await opened(v)
        await answered(await ask(v, server), "**bold** [1]")
        await v.page.get_by_role("button", name="Copy").click()
        await expect(v.page.get_by_role("button", name="Copied")).to_be_visible()
        assert await v.page.evaluate("navigator.clipboard.readText()") == "**bold** [1]"


async def test_person_is_offered_when_nothing_was_found(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, HOST) as v:
        await opened(v)
        await answered(await ask(v, server), "I do not know.", "no")
        card = v.page.get_by_role("complementary", name="Talk to a person")
        links = await card.locator("a").evaluate_all("links => links.map((link) => link.href)")
        assert links == ["tel:4000000188", "mailto:service@songjian.example"]
        await card.locator("a").first.evaluate(
            "(a) => a.addEventListener('click', (e) => e.preventDefault())"
        )
        async with v.page.expect_response("**/api/feedback"):
            await card.locator("a").first.click()
        await card.locator("a").first.click()
        assert server.thumbs == [{"request_id": "r1", "session_id": START["session_id"], "handoff": True}]


async def test_picture_of_the_handoff_is_shown_where_it_loads(browser: Browser, server: PageServer) -> None:
    assert server.config is not None
    server.config["handoff"] = {"text": "", "contacts": [], "picture": "api/chat/handoff.picture"}
    drawn = '<svg xmlns="http://www.w3.org/2000/svg" width="80" height="80"/>'
    async with visit(browser, server, HOST) as v:
        v.expected = ("404",)
        await v.page.route(
            "**/handoff.picture", lambda route: route.fulfill(body=drawn, content_type="image/svg+xml")
        )
        await opened(v)
        await answered(await ask(v, server), "I do not know.", "no")
        card = v.page.get_by_role("complementary", name="Talk to a person")
        await card.scroll_into_view_if_needed()
        await expect(card.get_by_role("img")).to_have_js_property("naturalWidth", 80)
        await v.page.unroute("**/handoff.picture")
        await v.page.reload()
        await expect(card).to_be_visible()
        await card.scroll_into_view_if_needed()
        await expect(card.get_by_role("img")).to_have_count(0)


# --- keys, phones, readers -------------------------------------------------------------------------


async def test_keyboard_opens_asks_and_closes_and_the_page_gets_its_focus_back(
    browser: Browser, server: PageServer
) -> None:
    async with visit(browser, server, HOST) as v:
        await v.page.evaluate("window.keys = []; addEventListener('keydown', (e) => keys.push(e.key))")
        await v.page.locator(".bubble").focus()
        await v.page.keyboard.press("Enter")
        await expect(v.page.locator("#question")).to_be_focused()
        await v.page.keyboard.type("hi")
        await v.page.keyboard.press("Enter")
        exchange = await server.next()
        await v.page.keyboard.press("Escape")
        await asyncio.wait_for(exchange.left.wait(), 5)
        await v.page.keyboard.press("ArrowUp")
        await expect(v.page.locator("#question")).to_have_value("hi")
        await v.page.keyboard.press("Escape")
        await expect(v.page.locator(".panel")).to_be_hidden()
        await expect(v.page.locator(".bubble")).to_be_focused()
        assert await v.page.evaluate("keys") == ["Enter"], "what is typed inside is not for the page around"


async def test_phone_shows_a_sheet_that_the_back_button_closes(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, HOST, **PHONE) as v:
        await v.page.locator(".bubble").tap()
        panel = v.page.locator(".panel")
        await expect(panel).to_be_visible()
        await expect(panel).to_have_attribute("aria-modal", "true")
        await expect(panel).to_have_css("animation-play-state", "running")
        box = await panel.bounding_box()
        # Its height is no whole number while it slides in.
        assert box is not None and (round(box["width"]), round(box["height"])) == (390, 720)
        assert await v.page.evaluate("document.documentElement.style.overflow") == "hidden"
        await v.page.go_back()
        await expect(panel).to_be_hidden()
        assert v.page.url == server.origin + HOST
        assert await v.page.evaluate("document.documentElement.style.overflow") == ""
        await v.page.locator(".bubble").tap()
        await v.page.locator("#close").tap()
        await expect(panel).to_be_hidden()
        assert v.page.url == server.origin + HOST


async def test_focus_stays_within_the_sheet(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, HOST, **PHONE) as v:
        await v.page.locator(".bubble").tap()
        await expect(v.page.locator("#starters button")).to_have_count(2)
        for key in ("Tab",) * 12 + ("Shift+Tab",) * 12:
            await v.page.keyboard.press(key)
            assert await v.page.evaluate("document.activeElement.tagName") == "MOGINE-WIDGET"


async def test_hostile_answer_runs_nothing_in_the_page_around(browser: Browser, server: PageServer) -> None:
    """P30, B14"""
    async with visit(browser, server, HOST) as v:
        await opened(v)
        hostile = {
            "number": 1,
            "title": HOSTILE,
            "source": HOSTILE,
            "url": "javascript:alert(1)",
            "excerpt": HOSTILE,
        }
        exchange = await ask(v, server, HOSTILE[:150])
        await exchange.send("start", START)
        await exchange.send("citations", {"citations": [hostile]})
        await exchange.delta(HOSTILE + " [1]")
        await exchange.done()
        await expect(v.page.locator(".sources")).to_be_visible()
        await v.page.reload()
        await expect(v.page.locator(".sources")).to_be_visible()
        assert await v.page.title() == "Company page 1"
        inside = (
            "#log :is(script, img, svg:not(.icon), iframe, style, base, form, [onerror], [onload], [style])"
        )
        await expect(v.page.locator(inside)).to_have_count(0)


async def test_damaged_storage_does_no_harm(browser: Browser, server: PageServer) -> None:
    async with visit(browser, server, HOST) as v:
        await opened(v)
        await answered(await ask(v, server), "x")
        await expect(v.page.locator(".actions")).to_be_visible()
        damage = "for (const key of Object.keys(localStorage)) localStorage[key] = '{\"id\": 1'"
        await v.page.add_init_script(damage)
        await v.page.reload()
        await expect(v.page.locator("#greeting")).to_be_visible()


@pytest.mark.parametrize("phone", [False, True])
async def test_no_state_breaks_a_rule_of_accessibility(
    browser: Browser, server: PageServer, phone: bool
) -> None:
    server.setup = {"colours": palette("#0b6e75")}
    options = {"reduced_motion": "reduce", **(PHONE if phone else {})}
    async with visit(browser, server, HOST, **options) as v:
        v.expected = ("429",)
        # The company's page is not ours to judge.
        await v.page.evaluate("document.querySelector('link[rel=stylesheet]').remove()")
        found = {"idle": await violations(v.page, within="mogine-widget")}
        await opened(v)
        await expect(v.page.locator("#starters button")).to_have_count(2)
        found["welcome"] = await violations(v.page, within="mogine-widget")
        exchange = await ask(v, server)
        await exchange.send("start", START)
        await exchange.send("citations", CITATIONS)
        await exchange.send("reasoning", {"text": "hm"})
        await exchange.delta("| a | b |\n|-|-|\n| 1 | 2 [1] |\n\n`code`")
        await expect(v.page.locator(".prose table")).to_be_visible()
        found["writing"] = await violations(v.page, within="mogine-widget")
        await exchange.done("stop", "no")
        await expect(v.page.locator(".handoff")).to_be_visible()
        await v.page.locator(".cite").click()
        await v.page.get_by_role("button", name="Not helpful").click()
        await expect(v.page.locator(".rating form")).to_be_visible()
        found["answered"] = await violations(v.page, within="mogine-widget")
        await (await ask(v, server)).refuse(429, "rate_limited", {"Retry-After": "60"})
        await expect(v.page.locator(".problem")).to_be_visible()
        await v.page.get_by_role("button", name="More").click()
        found["refused, menu open"] = await violations(v.page, within="mogine-widget")
        assert {state: broken for state, broken in found.items() if broken} == {}

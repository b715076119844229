"""The dashboard in a real Chromium, on real servers with a real record: every screen, hostile rows."""

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Locator, expect

from mogine.analytics.records import QueryRecord
from mogine.analytics.store import AnalyticsStore
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from mogine.kb.passages import Document, Passage
from mogine.serve import runner
from mogine.serve.admin_sessions import open_sessions
from mogine.settings import load_settings
from tests.analytics.rows import cite, row
from tests.fronts.nginx import PREFIX, Fronted
from tests.servers import ADMIN_TOKEN, DEFAULTS
from tests.web.axe import violations
from tests.web.conftest import PageServer, Visit, visit
from tests.web.test_chat_page import HOSTILE

pytestmark = pytest.mark.asyncio(loop_scope="session")

VIEWS = ("overview", "conversations", "gaps", "knowledge", "cost", "quality", "system")
NOW = datetime.now(UTC)


def asked(minutes: int, **changes: Any) -> QueryRecord:
    """A question of some minutes ago."""
    return row(timedelta(minutes=minutes), at=NOW, **changes)


def take_in(home: Path, *texts: str) -> None:
    """One more generation with these documents."""
    with Generations(home / "data/kb").begin(NoEmbedder()) as draft:
        for number, text in enumerate(texts):
            source = f"docs/{number}.md"
            passage = Passage(f"{number}:0", source, f"Title {number}", "Heading", 0, text)
            draft.replace(Document(source, f"Title {number}", text, f"digest-{text}"), [passage])
        draft.commit()


class Owner:
    """Servers that run, and a way in."""

    def __init__(self, running: runner.Running, base: str) -> None:
        self.running = running
        self.base = base

    def link(self) -> str:
        return f"{self.base}dashboard/#link={open_sessions(self.running.settings).new_link()}"

    @asynccontextmanager
    async def signed_in(self, browser: Browser, view: str = "", **options: Any) -> AsyncIterator[Visit]:
        """The dashboard, opened by a link."""
        origin = "/".join(self.base.split("/")[:3])
        server = PageServer(origin, self.base)
        path = self.link().removeprefix(origin).replace("/dashboard/", f"/dashboard/?{view}")
        async with visit(browser, server, path, ignore_https_errors=True, **options) as v:
            await ready(v)
            yield v


@asynccontextmanager
async def owner(home: Path, rows: Sequence[QueryRecord], *names: str, **env: str) -> AsyncIterator[Owner]:
    settings = load_settings({**DEFAULTS, **env}, home)
    if rows:
        AnalyticsStore(settings.analytics_path).insert(list(rows))
    async with runner.started(settings, names or ("analytics", "kb")) as running:
        yield Owner(running, running.url("analytics") + "/")


async def ready(v: Visit) -> None:
    await expect(v.page.locator("#content")).to_have_attribute("aria-busy", "false")


async def show(v: Visit, view: str) -> None:
    await v.page.get_by_role("navigation").get_by_role("link", name=view).click()
    await ready(v)


def tile(v: Visit, label: str) -> Locator:
    """One number with its label."""
    return v.page.locator(".tile", has=v.page.get_by_text(label, exact=True))


# --- signing in ------------------------------------------------------------------------------------


async def test_link_signs_in_once_and_leaves_nothing_in_the_address(browser: Browser, home: Path) -> None:
    async with owner(home, [asked(1)]) as o:
        link = o.link()
        server = PageServer(o.base.rstrip("/"), o.base)
        async with visit(browser, server, link.removeprefix(server.origin)) as v:
            await ready(v)
            assert v.page.url == f"{o.base}dashboard/"
            await v.page.reload()
            await ready(v)
            cookies = await v.page.context.cookies()
            assert [(c["httpOnly"], c["sameSite"]) for c in cookies] == [(True, "Strict")]
            assert await v.page.evaluate("document.cookie + JSON.stringify({...localStorage})") == "{}"
            v.expected = ("401",)
            await v.page.get_by_role("button", name="Sign out").click()
            await expect(v.page.locator(".sign-in")).to_be_visible()
            await v.page.reload()
            await expect(v.page.locator(".sign-in")).to_be_visible()
        async with visit(browser, server, link.removeprefix(server.origin)) as v:
            v.expected = ("404",)
            await expect(v.page.get_by_role("alert")).to_contain_text("used already")


async def test_token_signs_in_and_a_wrong_one_does_not(browser: Browser, home: Path) -> None:
    async with owner(home, [asked(1)]) as o:
        server = PageServer(o.base.rstrip("/"), o.base)
        async with visit(browser, server, "/dashboard/?view=system") as v:
            v.expected = ("401",)
            await v.page.get_by_label("Admin token").fill("wrong")
            await v.page.get_by_role("button", name="Sign in").click()
            await expect(v.page.get_by_role("alert")).to_have_text("That is not the admin token.")
            await v.page.get_by_label("Admin token").fill(ADMIN_TOKEN)
            await v.page.keyboard.press("Enter")
            await ready(v)
            await expect(v.page.get_by_role("heading", name="System")).to_be_visible()
            await v.page.reload()
            await ready(v)


@pytest.mark.parametrize("prefix", ["/", PREFIX])
async def test_every_screen_works_through_nginx_with_tls_under_any_prefix(
    browser: Browser, home: Path, nginx: Fronted, prefix: str
) -> None:
    take_in(home, "Refunds take three days.")
    async with owner(home, [asked(n, session=f"s{n}") for n in range(5)], MOGINE_BASE_PATH=prefix) as o:
        port = int(o.running.settings.analytics.port)
        o.base = nginx({prefix: port}).url("", prefix)
        async with o.signed_in(browser) as v:
            (cookie,) = await v.page.context.cookies()
            assert (cookie["path"], cookie["secure"]) == (prefix, True)
            for view in VIEWS:
                await show(v, view.capitalize())
                assert f"view={view}" in v.page.url
                await expect(
                    v.page.locator("#content [role=alert]").filter(has_text=re.compile("."))
                ).to_have_count(0)


# --- screens ---------------------------------------------------------------------------------------


async def test_overview_tells_numbers_with_their_meaning_and_change(browser: Browser, home: Path) -> None:
    rows = [asked(n, session=f"s{n}", answered="yes" if n else "no") for n in range(4)]
    async with owner(home, [*rows, asked(3, bot=True), asked(60 * 24 * 40)]) as o, o.signed_in(browser) as v:
        questions = tile(v, "Questions")
        await expect(questions.locator(".value")).to_have_text("4")
        await expect(questions.locator(".change")).to_have_text("▲ +300%")
        await questions.get_by_role("button").focus()
        await expect(questions.get_by_role("tooltip")).to_contain_text("Rows recorded")
        await expect(tile(v, "Answered").locator(".value")).to_have_text("75%")
        await expect(v.page.locator(".plot canvas")).to_have_count(1)
        await expect(v.page.locator(".u-legend .u-value").nth(1)).to_have_text("4")
        await v.page.locator(".chart summary").click()
        await expect(v.page.locator(".chart tbody tr").last.locator("td").nth(1)).to_have_text("4")
        await expect(v.page.locator(".live tbody tr")).to_have_count(5)
        await v.page.get_by_label("Show crawlers").check()
        await ready(v)
        await expect(v.page.locator(".live tbody tr")).to_have_count(6)
        await expect(tile(v, "Crawlers").locator(".value")).to_have_text("1")
        await show(v, "Conversations")
        await expect(v.page.locator("tbody tr")).to_have_count(5)
        await v.page.get_by_label("Show crawlers").uncheck()
        await ready(v)
        await expect(v.page.locator("tbody tr")).to_have_count(4)
        async with v.page.expect_download() as download:
            await v.page.get_by_role("button", name="Export").click()
        text = (await (await download.value).path()).read_text("utf-8-sig")
        assert len(text.splitlines()) == 5, "the heading and what is on the screen"


async def test_range_is_in_the_address_and_survives_reload_and_the_back_button(
    browser: Browser, home: Path
) -> None:
    async with owner(home, [asked(1), asked(60 * 24 * 10)]) as o, o.signed_in(browser) as v:
        value = tile(v, "Questions").locator(".value")
        await expect(value).to_have_text("2")
        await v.page.get_by_role("button", name="7 days").click()
        await expect(value).to_have_text("1")
        await v.page.reload()
        await expect(value).to_have_text("1")
        await show(v, "Cost")
        assert "days=7" in v.page.url
        await v.page.go_back()
        await v.page.go_back()
        await expect(value).to_have_text("2")
        day = (NOW - timedelta(days=10)).astimezone().date()
        await v.page.get_by_role("button", name="Custom").click()
        await v.page.get_by_label("From").fill(str(day - timedelta(days=1)))
        await v.page.get_by_label("To", exact=True).fill(str(day + timedelta(days=1)))
        await v.page.get_by_role("button", name="Show", exact=True).click()
        await expect(value).to_have_text("1")


async def test_empty_record_says_how_to_send_the_first_question(browser: Browser, home: Path) -> None:
    async with owner(home, []) as o, o.signed_in(browser) as v:
        v.expected = ("503",)  # a knowledge base without documents
        await expect(v.page.locator(".blank")).to_contain_text("mogine chat")
        for view in VIEWS:
            await show(v, view.capitalize())


async def test_conversation_is_shown_as_the_visitor_saw_it_with_its_trace(
    browser: Browser, home: Path
) -> None:
    rows = [
        asked(
            2,
            session="sa",
            question="How to return?",
            answer="Within **seven** days [1].",
            cost_cny=0.0123,
            search_ms=17,
        ),
        asked(1, session="sa", question="And then?", answer="A refund."),
        asked(3, session="sb", question="Something else", status="error", error_type="upstream_timeout"),
    ]
    async with owner(home, rows) as o, o.signed_in(browser, "view=conversations") as v:
        await v.page.get_by_role("searchbox").fill("return")
        await v.page.keyboard.press("Enter")
        await ready(v)
        await expect(v.page.locator("tbody tr")).to_have_count(1)
        await v.page.get_by_role("button", name="How to return?").click()
        await ready(v)
        await expect(v.page.locator(".turns article")).to_have_count(2)
        await expect(v.page.locator(".turns strong")).to_have_text("seven")
        trace = v.page.locator(".trace").first
        await expect(trace).to_contain_text("300 ms")
        search = trace.locator("dt", has_text="Search in the documents")
        await expect(search.locator("+ dd")).to_have_text("17 ms")
        await search.get_by_role("button").hover()
        await expect(search.get_by_role("tooltip")).to_be_in_viewport()
        await expect(trace).to_contain_text("Title of docs/refund.md")
        await v.page.get_by_role("button", name="Back to the list").click()
        await ready(v)
        await v.page.get_by_role("searchbox").fill("")
        await v.page.get_by_label("Status").select_option("error")
        await ready(v)
        await expect(v.page.locator("tbody tr")).to_have_count(1)
        async with v.page.expect_download() as download:
            await v.page.get_by_role("button", name="Export").click()
        text = (await (await download.value).path()).read_text("utf-8-sig")
        assert "Something else" in text and "How to return?" not in text


async def test_single_question_without_a_session_has_its_page(browser: Browser, home: Path) -> None:
    async with (
        owner(home, [asked(n, session="", question=f"q{n}") for n in range(3)]) as o,
        o.signed_in(browser, "view=conversations") as v,
    ):
        await v.page.get_by_role("button", name="q1").click()
        await ready(v)
        await expect(v.page.locator(".asked")).to_have_text("q1")


async def test_knowledge_is_searched_taken_in_removed_and_rolled_back(browser: Browser, home: Path) -> None:
    take_in(home, "Refunds take three days.")
    take_in(home, "Refunds take three days.", "Shipping is free.")
    rows = [asked(1, citations=(cite("docs/1.md"),), feedback="up")]
    async with owner(home, rows) as o, o.signed_in(browser, "view=knowledge") as v:
        page = v.page
        documents = page.get_by_role("region", name="Documents").locator("tbody tr")
        await expect(documents).to_have_count(2)
        await expect(documents.first).to_contain_text("Title 1")
        await expect(documents.first).to_contain_text("1 / 0")
        await page.get_by_role("searchbox").fill("refunds")
        await page.keyboard.press("Enter")
        await expect(page.locator(".hits li").first).to_contain_text("Refunds take three days.")
        await documents.first.get_by_role("button", name="Title 1", exact=True).click()
        await expect(page.locator(".passages")).to_contain_text("Shipping is free.")
        page.remove_listener("dialog", v._on_dialog)
        page.on("dialog", lambda dialog: dialog.accept())
        await page.get_by_role("button", name="Go back to this one: g000001").click()
        await expect(documents).to_have_count(1)
        await page.set_input_files(
            "#upload", {"name": "new.md", "mimeType": "text/plain", "buffer": b"# New\n\nWarranty."}
        )
        await expect(documents).to_have_count(2, timeout=20_000)
        await page.get_by_role("button", name=re.compile("Remove: .*0")).click()
        await expect(documents).to_have_count(1, timeout=20_000)


async def test_knowledge_base_that_is_away_is_told(browser: Browser, home: Path) -> None:
    async with (
        owner(home, [asked(1)], "analytics", MOGINE_KB_URL="http://127.0.0.1:9") as o,
        o.signed_in(browser) as v,
    ):
        v.expected = ("503",)
        await show(v, "Knowledge")
        await expect(v.page.get_by_role("alert").first).to_contain_text("does not answer")
        await show(v, "System")
        await expect(v.page.locator("tbody").first).to_contain_text("not reachable")
        await v.page.get_by_role("button", name="Look now").click()
        await expect(v.page.get_by_role("region", name="Doctor")).to_contain_text("backup", timeout=20_000)


async def test_gap_is_accepted_ignored_and_opened_again(browser: Browser, home: Path) -> None:
    take_in(home, "Refunds take three days.")
    rows = [
        asked(
            n,
            session=f"s{n}",
            visitor=f"v{n}",
            question="Do you sell pianos?",
            answered="no",
            citations=(),
            signals=("no_passage",),
        )
        for n in range(3)
    ]
    async with owner(home, rows) as o, o.signed_in(browser, "view=gaps") as v:
        gap = v.page.locator(".gap")
        await expect(gap).to_have_count(1, timeout=20_000)
        await expect(gap).to_contain_text("3 visitors · asked 3 times")
        await gap.get_by_role("button", name="Ignore").click()
        await gap.get_by_label("Reason").fill("we do not")
        await gap.get_by_role("button", name="Save").click()
        await expect(gap).to_have_count(0, timeout=20_000)
        await v.page.get_by_role("button", name=re.compile("^Ignored")).click()
        await expect(gap).to_contain_text("we do not")
        await gap.get_by_role("button", name="Open again").click()
        await v.page.get_by_role("button", name=re.compile("^To do")).click()
        await gap.get_by_role("button", name="Accept").click()
        await gap.get_by_label("Document that shall answer it").fill("docs/pianos.md")
        await gap.get_by_role("button", name="Save").click()
        await expect(gap.locator(".badge").first).to_have_text("Accepted", timeout=20_000)


async def test_cost_tells_the_budget_and_quality_the_waiting(browser: Browser, home: Path) -> None:
    async with (
        owner(home, [asked(1, cost_cny=2.0)], MOGINE_MONTHLY_BUDGET_CNY="8") as o,
        o.signed_in(browser, "view=cost") as v,
    ):
        month = tile(v, "Spent this month")
        await expect(month).to_contain_text("25% · of ¥8.00")
        await expect(month.locator("meter")).to_have_attribute("value", "0.25")
        await show(v, "Quality")
        await expect(v.page.locator(".tile .value").first).to_have_text(re.compile(r"^(29\d|30\d) ms$"))


@pytest.mark.parametrize(
    ("view", "parts"),
    [
        ("overview", ("Questions per day", "When people ask", "Asked most often", "Documents cited most")),
        ("knowledge", ("Documents", "Generations", "docs/0.md", "g000001")),
        ("cost", ("monthly_budget_cny", "Cost per day", "By provider", "By model")),
        ("quality", ("Waiting time", "Errors and refusals per day", "upstream_timeout", "Vendors")),
        ("system", ("Servers", "analytics", "Disk", "Versions", "aiohttp")),
    ],
)
async def test_export_has_what_is_on_the_screen(
    browser: Browser, home: Path, view: str, parts: tuple[str, ...]
) -> None:
    take_in(home, "Refunds take three days.")
    rows = [asked(1, status="error", error_type="upstream_timeout")]
    async with owner(home, rows) as o, o.signed_in(browser, f"view={view}") as v:
        async with v.page.expect_download() as download:
            await v.page.get_by_role("button", name="Export").click()
        text = (await (await download.value).path()).read_text("utf-8-sig")
        assert [part for part in parts if f'"{part}"' not in text] == []


# --- abuse -----------------------------------------------------------------------------------------


async def test_hostile_rows_run_nothing(browser: Browser, home: Path) -> None:
    """P30, B14"""
    take_in(home, HOSTILE)
    hostile = asked(
        1,
        question=HOSTILE,
        answer=HOSTILE + " [1]",
        citations=(cite(HOSTILE),),
        page_url="javascript:alert(1)",
        error_type="<img src=x onerror=alert(1)>",
        provider="<script>alert(1)</script>",
    )
    async with owner(home, [hostile]) as o, o.signed_in(browser) as v:
        for view in VIEWS:
            await show(v, view.capitalize())
            if view == "conversations":
                await v.page.locator("tbody .pick").click()
                await ready(v)
                await expect(v.page.locator(".turns")).to_be_visible()
            inside = "main :is(script, img, svg, iframe, style, base, object, [onerror], [onload])"
            await expect(v.page.locator(inside)).to_have_count(0)
            hrefs = await v.page.locator("main a").evaluate_all("links => links.map((link) => link.protocol)")
            assert set(hrefs) <= {"http:", "https:", "mailto:"}
        assert "pwned" not in await v.page.title()


async def test_export_of_a_screen_holds_no_formula(browser: Browser, home: Path) -> None:
    """P31, B15"""
    async with (
        owner(home, [asked(1, question='=HYPERLINK("https://evil.example")')]) as o,
        o.signed_in(browser) as v,
    ):
        async with v.page.expect_download() as download:
            await v.page.get_by_role("button", name="Export").click()
        text = (await (await download.value).path()).read_text("utf-8-sig")
        assert '"\'=HYPERLINK(""https://evil.example"")"' in text


@pytest.mark.parametrize("width", [1280, 390])
async def test_no_screen_breaks_a_rule_of_accessibility_or_overflows(
    browser: Browser, home: Path, width: int
) -> None:
    take_in(home, "Refunds take three days.")
    rows = [
        asked(n, session=f"s{n}", status="error" if n % 3 == 0 else "ok", feedback="up" if n % 2 else "")
        for n in range(9)
    ]
    options: dict[str, Any] = {
        "viewport": {"width": width, "height": 800},
        "reduced_motion": "reduce",
    }
    async with owner(home, rows, MOGINE_MONTHLY_BUDGET_CNY="8") as o, o.signed_in(browser, **options) as v:
        found = {}
        for view in VIEWS:
            await show(v, view.capitalize())
            if view == "conversations":
                found["list"] = await violations(v.page)
                await v.page.locator("tbody .pick").first.click()
                await ready(v)
            found[view] = await violations(v.page)
            assert await v.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), view
        assert {view: broken for view, broken in found.items() if broken} == {}

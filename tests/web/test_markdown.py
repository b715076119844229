"""Markdown of the pages: what it shows, and that nothing in it can run, load or lead astray."""

import asyncio

import pytest
from playwright.async_api import Browser

from tests.web.conftest import PageServer, visit

pytestmark = pytest.mark.asyncio(loop_scope="session")

RENDER = """async ([text, partial]) => {
  const { MarkdownView } = await import(document.querySelector("[href$='markdown.js']").href);
  const box = document.createElement("div");
  const mark = (number) => Object.assign(document.createElement("b"), { textContent: number });
  const cite = (number) => (number <= 2 ? mark(number) : null);
  new MarkdownView(box, cite).update(text, partial);
  return box.innerHTML;
}"""
LINK = '<a href="{}" target="_blank" rel="noopener noreferrer nofollow ugc">{}</a>'

CASES = {
    "paragraphs and lines": ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    "windows line ends": ("a\r\n\r\nb", "<p>a</p><p>b</p>"),
    "headings": ("# A #\n### B\n###### C\n#no", "<h3>A</h3><h5>B</h5><h6>C</h6><p>#no</p>"),
    "emphasis": (
        "**a** *b* __c__ _d_ ~~e~~ ***f***",
        "<p><strong>a</strong> <em>b</em> <strong>c</strong> <em>d</em> <s>e</s> "
        "<strong><em>f</em></strong></p>",
    ),
    "bold before Chinese": ("**价格：**99元", "<p><strong>价格：</strong>99元</p>"),
    "no emphasis within words": ("snake_case_name 2 * 3 * 4", "<p>snake_case_name 2 * 3 * 4</p>"),
    "escapes": (r"\*a\* \[b\] \\", "<p>*a* [b] \\</p>"),
    "entities": ("a &amp; b &lt;c&gt; &#39;d&#39; &x;", "<p>a &amp; b &lt;c&gt; 'd' &amp;x;</p>"),
    "code": ("`a**b**` `` c`d ``", "<p><code>a**b**</code> <code>c`d</code></p>"),
    "fence": (
        "```py\nif a < b:\n    <i>\n```\nx",
        '<pre tabindex="0"><code>if a &lt; b:\n    &lt;i&gt;</code></pre><p>x</p>',
    ),
    "open fence": ("~~~\na\n\nb", '<pre tabindex="0"><code>a\n\nb</code></pre>'),
    "list": ("- a\n- b\n  c\n\ntext", "<ul><li>a</li><li>b<br>c</li></ul><p>text</p>"),
    "nested list": (
        "1. a\n   - b\n   - c\n2. d",
        "<ol><li>a<ul><li>b</li><li>c</li></ul></li><li>d</li></ol>",
    ),
    "loose list": ("1. a\n\n   more\n\n2. b", "<ol><li>a<p>more</p></li><li>b</li></ol>"),
    "list that counts on": ("3) a\n4) b", '<ol start="3"><li>a</li><li>b</li></ol>'),
    "code in a list": (
        "10. a\n    ```\n    x\n    ```",
        '<ol start="10"><li>a<pre tabindex="0"><code>x</code></pre></li></ol>',
    ),
    "quote": ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
    "rule": ("a\n\n---\n\n* * *", "<p>a</p><hr><hr>"),
    "table": (
        "| a | b |\n|---|:-:|\n| 1 \\| 2 | **x** |\n| 3 |",
        '<div class="table" tabindex="0"><table><thead><tr><th class="to-start" scope="col">a</th>'
        '<th class="to-center" scope="col">b</th></tr></thead><tbody><tr><td class="to-start">1 | 2</td>'
        '<td class="to-center"><strong>x</strong></td></tr><tr><td class="to-start">3</td>'
        '<td class="to-center"></td></tr></tbody></table></div>',
    ),
    "link": (
        "[a **b**](https://e.com/x_(y) 'title')",
        f"<p>{LINK.format('https://e.com/x_(y)', 'a <strong>b</strong>')}</p>",
    ),
    "mail": ("[m](mailto:a@b.cn)", f"<p>{LINK.format('mailto:a@b.cn', 'm')}</p>"),
    "bare link": (
        "见https://e.com/a?b=1。(http://e.com/c).",
        f"<p>见{LINK.format('https://e.com/a?b=1', 'https://e.com/a?b=1')}。"
        f"({LINK.format('http://e.com/c', 'http://e.com/c')}).</p>",
    ),
    "angle link": ("<https://e.com>", f"<p>{LINK.format('https://e.com/', 'https://e.com')}</p>"),
    "picture": ("![p](https://e.com/p.png)", f"<p>{LINK.format('https://e.com/p.png', 'p')}</p>"),
    "citation": ("a[1][2] [3]", "<p>a<b>1</b><b>2</b> [3]</p>"),
    "break tag": ("a<br/>b", "<p>a<br>b</p>"),
    "no direction overrides": ("a\u202eb\u2066c", "<p>abc</p>"),
}

HOSTILE = {
    "script": ("<script>alert(1)</script>", "<p>&lt;script&gt;alert(1)&lt;/script&gt;</p>"),
    "onerror": ("<img src=x onerror=alert(1)>", "<p>&lt;img src=x onerror=alert(1)&gt;</p>"),
    "javascript link": ("[a](javascript:alert(1))", "<p>a</p>"),
    "javascript link with a tab": ("[a](java\tscript:alert(1))", "<p>a</p>"),
    "javascript link in capitals": ("[a](JaVaScRiPt:alert(1))", "<p>a</p>"),
    "javascript link by entity": ("[a](&#106;avascript:alert(1))", "<p>a</p>"),
    "data link": ("[a](data:text/html,x)", "<p>a</p>"),
    "vbscript link": ("[a](vbscript:x)", "<p>a</p>"),
    "file link": ("[a](file:///etc/passwd)", "<p>a</p>"),
    "relative link": ("[a](/api/x)", "<p>a</p>"),
    "protocol-relative link": ("[a](//evil.example/x)", "<p>a</p>"),
    "link with a user": ("[a](https://bank.cn@evil.example/)", "<p>a</p>"),
    "angle javascript": ("<javascript:alert(1)>", "<p>&lt;javascript:alert(1)&gt;</p>"),
    "quote in a link": (
        '[a](https://e.com/"onmouseover="alert(1))',
        f"<p>{LINK.format('https://e.com/%22onmouseover=%22alert(1)', 'a')}</p>",
    ),
    "link in a link": (
        "[https://a.cn](https://b.cn)",
        f"<p>{LINK.format('https://b.cn/', 'https://a.cn')}</p>",
    ),
    "image of another host": ("![x](javascript:alert(1))", "<p>x</p>"),
    "html in code": ("`<b onclick=x>`", "<p><code>&lt;b onclick=x&gt;</code></p>"),
    "html in a table": (
        "|<i>|\n|-|\n|<svg onload=alert(1)>|",
        '<div class="table" tabindex="0"><table><thead><tr><th class="to-start" scope="col">&lt;i&gt;</th>'
        '</tr></thead><tbody><tr><td class="to-start">&lt;svg onload=alert(1)&gt;</td></tr></tbody></table>'
        "</div>",
    ),
}

PARTIAL = {
    "open bold": ("a **b", "<p>a <strong>b</strong></p>"),
    "bare bold mark": ("a **", "<p>a </p>"),
    "open code": ("a `b", "<p>a <code>b</code></p>"),
    "open link": ("see [the page](https://exa", "<p>see the page</p>"),
    "single star": ("2 *3", "<p>2 *3</p>"),
    "only the last block is open": ("**a\n\nb", "<p>**a</p><p>b</p>"),
    "table without its rule": (
        "| a | b |\n|-",
        '<div class="table" tabindex="0"><table><thead><tr><th class="to-start" scope="col">a</th>'
        '<th class="to-start" scope="col">b</th></tr></thead><tbody></tbody></table></div>',
    ),
}


async def assert_rendered(
    browser: Browser, server: PageServer, cases: dict[str, tuple[str, str]], *, partial: bool
) -> None:
    async with visit(browser, server) as v:
        shown = {name: await v.page.evaluate(RENDER, [text, partial]) for name, (text, _) in cases.items()}
    assert shown == {name: html for name, (_, html) in cases.items()}


async def test_markdown_is_shown(browser: Browser, server: PageServer) -> None:
    await assert_rendered(browser, server, CASES, partial=False)


async def test_hostile_markdown_is_harmless(browser: Browser, server: PageServer) -> None:
    await assert_rendered(browser, server, HOSTILE, partial=False)
    await assert_rendered(browser, server, HOSTILE, partial=True)


async def test_text_that_still_grows_shows_no_open_marks(browser: Browser, server: PageServer) -> None:
    await assert_rendered(browser, server, PARTIAL, partial=True)


async def test_finished_blocks_keep_their_nodes(browser: Browser, server: PageServer) -> None:
    script = """async () => {
      const { MarkdownView } = await import(document.querySelector("[href$='markdown.js']").href);
      const box = document.createElement("div");
      const view = new MarkdownView(box, () => null);
      view.update("one\\n\\ntwo\\n\\nthr", true);
      const before = [...box.children];
      view.update("one\\n\\ntwo\\n\\nthree", true);
      view.update("one\\n\\ntwo\\n\\nthree", false);
      return [before[0] === box.children[0], before[1] === box.children[1], box.textContent];
    }"""
    async with visit(browser, server) as v:
        assert await v.page.evaluate(script) == [True, True, "onetwothree"]


@pytest.mark.parametrize(
    "unit", ["[", "**a ", "*a", "`a``", "[a](", "> ", "- ", "|a", "<", "_a ", "![", "((", "http://a)", "\n"]
)
async def test_no_text_makes_the_page_hang(browser: Browser, server: PageServer, unit: str) -> None:
    """64 KiB is the longest answer there is. It takes milliseconds; what grows with its square, minutes."""
    script = """async ([text]) => {
      const { MarkdownView } = await import(document.querySelector("[href$='markdown.js']").href);
      const box = document.createElement("div");
      const view = new MarkdownView(box, () => null);
      view.update(text, true);
      view.update(text, false);
      return true;
    }"""
    text = (unit * 65536)[:65536]
    async with visit(browser, server) as v:
        for shape in (text, f"- a\n{text}\n  b"):
            async with asyncio.timeout(20):
                assert await v.page.evaluate(script, [shape])

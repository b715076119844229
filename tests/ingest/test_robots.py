"""robots.txt as RFC 9309 has it."""

import pytest

from mogine.ingest.robots import NOTHING, Robots


@pytest.mark.parametrize(
    ("text", "path", "allowed"),
    [
        ("", "/a", True),
        ("User-agent: *\nDisallow:", "/a", True),
        ("User-agent: *\nDisallow: /", "/a", False),
        ("User-agent: other\nDisallow: /", "/a", True),
        ("User-agent: *\nDisallow: /\n\nUser-agent: Mogine\nAllow: /", "/a", True),
        ("User-agent: a\nUser-agent: mogine\nDisallow: /x", "/x/y", False),
        ("User-agent: *\nDisallow: /shop\nAllow: /shop/help", "/shop/help/1", True),
        ("User-agent: *\nAllow: /shop/help\nDisallow: /shop", "/shop/cart", False),
        ("User-agent: *\nAllow: /a\nDisallow: /a", "/a", True),
        ("User-agent: *\nDisallow: /*.pdf$", "/x/y.pdf", False),
        ("User-agent: *\nDisallow: /*.pdf$", "/x/y.pdf?z", True),
        ("User-agent: *\nDisallow: /*/private/", "/a/b/private/c", False),
        ("User-agent: *\nDisallow: /a*b*c$", "/axbxc", False),
        ("User-agent: *\nDisallow: /aa*aa$", "/aaa", True),
        ("User-agent: *\nDisallow: /exact$", "/exact", False),
        ("User-agent: *\nDisallow: /exact$", "/exactly", True),
        ("user-AGENT : *  # all\r\ndisallow : /q?x  # no", "/q?xyz", False),
        ("Disallow: /", "/a", True),
        ("\ufeffUser-agent: *\nDisallow: /", "/", False),
    ],
)
def test_the_longest_rule_of_our_group_decides(text: str, path: str, allowed: bool) -> None:
    assert Robots.of(text).allows(f"https://www.example.com{path}") is allowed


def test_delay_is_read_and_bounded() -> None:
    assert Robots.of("User-agent: *\nCrawl-delay: 2.5").delay_s == 2.5
    assert Robots.of("User-agent: *\nCrawl-delay: 99999").delay_s == 10
    assert Robots.of("User-agent: *\nCrawl-delay: soon").delay_s == 0


def test_nothing_allows_nothing() -> None:
    assert not NOTHING.allows("https://www.example.com")


def test_no_pattern_makes_matching_slow() -> None:
    """Regular expressions would need longer than the universe lasts."""
    robots = Robots.of("User-agent: *\nDisallow: /" + "a*" * 20 + "b$")
    assert robots.allows("https://www.example.com/" + "a" * 2000)

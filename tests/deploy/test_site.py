"""What no file could hold is refused before one is made."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mogine.deploy.site import Site
from mogine.deploy.targets import TARGETS
from mogine.errors import SettingsError
from tests.deploy.sites import PLAIN


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("domain", "example.com; return 200", "host name"),
        ("domain", "-example.com", "host name"),
        ("domain", "a..b", "host name"),
        ("domain", "x" * 64 + ".com", "host name"),
        ("prefix", "no/slash", "prefix"),
        ("prefix", "/a b/", "prefix"),
        ("prefix", "/../", "prefix"),
        ("prefix", "/x{}/", "prefix"),
        ("user", "root;id", "user"),
        ("user", "", "user"),
        ("host", "127.0.0.1; }", "address"),
        ("home", Path("relative"), "from / on"),
        ("home", Path("/srv/a\nb"), "printed"),
        ("log_dir", Path("/var/log/\x1b[31m"), "printed"),
        ("certificate", Path("cert.pem"), "from / on"),
        ("admin_from", ("everyone",), "network"),
        ("admin_from", ("203.0.113.1/24",), "network"),
        ("behind", ("10.0.0.0/8; }",), "network"),
        ("proxies", ("10.0.0.1",), "write HOST:PORT"),
        ("proxies", (":8741",), "write HOST:PORT"),
        ("proxies", ("http://10.0.0.1:8741",), "without a scheme"),
        ("proxies", ("10.0.0.1:8741/",), "without a scheme and a path"),
        ("proxies", ("fd00::1:8741",), r"in brackets.*\[fd00::1\]:8741"),
        ("proxies", ("[fd00::1]",), "in brackets"),
        ("proxies", ("[fd00::g]:8741",), "is no server"),
        ("proxies", ("10.0.0.1:0",), "1 to 65535"),
        ("proxies", ("10.0.0.1:65536",), "1 to 65535"),
        ("proxies", ("10.0.0.1:８７４１",), "1 to 65535"),
        ("proxies", ("10.0.0.256:8741",), "is no server"),
        ("proxies", ("unix:8741;",), "1 to 65535"),
        ("proxies", ("a host:8741",), "neither an address nor a name"),
        ("proxies", ("x;y:8741",), "neither an address nor a name"),
        ("proxies", ("10.0.0.1:8741", "10.0.0.1:08741"), "the same server"),
        ("kbs", ("KB.example.com:8739", "kb.example.com:8739"), "the same server"),
        ("kbs", ("[fd00::1]:8739", "[fd00:0::1]:8739"), "the same server"),
        ("analytics_at", ("8742",), "write HOST:PORT"),
    ],
)
def test_a_value_that_no_file_can_hold_is_named(field: str, value: Any, named: str) -> None:
    """P44"""
    with pytest.raises(SettingsError, match=named):
        replace(PLAIN, **{field: value})


def test_all_wrong_values_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as told:
        replace(PLAIN, domain="a b", prefix="x", user="A")
    assert told.value.message.count("\n") == 3


@pytest.mark.parametrize(
    ("target", "site"),
    [
        ("nginx", replace(PLAIN, log_dir=Path("/var/log/$host"))),
        ("nginx", replace(PLAIN, domain="")),
        ("nginx-locations", replace(PLAIN, domain="")),
        ("systemd", replace(PLAIN, home=Path("/srv/a:b"))),
        ("systemd", replace(PLAIN, home=Path("/srv/back\\slash"))),
        ("logrotate", replace(PLAIN, log_dir=Path("/var/log/*"))),
    ],
)
def test_what_one_program_cannot_read_is_refused_for_that_program(target: str, site: Site) -> None:
    with pytest.raises(SettingsError):
        TARGETS[target].render(site)

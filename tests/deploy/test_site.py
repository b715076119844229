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
    ],
)
def test_a_value_that_no_file_can_hold_is_named(field: str, value: Any, named: str) -> None:
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

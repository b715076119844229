"""The gate: the admin token, the real address, one bucket per visitor."""

import ipaddress
import stat
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from mogine.errors import Forbidden, RateLimited, RequestError, SettingsError, Unauthorized
from mogine.serve.access import Gate, admin_token, client_address, visitor_bucket
from mogine.settings import Settings, load_settings

TRUSTED = (ipaddress.ip_network("127.0.0.1/32"), ipaddress.ip_network("10.0.0.0/8"))
TOKEN = "t" * 40


class Peer:
    """The only thing the gate asks a transport for: who is at the other end."""

    def __init__(self, address: str) -> None:
        self.address = address

    def get_extra_info(self, name: str, default: object = None) -> object:
        return (self.address, 1234) if name == "peername" else default


def ask(peer: str = "127.0.0.1", **headers: str) -> web.Request:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return make_mocked_request("POST", "/", headers={"Host": "localhost", **named}, transport=Peer(peer))


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("203.0.113.9", "198.51.100.1", "203.0.113.9"),
        ("127.0.0.1", "198.51.100.1", "198.51.100.1"),
        ("127.0.0.1", "1.2.3.4, 198.51.100.1", "198.51.100.1"),
        ("127.0.0.1", "198.51.100.1, 10.1.2.3", "198.51.100.1"),
        ("127.0.0.1", "198.51.100.1, junk", "127.0.0.1"),
        ("127.0.0.1", "", "127.0.0.1"),
        ("127.0.0.1", "10.1.1.1", "10.1.1.1"),
    ],
)
def test_address_is_the_rightmost_hop_that_is_not_trusted(peer: str, forwarded: str, expected: str) -> None:
    assert client_address(ask(peer, X_Forwarded_For=forwarded), TRUSTED) == expected


def test_other_headers_make_no_new_visitor() -> None:
    forged = ask("127.0.0.1", Forwarded="for=1.1.1.1", CF_Connecting_IP="2.2.2.2", True_Client_IP="3.3.3.3")
    assert client_address(forged, TRUSTED) == "127.0.0.1"


def test_ipv6_visitor_counts_by_its_64_network() -> None:
    assert visitor_bucket("2001:db8:1:2:aaaa::1") == visitor_bucket("2001:db8:1:2:bbbb::9")
    assert visitor_bucket("2001:db8:1:3::1") != visitor_bucket("2001:db8:1:2::1")
    assert visitor_bucket("::ffff:198.51.100.7") == "198.51.100.7"


def test_admin_token_is_made_once_and_private(settings: Settings) -> None:
    token = admin_token(settings)
    path = settings.data_path / "admin_token"
    assert len(token) >= 43 and admin_token(settings) == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in settings.data_path.iterdir()] == ["admin_token"]


def test_short_admin_token_is_refused(home: Path) -> None:
    with pytest.raises(SettingsError, match="MOGINE_ADMIN_TOKEN is too short"):
        admin_token(load_settings({"MOGINE_ADMIN_TOKEN": "letmein"}, home))


def test_damaged_token_file_is_named(settings: Settings) -> None:
    settings.data_path.mkdir()
    (settings.data_path / "admin_token").write_text("x")
    with pytest.raises(SettingsError, match="delete the file"):
        admin_token(settings)


def test_only_the_bearer_of_the_token_is_admin(settings: Settings) -> None:
    gate = Gate(settings, TOKEN)
    gate.check_admin(ask(Authorization=f"Bearer {TOKEN}"))
    for header in ("Bearer wrong", "Bearer", f"Basic {TOKEN}", "Bearer gültig", TOKEN):
        with pytest.raises(Unauthorized):
            gate.check_admin(ask("198.51.100.2", Authorization=header))
    with pytest.raises(Unauthorized):
        gate.check_admin(ask())


def test_ten_wrong_tokens_close_the_door_for_a_minute(settings: Settings) -> None:
    now = [0.0]
    gate = Gate(settings, TOKEN, clock=lambda: now[0])
    for _ in range(10):
        with pytest.raises(Unauthorized):
            gate.check_admin(ask("198.51.100.2", Authorization="Bearer wrong"))
    with pytest.raises(RateLimited):
        gate.check_admin(ask("198.51.100.2", Authorization=f"Bearer {TOKEN}"))
    gate.check_admin(ask("198.51.100.3", Authorization=f"Bearer {TOKEN}"))
    now[0] = 61.0
    gate.check_admin(ask("198.51.100.2", Authorization=f"Bearer {TOKEN}"))


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1:8741", "[::1]:8741", "127.9.9.9"])
def test_loopback_names_are_ours(settings: Settings, host: str) -> None:
    Gate(settings, TOKEN).check_host(ask(Host=host))


def test_foreign_host_name_is_refused_with_the_setting_to_change(settings: Settings) -> None:
    with pytest.raises(Forbidden, match="MOGINE_ALLOWED_HOSTS") as caught:
        Gate(settings, TOKEN).check_host(ask(Host="rebind.example"))
    assert caught.value.reason == "host_not_allowed"


def test_configured_hosts_and_the_hosts_of_origins_are_ours(home: Path) -> None:
    environ = {"MOGINE_ALLOWED_HOSTS": "chat.example", "MOGINE_ALLOWED_ORIGINS": "https://www.example:8443"}
    gate = Gate(load_settings(environ, home), TOKEN)
    gate.check_host(ask(Host="chat.example:443"))
    gate.check_host(ask(Host="WWW.example"))


def test_request_without_host_is_refused(settings: Settings) -> None:
    request = make_mocked_request("GET", "/", headers={}, transport=Peer("127.0.0.1"))
    with pytest.raises(RequestError) as caught:
        Gate(settings, TOKEN).check_host(request)
    assert caught.value.reason == "bad_host"


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "https://evil.example",
        "https://example.com.evil",
        "https://evilexample.com",
        "http://example.com",
        "https://example.com:444",
        "https://example.com.",
        "https://EXAMPLE.com",
        "",
    ],
)
def test_look_alike_origin_is_refused(home: Path, origin: str) -> None:
    gate = Gate(load_settings({"MOGINE_ALLOWED_ORIGINS": "https://example.com"}, home), TOKEN)
    with pytest.raises(Forbidden) as caught:
        gate.check_origin(ask(Origin=origin))
    assert caught.value.reason == "origin_not_allowed"


def test_own_page_listed_origin_and_no_origin_may_call(home: Path) -> None:
    gate = Gate(load_settings({"MOGINE_ALLOWED_ORIGINS": "https://example.com"}, home), TOKEN)
    gate.check_origin(ask(Origin="https://example.com"))
    gate.check_origin(ask(Origin="http://localhost:8741", Host="localhost:8741"))
    gate.check_origin(ask(Origin="https://localhost", Host="localhost:443"))
    gate.check_origin(ask())

"""Settings: precedence, every wrong value told at once, nothing secret shown."""

from pathlib import Path

import pytest

from mogine.errors import SettingsError
from mogine.settings import RateLimit, load_settings, load_site, variables


def problems(environ: dict[str, str], home: Path) -> str:
    with pytest.raises(SettingsError) as caught:
        load_settings(environ, home)
    return caught.value.message


def test_environment_wins_over_file_and_file_over_default(home: Path) -> None:
    (home / ".env").write_text("MOGINE_PROXY_PORT=1001\nMOGINE_KB_PORT=1002\n")
    settings = load_settings({"MOGINE_PROXY_PORT": "2001"}, home)
    assert (settings.proxy.port, settings.kb.port, settings.analytics.port) == (2001, 1002, 8742)
    assert settings.sources["MOGINE_PROXY_PORT"] == "environment"
    assert settings.sources["MOGINE_KB_PORT"] == ".env"
    assert settings.sources["MOGINE_ANALYTICS_PORT"] == "default"


def test_all_wrong_values_are_told_at_once(home: Path) -> None:
    (home / ".env").write_text("MOGINE_RATE_LIMIT=often\nMOGINE_RATE_LIMT=5/minute\n")
    message = problems({"MOGINE_PROXY_PORT": "99999", "DOUBAO_BASE_URL": "ark"}, home)
    assert "MOGINE_RATE_LIMIT (.env): 'often'" in message
    assert "did you mean MOGINE_RATE_LIMIT?" in message
    assert "MOGINE_PROXY_PORT (environment)" in message and "0 to 65535" in message
    assert "DOUBAO_BASE_URL (environment)" in message


def test_unknown_name_in_the_environment_is_a_warning_with_the_nearest_name(home: Path) -> None:
    settings = load_settings({"MOGINE_PROXY_PROT": "1"}, home)
    assert settings.warnings == (
        "MOGINE_PROXY_PROT in the environment is no setting; did you mean MOGINE_PROXY_PORT?",
    )


def test_wrong_secret_is_named_but_not_shown(home: Path) -> None:
    message = problems({"DOUBAO_API_KEY": "test-key with blanks"}, home)
    assert "DOUBAO_API_KEY" in message and "test-key" not in message


def test_keys_do_not_appear_in_repr(home: Path) -> None:
    settings = load_settings({"DOUBAO_API_KEY": "test-key-one,test-key-two"}, home)
    assert settings.doubao.keys == ("test-key-one", "test-key-two")
    assert "test-key" not in repr(settings)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MOGINE_TIMEZONE", "Mars/Olympus"),
        ("MOGINE_BASE_PATH", "no-slash"),
        ("MOGINE_BASE_PATH", "/a/../b"),
        ("MOGINE_ALLOWED_ORIGINS", "https://example.com/path"),
        ("MOGINE_TRUSTED_PROXIES", "300.0.0.1"),
        ("MOGINE_ALLOW_IMAGES", "maybe"),
        ("MOGINE_MAX_BODY_BYTES", "huge"),
        ("MOGINE_PROVIDERS", "doubao,gpt"),
        ("MOGINE_PROVIDERS", "doubao,doubao"),
        ("MOGINE_CONNECT_TIMEOUT", "nan"),
        ("MOGINE_EMBEDDER", "word2vec"),
        ("OPENAI_BASE_URL", "https://user:pw@example.com/v1"),
    ],
)
def test_bad_value_is_refused_by_name(home: Path, name: str, value: str) -> None:
    assert f"{name} (environment)" in problems({name: value}, home)


def test_good_values_are_understood(home: Path) -> None:
    settings = load_settings(
        {
            "MOGINE_RATE_LIMIT": "7/hour",
            "MOGINE_MAX_BODY_BYTES": "1MiB",
            "MOGINE_BASE_PATH": "/~temp/mogine_agent",
            "MOGINE_ALLOWED_ORIGINS": "https://example.com, https://example.com:8443",
            "MOGINE_ALLOW_IMAGES": "yes",
        },
        home,
    )
    assert settings.access.rate_limit == (RateLimit(7, 3600),)
    assert settings.proxy.max_body_bytes == 1024**2
    assert settings.proxy.base_path == "/~temp/mogine_agent/"
    assert settings.access.allowed_origins == ("https://example.com", "https://example.com:8443")
    assert settings.proxy.allow_images is True


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbfMOGINE_KB_PORT=1002\r\n", b"export MOGINE_KB_PORT='1002'\n# end"]
)
def test_env_file_of_any_editor_is_read(home: Path, content: bytes) -> None:
    (home / ".env").write_bytes(content)
    assert load_settings({}, home).kb.port == 1002


def test_env_file_that_cannot_be_read_says_why(home: Path) -> None:
    (home / ".env").write_bytes(b"\xff\xfe\x00")
    assert "it is not UTF-8 text" in problems({}, home)
    (home / ".env").unlink()
    (home / ".env").mkdir()
    assert str(home / ".env") in problems({}, home)


def test_broken_line_is_named_by_number_and_not_shown(home: Path) -> None:
    (home / ".env").write_text("MOGINE_KB_PORT=1002\ntest-key-lost-its-name\n")
    message = problems({}, home)
    assert "line 2" in message and "test-key" not in message


def test_oversized_env_file_is_refused(home: Path) -> None:
    (home / ".env").write_text("#" * (1024 * 1024 + 1))
    assert "1 MiB" in problems({}, home)


def test_provider_order_is_those_with_credentials_then_extract(home: Path) -> None:
    assert load_settings({}, home).provider_order == ("extract",)
    environ = {
        "DASHSCOPE_API_KEY": "test-key-d",
        "OPENAI_BASE_URL": "http://127.0.0.1:1/v1",
        "OPENAI_MODEL": "m",
    }
    assert load_settings(environ, home).provider_order == ("openai", "extract")
    environ["DASHSCOPE_APP_ID"] = "app"
    assert load_settings(environ, home).provider_order == ("dashscope", "openai", "extract")
    assert load_settings({"MOGINE_PROVIDERS": "extract"}, home).provider_order == ("extract",)


def test_every_setting_has_one_name_and_a_help_text() -> None:
    names = [v.env for v in variables()]
    assert len(names) == len(set(names))
    assert all(v.help and v.help[0] not in " -" and not v.help.endswith(".") for v in variables())


def test_site_is_read_and_a_broken_one_named(home: Path) -> None:
    assert load_site(home / "site.toml").company == {}
    (home / "site.toml").write_text('[company]\nname = "云杉"\n')
    assert load_site(home / "site.toml").company == {"name": "云杉"}
    (home / "site.toml").write_text("[company\n")
    with pytest.raises(SettingsError, match=r"site\.toml"):
        load_site(home / "site.toml")
    (home / "site.toml").write_text('company = "name"\n')
    with pytest.raises(SettingsError, match=r"\[company\] must be a table"):
        load_site(home / "site.toml")

"""The machine's own view of a home: each thing that commonly goes wrong has a line and a remedy."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from mogine.analytics.store import AnalyticsStore
from mogine.doctor import home as checks
from mogine.doctor import vendors
from mogine.doctor.home import House, examine
from mogine.doctor.line import Line
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from mogine.redis_client import Condition, open_blocking
from mogine.settings import Settings, load_settings
from tests.analytics.rows import row
from tests.kb.conftest import make_document, take_in
from tests.serve.conftest import Start
from tests.servers import DEFAULTS
from tests.upstreams.doubao import KEY, MODEL, DoubaoFake
from tests.upstreams.redis import RedisServer
from tests.upstreams.script import refuse, say, script, usage

NOW = datetime.now(UTC)


def of(home: Path, env: Mapping[str, str] | None = None) -> House:
    return House(load_settings({"MOGINE_EMBEDDER": "none", **(env or {})}, home))


def said(house: House, name: str) -> list[Line]:
    """The lines of one name."""
    return [line for line in examine(house) if line.name == name]


def only(house: House, name: str) -> Line:
    (line,) = said(house, name)
    return line


@pytest.fixture
def full(home: Path) -> Settings:
    """A home with a document, a test of it and a question."""
    (home / "site.toml").write_text('[company]\nname = "松涧"\n')
    settings = load_settings({"MOGINE_EMBEDDER": "none"}, home)
    settings.data_path.mkdir(mode=0o700)
    take_in(Generations(settings.kb_path), NoEmbedder(), make_document("docs/a.md", "退款 三天到账"))
    (home / "kb-tests.jsonl").write_text('{"question": "退款", "document": "docs/a.md", "mode": "keyword"}\n')
    store = AnalyticsStore(settings.analytics_path)
    store.prepare()
    store.insert([row(at=NOW)])
    store.close()
    (home / "data/backups").mkdir()
    (home / "data/backups/mogine-20261126T000000Z.tar.gz").touch()
    return settings


async def test_a_home_in_order_that_serves_has_not_one_bad_line(serve: Start, full: Settings) -> None:
    served = await serve("analytics", "kb", "proxy")
    lines = [line async for line in in_thread(House(served.settings))]
    assert [line for line in lines if line.status == "error"] == []
    told = {line.name: line.detail for line in lines if line.status == "ok"}
    assert "questions: 1" in told["record"] and "sound" in told["record"]
    assert "documents: 1, passages: 1, whole" in told["knowledge"]
    assert told["kb tests"] == "all 1 questions find what they should"
    assert told["server proxy"] == f"answers at {served.url('')}"
    assert {line.name for line in lines if line.status == "warning"} <= {"keys", "descriptors"}


async def in_thread(house: House) -> AsyncIterator[Line]:
    """The checks block, and the servers that they ask are on this loop."""
    for line in await asyncio.to_thread(lambda: list(examine(house))):
        yield line


def test_files_that_others_can_read_are_named_with_the_command_that_closes_them(full: Settings) -> None:
    env = full.home / ".env"
    env.chmod(0o644)
    line = only(House(full), "files")
    assert (line.status, line.fix) == ("error", f"chmod 600 {env}")


def test_a_site_file_with_a_mistake_is_named(full: Settings) -> None:
    (full.home / "site.toml").write_text("[company\n")
    assert only(House(full), "site").status == "error"
    (full.home / "site.toml").write_text("")
    assert "names no company" in only(House(full), "site").detail


def test_a_damaged_record_is_told_with_the_way_back(full: Settings) -> None:
    data = bytearray(full.analytics_path.read_bytes())
    data[4096 * 3 : 4096 * 6] = b"\xff" * (4096 * 3)
    full.analytics_path.write_bytes(bytes(data))
    line = only(House(full), "record")
    assert line.status == "error" and "mogine restore" in line.fix


def test_a_damaged_knowledge_base_is_told_with_the_way_back(full: Settings) -> None:
    path = full.kb_path / "generations/g000001/texts.db"
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-100] + b"x" * 100)
    line = only(House(full), "knowledge")
    assert line.status == "error" and "mogine kb rollback" in line.fix


def test_a_test_that_fails_is_quoted(full: Settings) -> None:
    (full.home / "kb-tests.jsonl").write_text(
        '{"question": "保修", "document": "docs/b.md", "mode": "keyword"}\n'
    )
    line = only(House(full), "kb tests")
    assert line.status == "error" and "'保修'" in line.detail


def test_old_documents_and_old_rows_and_an_old_backup_are_told(full: Settings) -> None:
    later = House(full, now=NOW + timedelta(days=200, hours=1))
    assert "200 days ago" in only(later, "knowledge").detail
    assert only(later, "cleanup").status == "warning" and "mogine cleanup" in only(later, "cleanup").fix
    assert "200 days old" in only(later, "backup").detail


def test_an_empty_home_is_told_what_comes_next(home: Path) -> None:
    house = of(home)
    assert only(house, "knowledge").fix == "`mogine kb ingest ./docs`"
    assert "mogine backup" in only(house, "backup").fix
    assert only(house, "record").status == "ok"
    assert only(house, "keys").status == "warning"


def test_a_disk_that_is_nearly_full_is_an_error(full: Settings) -> None:
    line = only(House(full, min_free_bytes=2**60), "disk")
    assert line.status == "error" and "nearly full" in line.detail and "kb compact" in line.fix
    assert only(House(full), "disk").status == "ok"


def test_a_port_that_somebody_else_has_is_told_from_a_server_that_is_not_there(home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        taken.listen()
        house = of(home, {"MOGINE_KB_PORT": str(taken.getsockname()[1]), "MOGINE_PROXY_PORT": "1"})
        lines = {line.name: line for line in checks.servers(house)}
    assert lines["server kb"].status == "error" and "is held by process" in lines["server kb"].detail
    assert lines["server proxy"].status == "warning" and "mogine serve proxy" in lines["server proxy"].fix


async def test_another_program_on_the_port_is_no_server_of_ours(home: Path) -> None:
    async with DoubaoFake(script(say("好"))) as fake:
        port = fake.base_url.rpartition(":")[2].partition("/")[0]
        house = of(home, {"MOGINE_PROXY_PORT": port, "MOGINE_KB_PORT": "1", "MOGINE_ANALYTICS_PORT": "1"})
        lines = [line async for line in in_thread(house)]
    (line,) = [line for line in lines if line.name == "server proxy"]
    assert line.status == "error" and "not by mogine" in line.detail


def test_a_spent_budget_is_an_error_and_none_a_warning(full: Settings) -> None:
    store = AnalyticsStore(full.analytics_path)
    store.insert([row(at=NOW, cost_cny=5.0)])
    store.close()
    env = {"DOUBAO_API_KEY": KEY}
    assert only(of(full.home, env), "budget").status == "warning"
    line = only(of(full.home, {**env, "MOGINE_DAILY_BUDGET_CNY": "5"}), "budget")
    assert line.status == "error" and "of 5.00 CNY spent" in line.detail
    assert only(of(full.home, {**env, "MOGINE_MONTHLY_BUDGET_CNY": "500"}), "budget").status == "ok"


def test_a_check_that_fails_itself_does_not_end_the_others(full: Settings) -> None:
    (full.kb_path / "current.json").write_text("{")
    names = [line.name for line in examine(House(full))]
    assert "knowledge" in names and "backup" in names


# --- vendors -------------------------------------------------------------------------------------


async def test_a_vendor_that_answers_is_reached_and_agrees_on_the_time(home: Path) -> None:
    async with DoubaoFake(script(say("好"), usage(1, 1))) as fake:
        settings = load_settings({**DEFAULTS, **fake.environ, "DOUBAO_MODEL": MODEL}, home)
        lines = await asyncio.to_thread(lambda: [*vendors.reachable(settings), *vendors.taken(settings)])
    assert [(line.name, line.status) for line in lines] == [
        ("vendor doubao", "ok"),
        ("clock", "ok"),
        ("key doubao", "ok"),
    ]
    assert not any(KEY in line.detail for line in lines)


async def test_a_key_that_is_not_taken_is_named_by_its_end_alone(home: Path) -> None:
    async with DoubaoFake(script(refuse(401))) as fake:
        settings = load_settings({**DEFAULTS, **fake.environ, "DOUBAO_MODEL": MODEL}, home)
        (line,) = await asyncio.to_thread(lambda: list(vendors.taken(settings)))
    assert line.status == "error" and "DOUBAO_API_KEY" in line.detail and KEY not in line.detail
    assert "mogine keys set doubao" in line.fix


def test_a_vendor_that_cannot_be_reached_is_named(home: Path) -> None:
    env = {"DOUBAO_API_KEY": KEY, "DOUBAO_BASE_URL": "http://127.0.0.1:1/api/v3"}
    (line,) = vendors.reachable(load_settings(env, home))
    assert line.status == "error" and "http://127.0.0.1:1/api/v3" in line.detail


def test_a_vendor_without_a_key_is_not_called(home: Path) -> None:
    settings = load_settings({}, home)
    assert [*vendors.reachable(settings), *vendors.taken(settings)] == []


# --- several machines ----------------------------------------------------------------------------


def test_redis_that_answers_is_named(home: Path, redis: RedisServer) -> None:
    line = only(of(home, {"MOGINE_REDIS_URL": redis.url}), "redis")
    assert line.status == "ok" and re.match(r"(Redis|Valkey) \d+\.\d+", line.detail)


def test_redis_that_would_drop_counters_is_warned_of(home: Path, redis: RedisServer) -> None:
    with open_blocking(redis.url, 5) as client:
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("maxmemory", 100 * 1024**2)
    line = only(of(home, {"MOGINE_REDIS_URL": redis.url}), "redis")
    assert line.status == "warning" and "allkeys-lru" in line.detail and "noeviction" in line.fix


def test_a_replica_cannot_count(home: Path, redis: RedisServer) -> None:
    with open_blocking(redis.url, 5) as client:
        client.replicaof("127.0.0.1", 1)
    line = only(of(home, {"MOGINE_REDIS_URL": redis.url}), "redis")
    assert line.status == "error" and "replica" in line.detail


@pytest.mark.parametrize("password", ["", ":test-password@"])
def test_redis_that_is_away_is_told_without_its_password(
    home: Path, redis: RedisServer, password: str
) -> None:
    """P18, P43: killed, or the password is wrong."""
    if not password:
        redis.kill()
    line = only(of(home, {"MOGINE_REDIS_URL": redis.url.replace("//", f"//{password}")}), "redis")
    assert line.status == "error" and "MOGINE_REDIS_URL" in line.fix
    assert "test-password" not in line.detail + line.fix


@pytest.mark.parametrize(
    ("version", "is_old"), [("5.0.14", True), ("6.0.16", True), ("6.2.0", False), ("8.1", False), ("", False)]
)
def test_a_redis_without_what_we_need_is_old(version: str, is_old: bool) -> None:
    assert Condition("Redis", version, None, None, False).is_old is is_old


async def test_a_proxy_that_does_not_share_its_limits_has_a_line(serve: Start, redis: RedisServer) -> None:
    """P43."""
    redis.kill()
    served = await serve("proxy", env={"MOGINE_REDIS_URL": redis.url})
    house = House(served.settings)
    lines = await asyncio.to_thread(said, house, "limits")
    assert [line.status for line in lines] == ["warning"] and "away" in lines[0].detail

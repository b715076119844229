"""What can be seen from the machine itself: settings, files, servers, record, knowledge base."""

import os
import platform
import resource
import shutil
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path
from zoneinfo import ZoneInfo

import httpx

from mogine import ports
from mogine.analytics.checks import check as look_at_record
from mogine.analytics.move import uncopied
from mogine.analytics.spending import Spending
from mogine.analytics.spool import Spool
from mogine.analytics.store import AnalyticsStore, open_store
from mogine.doctor import machines
from mogine.doctor.line import Line, error, ok, warning
from mogine.errors import MogineError, Unavailable
from mogine.kb.embedders import open_embedder
from mogine.kb.gate import TESTS_NAME, load_tests, run_tests
from mogine.kb.generations import Generations
from mogine.kb.knowledge import KnowledgeBase
from mogine.kb.manifest import Generation
from mogine.kb.verify import verify
from mogine.settings import PROVIDER_NAMES, Settings, load_site

GIB = 1024**3
VERIFIED_VECTORS = 50
OLD_DOCUMENTS = timedelta(days=180)
LATE_CLEANUP_DAYS = 3
HTTP_S = 2.0
TITLES = {"proxy": "MOGINE_PROXY_PORT", "kb": "MOGINE_KB_PORT", "analytics": "MOGINE_ANALYTICS_PORT"}
# Told by a check of the record, and here by one of ours.
TOLD_ELSEWHERE = ("database", "disk", "backup", "spool")


@dataclass(frozen=True, slots=True)
class House:
    """What the checks look at. `min_free_bytes`: less free disk than this is an error."""

    settings: Settings
    min_free_bytes: int = GIB
    now: datetime = field(default_factory=lambda: datetime.now(UTC))

    @property
    def store(self) -> AnalyticsStore:
        """The record."""
        return open_store(self.settings)


Check = Callable[[House], Iterator[Line]]


def versions(house: House) -> Iterator[Line]:
    """What runs here."""
    python = platform.python_version()
    yield ok("versions", f"mogine {version('mogine')}, Python {python}, {platform.platform(terse=True)}")


def settings(house: House) -> Iterator[Line]:
    """Every value was read; what is odd about them."""
    s = house.settings
    given = sum(source != "default" for source in s.sources.values())
    yield ok("settings", f"{given} set, the rest by default; `mogine config show` lists them")
    for text in s.warnings:
        yield warning("settings", text, "correct the name, or take it out of the environment")
    if "*" in s.access.allowed_origins:
        yield warning(
            "origins",
            "pages of every site may ask at your expense",
            "write the origins of your own pages into MOGINE_ALLOWED_ORIGINS instead of *",
        )
    unset = [n for n in s.proxy.providers if not s.has_credentials(n)]
    if unset:
        yield warning(
            "providers",
            f"MOGINE_PROVIDERS names {', '.join(unset)}, which cannot be asked",
            "set the key, or take the name out",
        )


def site(house: House) -> Iterator[Line]:
    """`site.toml` can be read and says who the company is."""
    path = house.settings.home / "site.toml"
    try:
        found = load_site(path)
    except MogineError as problem:
        yield error("site", problem.message, f"correct {path}; the remarks in it say what each line means")
        return
    if not found.company.get("name"):
        yield warning("site", "site.toml names no company", f"write [company] name into {path}")
    else:
        yield ok("site", f"site.toml speaks of {found.company['name']}")


def files(house: House) -> Iterator[Line]:
    """Nobody else may read what is secret, and this user can write what must be written."""
    s = house.settings
    problems = list(_open_files(s))
    for path, mode in problems:
        yield error("files", f"{path} can be read by other users", f"chmod {mode:o} {path}")
    data = s.data_path
    if not data.exists():
        yield warning("files", f"there is no {data} yet", "`mogine serve all` or `mogine kb ingest` makes it")
    elif not os.access(data, os.W_OK | os.X_OK):
        owner = data.stat().st_uid
        yield error(
            "files",
            f"{data} cannot be written by this user (it belongs to user {owner})",
            "run mogine as the user who owns the home, or give it to this one: chown -R",
        )
    elif not problems:
        yield ok("files", "settings and data are closed to other users")


def _open_files(s: Settings) -> Iterator[tuple[Path, int]]:
    data = s.data_path
    for path, mode in ((s.home / ".env", 0o600), (data, 0o700), (data / "admin_token", 0o600)):
        if path.exists() and path.stat().st_mode & 0o077:
            yield path, mode


def keys(house: House) -> Iterator[Line]:
    """Who can be asked."""
    s = house.settings
    ready = [n for n in PROVIDER_NAMES if n != "extract" and s.has_credentials(n)]
    if not ready:
        yield warning(
            "keys",
            "no vendor has a key: answers are quotations",
            "`mogine keys set doubao`, or another of them in .env",
        )
        return
    order = [n for n in s.provider_order if n in ready]
    yield ok("keys", f"asked in this order: {', '.join(order or ready)} (`--online` tries the keys)")


def servers(house: House) -> Iterator[Line]:
    """Each server answers on its port and is ready."""
    for name in ("proxy", "kb", "analytics"):
        yield from _server(house.settings, name)


def _server(s: Settings, name: str) -> Iterator[Line]:
    url, label = s.server_url(name), f"server {name}"
    port = getattr(s, name).port
    try:
        answer = httpx.get(url + "/readyz", timeout=HTTP_S, trust_env=False)
    except httpx.TransportError as problem:
        by = ports.holder(port)
        if by:
            yield error(
                label,
                f"{url} is held by {by} and does not answer ({type(problem).__name__})",
                f"look into its log, or start it again; or set {TITLES[name]} to a free port",
            )
        else:
            start = f"`mogine serve {name}` or `mogine serve all`"
            yield warning(label, f"does not run at {url}", f"{start}; under a supervisor look into its log")
        return
    if answer.headers.get("server") != "mogine":
        by = ports.holder(port) or "another program"
        yield error(
            label,
            f"{url} is answered by {by}, not by mogine",
            f"stop it, or set {TITLES[name]} to a free port",
        )
        return
    problems = _problems(answer)
    if problems:
        yield error(label, f"runs at {url} and is not ready: {problems}", "what it says is what to mend")
    else:
        yield ok(label, f"answers at {url}")
    yield from _breakers(answer)
    yield from _shared(answer)
    strangers = [a for a in ports.listening_addresses(port) if not _is_loopback(a)]
    if strangers:
        yield warning(
            label,
            f"port {port} listens on {', '.join(strangers)}, not only for this machine",
            "leave MOGINE_HOST at 127.0.0.1 with nginx on this machine; else close the port with a firewall: "
            "`mogine deploy firewall`",
        )


def _problems(answer: httpx.Response) -> str:
    try:
        found = answer.json()
        if answer.status_code == 200:
            return ""
        parts = found.get("problems") or found.get("error", {}).get("message") or answer.status_code
        return "; ".join(f"{k}: {v}" for k, v in parts.items()) if isinstance(parts, dict) else str(parts)
    except (ValueError, AttributeError):
        return f"status {answer.status_code}"


def _breakers(answer: httpx.Response) -> Iterator[Line]:
    """Vendors that are left alone for a moment, or have no key that works."""
    try:
        vendors = answer.json().get("providers", {})
    except ValueError:
        return
    for name, state in vendors.items():
        if state["breaker"] != "closed":
            yield error(
                f"vendor {name}",
                "has failed so often that it is left alone for a moment",
                f"`mogine keys test {name}` tells why; `mogine queries --status error` what visitors met",
            )
        if state["keys"] and state["keys_resting"] == state["keys"]:
            yield error(
                f"vendor {name}",
                "none of its keys is taken at present",
                f"`mogine keys test {name}` tells why; `mogine keys rotate {name}` puts a new one in place",
            )


def _shared(answer: httpx.Response) -> Iterator[Line]:
    """Limits that are not shared though they should be."""
    try:
        state = answer.json().get("redis", "ok")
    except ValueError:
        return
    if state != "ok":
        yield warning(
            "limits",
            f"are not shared with other machines: to the proxy Redis is {state}",
            "its log says why; it tries again every second",
        )


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1")


def _left_behind(house: House) -> Iterator[Line]:
    """Rows of the file from before the record was in PostgreSQL."""
    file = AnalyticsStore(house.settings.analytics_path)
    if house.store.is_file or not file.exists():
        return
    try:
        rows = uncopied(file, house.store)
    except MogineError as problem:
        yield warning("record", f"{file.name} is there besides: {problem}", "move it away if it is of no use")
        return
    if rows:
        yield warning(
            "record",
            f"{rows:,} questions in {file.name} are not in PostgreSQL, where the record is kept",
            f"`mogine migrate --from {file.path} --to -` with the value of MOGINE_DATABASE_URL on its stdin",
        )


def database(house: House) -> Iterator[Line]:
    """The record is sound, of this version, and does not lag behind."""
    store = house.store
    began = time.perf_counter()
    try:
        if not store.exists():
            yield ok("record", f"nothing has been asked yet{'' if store.is_file else '; PostgreSQL answers'}")
            return
        found = store.summary()
        word = store.soundness()
        size = store.size_bytes() / 1024**2
    except MogineError as problem:
        yield error(
            "record",
            f"{store.name} cannot be read: {problem}",
            "a server that starts moves a damaged file aside and begins a new one; "
            "`mogine restore FILE` brings a backup back"
            if store.is_file
            else "questions wait in data/spool until the server that MOGINE_DATABASE_URL names takes them",
        )
        return
    if word != "ok":
        yield error("record", f"{store.name} is damaged: {word}", "stop mogine, then `mogine restore FILE`")
        return
    took_ms = (time.perf_counter() - began) * 1000
    last = f", the last at {found.last_write_at:%Y-%m-%d %H:%M} UTC" if found.last_write_at else ""
    where = "" if store.is_file else " in PostgreSQL"
    yield ok("record", f"questions{where}: {found.rows:,}{last}; {size:.1f} MiB, sound ({took_ms:.0f} ms)")
    yield from _left_behind(house)
    waiting = Spool(house.settings.data_path / "spool").count()
    if waiting:
        yield warning(
            "spool",
            f"{waiting:,} questions wait in data/spool to be taken up",
            "a running server takes them up by itself; its log says what keeps it",
        )
    for finding in look_at_record(store, now=house.now):
        if finding.name not in TOLD_ELSEWHERE:
            yield warning(
                finding.name, finding.message, "`mogine queries --status error` shows what happened"
            )


def cleanup(house: House) -> Iterator[Line]:
    """Nothing is kept longer than it may be."""
    days = house.settings.analytics.retention_days
    try:
        if not house.store.exists():
            return
        late = house.store.count_before(house.now - timedelta(days=days + LATE_CLEANUP_DAYS))
    except MogineError:
        return  # told by `database`
    if late:
        yield warning(
            "cleanup",
            f"{late:,} questions are older than the {days} days of MOGINE_RETENTION_DAYS",
            "`mogine cleanup` now, and every night: `mogine deploy cron` or `systemd`",
        )
    else:
        yield ok("cleanup", f"nothing is older than {days} days")


def budget(house: House) -> Iterator[Line]:
    """What has been spent of what may be."""
    access, zone = house.settings.access, ZoneInfo(house.settings.analytics.timezone)
    limits = {"daily": access.daily_budget_cny, "monthly": access.monthly_budget_cny}
    if not any(limits.values()):
        if any(house.settings.has_credentials(n) for n in PROVIDER_NAMES[:-1]):
            yield warning(
                "budget",
                "no budget is set: a flood of questions costs what it costs",
                "set MOGINE_DAILY_BUDGET_CNY; above it answers are quotations",
            )
        return
    local = house.now.astimezone(zone).replace(hour=0, minute=0, second=0, microsecond=0)
    moments = [local, local.replace(day=1)]
    try:
        spent = Spending(house.store, timedelta(minutes=6)).since(moments, (), house.now).since
    except MogineError:
        return
    for (name, limit), cny in zip(limits.items(), spent, strict=True):
        if limit is None:
            continue
        words = f"{name}: {cny:.2f} of {limit:.2f} CNY spent"
        if cny >= limit:
            yield error(
                "budget",
                words,
                f"answers are quotations until it begins anew; raise MOGINE_{name.upper()}_BUDGET_CNY",
            )
        else:
            yield ok("budget", words)


def knowledge(house: House) -> Iterator[Line]:
    """What serves is whole and not too old, the model loads, and the tests pass."""
    s = house.settings
    try:
        generation = Generations.of(s).current()
    except MogineError as problem:
        yield error(
            "knowledge", problem.message, "`mogine kb rollback`, or a fresh `mogine kb ingest ./docs`"
        )
        return
    if generation is None:
        yield warning("knowledge", "there are no documents yet", "`mogine kb ingest ./docs`")
        return
    yield from _generation(house, generation)
    yield from _asked(s, generation)


def chroma(house: House) -> Iterator[Line]:
    """Where a Chroma server has the vectors: it answers, and has them."""
    yield from machines.chroma(house.settings)


def _generation(house: House, generation: Generation) -> Iterator[Line]:
    manifest = generation.manifest
    findings = verify(generation, sample=VERIFIED_VECTORS)
    if findings:
        yield error(
            "knowledge",
            f"{generation.name} is damaged: {findings[0].part}: {findings[0].detail}",
            "`mogine kb rollback` goes back to the one before; `mogine kb ingest ./docs` makes a new one",
        )
        return
    words = f"documents: {manifest.documents}, passages: {manifest.passages}, whole ({generation.name})"
    age = house.now - datetime.fromisoformat(manifest.created_at).astimezone(UTC)
    if age > OLD_DOCUMENTS:
        yield warning(
            "knowledge",
            f"{words}; taken in {age.days} days ago",
            "are they still true? `mogine kb ingest ./docs`",
        )
    else:
        yield ok("knowledge", f"{words}; taken in {_ago(age)}")


def _asked(s: Settings, generation: Generation) -> Iterator[Line]:
    try:
        embedder = open_embedder(s)
        began = time.perf_counter()
        embedder.warm()
        took_ms = (time.perf_counter() - began) * 1000
        base = KnowledgeBase(generation, embedder, readers=1)
    except MogineError as problem:
        yield error("embedder", problem.message, "see MOGINE_EMBEDDER in `mogine config show`")
        return
    try:
        yield ok("embedder", f"{embedder.name} is ready in {took_ms:.0f} ms")
        tests = load_tests(s.home / TESTS_NAME)
        failed = [outcome.test.question for outcome in run_tests(base, tests) if not outcome.passed]
    except Unavailable as problem:
        yield error("kb tests", problem.message, "see the line about chroma")
        return
    except MogineError as problem:
        yield error("kb tests", problem.message, f"correct {s.home / TESTS_NAME}")
        return
    finally:
        base.close()
        embedder.close()
    if failed:
        yield error(
            "kb tests", f"{len(failed)} of {len(tests)} fail: {failed[0]!r}", "`mogine kb test` shows all"
        )
    elif tests:
        yield ok("kb tests", f"all {len(tests)} questions find what they should")
    else:
        yield warning(
            "kb tests",
            "there are none, so a change of the documents may lose an answer unseen",
            "`mogine kb test add 怎么退款 -d docs/returns.md`",
        )


def _ago(age: timedelta) -> str:
    if age.days:
        return f"{age.days} day{'s' * (age.days > 1)} ago"
    return f"{age.seconds // 3600} h ago" if age.seconds >= 3600 else "within the last hour"


def redis(house: House) -> Iterator[Line]:
    """What counts for all machines."""
    yield from machines.redis(house.settings)


def disk(house: House) -> Iterator[Line]:
    """There is room for what comes."""
    folder = next(p for p in (house.settings.data_path, *house.settings.data_path.parents) if p.exists())
    usage = shutil.disk_usage(folder)
    words = f"{usage.free / GIB:.1f} GiB free of {usage.total / GIB:.1f} ({folder})"
    if usage.free < house.min_free_bytes:
        yield error(
            "disk",
            f"nearly full: {words}",
            "`mogine cleanup` and `mogine kb compact` make room; when it is full, questions wait in memory "
            "and are lost at last",
        )
    else:
        yield ok("disk", words)


def backups(house: House) -> Iterator[Line]:
    """Somebody has thought of the day on which the disk dies."""
    folder = house.settings.data_path / "backups"
    files = [path for path in folder.iterdir() if path.is_file()] if folder.is_dir() else []
    if not files:
        yield warning(
            "backup",
            "there is none in data/backups",
            "`mogine backup`, and every night: `mogine deploy cron` or `systemd`",
        )
        return
    age = house.now - datetime.fromtimestamp(max(path.stat().st_mtime for path in files), UTC)
    if age > timedelta(days=8):
        yield warning(
            "backup", f"the newest is {age.days} days old", "`mogine backup`; does its timer still run?"
        )
    else:
        yield ok("backup", f"the newest was made {_ago(age)}; {len(files)} in data/backups")


def descriptors(house: House) -> Iterator[Line]:
    """Enough open files for as many answers as may run at once."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = house.settings.access.max_streams * 2 + 200
    if soft != resource.RLIM_INFINITY and soft < needed:
        yield warning(
            "descriptors",
            f"{soft} open files are allowed, and {house.settings.access.max_streams} answers need {needed}",
            "`ulimit -n 65536` before mogine starts (systemd's unit has it), or a smaller MOGINE_MAX_STREAMS",
        )


CHECKS: tuple[Check, ...] = (
    *(versions, settings, site, files, keys, servers, database, cleanup, budget, knowledge, chroma, disk),
    *(backups, descriptors, redis),
)


def examine(house: House) -> Iterator[Line]:
    """All checks; one that fails itself is a line, and the next one goes on."""
    for look in CHECKS:
        try:
            yield from look(house)
        except (MogineError, OSError, sqlite3.Error, ValueError) as problem:
            text = (
                problem.message
                if isinstance(problem, MogineError)
                else f"{type(problem).__name__}: {problem}"
            )
            yield error(look.__name__, f"could not be looked at: {text}", "mend this, then look again")

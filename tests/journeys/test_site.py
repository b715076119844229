"""A whole site as its owner sets it up, from an empty folder to all green; then it is broken in turn."""

import json
import re
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mogine.commands import envfile
from mogine.doctor.outside import Outside
from mogine.doctor.public import examine
from tests.conftest import Run
from tests.fronts.deployed import on_this_machine
from tests.fronts.nginx import Nginx
from tests.fronts.pm2 import Pm2
from tests.serve.conftest import events_of
from tests.upstreams.doubao import KEY, MODEL, DoubaoFake
from tests.upstreams.script import say, script, usage
from tests.upstreams.tls import write_certificate

PREFIX = "/~temp/mogine_agent/"
VISITOR = "127.0.0.9"
JSON = ("-H", "Content-Type: application/json", "-d")


@dataclass
class Site:
    """Everything at once: a home, three services under PM2, nginx before them."""

    home: Path
    run: Run
    front: Nginx
    certificate: Path
    nginx_file: str

    @property
    def url(self) -> str:
        return f"https://localhost:{self.front.port}{PREFIX}"

    def mogine(self, *args: str) -> "subprocess.CompletedProcess[str]":
        return self.run(*args, cwd=self.home)

    def curl(self, path: str, *args: str) -> bytes:
        command = ["curl", "-sSN", "-m", "30", "--cacert", str(self.certificate), self.url + path, *args]
        return subprocess.run(command, capture_output=True, check=True).stdout

    def public(self, url: str = "") -> dict[str, str]:
        """What `mogine doctor --public` finds: name to status of all that is not well."""
        outside = Outside.of(url or self.url, source=VISITOR, ca=self.certificate, patience_s=1)
        return {line.name: line.status for line in examine(outside) if line.status != "ok"}

    @contextmanager
    def nginx_with(self, change: Callable[[str], str]) -> Iterator[None]:
        """nginx with another file, for as long as the context lasts."""
        self.front.servers = change(self.nginx_file)
        assert self.front.servers != self.nginx_file
        self.front.restart()
        yield
        self.front.servers = self.nginx_file
        self.front.restart()


def findings(done: "subprocess.CompletedProcess[str]") -> dict[str, str]:
    told = json.loads(done.stdout)
    assert done.returncode == (3 if told["counts"]["error"] else 0), done.stderr
    return {line["name"]: line["status"] for line in told["lines"] if line["status"] != "ok"}


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [sock.getsockname()[1] for sock in socks]


def write_settings(home: Path, values: dict[str, str]) -> None:
    text = envfile.read(home / ".env")
    for name, value in values.items():
        text = envfile.with_value(text, name, value)
    envfile.write(home / ".env", text)


@pytest.fixture
def doubao() -> Iterator[DoubaoFake]:
    with DoubaoFake(script(say("三天"), say("到账"), usage(20, 5)), keys=[KEY]).in_thread() as fake:
        yield fake


@pytest.fixture
def site(mogine: Run, pm2: Pm2, doubao: DoubaoFake, tmp_path: Path) -> Iterator[Site]:
    """As docs/deploy.md says, but for the ports."""
    home, logs, nginx_folder = tmp_path / "my assistant", tmp_path / "wwwlogs", tmp_path / "nginx"
    for folder in (logs, nginx_folder):
        folder.mkdir()
    certificate, key = write_certificate(tmp_path, days=60)
    front = Nginx(nginx_folder, "")
    proxy, kb, analytics = free_ports(3)
    assert mogine("init", str(home), "--yes").returncode == 0
    write_settings(
        home,
        {
            **{name: doubao.environ[name] for name in ("DOUBAO_API_KEY", "DOUBAO_BASE_URL")},
            "DOUBAO_MODEL": MODEL,
            "MOGINE_BASE_PATH": PREFIX,
            "MOGINE_ALLOWED_HOSTS": "localhost",
            "MOGINE_LOG_DIR": str(logs),
            "MOGINE_PROXY_PORT": str(proxy),
            "MOGINE_KB_PORT": str(kb),
            "MOGINE_ANALYTICS_PORT": str(analytics),
            "MOGINE_DAILY_BUDGET_CNY": "20",
            "MOGINE_MAX_STREAMS": "100",
        },
    )
    here, tls = tmp_path / "deploy", ("--certificate", str(certificate), "--certificate-key", str(key))
    for command in (
        ("kb", "ingest", "./docs"),
        ("kb", "test", "add", "退款多久到账？", "--document", "docs/returns.zh.md"),
        ("backup",),
        ("deploy", "pm2", "--write", str(here)),
        ("deploy", "nginx", "--https-port", str(front.port), *tls, "--write", str(here)),
    ):
        done = mogine(*command, cwd=home)
        assert done.returncode == 0, (command, done.stderr)
    pm2("start", str(here / "ecosystem.config.js"))
    text = on_this_machine((here / "mogine.conf").read_text(), front)
    front.servers = text
    with front.started():
        yield Site(home, mogine, front, certificate, text)


def test_a_site_is_set_up_asked_examined_and_broken_in_turn(
    site: Site, pm2: Pm2, doubao: DoubaoFake, tmp_path: Path
) -> None:
    # It answers, at the prefix, with plain curl.
    answer = events_of(site.curl("api/chat", *JSON, '{"question": "退款多久到账？"}'))
    assert "".join(data["text"] for name, data in answer if name == "delta") == "三天到账"
    (cited,) = [data for name, data in answer if name == "citations"]
    assert "returns.zh.md" in json.dumps(cited)
    assert json.loads(site.curl("api/search?q=test"))["results"] is not None
    body = '{"messages": [{"role": "user", "content": "你好"}]}'
    told = json.loads(site.curl("api/llm/doubao", *JSON, body))
    assert told["choices"][0]["message"]["content"] == "三天到账"
    assert json.loads(site.curl("api/analytics/health"))["status"] == "ok"

    # Both examinations are green, and the owner sees what was asked.
    outside = ("--public", site.url, "--ca", str(site.certificate), "--from", VISITOR, "--patience", "1")
    assert findings(site.mogine("doctor", "--json", *outside)) == {}
    assert findings(site.mogine("doctor", "--json", "--online")) == {}
    assert "退款多久到账" in site.mogine("queries").stdout
    assert site.front.problems() == []

    # What is broken gets its name.
    broken: dict[str, Any] = {
        "stream": lambda text: text.replace(
            "proxy_buffering off;", "proxy_buffering on; proxy_ignore_headers X-Accel-Buffering;"
        ),
        "compression": lambda text: text.replace(
            "gzip off;", "gzip on; gzip_types text/event-stream; gzip_min_length 0;"
        ),
        "address": lambda text: re.sub(r"proxy_set_header X-Forwarded-For .*;", "", text),
        "prefix": lambda text: re.sub(r"rewrite \S+ \$1 break;", "", text),
    }
    for name, change in broken.items():
        with site.nginx_with(change):
            assert site.public() == {name: "error"}
    assert site.public(site.url.replace("mogine_agent", "chatbot")) == {"prefix": "error"}
    old = tmp_path / "old"
    old.mkdir()
    expired, old_key = write_certificate(old, days=-1)
    key = site.certificate.with_name("key.pem")
    with site.nginx_with(
        lambda text: text.replace(str(site.certificate), str(expired)).replace(str(key), str(old_key))
    ):
        assert site.public() == {"tls": "error"}

    pm2("stop", "mogine-kb")
    assert site.public() == {"search": "error"}
    assert findings(site.mogine("doctor", "--json")) == {"server kb": "warning"}
    pm2("start", "mogine-kb")
    assert findings(site.mogine("doctor", "--json", "--min-free", "1000000")) == {"disk": "error"}
    write_settings(site.home, {"DOUBAO_API_KEY": "test-key-of-somebody-else"})
    assert findings(site.mogine("doctor", "--json", "--online")) == {"key doubao": "error"}
    write_settings(site.home, {"DOUBAO_API_KEY": KEY})
    assert site.public() == {}

"""Our three servers behind the nginx that `mogine deploy nginx` sets up: the fixture `behind`."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from mogine.deploy import nginx as renderer
from mogine.deploy.site import Site
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from tests.fronts.nginx import LISTEN, Nginx
from tests.kb.conftest import make_document, take_in
from tests.serve.conftest import Served, Start
from tests.upstreams.doubao import MODEL, DoubaoFake
from tests.upstreams.script import say, script, usage
from tests.upstreams.tls import certificate_files

PREFIX = "/~temp/mogine_agent/"


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Behind:
    """Our three servers behind the nginx that `mogine deploy nginx` sets up."""

    served: Served
    front: Nginx
    site: Site

    async def curl(self, path: str, *args: str, scheme: str = "https") -> Answer:
        """As a person would, with plain curl; `path` begins after the prefix."""
        url = f"{scheme}://localhost:{self.front.port}{self.site.prefix}{path}"
        socket = ("--unix-socket", str(self.front.folder / "http.sock")) if scheme == "http" else ()
        command = ("curl", "-sS", "-i", "-m", "20", "--cacert", str(self.front.ca_file), *socket, url, *args)
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        told, _ = await process.communicate()
        head, _, body = told.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        return Answer(int(first.split()[1]), headers, body)

    @property
    def logs(self) -> Path:
        return self.site.log_dir


def on_this_machine(text: str, front: Nginx) -> str:
    """The file as it is, but for ports that a test may not take."""
    lines = [line for line in text.splitlines() if "listen [::]" not in line]
    return (
        "\n".join(lines)
        .replace(f"listen {front.port} ssl", f"listen {LISTEN} ssl")
        .replace("listen 80;", f"listen unix:{front.folder}/http.sock;")
    )


def several(folder: Path) -> Nginx:
    """An nginx in a new folder there, with a port and nothing to serve yet: see `spread`."""
    (folder / "nginx").mkdir()
    (folder / "logs").mkdir()
    return Nginx(folder / "nginx", "")


@contextmanager
def spread(
    front: Nginx, *, proxies: tuple[str, ...], kbs: tuple[str, ...] = (), more: str = ""
) -> Iterator[None]:
    """`front` with the file for servers that run more than once, and `more` beside it."""
    certificate, key = certificate_files()
    site = Site(
        home=front.folder.parent,
        executable=Path(sys.executable),
        domain="localhost",
        log_dir=front.folder.parent / "logs",
        https_port=front.port,
        certificate=certificate,
        certificate_key=key,
        proxies=proxies,
        kbs=kbs,
    )
    front.servers = on_this_machine(renderer.render(site)["mogine.conf"], front) + more
    with front.started():
        yield


@pytest.fixture
async def doubao() -> AsyncIterator[DoubaoFake]:
    async with DoubaoFake(script(say("好"), usage(3, 1))) as fake:
        yield fake


Go = Any


@pytest.fixture
def behind(serve: Start, doubao: DoubaoFake, home: Path, tmp_path: Path) -> Iterator[Go]:
    """`async with behind(prefix, change=..., kb_port=...) as site`: `change` may spoil nginx' file."""

    @asynccontextmanager
    async def go(
        prefix: str = PREFIX, *, change: Callable[[str], str] = str, **changes: Any
    ) -> AsyncIterator[Behind]:
        take_in(Generations(home / "data/kb"), NoEmbedder(), make_document("docs/test.md", "test 测试 words"))
        served = await serve(
            *("analytics", "kb", "proxy"),
            env={**doubao.environ, "DOUBAO_MODEL": MODEL, "MOGINE_BASE_PATH": prefix},
        )
        folder, logs = tmp_path / "nginx", tmp_path / "logs of nginx"
        folder.mkdir()
        logs.mkdir()
        front = Nginx(folder, "")
        certificate, key = certificate_files()
        site = Site(
            home=home,
            executable=Path(sys.executable),
            domain="localhost",
            prefix=prefix,
            log_dir=logs,
            proxy_port=served.port("proxy"),
            kb_port=served.port("kb"),
            analytics_port=served.port("analytics"),
            https_port=front.port,
            certificate=certificate,
            certificate_key=key,
        )
        site = replace(site, **changes)
        text = renderer.render(site)["mogine.conf"]
        changed = change(text)
        assert change is str or changed != text, "nothing was changed"
        front.servers = on_this_machine(changed, front)
        with front.started():
            yield Behind(served, front, site)

    yield go

"""PM2 itself starts, watches and ends the three servers; the death of one leaves the others answering."""

import asyncio
import os
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import httpx

from mogine.deploy import pm2 as renderer
from mogine.deploy.site import Site
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from tests.fronts.pm2 import Pm2
from tests.kb.conftest import make_document, take_in
from tests.serve.conftest import events_of, read_rows
from tests.servers import DEFAULTS
from tests.waiting import until

ASK = {"question": "退款"}


def free_ports() -> list[int]:
    """Three that nobody has in this moment; a supervised server cannot be told to take any."""
    with ExitStack() as stack:
        socks = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3)]
        return [sock.getsockname()[1] for sock in socks]


def answers(url: str, path: str = "/healthz") -> bool:
    try:
        return httpx.get(url + path, trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


async def test_three_apps_live_and_die_apart(pm2: Pm2, home: Path, tmp_path: Path) -> None:
    take_in(Generations(home / "data/kb"), NoEmbedder(), make_document("docs/a.md", "退款 三天到账"))
    proxy, kb, analytics = free_ports()
    logs = tmp_path / "logs"
    logs.mkdir()
    executable = Path(sys.executable).with_name("mogine")
    site = Site(home=home, executable=executable, log_dir=logs)
    file = tmp_path / "ecosystem.config.js"
    file.write_text(renderer.render(site)["ecosystem.config.js"])
    ports = {"PROXY": proxy, "KB": kb, "ANALYTICS": analytics}
    pm2.environ = {**DEFAULTS, **{f"MOGINE_{name}_PORT": str(port) for name, port in ports.items()}}
    urls = {f"mogine-{name.lower()}": f"http://127.0.0.1:{port}" for name, port in ports.items()}

    # PM2 waits for each app to say that it is ready, so nothing has to be waited for here.
    pm2("start", str(file))
    assert all(answers(url) for url in urls.values())
    before = pm2.apps()
    assert {name: app["status"] for name, app in before.items()} == dict.fromkeys(urls, "online")

    # The knowledge base dies: the chat goes on, without citations as long as it is away.
    os.kill(before["mogine-kb"]["pid"], signal.SIGKILL)
    reply = await asyncio.to_thread(httpx.post, urls["mogine-proxy"] + "/api/chat", json=ASK, trust_env=False)
    assert events_of(reply.content)[-1][0] == "done"
    assert answers(urls["mogine-analytics"])
    await until(
        lambda: asyncio.to_thread(answers, urls["mogine-kb"], "/api/search?q=退款"),
        60,
        "the knowledge base to come back",
    )

    # Analytics dies: nothing that is asked meanwhile is lost.
    os.kill(before["mogine-analytics"]["pid"], signal.SIGKILL)
    for _ in range(3):
        reply = await asyncio.to_thread(
            httpx.post, urls["mogine-proxy"] + "/api/chat", json=ASK, trust_env=False
        )
        assert events_of(reply.content)[-1][0] == "done"
    await until(lambda: asyncio.to_thread(answers, urls["mogine-analytics"]), 60, "analytics to come back")

    # The proxy dies: search goes on.
    os.kill(before["mogine-proxy"]["pid"], signal.SIGKILL)
    assert answers(urls["mogine-kb"], "/api/search?q=退款")
    await until(lambda: asyncio.to_thread(answers, urls["mogine-proxy"]), 60, "the proxy to come back")
    await until(lambda: all(app["restarts"] >= 1 for app in pm2.apps().values()), 60, "PM2 to have counted")

    pm2("restart", "all")
    assert all(answers(url) for url in urls.values())
    pm2("stop", "all")
    assert {app["status"] for app in pm2.apps().values()} == {"stopped"}
    assert not any(answers(url) for url in urls.values())
    assert len(read_rows(home)) == 4
    told = (logs / "mogine_proxy_app.log").read_text()
    assert "mogine has stopped; everything is written" in told and "Traceback" not in told


async def test_an_app_that_is_not_ready_is_not_called_online(pm2: Pm2, home: Path, tmp_path: Path) -> None:
    """What `wait_ready` is for: a port in use is seen at `pm2 start`, not by visitors."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        site = Site(home=home, executable=Path(sys.executable).with_name("mogine"), log_dir=tmp_path)
        file = tmp_path / "ecosystem.config.js"
        file.write_text(renderer.render(site)["ecosystem.config.js"].replace("60000", "5000"))
        port = str(taken.getsockname()[1])
        pm2.environ = {**DEFAULTS, "MOGINE_PROXY_PORT": port}
        pm2("start", str(file), "--only", "mogine-proxy")
        told = (tmp_path / "mogine_proxy_app.log").read_text()
        assert f"port {port}" in told and "serves" not in told

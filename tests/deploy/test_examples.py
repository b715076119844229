"""deploy/examples agrees with the program: settings, ports, routes, units, and nginx takes its files."""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from mogine.deploy import systemd
from mogine.kb.embedders import NoEmbedder
from mogine.kb.generations import Generations
from mogine.serve import analytics, kb, proxy
from mogine.settings import Settings, load_settings, variables
from tests.conftest import ROOT, Run
from tests.deploy.sites import PLAIN
from tests.deploy.test_nginx import gixy
from tests.fronts.nginx import LISTEN, Nginx
from tests.kb.conftest import make_document, take_in
from tests.serve.conftest import Start
from tests.upstreams.tls import certificate_files

EXAMPLES = ROOT / "deploy/examples"
README = (EXAMPLES / "README.md").read_text("utf-8")
COMPOSE = yaml.safe_load((EXAMPLES / "compose/compose.yaml").read_text("utf-8"))
SERVICES: dict[str, Any] = COMPOSE["services"]
OURS = {name: service for name, service in SERVICES.items() if service["image"] == "mogine"}
PORTS = {"proxy": 8741, "kb": 8739, "analytics": 8742}
ENV_FILES = sorted(EXAMPLES.rglob("*.env"))
COMMANDS = re.findall(r"^mogine (deploy nginx .*) --write \.$", README, re.M)
MADE = (EXAMPLES / "compose/mogine.conf", EXAMPLES / "systemd/front/mogine.conf")


KNOWN = {variable.env for variable in variables()}


def settings_in(path: Path, home: Path) -> Settings:
    """The example as the `.env` of a home."""
    (home / ".env").write_text(path.read_text("utf-8"))
    return load_settings({}, home)


def address_of(service: Any) -> str:
    return str(service["networks"]["inside"]["ipv4_address"])


@pytest.mark.parametrize("path", ENV_FILES, ids=lambda path: path.parent.name + "-" + path.stem)
def test_every_setting_exists_and_every_secret_is_seen_to_be_none(path: Path, home: Path) -> None:
    settings_in(path, home)
    text = path.read_text("utf-8")
    secret = {variable.env for variable in variables() if variable.secret}
    for name, value in re.findall(r"^#? ?([A-Z_]+)=(.*)$", text, re.M):
        assert name in KNOWN, name
        if name in secret and name != "MOGINE_REDIS_URL":
            assert "example" in value, name


@pytest.mark.parametrize("path", [path for path in ENV_FILES if "ROLLING" in path.read_text("utf-8")])
def test_running_answers_have_time_to_end(path: Path, home: Path) -> None:
    settings = settings_in(path, home)
    assert settings.proxy.rolling_restart
    assert settings.proxy.shutdown_grace_s > settings.proxy.answer_timeout_s


def test_there_is_something_to_compare() -> None:
    assert len(ENV_FILES) == 4
    assert len(COMMANDS) == len(MADE) == 2
    assert set(OURS) == {*(f"proxy-{n}" for n in (1, 2, 3)), "kb-1", "kb-2", "analytics"}


# --- nginx ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "made"), list(zip(COMMANDS, MADE, strict=True)), ids=("compose", "systemd")
)
def test_the_files_of_nginx_are_what_the_command_beside_them_makes(
    mogine: Run, command: str, made: Path
) -> None:
    done = mogine(*shlex.split(command))
    assert done.returncode == 0, done.stderr
    assert made.read_text("utf-8") == done.stdout, f"mogine {command}"


@pytest.mark.parametrize("made", MADE, ids=("compose", "systemd"))
def test_nginx_takes_them_and_gixy_finds_nothing(made: Path, tmp_path: Path) -> None:
    certificate, key = certificate_files()
    for path in made.parent.glob("*.conf"):
        text = re.sub(r"ssl_certificate .*;", f"ssl_certificate {certificate};", path.read_text("utf-8"))
        text = re.sub(r"ssl_certificate_key .*;", f"ssl_certificate_key {key};", text)
        text = re.sub(r'"/var/log/\w+/', f'"{tmp_path}/', text)
        (tmp_path / path.name).write_text(re.sub(r"(listen (?:\[::\]:)?)(80|443)\b", r"\g<1>18\2", text))
    main = tmp_path / "nginx.conf"
    main.write_text(f"pid {tmp_path}/pid;\nevents {{ }}\nhttp {{ include {tmp_path}/[mi]*e.conf; }}\n")
    command = ["/usr/sbin/nginx", "-t", "-q", "-p", str(tmp_path), "-c", str(main), "-e", "stderr"]
    done = subprocess.run(command, capture_output=True, text=True)
    told = "\n".join(line for line in done.stderr.splitlines() if "Address already in use" not in line)
    assert (done.returncode, told) == (0, "")
    assert gixy(main) == []


async def test_searches_from_inside_go_to_whichever_knowledge_base_answers(
    serve: Start, home: Path, tmp_path: Path
) -> None:
    take_in(Generations(home / "data/kb"), NoEmbedder(), make_document("docs/test.md", "test words"))
    served = await serve("kb", env={"MOGINE_ALLOWED_HOSTS": "chat.example.com"})
    folder = tmp_path / "nginx"
    folder.mkdir()
    inside = (EXAMPLES / "compose/inside.conf").read_text("utf-8")
    servers = "".join(
        f"server 127.0.0.1:{port} max_fails=1 fail_timeout=2s;" for port in (1, served.port("kb"))
    )
    front = Nginx(
        folder, f"upstream mogine_kb {{ {servers} }}\n" + inside.replace("listen 8739", f"listen {LISTEN}")
    )
    with front.started():
        origin = f"http://127.0.0.1:{front.port}"
        async with aiohttp.ClientSession(origin, headers={"Host": "nginx:8739"}) as session:
            for _ in range(4):
                async with session.get("/api/search?q=test") as response:
                    assert response.status == 200
                    assert [hit["source"] for hit in (await response.json())["results"]] == ["docs/test.md"]
            async with session.get("/api/documents") as response:
                assert response.status == 404


# --- compose -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_a_service_listens_where_it_is_asked_and_at_a_route_that_there_is(name: str, home: Path) -> None:
    service = OURS[name]
    kind = name.partition("-")[0]
    assert service["command"] == ["serve", kind]
    url = re.search(r"http://127\.0\.0\.1:(\d+)(/\w+)", " ".join(service["healthcheck"]["test"]))
    assert url is not None
    settings = settings_in(EXAMPLES / "compose/mogine.env", home)
    assert (int(url[1]), PORTS[kind]) == (getattr(settings, kind).port,) * 2
    app = {"proxy": proxy, "kb": kb, "analytics": analytics}[kind].create_app(settings)
    assert url[2] in {resource.canonical for resource in app.router.resources()}
    option = {"proxy": "--upstreams", "kb": "--kb-upstreams", "analytics": "--analytics-upstream"}[kind]
    listed = shlex.split(COMMANDS[0])
    assert f"{address_of(service)}:{url[1]}" in listed[listed.index(option) + 1].split(",")


def test_the_parts_of_compose_know_each_other(home: Path) -> None:
    settings = settings_in(EXAMPLES / "compose/mogine.env", home)
    assert [str(network) for network in settings.access.trusted_proxies] == [
        f"{address_of(SERVICES['nginx'])}/32"
    ]
    for service in SERVICES.values():
        assert set(service.get("depends_on", ())) <= set(SERVICES)
        for mount in service.get("volumes", ()):
            source = mount.partition(":")[0]
            assert (
                source in COMPOSE["volumes"] or source == "./tls" or (EXAMPLES / "compose" / source).exists()
            )
    hosts = {settings.proxy.kb_url, settings.access.redis_url}
    assert {re.sub(r"\w+://|:.*", "", host) for host in hosts} == {"nginx", "redis"}
    for service in OURS.values():
        assert int(service["stop_grace_period"].removesuffix("s")) > settings.proxy.shutdown_grace_s
    assert "listen 8739;" in (EXAMPLES / "compose/inside.conf").read_text("utf-8")
    assert not [
        port for name, service in SERVICES.items() for port in service.get("ports", ()) if name != "nginx"
    ]


def test_the_image_has_the_extras_and_ports_that_there_are() -> None:
    text = (EXAMPLES / "compose/Dockerfile").read_text("utf-8")
    extras = re.search(r"pip install \S+ 'mogine\[(.*?)\]'", text)
    ports = re.search(r"^EXPOSE (.*)$", text, re.M)
    assert extras and ports
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    assert all(re.search(rf"^{extra} = \[", pyproject, re.M) for extra in extras[1].split(","))
    assert set(ports[1].split()) == {str(port) for port in PORTS.values()}


# --- systemd -------------------------------------------------------------------------------------


def units_of(machine: str, folder: Path) -> list[Path]:
    """What lies in /etc/systemd/system on a machine of the example, with a program that there is."""
    site = PLAIN.__class__(home=PLAIN.home, executable=Path("/bin/true"), kb_calls_out=True)
    for name, text in systemd.render(site).items():
        (folder / name).write_text(text)
    own = []
    for path in (EXAMPLES / "systemd" / machine).iterdir():
        if path.suffix in (".service", ".target"):
            own.append(folder / path.name)
            own[-1].write_text(path.read_text("utf-8").replace("/opt/mogine/bin/mogine", "/bin/true"))
    return [path.with_name(path.name.replace("@.", "@1.")) for path in own]


@pytest.mark.parametrize("machine", ["front", "app"])
def test_systemd_takes_the_units(machine: str, tmp_path: Path) -> None:
    units = units_of(machine, tmp_path)
    done = subprocess.run(
        ["systemd-analyze", "verify", *units],
        capture_output=True,
        text=True,
        env={"SYSTEMD_UNIT_PATH": f"{tmp_path}:", "PATH": "/usr/bin:/bin"},
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_a_proxy_among_several_is_as_shut_off_as_a_single_one() -> None:
    unit = (EXAMPLES / "systemd/app/mogine-proxy@.service").read_text("utf-8")
    site = PLAIN.__class__(
        home=PLAIN.home, executable=PLAIN.executable, programs=PLAIN.programs, shutdown_grace_s=310
    )
    usual = systemd.render(site)["mogine-proxy.service"]
    added = [
        line for line in unit.splitlines() if not line.startswith("#") and line not in usual.splitlines()
    ]
    missing = [
        line for line in usual.splitlines() if not line.startswith("#") and line not in unit.splitlines()
    ]
    assert added == ["Description=mogine LLM proxy %i", "Environment=MOGINE_PROXY_PORT=1874%i"]
    assert missing == ["Description=mogine LLM proxy"]


def test_the_machines_are_where_nginx_looks_for_them(home: Path) -> None:
    listed = shlex.split(COMMANDS[1])
    hosts = [settings_in(EXAMPLES / f"systemd/app/mogine-{number}.env", home).host for number in (1, 2)]
    front = settings_in(EXAMPLES / "systemd/front/mogine.env", home)
    proxies = [f"{host}:1874{number}" for host in hosts for number in (1, 2)]
    assert listed[listed.index("--upstreams") + 1].split(",") == proxies
    assert listed[listed.index("--kb-upstreams") + 1].split(",") == [f"{host}:8739" for host in hosts]
    assert listed[listed.index("--analytics-upstream") + 1] == f"{front.host}:8742"
    assert front.proxy.kb_url == f"http://{hosts[0]}:8739", "where documents are taken in"

"""The homes for which tests make files; `python -m tests.deploy.sites` writes the golden ones."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from mogine.deploy.site import Site
from mogine.deploy.targets import TARGETS

GOLDEN = Path(__file__).parent / "golden"

PLAIN = Site(
    home=Path("/srv/assistant"),
    executable=Path("/opt/mogine/bin/mogine"),
    programs=(Path("/opt/mogine"), Path("/usr")),
    domain="www.example.com",
)
PREFIXED = replace(
    PLAIN,
    home=Path("/home/li/my assistant"),
    executable=Path("/home/li/venv/bin/mogine"),
    programs=(Path("/home/li/venv"), Path("/usr")),
    prefix="/~temp/mogine_agent/",
    user="li",
    log_dir=Path("/www/wwwlogs"),
    certificate=Path("/www/server/panel/vhost/cert/www.example.com/fullchain.pem"),
    certificate_key=Path("/www/server/panel/vhost/cert/www.example.com/privkey.pem"),
    admin_from=("203.0.113.0/24", "2001:db8::/32"),
    behind=("10.0.0.0/8",),
)
SPREAD = replace(
    PREFIXED,
    proxies=("10.0.0.1:8741", "10.0.0.2:8741", "[fd00::3]:8741"),
    kbs=("kb-1.internal:8739", "kb-2.internal:8739"),
    analytics_at=("10.0.0.4:8742",),
)
SITES: Mapping[str, Site] = {"plain": PLAIN, "prefixed": PREFIXED}
FOR_SPREAD = ("nginx", "nginx-locations")


def rendered() -> Iterator[tuple[str, str]]:
    """Every file of every target for each site that it is for, by its name below `golden`."""
    for kind, site in SITES.items():
        for target in TARGETS.values():
            for name, text in target.render(site).items():
                yield f"{kind}/{name}", text
    for kind in FOR_SPREAD:
        for name, text in TARGETS[kind].render(SPREAD).items():
            yield f"spread/{name}", text


if __name__ == "__main__":
    for name, text in rendered():
        path = GOLDEN / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, "utf-8")

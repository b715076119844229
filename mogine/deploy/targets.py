"""Every target of `mogine deploy`: what makes its files, where they go, what to do then."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mogine.deploy import cron, firewall, logrotate, nginx, pm2, systemd
from mogine.deploy.site import Site

Renderer = Callable[[Site], dict[str, str]]


@dataclass(frozen=True, slots=True)
class Target:
    """`then` are the commands that put the files to work, with {dir} for where they were written."""

    render: Renderer
    folder: Path | None
    then: tuple[str, ...]


TARGETS: Mapping[str, Target] = {
    "nginx": Target(
        nginx.render,
        Path("/etc/nginx/conf.d"),
        ("sudo install -d {log_dir}", "sudo nginx -t && sudo systemctl reload nginx", "{doctor}"),
    ),
    "nginx-locations": Target(
        nginx.render_into_site,
        None,
        (
            "put mogine_http.conf into /etc/nginx/conf.d, and into your server block: "
            "include /etc/nginx/mogine_locations.conf;",
            "sudo install -d {log_dir}",
            "sudo nginx -t && sudo systemctl reload nginx",
            "{doctor}",
        ),
    ),
    "systemd": Target(
        systemd.render,
        Path("/etc/systemd/system"),
        (
            "sudo useradd --system --home-dir {home} --shell /usr/sbin/nologin {user}   (if there is none)",
            "sudo chown -R {user}: {home}",
            "sudo systemctl daemon-reload",
            "sudo systemctl enable --now mogine-proxy mogine-kb mogine-analytics mogine.target "
            "mogine-cleanup.timer mogine-backup.timer mogine-check.timer",
        ),
    ),
    "pm2": Target(
        pm2.render,
        None,
        (
            "sudo install -d -o {user} {log_dir}",
            "pm2 start {dir}/ecosystem.config.js && pm2 save && pm2 startup",
        ),
    ),
    "cron": Target(cron.render, None, ("(crontab -l; cat {dir}/mogine.crontab) | crontab -   (as {user})",)),
    "logrotate": Target(
        logrotate.render, Path("/etc/logrotate.d"), ("sudo logrotate -d /etc/logrotate.d/mogine",)
    ),
    "firewall": Target(firewall.render, None, ()),
}

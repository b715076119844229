"""Three hardened units under one target, and timers for cleanup, check and backup."""

from pathlib import Path

from mogine.deploy.site import Site
from mogine.errors import SettingsError

SERVERS = {"proxy": "LLM proxy", "kb": "knowledge base", "analytics": "analytics"}
MEMORY = {"proxy": "512M", "kb": "1536M", "analytics": "1G"}
BACKUPS_KEPT = 14
WATCHDOG_S = 30
STOP_MARGIN_S = 15

# What a server that reads files and speaks TCP does without. `systemd-analyze security` counts it.
HARDENING = """\
UMask=0077
NoNewPrivileges=yes
CapabilityBoundingSet=
AmbientCapabilities=
ProtectSystem=strict
ProtectHome={protect_home}
{bind}ReadWritePaths={writable}
PrivateTmp=yes
PrivateDevices=yes
DevicePolicy=closed
PrivateUsers=yes
ProtectProc=invisible
ProcSubset=pid
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
ProtectKernelModules=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
RestrictRealtime=yes
RestrictSUIDSGID=yes
RemoveIPC=yes
LockPersonality=yes
KeyringMode=private
SystemCallArchitectures=native
SystemCallFilter=@system-service
SystemCallFilter=~@privileged
SystemCallErrorNumber=EPERM
"""

# A server of the inside talks to this machine alone.
INSIDE = "IPAddressDeny=any\nIPAddressAllow=localhost\n"


def render(site: Site) -> dict[str, str]:
    """All units, by file name; they belong into /etc/systemd/system."""
    files = {"mogine.target": _target()}
    for name, title in SERVERS.items():
        files[f"mogine-{name}.service"] = _server(site, name, title)
    jobs = {
        "cleanup": ("delete what is older than may be kept", "cleanup", "*-*-* 03:40:00"),
        "backup": ("back the home up", f"backup --keep {BACKUPS_KEPT}", "*-*-* 03:10:00"),
        "check": ("look for trouble", "check", "*:0/15"),
    }
    for name, (title, command, when) in jobs.items():
        files[f"mogine-{name}.service"] = _job(site, title, command)
        files[f"mogine-{name}.timer"] = _timer(name, title, when)
    return files


def _target() -> str:
    wanted = " ".join(f"mogine-{name}.service" for name in SERVERS)
    return f"""\
# Written by `mogine deploy systemd`. `systemctl enable --now mogine.target` starts all three servers.
[Unit]
Description=mogine, the assistant of the website
Wants={wanted}

[Install]
WantedBy=multi-user.target
"""


def _server(site: Site, name: str, title: str) -> str:
    calls_out = {"proxy": True, "kb": site.kb_calls_out, "analytics": site.analytics_calls_out}[name]
    stop_s = int(site.shutdown_grace_s) + STOP_MARGIN_S
    return f"""\
# Written by `mogine deploy systemd`.
[Unit]
Description=mogine {title}
PartOf=mogine.target
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
Type=notify
User={site.user}
Group={site.user}
WorkingDirectory={_path(site.home)}
ExecStart={_call(site)} serve {name}
ExecReload=/bin/kill -HUP $MAINPID
Restart=always
RestartSec=1
WatchdogSec={WATCHDOG_S}
TimeoutStartSec=120
TimeoutStopSec={stop_s}
LimitNOFILE=65536
MemoryMax={MEMORY[name]}
{_hardening(site, writes_home=name == "analytics")}{"" if calls_out else INSIDE}
[Install]
WantedBy=mogine.target
"""


def _job(site: Site, title: str, command: str) -> str:
    return f"""\
# Written by `mogine deploy systemd`.
[Unit]
Description=mogine: {title}

[Service]
Type=oneshot
User={site.user}
Group={site.user}
WorkingDirectory={_path(site.home)}
ExecStart={_call(site)} {command}
Nice=10
IOSchedulingClass=idle
{_hardening(site)}{INSIDE if not site.analytics_calls_out else ""}"""


def _timer(name: str, title: str, when: str) -> str:
    return f"""\
# Written by `mogine deploy systemd`.
[Unit]
Description=mogine: {title}

[Timer]
OnCalendar={when}
Persistent=yes
RandomizedDelaySec=60

[Install]
WantedBy=timers.target
"""


def _hardening(site: Site, *, writes_home: bool = False) -> str:
    # Who closes a gap on the dashboard writes its test into kb-tests.jsonl, beside data/.
    # What lies in a folder of users is let in by itself, and nothing beside it is seen.
    readable = [path for path in site.programs if _is_hidden(path)]
    bind = f"BindPaths={_listed(str(site.home))}\n" if _is_hidden(site.home) else ""
    bind += "".join(f"BindReadOnlyPaths={_listed(str(path))}\n" for path in readable)
    return HARDENING.format(
        protect_home="tmpfs" if bind else "yes",
        bind=bind,
        writable=_listed(str(site.home if writes_home else site.data)),
    )


def _is_hidden(path: Path) -> bool:
    return path.parts[1:2] in (("home",), ("root",))


def _call(site: Site) -> str:
    return f"{_word(str(site.executable))} --home {_word(str(site.home))}"


def _word(text: str) -> str:
    """One word of a command line in a unit: quoted, with nothing left to be expanded."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"'


def _listed(text: str) -> str:
    """A path in a list of paths, where variables are not known. A colon would part it from its target."""
    if ":" in text:
        raise SettingsError(f"systemd cannot read {text!r}: a folder in its lists holds no colon")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _path(path: Path) -> str:
    """A path that is the rest of its line: taken as it stands, but for %."""
    text = str(path)
    if text != text.strip() or "\\" in text:
        raise SettingsError(
            f"systemd cannot read {text!r}: a folder has no blank at its ends and no backslash"
        )
    return text.replace("%", "%%")

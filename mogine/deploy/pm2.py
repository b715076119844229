"""PM2's ecosystem file: three apps that say when they are ready."""

import json

from mogine.deploy.site import Site

MEMORY = {"proxy": "512M", "kb": "1536M", "analytics": "1G"}
STOP_MARGIN_S = 5


def render(site: Site) -> dict[str, str]:
    """`ecosystem.config.js`; `pm2 start` takes it."""
    apps = [_app(site, name) for name in ("analytics", "kb", "proxy")]
    # Two characters that JSON allows in a string and older JavaScript does not.
    text = json.dumps({"apps": apps}, ensure_ascii=False, indent=2)
    text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    head = (
        "// Written by `mogine deploy pm2`.\n"
        "// pm2 start ecosystem.config.js && pm2 save && pm2 startup\n"
        "// `pm2 reload` would not do more than `pm2 restart`: a restart ends answers in peace.\n"
    )
    return {"ecosystem.config.js": f"{head}module.exports = {text};\n"}


def _app(site: Site, name: str) -> dict[str, object]:
    log = str(site.log_dir / f"mogine_{name}_app.log")
    return {
        "name": f"mogine-{name}",
        "script": str(site.executable),
        "args": ["--home", str(site.home), "serve", name],
        "interpreter": "none",
        "cwd": str(site.home),
        "exec_mode": "fork",
        "instances": 1,
        "wait_ready": True,
        "listen_timeout": 60_000,
        "kill_timeout": int((site.shutdown_grace_s + STOP_MARGIN_S) * 1000),
        "autorestart": True,
        "exp_backoff_restart_delay": 200,
        "max_memory_restart": MEMORY[name],
        "out_file": log,
        "error_file": log,
        "merge_logs": True,
        "env": {"PYTHONUNBUFFERED": "1"},
    }

"""Rotation of nginx' and PM2's logs, kept no longer than the questions themselves."""

from mogine.deploy.site import Site
from mogine.errors import SettingsError

LONGEST_DAYS = 30


def render(site: Site) -> dict[str, str]:
    """`mogine`, which belongs into /etc/logrotate.d."""
    days = min(LONGEST_DAYS, site.retention_days)
    folder = _quoted(site)
    return {
        "mogine": f"""\
# Written by `mogine deploy logrotate`. {days} days: addresses in error logs are data of persons.
{folder}/mogine_*_access.log" {folder}/mogine_*_error.log" {{
    su root root
    daily
    rotate {days}
    maxage {days}
    missingok
    notifempty
    compress
    delaycompress
    dateext
    create 0640 root root
    sharedscripts
    postrotate
        if [ -f /run/nginx.pid ]; then kill -USR1 "$(cat /run/nginx.pid)"; fi
    endscript
}}

# PM2 keeps its files open, so they are copied and emptied.
{folder}/mogine_*_app.log" {{
    su {site.user} {site.user}
    daily
    rotate {days}
    maxage {days}
    missingok
    notifempty
    compress
    dateext
    copytruncate
}}
"""
    }


def _quoted(site: Site) -> str:
    """The folder with its opening quotation mark; a pattern of files follows."""
    text = str(site.log_dir)
    if any(char in text for char in '"\\*?[]{}'):
        raise SettingsError(
            f'logrotate cannot read {text!r}: a folder of logs has none of " \\ * ? [ ] {{ }}'
        )
    return f'"{text}'

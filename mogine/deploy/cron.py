"""A crontab for the user who owns the home: cleanup, backup, a look for trouble."""

import shlex

from mogine.deploy.site import Site

BACKUPS_KEPT = 14


def render(site: Site) -> dict[str, str]:
    """`mogine.crontab`, in the form that `crontab FILE` takes."""
    call = f"{shlex.quote(str(site.executable))} --home {shlex.quote(str(site.home))}"
    call = call.replace("%", "\\%")  # cron ends the command at a bare one
    return {
        "mogine.crontab": f"""\
# Written by `mogine deploy cron`; for the user {site.user}. Times are those of the machine.
# Each line is silent when all is well, so a mail from cron means that something wants to be looked at.
SHELL=/bin/sh
PATH=/usr/local/bin:/usr/bin:/bin
# MAILTO=you@example.com

# delete what is older than {site.retention_days} days (MOGINE_RETENTION_DAYS)
40 3 * * * {call} cleanup
# into data/backups, the last {BACKUPS_KEPT} stay
10 3 * * * {call} backup --keep {BACKUPS_KEPT}
# failing answers, silence, a full disk
*/15 * * * * {call} check
"""
    }

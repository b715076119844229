"""Commands that let the world reach nginx and nothing else."""

from mogine.deploy.site import Site


def render(site: Site) -> dict[str, str]:
    """`firewall.txt`: notes and commands, to be read before they are run."""
    ports = (site.proxy_port, site.kb_port, site.analytics_port)
    inner = ", ".join(map(str, sorted(ports)))
    outer = (site.http_port, site.https_port)
    return {
        "firewall.txt": f"""\
# Written by `mogine deploy firewall`. Read first: a firewall that forgets SSH locks you out.
#
# The world needs ports {outer[0]} and {outer[1]} (nginx). Ports {inner} are mogine's own; they listen on
# {site.host} and are for nginx on this machine. Cloud servers have a second firewall, the provider's
# security group: open {outer[0]} and {outer[1]} there too, and not {inner}.

# --- ufw (Debian, Ubuntu) ---
sudo ufw allow OpenSSH
sudo ufw allow {outer[0]}/tcp
sudo ufw allow {outer[1]}/tcp
sudo ufw default deny incoming
sudo ufw enable

# --- firewalld (Alibaba Cloud Linux, openEuler, CentOS, Fedora) ---
sudo firewall-cmd --permanent --add-service=ssh
sudo firewall-cmd --permanent --add-port={outer[0]}/tcp
sudo firewall-cmd --permanent --add-port={outer[1]}/tcp
sudo firewall-cmd --reload
# SELinux lets nginx call other servers only after:
sudo setsebool -P httpd_can_network_connect 1

# --- then see from another machine ---
mogine doctor --public {site.url if site.domain else "https://YOUR.DOMAIN/"}
"""
    }

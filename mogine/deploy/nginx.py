"""nginx in front of the three servers: TLS, one prefix, streams unbuffered, the owner's side closed."""

import json
from dataclasses import dataclass
from pathlib import Path

from mogine.deploy.site import Site
from mogine.errors import SettingsError

# What nginx answers itself, in the shape of every other error. status: type, reason, words.
ERRORS = {
    404: ("invalid_request_error", "not_found", "there is nothing at this address"),
    413: ("invalid_request_error", "payload_too_large", "the request body is too large"),
    429: ("rate_limit_error", "rate_limited", "too many requests from your address; wait a moment"),
    502: ("server_error", "upstream_unavailable", "this part of the server does not answer; try again soon"),
    503: ("server_error", "overloaded", "the server cannot take the request now; try again soon"),
    504: ("server_error", "upstream_timeout", "this part of the server took too long to answer"),
}
AGAIN = (429, 502, 503)
SPREAD_KEEPALIVE = "1s"
WRITER = "kb_writer"
HSTS = 'add_header Strict-Transport-Security "max-age=31536000" always;'
# Mozilla's intermediate list: every browser of the last ten years.
CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"
    "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
)
PATHS_INSIDE = ("/metrics", "/healthz", "/readyz")
PATHS_OF_OWNER = ("/api/documents", "/api/analytics/", "/dashboard/")

Lines = list[str]


@dataclass(frozen=True, slots=True)
class _Place:
    """One address below the prefix: which server answers it, how, and by connections of which pool.

    `running`: it concerns an answer that runs on one of several servers.
    """

    remark: str
    match: str
    path: str
    server: str
    stream: bool = False
    pool: str = ""
    running: bool = False


PLACES = (
    _Place("answers, as they come", "^~", "/api/llm/", "proxy", stream=True, pool="questions"),
    _Place("answers in OpenAI's dialect", "^~", "/v1/", "proxy", stream=True, pool="questions"),
    _Place("the assistant", "=", "/api/chat", "proxy", stream=True, pool="questions"),
    _Place(
        *("the rest of an answer whose connection broke", "=", "/api/chat/resume", "proxy"),
        stream=True,
        running=True,
    ),
    _Place("whether streams pass, for `mogine doctor --public`", "^~", "/api/probe/", "proxy", stream=True),
    _Place("search", "=", "/api/search", "kb"),
    _Place("what the site says of the company", "=", "/api/company_info", "kb"),
    _Place("whether questions are recorded; no numbers of yours", "=", "/api/analytics/health", "analytics"),
)  # fmt: skip
PLACES_OF_RUNNING = (_Place("the end of an answer that runs", "=", "/api/chat/stop", "proxy", running=True),)


def render(site: Site) -> dict[str, str]:
    """A whole site of its own, to be put into nginx's http context (conf.d or sites-enabled)."""
    _require_domain(site)
    lines = [
        *_head("a site of its own", "/etc/nginx/conf.d/mogine.conf"),
        *_shared(site),
        "",
        *_redirecting_server(site),
        "",
        *_server(site),
    ]
    return {"mogine.conf": "\n".join(lines) + "\n"}


def render_into_site(site: Site) -> dict[str, str]:
    """The same for a site that has a server block already: one file for http, one to include in the block."""
    _require_domain(site)
    into = "your own server { } block, after its certificate: include /etc/nginx/mogine_locations.conf;"
    return {
        "mogine_http.conf": "\n".join(
            [*_head("what all of nginx has to know", "/etc/nginx/conf.d/mogine_http.conf"), *_shared(site)]
        )
        + "\n",
        "mogine_locations.conf": "\n".join([*_head("the addresses", into), *_locations(site)]) + "\n",
    }


def _require_domain(site: Site) -> None:
    if not site.domain:
        raise SettingsError(
            "nginx needs the public name of the site: `mogine deploy nginx --domain chat.example.com`, "
            "or MOGINE_ALLOWED_HOSTS in .env"
        )


def _head(what: str, where: str) -> Lines:
    return [
        f"# mogine: {what}. Written by `mogine deploy nginx`; run it again rather than change this.",
        f"# Belongs into {where}",
    ]


def _shared(site: Site) -> Lines:
    """Directives of the http context."""
    lines = [
        "",
        "# Addresses in the access logs lose their end: enough to see a flood, too little to know a person.",
        "map $remote_addr $mogine_visitor {",
        '    "~^(?<mogine_v4>[0-9]+[.][0-9]+[.][0-9]+)[.]" $mogine_v4.0;',
        '    "~^(?<mogine_v6>[0-9a-f]+:[0-9a-f]*:[0-9a-f]*):" $mogine_v6::;',
        '    default "-";',
        "}",
        "# Without the query string: in it stands what somebody searched for.",
        'log_format mogine escape=json \'{"at":"$time_iso8601","visitor":"$mogine_visitor",'
        '"method":"$request_method","path":"$uri","status":$status,"bytes":$body_bytes_sent,'
        '"seconds":$request_time,"upstream_seconds":"$upstream_response_time",'
        '"request_id":"$upstream_http_x_request_id"}\';',
        "",
        "# A coarse fence against floods; how often a visitor may ask is counted by mogine itself.",
        "limit_req_zone $binary_remote_addr zone=mogine_requests:10m rate=20r/s;",
        "limit_conn_zone $binary_remote_addr zone=mogine_open:10m;",
        "",
    ]
    # Connections that carry nothing but questions are the quickest in mogine: they have their own pool.
    for name, port in {**_ports(site), "questions": site.proxy_port}.items():
        address = f"[{site.host}]" if ":" in site.host else site.host
        servers = site.upstreams("proxy" if name == "questions" else name)
        lines += [
            f"upstream mogine_{name} {{",
            *(_choice(name, servers) if servers else [f"    server {address}:{port};"]),
            "    keepalive 32;",
            # shorter than ours, which would meet a question half-way; one that stops waits for less
            f"    keepalive_timeout {SPREAD_KEEPALIVE if servers else '20s'};",
            "}",
        ]
    if _has_writer(site):
        lines += [f"upstream mogine_{WRITER} {{", f"    server {site.kbs[0]};", "}"]
    return lines


def _has_writer(site: Site) -> bool:
    """Whether documents have to be sent to one of several: the others take over what it has published."""
    return bool(site.admin_from) and len(site.kbs) > 1


def _choice(name: str, servers: tuple[str, ...]) -> Lines:
    """Servers of which the least busy is asked, and one that refuses is left alone for a moment.

    It counts as back only when an answer of it has ended, which may take minutes. In a rolling restart all
    may be marked like that although each but one would answer: so all stand there once more, for when nobody
    is left, without marks.
    """
    return [
        f"    zone mogine_{name} 64k;",
        "    least_conn;",
        *(f"    server {server} max_fails=1 fail_timeout=2s;" for server in servers),
        *(f"    server {server} backup max_fails=0;" for server in servers if len(servers) > 1),
    ]


def _ports(site: Site) -> dict[str, int]:
    return {"proxy": site.proxy_port, "kb": site.kb_port, "analytics": site.analytics_port}


def _redirecting_server(site: Site) -> Lines:
    port = "" if site.https_port == 443 else f":{site.https_port}"
    return [
        "server {",
        f"    listen {site.http_port};",
        f"    listen [::]:{site.http_port};",
        f"    server_name {site.domain};",
        "    server_tokens off;",
        *_indented(_real_address(site)),
        "    # certbot proves here that the name is yours",
        "    location ^~ /.well-known/acme-challenge/ {",
        "        root /var/www/html;",
        "    }",
        "    location / {",
        f"        return 301 https://{site.domain}{port}$request_uri;",
        "    }",
        "}",
    ]


def _server(site: Site) -> Lines:
    return [
        "server {",
        f"    listen {site.https_port} ssl http2;",
        f"    listen [::]:{site.https_port} ssl http2;",
        f"    server_name {site.domain};",
        "    server_tokens off;",
        f"    ssl_certificate {_quoted(site.tls_certificate)};",
        f"    ssl_certificate_key {_quoted(site.tls_key)};",
        "    ssl_protocols TLSv1.2 TLSv1.3;",
        f"    ssl_ciphers {CIPHERS};",
        "    ssl_prefer_server_ciphers off;",
        "    ssl_session_cache shared:mogine_tls:10m;",
        "    ssl_session_timeout 1d;",
        "    ssl_session_tickets off;",
        f"    {HSTS}",
        "    client_header_timeout 10s;",
        *_indented(_real_address(site)),
        "",
        *_indented(_locations(site)),
        *([] if site.prefix == "/" else ["    location / {", "        return 404;", "    }"]),
        "}",
    ]


def _real_address(site: Site) -> Lines:
    """Behind a balancer the address of the visitor stands in a header that only the balancer may set."""
    if not site.behind:
        return []
    return [
        *(f"set_real_ip_from {network};" for network in site.behind),
        "real_ip_header X-Forwarded-For;",
        "real_ip_recursive on;",
    ]


def _locations(site: Site) -> Lines:
    """Directives of the server context."""
    prefix = site.prefix
    bare = prefix.rstrip("/")
    host = "$host" if site.https_port == 443 else f"$host:{site.https_port}"
    lines = (
        []
        if prefix == "/"
        else [f"location = {bare} {{", "    absolute_redirect off;", f"    return 301 {prefix};", "}"]
    )
    lines += [
        f"location ^~ {prefix} {{",
        *_indented(_logs(site, "proxy")),
        f"    client_max_body_size {site.max_body_bytes};",
        "    client_body_timeout 15s;",
        "    limit_req zone=mogine_requests burst=60 nodelay;",
        "    limit_req_status 429;",
        "    limit_conn mogine_open 40;",
        "    limit_conn_status 429;",
        "",
        "    proxy_http_version 1.1;",
        '    proxy_set_header Connection "";',
        f"    proxy_set_header Host {host};",
        "    # What a visitor claims about the way here is dropped, not added to.",
        "    proxy_set_header X-Forwarded-For $remote_addr;",
        "    proxy_set_header X-Forwarded-Proto $scheme;",
        '    proxy_set_header Forwarded "";',
        f"    proxy_connect_timeout {2 if site.is_spread else 5}s;",
        "    proxy_send_timeout 60s;",
        "    proxy_read_timeout 60s;",
        *_indented(_elsewhere(site)),
        "",
        "    gzip on;",
        "    gzip_proxied any;",
        "    gzip_vary on;",
        "    gzip_min_length 1024;",
        "    gzip_types text/css text/javascript application/json image/svg+xml;",
        "    absolute_redirect off;",
        *(f"    error_page {status} @mogine_{status};" for status in ERRORS),
        "",
    ]
    for place in (*PLACES, *(PLACES_OF_RUNNING if site.proxies else ())):
        lines += [*_indented(_place(site, place)), ""]
    lines.append("    # For the machine itself, not for the world.")
    for path in PATHS_INSIDE:
        lines += [f"    location = {bare}{path} {{", "        return 404;", "    }"]
    lines += [*_indented(_owners_side(site)), ""]
    lines += ["    # pages, and what else visitors need", *_indented(_passing(site, "proxy")), "}"]
    for status in ERRORS:
        lines += _told(status)
    return lines


def _elsewhere(site: Site) -> Lines:
    """When the next server is asked instead."""
    if not site.is_spread:
        return ["# A question is never asked twice.", "proxy_next_upstream off;"]
    return [
        "# A question goes to another server while none has received it, and is never asked twice; what only",
        "# reads may be asked again.",
        "proxy_next_upstream error timeout http_503;",
        "proxy_next_upstream_timeout 10s;",
    ]


def _place(site: Site, place: _Place) -> Lines:
    path = site.prefix.rstrip("/") + place.path
    exact = place.match == "="
    lines = [f"# {place.remark}", f"location {place.match} {path} {{"]
    if place.stream:
        lines += [
            "    proxy_buffering off;",
            "    proxy_cache off;",
            "    gzip off;",
            f"    proxy_read_timeout {_whole(site.answer_timeout_s + 15)}s;",
        ]
    if site.proxies and place.running:
        lines += [
            "    # Only one of the servers has it; the others say 404, and asking them does nothing.",
            "    proxy_next_upstream error timeout http_404 http_503 non_idempotent;",
        ]
    if place.server != "proxy":
        lines += _indented(_logs(site, place.server))
    lines += _indented(_passing(site, place.pool or place.server, place.path if exact else ""))
    return [*lines, "}"]


def _owners_side(site: Site) -> Lines:
    if not site.admin_from:
        return ["# The owner's side stays inside; `mogine deploy nginx --admin-from NETWORK` opens it."]
    bare = site.prefix.rstrip("/")
    lines = []
    for path in PATHS_OF_OWNER:
        server = "kb" if path == "/api/documents" else "analytics"
        lines += [
            "# the owner's side, which asks for the admin token too",
            f"location ^~ {bare}{path} {{",
            *(f"    allow {network};" for network in site.admin_from),
            "    deny all;",
            f"    client_max_body_size {site.max_upload_bytes};",
            "    proxy_read_timeout 120s;",
            "    proxy_buffering off;",
            *_indented(_logs(site, server)),
            *_indented(_passing(site, WRITER if server == "kb" and _has_writer(site) else server)),
            "}",
        ]
    return lines


def _passing(site: Site, server: str, path: str = "") -> Lines:
    """On to a server, with the prefix taken off; what was compared with the locations is what is sent."""
    if path:
        return [f"proxy_pass http://mogine_{server}{path};"]
    return [
        f"rewrite ^{_regex(site.prefix.rstrip('/'))}(/.*)$ $1 break;",
        f"proxy_pass http://mogine_{server};",
    ]


def _logs(site: Site, server: str) -> Lines:
    return [
        f"access_log {_quoted(site.log_dir / f'mogine_{server}_access.log')} mogine;",
        f"error_log {_quoted(site.log_dir / f'mogine_{server}_error.log')} warn;",
    ]


def _told(status: int) -> Lines:
    kind, reason, words = ERRORS[status]
    error = {"message": words, "type": kind, "code": status, "reason": reason, "request_id": "$request_id"}
    body = json.dumps({"error": error}, ensure_ascii=False)
    return [
        f"location @mogine_{status} {{",
        "    default_type application/json;",
        f"    {HSTS}",
        *(["    add_header Retry-After 5 always;"] if status in AGAIN else []),
        f"    return {status} '{body}';",
        "}",
    ]


def _regex(text: str) -> str:
    return text.replace(".", "[.]")


def _quoted(path: Path) -> str:
    """A path as nginx reads it; it would take a `$` for the beginning of a variable, and knows no escape."""
    text = str(path)
    if "$" in text:
        raise SettingsError(f"nginx cannot read {text!r}: a path in its files holds no $")
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _indented(lines: Lines) -> Lines:
    return [f"    {line}" if line else line for line in lines]


def _whole(seconds: float) -> int:
    return int(-(-seconds // 1))

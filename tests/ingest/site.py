"""A web site of a few pages on loopback, which remembers what was asked of it."""

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.upstreams.tls import certificate_files


@dataclass
class Reply:
    """One answer; `location` makes it a redirect."""

    body: bytes = b""
    status: int = 200
    content_type: str = "text/html"
    headers: dict[str, str] = field(default_factory=dict)


class Site:
    """`pages` maps paths to replies; what is not there is 404."""

    def __init__(self, pages: dict[str, Reply | str]) -> None:
        self.pages = pages
        self.asked: list[tuple[str, str]] = []
        self.agents: set[str] = set()
        self.port = 0

    @property
    def paths(self) -> list[str]:
        return [path for path, _ in self.asked]


@contextmanager
def serving(site: Site, *, tls: bool = False, port: int = 0) -> Iterator[Site]:
    """The site on a free port or on `port`, for as long as the context lasts."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            site.asked.append((self.path, self.headers.get("Host", "")))
            site.agents.add(self.headers.get("User-Agent", ""))
            found = site.pages.get(self.path, Reply(status=404))
            reply = Reply(found.encode()) if isinstance(found, str) else found
            self.send_response(reply.status)
            self.send_header("Content-Type", reply.content_type)
            for name, value in reply.headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(reply.body)

        def log_message(self, format: str, *args: object) -> None:
            """Silence."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        certificate, key = certificate_files()
        context.load_cert_chain(certificate, key)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    site.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        thread.join()
        server.server_close()

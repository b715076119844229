"""Debian's nginx in front of our servers: TLS, a path prefix and nothing buffered, on a free loopback port.

A pytest plugin with the fixture `nginx`: `front = nginx(port)` gives a running `Nginx` that passes
`https://localhost:PORT/~temp/mogine_agent/...` on to `http://127.0.0.1:{port}/...`, as a site of ours is set
up in production. Other configurations are written out: `Nginx(folder, servers=text).started()`.
"""

import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import pytest

from tests.upstreams.tls import certificate_files

PREFIX = "/~temp/mogine_agent/"
LISTEN = "@LISTEN@"
PATIENCE_S = 20.0
POLL_S = 0.005

MAIN = """\
daemon off;
{user}worker_processes 1;
pid {folder}/nginx.pid;
error_log {folder}/error.log info;
events {{ worker_connections 1024; }}
http {{
    access_log {folder}/access.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
{servers}
}}
"""

SITE = """\
    server {{
        listen {listen} ssl;
        server_name localhost;
        ssl_certificate {certificate};
        ssl_certificate_key {key};
        client_max_body_size 33m;
{locations}
    }}
"""

LOCATION = """\
        location {prefix} {{
            proxy_pass http://127.0.0.1:{port}/;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $http_host;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Proto $scheme;
            proxy_buffering off;
            proxy_read_timeout 330s;
        }}
"""


def site(places: Mapping[str, int], more: str = "") -> str:
    """A server of TLS with a location for each prefix (`/x/`) and the port behind it, and `more` inside."""
    locations = "".join(LOCATION.format(prefix=prefix, port=port) for prefix, port in places.items())
    certificate, key = certificate_files()
    return SITE.format(listen=LISTEN, certificate=certificate, key=key, locations=locations + more)


class Nginx:
    """One nginx of its own: a master process and a worker, in `folder` with its logs.

    `servers` is what stands in `http { }`, with `listen @LISTEN@ ...;` where its one port belongs.
    The port is taken once and kept: a restart never finds it in somebody else's hands.
    """

    def __init__(self, folder: Path, servers: str) -> None:
        self.folder = folder
        self.servers = servers
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=512)
        self._process: subprocess.Popen[bytes] | None = None

    # --- what a test asks for ----------------------------------------------------------------------

    @property
    def port(self) -> int:
        return int(self._socket.getsockname()[1])

    @property
    def origin(self) -> str:
        return f"https://localhost:{self.port}"

    def url(self, path: str, prefix: str = PREFIX) -> str:
        """The address of `path` (without a leading slash) behind `prefix`."""
        return f"{self.origin}{prefix}{path.removeprefix('/')}"

    @property
    def ca_file(self) -> Path:
        """The self-signed certificate to trust."""
        return certificate_files()[0]

    @property
    def ssl_context(self) -> ssl.SSLContext:
        """What a client needs to trust it."""
        return ssl.create_default_context(cafile=str(self.ca_file))

    @property
    def access_log(self) -> list[str]:
        return _lines(self.folder / "access.log")

    @property
    def error_log(self) -> list[str]:
        return _lines(self.folder / "error.log")

    def problems(self) -> list[str]:
        """What the error log has of level warn and worse."""
        grave = ("[warn]", "[error]", "[crit]", "[alert]", "[emerg]")
        return [line for line in self.error_log if any(level in line for level in grave)]

    @property
    def workers(self) -> list[int]:
        """Process ids of the master's children; those that finish old connections after a reload included."""
        if self._process is None:
            return []
        pid = self._process.pid
        try:
            return [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        except FileNotFoundError:
            return []

    # --- life --------------------------------------------------------------------------------------

    @contextmanager
    def started(self) -> Iterator[Self]:
        """Running for as long as the context lasts."""
        try:
            self.start()
            yield self
        finally:
            self.stop()
            self._socket.close()

    def check(self) -> str:
        """What `nginx -t` says of the configuration; AssertionError when it is not taken."""
        self._write()
        done = subprocess.run([*self._command(), "-t"], capture_output=True, text=True, timeout=PATIENCE_S)
        assert done.returncode == 0, done.stderr
        return done.stderr

    def start(self) -> None:
        """Start, and return once it takes connections."""
        self._write()
        descriptor = self._socket.fileno()
        self._process = subprocess.Popen(
            self._command(),
            # How nginx hands its sockets to a new binary; so nobody can take the port in between.
            env={**os.environ, "NGINX": f"{descriptor};"},
            pass_fds=(descriptor,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        self._wait(lambda: bool(self.workers), "to start")

    def reload(self, servers: str | None = None) -> None:
        """As `nginx -s reload`: a new worker takes new connections, the old one finishes its own."""
        if servers is not None:
            self.servers = servers
            self._write()
        before = set(self.workers)
        self._running.send_signal(signal.SIGHUP)
        self._wait(lambda: bool(set(self.workers) - before), "to reload")

    def restart(self) -> None:
        """As `systemctl restart nginx`: connections are cut."""
        self.stop()
        self.start()

    def stop(self) -> None:
        """As `nginx -s stop`: connections are cut."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.terminate()
        try:
            process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    @property
    def _running(self) -> "subprocess.Popen[bytes]":
        assert self._process is not None, "nginx is not running"
        return self._process

    def _command(self) -> list[str]:
        binary = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
        assert binary, "nginx is not installed; run scripts/test-system"
        folder = self.folder
        return [binary, "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]

    def _write(self) -> None:
        user = "user root;\n" if os.geteuid() == 0 else ""  # else its workers could not read the folder
        servers = self.servers.replace(LISTEN, f"127.0.0.1:{self.port}")
        text = MAIN.format(user=user, folder=self.folder, servers=servers)
        (self.folder / "nginx.conf").write_text(text)

    def _wait(self, true: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            assert self._running.poll() is None, self.error_log
            assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for nginx {what}: {self.error_log}"
            time.sleep(POLL_S)


def _lines(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines() if path.exists() else []


Fronted = Callable[..., Nginx]


@pytest.fixture
def nginx() -> Iterator[Fronted]:
    """Starts one: `nginx(port)` before a server of ours, `nginx({"/a/": port, ...})` before several, or
    `nginx(servers=text)` with a configuration of its own."""
    with ExitStack() as stack:

        def start(
            behind: int | Mapping[str, int] | None = None, *, more: str = "", servers: str | None = None
        ) -> Nginx:
            places = {PREFIX: behind} if isinstance(behind, int) else (behind or {})
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="nginx-"))
            one = Nginx(Path(folder), site(places, more) if servers is None else servers)
            return stack.enter_context(one.started())

        yield start

"""A real PostgreSQL of its own, in a temporary folder: a pytest plugin with the fixture `postgres`.

One cluster runs per session, started when first needed. Every test that asks for `postgres` gets an empty
database of its own; `postgres.url` is what MOGINE_DATABASE_URL gets. A test that pauses or kills the server
takes `own_postgres`, which nobody else uses.
"""

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import psycopg
import pytest

PATIENCE_S = 30.0
PASSWORD = "test-password"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _program(name: str) -> str:
    """`initdb` and `postgres` of the newest PostgreSQL that is installed."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = next((str(folder / name) for folder in reversed(folders) if (folder / name).exists()), None)
    program = found or shutil.which(name)
    assert program, "PostgreSQL is not installed; run scripts/test-system"
    return program


class PostgresServer:
    """A cluster in `folder`, on loopback and quick: unless it is `durable` a power cut would lose it, and
    nobody minds."""

    def __init__(self, folder: Path, *, durable: bool = False) -> None:
        self._durable = durable
        self._data = folder / "data"
        self._log = folder / "log"
        self.port = _free_port()
        self._process: subprocess.Popen[bytes] | None = None
        # PostgreSQL refuses to run as root.
        self._owner = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None
        if self._owner is not None:
            os.chown(folder, self._owner, -1)
            folder.chmod(0o700)
        secret = folder / "password"
        secret.write_text(PASSWORD)
        if self._owner is not None:
            os.chown(secret, self._owner, -1)
        self._run(
            _program("initdb"), "--pgdata", self._data, "--username", "mogine", "--encoding", "UTF8",
            "--locale", "C.UTF-8", "--auth", "scram-sha-256", "--pwfile", secret, "--no-sync",
        )  # fmt: skip

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://mogine:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    @property
    def pid(self) -> int:
        """Of the first of its processes."""
        assert self._process is not None, "PostgreSQL is not running"
        return self._process.pid

    def start(self) -> Self:
        """Returns once it answers."""
        options = {
            "listen_addresses": "127.0.0.1", "port": str(self.port), "unix_socket_directories": "",
            "fsync": "on" if self._durable else "off", "shared_buffers": "64MB", "max_connections": "100",
            "logging_collector": "off",
        }  # fmt: skip
        given = [part for name, value in options.items() for part in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [_program("postgres"), "-D", str(self._data), *given],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                user=self._owner,
                cwd="/",
                start_new_session=True,
            )
        end = time.monotonic() + PATIENCE_S
        while True:
            assert self._process.poll() is None, self._log.read_text()
            try:
                psycopg.connect(self.url(), connect_timeout=2).close()
                return self
            except psycopg.OperationalError:
                assert time.monotonic() < end, self._log.read_text()
                time.sleep(0.05)

    def cpu_s(self) -> float:
        """What it has used so far, those who have ended included."""
        assert self._process is not None, "PostgreSQL is not running"
        ticks = 0
        for pid in (self._process.pid, *self._children(self._process.pid)):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
                ticks += sum(map(int, after_name[11:15]))
        return ticks / os.sysconf("SC_CLK_TCK")

    def pause(self) -> None:
        """It takes connections and says nothing, and neither do those that it has."""
        self._signal_all(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal_all(signal.SIGCONT)

    def stop(self) -> None:
        """At once, as after a crash; what was committed is there when it starts again."""
        process = self._process
        if process is not None:
            self.resume()
            self._process = None
            children = self._children(process.pid)
            process.send_signal(signal.SIGQUIT)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:  # one that was just being born hears nothing
                for pid in (*children, *self._children(process.pid), process.pid):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.wait(PATIENCE_S)

    def kill(self) -> None:
        """All its processes at once, by SIGKILL."""
        process = self._process
        assert process is not None, "PostgreSQL is not running"
        self.pause()  # so that none is born meanwhile
        self._process = None
        for pid in (process.pid, *self._children(process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(PATIENCE_S)

    def query(self, statement: str, database: str = "postgres") -> list[tuple[object, ...]]:
        """Rows of one statement, by a connection of its own."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def _signal_all(self, number: signal.Signals) -> None:
        """To the server and its children, each of which has a group of its own."""
        assert self._process is not None, "PostgreSQL is not running"
        for pid in (self._process.pid, *self._children(self._process.pid)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    @staticmethod
    def _children(pid: int) -> list[int]:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

    def _run(self, *command: str | Path) -> None:
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, user=self._owner, cwd="/", timeout=120
        )
        assert done.returncode == 0, done.stdout + done.stderr


@dataclass(frozen=True, slots=True)
class Database:
    """One database, and the server that has it."""

    server: PostgresServer
    name: str

    @property
    def url(self) -> str:
        return self.server.url(self.name)

    def query(self, statement: str) -> list[tuple[object, ...]]:
        return self.server.query(statement, self.name)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """One that runs, for all tests of a session."""
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as folder:
        server = PostgresServer(Path(folder)).start()
        yield server
        server.stop()


@pytest.fixture
def postgres(postgres_server: PostgresServer) -> Iterator[Database]:
    """An empty database of its own."""
    name = f"test_{secrets.token_hex(6)}"
    postgres_server.query(f"CREATE DATABASE {name}")
    yield Database(postgres_server, name)
    postgres_server.query(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def own_postgres() -> Iterator[Database]:
    """A server of its own, to be paused and stopped."""
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as folder:
        server = PostgresServer(Path(folder)).start()
        yield Database(server, "postgres")
        server.stop()

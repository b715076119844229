"""What a visitor who stops reading makes the proxy hold, with a vendor that pours as fast as it can."""

import asyncio
import contextlib
import itertools
import json
import socket
import ssl
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.serve.conftest import question
from tests.servers import Child, Spawn
from tests.upstreams.doubao import KEY
from tests.upstreams.tls import certificate_files

READERS = 12
FRAME = (
    b'data: {"id":"x","object":"chat.completion.chunk","created":1,"model":"m","choices":'
    b'[{"index":0,"delta":{"role":"assistant","content":"ab"},"finish_reason":null}]}\n\n'
)
BLOCK = FRAME * 400


class Pouring:
    """Sends frames for as long as somebody takes them; `sent` counts the bytes of each connection."""

    def __init__(self) -> None:
        self.sent: list[int] = []

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        number = len(self.sent)
        self.sent.append(0)
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            await reader.readuntil(b"\r\n\r\n")
            head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            writer.write(head)
            while True:
                writer.write(BLOCK)
                await writer.drain()
                self.sent[number] += len(BLOCK)
        writer.transport.abort()

    async def is_held_back(self, number: int) -> None:
        """Return once nothing more of answer `number` is taken."""
        async with asyncio.timeout(20):
            same, last = 0, -1
            while same < 5:
                await asyncio.sleep(0.02)
                now = self.sent[number] if number < len(self.sent) else -1
                same, last = (same + 1 if now == last > 0 else 0), now


@asynccontextmanager
async def pouring(tls: bool) -> AsyncIterator[tuple[Pouring, dict[str, str]]]:
    context = None
    if tls:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*certificate_files())
    vendor = Pouring()
    server = await asyncio.start_server(vendor.answer, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    url = f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    environ = {"DOUBAO_API_KEY": KEY, "DOUBAO_BASE_URL": url, "SSL_CERT_FILE": str(certificate_files()[0])}
    try:
        yield vendor, environ
    finally:
        server.close()


def memory_kib(child: Child) -> int:
    """What the process alone holds in memory."""
    text = Path(f"/proc/{child.process.pid}/smaps_rollup").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("Pss:")]
    return int(line.split()[1])


def ask_and_read_nothing(child: Child) -> socket.socket:
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", child.port()))
    body = json.dumps(question(stream=True)).encode()
    head = "POST /api/llm/doubao HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    sock.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    return sock


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
async def test_a_reader_who_stops_makes_the_proxy_hold_less_than_a_mebibyte(spawn: Spawn, tls: bool) -> None:
    """P6, F12, B21."""
    async with pouring(tls) as (vendor, environ):
        child = await spawn("proxy", {**environ, "MOGINE_MAX_STREAMS_PER_VISITOR": str(READERS)})
        with contextlib.ExitStack() as stack:
            held = [memory_kib(child)]
            for number in range(READERS):
                stack.enter_context(ask_and_read_nothing(child))
                await vendor.is_held_back(number)
                held.append(memory_kib(child))
            each = [after - before for before, after in itertools.pairwise(held)]
        # What the program makes for the first one, and a thread's arena now and then, is not theirs.
        assert statistics.median(each) <= 1024, held

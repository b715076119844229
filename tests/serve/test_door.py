"""A port closes without turning away who has already come."""

import asyncio
import errno
import select
import socket
import sys

import pytest

from mogine.serve.door import Door

linux = pytest.mark.skipif(sys.platform != "linux", reason="filters of sockets are the Linux kernel's")


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read(100))
    await writer.drain()
    writer.close()


async def opened() -> tuple[Door, tuple[str, int]]:
    sock = socket.create_server(("127.0.0.1", 0))
    sock.setblocking(False)
    server = await asyncio.start_server(echo, sock=sock)
    return Door([sock], [server], lambda: 0), sock.getsockname()


async def test_who_has_come_and_was_not_noticed_yet_is_let_in() -> None:
    door, address = await opened()
    with socket.create_connection(address) as visitor:
        visitor.sendall(b"a question")
        await door.close()  # up to here the loop has not looked at its sockets
        visitor.setblocking(False)
        async with asyncio.timeout(5):
            assert await asyncio.get_running_loop().sock_recv(visitor, 100) == b"a question"
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(address)


@linux
async def test_nobody_comes_in_while_it_closes() -> None:
    door, address = await opened()
    closing = asyncio.create_task(door.close())
    await asyncio.sleep(0)
    with socket.socket() as visitor:
        visitor.setblocking(False)
        assert visitor.connect_ex(address) == errno.EINPROGRESS
        assert select.select([], [visitor], [], 0.005) == ([], [], [])
    await closing

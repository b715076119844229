"""The port of one server: who listens there, who has come in, and how it closes with nobody on the step."""

import asyncio
import contextlib
import ctypes
import socket
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

HANDSHAKE_S = 0.02
SO_ATTACH_FILTER = 26  # of Linux; the module `socket` does not name it
# For the kernel: drop what asks for a new connection (SYN without ACK), let everything else pass.
REFUSING = b"".join(
    struct.pack("HBBI", *step)
    for step in (
        (0x30, 0, 0, 13),  # the flags of the TCP header
        (0x54, 0, 0, 0x12),  # of these SYN and ACK
        (0x15, 0, 1, 0x02),  # only SYN?
        (0x06, 0, 0, 0),  # drop
        (0x06, 0, 0, 0xFFFFFFFF),  # pass
    )
)


@dataclass(frozen=True, slots=True)
class Door:
    """`connections` tells how many are open, idle ones included."""

    sockets: Sequence[socket.socket]
    listeners: Sequence[asyncio.Server]
    connections: Callable[[], int]

    async def close(self) -> None:
        """Take no new connections; those that had begun to come are still let in.

        A plain close resets every connection that the kernel has accepted and we have not, with the question
        that may be in it. Who knocks meanwhile is not heard, tries again after a second, and is refused.
        """
        for each in self.sockets:
            _take_no_more(each)
        await asyncio.sleep(HANDSHAKE_S)
        for listener in self.listeners:
            listener.close()


def _take_no_more(sock: socket.socket) -> None:
    program = ctypes.create_string_buffer(REFUSING, len(REFUSING))
    option = struct.pack("HP", len(REFUSING) // 8, ctypes.addressof(program))
    with contextlib.suppress(OSError):  # elsewhere than on Linux the moment between stays
        sock.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, option)

"""Waiting for what another process, thread or task does, where there is no event to wait for."""

import asyncio
import inspect
import time
from collections.abc import Callable
from typing import Any

import pytest

PACE_S = 0.02
SLOW_PACE_S = 0.1  # what is asked for may be a question that counts against limits


async def until(true: Callable[[], Any], timeout_s: float = 30, what: str = "what never came") -> None:
    """Until `true()`, or what it returns when awaited, is so; else the test fails with `what`."""
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                answer = true()
                if await answer if inspect.isawaitable(answer) else answer:
                    return
                await asyncio.sleep(PACE_S)
    except TimeoutError:
        pytest.fail(f"waited {timeout_s:g} s for {what}")


def wait_until(true: Callable[[], Any], timeout_s: float = 60, what: str = "what never came") -> None:
    """`until`, for a test without a loop."""
    end = time.monotonic() + timeout_s
    while not true():
        if time.monotonic() > end:
            pytest.fail(f"waited {timeout_s:g} s for {what}")
        time.sleep(SLOW_PACE_S)

"""W3C trace context: what a caller says its request belongs to, if it says so properly."""

import re
from collections.abc import Mapping

# Version 00 as it is defined; neither the trace's id nor its parent's may be nothing but zeros.
TRACEPARENT = re.compile(r"00-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")


def trace_of(headers: Mapping[str, str]) -> str:
    """A valid `traceparent`, else ""."""
    value = headers.get("traceparent")
    return value if value and TRACEPARENT.fullmatch(value) else ""


def trace_id(traceparent: str) -> str:
    """The part that all requests of one trace share."""
    return traceparent[3:35]


def parent_id(traceparent: str) -> str:
    """The part that names the caller's own span."""
    return traceparent[36:52]


def trace_flags(traceparent: str) -> int:
    """1: the caller's side is sampled."""
    return int(traceparent[53:], 16)


def written(trace: int, span: int, flags: int) -> str:
    """The `traceparent` that names `span` of `trace`."""
    return f"00-{trace:032x}-{span:016x}-{flags:02x}"

"""What can go wrong in mogine, and the one shape in which it is told.

MogineError                 500 internal_error            exit 1
├── SettingsError           a setting, flag or home is wrong        exit 2
├── RequestError            400 invalid_request                     exit 2
│   ├── Unauthorized        401 unauthorized
│   ├── Forbidden           403 forbidden
│   ├── NotFound            404 not_found
│   ├── MethodNotAllowed    405 method_not_allowed
│   ├── RequestTimeout      408 request_timeout
│   ├── TooLarge            413 payload_too_large
│   ├── UnsupportedMedia    415 unsupported_media_type
│   ├── UnreadableDocument  422 bad_document
│   ├── ContentFiltered     400 invalid_request, a vendor's moderation declined the words
│   └── RateLimited         429 rate_limited
├── UpstreamError           502 upstream_error                      exit 4
│   ├── UpstreamUnreachable 502 upstream_error, no connection or none that lasted to the answer
│   ├── UpstreamRefused     502 upstream_refused (401, 403, 404 of the vendor)
│   ├── UpstreamBadResponse 502 upstream_bad_response
│   │   └── UpstreamCut     502 upstream_bad_response, the answer broke off
│   ├── AnswerTooLong       502 answer_too_long
│   ├── UpstreamBusy        429 upstream_busy
│   ├── UpstreamUnavailable 503 upstream_unavailable
│   └── UpstreamTimeout     504 upstream_timeout
├── Unavailable             503 overloaded, shutting_down, kb_unavailable   exit 1
├── StoreError              500 internal_error, a data file cannot be used  exit 1
└── Locked                  503 overloaded, another run holds the lock      exit 5
"""

from dataclasses import dataclass
from typing import Any, ClassVar


class MogineError(Exception):
    """Something a person should be told: `message` names the input and the remedy.

    `message` never holds a key, a stack trace, a vendor's body or, for errors that reach
    visitors, a local path. `reason` overrides the class's stable word for programs.
    """

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    default_reason: ClassVar[str] = "internal_error"
    exit_code: ClassVar[int] = 1

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
        upstream_status: int | None = None,
        upstream_code: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.param = param
        self.retry_after_s = retry_after_s
        self.upstream_status = upstream_status
        self.upstream_code = upstream_code


class SettingsError(MogineError):
    """A setting, a flag or the home folder is wrong; the message lists every problem found."""

    exit_code = 2


class RequestError(MogineError):
    """The request cannot be understood or is not allowed as it stands."""

    status = 400
    type = "invalid_request_error"
    default_reason = "invalid_request"
    exit_code = 2


class Unauthorized(RequestError):
    status = 401
    type = "authentication_error"
    default_reason = "unauthorized"


class Forbidden(RequestError):
    status = 403
    type = "permission_error"
    default_reason = "forbidden"


class NotFound(RequestError):
    status = 404
    default_reason = "not_found"
    exit_code = 1


class MethodNotAllowed(RequestError):
    """`allowed` is the value of the `Allow` header: methods, comma separated."""

    status = 405
    default_reason = "method_not_allowed"

    def __init__(self, message: str, *, allowed: str) -> None:
        super().__init__(message)
        self.allowed = allowed


class RequestTimeout(RequestError):
    status = 408
    type = "timeout_error"
    default_reason = "request_timeout"


class TooLarge(RequestError):
    status = 413
    default_reason = "payload_too_large"


class UnsupportedMedia(RequestError):
    status = 415
    default_reason = "unsupported_media_type"
    exit_code = 1


class UnreadableDocument(RequestError):
    status = 422
    default_reason = "bad_document"
    exit_code = 1


class ContentFiltered(RequestError):
    """A vendor's moderation declined the question or the answer; its own words are not repeated."""

    exit_code = 1


class RateLimited(RequestError):
    """`retry_after_s` is always set; reasons: rate_limited, too_many_streams, budget_exhausted."""

    status = 429
    type = "rate_limit_error"
    default_reason = "rate_limited"
    exit_code = 6


class UpstreamError(MogineError):
    """A vendor answered with something that is no answer; its own text is never repeated."""

    status = 502
    type = "proxy_error"
    default_reason = "upstream_error"
    exit_code = 4


class UpstreamUnreachable(UpstreamError):
    """No connection to the vendor, or none that lasted until its answer began."""


class UpstreamRefused(UpstreamError):
    default_reason = "upstream_refused"


class UpstreamBadResponse(UpstreamError):
    default_reason = "upstream_bad_response"


class UpstreamCut(UpstreamBadResponse):
    """The answer broke off: the connection ended, or the stream did, before its finish reason."""


class AnswerTooLong(UpstreamError):
    default_reason = "answer_too_long"


class UpstreamBusy(UpstreamError):
    status = 429
    type = "rate_limit_error"
    default_reason = "upstream_busy"


class UpstreamUnavailable(UpstreamError):
    status = 503
    type = "server_error"
    default_reason = "upstream_unavailable"


class UpstreamTimeout(UpstreamError):
    status = 504
    default_reason = "upstream_timeout"


class Unavailable(MogineError):
    """This server cannot take the request now; reasons: overloaded, shutting_down, kb_unavailable."""

    status = 503
    default_reason = "overloaded"


class StoreError(MogineError):
    """A file of ours cannot be opened, read or written; the message names it for the owner."""


class Locked(MogineError):
    """Another run of mogine holds the lock that this one needs."""

    status = 503
    default_reason = "overloaded"
    exit_code = 5


@dataclass(frozen=True, slots=True)
class ErrorEnvelope:
    """The one JSON shape of every error, on every path of every server."""

    message: str
    type: str
    code: int
    reason: str
    request_id: str
    param: str | None = None
    upstream_status: int | None = None
    upstream_code: str | None = None

    @classmethod
    def of(cls, error: BaseException, request_id: str) -> "ErrorEnvelope":
        """Any exception as an envelope; what is not a MogineError tells nothing about itself."""
        if not isinstance(error, MogineError):
            return cls(
                "Something went wrong on our side; the server's log has the details under this request id",
                "server_error",
                500,
                "internal_error",
                request_id,
            )
        return cls(
            error.message,
            error.type,
            error.status,
            error.reason,
            request_id,
            error.param,
            error.upstream_status,
            error.upstream_code,
        )

    def to_dict(self) -> dict[str, Any]:
        """`{"error": {...}}`; optional fields are left out when they are not set."""
        body: dict[str, Any] = {
            "message": self.message,
            "type": self.type,
            "code": self.code,
            "reason": self.reason,
            "request_id": self.request_id,
        }
        for name in ("param", "upstream_status", "upstream_code"):
            if (value := getattr(self, name)) is not None:
                body[name] = value
        return {"error": body}
